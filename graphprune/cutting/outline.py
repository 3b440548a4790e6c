"""What a plan does, in numbers that a person reads: :class:`Outline` (totals, a width for every group, what stays whole and why).

It is made together with the plan, while the groups are known, and kept with it as plain data. The costs are exact: they are the products that
:mod:`graphprune.cost` names, with the lengths that are left.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..cost import products
from ..coupling.groups import Groups
from ..operations.labels import Array
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..wording import brief, folded


class Totals(NamedTuple):
    """Parameters, and multiply-accumulates of one call on the example."""

    params: int
    macs: int


class Width(NamedTuple):
    """One group: the tensor and axis that name it, its units before and after, and the shares of the model's parameters and MACs along its units.

    A weight between two groups counts for both, so that shares add up to more than one. ``places`` are the other (tensor, axis) pairs cut with it,
    ``makers`` the modules whose weights put its units out.
    """

    name: str
    axis: int
    before: int
    after: int
    params: float
    macs: float
    places: tuple[tuple[str, int], ...]
    makers: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The makers, folded."""
        return folded(self.makers or [module_of(self.name)])


class Whole(NamedTuple):
    """An axis that stays whole: its tensor's number of entries, the sentence, the operation, the module that called it, and the line."""

    name: str
    axis: int
    entries: int
    text: str
    op: str = ""
    module: str = ""
    line: str = ""

    @property
    def kernel(self) -> bool:
        """Whether it is a height or width of a kernel, which nobody expects to be cut."""
        return self.axis > 1 and "conv" in self.op

    @property
    def reason(self) -> str:
        origin = ", ".join(part for part in (self.op, self.module, self.line) if part)
        return f"{self.text} ({origin})" if origin else self.text


@dataclass(frozen=True)
class Outline:
    """Totals before and after, one :class:`Width` for every group, one :class:`Whole` for every axis that stays, and the shape that every parameter
    (``shapes``) and every other tensor of the model (``buffers``) had before.
    """

    before: Totals
    after: Totals
    widths: tuple[Width, ...] = ()
    wholes: tuple[Whole, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor before the cut."""
        return self.shapes[name] if name in self.shapes else self.buffers[name]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Outline:
        """Read what :meth:`to_dict` wrote, once JSON has made lists of it; raises ValueError or KeyError for anything else."""
        before, after = (Totals(*_row(data[key], (int, int), key)) for key in ("before", "after"))
        widths = [Width(*_row(row, WIDTH, "a width")) for row in _typed(data["widths"], list, "widths")]
        wholes = [Whole(*_row(row, WHOLE, "a whole axis")) for row in _typed(data["wholes"], list, "wholes")]
        widths = [width._replace(places=tuple(_row(place, (str, int), "a place") for place in width.places)) for width in widths]
        widths = [width._replace(makers=_row(width.makers, (str,) * len(width.makers), "the makers")) for width in widths]
        tables = [_typed(data[key], dict, key) for key in ("shapes", "buffers")]
        shapes, buffers = ({name: _row(shape, (int,) * len(shape), f"the shape of {name}") for name, shape in each.items()} for each in tables)
        for width in widths:
            for name, axis in ((width.name, width.axis), *width.places):
                if not 0 <= axis < len(shapes.get(name, buffers.get(name, ()))):
                    raise ValueError(f"the outline speaks of {name} axis {axis}, which it gives no shape")
        return cls(before, after, tuple(widths), tuple(wholes), shapes, buffers)

    def then(self, second: Outline, cuts: Mapping[str, Mapping[int, Sequence[int]]]) -> Outline:
        """The outline of this plan and then ``second``, about the model before both; ``cuts`` are those of both together."""
        widths = [width._replace(after=self._left(width, cuts)) for width in self.widths]
        places = {place for width in widths for place in ((width.name, width.axis), *width.places)}
        others = [width for width in second.widths if (width.name, width.axis) not in places]
        before = self.before
        if self.after.macs and second.before.macs != self.after.macs:  # the second plan was made with another example: say both of that one
            before = before._replace(macs=round(before.macs * second.before.macs / self.after.macs))
        return Outline(before, second.after, (*widths, *others), second.wholes, self.shapes, self.buffers)

    def _left(self, width: Width, cuts: Mapping[str, Mapping[int, Sequence[int]]]) -> int:
        """How many of a group's units stay, from the positions where it is alone on an axis (a unit may have several there)."""
        kept = cuts.get(width.name, {}).get(width.axis)
        size = self.shape(width.name)[width.axis]
        return width.after if kept is None or size % width.before else len(kept) * width.before // size


LARGEST = sys.float_info.max  # whole numbers of JSON have no end
WIDTH = (str, int, int, int, float, float, list, list)
WHOLE = (str, int, int, str, str, str, str)


def _typed(item: Any, kind: type, what: str) -> Any:
    """``item``, if it is of a kind; raises ValueError. A whole number will do for a float, and no number is infinite."""
    if type(item) is not kind and not (kind is float and type(item) is int) or kind is float and not abs(item) <= LARGEST:
        raise ValueError(f"{what}: {kind.__name__} is expected, not {brief(item)}")
    return item


def _row(items: Any, kinds: Sequence[type], what: str) -> tuple[Any, ...]:
    if type(items) is not list or len(items) != len(kinds):
        raise ValueError(f"{what}: {len(kinds)} entries are expected, not {brief(items)}")
    return tuple(_typed(item, kind, what) for item, kind in zip(items, kinds, strict=True))


def module_of(name: str) -> str:
    """The path of the module that holds a tensor.

    >>> module_of("layer1.0.conv1.weight"), module_of("scale"), module_of("blocks.0.attn.parametrizations.w.original0")
    ('layer1.0.conv1', 'the model', 'blocks.0.attn')
    """
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0] or "the model"


