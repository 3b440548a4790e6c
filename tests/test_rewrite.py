"""Sizes written as literals in forward: the code is rewritten where that frees an axis, proven, and told."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import graphprune

X = torch.randn(2, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.n = nn.BatchNorm2d(16)
        self.c, self.d = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.max_pool2d(F.relu(self.n(self.b(x))), 2)
        x = F.dropout(F.relu(self.c(x.view(-1, 16 * 5 * 5))), 0.5, self.training)
        return self.d(x)


class Parts(nn.Module):
    """Literal parts and a literal slice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(784, 24), nn.Linear(8, 8), nn.Linear(24, 10)

    def forward(self, x):
        p, q, r = torch.split(self.a(x.flatten(1)), 8, dim=1)
        return self.c(torch.cat([self.b(p), q[:, :8] * r.sigmoid(), p[:, 0:8]], 1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 784, 10)
        self.m, self.k = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        y = self.a(x)
        if float(y.sum()) > 1e9:
            y = y * 2
        return self.b(self.k(self.m(y).relu()).view(-1, 8 * 784))


def gap(left, right):
    return float((left - right).detach().abs().max() / right.detach().abs().max())


def random(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model.double().eval()


@pytest.mark.parametrize("kind", [LeNet, Parts])
def test_literals_are_rewritten_and_proven(kind):
    net = random(kind())
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert isinstance(small, fx.GraphModule) and plan.rewrites == ("",) and "rewritten" in plan.explain()
    assert all(sum(p.numel() for p in net.parameters()) > 1.5 * sum(p.numel() for p in m.parameters()) for m in (small,))
    (zero,) = graphprune.zeroed(net, plan)(X)
    assert gap(small(X), zero) < 1e-9
    other = {
        name: {axis: [p for p in range(plan.shapes[name][axis]) if p not in kept] or kept for axis, kept in axes.items()} for name, axes in plan.cuts.items()
    }
    assert other != plan.cuts  # the control: other units of the same number
    wrong = graphprune.Plan({n: {a: sorted(k)[: len(plan.cuts[n][a])] for a, k in axes.items()} for n, axes in other.items()}, plan.shapes)
    assert gap(small(X), graphprune.zeroed(net, wrong)(X)[0]) > 1e-6
    whole, left = graphprune.shrink(net, X, 0.5, return_plan=True, rewrite=False)
    assert type(whole) is kind and "no attribute behind the size" in left.explain()


def test_the_rewritten_model_is_a_whole_one():
    net = random(LeNet())
    before = copy.deepcopy(net)
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert list(small.state_dict()) == list(net.state_dict()) and type(net) is LeNet
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True))
    assert small(torch.cat([X, X, X])).shape == (6, 10)
    small.train()
    assert not torch.equal(small(X), small(X))  # dropout
    small(X).sum().backward()
    mean = small.n.running_mean.clone()
    small.eval()
    assert torch.equal(small(X), small(X)) and torch.equal(mean, small.n.running_mean)
    again = copy.deepcopy(small)
    assert torch.equal(again(X), small(X)) and not again.training
    fresh = graphprune.apply(before, graphprune.Plan.from_json(plan.to_json()))
    assert isinstance(fresh, fx.GraphModule) and fresh(X).shape == (2, 10)


def test_only_the_module_with_the_literal_is_rewritten():
    net = random(nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), LeNet()), nn.ReLU()))
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert type(small) is nn.Sequential and type(small[0]) is nn.Sequential and isinstance(small[0][1], fx.GraphModule)
    assert plan.rewrites == ("0.1",)
    assert gap(small(X), graphprune.zeroed(net, plan)(X)[0]) < 1e-9


def test_code_that_cannot_be_recorded_leaves_the_axis_whole():
    net = random(Branching())
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert type(small) is Branching and (small.m.out_channels, small.k.out_channels) == (8, 8)
    assert "not rewritten" in plan.explain()
