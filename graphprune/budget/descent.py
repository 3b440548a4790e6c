"""Widths step by step: from the widest on, always the step that loses least for what it saves, until the limits hold.

A step's price is looked up again only where it can have changed. What a step saves of a sum of products only shrinks while
other groups narrow, so an old price is a lower bound: prices wait in a heap, and only one that comes to its top is computed
anew. A peak has no such law, but only what is alive there can lower it: of these, what each takes off the peak's moment is
the bound. Where speed counts the price is a quotient without a bound, and those of all choices that meet the last one in
some call are computed anew.
"""

from __future__ import annotations

import heapq

import numpy as np

from ..operations.labels import Array
from .ledger import Trial
from .problem import SLACK, Problem, fits

STEPS = 24  # how many steps lead from the widest to the narrowest level of a choice, before the last is taken apart
CROWDED = 8  # entries of the heap for each choice, from which on it is made anew
# The prices of steps that do not lower a peak, but the bytes at its first moment; and of those that save nothing. The cheapest first.
BESIDE, NOTHING = 1e15, 1e30


def descend(problem: Problem) -> Array:
    """Level numbers (choices,) at which the limits hold, for a problem whose narrowest levels meet them; the last step only as far as needed."""
    search = (Fresh if problem.time else Peaks if "memory" in problem.limits else Search)(problem)
    choice = before = 0
    while not search.done():
        choice = search.next()
        before = int(search.ledger.at[choice])
        search.take(choice)
    at = search.ledger.at
    between = np.repeat(at[None], at[choice] - before + 1, axis=0)
    between[:, choice] = np.arange(before, at[choice] + 1)
    return between[int(np.argmax(fits(problem.shares(between))))]


