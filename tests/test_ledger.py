"""Costs kept up to date step by step are those of the widths; the steps are those of a search that prices everything anew."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import networks
from test_budget import chain, coupled
from test_exact import X
from torch import nn

from graphprune.budget.bound import bound
from graphprune.budget.choose import fit
from graphprune.budget.descent import Peaks, Search, descend
from graphprune.budget.ledger import Ledger
from graphprune.budget.optimal import complete, losses_of
from graphprune.budget.problem import Problem
from graphprune.budget.space import Choice, Space, space
from graphprune.budget.targets import limits
from graphprune.cost import NAMES, Sum, costs
from graphprune.coupling.lengths import Prefixes
from graphprune.select import best, orders_of

SOME = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


class Uneven(nn.Module):
    """Only the first half of the channels is squared: they meet more often."""

    def __init__(self):
        super().__init__()
        self.half, self.a, self.b = 4, nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) + (y[:, : self.half] * y[:, : self.half]).sum(1, keepdim=True).exp()


def meeting(lengths):
    """A cost of an axis of which every position holds a unit of each of two groups: it stays where both stay."""
    leaves = lengths.groups.graph.leaves
    fields = [next(field for field in leaves[name].fields if field.shape[0] > 1) for name in ("branches.0.weight", "branches.1.weight")]
    factor, form = lengths.form(SimpleNamespace(shape=leaves["branches.0.weight"].shape, fields=fields), 0)
    assert form in lengths.joint
    return Sum(np.array([3.0 * factor, 1.0]), np.array([[form, 0, 0, 0], [form, form, 0, 0]]))


class Branches(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.branches, self.head = nn.ModuleList(nn.Linear(6, 8) for _ in range(count)), nn.Linear(8 * count, 4)

    def forward(self, x):
        return self.head(torch.cat([branch(x) for branch in self.branches], 1))


class Dense(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8 + 4 * at, 4) for at in range(depth)), nn.Linear(8 + 4 * depth, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(x)


def deep(count, width=8):
    torch.manual_seed(0)
    layers = [module for _ in range(count + 1) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers), torch.zeros(1, width)


def task(net, x):
    """The groups, scores, costs, choices, and the lengths under the scores' order."""
    groups, scores, known = coupled(net, x)
    return groups, scores, known, space(groups), Prefixes(known.lengths, orders_of(scores))


def problem_of(net, x, asked, time=0.0):
    groups, scores, known, allowed, lengths = task(net, x)
    return Problem(losses_of(groups, scores, allowed), limits(known.full, asked), known, allowed, lengths, time)


def wander(ledger, seed):
    """Some steps, narrower and wider."""
    rng = np.random.default_rng(seed)
    for _ in range(12):
        choice = int(rng.integers(len(ledger.at)))
        ledger.take(choice, int(rng.integers(len(ledger.allowed.choices[choice]))))


def agrees(ledger, known, names):
    """Incremental costs are those of the widths, and so are those of any further step."""
    costs = known.rowwise(ledger.prefixes, ledger.counts[None], names)
    every = np.arange(len(ledger.at))
    saved = ledger.saved(ledger.trial(every, ledger.allowed.ends))
    close = True
    for column, name in enumerate(names):
        close &= np.isclose(ledger.totals[column], costs[name][0], rtol=1e-9)
        for choice in every:
            at = ledger.at.copy()
            at[choice] = ledger.allowed.ends[choice]
            after = known.rowwise(ledger.prefixes, ledger.allowed.widths(at[None]), [name])[name][0]
            close &= np.isclose(costs[name][0] - saved[choice, column], after, rtol=1e-9, atol=1e-6)
    return bool(close)


@SOME
@given(networks(), st.integers(0, 99))
def test_costs_kept_step_by_step_are_those_of_the_widths(net, seed):
    _, _, known, allowed, lengths = task(net, X)
    if not allowed.choices:
        return
    ledger = Ledger(known, allowed, lengths, NAMES)
    wander(ledger, seed)
    assert agrees(ledger, known, NAMES)


