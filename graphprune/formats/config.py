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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from torch import nn

from .closing import Lists

Tree = Any
Path = tuple[Any, ...]
Slot = tuple[str, int]
Change = tuple[tuple[Path, Any], ...]  # numbers that change at once
Measure = Callable[[Change], tuple["Gap", dict[Slot, int]]]
# Axes that a tensor which is missing or too many stands for (leaving layers out makes nothing right), and an attribute that the code reads.
WEIGHT = 8
STARTS, CHAIN = 8, 3  # numbers that upset others, and those that put right what they upset
PAIRS = 60  # of changes that help only together: so many are tried


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
        best, wrong = tuple(self.changes.items()), self.gap.axes.keys()
        upset: set[Slot] = set()
        for offer in dict.fromkeys([*_same(self.tree, self.gap), *_times(self.tree, self.gap)]):
            gap = self.measure(_join(best, offer))[0]
            if not gap.fails and wrong - gap.axes.keys():
                upset |= gap.axes.keys() - wrong - self._free(_join(best, offer), gap)
        return frozenset(upset)

    def _free(self, change: Change, gap: Gap) -> set[Slot]:
        """What came out wrong with a change and can be put right by a number that the configuration leaves open."""
        free: set[Slot] = set()
        for offer in _open(changed(self.tree, change), Gap(axes={slot: (built, built) for slot, (_, built) in gap.axes.items()})):
            more = self.measure(_join(change, offer))[0]
            free |= set() if more.fails else gap.axes.keys() - more.axes.keys()
        return free

    def reach(self) -> dict[Path, frozenset[Slot]]:
        """The (tensor, axis) whose length each change has a say in."""
        best, sizes = tuple(self.changes.items()), self.measure(_join((), tuple(self.changes.items())))[1]
        reach = {}
        for path, _ in best:
            without = self.measure(_join((), tuple(item for item in best if item[0] != path)))[1]
            reach[path] = frozenset(slot for slot, size in sizes.items() if without.get(slot, size) != size)
        return reach


def search(build: Callable[[Tree], nn.Module], target: nn.Module, tree: Tree, lists: Lists | None = None, used: Iterable[Path] = ()) -> Solution:
    """The changes of ``tree`` with which ``build`` gives the names and shapes of ``target``, or as many of them as can be had.

    ``lists`` are the lists of blocks that have become shorter (:func:`graphprune.formats.closing.closed`); ``used`` the attributes
    (module, attribute, …) of ``target`` that its code is known to read: they have to come out right as well.
    """
    wanted, counts = shapes(target), numbers(target, used)
    known: dict[Change, tuple[Gap, dict[Slot, int]]] = {}

    def measure(change: Change) -> tuple[Gap, dict[Slot, int]]:
        if change not in known:
            known[change] = _measured(build, changed(tree, change), wanted, counts)
        return known[change]

    best: Change = ()
    if lists:
        best = _better(best, measure, lambda best, gap: _shorter(changed(tree, best), lists))
    best = _better(best, measure, lambda best, gap: _same(changed(tree, best), gap))
    best = _better(best, measure, lambda best, gap: [*_same(changed(tree, best), gap), *_times(changed(tree, best), gap)])
    best = _better(best, measure, lambda best, gap: _open(changed(tree, best), gap))
    return Solution(changed(tree, best), dict(best), measure(best)[0], measure)


def compare(build: Callable[[Tree], nn.Module], target: nn.Module, tree: Tree) -> Gap:
    """What a configuration builds otherwise than ``target``."""
    return _measured(build, tree, shapes(target), {})[0]


def _measured(build: Callable[..., Any], tree: Tree, wanted: dict[str, tuple[int, ...]], counts: dict[Path, int]) -> tuple[Gap, dict[Slot, int]]:
    try:
        built = build(tree)
    except Exception:  # a class may refuse numbers that do not go together in any way it likes
        return Gap(fails=True), {}
    return _gap(built, wanted, counts), {(name, axis): size for name, shape in shapes(built).items() for axis, size in enumerate(shape)}


