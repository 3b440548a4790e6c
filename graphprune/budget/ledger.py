"""What every cost is at the widths so far, and what a step would change: :class:`Ledger`.

A step narrows (or widens) the groups of one choice. It changes the lengths that hold these groups, and the items of costs
(products, storages, timed calls) that hold these lengths, usually a handful; everything else stays as it was. Which they
are is found once, as flat arrays; a step, or many that are looked at side by side, is then a few array operations on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cost import FACTORS, Costs, Live
from ..coupling.lengths import Prefixes
from ..operations.labels import Array
from .space import Space


@dataclass(frozen=True)
class Rows:
    """Sparse rows: those of row i are ``values[start[i]:start[i + 1]]``."""

    start: Array
    values: Array

    def of(self, rows: Array) -> tuple[Array, Array]:
        """Where the entries of some rows stand in ``values``, and how many each row has.

        >>> [part.tolist() for part in Rows(np.array([0, 2, 3, 6]), np.arange(6)).of(np.array([2, 0]))]
        [[3, 4, 5, 0, 1], [3, 2]]
        """
        if len(rows) == 1:
            first, end = self.start[rows[0] : rows[0] + 2].tolist()
            return np.arange(first, end), np.array([end - first])
        counts = self.start[rows + 1] - self.start[rows]
        ends = np.cumsum(counts)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.start[rows] - ends + counts, counts), counts


def rows(keys: Array, values: Array, count: int) -> Rows:
    """The values of each key from 0 to ``count``, in their order."""
    order = np.argsort(keys, kind="stable")
    return Rows(np.searchsorted(keys[order], np.arange(count + 1)), values[order])


@dataclass(frozen=True)
class Trial:
    """Steps of some choices, each by itself: the changed lengths of forms and values of items, one choice after the other.

    ``forms`` and ``items`` are numbers, ``lengths`` and ``values`` what they become, ``form_counts`` and ``item_counts`` how many belong to each choice.
    """

    forms: Array
    lengths: Array
    form_counts: Array
    items: Array
    values: Array
    item_counts: Array


class Ledger:
    """Costs at level numbers ``at`` (choices,), which :meth:`take` changes.

    ``totals``: (parts,), in the order of ``names``; ``counts``: the widths (groups,).
    """

    def __init__(self, known: Costs, allowed: Space, lengths: Prefixes, names: Sequence[str], at: Array | None = None) -> None:
        self.allowed, self.prefixes = allowed, lengths
        self.parts: list[Any] = [known.parts[name] for name in names]
        sizes = [len(part.forms) for part in self.parts]
        self.bounds = np.cumsum([0, *sizes])  # the items of part p are numbered from bounds[p] on
        self.part_of = np.repeat(np.arange(len(sizes)), sizes)
        self.item_forms = np.zeros((self.bounds[-1], FACTORS), dtype=np.int64)
        for part, first, end in zip(self.parts, self.bounds, self.bounds[1:], strict=False):
            self.item_forms[first:end, : part.forms.shape[1]] = part.forms
        self._index()
        self.peak = next((number for number, part in enumerate(self.parts) if isinstance(part, Live)), None)  # the part that is a peak, if any is
        self.live: Live | None = None if self.peak is None else self.parts[self.peak]
        self._storages = slice(0) if self.peak is None else slice(*self.bounds[self.peak : self.peak + 2])
        self.at = np.zeros(len(allowed.choices), dtype=np.int64) if at is None else at.copy()
        self.reset()

    def _index(self) -> None:
        """Which forms a choice is in, through which entries, and which items these forms are in."""
        linear, owner, choices = self.prefixes.linear, self.allowed.owner, len(self.allowed.choices)
        forms = len(linear.constant)
        key = owner[linear.group] * forms + linear.form
        order = np.argsort(key, kind="stable")
        self.pairs, firsts = np.unique(key[order], return_index=True)  # (choice, form), sorted
        self.entries = Rows(np.append(firsts, len(order)), order)  # by pair
        self.pair_form = self.pairs % forms
        self.forms = Rows(np.searchsorted(self.pairs, np.arange(choices + 1) * forms), self.pair_form)  # by choice
        joint = self.prefixes.lengths.joint
        self.is_joint = np.isin(self.pair_form, list(joint)) if joint else None
        by_form = rows(self.pair_form, self.pairs // forms, forms)
        item, column = np.nonzero(self.item_forms)
        places, counts = by_form.of(self.item_forms[item, column])
        items = len(self.item_forms)
        touched = np.unique(by_form.values[places] * items + np.repeat(item, counts))
        self.items = Rows(np.searchsorted(touched, np.arange(choices + 1) * items), touched % items)  # by choice
        # For every item of a choice, the pair of each of its forms; one beyond the last where the choice leaves that form as it is.
        wanted = (touched // items)[:, None] * forms + self.item_forms[self.items.values]
        pair = np.searchsorted(self.pairs, wanted)
        same = np.append(self.pairs, -1)[pair] == wanted
        self.pair_of = np.where(same & (self.item_forms[self.items.values] > 0), pair, len(self.pairs))
        self.users = rows(self.items.values, touched // items, items)  # the choices of an item

    def reset(self) -> None:
        """Everything anew from ``at``."""
        self.counts = self.allowed.widths(self.at[None])[0]
        self.lengths = self.prefixes(self.counts[None])[0]
        self.values = self.each(np.arange(len(self.item_forms)), self.lengths[self.item_forms])
        spans = zip(self.parts, self.bounds, self.bounds[1:], strict=False)
        self.totals = np.array([part.total(self.values[first:end]) for part, first, end in spans])
        if self.live is not None:
            self.alive = self.live.profile(self.values[self._storages])

    def each(self, items: Array, lengths: Array) -> Array:
        """The values of some items, each at the lengths of its forms (n, 4)."""
        values = np.empty(len(items))
        for number, part in enumerate(self.parts):
            first, end = self.bounds[number], self.bounds[number + 1]
            inside = (items >= first) & (items < end) if len(self.parts) > 1 else slice(None)
            values[inside] = part.each(items[inside] - first, lengths[inside][:, : part.forms.shape[1]])
        return values

    def trial(self, choices: Array, levels: Array) -> Trial:
        """What lengths and items become when each of these choices, by itself, goes to its level."""
        pairs, form_counts = self.forms.of(choices)
        places, entry_counts = self.entries.of(pairs)
        entries = self.entries.values[places]
        group = self.prefixes.linear.group[entries]
        to = self.allowed.table[self.allowed.first[group] + np.repeat(np.repeat(levels, form_counts), entry_counts)]
        changes = self.prefixes.values(entries, to) - self.prefixes.values(entries, self.counts[group])
        if len(entry_counts) and entry_counts.max() > 1:
            changes = np.add.reduceat(changes, np.cumsum(entry_counts) - entry_counts)
        if self.is_joint is not None:
            for at in np.flatnonzero(self.is_joint[pairs]):
                choice = np.searchsorted(np.cumsum(form_counts), at, side="right")
                counts = self._counts(choices[choice], levels[choice])
                number = int(self.pair_form[pairs[at]])
                changes[at] = self.prefixes.joint(number, counts) - self.lengths[number]
        rows_, item_counts = self.items.of(choices)
        items = self.items.values[rows_]
        # pair_of numbers all pairs; here those of the choices alone follow each other, and a last change is 0.
        shift = np.repeat(np.cumsum(form_counts) - form_counts - self.forms.start[choices], item_counts)[:, None]
        pair = self.pair_of[rows_]
        change = np.append(changes, 0.0)[np.where(pair < len(self.pairs), pair + shift, len(changes))]
        values = self.each(items, self.lengths[self.item_forms[items]] + change)
        forms = self.pair_form[pairs]
        return Trial(forms, self.lengths[forms] + changes, form_counts, items, values, item_counts)

    def _counts(self, choice: int, level: int) -> Array:
        counts = self.counts.copy()
        members = list(self.allowed.choices[choice].members)
        counts[members] = self.allowed.choices[choice].levels[level]
        return counts

    def saved(self, trial: Trial, peaks: bool = True) -> Array:
        """(choices, parts): what each step takes off each cost. Without ``peaks`` 0 stands where the cost is a peak."""
        parts, choices = len(self.parts), len(trial.item_counts)
        owner = np.repeat(np.arange(choices), trial.item_counts) * parts + self.part_of[trial.items]
        saved = np.bincount(owner, self.values[trial.items] - trial.values, choices * parts).reshape(choices, parts)
        if self.peak is not None:
            saved[:, self.peak] = 0.0
            ends = np.cumsum(trial.item_counts) if peaks else np.zeros(0, dtype=np.int64)
            for row, (first, end) in enumerate(zip(ends - trial.item_counts[: len(ends)], ends, strict=True)):
                span, alive = self._alive(trial.items[first:end], trial.values[first:end])
                outside = [part.max() for part in (self.alive[: span.start], self.alive[span.stop :]) if len(part)]
                saved[row, self.peak] = self.totals[self.peak] - max([alive.max(initial=0.0), *outside])
        return saved

    def _alive(self, items: Array, values: Array) -> tuple[slice, Array]:
        """What is alive when some items have other values: a span of moments, and the bytes at each of them. It is as before outside."""
        live, first = self.live, self._storages.start
        assert live is not None
        storages = (items >= first) & (items < self._storages.stop)
        numbers = items[storages] - first
        if not len(numbers):
            return slice(0, 0), self.alive[:0]
        start, stop = live.start[numbers], np.minimum(live.stop[numbers], live.moments - 1) + 1
        low, high = int(start.min()), int(stop.max())
        changes = values[storages] - self.values[items[storages]]
        moved = np.bincount(start - low, changes, high - low + 1) - np.bincount(stop - low, changes, high - low + 1)
        return slice(low, high), self.alive[low:high] + np.cumsum(moved)[:-1]

    def relieved(self, trial: Trial) -> Array:
        """What each step takes off the first moment at which most is alive; the peak itself may stay, where another moment is as high."""
        live, first = self.live, self._storages.start
        assert live is not None
        moment, owner = int(np.argmax(self.alive)), np.repeat(np.arange(len(trial.item_counts)), trial.item_counts)
        storages = np.flatnonzero((trial.items >= first) & (trial.items < self._storages.stop))
        storages = storages[(live.start[trial.items[storages] - first] <= moment) & (moment <= live.stop[trial.items[storages] - first])]
        return np.bincount(owner[storages], self.values[trial.items[storages]] - trial.values[storages], len(trial.item_counts))

    def at_peak(self) -> Array:
        """The choices with storages that are alive at the first moment at which most is alive."""
        live, moment = self.live, int(np.argmax(self.alive))
        assert live is not None
        storages = np.flatnonzero((live.start <= moment) & (moment <= live.stop)) + self._storages.start
        places, _ = self.users.of(storages)
        return np.unique(self.users.values[places])

    def take(self, choice: int, level: int) -> None:
        """The choice goes to this level."""
        trial = self.trial(np.array([choice]), np.array([level]))
        self.totals = self.totals - self.saved(trial)[0]
        if self.peak is not None:
            span, alive = self._alive(trial.items, trial.values)
            self.alive[span] = alive
        self.counts = self._counts(choice, level)
        self.at[choice] = level
        self.lengths[trial.forms], self.values[trial.items] = trial.lengths, trial.values

    def touching(self, choice: int) -> Array:
        """The choices that share an item with this one (it among them)."""
        items = self.items.values[self.items.start[choice] : self.items.start[choice + 1]]
        places, _ = self.users.of(np.unique(items))
        return np.unique(self.users.values[places])
