"""Fits before activations that are flat in parts: intervals are what the activation makes the same of, fits are the convex optimum, and networks gain."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.repair.censored import Rows, censored, distance, intervals
from graphprune.repair.moments import moments
from graphprune.repair.sites import sites
from graphprune.repair.solve import least_squares

F64 = torch.float64
ACTIVATIONS = {
    "relu": (torch.relu, (0.0, math.inf)),
    "relu6": (nn.functional.relu6, (0.0, 6.0)),
    "hardswish": (nn.functional.hardswish, (-3.0, math.inf)),
    "hardsigmoid": (nn.functional.hardsigmoid, (-3.0, 3.0)),
    "hardtanh": (lambda z: nn.functional.hardtanh(z, -0.5, 2.0), (-0.5, 2.0)),
}
names = st.sampled_from(sorted(ACTIVATIONS))


@settings(max_examples=60, deadline=None)
@given(names, st.integers(0, 10**6))
def test_an_interval_is_all_that_the_activation_makes_the_same_of(name, seed):
    function, ends = ACTIVATIONS[name]
    torch.manual_seed(seed)
    z, gain = 4 * torch.randn(50, 7, dtype=F64), torch.randn(7, dtype=F64)
    gain[0] = 0.0  # a dead channel: only the number itself
    y = torch.randn(7, dtype=F64) + z * gain
    low, high = intervals(y, z, gain, ends)
    assert bool((low <= y + 1e-12).all()) and bool((high >= y - 1e-12).all())
    drawn = y + 5 * torch.randn_like(y)
    inside = drawn.clamp(low, high)
    moved = torch.where(gain == 0, torch.zeros_like(y), (inside - y) / torch.where(gain == 0, 1.0, gain))
    assert torch.allclose(function(z + moved), function(z), atol=1e-9)
    outside = (inside != drawn) & (gain != 0)
    there = z + (drawn - y) / torch.where(gain == 0, 1.0, gain)
    assert bool((function(there) != function(z))[outside & (z > ends[0]) & (z < ends[1]) & (there > ends[0]) & (there < ends[1])].float().mean() > 0.9)
    assert bool((function(z + (edge_off(inside, drawn, y, gain))) != function(z))[outside & ((z < ends[0]) | (z > ends[1]))].float().mean() > 0.9)


def edge_off(inside, drawn, y, gain):
    """A little beyond the interval, in the direction in which the draw left it."""
    safe = torch.where(gain == 0, 1.0, gain)
    return (inside - y) / safe + 1e-3 * ((drawn - inside) / safe).sign()


def problem(seed, name="relu", outputs=3, blocks=2, noise=0.5):
    torch.manual_seed(seed)
    x = torch.randn(blocks, 60, 4, dtype=F64) + 1
    y = x @ torch.randn(blocks, 4, outputs, dtype=F64) + noise * torch.randn(blocks, 60, outputs, dtype=F64) - 0.5
    ends = ACTIVATIONS[name][1]
    pairs = [intervals(part, part, torch.ones(outputs, dtype=F64), ends) for part in y]
    low, high = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    return x, y, Rows(((x[:, :25], low[:, :25], high[:, :25]), (x[:, 25:], low[:, 25:], high[:, 25:])))


@settings(max_examples=15, deadline=None)
@given(names, st.booleans(), st.sampled_from([1e-2, 1.0]), st.integers(0, 10**6))
def test_the_fit_is_the_convex_optimum(name, intercept, ridge, seed):
    """Where it ends no direction lowers the objective: the gradient, taken by autograd of the plain formula, is nothing."""
    x, y, rows = problem(seed, name)
    data = moments(x, y)
    start = least_squares(data, 1e-4, None, intercept)
    weight, bias = censored(rows, data, ridge, start, intercept, rounds=2000, enough=0.0)
    centre = x.mean(1, keepdim=True) if intercept else torch.zeros_like(x[:, :1])
    damp = ridge * (x - centre).square().sum(1).mean(1)
    _, low, high = rows.whole()

    def objective(weight, bias):
        found = x @ weight.transpose(1, 2) + bias[:, None]
        return (found - found.clamp(low, high).detach()).square().sum() + (damp[:, None, None] * (weight - start[0]).square()).sum()

    tried = [t.clone().requires_grad_() for t in (weight, bias)]
    slope = torch.autograd.grad(objective(*tried), tried)
    scale = float(objective(weight, bias)) + 1e-3
    assert float(slope[0].abs().max()) < 1e-3 * scale and (not intercept or float(slope[1].abs().max()) < 1e-3 * scale)
    if not intercept:
        assert not bias.any()
    moved = [t + 0.1 * torch.randn_like(t) for t in (weight, bias)]
    moved[1] = moved[1] if intercept else bias
    assert float(objective(*moved)) > float(objective(weight, bias))


@settings(max_examples=20, deadline=None)
@given(st.booleans(), st.sampled_from([1e-3, 1.0]), st.integers(0, 10**6))
def test_without_flat_parts_it_is_least_squares(intercept, ridge, seed):
    x, y, _ = problem(seed)
    data, start = moments(x, y), (torch.randn(2, 3, 4, dtype=F64), torch.zeros(2, 3, dtype=F64))
    found = censored(Rows(((x, y, y),)), data, ridge, start, intercept)
    wanted = least_squares(data, ridge, start[0], intercept)
    assert torch.allclose(found[0], wanted[0], atol=1e-8) and torch.allclose(found[1], wanted[1], atol=1e-8)
    assert abs(distance(Rows(((x, y, y),)), *wanted) - float((x @ wanted[0].mT + wanted[1][:, None] - y).square().sum() / 60)) < 1e-8


@settings(max_examples=20, deadline=None)
@given(names, st.integers(0, 10**6))
def test_every_round_comes_nearer(name, seed):
    x, y, rows = problem(seed, name)
    data = moments(x, y)
    start = least_squares(data, 0.0)
    far = [distance(rows, *censored(rows, data, 0.0, start, rounds=count, enough=0.0)) for count in (0, 1, 2, 5, 20)]
    assert all(b <= a + 1e-12 for a, b in zip(far, far[1:], strict=False))
    assert far[0] == distance(rows, *start) and far[-1] < far[0]


def test_the_ridge_too_small_leaves_the_start():
    x = torch.ones(1, 8, 3, dtype=F64)
    start = (torch.randn(1, 2, 3, dtype=F64), torch.randn(1, 2, dtype=F64))
    rows = Rows(((x, torch.zeros(1, 8, 2, dtype=F64), torch.zeros(1, 8, 2, dtype=F64)),))
    found = censored(rows, moments(x, torch.zeros(1, 8, 2, dtype=F64)), 0.0, start)
    assert all(bool(torch.isfinite(t).all()) for t in found)


class Block(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.one, self.norm, self.two, self.act = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), activation

    def forward(self, x):
        h = self.act(self.norm(self.one(x)))
        return self.act(h + self.two(h)).mean((2, 3))


@pytest.mark.parametrize(
    "activation, ends",
    [
        (nn.ReLU(), (0, math.inf)),
        (nn.ReLU(inplace=True), (0, math.inf)),
        (nn.ReLU6(), (0, 6)),
        (nn.Hardtanh(-2, 3), (-2, 3)),
        (nn.Hardtanh(), (-1, 1)),
        (nn.Hardswish(), (-3, math.inf)),
        (nn.Hardsigmoid(), (-3, 3)),
        (nn.Threshold(0, 0), None),
        (nn.GELU(), None),
        (nn.Tanh(), None),
    ],
)
def test_sites_know_what_stands_behind(activation, ends):
    """Behind a norm, and behind an addition."""
    found = [site.flat for site in sites(graphprune.trace(Block(activation).eval(), torch.randn(1, 3, 5, 5)))[0]]
    assert [flat.ends if flat else None for flat in found] == [ends, ends]


class Odd(nn.Module):
    """Sums that others read too, or that are read by more than the activation."""

    def __init__(self, way):
        super().__init__()
        self.way, self.one, self.two, self.norm, self.rest = way, nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()

    def forward(self, x):
        x = torch.tanh(x)
        z = self.one(x)
        if self.way == "clamp":
            return self.two(z.clamp(min=0.5))
        if self.way == "clamp of tensors":
            return self.two(z.clamp(z.mean() - 1, z.mean() + 1))
        if self.way == "out":
            return z, torch.relu(z)
        if self.way == "out of a norm":
            return z, torch.relu(self.norm(z))
        if self.way == "data":
            return self.two(torch.relu(z)), z.data
        if self.way == "transposed":
            return self.two(torch.relu(z)), z.T.sum(0, keepdim=True).T
        if self.way == "twice as much":
            return torch.relu(torch.add(x, z, alpha=2))
        if self.way == "added":
            return torch.relu(x + self.rest(z))
        if self.way == "below":
            return self.two(z.clamp_max(2.0))
        if self.way == "later":
            return torch.relu(z + self.two(x))
        return self.two(torch.relu(z)) + z


@pytest.mark.parametrize(
    "way, ends",
    [
        ("clamp", (0.5, math.inf)),
        ("below", (-math.inf, 2.0)),
        ("added", (0.0, math.inf)),
        ("clamp of tensors", None),
        ("out", None),
        ("out of a norm", None),
        ("data", None),
        ("transposed", None),
        ("twice as much", None),
        ("later", None),
        ("twice", None),
    ],
)
def test_only_what_the_activation_alone_reads_is_censored(way, ends):
    (site, *_), _ = sites(graphprune.trace(Odd(way).eval(), torch.randn(2, 4)))
    assert (site.flat.ends if site.flat else None) == ends
    assert (site.other is not None) == (way == "added")


def test_a_norm_over_another_axis_is_no_norm_of_the_outputs():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    assert [site.norm is not None for site in sites(graphprune.trace(net, torch.randn(2, 6, 4)))[0]] == [False, False]
    assert [site.norm is not None for site in sites(graphprune.trace(net, torch.randn(2, 4)))[0]] == [True, False]


def networks(seed, activation):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 48), activation, nn.Linear(48, 48), activation, nn.Linear(48, 48), activation, nn.Linear(48, 4)).double()
    net[6].weight.data *= 3
    data, fresh = [torch.randn(256, 8, dtype=F64) for _ in range(8)], torch.randn(1000, 8, dtype=F64)
    return net, data, fresh


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 2)])
def test_networks_come_nearer_than_with_least_squares_alone(activation):
    gains = []
    for seed in range(4):
        net, data, fresh = networks(seed, activation)
        small, plan = graphprune.shrink(net, data[0][:1], ratio=0.6, return_plan=True)
        before = copy.deepcopy(small.state_dict())
        plain, better = (graphprune.repair(small, net, plan, data, steps, progress=False) for steps in (["least-squares"], ["least-squares", "censored"]))
        with torch.no_grad():
            far = [float((model(fresh) - net(fresh)).square().mean()) for model in (plain, better)]
        gains.append(far[1] / far[0])
        done = [r for r in better.graphprune_repairs if r.step == "censored"]
        assert [r.where for r in done] == ["2.weight", "4.weight"] and all(r.after <= r.before for r in done if r.kept) and any(r.kept for r in done)
        assert all(torch.equal(a, before[n]) for n, a in small.state_dict().items())
    assert sum(gains) / 4 < 0.97, gains


def test_smooth_activations_are_left_to_least_squares():
    net, data, _ = networks(0, nn.Tanh())
    small, plan = graphprune.shrink(net, data[0][:1], return_plan=True)
    better = graphprune.repair(small, net, plan, data, "censored", progress=False)
    assert [str(one) for one in better.graphprune_repairs] == ["repair censored: the model has nothing for it to do"]  # asked for by name
    assert all(torch.equal(one, two) for one, two in zip(better.parameters(), small.parameters(), strict=True))
    auto, plain = (graphprune.repair(small, net, plan, data, steps, progress=False) for steps in (["least-squares", "censored"], ["least-squares"]))
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), plain.parameters(), strict=True))


class OnePosition(nn.Module):
    """Convolutions without norms at one position, an addition and an activation, in place or not."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace, self.one, self.two, self.three = inplace, nn.Conv2d(6, 16, 1), nn.Conv2d(16, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        y = self.two(torch.relu(self.one(x)))
        return self.three(torch.relu_(y.add_(x)) if self.inplace else torch.relu(y + x)).flatten(1)