class _Lengths:
    """The distinct lengths of axes, numbered, as :func:`graphprune.cost.products` asks for them: before, after, and the share of each group.

    A fraction of the work of :class:`~graphprune.coupling.lengths.Lengths`, which gives them for any choice of units.
    """

    def __init__(self, groups: Groups, length: Callable[[Value, int], int]) -> None:
        self.groups, self.length = groups, length
        self.numbers: dict[tuple[Any, ...], tuple[int, tuple[Any, ...]]] = {}
        self.before, self.after, self.shares = [1], [1], [{}]

    def form(self, value: Value, dim: int) -> tuple[int, int]:
        fields = tuple([field for field in value.fields if field.shape[dim] > 1])
        if not fields:
            return value.shape[dim], 0
        key = (*map(id, fields), dim)
        if key not in self.numbers:
            self.numbers[key] = len(self.before), fields  # the fields are kept with it, so that their ids stay theirs
            self.before.append(value.shape[dim])
            self.after.append(self.length(value, dim))
            self.shares.append(self._shares(fields))
        return 1, self.numbers[key][0]

    def _shares(self, fields: Sequence[Array]) -> dict[int, float]:
        """The share of an axis that belongs to each group."""
        shares: dict[int, float] = {}
        for labels in fields:
            owners = self.groups.owner[self.groups.root[labels.ravel()]]
            owners = owners[owners >= 0]
            counts = np.bincount(owners) if len(owners) else []
            shares |= {group: int(count) / labels.size for group, count in enumerate(counts) if count}
        return shares


def outline(groups: Groups, cuts: Mapping[str, Mapping[int, Sequence[int]]], kept: Sequence[int], length: Callable[[Value, int], int]) -> Outline:
    """The outline of a cut: how many units of every group are ``kept``, the ``cuts`` of tensors, and ``length(value, dim)``, what is left of any axis."""
    graph = groups.graph
    shapes = {name: tuple(leaf.shape) for name, leaf in graph.leaves.items() if name in graph.parameters}
    buffers = {name: tuple(leaf.shape) for name, leaf in graph.leaves.items() if name not in shapes}
    volume = {name: math.prod(shape) for name, shape in shapes.items()}
    params = sum(volume.values())
    params_after = sum(math.prod(cut_shape(shape, cuts.get(name, {}))) for name, shape in shapes.items())
    macs, macs_after, along = _work(groups, _Lengths(groups, length))
    widths, made = [], _made(graph)
    for group, units in zip(groups, kept, strict=True):
        (name, axis), *places = group.places
        touched = sum(volume[n] * np.count_nonzero(unit >= 0) / len(unit) for (n, _), unit in group.places.items() if n in volume)
        share = float(along[group.index] / macs) if macs else 0.0
        makers = [module_of(n) for n, a in group.places if len(shapes.get(n, ())) > 1 and a in made.get(n, (0,))] or [module_of(n) for n, _ in group.places]
        facts = (group.size, units, min(1.0, float(touched / max(1, params))), share)
        widths.append(Width(name, axis, *facts, tuple(places), tuple(dict.fromkeys(makers))))
    wholes = [
        Whole(name, axis, math.prod(graph.leaves[name].shape), reason.text, reason.op, reason.module, reason.line)
        for (name, axis), reason in groups.locked.items()
    ]
    return Outline(Totals(params, round(macs)), Totals(params_after, round(macs_after)), tuple(widths), tuple(wholes), shapes, buffers)


def _work(groups: Groups, lengths: _Lengths) -> tuple[float, float, Array]:
    """The multiply-accumulates of a run before and after the cut, and those, before it, that have a unit of each group."""
    before, after, along = 0.0, 0.0, np.zeros(len(groups))
    for factor, forms in (term for node in groups.graph.nodes for term in products(node, lengths)):  # type: ignore[arg-type]  # it asks for nothing but form()
        work = factor * math.prod(lengths.before[form] for form in forms)
        before += work
        after += factor * math.prod(lengths.after[form] for form in forms)
        apart: dict[int, float] = {}  # of each group: the share of the call that has none of its units
        for shares in (lengths.shares[form] for form in forms):
            for group, share in shares.items():
                apart[group] = apart.get(group, 1.0) * (1 - share)
        for group, share in apart.items():
            along[group] += work * (1 - share)
    return before, after, along


def _made(graph: Graph) -> dict[str, set[int]]:
    """The axes of every weight along which its outputs lie: the first, but not in a transposed convolution, or with the weight at the right (``x @ w``)."""
    made: dict[str, set[int]] = {}
    for product in (product for node in graph.nodes for product in node.products):
        if leaf := product.weight.value.leaf:
            made.setdefault(leaf, set()).update(product.weight.made or {0} - set(product.weight.summed))
    return made


def cut_shape(shape: Sequence[int], axes: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """
    >>> cut_shape((4, 6, 3), {1: [0, 2]})
    (4, 2, 3)
    """
    return tuple(len(axes[axis]) if axis in axes else size for axis, size in enumerate(shape))