@pytest.mark.parametrize("net", [Uneven(), Branches(5), Dense(6)], ids=lambda net: type(net).__name__)
def test_costs_kept_step_by_step_where_lengths_are_special(net):
    groups, scores, _, allowed, _ = task(net, torch.randn(2, next(net.parameters()).shape[1]))
    known = costs(groups, {"meeting": meeting} if isinstance(net, Branches) else {})
    lengths, names = Prefixes(known.lengths, orders_of(scores)), list(known.parts)
    for seed in range(5):
        ledger = Ledger(known, allowed, lengths, names)
        wander(ledger, seed)
        assert agrees(ledger, known, names)
        ledger.pair_of[:, 0] = len(ledger.pairs)  # the control: items that do not follow the first of their lengths
        wander(ledger, seed + 1)
        assert not agrees(ledger, known, names)


@SOME
@given(networks(), st.integers(0, 99), st.floats(0.2, 0.9))
def test_lengths_of_prefixes_are_those_of_the_units_that_stay(net, seed, share):
    groups, scores, known, _, lengths = task(net, X)
    rng = np.random.default_rng(seed)
    counts = np.array([max(1, round(group.size * share * rng.random())) for group in groups], dtype=float)
    assert np.array_equal(lengths(counts[None])[0], known.lengths.of(best(orders_of(scores), counts)))