def test_what_a_model_writes_over_is_read_before():
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net, data = OnePosition(inplace).double(), [torch.randn(128, 6, 1, 1, dtype=F64) for _ in range(4)]
        small, plan = graphprune.shrink(net, data[0][:1], return_plan=True)
        found.append(graphprune.repair(small, net, plan, data, progress=False).graphprune_repairs)
    assert found[0] and found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_gains(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype)
    data, fresh = [(16 * torch.randn(512, 16)).to(dtype) for _ in range(4)], (16 * torch.randn(512, 16)).to(dtype)
    small, plan = graphprune.shrink(net, data[0][:1], return_plan=True, verify=False)
    better = graphprune.repair(small, net, plan, data, progress=False)
    with torch.no_grad():
        far = [float((model(fresh).float() - net(fresh).float()).square().mean()) for model in (small, better)]
    assert far[1] < 0.5 * far[0]


def test_rows_of_two_types_meet():
    """Under autocast the weight reads float32 and writes bfloat16; the stream it is added to is float32."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three, self.four = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.one(x)
            with torch.autocast("cpu", torch.bfloat16):
                y = self.three(torch.relu(self.two(h)))
            return self.four(torch.relu(h + y))

    torch.manual_seed(0)
    net, data = Mixed(), [torch.randn(256, 8) for _ in range(4)]
    small, plan = graphprune.shrink(net, data[0][:1], return_plan=True, verify=False, keep=["one.weight"])
    found = graphprune.repair(small, net, plan, data, progress=False).graphprune_repairs
    assert {"least-squares", "censored"} <= {r.step for r in found}


def test_censored_comes_last_whatever_the_order():
    net, data, _ = networks(1, nn.ReLU())
    small, plan = graphprune.shrink(net, data[0][:1], ratio=0.6, return_plan=True)
    one, two = (graphprune.repair(small, net, plan, data, steps, progress=False) for steps in (["least-squares", "censored"], ["censored", "least-squares"]))
    assert one.graphprune_repairs == two.graphprune_repairs
    with pytest.warns(UserWarning, match="calibration rows"):
        graphprune.repair(small, net, plan, [data[0][:8]], "censored", progress=False)
