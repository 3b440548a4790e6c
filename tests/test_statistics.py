"""Statistics over features that go: a sum of zeros stays what it was, norms take theirs of what stays, the rest is whole unless the user frees it."""

import pytest
import torch
import torch.nn.functional as F
from judge import emptied, gap
from test_units import axes, judged, zeros
from torch import nn

import graphprune
from graphprune.errors import NothingToPrune

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Linear 8 -> 16, something, Linear 16 -> 4."""

    def __init__(self, does, relu=True):
        super().__init__()
        self.up, self.down, self.does, self.relu = nn.Linear(8, 16), nn.Linear(16, 4), does, relu

    def forward(self, x):
        x = self.up(x)
        return self.down(self.does(x.relu() if self.relu else x))


EXACT = {
    "sum": lambda h: h * h.sum(1, keepdim=True).sigmoid(),
    "sum of squares": lambda h: h / (1 + (h**2).sum(1, keepdim=True)),
    "length": lambda h: F.normalize(h, dim=1),
    "product with itself": lambda h: h * (h * h.tanh()).sum(1, keepdim=True),
}
EXACT |= {
    "no number": lambda h: h + h.isnan().any(1, keepdim=True),
    "all finite": lambda h: h * torch.isfinite(h).all(1, keepdim=True),
    "any above": lambda h: h * (h > 0.1).any(1, keepdim=True),
    "none below": lambda h: h * (h > -0.1).all(1, keepdim=True),
    "product of exponentials": lambda h: h * (-h).exp().prod(1, keepdim=True),
    "asked once": lambda h: h if not torch.isnan(h).any() and bool((h >= 0).all()) else -h,
}
WHOLE = {
    "mean": lambda h: h * h.mean(1, keepdim=True),
    "centred": lambda h: h - h.mean(1, keepdim=True),
    "product": lambda h: h * (h + 0.5).prod(1, keepdim=True),
    "logsumexp": lambda h: h - h.logsumexp(1, keepdim=True),
    "count": lambda h: h / torch.ones_like(h).sum(1, keepdim=True),
    "softmax": lambda h: h.softmax(1),
    "log softmax": lambda h: h.log_softmax(1),
    "log softmax of a function": lambda h: h + F.log_softmax(h, dim=-1),
    "softmin": lambda h: F.softmin(h, dim=1),
    "softmax by hand": lambda h: h.exp() / h.exp().sum(1, keepdim=True),
    "sum of cosines": lambda h: h + h.cos().sum(1, keepdim=True),
    "variance": lambda h: h * h.var(1, keepdim=True),
    "gate of the mean": lambda h: h * h.mean(1, keepdim=True).sigmoid(),
}
NORMS = {
    "layer norm by hand": lambda h: (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True) + 1e-5).sqrt(),
    "rms": lambda h: h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6),
    "power": lambda h: h * (h.pow(2).mean(1, keepdim=True) + 1e-6).pow(-0.5),
    "by its mean": lambda h: h / (h.abs().mean(1, keepdim=True) + 1e-6),
    "deviation first": lambda h: (lambda c: c / (c.square().mean(1, keepdim=True) + 1e-5).sqrt())(h - h.mean(1, keepdim=True)),
}


@pytest.mark.parametrize("name", list(EXACT))
def test_sums_of_zeros_are_exact(name):
    assert axes(judged(Between(EXACT[name]), X), "up.weight") == {0}


@pytest.mark.parametrize("name", list(WHOLE))
def test_other_statistics_leave_the_axis_whole_unless_it_is_freed(name):
    net = Between(WHOLE[name]).eval()
    with pytest.raises(NothingToPrune, match="changes with the number of its entries"):
        graphprune.shrink(net, X.float(), 0.5)
    graph = graphprune.trace(net, X.float())
    reason = graphprune.couple(graph).locked["up.weight", 0]
    assert reason.kind == "statistic"
    assert [group.size for group in graphprune.couple(graph, free=("statistic",))] == [16]


@pytest.mark.parametrize("name", list(WHOLE))
def test_cutting_them_would_have_been_wrong(name):
    """The control: the judge disagrees with a cut that the statistic's condition forbids."""
    net = Between(WHOLE[name]).double().eval()
    small, plan = graphprune.shrink(Between(nn.Identity()).double().eval(), X, 0.5, return_plan=True)
    del small
    with torch.no_grad():
        assert not torch.allclose(graphprune.apply(net, plan)(X), zeros(net, plan)(X), atol=1e-3)


