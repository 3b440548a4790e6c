"""Random numbers in the model's own code: a shorter tensor draws fewer, and the zeroed original draws for what stays alone; what the code seeds is a table."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune


class Drawing(nn.Module):
    """Two layers with something random between them."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.spread, self.head, self.drop = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3), nn.Dropout(0.3)
        self.between = between

    def forward(self, x):
        return self.head(self.between(self, self.mean(x), (self.spread(x) / 2).exp()))


def always(net, h, s):
    net.drop.train()
    return net.drop(h)


def branch(net, h, s):
    return F.dropout(h, 0.3, True) if float(h.detach().sum()) > -1e9 else h


DRAWN = {
    "latent": lambda net, h, s: h + torch.randn_like(s) * s,
    "distribution": lambda net, h, s: torch.distributions.Normal(h, s).rsample(),
    "normal": lambda net, h, s: torch.normal(h, s),
    "noise of its own": lambda net, h, s: h + torch.randn(h.shape, dtype=h.dtype),
    "noise of a channel": lambda net, h, s: h * torch.rand(h.shape[-1], dtype=h.dtype),
    "dropout at all times": lambda net, h, s: F.dropout(h, 0.3, True),
    "a module in training": always,
    "alpha dropout": lambda net, h, s: F.alpha_dropout(h, 0.3, True),
    "random slopes": lambda net, h, s: F.rrelu(h, training=True),
    "in another order of memory": lambda net, h, s: F.dropout(h.t(), 0.3, True).t(),
    "filled in place": lambda net, h, s: h * torch.empty_like(h).exponential_(),
    "several": lambda net, h, s: (F.dropout(h, 0.3, True) + torch.randn(h.shape, dtype=h.dtype)).relu() * torch.rand(h.shape[-1], dtype=h.dtype),
    "behind a branch": branch,
}


def seeded(net, h, s):
    torch.manual_seed(0)
    return h * torch.rand(h.shape, dtype=h.dtype)


HELD = {
    "seeded": (seeded, "a seed that the code sets"),
    "a generator": (lambda net, h, s: h * torch.rand(h.shape[-1], generator=torch.Generator().manual_seed(0), dtype=h.dtype), "a seed that the code sets"),
    "numpy's": (lambda net, h, s: h * torch.from_numpy(np.random.rand(h.shape[-1])), "keeps its size"),
    "python's": (lambda net, h, s: h * torch.tensor([random.random() for _ in range(h.shape[-1])], dtype=h.dtype), "keeps its size"),
    "of unit length": (lambda net, h, s: h + F.normalize(torch.randn_like(h), dim=-1), "changes with the number"),
    "of unit length, by hand": (lambda net, h, s: h + (z := torch.randn_like(h)) / z.pow(2).mean(-1, keepdim=True).sqrt(), "changes with the number"),
    "an order": (lambda net, h, s: h[:, torch.randperm(h.shape[-1])], "keeps its size"),
}


@pytest.mark.parametrize("between", DRAWN.values(), ids=DRAWN)
def test_what_is_drawn_for_a_shorter_axis_is_shorter(between):
    net, x = Drawing(between).double().eval(), torch.randn(4, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    assert small.head.in_features == 8
    torch.manual_seed(5)
    result = small(x)
    torch.manual_seed(5)
    wanted = graphprune.zeroed(net, plan)(x)[0]
    assert (result - wanted).abs().max() < 1e-12
    torch.manual_seed(6)
    assert (small(x) - wanted).abs().max() > 1e-3  # control: other numbers give another result


@pytest.mark.parametrize("between, reason", HELD.values(), ids=HELD)
def test_numbers_that_are_no_draw_of_torch_hold_their_axis(between, reason):
    net, x = Drawing(between).double().eval(), torch.randn(4, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    assert small.head.in_features == 16
    assert [str(each.text) for each in plan.outline.wholes if each.name == "mean.weight" and each.axis == 0 and reason in each.text]


def test_a_fault_beside_random_numbers_is_seen():
    net, x = Drawing(DRAWN["several"]).double().eval(), torch.randn(4, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    with torch.no_grad():
        small.head.weight[0, 0] += 0.1
    torch.manual_seed(5)
    result = small(x)
    torch.manual_seed(5)
    assert (result - graphprune.zeroed(net, plan)(x)[0]).abs().max() > 1e-6


def test_a_seed_is_told_though_the_caller_has_set_the_same():
    net, x = Drawing(seeded).double().eval(), torch.randn(4, 8, dtype=torch.float64)
    torch.manual_seed(0)
    assert graphprune.shrink(net, x, 0.5).head.in_features == 16


def test_random_numbers_in_a_further_example():
    net, x = Drawing(DRAWN["noise of its own"]).double().eval(), torch.randn(4, 8, dtype=torch.float64)
    assert graphprune.shrink(net, x, 0.5, examples=[lambda net: net(x[:2])]).head.in_features == 8


class NoisyGate(nn.Module):
    """The largest of noisy scores, the others at minus infinity, and experts in a list."""

    def __init__(self, experts=4):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.noise, self.head = nn.Linear(8, experts), nn.Linear(8, experts), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(experts))

    def forward(self, x):
        scores = self.router(x)
        scores = scores + torch.randn_like(scores) * F.softplus(self.noise(x))
        best, at = scores.topk(2, -1)
        gate = torch.full_like(scores, float("-inf")).scatter(-1, at, best).softmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = (at == index).any(-1)
            if mask.any():
                out[mask] += expert(x[mask]) * gate[mask][:, index, None]
        return self.head(out)


def test_experts_behind_a_noisy_gate_go():
    net, x = NoisyGate().double().eval(), torch.randn(12, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, what={"experts": 0.5}, return_plan=True)
    assert (small.router.out_features, small.noise.out_features, len(small.experts)) == (2, 2, 2)
    torch.manual_seed(5)
    result = small(x)
    torch.manual_seed(5)
    assert (result - graphprune.zeroed(net, plan)(x)[0]).abs().max() < 1e-12
