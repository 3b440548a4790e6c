"""One request, one plan: kinds of unit by what they are, together under one budget, and names that mean what they say."""

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune import Repair, Runtime, Widths, scores
from graphprune.errors import BadCalibration, BadMeasure, BadOption, BadRatio, BadTarget, GraphpruneError, LessThanAsked, NothingToPrune, UnknownName


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        y = self.norm(x)
        return self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Block(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), Gated(width, inner)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Language(nn.Module):
    def __init__(self, layers=4, width=16, heads=4, inner=24):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 32)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TOKENS = torch.arange(7)[None]


def language(**options):
    torch.manual_seed(0)
    return Language(**options).double().eval()


def params(model):
    return sum(p.numel() for p in model.parameters())


def standing(model):
    return [index for index, block in enumerate(model.blocks) if isinstance(block, Block)]


def inner(model):
    return [model.blocks[index].mlp.up.out_features for index in standing(model)]


def test_kinds_are_found_from_the_graph_and_listed():
    found = graphprune.widths(language(), TOKENS)
    sizes = {row.kind: (row.count, row.size, row.outputs) for row in found if not row.why}
    assert sizes == {"layers": (1, 4, 1), "hidden": (1, 16, 1), "heads": (4, 4, 4), "head_dim": (4, 4, 4), "mlp": (4, 24, 1), "vocabulary": (1, 32, 1)}
    assert found["mlp"][0].where == "blocks.*.mlp.gate" and found["mlp"][0].params == 16 * 3 + 2
    assert any("head.weight axis 0" == row.where and "output" in row.why for row in found)
    assert max(map(len, str(found).splitlines())) < 160 and "mlp" in str(found)
    vision = graphprune.widths(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(1, 3, 9, 9))
    assert [(row.kind, row.size) for row in vision if not row.why] == [("channels", 8)]


@pytest.mark.parametrize(
    "what, mlp, heads, hidden, blocks", [("mlp", 12, 4, 16, 4), ("heads", 24, 2, 16, 4), ("hidden", 24, 4, 8, 4), ("layers", 24, 4, 16, 2)]
)
def test_one_kind_goes_and_the_others_stay(what, mlp, heads, hidden, blocks):
    small = graphprune.shrink(language(), TOKENS, 0.5, what=what)
    assert inner(small) == [mlp] * blocks and small.embed.embedding_dim == hidden
    assert [small.blocks[index].attention.q.out_features for index in standing(small)] == [4 * heads] * blocks


def test_amounts_of_every_kind_in_one_plan():
    net = language()
    small, plan = graphprune.shrink(net, TOKENS, what={"mlp": 16, "hidden": 12, "layers": [1, 2], "heads": 0.25}, return_plan=True)
    assert standing(small) == [0, 3] and inner(small) == [16, 16] and small.embed.embedding_dim == 12
    assert [small.blocks[index].attention.q.out_features for index in (0, 3)] == [12, 12]
    shifted = torch.tensor([[3, 9, 27, 1, 0]])
    assert torch.allclose(small(shifted), graphprune.zeroed(net, plan)(shifted)[0])
    assert not torch.allclose(small(shifted), net(shifted))
    assert standing(graphprune.shrink(net, TOKENS, what={"layers": 3})) != standing(net)
    assert len(standing(graphprune.shrink(net, TOKENS, what={"layers": 3}))) == 3


@settings(max_examples=3, deadline=None)
@given(
    share=st.floats(0.45, 0.9),
    name=st.sampled_from(["params", "macs", "size"]),
    what=st.sampled_from([("mlp", "layers"), ("channel", "layer"), ("heads", "mlp", "layers")]),
)
def test_several_kinds_share_one_budget(share, name, what):
    net = language(layers=3)
    small, plan = graphprune.shrink(net, TOKENS, what=what, return_plan=True, **{name: share})
    before, after = graphprune.profile(net, TOKENS), graphprune.profile(small, TOKENS)
    limit = share * getattr(before, name)
    assert getattr(after, name) <= limit
    assert getattr(after, name) > 0.8 * limit  # and no more goes than has to
    assert plan.cuts  # the last kind takes what is missing
    assert torch.allclose(small(TOKENS), graphprune.zeroed(net, plan)(TOKENS)[0])


def test_a_budget_that_several_kinds_share_is_spread():
    net = language(layers=6)
    small = graphprune.shrink(net, TOKENS, params=0.4, what=("mlp", "heads", "layers"))
    assert len(standing(small)) < 6 and max(inner(small)) < 24
    alone = graphprune.shrink(net, TOKENS, params=0.4, what="layers")
    assert len(standing(alone)) < len(standing(small)) and inner(alone)[0] == 24


