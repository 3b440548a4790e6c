"""What is asked for and makes no sense is refused before anything happens, with words that say what to write; what is asked for and has no effect is said."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import (
    BadCalibration,
    BadFile,
    BadInput,
    BadLoop,
    BadModel,
    BadOption,
    BadPlan,
    BadRatio,
    BadTarget,
    GraphpruneError,
    LessThanAsked,
    UnknownName,
)

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def widths(net):
    return [layer.out_features for layer in net if isinstance(layer, nn.Linear)]


NO_SENSE = {
    "keep": ([None, 5, 0.5, True, [""], [None], [X], nn.Linear(4, 8), [nn.Linear(4, 8)], nn.LSTM, lambda one: True, "0.wieght"], UnknownName),
    "what": ([None, 5, [None], [], {}], GraphpruneError),
    "macs": ([1.5, 2.0], BadTarget),
    "examples": ([None, 5, X, "text", {"input": X}], BadInput),
    "example_kwargs": ([5, [("input", X)], X, "text"], BadInput),
    "outputs": ([[], (), True, False, "", 1.5], BadInput),
    "scope": (["foo", 5, [], True, ""], BadRatio),
    "params": ([-1, 0, True, math.nan, math.inf, [1], torch.tensor(0.5)], BadTarget),
    "memory": ([-1.0, 0.0, False, math.nan, "5", "lots"], BadTarget),
    "size": (["1,5 MB", "0,5", "1,50,000", "5 5 MB", "_5", "5_", "-5 MB", "5 MX"], BadTarget),
    "multipleof": ([8], BadOption),
    "spede": ([2], BadOption),
}
CASES = [(name, value, error) for name, (values, error) in NO_SENSE.items() for value in values]


@pytest.mark.parametrize(("name", "value", "error"), CASES, ids=[f"{name}-{at}" for at, (name, *_) in enumerate(CASES)])
def test_nonsense_is_refused_in_words(name, value, error):
    net = chain()
    for function in (graphprune.shrink, graphprune.plan):
        with pytest.raises(error) as caught:
            function(net, X, **{name: value})
        assert len(str(caught.value).splitlines()[0]) < 700 and widths(net) == [8, 6, 2]


@pytest.mark.parametrize("name", ["params", "macs", "size", "memory", "latency", "speedup", "scope", "what"])
def test_nonsense_is_found_before_the_model_runs(name):
    class Runs(nn.Linear):
        def forward(self, x):
            raise AssertionError("it ran")

    for value in (-1, math.nan, True):
        with pytest.raises(GraphpruneError) as caught:
            graphprune.shrink(Runs(4, 4), X, **{name: value})
        assert not isinstance(caught.value, BadInput | BadModel)
    with pytest.raises(BadInput, match="it ran"):  # the control: with sense it does
        graphprune.shrink(Runs(4, 4), X)


def test_an_option_that_is_not_there_has_a_neighbour():
    with pytest.raises(BadOption, match="nearest are examples="):
        graphprune.shrink(chain(), X, exampels=[X])
    with pytest.raises(BadOption, match="plan has no option 'inplace'"):
        graphprune.plan(chain(), X, inplace=True)
    with pytest.raises(BadLoop, match="the nearest is 'scope'"):
        graphprune.iterate(chain(), X, 0.5, train=lambda *_: None, evaluate=lambda _: 1.0, scop="layer")


@pytest.mark.parametrize("text", ["1_500_000", "1,500,000", "1.5M", "1500000.0"])
def test_commas_part_thousands(text):
    assert graphprune.quantities.amount("params", text) == 1_500_000


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16])
def test_numbers_of_numpy_are_numbers(kind):
    assert widths(graphprune.shrink(chain(), X, kind(0.5))) == [4, 3, 2]
    with pytest.raises(BadRatio):
        graphprune.shrink(chain(), X, kind(1.5))


REPAIRS = {"spare": [math.nan, -0.1, 1, 1.5, "a", True], "rows": [0, -5, 1.5, "a", True], "target": ["blok", None, 5], "progress": ["no", 1]}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REPAIRS.items() for value in values])
def test_a_repair_says_what_it_takes(name, value):
    batches = [torch.randn(8, 4)]
    with pytest.raises(BadCalibration, match=name):
        graphprune.Repair(batches, **{name: value})
    small, plan = graphprune.shrink(chain(), X, 0.5, return_plan=True)
    with pytest.raises(BadCalibration, match=name):
        graphprune.repair(small, chain(), plan, batches, **{name: value})


def test_batches_without_samples_and_what_they_look_like():
    with pytest.raises(BadCalibration, match="batch 1 holds no samples"):
        graphprune.shrink(chain(), X, 0.5, repair=[torch.randn(8, 4), torch.randn(0, 4)])
    shown = repr(graphprune.Repair([torch.randn(100, 4)] * 3, spare=0.5))
    assert shown == "Repair(batches=<3 batches>, spare=0.5)" and "tensor" not in shown


# -- what would have no effect ------------------------------------------------------------


@pytest.mark.parametrize("key", ["4", "*4", nn.LSTM, "4.weight"])
def test_a_width_that_cannot_be_is_said(key):
    with pytest.warns(LessThanAsked, match="the width of .* cuts nothing"):
        graphprune.shrink(chain(), X, widths={key: 1})
    with warnings.catch_warnings():  # the controls: a width that can be, and the one that is there
        warnings.simplefilter("error", LessThanAsked)
        assert widths(graphprune.shrink(chain(), X, widths={"0": 3})) == [3, 6, 2]
        assert widths(graphprune.shrink(chain(), X, widths={"0": 3, "2": 6})) == [3, 6, 2]


def test_a_ratio_beside_amounts_is_refused():
    with pytest.raises(BadOption, match="no effect"):
        graphprune.shrink(chain(), X, 0.9, what={"mlp": 0.25})
    assert widths(graphprune.shrink(chain(), X, what={"mlp": 0.25})) == [6, 5, 2]


@pytest.mark.parametrize("what", ["weight", "kernel", "vector"])
def test_masks_that_hide_nothing_are_said(what):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.warns(LessThanAsked, match="removes nothing"):
        graphprune.shrink(net, torch.zeros(1, 2, 8, 8) + 1, 0.001, what=what)


@pytest.mark.parametrize("ratios", [lambda groups: {77: 0.5}, lambda groups: {0: 2}, lambda groups: {0: math.nan}, lambda groups: 5, lambda name, module: True])
def test_a_function_of_groups_says_ratios(ratios):
    with pytest.raises((BadRatio, UnknownName), match="group"):
        graphprune.shrink(chain(), X, widths=graphprune.Widths(ratios=ratios))
    assert widths(graphprune.shrink(chain(), X, 0.5, widths=graphprune.Widths(ratios=lambda groups: {0: 0.25}))) == [6, 3, 2]


# -- rounds, files, plans ------------------------------------------------------------


def run(target, **options):
    given = {"steps": 4, "train": lambda *_: None, "evaluate": lambda _: 1.0, "progress": False}
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    return graphprune.iterate(net, X, target, **{**given, **options})


@pytest.mark.parametrize("target", [{"ratio": 0.5}, {"macs": 0.5}, {"params": 0.4}, {"size": 0.5}])
def test_a_ratio_of_a_group_is_that_of_the_whole_run(target):
    assert run(target, widths=graphprune.Widths(ratios={"0": 0.25})).model[0].out_features == 48


def test_rounds_refuse_what_each_of_them_would_do_again():
    for what in ({"mlp": 0.3}, {"mlp": None, "layers": [1]}, ("mlp", "weight")):
        with pytest.raises(BadLoop):
            run(0.5, what=what)
    for wrong in ({"train": None}, {"evaluate": 5}, {"floor": True}, {"train_first": "no"}, {"evaluate_cuts": 1}):
        with pytest.raises(GraphpruneError):
            run(0.5, **wrong)
    with pytest.raises(BadModel):
        graphprune.iterate(None, X, 0.5, train=lambda *_: None, evaluate=lambda _: 1.0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head, self.state = nn.Linear(4, 8), nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 2), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "state": self.state(x)}

    def left(self):
        return [at for at, block in enumerate(self.blocks) if isinstance(block, Block)]


@pytest.mark.parametrize("choice", [[0, -4], [0, "blocks.0"], ["blocks.0", -4, 0], [0]])
def test_a_layer_that_is_named_twice_goes_once(choice):
    assert graphprune.shrink(Stack(), X, what={"layers": choice}).left() == [1, 2, 3]


@pytest.mark.parametrize("keep", [(), ("blocks.0",), ("blocks.0", "blocks.1.up")])
def test_layers_that_are_kept_count_among_those_that_stay(keep):
    left = graphprune.shrink(Stack(), X, what={"layers": 3}, keep=keep).left()
    assert len(left) == 3 and all(at in left for at in range(len(keep)))
    with pytest.raises(BadRatio, match="are to stay"):
        graphprune.shrink(Stack(), X, what={"layers": 5 if len(keep) < 2 else 1}, keep=keep)
    if keep:
        assert graphprune.shrink(Stack(), X, what={"layers": len(keep)}, keep=keep).left() == list(range(len(keep)))


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_asked_of_outputs_and_examples_holds_for_several_kinds(verify):
    options = {"what": ("layers", "channel"), "verify": verify}
    whole = graphprune.shrink(Stack(), X, 0.5, **options)
    small = graphprune.shrink(Stack(), X, 0.5, outputs=["logits"], **options)
    assert whole.state.out_features == 10 and small.state.out_features == 5 and small.head.out_features == 2 and len(small.left()) == 2
    small = graphprune.shrink(Stack(), X, 0.5, outputs=["logits"], examples=[lambda net: net.state(net.stem(X))], **options)
    assert small.state.out_features == 10 and len(small.left()) == 2


def test_ratios_by_a_function_hold_for_several_kinds():
    rule = graphprune.Widths(ratios=lambda groups: dict.fromkeys(range(len(groups)), 0.75))
    small = graphprune.shrink(Stack(), X, 0.25, what=("layers", "mlp"), widths=rule)
    assert {small.blocks[at].up.out_features for at in small.left()} == {4}


class Tagged(nn.Parameter):
    pass


def test_parameters_stay_of_their_class():
    net = chain()
    net[0].weight, net[0].bias = Tagged(net[0].weight.data, requires_grad=False), Tagged(net[0].bias.data)
    net[0].bias.tag = "mine"
    small = graphprune.shrink(net, X, 0.5)
    assert type(small[0].weight) is type(small[0].bias) is Tagged and type(small[2].weight) is nn.Parameter
    assert small[0].bias.tag == "mine" and not small[0].weight.requires_grad and small[0].bias.requires_grad


def test_what_cannot_be_kept_is_said_and_nothing_is_written(tmp_path):
    for odd in (torch.zeros(2, dtype=torch.complex128), torch.eye(3).to_sparse(), torch.zeros(2, device="meta")):
        net = chain()
        net.register_buffer("odd", odd) if not odd.is_meta else None
        small = graphprune.shrink(net, X, 0.5)
        if odd.is_meta:
            small.register_buffer("odd", odd)
        with pytest.raises(BadModel, match="odd"):
            graphprune.save(small, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
    graphprune.save(graphprune.shrink(chain(), X, 0.5), tmp_path / "folder")
    for wrong in (None, 5, X):
        with pytest.raises(BadFile):
            graphprune.save(graphprune.shrink(chain(), X, 0.5), wrong)
        with pytest.raises(BadFile):
            graphprune.load(wrong, chain())
        with pytest.raises(BadModel):
            graphprune.load(tmp_path / "folder", wrong)


def test_what_is_no_plan_or_model_is_refused():
    plan = graphprune.plan(chain(), X, 0.5)
    for wrong in ("plan", 5, {}):
        for call in (graphprune.expand, graphprune.zeroed):
            with pytest.raises(BadPlan):
                call(chain(), wrong)
        for pair in ((plan, wrong), (wrong, plan)):
            with pytest.raises(BadPlan):
                graphprune.compose(*pair)
        with pytest.raises(BadPlan):
            graphprune.Plan.from_json(wrong)
        with pytest.raises(UnknownName):
            plan.kept("0", wrong if wrong != 5 else True)
        for call in (graphprune.trace, graphprune.profile, graphprune.measure, graphprune.widths):
            with pytest.raises(BadModel):
                call(wrong, X)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


def test_all_but_what_is_kept_of_whole_blocks_may_go():
    net = nn.Sequential(*[Residual() for _ in range(4)], nn.Linear(4, 2))
    for number in (1, 2):
        small, plan = graphprune.shrink(net, X, what={"layers": number}, keep=["3.inner"], return_plan=True)
        gone = {part.name for part in plan.parts}
        assert len(gone) == 4 - number and "3" not in gone and (small(X) - graphprune.zeroed(net, plan)(X)[0]).abs().max() < 1e-5
    with pytest.raises(BadRatio, match="2 are kept on request"):
        graphprune.shrink(net, X, what={"layers": 1}, keep=["3.inner", "0.inner"])


def test_a_number_in_quotes_is_said_to_be_one():
    with pytest.raises(GraphpruneError, match="without quotes"):
        graphprune.shrink(chain(), X, what={"layers": "1"})


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts, self.head = nn.Linear(4, 8), nn.Parameter(torch.randn(8, 4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        scores, at = self.router(x).topk(2)
        return self.head((scores.unsqueeze(-1) * torch.einsum("ti,tkio->tko", x, self.experts[at])).sum(1))


def test_a_share_of_experts_that_the_router_needs_is_told():
    with pytest.warns(LessThanAsked, match="the code chooses 2 for every token"):
        small = graphprune.shrink(Mixture(), X, what={"experts": 0.9})
    assert small.router.out_features == 2
    with pytest.warns(LessThanAsked, match="the code chooses 2 for every token"):
        graphprune.shrink(Mixture(), X, 0.9, what="experts")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LessThanAsked)
        assert graphprune.shrink(Mixture(), X, what={"experts": 0.75}).router.out_features == 2