class Search:
    """Limits on sums: a heap of (price, choice, version), of which the top is computed anew until it stays."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.ledger, self.limits = problem, problem.ledger(), problem.bounds
        self.ends, self.strides = problem.allowed.ends, np.maximum(1, problem.allowed.ends // STEPS)
        self.first = np.cumsum([0, *(len(loss) for loss in problem.losses)])[:-1]
        self.losses = np.concatenate(problem.losses)
        self.step = 0
        self.checked = np.full(len(self.ends), -1)  # the step at which the price of a choice was computed
        self.version = np.zeros(len(self.ends), dtype=np.int64)  # entries of an earlier one are void
        self.over = self.ledger.totals / self.limits > 1 + SLACK
        self.fill()

    def fill(self) -> None:
        """All prices anew."""
        self.heap: list[tuple[float, int, int]] = []
        self.push(np.flatnonzero(self.ledger.at < self.ends))

    def push(self, choices: Array) -> None:
        """The prices of these choices as they are now, in place of earlier ones."""
        self.version[choices] += 1
        self.checked[choices] = self.step
        entries = zip(self.prices(choices).tolist(), choices.tolist(), self.version[choices].tolist(), strict=True)
        if len(choices) < len(self.heap):
            for entry in entries:
                heapq.heappush(self.heap, entry)
        else:
            self.heap += entries
            heapq.heapify(self.heap)

    def done(self) -> bool:
        """Whether all limits hold."""
        if self.over.any():
            return False
        self.ledger.reset()  # without the rounding of many small steps
        self.over = self.ledger.totals / self.limits > 1 + SLACK
        return not self.over.any()

    def trial(self, choices: Array) -> tuple[Array, Trial]:
        """What the next step of each choice loses, and what it makes of lengths and items."""
        at = self.ledger.at[choices]
        levels = np.minimum(at + self.strides[choices], self.ends[choices])
        lost = self.losses[self.first[choices] + levels] - self.losses[self.first[choices] + at]
        return lost, self.ledger.trial(choices, levels)

    def prices(self, choices: Array) -> Array:
        """What the next step of each choice loses for each share of a limit that it saves; limits that hold do not count. A peak counts as if it stayed."""
        lost, trial = self.trial(choices)
        return price(lost, (self.ledger.saved(trial, peaks=False) / self.limits)[:, self.over].sum(axis=1))

    def top(self) -> tuple[float, int]:
        """The smallest price, and the first choice that has it."""
        while True:
            _, choice, version = self.heap[0]
            if version != self.version[choice]:
                heapq.heappop(self.heap)
            elif self.checked[choice] < self.step:
                heapq.heappop(self.heap)
                self.push(np.array([choice]))
            else:
                return self.heap[0][:2]

    def next(self) -> int:
        """The choice whose step is the cheapest; of equal ones the first."""
        return self.top()[1]

    def take(self, choice: int) -> None:
        """One step of a choice."""
        self.ledger.take(choice, int(min(self.ledger.at[choice] + self.strides[choice], self.ends[choice])))
        self.step += 1
        self.over = self.ledger.totals / self.limits > 1 + SLACK
        self.version[choice] += 1
        if self.ledger.at[choice] < self.ends[choice]:
            self.push(np.array([choice]))


class Peaks(Search):
    """Limits on sums and on a peak: beside the heap, one of (bound, choice) for every moment at which the peak has been."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.sums = np.arange(len(self.limits)) != self.ledger.peak
        self.moments: dict[int, list[tuple[float, int]]] = {}

    def next(self) -> int:
        if not self.over[self.ledger.peak]:
            return super().next()
        best = self.top()
        moment = int(np.argmax(self.ledger.alive))
        if moment not in self.moments:
            alive = self.ledger.at_peak()
            alive = alive[self.ledger.at[alive] < self.ends[alive]]
            self.moments[moment] = list(zip(self.bounds(alive)[0].tolist(), alive.tolist(), strict=True))
            heapq.heapify(self.moments[moment])
        heap, seen = self.moments[moment], []
        while heap and heap[0] < best:
            _, choice = heapq.heappop(heap)
            if self.ledger.at[choice] < self.ends[choice]:
                bound, cost = self.bounds(np.array([choice]), exact=True)
                seen.append((float(bound[0]), choice))
                best = min(best, (float(cost[0]), choice))
        for entry in seen:
            heapq.heappush(heap, entry)
        return best[1]

    def bounds(self, choices: Array, exact: bool = False) -> tuple[Array, Array]:
        """A lower bound for the price of each choice, by what it takes off the moment of the peak; ``exact``: and its price."""
        lost, trial = self.trial(choices)
        saved = self.ledger.saved(trial, peaks=exact) / self.limits
        sums = saved[:, self.over & self.sums].sum(axis=1)
        relieved = self.ledger.relieved(trial) / self.limits[self.ledger.peak]
        beside = np.where(relieved > SLACK, BESIDE * (1 + price(lost, relieved)), NOTHING * (1 + lost))
        return price(lost, sums + relieved), np.where(sums + saved[:, self.ledger.peak] > SLACK, price(lost, sums + saved[:, self.ledger.peak]), beside)


class Fresh(Search):
    """Speed counts: after each step the prices of all choices that meet it in some call are computed anew."""

    def prices(self, choices: Array) -> Array:
        time, clock = self.problem.time, list(self.problem.limits).index("time")
        lost, trial = self.trial(choices)
        saved = self.ledger.saved(trial)
        seconds = saved[:, clock]
        saved = (saved / self.limits)[:, self.over].sum(axis=1)
        useful = (saved > SLACK) & (seconds > SLACK * self.ledger.totals[clock])
        # Seconds, not a share of those that the whole model takes now: these are in all prices alike, and a price stays as it is when they change.
        saved, seconds = np.where(useful, saved, 1.0), np.where(useful, seconds, 1.0)
        return np.where(useful, (lost / saved) ** (1 - time) * (saved / seconds) ** time, NOTHING * (1 + lost))

    def take(self, choice: int) -> None:
        over = self.over.copy()
        super().take(choice)
        if (self.over != over).any() or self.ledger.peak is not None or len(self.heap) > CROWDED * len(self.ends):
            self.fill()
            return
        touched = self.ledger.touching(choice)
        self.push(touched[self.ledger.at[touched] < self.ends[touched]])

    def top(self) -> tuple[float, int]:
        while self.heap[0][2] != self.version[self.heap[0][1]]:
            heapq.heappop(self.heap)
        return self.heap[0][:2]


def price(lost: Array, saved: Array) -> Array:
    """What is lost for each share that is saved; what saves nothing goes last, the cheapest first."""
    useful = saved > SLACK
    return np.where(useful, lost / np.where(useful, saved, 1.0), NOTHING * (1 + lost))
