"""The parameters of a model that is on the meta device, read from its files as they are asked for: :class:`FromFiles`, and scores of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..adapters.pretrained import Names, Unit
from ..coupling.sums import Rows
from ..scores.task import Stored
from ..tracing.trees import is_parameter
from .shards import Shards

Tensor = torch.Tensor
WHOLE = 2**28  # bytes of tensors that are converted in one go


@dataclass(frozen=True)
class FromFiles(Stored):
    """The floating parameters of a model, whose files ``names`` relates to it, by the names that a run knows."""

    shards: Shards
    names: Names
    places: dict[str, tuple[Unit, str]] = field(default_factory=dict)
    state: dict[str, tuple[Unit, str]] = field(default_factory=dict)  # buffers among them

    @classmethod
    def of(cls, shards: Shards, names: Names) -> FromFiles:
        tensors = dict(names.model.named_parameters(remove_duplicate=False))
        floating = {name for name, tensor in tensors.items() if is_parameter(tensor) and tensor.is_floating_point()}
        state = {names.leaves[name]: (unit, name) for unit in names.units for name in unit.names}
        return cls(shards, names, {leaf: place for leaf, place in state.items() if place[1] in floating}, state)

    def __getitem__(self, name: str) -> Tensor:
        unit, own = self.places[name]
        return self.made(unit)[own]

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model's state, parameter or buffer, by any of its names."""
        unit, own = self.state[self.names.leaves[name]]
        return self.made(unit)[own]

    def made(self, unit: Unit) -> dict[str, Tensor]:
        """The tensors of a unit as the model holds them."""
        return self.names.forward(unit, {file: self.shards.rows(file) for file in unit.files})

    @property
    def pieces(self) -> Mapping[str, Rows]:  # type: ignore[override]
        return Pieces(self)


class Pieces(Mapping[str, Rows]):
    """The same parameters, to be read some rows at a time."""

    def __init__(self, stored: FromFiles) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Rows:
        unit, own = self.stored.places[name]
        if unit.conversion is None:
            return Slices(self.stored.shards, unit.files[0])
        if sum(self.stored.shards.entries[file].bytes for file in unit.files) > WHOLE:
            stack = Stack.of(self.stored, unit, own)
            if stack is not None:
                return stack
        return self.stored[name]

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class Slices:
    """A tensor of one file; the file is open as long as this is there."""

    def __init__(self, shards: Shards, name: str) -> None:
        self.shape = shards.entries[name].shape
        self._shards, self._name = shards, name
        self._file = shards.held(name)

    def __getitem__(self, rows: slice) -> Tensor:
        with self._shards.reading(self._name):
            return self._file[rows] if self.shape else self._file[...]


class Stack:
    """A tensor whose rows (experts, say) are tensors of their own in the files: only those that are asked for are read."""

    def __init__(self, stored: FromFiles, unit: Unit, name: str, sources: list[list[str]]) -> None:
        self.shape = stored.names.state[name]
        self._stored, self._unit, self._name, self._sources = stored, unit, name, sources

    @classmethod
    def of(cls, stored: FromFiles, unit: Unit, name: str) -> Stack | None:
        """The tensor seen like this, if numbers put in the place of the entries say that it can be."""
        shapes = [stored.shards.entries[file].shape for file in unit.files]
        marks = {file: torch.full([1] * len(shape), number) for number, (file, shape) in enumerate(zip(unit.files, shapes, strict=True))}
        made = stored.names.forward(unit, marks)[name]
        if len(made) != stored.names.state[name][0]:
            return None
        sources = [[unit.files[number] for number in sorted(set(row.flatten().tolist()))] for row in made]
        for row in (0, len(made) - 1):
            alone = stored.names.forward(unit, {file: marks[file] for file in sources[row]}).get(name)
            if alone is None or not torch.equal(alone, made[row : row + 1]):
                return None
        return cls(stored, unit, name, sources)

    def __getitem__(self, rows: slice) -> Tensor:
        files = [file for row in self._sources[rows] for file in row]
        made = self._stored.names.forward(self._unit, {file: self._stored.shards.rows(file) for file in files})
        return made[self._name]
