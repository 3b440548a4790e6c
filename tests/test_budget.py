"""Budgets hold exactly, are met closely, are monotone; small instances equal brute force."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import networks
from test_exact import X
from torch import nn

import graphprune
from graphprune.budget import descent
from graphprune.budget.choose import fit, holds
from graphprune.budget.descent import Search, descend
from graphprune.budget.optimal import complete, losses_of
from graphprune.budget.problem import Problem
from graphprune.budget.space import space
from graphprune.budget.targets import limits
from graphprune.cost import NAMES, costs
from graphprune.coupling.lengths import Prefixes
from graphprune.errors import BadRatio, BadTarget
from graphprune.select import best, orders_of

SCOPES = ["layer", "global", "isomorphic", "optimal"]
SHARES = st.sampled_from([0.9, 0.75, 0.5, 0.35])
LONG = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def chain(*widths, image=6):
    """Convolutions with norms, a shortcut over the inner ones where widths allow, and a linear head."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise((3, *widths)))
            self.short = [a == b for a, b in itertools.pairwise((3, *widths))]
            self.head = nn.Linear(widths[-1], 5)

        def forward(self, x):
            for conv, short in zip(self.convs, self.short, strict=True):
                y = conv(x).relu()
                x = x + y if short else y
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    return Chain().eval(), torch.randn(1, 3, image, image)


def coupled(net, x):
    groups = graphprune.couple(graphprune.trace(net, x))
    return groups, graphprune.score(groups, net, "l2"), costs(groups)


@LONG
@given(networks(), st.sampled_from(NAMES), SHARES, st.sampled_from(SCOPES))
def test_a_budget_holds_on_the_cut_model(net, name, share, scope):
    full = graphprune.profile(net, X)
    try:
        small = graphprune.shrink(net, X, scope=scope, verify=False, **{name: share})
    except BadTarget as error:
        assert "smallest reachable" in str(error)
        return
    assert getattr(graphprune.profile(small, X), name) <= share * getattr(full, name)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", NAMES)
def test_targets_are_met_closely_and_more_budget_never_leaves_less(scope, name):
    groups, scores, known = coupled(*chain(64, 64, 96, 96, 128))
    before = None
    for share in np.linspace(0.3 if name != "memory" else 0.75, 1.0, 15):
        asked = limits(known.full, {name: float(share)})
        found = known.of(fit(groups, scores, asked, known, scope=scope))
        assert getattr(found, name) <= asked[name]
        assert name == "memory" or getattr(found, name) >= 0.97 * asked[name]
        assert before is None or all(getattr(found, other) >= getattr(before, other) for other in NAMES)
        before = found
    assert before == known.full


def test_all_targets_hold_together_and_one_alone_does_not_imply_the_other():
    groups, scores, known = coupled(*chain(64, 64, 96, 96, 128))
    for scope in SCOPES:
        both = limits(known.full, {"params": 0.6, "macs": 0.3})
        assert holds(known, fit(groups, scores, both, known, scope=scope), both)
        assert not holds(known, fit(groups, scores, {"params": both["params"]}, known, scope=scope), both)


@pytest.mark.parametrize("scope", SCOPES)
def test_keep_overrides_alignment_and_floors_hold_under_a_budget(scope):
    net, x = chain(32, 48, 64, 128, 100)
    small = graphprune.shrink(net, x, macs=0.6, scope=scope, keep="convs.1", ratios={"convs.4": 0.25}, multiple_of=8, min_units=16)
    widths = [conv.out_channels for conv in small.convs]
    assert widths[:2] == [32, 48] and widths[4] in (75, 80) and all(width % 8 == 0 and width >= 16 for width in widths[:4])
    assert graphprune.profile(small, x).macs <= 0.6 * graphprune.profile(net, x).macs


def test_a_ratio_goes_in_any_case():
    net, x = chain(64, 96)
    small = graphprune.shrink(net, x, 0.5, params=0.9)
    assert [conv.out_channels for conv in small.convs] == [32, 48]


def brute(groups, scores, known, asked, step):
    """Every vector of widths, one after the other, from the scores themselves: the smallest loss that fits."""
    readers, best = [1] * len(groups), math.inf
    for counts in itertools.product(*(range(step, group.size + 1, step) for group in groups)):
        kept = [torch.sort(torch.argsort(s, descending=True, stable=True)[:n]).values for s, n in zip(scores, counts, strict=True)]
        cost = known.of(kept)
        if all(getattr(cost, name) <= limit for name, limit in asked.items()):
            loss = sum(r * float((s.sum() - s[k].sum()) / s[k].sum()) for r, s, k in zip(readers, scores, kept, strict=True))
            best = min(best, loss)
    return best


def loss_of(groups, scores, kept):
    return sum(float((s.sum() - s[k].sum()) / s[k].sum()) for s, k in zip(scores, kept, strict=True))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(3, 6), min_size=2, max_size=3), st.sampled_from(["params", "macs"]), st.floats(0.3, 0.95), st.integers(0, 9))