def _better(best: Change, measure: Measure, candidates: Callable[[Change, Gap], list[Change]]) -> Change:
    """Take what helps, the most helpful first, until nothing does."""
    inert: set[Path] = set()  # a number that changes nothing by one value is not tried with others
    while True:
        gap = measure(best)[0]
        if gap.size == (False, 0):
            return best
        offers = []
        for offer in candidates(best, gap):
            paths = [path for path, _ in offer]
            if not inert.issuperset(paths):
                offers.append(_join(best, offer))
                inert.update(paths if len(paths) == 1 and measure(offers[-1]) == measure(best) else ())
        offers = [offer for offer in dict.fromkeys(offers) if measure(offer) != measure(best)]
        before = best
        for offer in sorted(offers, key=lambda offer: measure(offer)[0].size):
            if measure(offer)[0].size < gap.size and measure(_join(best, offer))[0].size < measure(best)[0].size:
                best = _join(best, offer)
        if best != before:
            continue
        joined = _together(best, offers, measure, candidates)
        if joined == best:
            return best
        best = joined


def _together(best: Change, offers: list[Change], measure: Measure, candidates: Callable[[Change, Gap], list[Change]]) -> Change:
    """Numbers that help only together: those that put right what the first upsets, or two that have to divide each other."""
    gap = measure(best)[0]
    mending = [offer for offer in offers if measure(offer)[0].mends(gap)]
    building = [offer for offer in offers if not measure(offer)[0].fails]
    for offer in sorted(building, key=lambda offer: (offer not in mending, measure(offer)[0].size))[:STARTS]:
        for _ in range(CHAIN):
            upset = {path: pair for path, pair in measure(offer)[0].attributes.items() if path not in gap.attributes}
            others = [change for change in (candidates(offer, Gap(attributes=upset)) if upset else ()) if change[0][0] not in dict(offer)]
            more = [_join(offer, change) for change in others]
            if not more:
                break
            offer = min(more, key=lambda joined: measure(joined)[0].size)
            if measure(offer)[0].size < gap.size:
                return offer
    failing = [offer for offer in offers if measure(offer)[0].fails]
    pairs = [_join(*pair) for pair in combinations((*mending, *failing), 2)][:PAIRS]
    return next((joined for joined in pairs if measure(joined)[0].size < gap.size), best)


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
            for key, item in holder.items():
                if type(item) is int and item == size:
                    for more in ((), each, some, each + some):
                        offers[_frozen((((*prefix, key), len(kept)), *more))] = None
            for more in (each, some, *((change,) for change in first if change[1] < holder[change[0][-1]])):
                if more:
                    offers[_frozen(more)] = None
    return list(offers)


def _frozen(change: Change) -> Change:
    return tuple((path, tuple(value) if type(value) is list else value) for path, value in change)


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


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of what a file of the weights holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if hasattr(tensor, "shape")}


def numbers(model: nn.Module, paths: Iterable[Path]) -> dict[Path, int]:
    """The whole numbers at (module, attribute, …), where there is one."""
    modules = dict(model.named_modules())
    found = {}
    for path in paths:
        value: Any = modules.get(path[0])
        for key in path[1:]:
            value = _inside(value, key)
        if type(value) is int:
            found[path] = value
    return found


def _inside(value: Any, key: Any) -> Any:
    if isinstance(value, list | tuple):
        return value[key] if type(key) is int and key < len(value) else None
    return value.get(key) if isinstance(value, dict) else getattr(value, "__dict__", {}).get(key)


def _gap(built: nn.Module, wanted: dict[str, tuple[int, ...]], counts: dict[Path, int]) -> Gap:
    sizes = shapes(built)
    names = set(sizes) ^ set(wanted)
    names |= {name for name in set(sizes) & set(wanted) if len(sizes[name]) != len(wanted[name])}
    axes = {(name, axis): (a, b) for name in wanted if name not in names for axis, (a, b) in enumerate(zip(sizes[name], wanted[name], strict=True)) if a != b}
    attributes = {path: (value, counts[path]) for path, value in numbers(built, counts).items() if value != counts[path]}
    return Gap(frozenset(names), axes, attributes)