def test_lengths_of_prefixes_depend_on_the_order():
    groups, scores, known, _, lengths = task(Uneven(), torch.randn(64, 6))
    scores = [torch.arange(group.size, 0, -1).double() for group in groups]
    lengths = Prefixes(known.lengths, orders_of(scores))
    counts = np.array([float(group.size // 2) for group in groups])
    backwards = [order[::-1] for order in orders_of(scores)]
    assert np.array_equal(Prefixes(known.lengths, backwards)(counts[None])[0], known.lengths.of(best(backwards, counts)))
    assert not np.array_equal(lengths(counts[None])[0], known.lengths.of(best(backwards, counts)))


class Slow(Search):
    """All prices anew at every step, straight from their definition."""

    def next(self):
        movable = np.flatnonzero(self.ledger.at < self.ends)
        costs = Peaks.bounds(self, movable, exact=True)[1] if self.ledger.peak is not None and self.over[self.ledger.peak] else self.prices(movable)
        return int(movable[np.argmin(costs)])

    @property
    def sums(self):
        return np.arange(len(self.limits)) != self.ledger.peak


def path(search):
    steps = []
    while not search.done():
        steps.append(search.next())
        search.take(steps[-1])
    return steps


@pytest.mark.parametrize("asked", [{"macs": 0.4}, {"params": 0.3, "macs": 0.5}, {"memory": 0.75}, {"memory": 0.8, "macs": 0.6}], ids=str)
@pytest.mark.parametrize("net", ["chain", "deep", "branches", "dense"])
def test_the_cheapest_step_is_found_without_looking_at_all(net, asked):
    nets = {"chain": chain(10, 12, 12, 14), "branches": (Branches(6), torch.randn(1, 6)), "dense": (Dense(8), torch.randn(1, 8))}
    if net == "deep":
        nets["deep"] = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), deep(6, 16)[0], nn.Linear(16, 2)), torch.randn(1, 4)
    problem = problem_of(*nets[net], asked)
    fast = path((Peaks if "memory" in asked else Search)(problem))
    assert fast == path(Slow(problem)) and len(fast) > 3


@pytest.mark.parametrize("name", ["macs", "params", "size", "memory"])
def test_larger_budgets_never_leave_less_on_deep_and_wide_graphs(name):
    for net, x in (deep(20), (Branches(12), torch.randn(1, 6)), (Dense(10), torch.randn(1, 8))):
        groups, scores, known = coupled(nn.Sequential(nn.Linear(x.shape[1], x.shape[1]), net), x)
        low = known.of([torch.arange(1) for _ in groups])
        for scope in ("layer", "global", "optimal"):
            before = None
            for share in np.linspace(0.0, 1.0, 9):
                asked = {name: getattr(low, name) * (1 - share) + getattr(known.full, name) * share}
                kept = fit(groups, scores, asked, known, scope=scope)
                assert getattr(known.of(kept), name) <= asked[name]
                assert before is None or all(set(less.tolist()) <= set(more.tolist()) for less, more in zip(before, kept, strict=True))
                before = kept


@pytest.mark.parametrize("kind", [Search, Peaks])
def test_the_work_grows_with_the_number_of_groups(kind, monkeypatch):
    """Counted, not timed: items and moments that are looked at for each group of a chain, and of a wide concatenation."""
    work = []
    trial = Ledger.trial
    monkeypatch.setattr(Ledger, "trial", lambda self, *args: (lambda made: work.append(len(made.items)) or made)(trial(self, *args)))
    asked = {"macs": 0.5} if kind is Search else {"memory": 0.75}
    for build in (lambda n: (nn.Sequential(nn.Linear(4, 16), deep(n, 16)[0], nn.Linear(16, 2)), torch.zeros(1, 4)), lambda n: (Branches(n), torch.zeros(1, 6))):
        each = []
        for count in (40, 160):
            work.clear()
            descend(problem_of(*build(count), asked))
            each.append(sum(work) / count)
        assert each[1] < 1.5 * each[0]


def test_widths_are_rounded_up_to_levels_all_at_once():
    choices = (Choice((0, 2), np.array([[8, 4], [6, 3], [2, 1]])), Choice((1,), np.array([[5], [3]])))
    allowed = Space(choices, 3)
    for counts in np.ndindex(9, 6, 5):
        expected = np.array(counts)
        for choice in choices:
            enough = (choice.levels >= expected[list(choice.members)]).all(axis=1)
            expected[list(choice.members)] = choice.levels[max(int(enough.sum()) - 1, 0)]
        assert np.array_equal(allowed.aligned(np.array(counts)), expected)


@pytest.mark.parametrize("asked", [{"macs": 0.5}, {"params": 0.4}, {"memory": 0.75}, {"params": 0.6, "macs": 0.5}], ids=str)
@pytest.mark.parametrize("net", ["chain", "dense", "branches"])
def test_no_widths_within_the_limits_lose_less_than_the_bound(net, asked):
    nets = {"chain": chain(10, 12, 14), "dense": (Dense(3), torch.randn(1, 8)), "branches": (Branches(3), torch.randn(1, 6))}
    problem = problem_of(*nets[net], asked)
    least = complete(problem)
    loss = lambda at: sum(float(each[level]) for each, level in zip(problem.losses, at, strict=True))  # noqa: E731
    steps = descend(problem)
    for at in (least, steps, np.zeros_like(least), problem.allowed.ends):  # the tangent at any widths is a bound
        assert bound(problem, at) <= loss(least) * (1 + 1e-9)
    assert bound(problem, least) > (0.05 if "memory" in asked else 0.5) * loss(least)  # and says something
    wrong = replace(problem, limits={name: 0.7 * limit for name, limit in problem.limits.items()})
    assert bound(wrong, least) > loss(least)  # the control: that of tighter limits does not hold here


@pytest.mark.parametrize("count", [20, 60])
def test_step_by_step_is_near_the_bound_on_large_spaces(count):
    problem = problem_of(nn.Sequential(nn.Linear(4, 24), nn.ReLU(), deep(count, 24)[0], nn.Linear(24, 2)), torch.randn(1, 4), {"macs": 0.5})
    at = descend(problem)
    loss = sum(float(each[level]) for each, level in zip(problem.losses, at, strict=True))
    assert bound(problem, at) <= loss <= 1.05 * bound(problem, at)
