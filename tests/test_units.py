"""What may go: features that learnt weights make. Positions, tokens, coordinates, table entries and remembered samples stay, and what reads them goes on.

The judge is independent of the library's oracle: what ``plan.masks`` says is set to zero on a deep copy, and the model's own code runs.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune import errors

X = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def zeros(net, plan, shift=0):
    """A copy of the model with the removed entries set to zero (``shift``: those of other units instead)."""
    other, masks = copy.deepcopy(net), plan.masks(net)
    tensors = dict(other.named_parameters()) | dict(other.named_buffers())
    for prefix, module in other.named_modules():  # plain attributes have masks, too
        tensors |= {f"{prefix}.{name}".lstrip("."): value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    for name, mask in masks.items():
        if name in plan.cuts and tensors[name].is_floating_point():
            for axis in plan.cuts[name] if shift else ():
                mask = mask.roll(shift, axis)
            tensors[name].data[~mask] = 0
    return other


def judged(net, x, ratio=0.5, **options):
    """The plan, after comparing the cut model with the judge on another input, and with a judge that zeroes other units, which must differ."""
    torch.manual_seed(0)
    net = net.double().eval()
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    small, plan = graphprune.shrink(net, x, ratio, return_plan=True, **options)
    other = torch.randn_like(x) if x.is_floating_point() else x.flip(0)
    with torch.no_grad():
        mine, theirs, wrong = small(other), zeros(net, plan)(other), zeros(net, plan, 1)(other)
    assert float((mine - theirs).abs().max()) < 1e-9 * float(theirs.abs().max())
    assert float((mine - wrong).abs().max()) > 1e-6
    return plan


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return (self.q(x) @ self.k(x).mT * 0.3).softmax(-1) @ self.v(x)


class Registers(nn.Module):
    """Learnt tokens beside those of the input."""

    def __init__(self, how):
        super().__init__()
        self.how, self.embed, self.attention, self.head = how, nn.Linear(8, 16), Attention(), nn.Linear(16, 3)
        self.tokens = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        x, tokens = self.embed(x), self.tokens.expand(len(x), -1, -1)
        if self.how == "mixed":
            tokens = tokens + x.mean(1, keepdim=True)
        x = self.attention(torch.cat([x, tokens] if self.how == "after" else [tokens, x], 1))
        x = x[:, :6] if self.how == "after" else x[:, 4:]
        return self.head(x)


class Latents(nn.Module):
    """Learnt queries that gather from the input, then from each other."""

    def __init__(self):
        super().__init__()
        self.latents, self.embed, self.across, self.within = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 16), Attention(), Attention()
        self.query, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        x = (self.query(self.latents) @ self.across.k(x).mT).softmax(-1) @ self.across.v(x)
        return self.head(self.within(x).mean(1))


class Coordinates(nn.Module):
    """A bias of attention from the coordinates of pairs of positions, by a small network."""

    def __init__(self, kind, size=2):
        super().__init__()
        coordinates = torch.randn(6, 6, size)
        if kind == "buffer":
            self.register_buffer("coordinates", coordinates)
        else:
            self.coordinates = coordinates.double()
        self.up, self.down = nn.Linear(size, 16), nn.Linear(16, 1)
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.down(self.up(self.coordinates).relu())[..., 0].softmax(-1) @ self.embed(x))


class Bank(nn.Module):
    """Entries that are remembered: their mean, or what attention finds in them."""

    def __init__(self, how):
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("bank", torch.randn(20, 16))

    def forward(self, x):
        x = self.up(x)
        if self.how == "mean":
            return self.down(x + self.bank.mean(0))
        return self.down(x + (x @ self.bank.T).softmax(-1) @ self.bank)


class State(nn.Module):
    """What an earlier call left behind, a sample in each row."""

    def __init__(self):
        super().__init__()
        self.up, self.across, self.down, self.state = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3), torch.randn(7, 16).double()

    def forward(self, x):
        return self.down(self.across(self.up(x).relu() + self.state.mean(0)).relu())


class Positions(nn.Module):
    """A table of positions longer than the example, read by numbers or by a slice."""

    def __init__(self, how):
        super().__init__()
        self.how, self.words, self.up, self.down = how, nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.table = nn.Embedding(64, 16) if how == "numbers" else nn.Parameter(torch.randn(64, 16))
        self.register_buffer("numbers", torch.arange(64)[None])

    def forward(self, ids):
        n = ids.shape[1]
        places = self.table(self.numbers[:, :n]) if self.how == "numbers" else self.table[:n]
        return self.down(self.up(self.words(ids) + places).relu())


def axes(plan, name):
    return set(plan.cuts.get(name, {}))


@pytest.mark.parametrize("how", ["before", "after", "mixed"])
def test_learnt_tokens_stay(how):
    plan = judged(Registers(how), X)
    assert axes(plan, "tokens") == {1} and axes(plan, "embed.weight") == {0} and axes(plan, "attention.q.weight") == {0, 1}


def test_latents_stay_and_their_features_go():
    plan = judged(Latents(), X)
    assert axes(plan, "latents") == {1} and axes(plan, "query.weight") == {0, 1}


@pytest.mark.parametrize(("kind", "size"), [("buffer", 2), ("attribute", 2), ("buffer", 5)])
def test_coordinates_stay_and_the_network_over_them_is_cut(kind, size):
    plan = judged(Coordinates(kind, size), X)
    assert not axes(plan, "coordinates") and axes(plan, "up.weight") == {0} and axes(plan, "down.weight") == {1}


@pytest.mark.parametrize("how", ["mean", "attention"])
def test_entries_of_a_memory_stay(how):
    assert axes(judged(Bank(how), X), "bank") == {1}


def test_samples_of_a_remembered_state_stay():
    assert axes(judged(State(), X), "across.weight") == {0, 1}
    net = State().double().eval()
    assert graphprune.shrink(net, X, 0.5).state.shape == (7, 8)


@pytest.mark.parametrize("how", ["numbers", "slice"])
def test_positions_beyond_the_example_stay(how):
    ids = torch.arange(12).view(2, 6)
    net = Positions(how)
    plan = judged(net, ids)
    assert axes(plan, "table.weight" if how == "numbers" else "table") == {1} and not axes(plan, "numbers")
    long = torch.arange(60).view(1, 60) % 30
    with torch.no_grad():
        assert torch.allclose(graphprune.apply(net, plan)(long), zeros(net, plan)(long), atol=1e-12)


def test_the_reason_says_so_and_the_word_that_frees_it():
    graph = graphprune.trace(Registers("before").eval(), X.float())
    reason = graphprune.couple(graph).locked["tokens", 0]
    assert reason.kind == "position" and "not features" in str(reason)
    freed = graphprune.couple(graph, free=("position",))
    assert any(("tokens", 0) in group.places for group in freed)


class Modulated(nn.Module):
    """Kernels multiplied by what a layer makes of each sample (one group a sample)."""

    def __init__(self):
        super().__init__()
        self.stem, self.style, self.head = nn.Conv2d(3, 8, 1), nn.Linear(3, 8), nn.Conv2d(12, 3, 1)
        self.kernel = nn.Parameter(torch.randn(12, 8, 3, 3))

    def forward(self, x):
        b, _, h, w = x.shape
        style = self.style(x.mean((2, 3)))
        kernel = self.kernel * style[:, None, :, None, None]
        y = F.conv2d(self.stem(x).view(1, -1, h, w), kernel.flatten(0, 1), padding=1, groups=b).view(b, -1, h, w)
        return self.head(y.relu())


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 3)
        self.a, self.b = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(16, 6))

    def forward(self, x):
        return self.down(F.linear(self.up(x).relu(), self.b @ self.a).relu())


class Numeric(nn.Module):
    """Each number of the input becomes a vector."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.up, self.down = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.down(self.up(x[..., None] * self.weight + self.bias).relu())


