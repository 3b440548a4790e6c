"""Low-rank updates beside a layer: their rank is written down where no run reads it, and stays unless the user frees it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import graphprune
from graphprune.errors import BadOption

X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RANK = 4


class Adapted(nn.Module):
    """A layer and changes to it, each with a rank and a scale that nothing reads but who merges or stores them."""

    def __init__(self, base, adapters=1, between=None, first=False):
        super().__init__()
        self.base, self.between, self.first = base, between, first
        self.scale = {f"adapter {index}": 2.0 for index in range(adapters)}
        if isinstance(base, nn.Conv2d):
            pairs = [(nn.Conv2d(base.in_channels, RANK, 3, padding=1, bias=False), nn.Conv2d(RANK, base.out_channels, 1)) for _ in range(adapters)]
        else:
            pairs = [(nn.Linear(base.in_features, RANK, bias=False), nn.Linear(RANK, base.out_features, bias=False)) for _ in range(adapters)]
        self.downs, self.ups = nn.ModuleList([down for down, _ in pairs]), nn.ModuleList([up for _, up in pairs])
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        y = self.base(x)
        for down, up, scale in zip(self.downs, self.ups, self.scale.values(), strict=True):
            inner = down(self.drop(x))
            change = up(inner if self.between is None else self.between(inner)) * scale
            y = change + y if self.first else y + change
        return y


class Changed(nn.Module):
    """A parametrization: the weight and a change to it."""

    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(RANK, columns)), nn.Parameter(torch.randn(rows, RANK))

    def forward(self, weight):
        return weight + 0.5 * (self.b @ self.a)


def linear(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Adapted(nn.Linear(16, 16), **options), nn.ReLU(), nn.Linear(16, 3)).double().eval()


def convolution():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 16, 1), Adapted(nn.Conv2d(16, 16, 3, padding=1)), nn.ReLU()
    return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), *layers, nn.Flatten(), nn.Linear(64, 3)).double().eval()


def parametrised():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    parametrize.register_parametrization(net[2], "weight", Changed(16, 16))
    return net.double().eval()


def several():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Adapted(nn.Linear(16, 24), adapters=3, first=True), nn.Tanh(), nn.Linear(24, 3)).double().eval()


BUILDS = {"linear": linear, "swapped": lambda: linear(first=True), "several": several, "convolution": convolution, "parametrization": parametrised}


def ranks(net):
    """The lengths of all axes that are the rank of an update."""
    thin = [layer.weight.shape[0] for module in net.modules() if isinstance(module, Adapted) for layer in module.downs]
    return thin + [module.a.shape[0] for module in net.modules() if isinstance(module, Changed)]


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_the_rank_stays_and_everything_else_goes(build):
    net = build()
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert set(ranks(small)) == {RANK} and sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in net.parameters())
    assert (small(X) - graphprune.zeroed(net, plan)(X)[0]).abs().max() < 1e-9
    locked = graphprune.couple(graphprune.trace(net, X)).locked
    assert "rank" in {reason.kind for (name, axis), reason in locked.items() if net.get_parameter(name).shape[axis] == RANK}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_the_rank_goes_at_the_users_word(build):
    net = build()
    small, plan = graphprune.shrink(net, X, 0.5, widths=graphprune.Widths(also=("ranks",)), return_plan=True)
    assert set(ranks(small)) == {RANK // 2}
    assert (small(X) - graphprune.zeroed(net, plan)(X)[0]).abs().max() < 1e-9
    with pytest.raises(BadOption, match="ranks"):
        graphprune.Widths(also=("rank",))


class Beside(nn.Module):
    """Two thin layers beside something that is no layer that reads the same."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.stem, self.base, self.head = kind, nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.down, self.up, self.next = nn.Linear(16, RANK), nn.Linear(RANK, 16), nn.Linear(16, 16)
        self.double()

    def forward(self, x):
        h = self.stem(x).relu()
        if self.kind == "chain":
            return self.head(self.up(self.down(h)))
        if self.kind == "residual":
            return self.head(h + self.up(self.down(h)))
        if self.kind == "residual of a layer":
            h = self.base(h)
            return self.head(h + self.next(h))
        if self.kind == "one product":
            return self.head(torch.addmm(self.base(h), self.down(h), self.up.weight.t()))
        if self.kind == "another input":
            return self.head(self.base(h) + self.up(self.down(h.sigmoid())))
        return self.head(self.base(h) + self.up(F.silu(self.down(h))))  # a bottleneck with an activation: its width is one


@pytest.mark.parametrize("kind", ["chain", "residual", "another input", "activation"])
def test_thin_layers_that_change_no_other_are_layers(kind):
    assert graphprune.shrink(Beside(kind), X, 0.5).down.out_features == RANK // 2


def test_a_layer_added_to_what_it_reads_changes_no_other():
    assert graphprune.shrink(Beside("residual of a layer"), X, 0.5).base.out_features == 8


def test_an_update_that_a_product_adds_is_one():
    small = graphprune.shrink(Beside("one product"), X, 0.5)
    assert small.down.out_features == RANK and small.base.out_features == 8


class InOne(nn.Module):
    """A weight and its update, made by one product."""

    def __init__(self):
        super().__init__()
        self.weight, self.up, self.down, self.head = (
            nn.Parameter(torch.randn(16, 8)),
            nn.Parameter(torch.randn(16, RANK)),
            nn.Parameter(torch.randn(RANK, 8)),
            nn.Linear(16, 3),
        )

    def forward(self, x):
        return self.head(F.linear(x, torch.addmm(self.weight, self.up, self.down)))


def test_an_update_in_the_product_that_makes_a_weight_keeps_its_rank():
    small = graphprune.shrink(InOne().double(), X, 0.5)
    assert small.down.shape == (RANK, 8) and small.weight.shape == (8, 8)
