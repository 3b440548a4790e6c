"""What a call leaves as it was: the user's model and what its code keeps, whether the call succeeds, fails or only runs the model."""

import copy
import sys
import threading
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import graphprune
from graphprune.cutting.passthrough import Passthrough
from graphprune.errors import BadModel, BadOption, BadPlan, LessThanAsked
from graphprune.formats.closing import closed
from graphprune.tracing.surroundings import unchanged

X = torch.linspace(-1, 1, 12).reshape(3, 4)
HELD = SimpleNamespace(last=None)
LOCAL = threading.local()
OTHER = ModuleType("somebodys")
OTHER.cache, OTHER.last = {}, None
sys.modules["somebodys"] = OTHER


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def widths(net):
    return [layer.out_features for layer in net if isinstance(layer, nn.Linear)]


# -- in place: all or nothing ------------------------------------------------------------


SHORT = {
    "a ratio that cuts nothing": {"ratio": 0.5, "widths": graphprune.Widths(ratios={"0": 0.5, "4": 0.5})},
    "far less than asked": {"ratio": 0.5, "keep": (), "widths": graphprune.Widths(at_least=6)},
    "met already": {"macs": 1.0},
    "too small a ratio": {"ratio": 0.01},
}


@pytest.mark.parametrize("case", SHORT)
def test_a_warning_that_is_made_an_error_leaves_the_model_whole(case):
    options = SHORT[case]
    with pytest.warns(LessThanAsked) if case != "far less than asked" else warnings.catch_warnings():  # the control: without it the same call cuts
        assert graphprune.shrink(other := chain(), X, inplace=True, **options) is other and graphprune.plan_of(other) is not None
    net = chain()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LessThanAsked)
        try:
            graphprune.shrink(net, X, inplace=True, **options)
        except LessThanAsked:
            assert widths(net) == [8, 6, 2] and graphprune.plan_of(net) is None
        else:
            assert case == "far less than asked"


def test_a_warning_says_the_same_in_place():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.big, self.small, self.out = nn.Linear(4, 400), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.big(x), self.out(self.small(x))

    texts = []
    for inplace in (False, True):
        with pytest.warns(LessThanAsked, match="removed 1.*%") as caught:
            graphprune.shrink(Wide(), X, 0.5, inplace=inplace)
        texts.append(str(caught[0].message))
    assert texts[0] == texts[1]


def test_what_fails_after_the_cut_leaves_the_model_whole(monkeypatch):
    def broken(*_):
        raise RuntimeError("no room")

    for name in ("note_plan", "follow", "so_far"):
        net = chain()
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["graphprune.shrink"], name, broken)
            with pytest.raises(RuntimeError, match="no room"):
                graphprune.shrink(net, X, 0.5, inplace=True)
        assert widths(net) == [8, 6, 2] and net[0].weight.shape == (8, 4) and graphprune.plan_of(net) is None
        assert widths(graphprune.shrink(net, X, 0.5, inplace=True)) == [4, 3, 2]


# -- a plan that is carried out by itself ------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_carries_the_plan_that_made_it(inplace, tmp_path):
    net = chain()
    once = graphprune.shrink(net, X, 0.5)
    second = graphprune.plan(once, X, 0.5)
    twice = graphprune.apply(once, second, inplace)
    assert widths(twice) == [2, 2, 2]
    known = graphprune.plan_of(twice)
    assert known.cuts["0.weight"][0] == [graphprune.plan(net, X, 0.5).cuts["0.weight"][0][at] for at in second.cuts["0.weight"][0]]
    assert graphprune.expand(twice)["0.weight"].shape == (8, 4)
    again = graphprune.load(graphprune.save(twice, tmp_path), net)
    assert torch.equal(again(X), twice(X))
    with pytest.raises(BadPlan):  # the control: the second plan alone is of other shapes
        graphprune.apply(net, second)