class Constant(nn.Module):
    """A learnt image as the input of the first convolution."""

    def __init__(self):
        super().__init__()
        self.image, self.a, self.b = nn.Parameter(torch.randn(1, 12, 4, 4)), nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.b(self.a(self.image.expand(len(x), -1, -1, -1)).relu() * x[:, :1, :1, None])


class Filters(nn.Module):
    """Filters computed from two learnt numbers each."""

    def __init__(self):
        super().__init__()
        self.low, self.band, self.head = nn.Parameter(torch.rand(12, 1)), nn.Parameter(torch.rand(12, 1)), nn.Conv1d(12, 3, 1)
        self.register_buffer("times", torch.linspace(-1, 1, 5)[None])

    def forward(self, x):
        kernel = torch.sin(self.low * self.times) - torch.sin((self.low + self.band) * self.times)
        return self.head(F.conv1d(x[:, :1], kernel[:, None]).relu())


class Auxiliary(nn.Module):
    """Features that are made and used for nothing."""

    def __init__(self):
        super().__init__()
        self.up, self.idle, self.down = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(16, 3)

    def forward(self, x):
        x = self.up(x).relu()
        self.idle(x)
        return self.down(x)


@pytest.mark.parametrize(
    ("net", "x", "cut"),
    [
        (Modulated(), torch.randn(2, 3, 6, 6).double(), {"kernel": {0, 1}, "style.weight": {0}}),
        (LowRank(), X, {"a": {0, 1}, "b": {0, 1}}),
        (Numeric(), X, {"weight": {1}, "up.weight": {0, 1}}),
        (Constant(), X, {"image": {1}, "a.weight": {0, 1}}),
        (Filters(), X, {"low": {0}, "band": {0}, "head.weight": {1}}),
        (Auxiliary(), X, {"idle.weight": {0, 1}, "down.weight": {1}}),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else "",
)
def test_what_learnt_weights_make_in_other_ways_may_go(net, x, cut):
    plan = judged(net, x)
    assert {name: axes(plan, name) for name in cut} == cut


def test_a_model_without_parameters_has_its_buffers_for_weights():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.randn(16, 8).double())
            self.register_buffer("b", torch.randn(3, 16).double())

        def forward(self, x):
            return F.linear(F.linear(x, self.a).relu(), self.b)

    assert axes(judged(Frozen(), X), "a") == {0}


def test_where_only_positions_are_free_the_error_says_what_they_are():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(20, 8))

        def forward(self, x):
            return x + self.table.mean(0)

    with pytest.raises(errors.NothingToPrune, match="positions, not features"):
        graphprune.shrink(Table(), X.float())