def test_positions_go_after_channels():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, what={"channel": 0.5, "group:box": 1 / 3}, return_plan=True)
    assert small[0].weight.shape[0] == 4 and small[0].weight.shape[2:].numel() == 6
    assert torch.allclose(small(x), graphprune.zeroed(net, plan)(x)[0])
    half = graphprune.shrink(net, x, macs=0.5, what=("channel", "group:box"))
    assert graphprune.profile(half, x).macs <= 0.5 * graphprune.profile(net, x).macs


@pytest.mark.parametrize(
    "asked, error, says",
    [
        ({"what": {"mlp": 25}}, BadRatio, "has 24"),
        ({"what": {"mlp": 1.5}}, BadRatio, "share of units"),
        ({"what": {"mlp": [1, 2]}}, BadRatio, "share of units"),
        ({"what": {"layers": [9]}}, UnknownName, "numbered from 0"),
        ({"what": {"layers": ["blocks.9"]}}, UnknownName, "blocks.0"),
        ({"what": {"layers": [0, 1, 2, 3]}}, BadRatio, "one has to stay"),
        ({"what": {"layers": 7}}, BadRatio, "4 can go"),
        ({"what": ()}, BadOption, "names what goes"),
        ({"what": ("mlp", "mlp")}, BadOption, "twice"),
        ({"what": "mpl"}, UnknownName, "nearest is 'mlp'"),
        ({"what": ("heads", "layers"), "speedup": 2}, BadTarget, "widths alone"),
        ({"what": {"mlp": 12, "layers": 2}, "params": 0.5}, BadTarget, "nothing to choose"),
        ({"what": ("mlp", "layers"), "params": 0.01}, BadTarget, "smallest"),
        ({"widths": {"blocks.*.mlp.up": 40}}, BadRatio, "puts out 24"),
        ({"widths": {"blocks.*.attention.q": 9}}, BadRatio, "8 and 12"),
        ({"widths": {"blocks.*.mpl.up": 8}}, UnknownName, "nearest"),
        ({"widths": 8}, BadOption, "Widths"),
    ],
)
def test_what_makes_no_sense_is_said(asked, error, says):
    with pytest.raises(error, match=says):
        graphprune.shrink(language(), TOKENS, **asked)


def test_a_kind_that_is_not_there_is_said():
    with pytest.raises(NothingToPrune, match="kind 'hidden'"):
        graphprune.shrink(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 3), what="hidden")


