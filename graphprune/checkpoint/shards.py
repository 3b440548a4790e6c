"""The safetensors files of a checkpoint, read one tensor (or some of its rows) at a time: :class:`Shards`.

A file is opened for each tensor that is read and closed again, for what is read through an open file stays in the memory of the process.

>>> import tempfile
>>> from safetensors.torch import save_file
>>> folder = Path(tempfile.mkdtemp())
>>> save_file({"w": torch.arange(6.0).view(3, 2)}, folder / "model.safetensors")
>>> shards = Shards.of(folder)
>>> shards.shapes, shards.held("w")[1:2].tolist()
({'w': (3, 2)}, [[2.0, 3.0]])
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BadFile
from ..formats.atomic import ordinary, read
from ..wording import several

ENDING, INDEX = ".safetensors", ".safetensors.index.json"
MOST = 2**28  # bytes of an index
# How safetensors writes dtypes, and the bytes of an entry.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what it is."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shards:
    """The tensors in the files of ``folder``; ``stem`` is what their names begin with ("model")."""

    folder: Path
    stem: str
    files: tuple[str, ...]
    entries: dict[str, Entry]

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """Read the index and the headers; raises :class:`~graphprune.errors.BadFile` for files that are missing or damaged, or an index that is wrong."""
        index = sorted(folder.glob(f"*{INDEX}"))
        if len(index) > 1:
            raise BadFile(f"{folder} holds several checkpoints: {several([path.name for path in index], 3)}; put one into a folder of its own")
        listed = _listed(index[0]) if index else {}
        files = sorted(set(listed.values())) if index else sorted(path.name for path in folder.glob(f"*{ENDING}"))
        if not files:
            raise BadFile(f"{folder} holds no {ENDING} files")
        if not index and len(files) > 1:
            raise BadFile(f"{folder} holds {several(files, 3)} and no *{INDEX} that says what belongs together")
        entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _header(folder, file):
                if index and listed.get(name) != file:
                    where = f"in {listed[name]}" if name in listed else "nowhere"
                    raise BadFile(f"the index {index[0].name} is wrong: {name} is in {file}, the index says {where}")
                entries[name] = entry
        lost = [name for name in listed if name not in entries]
        if lost:
            raise BadFile(f"the index {index[0].name} is wrong: {several(lost, 3)} should be in {listed[lost[0]]} and is not")
        stem = index[0].name.removesuffix(INDEX) if index else files[0].removesuffix(ENDING)
        return cls(folder, stem, tuple(files), entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name].dtype]

    def rows(self, name: str) -> torch.Tensor:
        """A tensor; what of it is touched is in memory as long as it is there."""
        with self.reading(name):
            return self.held(name)[...]

    def held(self, name: str) -> Any:
        """A tensor of which parts are read as they are sliced; its file is open as long as this is there."""
        from safetensors import safe_open

        with self.reading(name):
            return safe_open(self.folder / self.entries[name].file, "pt").get_slice(name)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """While a tensor is read: what fails says where."""
        from safetensors import SafetensorError

        try:
            yield
        except (SafetensorError, OSError) as error:
            path = self.folder / self.entries[name].file
            raise BadFile(f"{path} is damaged, or has changed while it was read ({name}): {error}") from error

    def digest(self) -> str:
        """What tells these files from others: names, sizes, times, and what is where; not their values."""
        told = hashlib.sha256()
        for file in self.files:
            state = (self.folder / file).stat()
            told.update(json.dumps([file, state.st_size, state.st_mtime_ns]).encode())
        for name, entry in sorted(self.entries.items()):
            told.update(json.dumps([name, entry.file, entry.dtype, entry.shape]).encode())
        return told.hexdigest()


def _listed(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(read(path, MOST))["weight_map"]
        assert isinstance(listed, dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise BadFile(f"{path} is no index of safetensors files: {type(error).__name__}: {error}") from error
    bad = next((file for file in listed.values() if not isinstance(file, str) or Path(file).name != file or not file.endswith(ENDING)), None)
    if bad is not None or not listed:
        raise BadFile(f"{path} names {bad!r}, which is no {ENDING} file beside it" if listed else f"{path} names no files")
    return listed


def _header(folder: Path, file: str) -> Iterator[tuple[str, Entry]]:
    from safetensors import SafetensorError, safe_open

    ordinary(folder / file)
    try:
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                piece = opened.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise BadFile(f"{folder / file}: {name} is of the type {piece.get_dtype()}, which is not read")
                yield name, Entry(file, piece.get_dtype(), tuple(piece.get_shape()))
    except (SafetensorError, OSError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"{folder / file} is damaged (or was not copied to its end): {error}") from error
