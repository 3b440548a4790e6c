"""Changes beyond cutting axes: a :class:`Part` is one of them, as data that JSON can hold.

``mask``: entries of a weight that are zero for good. ``kernel``: the taps that stay along each axis of a convolution's
kernel. ``columns``: the (channel, tap) pairs that every filter keeps. ``skip``: a module that hands its input on. ``expert``: a module of a list that is gone.
Positions are those of the original tensor, whatever the same plan cuts.

>>> bits = pack(torch.tensor([True, False, True]))
>>> unpack(bits, (3,)).tolist()
[True, False, True]
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

GONE = frozenset(("skip", "expert"))  # kinds that remove a module


@dataclass(frozen=True)
class Part:
    """``kind`` of change, the parameter or module it is about, and its data (numbers, names, or bits packed to bytes)."""

    kind: str
    name: str
    data: Any

    def to_json(self) -> list[Any]:
        packed = isinstance(self.data, bytes)
        return [self.kind, self.name, {"bits": base64.b64encode(self.data).decode()} if packed else self.data]

    @classmethod
    def from_json(cls, items: list[Any]) -> Part:
        kind, name, data = items
        packed = isinstance(data, dict)
        return cls(str(kind), str(name), base64.b64decode(data["bits"], validate=True) if packed else _tuples(data))


def _tuples(items: Any) -> Any:
    return tuple(_tuples(item) for item in items) if isinstance(items, list) else items


def pack(mask: torch.Tensor) -> bytes:
    """A boolean tensor as one bit per entry, row-major."""
    return np.packbits(mask.detach().cpu().numpy().ravel()).tobytes()


def unpack(bits: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """The boolean tensor of ``shape`` behind packed bits; raises ValueError when there are too few."""
    count = int(np.prod(shape))
    if len(bits) != -(-count // 8):
        raise ValueError(f"{len(bits)} bytes of packed bits do not hold a mask of shape {tuple(shape)}")
    flat = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count)
    return torch.from_numpy(flat.astype(bool)).reshape(shape)


def narrowed(mask: torch.Tensor, cuts: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """What is left of a mask when its tensor is cut."""
    for axis, kept in cuts.items():
        mask = mask.index_select(axis, torch.tensor(kept, dtype=torch.long, device=mask.device))
    return mask


def widened(mask: torch.Tensor, shape: tuple[int, ...], cuts: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """A mask of a cut tensor as one of its original ``shape``, True where nothing is left of it.

    >>> widened(torch.tensor([True, False]), (3,), {0: [0, 2]}).tolist()
    [True, True, False]
    """
    full = torch.ones(shape, dtype=torch.bool)
    kept = [torch.tensor(cuts.get(axis, range(size)), dtype=torch.long) for axis, size in enumerate(shape)]
    full[torch.meshgrid(*kept, indexing="ij")] = mask.cpu()
    return full


def survivors(part: Part, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Which entries of the weight that a part names stay; None when the part is not about entries.

    >>> survivors(Part("kernel", "w", ((0,), (0, 1))), (1, 1, 2, 2)).tolist()
    [[[[True, True], [False, False]]]]
    """
    if part.kind == "mask":
        return unpack(part.data, shape)
    if part.kind == "columns":
        return unpack(part.data, shape[1:]).expand(shape)
    if part.kind != "kernel":
        return None
    stays = torch.ones(shape, dtype=torch.bool)
    for axis, kept in enumerate(part.data, start=2):
        along = torch.zeros(shape[axis], dtype=torch.bool)
        along[list(kept)] = True
        stays &= along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return stays
