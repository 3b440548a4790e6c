"""Which tensors the files of the smaller checkpoint hold, and how each is made from those of the old one: :class:`Layout`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters.pretrained import Names, Unit
from ..cutting.apply import cut_tensor, scaled
from ..cutting.gains import factors_of
from ..cutting.outline import cut_shape
from ..cutting.plan import Plan
from ..errors import BadFile, BadPlan
from ..formats.closing import Lists
from .shards import DTYPES, ENDING, INDEX, Entry, Shards
from .stored import WHOLE, FromFiles
from .writing import Kinds

Tensor = torch.Tensor
PIECE = 2**25  # bytes that are read at a time
APART = 2**40  # marks of different tensors are so far apart


@dataclass(frozen=True)
class Made:
    """A tensor of the new files: ``file`` of the old ones and what stays of each of its axes, or (None) what its whole ``unit`` is converted to."""

    unit: Unit
    dtype: str
    shape: tuple[int, ...]
    file: str | None = None
    cuts: Mapping[int, list[int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of an entry."""
        return DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.size


@dataclass(frozen=True)
class Layout:
    """``small`` is the cut model, its blocks closed up (``lists``), on the meta device; ``model`` the whole one."""

    plan: Plan
    model: nn.Module
    small: nn.Module
    lists: Lists
    names: Names
    shards: Shards
    recent: dict[Unit, dict[str, Tensor]] = field(default_factory=dict)  # the unit that was converted last

    @cached_property
    def tensors(self) -> dict[str, Made]:
        """Every tensor of the new files; raises :class:`~graphprune.errors.BadPlan` where they would not be those of the cut model."""
        saved, state = set(self.names.saved(self.small)), {name: tuple(tensor.shape) for name, tensor in self.small.state_dict().items()}
        made: dict[str, Made] = {}
        written: set[str] = set()
        for unit in self.names.units:
            targets = {name: new for name in unit.names if (new := self.closed(name)) in saved and new not in written}
            for name, new in targets.items():
                if self._cut_shape(name) != state[new]:
                    raise BadPlan(f"{name} is {self._cut_shape(name)} by the plan, the cut model has {state[new]}")
            written |= set(targets.values())
            if targets:
                made |= self._unit(unit, targets)
        if saved - written:
            raise BadPlan(f"the cut model has {sorted(saved - written)[0]}, which no tensor of {self.shards.folder} makes")
        return made

    @cached_property
    def files(self) -> dict[str, dict[str, Made]]:
        """The tensors of every new file, by its name, in the order in which they are written: those of a unit together."""
        order = {unit: number for number, unit in enumerate(self.names.units)}
        by_file: dict[str, dict[str, Made]] = {file: {} for file in self.shards.files}
        for name, made in sorted(self.tensors.items(), key=lambda item: (-item[1].size, order[item[1].unit], item[0])):
            by_file[self.shards.entries[made.file or made.unit.files[0]].file][name] = made
        full = [tensors for tensors in by_file.values() if tensors]
        if len(full) == 1:
            return {f"{self.shards.stem}{ENDING}": full[0]}
        return {f"{self.shards.stem}-{number:05}-of-{len(full):05}{ENDING}": tensors for number, tensors in enumerate(full, 1)}

    def index(self) -> tuple[str, dict[str, Any]] | None:
        """The name of the index and what is in it, where there are several files."""
        if len(self.files) == 1:
            return None
        places = {name: file for file, tensors in self.files.items() for name in tensors}
        size = sum(made.bytes for made in self.tensors.values())
        params = sum(math.prod(made.shape) for made in self.tensors.values())
        total = {"total_parameters": params, "total_size": size}
        return f"{self.shards.stem}{INDEX}", {"metadata": total, "weight_map": dict(sorted(places.items()))}

    def closed(self, name: str) -> str | None:
        """The name of a tensor once blocks that are gone leave no hole; None if it is gone with one."""
        for path, (_, kept) in self.lists.items():
            dot = f"{path}." if path else ""
            if name.startswith(dot):
                number, _, rest = name[len(dot) :].partition(".")
                if number.isdigit() and rest:
                    if int(number) not in kept:
                        return None
                    name = f"{dot}{kept.index(int(number))}.{rest}"
        return name

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The entries of a tensor of the new files, in order, some rows at a time."""
        made = self.tensors[name]
        if made.file is None:
            yield self._converted(made.unit)[name]
            return
        entry = self.shards.entries[made.file]
        if not entry.shape:
            yield self.shards.rows(made.file)
            return
        rows = np.array(made.cuts.get(0, range(entry.shape[0])), dtype=np.int64)
        others = {axis: torch.tensor(kept) for axis, kept in made.cuts.items() if axis}
        step = max(1, PIECE * entry.shape[0] // max(1, entry.bytes))
        held = self.shards.held(made.file)
        for start in range(0, entry.shape[0], step):
            mine = rows[(rows >= start) & (rows < start + step)]
            if len(mine):
                with self.shards.reading(made.file):
                    piece = held[start : start + step]
                    piece = piece if len(mine) == len(piece) else piece.index_select(0, torch.from_numpy(mine - start))
                    for axis, kept in others.items():
                        piece = piece.index_select(axis, kept)
                yield piece.contiguous()

    def kinds(self, file: str) -> Kinds:
        return {name: (made.dtype, made.shape) for name, made in self.files[file].items()}

    def _unit(self, unit: Unit, targets: dict[str, str]) -> dict[str, Made]:
        entries = [self.shards.entries[file] for file in unit.files]
        changed = {self.names.leaves[name] for name in targets} & (self.plan.numbers.keys() | self._factors.keys())
        dtype = entries[0].dtype
        with torch.device("meta"):
            cut = self.names.backward(self.small, {new: torch.empty(self._cut_shape(name)) for name, new in targets.items()})
        shapes = {name: tuple(tensor.shape) for name, tensor in cut.items()}
        if unit.conversion is None and not changed:
            (name,) = targets
            return {new: Made(unit, dtype, shape, unit.files[0], self._cuts(name)) for new, shape in shapes.items()}
        if not changed and sum(entry.bytes for entry in entries) > WHOLE:
            found = self._marked(unit, targets, entries)
            if found is not None and {name: cut_shape(self.shards.entries[file].shape, cuts) for name, (file, cuts) in found.items()} == shapes:
                return {name: Made(unit, self.shards.entries[file].dtype, shapes[name], file, cuts) for name, (file, cuts) in found.items()}
        return {name: Made(unit, dtype, shape) for name, shape in shapes.items()}

    def _marked(self, unit: Unit, targets: dict[str, str], entries: list[Entry]) -> dict[str, tuple[str, dict[int, list[int]]]] | None:
        """What every tensor of a unit is cut from, where each comes from one: marks take the way that the entries would take.

        One axis after the other is marked with where each position is from, while all others have length 1. None where the marks do not come out apart.
        """
        found: dict[str, tuple[str, dict[int, list[int]]]] = {}
        depths = {len(entry.shape) for entry in entries}
        if len(depths) != 1:
            return None
        for axis in range(depths.pop()):
            marks = {}
            for number, (file, entry) in enumerate(zip(unit.files, entries, strict=True)):
                shape = [size if other == axis else 1 for other, size in enumerate(entry.shape)]
                marks[file] = (number * APART + torch.arange(entry.shape[axis])).reshape(shape)
            cut: dict[str, Tensor] = {}
            for name, tensor in self.names.forward(unit, marks).items():
                whole = self.names.state[name]
                if tensor.ndim != len(whole):
                    return None
                cuts = {at: kept for at, kept in self._cuts(name).items() if tensor.shape[at] == whole[at]}
                cut[targets[name]] = cut_tensor(tensor, cuts)
            for name, tensor in self.names.backward(self.small, cut).items():
                sources = set((tensor // APART).flatten().tolist())
                if len(sources) != 1 or tensor.numel() != tensor.shape[axis]:
                    return None
                file, positions = unit.files[sources.pop()], (tensor % APART).flatten().tolist()
                known, cuts = found.setdefault(name, (file, {}))
                if known != file:
                    return None
                if positions != list(range(self.shards.entries[file].shape[axis])):
                    cuts[axis] = positions
        return found

    def _converted(self, unit: Unit) -> dict[str, Tensor]:
        """The new tensors of a unit that is converted as a whole: the last one is remembered."""
        if unit not in self.recent:
            self.recent.clear()
            tensors = self.names.forward(unit, {file: self.shards.rows(file) for file in unit.files})
            state = self.small.state_dict()
            targets = {name: new for name in unit.names if (new := self.closed(name)) in state}
            cut = {new: self._cut(name, tensors.pop(name)) for name, new in targets.items()}
            self.recent[unit] = {name: tensor.contiguous() for name, tensor in self.names.backward(self.small, cut).items()}
        return self.recent[unit]

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        leaf = self.names.leaves[name]
        small = cut_tensor(tensor, self.plan.cuts.get(leaf, {}))
        if leaf in self.plan.numbers:
            numbers = torch.tensor(self.plan.numbers[leaf], dtype=tensor.dtype)
            if len(small) and not 0 <= int(small.min()) <= int(small.max()) < len(numbers):
                raise BadFile(f"{name} of {self.shards.folder} numbers positions that the model does not have")
            small = numbers[small.long()]
        return scaled(small, self._factors[leaf]) if leaf in self._factors else small

    def _cuts(self, name: str) -> dict[int, list[int]]:
        return self.plan.cuts.get(self.names.leaves[name], {})

    def _cut_shape(self, name: str) -> tuple[int, ...]:
        return cut_shape(self.names.state[name], self._cuts(name))

    @cached_property
    def _factors(self) -> dict[str, Tensor]:
        """What takes up a cut of weights that a norm makes."""
        return factors_of(self.plan.gains, FromFiles.of(self.shards, self.names), self.plan.cuts) if self.plan.gains else {}
