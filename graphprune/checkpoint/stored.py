"""The parameters of a model that is on the meta device, read from its files as they are asked for: :class:`FromFiles`, and scores of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapters.pretrained import Names, Unit
from ..coupling.groups import Groups
from ..coupling.sums import PIECE, Rows
from ..errors import BadOption
from ..granularity.spec import parse
from ..planning.request import DEPTH
from ..scores import Score, named
from ..scores.task import Scores, Stored
from ..tracing.trees import is_parameter
from .shards import Shards

Tensor = torch.Tensor
# Scores that look at one weight after the other.
STREAMED = ("l1", "l2", "linf", "filter_norm", "group_norm", "lamp", "random")
WHOLE = 2**28  # bytes of tensors that are converted in one go


@dataclass(frozen=True)
class FromFiles(Stored):
    """The floating parameters of a model, whose files ``names`` relates to it, by the names that a run knows."""

    shards: Shards
    names: Names
    places: dict[str, tuple[Unit, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, shards: Shards, names: Names) -> FromFiles:
        tensors = dict(names.model.named_parameters(remove_duplicate=False))
        floating = {name for name, tensor in tensors.items() if is_parameter(tensor) and tensor.is_floating_point()}
        places = {names.leaves[name]: (unit, name) for unit in names.units for name in unit.names if name in floating}
        return cls(shards, names, places)

    def __getitem__(self, name: str) -> Tensor:
        unit, own = self.places[name]
        return self.made(unit)[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

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


def scored(name: Any, stored: Stored, what: Any) -> Any:
    """A score by name (or a mapping of kinds to names), for the kinds of ``what``, as functions that read the files.

    Raises :class:`~graphprune.errors.BadOption` for scores that need more than one weight at a time.
    """
    kinds = [what] if isinstance(what, str) else list(what)
    names = name if isinstance(name, Mapping) else dict.fromkeys(kinds, name)
    found = {kind: (depth if parse(kind).name in DEPTH else widths)(each, stored) for kind, each in names.items()}
    return found if len(found) > 1 else next(iter(found.values()))


def widths(name: Any, stored: Stored) -> Any:
    score = named(name) if isinstance(name, str) else name
    if not isinstance(score, Score) or score.name not in STREAMED or score.options.get("fold"):
        what = score.name if isinstance(score, Score) else name
        raise BadOption(f"score={what!r} cannot be read weight by weight from files; there are {', '.join(STREAMED)}")

    def from_files(groups: Groups, model: nn.Module, batches: Any = None) -> Scores:
        return score(groups, model, stored=stored)

    from_files.__name__ = score.name
    return from_files


def depth(name: Any, stored: Stored) -> Any:
    """The same for whole modules: the norm of their weights."""
    if name == "random":
        return name
    if name not in ("l1", "l2"):
        raise BadOption(f"score={name!r} of whole modules cannot be read from files; it is 'l1', 'l2' or 'random'")
    power = 1 if name == "l1" else 2

    def from_files(path: str, module: nn.Module) -> float:
        names = [leaf for leaf in stored if leaf.startswith(f"{path}.")]
        return sum(_total(stored.pieces[leaf], power) for leaf in names) ** (1 / power)

    return from_files


def _total(rows: Rows, power: int) -> float:
    step = max(1, PIECE // max(1, math.prod(rows.shape[1:])))
    return sum(float(rows[start : start + step].double().abs().pow(power).sum()) for start in range(0, rows.shape[0], step))