def test_small_instances_equal_brute_force(widths, name, share, seed):
    net = nn.Sequential(*(m for a, b in itertools.pairwise((4, *widths)) for m in (nn.Linear(a, b), nn.ReLU())), nn.Linear(widths[-1], 3))
    groups, _, known = coupled(net, torch.randn(2, 4))
    rng = torch.Generator().manual_seed(seed)
    scores = [torch.rand(group.size, generator=rng, dtype=torch.float64) + 0.05 for group in groups]
    asked = limits(known.full, {name: share})
    try:
        kept = fit(groups, scores, asked, known, scope="optimal")
    except BadTarget:
        assert brute(groups, scores, known, asked, 1) == math.inf
        return
    best = brute(groups, scores, known, asked, 1)
    assert loss_of(groups, scores, kept) == pytest.approx(best, rel=1e-6)
    assert loss_of(groups, scores, fit(groups, scores, asked, known, scope="layer")) >= best * (1 - 1e-6)


class Eager(Search):
    """All prices fresh at every step."""

    def top(self):
        self.fill()
        return super().top()


def test_step_by_step_is_the_best_of_all_that_cost_no_more(monkeypatch):
    for widths in ((10, 12, 12, 14), (8, 9, 10, 11), (16, 20, 24)):
        groups, scores, known = coupled(*chain(*widths))
        allowed = space(groups)
        losses = losses_of(groups, scores, allowed)
        for share in (0.3, 0.5, 0.7, 0.9):
            asked = limits(known.full, {"macs": share})
            problem = Problem(losses, asked, known, allowed, Prefixes(known.lengths, orders_of(scores)))
            steps = descend(problem)
            reached = {"macs": asked["macs"] * float(problem.shares(steps[None])[0, 0])}
            whole = complete(replace(problem, limits=reached))
            best, near = (sum(float(each[level]) for each, level in zip(losses, at, strict=True)) for at in (whole, steps))
            assert best <= near <= 1.02 * best
            monkeypatch.setattr(descent, "Search", Eager)
            assert (descend(problem) == steps).all()
            monkeypatch.undo()


def test_coupled_channels_count_with_all_they_save():
    """Two widths with equal scores; one stands in a chain of shortcuts and saves more for each channel: it gives more."""
    net, x = chain(32, 32, 32, 32, 16)
    groups, _, known = coupled(net, x)
    scores = [torch.ones(group.size, dtype=torch.float64) for group in groups]
    kept = fit(groups, scores, limits(known.full, {"memory": 0.8}), known, scope="optimal")
    shares = {group.size: len(stay) / group.size for group, stay in zip(groups, kept, strict=True)}
    assert shares[32] < 1 and shares[16] == 1


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "half", True])
def test_wrong_targets(value):
    with pytest.raises(BadRatio, match="share of the original"):
        graphprune.shrink(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4), macs=value)


def test_unreachable_targets_say_what_is_reachable_and_what_blocks_it():
    net, x = chain(16, 16)
    with pytest.raises(BadTarget, match=r"smallest reachable value is \d+ parameters(.|\n)*an output of the model"):
        graphprune.shrink(net, x, params=10)
    with pytest.raises(BadTarget, match="kept on request"):
        graphprune.shrink(chain(16, 16, 12)[0], x, macs=0.1, keep="convs.1")
    with pytest.raises(BadTarget, match="min_units=12"):
        graphprune.shrink(net, x, macs=0.1, min_units=12)
    with pytest.raises(BadTarget, match="needs|give one of"):
        graphprune.shrink(net, x, scope="optimal")
    least = coupled(net, x)[2].of([torch.arange(1)] * 1)
    assert graphprune.profile(graphprune.shrink(net, x, params=least.params), x).params == least.params


def test_kept_units_are_the_best():
    scores = [torch.tensor([1.0, 3.0, 2.0, 3.0])]
    orders = orders_of(scores)
    assert best(orders, [2])[0].tolist() == [1, 3] and best(orders, [3])[0].tolist() == [1, 2, 3]


class Boxes(nn.Module):
    """Two heads of four, of which the code reads two positions by a literal: whichever axis goes, groups have the same size and the same places."""

    def __init__(self):
        super().__init__()
        self.h, self.d = 2, 4
        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x):
        y = self.a(x).view(-1, self.h, self.d)
        return self.b(y.flatten(1)), y[:, :, :2].reshape(-1, 4).square().sum()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["macs", "params"])
def test_what_was_coupled_again_is_priced_again(name, scope):
    """After a lock other units stand in the same places; with the prices of the first ones the budget would be exceeded, unsaid."""
    net, x = Boxes(), torch.randn(1, 16)
    count = {"params": lambda m: sum(p.numel() for p in m.parameters()), "macs": lambda m: m.a.weight.numel() + m.b.weight.numel()}[name]
    with pytest.raises(BadTarget, match="smallest reachable"):
        graphprune.shrink(net, x, rewrite=False, scope=scope, **{name: 0.6})
    for target, options in ((0.8, {"rewrite": False}), (0.6, {})):  # rewritten, the literal may change, and the target is met
        assert count(graphprune.shrink(net, x, scope=scope, **{name: target}, **options)) <= target * count(net)
