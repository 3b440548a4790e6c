"""The widths that keep the most score under limits: :func:`widths`.

What a narrower group loses is its noise-to-signal ratio, (score lost) / (score kept), once for each product that reads
the group's units: errors of layers add up in this measure, it is convex, and it does not depend on the scale of the
scores, so groups of different kinds can be compared. From the widest allowed widths on, the step with the smallest
loss per saved cost is taken until the limits hold. A saving is the difference in the limits' own units, all that a step
takes along included, so channels coupled through residual connections count with everything they save. Each step follows
from those before it and not from the limit: under one limit, a larger budget keeps all that a smaller one does.

What it guarantees: limits hold exactly. Spaces of up to 20,000 width vectors are searched completely, so no widths lose less.
Larger ones are not: there the steps are greedy, and :func:`graphprune.budget.bound.bound` says how far from the best they can be
(a loss that no widths within the limits go below; chains of 20 and of 60 equal layers at half the MACs end within 5 % of it).

How much ``time`` counts (0 to 1) bends that price towards the fastest widths that still use the limit up. With what a step
loses of the score, of the limit and of the predicted time, its price is (score / limit)^(1 - time) x (limit / time)^time: at 0
the score is all that counts, at 1/2 the price is score per time, at 1 only speed counts. It has no units to be weighed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..cost import Costs
from ..coupling.groups import Groups
from ..coupling.lengths import Prefixes
from ..operations.labels import Array
from ..scores import Scores
from .descent import descend
from .problem import Problem, fits
from .space import Space

COMPLETE = 20_000
FILLS = 200
USED = 0.99  # the share of a limit that fast widths have to use, if any widths use as much


def widths(groups: Groups, scores: Scores, limits: Mapping[str, float], known: Costs, allowed: Space, lengths: Prefixes, time: float = 0.0) -> Array:
    """(groups,) numbers of units; at the narrowest allowed widths the limits must hold."""
    problem = Problem(losses_of(groups, scores, allowed), limits, known, allowed, lengths, time)
    at = complete(problem) if allowed.size <= COMPLETE else descend(problem)
    if "time" in limits:
        at = _filled(at, problem)
    return allowed.widths(at[None])[0].astype(np.int64)


def losses_of(groups: Groups, scores: Scores, allowed: Space) -> list[Array]:
    """For every choice the loss at each of its levels, not decreasing; (levels,) each."""
    readers = _readers(groups)
    losses = []
    for choice in allowed.choices:
        total = np.zeros(len(choice))
        for column, index in enumerate(choice.members):
            each = np.sort(scores[index].double().numpy())[::-1]
            each = np.maximum(each - min(each[-1], 0.0), 0)
            # No unit is free, so that ties keep the wider; without any score all count the same.
            each = each + each.sum() * 1e-9 / len(each) if each.sum() > 0 else np.ones(len(each))
            kept = np.cumsum(each)[choice.levels[:, column] - 1]
            total += max(readers[index], 1) * (each.sum() - kept) / kept
        losses.append(total)
    return losses


def _readers(groups: Groups) -> Array:
    """How many products sum over the units of each group."""
    count = np.zeros(len(groups), dtype=np.int64)
    for node in groups.graph.nodes:
        for product in node.products:
            summed = {index for dim in product.input.summed for index in groups.along(product.input.value, dim)}
            count[list(summed)] += 1
    return count


def _filled(at: Array, problem: Problem) -> Array:
    """Wider again where the limits still hold: time is a staircase, what stands on one step is free, and the last step of the
    descent may have been a large one. The widening with the most score for its time comes first; where speed counts, the one
    with the highest price, and only until the limits are used up."""
    ledger, limits, time = problem.ledger(at), np.array(list(problem.limits.values())), problem.time
    clock = list(problem.limits).index("time")
    for _ in range(FILLS):
        wider = np.flatnonzero(ledger.at > 0)
        costs = -ledger.saved(ledger.trial(wider, ledger.at[wider] - 1))
        taken, more = ledger.totals[clock], np.maximum(costs[:, clock], 0.0)
        may = fits((ledger.totals + costs) / limits)
        free = may & (more <= taken * 1e-12)
        if free.any():
            every = ledger.at.copy()
            every[wider[free]] -= 1
            if fits(problem.shares(every[None]))[0] and problem.seconds(every[None])[0] <= taken * (1 + 1e-12):
                ledger.at = every
                ledger.reset()
            else:
                ledger.take(int(wider[np.argmax(free)]), int(ledger.at[wider[np.argmax(free)]]) - 1)
            continue
        if not may.any() or (time and (ledger.totals / limits).max() >= USED):
            break
        gained = np.array([problem.losses[choice][level] - problem.losses[choice][level - 1] for choice, level in zip(wider, ledger.at[wider], strict=True)])
        value = gained / (more + taken * 1e-12)
        if time:
            used = np.maximum((costs / limits).sum(axis=1), 1e-12)
            value = (gained / used) ** (1 - time) * (used / (more + taken * 1e-12)) ** time
        choice = int(wider[np.argmax(np.where(may, value, -1.0))])
        ledger.take(choice, int(ledger.at[choice]) - 1)
    return ledger.at


def complete(problem: Problem) -> Array:
    """Every width vector is tried."""
    losses, time = problem.losses, problem.time
    free = np.flatnonzero(problem.allowed.ends)
    grids = np.meshgrid(*(np.arange(len(losses[choice])) for choice in free), indexing="ij")
    every = np.zeros((max(1, int(problem.allowed.size)), len(losses)), dtype=np.int64)
    for choice, grid in zip(free, grids, strict=True):
        every[:, choice] = grid.ravel()
    total = sum(losses[choice][every[:, choice]] for choice in free) + np.zeros(len(every))
    shares = problem.shares(every)
    allowed = fits(shares)
    if time:
        used = shares.max(axis=1)
        allowed &= used >= min(USED, used[allowed].max())
        total = (1 - time) * np.log(total + 1e-12) + time * np.log(problem.seconds(every))
    return every[np.flatnonzero(allowed)[np.argmin(total[allowed])]]
