"""The numbers of a configuration that make a class build what is left of a model: found by value, with building as the judge.

A configuration is a nest of dictionaries and lists (:data:`Tree`); ``build`` makes a model of it, without memory for its weights. Where a tensor comes out 64
long and should be 48, a number of the configuration that is 64, or of which 64 is a multiple, may be the one; it is tried, and what comes out says whether it
was. Nothing is known here of any library or model.

>>> build = lambda tree: nn.Sequential(nn.Linear(4, tree["hidden"], device="meta"), nn.Linear(tree["hidden"], 4, device="meta"))
>>> target = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
>>> search(build, target, {"hidden": 8, "layers": 8}).changes
{('hidden',): 6}
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from torch import nn

from .building import Builds, Built, Path, Slot, Tree, numbers, shapes, values
from .closing import Lists

Change = tuple[tuple[Path, Any], ...]  # numbers that change at once
Measure = Callable[[Change], tuple["Gap", Built]]
Offers = Callable[[Change, "Gap"], list[Change]]
NOTHING = Built({}, {})  # where the class refuses a configuration
# Axes that a tensor which is missing or too many stands for (leaving layers out makes nothing right), and an attribute that the code reads.
WEIGHT = 8
STARTS, CHAIN = 8, 3  # numbers that upset others, and those that put right what they upset
PAIRS = 12  # of changes that help only together: so many are tried


@dataclass(frozen=True)
class Gap:
    """What a configuration builds otherwise than it should: tensors by name, (tensor, axis) with (built, wanted), and attributes of modules likewise."""

    names: frozenset[str] = frozenset()
    axes: dict[Slot, tuple[int, int]] = field(default_factory=dict)
    attributes: dict[Path, tuple[int, int]] = field(default_factory=dict)
    fails: bool = False

    @property
    def size(self) -> tuple[bool, int]:
        return self.fails, WEIGHT * (len(self.names) + len(self.attributes)) + len(self.axes)

    @property
    def loads(self) -> bool:
        """Whether a file of the weights would load."""
        return not self.fails and not self.names and not self.axes

    def upsets(self, before: Gap) -> bool:
        """Whether something is wrong now that was right before."""
        return self.fails or bool(self.names - before.names or self.axes.keys() - before.axes.keys() or self.attributes.keys() - before.attributes.keys())

    def mends(self, before: Gap) -> bool:
        """Whether something is right now that was wrong before."""
        return not self.fails and bool(before.names - self.names or before.axes.keys() - self.axes or before.attributes.keys() - self.attributes)


@dataclass(frozen=True)
class Solution:
    """``changes`` of the configuration ``tree``, and what is still wrong with them; ``measure`` says it of any other changes."""

    tree: Tree
    changes: dict[Path, Any]
    gap: Gap
    measure: Measure

    def mends(self, change: Change) -> bool:
        """Whether with other changes an attribute comes out right that is wrong with these."""
        gap = self.measure(_join((), change))[0]
        return not gap.fails and bool(self.gap.attributes.keys() - gap.attributes.keys())

    def partners(self) -> frozenset[Slot]:
        """The (tensor, axis) of another length with numbers that would put right some of what is wrong: these say both."""
        best, wrong, inert = tuple(self.changes.items()), self.gap.axes.keys(), set()
        upset: set[Slot] = set()
        for offer in _worth(best, [*_same(self.tree, self.gap), *_times(self.tree, self.gap)], self.measure, self.tree, inert):
            change = _join(best, offer)
            gap = self.measure(change)[0]
            more = gap.axes.keys() - wrong
            if gap.fails or not wrong - gap.axes.keys() or more <= upset:
                continue
            built = Gap(axes={slot: (size, size) for slot, (_, size) in gap.axes.items()})
            for free in _worth(change, _open(changed(self.tree, change), built), self.measure, self.tree, inert):
                less = self.measure(_join(change, free))[0]  # what a number that is open by now can say by itself
                more -= set() if less.fails else gap.axes.keys() - less.axes.keys()
            upset |= more
        return frozenset(upset)

    def reach(self) -> dict[Path, frozenset[Slot]]:
        """The (tensor, axis) whose length each change has a say in."""
        best, built = tuple(self.changes.items()), self.measure(_join((), tuple(self.changes.items())))[1]
        reach = {}
        for path, _ in best:
            without = self.measure(_join((), tuple(item for item in best if item[0] != path)))[1]
            pairs = [(name, sizes, without.shapes.get(name, sizes)) for name, sizes in built.shapes.items()]
            reach[path] = frozenset((name, axis) for name, sizes, others in pairs for axis, size in enumerate(sizes) if others[axis : axis + 1] != (size,))
        return reach


def search(build: Callable[[Tree], nn.Module], target: nn.Module, tree: Tree, lists: Lists | None = None, used: Iterable[Path] = ()) -> Solution:
    """The changes of ``tree`` with which ``build`` gives the names and shapes of ``target``, or as many of them as can be had.

    ``lists`` are the lists of blocks that have become shorter (:func:`graphprune.formats.closing.closed`); ``used`` the attributes
    (module, attribute, …) of ``target`` that its code is known to read: they have to come out right as well.
    """
    used = list(used)
    wanted, counts, builds = shapes(target), numbers(target, used), Builds(build, used, type(target))
    known: dict[Change, tuple[Gap, Built]] = {}

    def measure(change: Change) -> tuple[Gap, Built]:
        if change not in known:
            built = builds(changed(tree, change))
            known[change] = (Gap(fails=True), NOTHING) if built is None else (_gap(built, wanted, counts), built)
        return known[change]

    same: Offers = lambda best, gap: [*_same(changed(tree, best), gap), *_back(best, tree)]  # noqa: E731
    more: Offers = lambda best, gap: [*same(best, gap), *_times(changed(tree, best), gap)]  # noqa: E731
    inert: set[Path] = set()
    best: Change = ()
    if lists:
        best = _better(best, measure, lambda best, gap: _shorter(changed(tree, best), lists), tree, inert)
    for candidates in (same, more):  # first what upsets nothing: a number may be right although with another value more would be
        best = _better(best, measure, candidates, tree, inert, gentle=True)
    for candidates in (same, more, lambda best, gap: _open(changed(tree, best), gap)):
        best = _better(best, measure, candidates, tree, inert)
    return Solution(changed(tree, best), dict(best), measure(best)[0], measure)


def compare(build: Callable[[Tree], nn.Module], target: nn.Module, tree: Tree) -> Gap:
    """What a configuration builds otherwise than ``target``."""
    built = Builds(build, ())(tree)
    return Gap(fails=True) if built is None else _gap(built, shapes(target), {})


def _better(best: Change, measure: Measure, candidates: Offers, tree: Tree, inert: set[Path], gentle: bool = False) -> Change:
    """Take what helps, the most helpful first, until nothing does; ``gentle``: only what upsets nothing else. ``inert`` are numbers that change nothing."""
    while True:
        gap = measure(best)[0]
        if gap.size == (False, 0):
            return best
        offers = [_join(best, offer) for offer in _worth(best, candidates(best, gap), measure, tree, inert)]
        offers = [offer for offer in dict.fromkeys(offers) if measure(offer) != measure(best)]
        before = best
        for offer in sorted(offers, key=lambda offer: measure(offer)[0].size):
            if measure(offer)[0].size < gap.size and measure(_join(best, offer))[0].size < measure(best)[0].size:
                if not (gentle and measure(_join(best, offer))[0].upsets(measure(best)[0])):
                    best = _join(best, offer)
        if best != before:
            continue
        joined = best if gentle else _together(best, offers, measure, candidates, tree, inert)
        if joined == best:
            return best
        best = joined


def _worth(best: Change, offers: list[Change], measure: Measure, tree: Tree, inert: set[Path]) -> Iterator[Change]:
    """The offers that may help: of a number that is understood by one value, only those that give a length that is wanted."""
    gap, built = measure(best)
    wanted = {place: pair[1] for place, pair in (gap.axes | gap.attributes).items()}
    fits: dict[Path, set[int]] = {}
    for offer in offers:
        paths = [path for path, _ in offer]
        if inert.issuperset(paths):
            continue
        (path, value), *others = offer
        if not others and path in fits and value not in fits[path]:
            continue
        yield offer
        if others or path in fits:
            continue
        now, other = _at(changed(tree, best), path), measure(_join(best, offer))
        if other == (gap, built):
            inert.add(path)
        elif not other[0].fails and not gap.names and not other[0].names and type(now) is int:
            fits[path] = values(built.lengths(), other[1].lengths(), now, value, wanted)


def _at(tree: Tree, path: Path) -> Any:
    """What a configuration says at a place, if anything."""
    value = tree
    for key in path:
        value = value[key] if isinstance(value, list | tuple) else value.get(key)
    return value


def _together(best: Change, offers: list[Change], measure: Measure, candidates: Offers, tree: Tree, inert: set[Path]) -> Change:
    """Numbers that help only together: those that put right what the first upsets, or two that have to divide each other."""
    gap, built = measure(best)
    mending = [offer for offer in offers if measure(offer)[0].mends(gap)]
    building = [offer for offer in offers if not measure(offer)[0].fails]
    touched = {offer: _touched(built, measure(offer)[1]) for offer in building}
    reach = {path: touched[offer] for offer in building for path in _new(best, offer)}

    def chained(offer: Change) -> Change:
        """What puts right what an offer upsets, and what that upsets, until less is wrong than before."""
        for _ in range(CHAIN):
            upset = {path: pair for path, pair in measure(offer)[0].attributes.items() if path not in gap.attributes}
            others = [change for change in (candidates(offer, Gap(attributes=upset)) if upset else ()) if change[0][0] not in dict(offer)]
            others = [change for change in others if not upset.keys().isdisjoint(reach.get(change[0][0], upset.keys()))]
            more = [_join(offer, change) for change in _worth(offer, others, measure, tree, inert)]
            if not more:
                break
            offer = min(more, key=lambda joined: measure(joined)[0].size)
            if measure(offer)[0].size < gap.size:
                return offer
        return best

    first = sorted(building, key=lambda offer: (offer not in mending, measure(offer)[0].size))[:STARTS]
    joined = next((end for end in map(chained, first) if end != best), best)
    return joined if joined != best else _paired(best, mending, [offer for offer in offers if measure(offer)[0].fails], touched, measure)


def _paired(best: Change, mending: list[Change], failing: list[Change], touched: Mapping[Change, set[Any]], measure: Measure) -> Change:
    """Two numbers that help together: both touch the same, or one alone builds nothing."""
    pairs = [(one, two) for one, two in combinations((*mending, *failing), 2) if not _new(best, one) & _new(best, two)]
    pairs = [(one, two) for one, two in pairs if one in failing or two in failing or not touched[one].isdisjoint(touched[two])]
    joined = (_join(*pair) for pair in pairs[:PAIRS])
    return next((both for both in joined if measure(both)[0].size < measure(best)[0].size), best)


def _new(best: Change, offer: Change) -> set[Path]:
    """The numbers that an offer changes beside those of ``best``, or to other values."""
    return {item[0] for item in set(offer) - set(best)}


def _touched(before: Built, after: Built) -> set[Any]:
    """The lengths and numbers that came out otherwise."""
    one, two = before.lengths(), after.lengths()
    return {place for place in one.keys() | two.keys() if one.get(place) != two.get(place)}


def _join(best: Change, more: Change) -> Change:
    return tuple(sorted({**dict(best), **dict(more)}.items(), key=str))


def _same(tree: Tree, gap: Gap) -> list[Change]:
    """Numbers of the configuration that are what came out wrong; and what modules call by a name that the configuration leaves open."""
    pairs = sorted({*gap.axes.values(), *gap.attributes.values()})
    offers = {(path, wanted): None for path, value in leaves(tree) for built, wanted in pairs if value == built}
    for holder, prefix in _tables(tree):
        for path, (_, wanted) in gap.attributes.items():
            if len(path) == 2 and holder.get(path[1]) is None:
                offers[(*prefix, path[1]), wanted] = None
    return [(offer,) for offer in offers if offer[1] > 0]


def _back(best: Change, tree: Tree) -> list[Change]:
    """Numbers as they were before others were changed: what helped alone (a ratio) may be wrong beside them (the width that it is of)."""
    return [((path, value),) for path, _ in best if type(value := _at(tree, path)) is int]


def _open(tree: Tree, gap: Gap) -> list[Change]:
    """Numbers that the configuration leaves open, so that they are derived from others (four times the width of the stream)."""
    wanted = sorted({wanted for _, wanted in gap.axes.values() if wanted > 0})
    return [(((*prefix, key), size),) for holder, prefix in _tables(tree) for key, value in holder.items() if value is None for size in wanted]


def _times(tree: Tree, gap: Gap) -> list[Change]:
    """Numbers of which what came out wrong is a multiple or a quotient, or that are a multiple of it."""
    offers: dict[tuple[Path, int], None] = {}
    for path, value in leaves(tree):
        for built, wanted in sorted(set(gap.axes.values())):
            if not built % value and not wanted % (built // value):
                offers[path, wanted // (built // value)] = None
            elif built and not value % built:
                offers[path, value // built * wanted] = None
        for built, wanted in sorted(set(gap.attributes.values())):  # what came out is a quotient of some other number and this one
            if built and wanted and not value * built % wanted:
                offers[path, value * built // wanted] = None
    return [(offer,) for offer in offers if offer[1] > 0]


def _shorter(tree: Tree, lists: Lists) -> list[Change]:
    """What the configuration may say of lists of blocks that are shorter now: how many there are, and what is said of each."""
    offers: dict[Change, None] = {}
    for size, kept in dict.fromkeys(lists.values()):
        for holder, prefix in _tables(tree):
            each = tuple(((*prefix, key), [item[i] for i in kept]) for key, item in holder.items() if type(item) in (list, tuple) and len(item) == size)
            first = [((*prefix, key), sum(i < item for i in kept)) for key, item in holder.items() if type(item) is int and 0 < item < size]
            some = tuple(((*prefix, key), value) for key, item in holder.items() for value in _renumbered(item, size, kept))
            named = tuple(((*prefix, key), value) for key, item in holder.items() for value in _named(item, size, len(kept)))
            for key, item in holder.items():
                if type(item) is int and item == size:
                    for more in ((), each, some, each + some, named):
                        offers[_frozen((((*prefix, key), len(kept)), *more))] = None
                offers |= dict.fromkeys(_frozen((((*prefix, key), counts),)) for counts in _stages(item, size, len(kept)))
            for more in (each, some, *((change,) for change in first if change[1] < holder[change[0][-1]])):
                if more:
                    offers[_frozen(more)] = None
    return list(offers)


def _stages(item: Any, size: int, left: int) -> Iterator[list[Any]]:
    """A list of how many blocks each stage has, with fewer in one of those that have so many."""
    counts: list[Any] = list(item) if isinstance(item, list | tuple) else []
    for at, count in enumerate(counts):
        if count == size:
            yield [*counts[:at], left, *counts[at + 1 :]]


def _frozen(change: Change) -> Change:
    return tuple((path, tuple(value) if type(value) is list else value) for path, value in change)


def _named(item: Any, size: int, left: int) -> Iterator[Any]:
    """What a list becomes that names all blocks and what stands before them (fewer names), or some (which of them are returned: open, the class decides)."""
    if type(item) in (list, tuple) and item and all(type(each) is str or (type(each) is int and 0 <= each <= size) for each in item):
        if len(item) < size:
            yield None
        elif len(item) == size + 1 and type(item[0]) is str:
            yield item[: left + 1]


def _renumbered(item: Any, size: int, kept: tuple[int, ...]) -> Iterator[Any]:
    """A list of the numbers of some blocks, in the numbers of those that stay."""
    if type(item) in (list, tuple) and item and len(item) < size and all(type(i) is int and 0 <= i < size for i in item):
        yield [kept.index(i) for i in item if i in kept]


def leaves(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """The whole numbers above 1 of a configuration."""
    for key, item in _items(tree):
        if type(item) is int and item > 1:
            yield (*path, key), item
        elif isinstance(item, dict | list | tuple):
            yield from leaves(item, (*path, key))


def _items(tree: Tree) -> Iterable[tuple[Any, Any]]:
    return tree.items() if isinstance(tree, dict) else enumerate(tree)


def _tables(tree: Tree, path: Path = ()) -> Iterator[tuple[dict[Any, Any], Path]]:
    """A configuration and those inside it."""
    yield tree, path
    for key, item in tree.items():
        if isinstance(item, dict):
            yield from _tables(item, (*path, key))


def changed(tree: Tree, change: Change) -> Tree:
    """A copy of the configuration with other numbers.

    >>> changed({"a": [1, {"b": 2}]}, ((("a", 1, "b"), 3),))
    {'a': [1, {'b': 3}]}
    """
    twin = copy.deepcopy(tree)
    for path, value in change:
        _put(twin, path, list(value) if isinstance(value, tuple) else value)
    return twin


def _put(holder: Any, path: Path, value: Any) -> None:
    key, *rest = path
    if rest:
        if isinstance(holder[key], tuple):
            holder[key] = list(holder[key])
        _put(holder[key], tuple(rest), value)
    else:
        holder[key] = value


def _gap(built: Built, wanted: dict[str, tuple[int, ...]], counts: dict[Path, int]) -> Gap:
    sizes = built.shapes
    names = set(sizes) ^ set(wanted)
    names |= {name for name in set(sizes) & set(wanted) if len(sizes[name]) != len(wanted[name])}
    axes = {(name, axis): (a, b) for name in wanted if name not in names for axis, (a, b) in enumerate(zip(sizes[name], wanted[name], strict=True)) if a != b}
    attributes = {path: (value, counts[path]) for path, value in built.numbers.items() if path in counts and value != counts[path]}
    return Gap(frozenset(names), axes, attributes)
