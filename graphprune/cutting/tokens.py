"""The tokens that a smaller vocabulary keeps: :class:`Tokens` maps ids from the original to the cut model and back, and says what becomes of ids that went.

>>> tokens = Tokens((0, 1, 5, 9), 12)
>>> tokens.to_new([9, 1]), tokens.to_old([3, 1]), tokens.to_new([9, 7], gone=0)
([3, 1], [9, 1], [3, 0])
>>> tokens.to_new([9, 7])
Traceback (most recent call last):
...
graphprune.errors.BadInput: 1 of 2 ids are not in the cut vocabulary (4 of 12 tokens stay), the first is 7; gone=ID puts another token of the cut model there
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors import BadInput
from ..tracing.trees import replace

FILE = "graphprune_tokens.json"  # beside the weights
IGNORED = -1  # ids below zero stand for nothing (labels that a loss passes over)


@dataclass(frozen=True)
class Tokens:
    """``kept[new]`` is the original id of every token that stays, in order; ``size`` is how many there were.

    ``inputs`` are the arguments that hold ids (numbers of positional ones, names of keywords), ``slots`` the (tensor, axis) pairs that have one row for each
    token, and ``paths`` the attributes of the model that name a token.
    """

    kept: tuple[int, ...]
    size: int
    inputs: tuple[int | str, ...] = ()
    slots: tuple[tuple[str, int], ...] = ()
    paths: tuple[tuple[Any, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.kept)

    def __repr__(self) -> str:
        return f"<Tokens: {len(self)} of {self.size} stay>"

    @cached_property
    def new(self) -> np.ndarray:
        """The new id of every original one, -1 where it went."""
        new = np.full(self.size, -1, dtype=np.int64)
        new[list(self.kept)] = np.arange(len(self.kept))
        return new

    def to_new(self, ids: Any, gone: int | None = None) -> Any:
        """Ids of the original as ids of the cut model: a number, a list (of lists) or a whole-number tensor, and the same comes back.

        An id that went raises :class:`~graphprune.errors.BadInput`, or becomes ``gone``, an id of the cut model (that of the unknown token, say); ids below
        zero stay.
        """
        if gone is not None and not (type(gone) is int and 0 <= gone < len(self)):
            raise BadInput(f"gone is {gone!r}; it is an id of the cut model, 0 to {len(self) - 1}, or None to refuse ids that went")
        return self._mapped(ids, self.new, gone, f"{self.size}")

    def to_old(self, ids: Any) -> Any:
        """Ids of the cut model as ids of the original, whose tokenizer reads them. Raises :class:`~graphprune.errors.BadInput` for ids that are none."""
        return self._mapped(ids, np.asarray(self.kept, dtype=np.int64), None, f"{len(self)} of the cut model")

    def _mapped(self, ids: Any, table: np.ndarray, gone: int | None, which: str) -> Any:
        if isinstance(ids, torch.Tensor):
            if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
                raise BadInput(f"ids of tokens are whole numbers; a tensor of {ids.dtype} was given")
            return torch.from_numpy(self._looked_up(ids.detach().cpu().numpy().astype(np.int64), table, gone, which)).to(ids)
        try:
            array = np.asarray(ids)
        except ValueError:  # lists of several lengths
            return type(ids)(self._mapped(each, table, gone, which) for each in ids)
        if array.size and array.dtype.kind not in "iu":
            raise BadInput(f"ids of tokens are whole numbers, in a list, an array or a tensor; got {type(ids).__name__}")
        result = self._looked_up(array.astype(np.int64), table, gone, which)
        return result if isinstance(ids, np.ndarray) else result.tolist()

    def _looked_up(self, ids: np.ndarray, table: np.ndarray, gone: int | None, which: str) -> np.ndarray:
        if ids.size and int(ids.max()) >= len(table):
            raise BadInput(f"the id {int(ids.max())} is none of the {which} tokens")
        result = np.where(ids < 0, ids, table[np.maximum(ids, 0)]) if ids.size else ids
        lost = (result < 0) & (ids >= 0)
        if lost.any() and gone is None:
            count = f"{int(lost.sum())} of {ids.size} ids are not in the cut vocabulary ({len(self)} of {self.size} tokens stay)"
            raise BadInput(f"{count}, the first is {int(ids[lost][0])}; gone=ID puts another token of the cut model there")
        return np.where(lost, gone if gone is not None else IGNORED, result)

    def example(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with ids of the cut model; ids that went are replaced by others that stay, which is good enough for a trial run."""
        return self._swapped(args, kwargs, lambda ids: self.to_new(self._within(ids)))

    def nearest(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments for the original: with the tokens that :meth:`example` put in place of those that went."""
        return self._swapped(args, kwargs, self._within)

    def _within(self, ids: torch.Tensor) -> torch.Tensor:
        new, kept = torch.from_numpy(self.new), torch.tensor(self.kept)
        inside = ids.cpu().clamp(min=0)
        return torch.where((ids.cpu() < 0) | (new[inside] >= 0), ids.cpu(), kept[inside % len(self)]).to(ids)

    def _swapped(self, args: Sequence[Any], kwargs: Mapping[str, Any], swap: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        known = {*self.inputs}
        return (
            tuple(replace(each, swap) if at in known else each for at, each in enumerate(args)),
            {key: replace(each, swap) if key in known else each for key, each in kwargs.items()},
        )

    def after(self, earlier: Tokens) -> Tokens:
        """The same tokens, counted in the original that ``earlier`` was cut from."""
        slots, paths = (tuple(dict.fromkeys((*one, *other))) for one, other in ((earlier.slots, self.slots), (earlier.paths, self.paths)))
        return Tokens(tuple(earlier.kept[new] for new in self.kept), earlier.size, earlier.inputs or self.inputs, slots, paths)

    def to_dict(self) -> dict[str, Any]:
        """The tokens as lists and numbers, for JSON."""
        places = {"slots": list(map(list, self.slots)), "paths": list(map(list, self.paths))}
        return {"size": self.size, "kept": list(self.kept), "inputs": list(self.inputs), **places}

    def to_json(self) -> str:
        """What :data:`FILE` holds: the original id of every new one."""
        return json.dumps({"version": 1, "size": self.size, "kept": list(self.kept), "inputs": list(self.inputs)})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tokens:
        """The tokens that :meth:`to_dict` wrote; raises ValueError, KeyError or TypeError for anything else.

        >>> Tokens.from_dict(Tokens((1, 3), 4).to_dict()).kept
        (1, 3)
        """
        size, kept = data["size"], data["kept"]
        if type(size) is not int or type(kept) is not list or not all(type(each) is int for each in kept):
            raise ValueError("tokens are numbers: how many there were, and which stay")
        if not kept or not 0 <= kept[0] <= kept[-1] < size or any(a >= b for a, b in zip(kept, kept[1:], strict=False)):
            raise ValueError(f"the tokens that stay increase and lie between 0 and {size - 1}")
        inputs, slots, paths = data.get("inputs", []), data.get("slots", []), data.get("paths", [])
        _check_places(inputs, slots, paths)
        return cls(tuple(kept), size, tuple(inputs), tuple((name, axis) for name, axis in slots), tuple(map(tuple, paths)))


def _check_places(inputs: Any, slots: Any, paths: Any) -> None:
    if not all(type(each) in (int, str) for each in inputs):
        raise ValueError("inputs are numbers or names of arguments")
    if not all(type(each) is list and len(each) == 2 and type(each[0]) is str and type(each[1]) is int for each in slots):
        raise ValueError("the places of tokens are tensors, each with an axis")
    if not all(type(path) is list and all(type(key) in (int, str) for key in path) for path in paths):
        raise ValueError("attributes that name tokens are paths of names and numbers")