def test_apply_says_what_it_takes():
    plan = graphprune.plan(chain(), X, 0.5)
    for bad in (None, "plan", {"cuts": {}}):
        with pytest.raises(BadPlan, match="graphprune.plan"):
            graphprune.apply(chain(), bad)
    for bad in (None, "net", X):
        with pytest.raises(BadModel, match="nn.Module"):
            graphprune.apply(bad, plan)
    net = chain()
    for bad in ("no", 0, None):
        with pytest.raises(BadOption, match="inplace"):
            graphprune.apply(net, plan, bad)
    assert widths(net) == [8, 6, 2]


# -- runs of the model itself ------------------------------------------------------------


class Counts(nn.Module):
    """Counts its calls in every way there is."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.log, self.cache = 0, [], {}

    def forward(self, x):
        self.seen += 1
        self.calls += 1
        self.log.append(len(x))
        self.cache[len(self.log)] = x
        self.last = x
        return x + self.down(self.up(x).relu())

    def state(self):
        return float(self.seen), self.calls, list(self.log), dict(self.cache), "last" in self.__dict__


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def batches():
    torch.manual_seed(1)
    return [torch.randn(24, 4) for _ in range(3)]


RUNS = {
    "widths": lambda net: graphprune.widths(net, X),
    "layers": lambda net: graphprune.shrink(net, X, 0.5, what="block"),
    "repair": lambda net: graphprune.shrink(net, X, 0.5, repair=batches()),
    "repair by a budget": lambda net: graphprune.shrink(net, X, params=0.6, repair=batches()),
    "repair by hand": lambda net: graphprune.repair(graphprune.shrink(net, X, 0.5), net, calibration=batches()),
    "a score of inputs": lambda net: graphprune.shrink(net, X, 0.5, score=graphprune.scores.on("wanda_sp", batches())),
    "a score of a loss": lambda net: graphprune.shrink(net, X, 0.5, score=graphprune.scores.on("taylor", batches(), lambda out, _: out.square().mean())),
    "layers by a score": lambda net: graphprune.shrink(net, X, 0.5, what="block", score=graphprune.scores.on("influence", batches())),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_does_not_count_what_graphprune_runs(run):
    net = nn.Sequential(Counts(), Block(), Block(), nn.Linear(4, 2))
    before = net[0].state()
    result = RUNS[run](net)
    assert net[0].state() == before
    if isinstance(result, nn.Module):
        assert result[0].state() == before
    net(X)  # the control: a call counts
    assert net[0].state() != before


def test_what_is_put_back_is_what_was_there():
    net = Counts()
    net(X)
    before = net.state()
    with unchanged(net):
        net(X)
        assert net.state()[:2] == (2.0, 2)
    assert net.state() == before


# -- what the code keeps elsewhere ------------------------------------------------------------


def recorder(store):
    return lambda module, inputs, output: store.append(output)


def test_hooks_of_one_maker_keep_what_each_of_them_holds():
    net, stores = chain(), [[], [], []]
    for layer, store in zip((net[0], net[2], net[4]), stores, strict=True):
        layer.register_forward_hook(recorder(store))
    graphprune.shrink(net, X, 0.5)
    assert stores == [[], [], []]
    net(X)
    assert [len(store) for store in stores] == [1, 1, 1]


class InNamespace(nn.Linear):
    def forward(self, x):
        if HELD.last is None:
            HELD.last = torch.ones(1) * x.sum()
        return super().forward(x) * HELD.last


class InThread(nn.Linear):
    def forward(self, x):
        if getattr(LOCAL, "last", None) is None:
            LOCAL.last = torch.ones(1) * x.sum()
        return super().forward(x) * LOCAL.last


class InModule(nn.Linear):
    def forward(self, x):
        if "scale" not in OTHER.cache:
            OTHER.cache["scale"] = torch.ones(1) * x.sum()
        if OTHER.last is None:
            OTHER.last = x.sum()
        return super().forward(x) * OTHER.cache["scale"] * OTHER.last


@pytest.mark.parametrize("kind", [InNamespace, InThread, InModule])
def test_caches_of_plain_holders_are_as_they_were(kind):
    net = nn.Sequential(kind(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graphprune.shrink(net, X, 0.5)
    assert HELD.last is None and getattr(LOCAL, "last", None) is None and OTHER.cache == {} and OTHER.last is None
    net(X)
    kept = (HELD.last, getattr(LOCAL, "last", None), OTHER.last)
    assert any(item is not None and not item.is_meta for item in kept)
    HELD.last, LOCAL.last, OTHER.last = None, None, None
    OTHER.cache.clear()


# -- further examples ------------------------------------------------------------


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 6)

    def forward(self, x):
        return {"logits": self.one(self.stem(x).relu())}

    def encode(self, x):
        return self.two(self.stem(x).relu())


@pytest.mark.parametrize("examples", [[lambda net: net.encode(X)], [X[:1], lambda net: {"logits": net.encode(X)}], (lambda net: [net.encode(X), net(X)],)])
@pytest.mark.parametrize("outputs", [None, "logits"])
def test_a_function_is_an_example(examples, outputs):
    net = TwoWays()
    small, plan = graphprune.shrink(net, X, 0.5, examples=examples, outputs=outputs, return_plan=True)
    assert small.stem.out_features == 4 and small.two.in_features == 4 and small.two.out_features == 6
    stays = torch.zeros(8, dtype=torch.bool)
    stays[plan.kept("stem")] = True
    wanted = net.two(net.stem(X).relu() * stays)
    assert torch.allclose(small.encode(X), wanted, atol=1e-6)
    alone = graphprune.shrink(net, X, 0.5)  # the control: nobody spoke of the other method
    assert alone.two.in_features == 8


# -- what a call stands in ------------------------------------------------------------


def test_inside_of_the_meta_device_a_call_says_so(tmp_path):
    net, plan = chain(), graphprune.plan(chain(), X, 0.5)
    small = graphprune.shrink(net, X, 0.5)
    graphprune.save(small, tmp_path)
    calls = (
        lambda: graphprune.shrink(net, X, 0.5),
        lambda: graphprune.shrink(net, X, 0.5, inplace=True),
        lambda: graphprune.plan(net, X, 0.5),
        lambda: graphprune.apply(net, plan),
        lambda: graphprune.save(small, tmp_path / "more"),
        lambda: graphprune.load(tmp_path, net),
        lambda: graphprune.widths(net, X),
    )
    for call in calls:
        with torch.device("meta"), pytest.raises(BadOption, match="leave that block"):
            call()
        with torch.device("cpu"):
            call() if call is not calls[1] else None
    assert widths(net) == [8, 6, 2]


NORMS = [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal]


@pytest.mark.parametrize("norm", NORMS)
def test_the_mode_of_a_model_does_not_matter(norm):
    """A weight that is made in training mode goes on with the vectors that it keeps; nothing may look at it on the way."""
    cuts = []
    for mode in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)).train(mode)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()) and small.training is mode
        cuts.append((plan.cuts, {name: tensor.clone() for name, tensor in small.state_dict().items()}))
    assert cuts[0][0] == cuts[1][0] and all(torch.equal(cuts[0][1][name], tensor) for name, tensor in cuts[1][1].items())


class Turned(nn.Linear):
    """Keeps its weight the other way around."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight = nn.Parameter(self.weight.data.t().contiguous())

    def forward(self, x):
        return (x @ self.weight + self.bias).unflatten(1, (2, self.out_features // 2)).flatten(1)


@pytest.mark.parametrize("place", range(5))
def test_what_is_not_cut_keeps_its_attributes(place):
    sizes = [(4, 12), (12, 8), (8, 6), (6, 8), (8, 2)]
    net = nn.Sequential(*[Turned(*each) if at == place else nn.Linear(*each) for at, each in enumerate(sizes)])
    small = graphprune.shrink(net, X, 0.5, keep=[str(at) for at in (place - 1, place) if at >= 0])
    assert (small[place].in_features, small[place].out_features) == sizes[place]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    others = [at for at in range(5) if at not in (place - 1, place, place + 1)]  # the control: what is cut says its new sizes
    assert all((small[at].out_features, small[at].in_features) == small[at].weight.shape for at in others)


# -- blocks that are gone ------------------------------------------------------------


class Numbered(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.inner, self.stride = number, nn.Conv1d(2, 2, 1), 1
        self.inner.number = number


@pytest.mark.parametrize("gone", [(0,), (0, 2), (0, 3), (1, 2)])
def test_blocks_are_numbered_anew_and_nothing_else_is(gone):
    count = 2 if gone == (0,) else 4
    net = nn.Sequential(*[Numbered(at) for at in range(count)])
    for at in gone:
        net[at] = Passthrough(net[at], 0)
    small, _ = closed(net)
    assert [block.number for block in small] == [block.inner.number for block in small] == list(range(count - len(gone)))
    assert all(block.stride == block.inner.groups == 1 and block.inner.stride == (1,) for block in small)
    assert [block.number for block in net] == list(range(count))


class Biased(nn.Module):
    """Attention with a learnt bias for each pair of positions, put together once in evaluation mode; every change of mode forgets it (as in LeViT)."""

    def __init__(self, kept="ready", heads=4, tokens=5):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 3 * heads * 2), nn.Linear(heads * 2, 3)
        self.biases, self.heads, self.kept = nn.Parameter(torch.randn(heads, tokens)), heads, kept
        self.train()
        self.register_buffer("pairs", (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs(), persistent=False)

    def train(self, mode=True):
        super().train(mode)
        setattr(self, self.kept, None if self.kept == "bare" else {})
        return self

    def bias(self, device):
        if self.training:
            return self.biases[:, self.pairs]
        if self.kept == "bare":
            self.bare = self.biases[:, self.pairs] if self.bare is None else self.bare
            return self.bare
        table = getattr(self, self.kept)
        if str(device) not in table:
            table[str(device)] = self.biases[:, self.pairs]
        return table[str(device)]

    def sizes(self):
        table = getattr(self, self.kept)
        return [bias.shape[0] for bias in (table.values() if isinstance(table, dict) else [] if table is None else [table])]

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.mT + self.bias(x.device)).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kept", ["ready", "_ready", "bare"])
@pytest.mark.parametrize("before", ["run", "fresh", "training"])
def test_what_a_module_keeps_for_evaluation_follows_the_cut(before, kept):
    net, x = Biased(kept).double().train(before == "training"), torch.randn(2, 5, 8, dtype=torch.float64)
    if before == "run":
        with torch.no_grad():
            net(x)
    small, plan = graphprune.shrink(net, x, what={"heads": 0.5}, return_plan=True)
    with torch.no_grad():
        result = small(x)
        assert small.biases.shape == (2, 5) and small.sizes() == [2] * (before != "training")
        assert before != "run" or net.sizes() == [4]
        assert (result - graphprune.zeroed(net, plan)(x)[0]).abs().max() < 1e-12
        small.train().eval()
        assert (small(x) - graphprune.zeroed(net.eval(), plan)(x)[0]).abs().max() < 1e-12


class Merged(nn.Linear):
    """A layer whose update goes into its weight for evaluation and comes out for training, in place."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up, self.merged = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2)), False

    def train(self, mode):  # no default: torch always gives it
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) if self.merged else super().forward(x) + x @ self.down.t() @ self.up.t()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_weights_that_change_with_the_mode_are_as_they_were(mode, verify, held):
    torch.manual_seed(0)
    net, x = nn.Sequential(Merged(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().train(mode), torch.randn(4, 6, dtype=torch.float64)
    if held:
        net[0].tables = [torch.zeros(3)]
    before, result = copy.deepcopy(net.state_dict()), net(x)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True, verify=verify)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()) and torch.equal(net(x), result)
    assert net[0].merged is not mode and net.training is mode and small.training is mode and small[0].out_features == 4
    for training in (False, True):
        assert (small.train(training)(x) - graphprune.zeroed(copy.deepcopy(net), plan)(x)[0]).abs().max() < 1e-12


class Evaluated(nn.Linear):
    """A layer that is there for evaluation alone."""

    def train(self, mode=True):
        if mode:
            raise RuntimeError("not to be trained")
        return super().train(mode)


def test_a_module_that_refuses_to_train_is_cut():
    net, x = nn.Sequential(Evaluated(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    net[0].tables = [torch.zeros(3)]
    net.eval()
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    assert small[0].out_features == 4 and (small(x) - graphprune.zeroed(net, plan)(x)[0]).abs().max() < 1e-5