@pytest.mark.parametrize("name", list(NORMS))
def test_norms_by_hand_take_their_statistics_of_what_stays(name):
    torch.manual_seed(0)
    net = Between(NORMS[name], relu=False).double().eval()
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    kept = plan.cuts["up.weight"][0]
    with torch.no_grad():
        inner = NORMS[name](net.up(X)[:, kept])
        assert torch.allclose(small(X), F.linear(inner, net.down.weight[:, kept], net.down.bias), atol=1e-12)
        assert not torch.allclose(small(X), zeros(net, plan)(X), atol=1e-3)


def test_heads_go_where_a_softmax_runs_within_each():
    class Across(nn.Module):
        """Attention between the channels of a head."""

        def __init__(self):
            super().__init__()
            self.heads, self.qkv, self.out = 4, nn.Linear(8, 48), nn.Linear(16, 3)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1)
            y = (q @ k.mT).softmax(-1) @ v
            return self.out(y.permute(0, 3, 1, 2).reshape(b, n, -1))

    plan = judged(Across(), torch.randn(2, 5, 8).double())
    assert len(plan.cuts["qkv.weight"][0]) == 24 and ("", "heads", 2) in plan.edits


@pytest.mark.parametrize("shift, whole", [(0.1, True), (0.0, False)])
def test_a_distance_goes_only_where_both_of_its_ends_are_zero(shift, whole):
    """What a removed feature adds to a distance is the difference of its two ends."""

    class Near(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x):
            return torch.cdist(self.a(x), self.b(x) + shift if shift else self.b(x))

    torch.manual_seed(0)
    net, x = Near().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    if whole:
        with pytest.raises(NothingToPrune):
            graphprune.shrink(net, x)
        return
    small, plan = graphprune.shrink(net, x, return_plan=True)
    assert small.a.out_features == small.b.out_features == 4
    assert gap(small(x + 1), emptied(net, plan)(x + 1)) < 1e-9 < gap(small(x + 1), net(x + 1))


TOLD = {
    "any below": lambda h: h * (h < 0.1).any(1, keepdim=True),
    "all above": lambda h: h * (h > 0.1).all(1, keepdim=True),
    "all are there": lambda h: h * (h != 0).all(1, keepdim=True),
    "largest": lambda h: h * h.amax(1, keepdim=True),
    "product": lambda h: h * h.cosh().sub(1).prod(1, keepdim=True),
}


@pytest.mark.parametrize("name", list(TOLD))
def test_what_a_zero_would_tell_stays(name):
    """The control of what makes no difference: without the removed entries these say something else of what comes in."""
    with pytest.raises(NothingToPrune, match="changes with the number of its entries"):
        graphprune.shrink(Between(TOLD[name], relu=False).eval(), X.float(), 0.5)


class Divided(nn.Module):
    """What is divided by its own deviation, which may be returned as well."""

    def __init__(self, returned):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.returned = nn.Linear(8, 16), nn.Linear(16, 3), returned

    def forward(self, x):
        h = self.stem(x)
        deviation = h.std(-1, keepdim=True)
        return (self.head(h / deviation), deviation) if self.returned else self.head(h / deviation)


@pytest.mark.parametrize("returned", [False, True])
def test_a_statistic_that_is_returned_is_no_norm(returned):
    net, x = Divided(returned).double(), torch.randn(4, 8, dtype=torch.float64)
    small = graphprune.shrink(net, x, 0.5) if not returned else None
    assert small is None or small.head.in_features == 8
    if returned:
        with pytest.raises(graphprune.errors.NothingToPrune, match="statistic"):
            graphprune.shrink(net, x, 0.5)
