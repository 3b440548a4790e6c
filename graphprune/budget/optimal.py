"""The widths that keep the most score under limits: :func:`widths`.

What a narrower group loses is its noise-to-signal ratio, (score lost) / (score kept), once for each product that reads
the group's units: errors of layers add up in this measure, it is convex, and it does not depend on the scale of the
scores, so groups of different kinds can be compared. From the widest allowed widths on, the step with the smallest
loss per saved cost is taken until the limits hold. A saving is the difference in the limits' own units, all that a step
takes along included, so channels coupled through residual connections count with everything they save. Each step follows
from those before it and not from the limit: under one limit, a larger budget keeps all that a smaller one does. Spaces
of up to 20,000 width vectors are searched completely.

How much ``time`` counts (0 to 1) bends that price towards the fastest widths that still use the limit up. With what a step
loses of the score, of the limit and of the predicted time, its price is (score / limit)^(1 - time) x (limit / time)^time: at 0
the score is all that counts, at 1/2 the price is score per time, at 1 only speed counts. It has no units to be weighed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..cost import Costs
from ..coupling.groups import Groups
from ..operations.labels import Array
from ..scores import Scores
from .space import Space

COMPLETE = 20_000
STEPS = 24  # how many steps lead from the widest to the narrowest level of a choice, before the last is taken apart

BATCH = 6
FILLS = 200
USED = 0.99  # the share of a limit that fast widths have to use, if any widths use as much


def widths(groups: Groups, scores: Scores, limits: Mapping[str, float], known: Costs, allowed: Space, time: float = 0.0) -> Array:
    """(groups,) numbers of units; at the narrowest allowed widths the limits must hold. ``time`` above 0 needs a limit "time"."""
    losses = losses_of(groups, scores, allowed)
    search = _complete if allowed.size <= COMPLETE else _descend
    found = search(losses, limits, known, allowed, time)
    if "time" in limits:
        found = _filled(found, losses, limits, known, allowed, time)
    return allowed.widths(found[None])[0].astype(np.int64)


def losses_of(groups: Groups, scores: Scores, allowed: Space) -> list[Array]:
    """For every choice the loss at each of its levels, not decreasing; (levels,) each."""
    readers = _readers(groups)
    found = []
    for choice in allowed.choices:
        total = np.zeros(len(choice))
        for column, index in enumerate(choice.members):
            each = np.sort(scores[index].double().numpy())[::-1]
            each = np.maximum(each - min(each[-1], 0.0), 0)
            # No unit is free, so that ties keep the wider; without any score all count the same.
            each = each + each.sum() * 1e-9 / len(each) if each.sum() > 0 else np.ones(len(each))
            kept = np.cumsum(each)[choice.levels[:, column] - 1]
            total += max(readers[index], 1) * (each.sum() - kept) / kept
        found.append(total)
    return found


def _readers(groups: Groups) -> Array:
    """How many products sum over the units of each group."""
    count = np.zeros(len(groups), dtype=np.int64)
    for node in groups.graph.nodes:
        for product in node.products:
            summed = {index for dim in product.input.summed for index in groups.along(product.input.value, dim)}
            count[list(summed)] += 1
    return count


def _shares(limits: Mapping[str, float], known: Costs, allowed: Space, at: Array) -> Array:
    """Costs as shares of their limits, (rows, limits)."""
    found = known.at(allowed.widths(at), list(limits))
    return np.stack([found[name] / limit for name, limit in limits.items()], axis=1)


def _seconds(known: Costs, allowed: Space, at: Array) -> Array:
    return known.at(allowed.widths(at), ["time"])["time"]


def _fits(shares: Array) -> Array:
    return (shares <= 1 + 1e-12).all(axis=-1)


def _filled(at: Array, losses: list[Array], limits: Mapping[str, float], known: Costs, allowed: Space, time: float = 0.0) -> Array:
    """Wider again where the limits still hold: time is a staircase, what stands on one step is free, and the last step of the
    descent may have been a large one. The widening with the most score for its time comes first; where speed counts, the one
    with the highest price, and only until the limits are used up."""
    for _ in range(FILLS):
        trial = np.maximum(at[None] - np.eye(len(at), dtype=np.int64), 0)
        taken = _seconds(known, allowed, np.concatenate([at[None], trial]))
        more = np.maximum(taken[1:] - taken[0], 0.0)
        here, *shares = _shares(limits, known, allowed, np.concatenate([at[None], trial]))
        may = (at > 0) & _fits(np.array(shares))
        free = np.where(may & (more <= taken[0] * 1e-12), 1, 0)
        if free.any():
            every = (at - free)[None]
            together = _fits(_shares(limits, known, allowed, every))[0] and _seconds(known, allowed, every)[0] <= taken[0] * (1 + 1e-12)
            at = every[0] if together else trial[np.argmax(free)]
            continue
        if not may.any() or (time and here.max() >= USED):
            break
        gained = np.array([loss[level] - loss[max(level - 1, 0)] for loss, level in zip(losses, at, strict=True)])
        value = gained / (more + taken[0] * 1e-12)
        if time:
            used = np.maximum((np.array(shares) - here).sum(axis=1), 1e-12)
            value = (gained / used) ** (1 - time) * (used / (more + taken[0] * 1e-12)) ** time
        at = trial[np.argmax(np.where(may, value, -1.0))]
    return at


def _complete(losses: list[Array], limits: Mapping[str, float], known: Costs, allowed: Space, time: float = 0.0) -> Array:
    """Every width vector is tried."""
    grids = np.meshgrid(*(np.arange(len(loss)) for loss in losses), indexing="ij")
    every = np.stack([grid.ravel() for grid in grids], axis=1)
    total = sum(loss[every[:, column]] for column, loss in enumerate(losses))
    shares = _shares(limits, known, allowed, every)
    fits = _fits(shares)
    if time:
        used = shares.max(axis=1)
        fits &= used >= min(USED, used[fits].max())
        total = (1 - time) * np.log(total + 1e-12) + time * np.log(_seconds(known, allowed, every))
    return every[np.flatnonzero(fits)[np.argmin(total[fits])]]


def _descend(losses: list[Array], limits: Mapping[str, float], known: Costs, allowed: Space, time: float = 0.0) -> Array:
    """Step by step to narrower levels, by the price of each; the last step only as far as needed."""
    ends = np.array([len(loss) - 1 for loss in losses])
    at = before = np.zeros(len(losses), dtype=np.int64)
    strides = np.maximum(1, ends // STEPS)
    here = _shares(limits, known, allowed, at[None])[0]
    # What a step saves only shrinks while others are taken, so an old price is a lower bound; a peak or a quotient has no such law.
    batch = len(losses) if "memory" in limits or time else BATCH
    prices = np.full(len(losses), -np.inf)
    choice = 0
    while not _fits(here):
        fresh: dict[int, tuple[Array, Array]] = {}
        prices[at >= ends] = np.inf
        while True:
            order = [c for c in np.argsort(prices, kind="stable") if c not in fresh and at[c] < ends[c]][:batch]
            if not order or (fresh and min(prices[c] for c in fresh) <= prices[order[0]]):
                break
            trial = np.repeat(at[None], len(order), axis=0)
            trial[np.arange(len(order)), order] = np.minimum(at + strides, ends)[order]
            shares = _shares(limits, known, allowed, trial)
            saved = (here - shares)[:, here > 1 + 1e-12].sum(axis=1)
            taken = _seconds(known, allowed, np.concatenate([at[None], trial])) if time else np.ones(1)
            quick = 1 - taken[1:] / taken[0] if time else saved
            for row, c in enumerate(order):
                lost = losses[c][trial[row, c]] - losses[c][at[c]]
                # What saves nothing (a peak elsewhere, a step of the clock) goes last, the cheapest first.
                useful = saved[row] > 1e-12 and quick[row] > 1e-12
                prices[c] = (lost / saved[row]) ** (1 - time) * (saved[row] / quick[row]) ** time if useful else 1e30 * (1 + lost)
                fresh[c] = trial[row], shares[row]
        choice = min(fresh, key=lambda c: (prices[c], c))
        before, (at, here) = at, fresh[choice]
    between = np.repeat(at[None], at[choice] - before[choice] + 1, axis=0)
    between[:, choice] = np.arange(before[choice], at[choice] + 1)
    return between[int(np.argmax(_fits(_shares(limits, known, allowed, between))))]
