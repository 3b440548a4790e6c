"""What will be done: a :class:`Plan` is frozen data, and nothing but :mod:`graphprune.cutting.apply` touches a model.

It holds, for every tensor axis that is cut, the surviving positions, and the attributes that change with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..coupling.groups import Groups
from ..errors import BadPlan
from ..operations.labels import Array
from ..operations.notation import Value
from ..select import Kept
from ..tables import Table
from ..tracing.needs import Need
from ..tracing.picks import renumber
from ..tracing.trees import leaf_tensors
from .describe import brief_text, compared, every_line, explain_text, headline, html_text, kept_positions, table_of
from .gains import Gain, gains_of
from .outline import Outline, outline
from .parts import Part, survivors
from .schema import VERSION, read
from .tokens import Tokens

SHOWN = 8  # places that look at values, in the notes


@dataclass(frozen=True)
class Plan:
    """``cuts[name][axis]``: kept positions; ``shapes[name]``: the original shape; ``edits``: (module, attribute …, new).

    ``numbers``: for buffers that number positions of a cut axis, the new number of every old one (-1: gone).
    ``rewrites``: the modules whose code holds sizes as literals; they come back as subclasses that read them from attributes.
    ``parts``: changes beyond cutting axes (masks, smaller kernels, skipped modules). ``gains``: tensors that take up what a cut does to the
    weights that a norm makes (weight norm, spectral norm), so that these stay what they were. ``tokens``: the ids of a smaller vocabulary.
    ``outline``: totals, widths and reasons as numbers (:mod:`graphprune.cutting.outline`); ``print(plan)``, :meth:`explain` and :meth:`table` read it.
    """

    cuts: dict[str, dict[int, list[int]]]
    shapes: dict[str, tuple[int, ...]]
    edits: tuple[tuple[Any, ...], ...] = ()
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = field(default=(), compare=False)
    rewrites: tuple[str, ...] = ()
    numbers: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    parts: tuple[Part, ...] = ()
    gains: tuple[Gain, ...] = ()
    outline: Outline | None = field(default=None, compare=False)
    tokens: Tokens | None = None

    @property
    def stages(self) -> tuple[Plan, ...]:
        """Plans that do the same one after another: all but a smaller vocabulary, and that, for the model which the first one leaves.

        A model with fewer tokens takes other ids. What compares models, or runs them on inputs of the original, does so between the two.

        >>> both = Plan({"e": {0: [0, 2], 1: [1]}}, {"e": (3, 2)}, tokens=Tokens((0, 2), 3, slots=(("e", 0),)))
        >>> [stage.cuts for stage in both.stages], both.stages[1].shapes
        ([{'e': {1: [1]}}, {'e': {0: [0, 2]}}], {'e': (3, 1)})
        """
        if self.tokens is None:
            return (self,)
        slots, paths = {*self.tokens.slots}, {*self.tokens.paths}
        cuts = {name: {axis: kept for axis, kept in axes.items() if (name, axis) not in slots} for name, axes in self.cuts.items()}
        cuts = {name: axes for name, axes in cuts.items() if axes}
        words = {name: {axis: self.cuts[name][axis]} for name, axis in self.tokens.slots if axis in self.cuts.get(name, {})}
        shapes = {name: tuple(len(cuts.get(name, {}).get(axis, range(size))) for axis, size in enumerate(self.shapes[name])) for name in words}
        edits, others = (tuple(edit for edit in self.edits if (edit[:-1] in paths) is of_tokens) for of_tokens in (True, False))
        first = replace(self, cuts=cuts, edits=others, tokens=None, outline=None)
        return first, Plan(words, shapes, edits, tokens=self.tokens, outline=self.outline)

    def masks(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """A boolean tensor of the original shape for every parameter, buffer and plain attribute that is cut; True where the entry survives."""
        plain = {name: tensor for name, _, _, tensor in leaf_tensors(model) if name in self.cuts}
        tensors = plain | {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        named = {id(t): name for name, t in tensors.items() if name in self.cuts}  # tied tensors are cut under one name
        return {name: self.mask(named.get(id(t), name), tuple(t.shape)) for name, t in tensors.items()}

    def mask(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        mask = torch.ones(shape, dtype=torch.bool)
        for axis, kept in self.cuts.get(name, {}).items():
            along = torch.zeros(shape[axis], dtype=torch.bool)
            along[kept] = True
            mask &= along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        for part in self.parts:
            stays = survivors(part, shape) if part.name == name else None
            if stays is not None:
                mask &= stays
        return mask

    def explain(self, verbose: bool = False) -> str:
        """Totals first, then a line for each group, and the axes that stay whole by their reason and what it costs.

        ``verbose`` lists every tensor of every group, and every axis that stays whole (also heights and widths of kernels).
        """
        return explain_text(self, verbose)

    def table(self, by: str = "groups") -> Table:
        """Rows for ``"groups"``, ``"tensors"`` (all of the model, with why an axis is whole) or ``"changes"`` (masks, smaller kernels, removed modules).

        A :class:`~graphprune.tables.Table` prints, iterates over dictionaries, and has ``to_csv``, ``to_pandas`` and ``markdown``. ``params`` and
        ``macs`` are the shares of the model's that lie along the units of a group. Raises :class:`~graphprune.errors.UnknownName`.
        """
        return table_of(self, by)

    def kept(self, name: str, axis: int = 0) -> list[int]:
        """Which positions of the original stay: of a tensor, or of a module's weight (axis 0: its output channels).

        >>> Plan({"conv.weight": {0: [1, 3]}}, {"conv.weight": (4, 3, 1, 1)}).kept("conv")
        [1, 3]
        """
        return kept_positions(self, name, axis)

    def compare(self, other: Plan | torch.nn.Module) -> Table:
        """Where ``other``, a plan of the same model (or a model cut by one), differs: widths, positions, totals. Empty when the two do the same.

        Raises :class:`~graphprune.errors.BadPlan` for what is neither.
        """
        plan = plan_of(other) if isinstance(other, torch.nn.Module) else other
        if not isinstance(plan, Plan):
            text = "carries no plan: it was not cut" if isinstance(other, torch.nn.Module) else "is no plan"
            raise BadPlan(f"the {type(other).__name__} to compare with {text}; give a plan, or a model that shrink returned")
        return compared(self, plan)

    @property
    def lines(self) -> tuple[str, ...]:
        """What stays of every group, which axes stay whole and why, and remarks on how that came about, a line each."""
        return tuple(every_line(self))

    def __str__(self) -> str:
        return brief_text(self)

    def __repr__(self) -> str:
        return f"<Plan: {headline(self)}; {len(self.cuts)} tensors cut, {len(self.edits)} attributes changed>"

    def _repr_html_(self) -> str:
        return html_text(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as nested lists, texts and numbers, for JSON."""
        cuts = {name: {str(axis): kept for axis, kept in axes.items()} for name, axes in self.cuts.items()}
        data: dict[str, Any] = {"version": VERSION, "cuts": cuts, "shapes": self.shapes, "edits": self.edits, "notes": self.notes, "lines": self.remarks}
        data |= {"rewrites": self.rewrites} if self.rewrites else {}
        data |= {"numbers": self.numbers} if self.numbers else {}
        data |= {"outline": self.outline.to_dict()} if self.outline else {}
        data |= {"gains": [[gain.name, gain.power, gain.calls, gain.result, gain.axes] for gain in self.gains]} if self.gains else {}
        data |= {"tokens": self.tokens.to_dict()} if self.tokens else {}
        return data | ({"parts": [part.to_json() for part in self.parts]} if self.parts else {})

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan; raises :class:`~graphprune.errors.BadPlan` when the text is not one (:mod:`graphprune.cutting.schema`)."""
        return cls(**read(text)[0])


def plan_of(model: torch.nn.Module) -> Plan | None:
    """The plan that made a model what it is, relative to the original that was first cut; None for a model that was not.

    It is an attribute of the model (``graphprune_plan``), so that it is copied and pickled with it.

    >>> plan_of(torch.nn.Linear(2, 3)) is None
    True
    """
    return model.__dict__.get("graphprune_plan")


def note_plan(model: torch.nn.Module, plan: Plan) -> None:
    """Keep the plan with the model that it made, for :func:`plan_of`."""
    model.__dict__["graphprune_plan"] = plan


class Survivors:
    """Which labels survive, and what that leaves of any axis of any tensor of the run."""

    def __init__(self, groups: Groups, kept: Kept) -> None:
        gone = np.zeros(len(groups.root), dtype=bool)
        for group, stay in zip(groups, kept, strict=True):
            out = np.ones(group.size, dtype=bool)
            out[stay.numpy()] = False
            gone[group.units[out]] = True
        self.gone, self.root = gone, groups.root
        self.known: dict[tuple[int, ...], tuple[Array, int]] = {}  # by axis and the ids of fields, which most values share with others
        self.alive: list[Sequence[Array]] = []  # the fields, so that ids stay theirs

    @cached_property
    def stays(self) -> Array:
        return ~self.gone[self.root] if len(self.gone) else ~self.gone

    def axis(self, value: Value, dim: int) -> Array:
        """Which positions of an axis survive; not to be written into."""
        known = self.along(value, dim)
        return np.ones(value.shape[dim], dtype=bool) if known is None else known[0]

    def count(self, value: Value, dim: int) -> int:
        """How many positions of an axis survive."""
        known = self.along(value, dim)
        return value.shape[dim] if known is None else known[1]

    def along(self, value: Value, dim: int) -> tuple[Array, int] | None:
        """Both, of an axis along which anything may go."""
        fields = [field for field in value.fields if field.shape[dim] > 1]
        if not fields:
            return None
        key = (dim, *map(id, fields))
        if key not in self.known:
            mask = np.ones(value.shape[dim], dtype=bool)
            for field in fields:
                mask &= self.stays[field].any(axis=tuple(axis for axis in range(field.ndim) if axis != dim))
            self.known[key] = mask, int(np.count_nonzero(mask))
            self.alive.append(fields)
        return self.known[key]

    def length(self, need: Need) -> int:
        if need.kind == "count":
            return need.at
        mask = self.axis(need.value, need.dim)
        if need.kind == "before":
            return int(mask[: need.at].sum())
        if need.kind == "after":
            return int(mask[len(mask) - need.at :].sum()) if need.at else 0
        if need.kind == "blocks":
            return int(np.reshape(mask, (need.at, -1)).any(axis=1).sum())
        return self.count(need.value, need.dim)

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(self.count(value, dim) for dim in range(len(value.shape)))


def make_plan(groups: Groups, kept: Kept, edits: dict[tuple[Any, ...], int], notes: tuple[str, ...]) -> Plan:
    """Turn kept units into cuts of tensors."""
    leaves = groups.graph.leaves
    cuts = _cuts(_masks(groups, kept), list(leaves))
    shapes = {name: leaves[name].shape for name in cuts}
    lines: list[str] = []
    numbers: dict[str, list[int]] = {}
    stays = Survivors(groups, kept)
    for name, (value, dim) in groups.graph.picks.items():
        mask = stays.axis(value, dim)
        if not mask.all():
            numbers[name] = renumber(mask)
            lines.append(f"{name}: renumbered, {int(mask.sum())} positions of {len(mask)} stay")
    gains = gains_of(groups.graph, groups.root, cuts)
    lines += [f"{gain.name}: takes up what the cut does to the weight it makes" for gain in gains]
    summary = outline(groups, cuts, [len(stay) for stay in kept], stays.count)
    # What the example does not take is not known: a person may know it.
    looks = [f"note: {', '.join(part for part in place if part)} looks at a value; what the code does for others is not known" for place in groups.graph.looked]
    texts = (*notes, *looks[:SHOWN]), tuple(lines)
    return Plan(cuts, shapes, tuple((*path, new) for path, new in edits.items()), *texts, numbers=numbers, outline=summary, gains=gains)


def _masks(groups: Groups, kept: Kept) -> dict[tuple[str, int], Array]:
    """Which positions stay along every axis (tensor, axis) on which units of a group stand."""
    masks: dict[tuple[str, int], Array] = {}
    shared: set[tuple[str, int]] = set()  # the axes on which several groups stand
    for group, stay in zip(groups, kept, strict=True):
        stays = np.zeros(group.size + 1, dtype=bool)
        stays[stay.numpy()] = stays[-1] = True  # unit -1: of no unit of this group
        along: dict[int, Array] = {}  # many axes of a group hold its units in the same order
        for slot, stand in group.places.stands.items():
            if id(stand) not in along:
                along[id(stand)] = stays[stand.units]
            mask = along[id(stand)]
            if stand.positions is None:
                masks[slot] = masks[slot] & mask if slot in masks else mask
                continue
            if slot not in shared:  # axes of one group may share their mask, those of several groups are written into
                masks[slot] = np.copy(masks[slot]) if slot in masks else np.ones(stand.length, dtype=bool)
                shared.add(slot)
            masks[slot][stand.positions] &= mask
    return masks


def _cuts(masks: dict[tuple[str, int], Array], names: Sequence[str]) -> dict[str, dict[int, list[int]]]:
    """The positions that stay, by tensor and axis, in the order of ``names``; of axes that lose some."""
    lists: dict[bytes, list[int]] = {}  # equal cuts share one list
    listed: dict[int, list[int]] = {}  # the same by mask, which many axes share
    cuts: dict[str, dict[int, list[int]]] = {}
    for (name, axis), mask in sorted(masks.items(), key=lambda item: item[0][1]):
        if id(mask) not in listed:
            listed[id(mask)] = lists.setdefault(mask.tobytes(), np.flatnonzero(mask).tolist())
        if len(listed[id(mask)]) < len(mask):
            cuts.setdefault(name, {})[axis] = listed[id(mask)]
    return {name: cuts[name] for name in names if name in cuts}
