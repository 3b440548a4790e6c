"""A safetensors file written tensor by tensor: the header first, for names, types and shapes are known, then the entries as they come.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
>>> write(path, {"w": ("F32", (2, 1))}, lambda name: [torch.ones(2, 1)])
>>> from safetensors.torch import load_file
>>> load_file(path)["w"].tolist()
[[1.0], [1.0]]
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from ..errors import BadFile
from ..formats.atomic import sync
from .shards import DTYPES

# The type, as safetensors writes it, and the shape of every tensor, in the order in which they are written: larger types first, so that every entry
# stands where its type may.
Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
ALIGNED = 8  # bytes: the entries begin at a multiple of it
PART = ".part"


def length(kinds: Kinds) -> int:
    """The bytes of the file."""
    return len(header(kinds)) + sum(_bytes(*kind) for kind in kinds.values())


def header(kinds: Kinds) -> bytes:
    places, at = {"__metadata__": {"format": "pt"}}, 0
    for name in kinds:
        dtype, shape = kinds[name]
        size = _bytes(dtype, shape)
        places[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return struct.pack("<Q", len(text)) + text


def write(path: Path, kinds: Kinds, pieces: Callable[[str], Iterable[torch.Tensor]]) -> None:
    """Write the file beside its place, bring it to the disk, and rename it; ``pieces`` is asked for one tensor after the other.

    Raises :class:`~graphprune.errors.BadFile` where the disk is full or cannot be written; what was begun is then removed.
    """
    part = path.with_name(path.name + PART)
    try:
        with open(part, "wb") as file:
            file.write(header(kinds))
            for name, (dtype, shape) in kinds.items():
                count = 0
                for piece in pieces(name):
                    assert piece.dtype == DTYPES[dtype], f"{name} is {piece.dtype}, {dtype} was announced"
                    count += piece.numel()
                    if piece.numel():
                        file.write(piece.reshape(-1).view(torch.uint8).numpy().data)
                assert count == math.prod(shape), f"{name} has {count} entries, {shape} was announced"
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        if isinstance(error, BadFile):  # a file that is read
            raise
        part.unlink(missing_ok=True)
        raise BadFile.of(error, f"{path} cannot be written: {error.strerror or error}; what was written before stays, and is gone on with") from error


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