NAMED = {  # a name, and what it means: (inner, heads' outputs, hidden)
    "blocks.*.mlp": (12, 16, 16),
    "blocks.*.mlp.*": (12, 16, 16),
    "*.gate": (12, 16, 16),
    "blocks.*.attention": (24, 8, 16),
    "*.q": (24, 8, 16),
    "embed": (24, 16, 8),
    "*.down": (24, 16, 8),
    "norm": (24, 16, 8),
    "blocks.*.attention.o": (24, 16, 8),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_means_what_its_module_puts_out(name):
    small = graphprune.shrink(language(), TOKENS, 0.0, widths=Widths(ratios={name: 0.5}))
    assert (inner(small)[0], small.blocks[0].attention.q.out_features, small.embed.embedding_dim) == NAMED[name]


@pytest.mark.parametrize(
    "key, says", [("head", "head.*output"), (lambda name, module: name == "head", "output"), (nn.Dropout, "fits nothing|nothing that can be cut")]
)
def test_a_name_that_cuts_nothing_is_said(key, says):
    with pytest.warns(LessThanAsked, match=says):
        graphprune.shrink(language(), TOKENS, 0.0, widths=Widths(ratios={key: 0.5}))


@pytest.mark.parametrize("wrong", [99, -1, "nowhere.*"])
def test_a_key_that_fits_nothing_is_an_error(wrong):
    with pytest.raises(UnknownName):
        graphprune.shrink(language(), TOKENS, 0.5, widths=Widths(ratios={wrong: 0.5}))


def test_widths_by_name_by_multiple_and_uniform():
    net = language()
    small = graphprune.shrink(net, TOKENS, widths={"blocks.*.mlp.up": 10, "blocks.1.mlp.up": 20, "blocks.*.attention.q": 8})
    assert inner(small) == [10, 20, 10, 10] and small.blocks[2].attention.q.out_features == 8 and small.embed.embedding_dim == 16
    small = graphprune.shrink(net, TOKENS, 0.4, widths=Widths(multiple_of={"mlp": 8, "embed": 5}))
    assert inner(small) == [16] * 4 and small.embed.embedding_dim == 10
    with torch.no_grad():
        for index, block in enumerate(net.blocks):
            for weight in block.mlp.parameters():
                weight.mul_(2.0**index)
    ranked = {"what": "mlp", "scope": "global", "widths": Widths(uniform=True)}
    assert len(set(inner(graphprune.shrink(net, TOKENS, 0.4, what="mlp", scope="global")))) > 1
    assert len(set(inner(graphprune.shrink(net, TOKENS, 0.4, **ranked)))) == 1
    assert len(set(inner(graphprune.shrink(net, TOKENS, params=0.8, **ranked)))) == 1
    stepped = inner(graphprune.shrink(net, TOKENS, 0.7, **{**ranked, "widths": Widths(uniform=True, multiple_of=8)}))
    assert len(set(stepped)) == 1 and stepped[0] in (8, 16)


def test_a_plan_without_cutting_is_the_plan_of_the_cut():
    net = language()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = graphprune.plan(net, TOKENS, params=0.6, what=("mlp", "layers"))
    small, other = graphprune.shrink(net, TOKENS, params=0.6, what=("mlp", "layers"), return_plan=True)
    assert plan == other and all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(graphprune.apply(net, plan)(TOKENS), small(TOKENS))
    assert plan != graphprune.plan(net, TOKENS, params=0.7, what=("mlp", "layers"))


MLP = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
X = torch.zeros(1, 4)
BATCHES = [(torch.randn(8, 4), torch.zeros(8).long())]
OLD = [
    ({"criterion": "l1"}, {"score": "l1"}),
    ({"granularity": "channel"}, {"what": "channel"}),
    ({"multiple_of": 8, "min_units": 3}, {"widths": Widths(multiple_of=8, at_least=3)}),
    ({"ratios": {"0": 0.75}}, {"widths": Widths(ratios={"0": 0.75})}),
    ({"rewrite": False}, {"widths": Widths(rewrite=False)}),
    ({"criterion": "taylor", "batches": BATCHES, "loss": nn.functional.cross_entropy}, {"score": scores.taylor.on(BATCHES, nn.functional.cross_entropy)}),
    ({"macs": 0.5, "scope": "optimal"}, {"macs": 0.5, "scope": "allocated"}),
    ({"calibration": [torch.randn(64, 4)]}, {"repair": [torch.randn(64, 4)]}),
]


@pytest.mark.parametrize("old, new", OLD)
def test_old_spellings_work_and_say_the_new_one(old, new):
    with pytest.warns(DeprecationWarning) as said:
        small = graphprune.shrink(MLP, X, **old)
    assert all("write" in str(each.message) and each.filename == __file__ for each in said if each.category is DeprecationWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        again = graphprune.shrink(MLP, X, **new)
    assert again[0].out_features == small[0].out_features < 32
    if "macs" not in old:
        with pytest.raises(BadOption):
            graphprune.shrink(MLP, X, **old, **new)


SILENT = [
    ({"batches": "nonsense"}, GraphpruneError, "iterable"),
    ({"loss": 3}, GraphpruneError, "function"),
    ({"runtime": "tensorrt"}, BadMeasure, "there are eager"),
    ({"threads": -3}, BadMeasure, "whole number"),
    ({"ratios": {99: 0.5}}, UnknownName, "no group 99"),
    ({"min_units": -5}, BadRatio, "from 1 on"),
    ({"min_units": 2.5}, BadRatio, "from 1 on"),
    ({"verify": "no"}, BadOption, "True or False"),
    ({"inplace": 1}, BadOption, "True or False"),
    ({"macs": 1}, BadTarget, "macs=1.0"),
    ({"size": "1"}, BadTarget, "size=1.0"),
    ({"on": Runtime("compile")}, BadOption, "no effect"),
    ({"on": "onnxruntime"}, BadOption, "Runtime"),
    ({"runtime": "onnxruntime"}, BadOption, "no effect"),
    ({"repair": 7}, BadCalibration, "int"),
    ({"score": 7}, UnknownName, "score"),
]


@pytest.mark.parametrize("asked, error, says", SILENT)
def test_arguments_without_effect_or_sense_are_errors(asked, error, says):
    with pytest.raises(error, match=says):
        graphprune.shrink(MLP, X, **asked)


def test_options_that_make_no_sense_are_refused_where_they_are_made():
    for wrong in ({"multiple_of": 0}, {"multiple_of": {"mlp": 0}}, {"at_least": True}, {"ratios": 0.5}, {"to": {"0": 2.5}}, {"uniform": "yes"}):
        with pytest.raises(BadRatio):
            Widths(**wrong)
    for make in (lambda: scores.l2.on(BATCHES), lambda: scores.on("l2", BATCHES), lambda: scores.wanda_sp.on(BATCHES, nn.functional.mse_loss)):
        with pytest.raises(BadOption, match="no effect"):
            make()
    with pytest.raises(BadCalibration):
        Repair()
    with pytest.raises(TypeError, match="granularty"):
        graphprune.shrink(MLP, X, granularty="head")


@pytest.mark.parametrize(
    "amount, width", [({"params": "120"}, 17), ({"params": "50%"}, 16), ({"size": "600 B"}, 21), ({"ratio": "25%"}, 24), ({"macs": "0.5"}, 16)]
)
def test_amounts_may_be_text(amount, width):
    assert abs(graphprune.shrink(MLP, X, **amount)[0].out_features - width) <= 1


@pytest.mark.parametrize("asked", [{"macs": 1e12}, {"params": 10**9}, {"size": "1 GB"}, {"macs": 1.0}, {"memory": 1.0, "params": 1.0}, {"ratio": 0.01}])
def test_a_target_that_is_met_already_is_said_once(asked):
    with pytest.warns(LessThanAsked, match="nothing") as said:
        small = graphprune.shrink(MLP, X, **asked)
    assert len(said) == 1 and said[0].filename == __file__ and small[0].out_features == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphprune.shrink(MLP, X, 0.5)
        graphprune.shrink(MLP, X, 0.0)


def test_far_less_than_the_ratio_is_said():
    net = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 64), nn.Flatten(), nn.Linear(64, 600))
    with pytest.warns(LessThanAsked, match=r"removed \d\.\d% of the parameters"):
        graphprune.shrink(net, torch.zeros(1, 64), 0.5, widths=Widths(ratios={"2": 0.0}))


def test_the_page_of_shrink_has_few_options():
    import inspect

    assert len(inspect.signature(graphprune.shrink).parameters) <= 22
    text = graphprune.shrink.__doc__
    assert all(re.search(rf"``{name}``", text) for name in inspect.signature(graphprune.shrink).parameters if name != "model")


def test_what_others_register_is_refused_when_it_does_not_fit():
    with pytest.raises(UnknownName, match="there are granularity, repair, runtime, score"):
        graphprune.register("target", "energy", "joules", lambda: 0)
    for wrong in ({"kind": "runtime", "name": "a:b", "line": "x"}, {"kind": "runtime", "name": "mine", "line": "two\nlines"}):
        with pytest.raises(BadOption, match="one line"):
            graphprune.register(**wrong, function=print)
    with pytest.raises(BadOption, match="cannot be called"):
        graphprune.register("runtime", "mine", "a number", 3)
    with pytest.raises(BadOption, match="needs"):
        scores.register("mine", "nothing", needs="luck")(lambda task: [])
    with pytest.raises(BadOption, match="already"):
        graphprune.register("repair", "bn", "another", print)
    with pytest.raises(BadOption, match="quick"):
        graphprune.register("runtime", "mine", "a call", print, quick=True)


def test_a_kind_that_returns_no_groups_is_said():
    from graphprune.catalogue import forget

    for name, found in {"names": lambda groups: ["first"], "beyond": lambda groups: [99]}.items():
        graphprune.register("granularity", name, "for this test", found)
        with pytest.raises(BadOption, match="group"):
            graphprune.shrink(MLP, X, what=name)
        forget("granularity", name)
    graphprune.register("repair", "worse", "a hundred everywhere", lambda small, original, batches: [p.fill_(100) for p in small.parameters()])
    batches = [torch.randn(16, 4) for _ in range(4)]
    small, plan = graphprune.shrink(MLP, X, repair=Repair(batches, "worse"), return_plan=True)
    assert "not kept" in plan.lines[-1] and float(small[0].weight.detach().abs().max()) < 100
    forget("repair", "worse")


@pytest.mark.parametrize("last", ["2:4", "weight:0.01"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("target", [{"params": 0.4}, {"macs": 0.35}])
def test_a_kind_that_says_itself_how_much_goes_takes_nothing_of_a_budget(last, scope, target):
    net = language()
    small, plan = graphprune.shrink(net, TOKENS, what=("block", last), scope=scope, return_plan=True, **target)
    assert len(standing(net)) > len(standing(small)) and plan.parts
    with pytest.raises(BadTarget, match="nothing to choose"):
        graphprune.shrink(net, TOKENS, what={"block": 0.3, last: None}, scope=scope, **target)


def test_the_last_kind_is_given_more_room_until_it_meets_the_budget(monkeypatch):
    """What is planned in earnest may fall short of what was drafted; only where no share is enough, it is an error, and says which target."""
    from graphprune.planning import planner

    plan_entries, tried = planner.plan_entries, []

    def short(enough):
        def plan(graph, model, request):
            if request.aims.any:
                tried.append(len(standing(model)))
                if len(tried) < enough:
                    raise BadTarget("params: not met yet")
            return plan_entries(graph, model, request)

        return plan

    monkeypatch.setattr(planner, "plan_entries", short(4))
    assert graphprune.shrink(language(), TOKENS, what=("block", "weight"), params=0.6, return_plan=True)[1].parts and len(tried) == 4
    monkeypatch.setattr(planner, "plan_entries", short(10**6))
    with pytest.raises(BadTarget, match="not met yet"):
        graphprune.shrink(language(), TOKENS, what=("block", "weight"), params=0.6)
