# pyright: strict, reportUnnecessaryIsInstance=false, reportPrivateUsage=false
"""Keep a cut model and get it back: safetensors for the weights, JSON for the plan, no pickle anywhere.

Of a masked weight the surviving entries are stored, and the mask as one bit per entry. The plan names the digest of the weights it belongs to, and
its own; both files are exchanged as one (:mod:`graphprune.formats.atomic`), so a folder holds the old model or the new one, whatever happens in between.

>>> import graphprune, tempfile
>>> make = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> folder = save(graphprune.shrink(make(), torch.zeros(1, 4)), tempfile.mkdtemp())
>>> load(folder, make())[0].out_features
4
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arrays import tensor_of
from ..cutting.apply import apply
from ..cutting.expand import known_plan
from ..cutting.masks import masks_of, parameter_name
from ..cutting.parts import Part, pack, widened
from ..cutting.plan import Plan, note_plan
from ..cutting.schema import CHECKSUM, checksum
from ..cutting.schema import read as read_plan
from ..cutting.tokens import FILE as TOKENS
from ..errors import BadFile, BadModel, BadPlan, GraphpruneError
from ..tracing.trees import check_scope, is_parameter, leaf_tensors
from .atomic import current, ordinary, read, replacing
from .huggingface import noted, remembered

WEIGHTS, PLAN = "model.safetensors", "plan.json"
TRIES = 20  # to read a folder that other processes write
FIXED, EACH, DIGITS = 2**24, 2**12, 32  # bytes of a plan: of its notes; of every tensor; of every position along an axis


def save(small: nn.Module, folder: str | Path, plan: Plan | None = None) -> Path:
    """Write ``model.safetensors`` and ``plan.json`` into ``folder`` (made if needed); tensors that are tied are stored once.

    ``plan`` is the one :func:`shrink` gave the model; raises :class:`~graphprune.errors.BadPlan` when there is none,
    :class:`~graphprune.errors.BadModel` where a tensor cannot be stored, and :class:`~graphprune.errors.BadFile` where the folder cannot be written.
    Then, and when the process is killed, it holds what it held.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    folder = _folder(folder)
    plan = known_plan(small, plan)
    masks = masks_of(small, plan)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _stored(small, masks):
        if tensor.is_meta:
            raise BadModel(f"{name} has no memory (it lies on the meta device), so that there is nothing to save; keep the plan: plan.to_json()")
        if tensor.layout is not torch.strided or tensor.dtype not in KINDS:
            raise BadModel(f"{name} ({tensor.dtype}, {tensor.layout}) cannot be stored as safetensors; convert it, or take it off the model before saving")
        keep = masks.get(parameter_name(name))
        tensors[name] = (tensor.detach() if keep is None else tensor.detach()[keep]).cpu().contiguous().clone()
    for name, keep in masks.items():
        whole = widened(keep, plan.shapes[name], plan.cuts.get(name, {}))
        tensors[f"{name}.mask"] = tensor_of(np.copy(np.frombuffer(pack(whole), np.uint8)))
    parts = tuple(Part("mask", part.name, None) if part.kind == "mask" else part for part in plan.parts)
    data = replace(plan, parts=parts).to_dict() | {"weights": _digest(sorted(tensors.items())), "loose": sorted(_loose(small))}
    note = noted(small)
    data |= {"configuration": note} if note else {}
    with replacing(folder) as part:
        try:
            save_file(tensors, part / WEIGHTS)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (part / PLAN).write_text(json.dumps(data | {CHECKSUM: checksum(data)}))
        if plan.tokens is not None:
            (part / TOKENS).write_text(plan.tokens.to_json())
    return folder


def load(folder: str | Path, base: nn.Module | None = None) -> nn.Module:
    """The saved model: ``base`` (a fresh, uncut model of the same kind) cut by the plan and filled with the weights.

    Raises :class:`~graphprune.errors.BadPlan` when the plan does not fit ``base``, and :class:`~graphprune.errors.BadFile` when files are missing,
    damaged, or do not hold exactly the tensors of the cut ``base``: the same names, shapes, dtypes and ties.
    """
    if not isinstance(base, nn.Module):
        what = "is missing" if base is None else f"is a {type(base).__name__}"
        raise BadModel(f"base {what}: the folder holds weights and a plan, but no code; give a fresh, uncut model, graphprune.load(folder, base=Net())")
    return restore(folder, base)


def _folder(folder: str | Path) -> Path:
    check_scope()
    if not isinstance(folder, str | os.PathLike):
        raise BadFile(f"the folder is {folder!r}; give its path")
    return Path(folder)


def restore(folder: str | Path, base: nn.Module, cast: bool = False) -> nn.Module:
    """What :func:`load` gives; ``cast`` takes weights that were saved in other dtypes."""
    folder = _folder(folder)
    if not isinstance(base, nn.Module):
        raise BadModel(f"the base is a {type(base).__name__}; give a fresh, uncut model of the same kind")
    for more in reversed(range(TRIES)):
        before = _seen(folder)
        try:
            return _restored(folder, base, cast)
        except BadFile:
            if not more or _seen(folder) == before:
                raise
    raise BadFile(f"{folder} is being written all the time")


def _seen(folder: Path) -> list[tuple[Any, ...] | None]:
    """What tells whether the files are still those that were there, and where: a writer moves a file without changing it."""
    seen: list[tuple[Any, ...] | None] = []
    for name in (WEIGHTS, PLAN):
        path = current(folder, name)
        try:
            status = os.stat(path)
            seen.append((path, status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            seen.append(None)
    return seen


def _restored(folder: Path, base: nn.Module, cast: bool) -> nn.Module:
    from safetensors import SafetensorError

    leaves = {parameter_name(name): tensor for name, _, _, tensor in leaf_tensors(base)}
    lost = next((name for name, tensor in leaves.items() if tensor.is_meta), None)
    if lost is not None:
        raise BadPlan(f"{lost} of the base has no memory (it lies on the meta device); load into base.to_empty(device='cpu')")
    text = read(current(folder, PLAN), sum(map(_room, leaves.values()), FIXED))
    fields, rest = read_plan(text)
    plan, path = Plan(**fields), current(folder, WEIGHTS)
    ordinary(path)
    try:
        with _opened(path) as file:
            return _filled(file, folder, base, plan, rest, cast)
    except GraphpruneError:
        raise
    except (SafetensorError, OSError, RuntimeError) as error:  # the last where it cannot be opened
        raise BadFile(f"{path} is damaged or was not written by graphprune: {error}") from error


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, "pt")


def _room(tensor: torch.Tensor) -> int:
    """How many bytes of a plan may speak of a tensor: its positions, and one bit per entry."""
    return EACH + DIGITS * sum(tensor.shape) + tensor.numel() // 4


def _filled(file: Any, folder: Path, base: nn.Module, plan: Plan, rest: dict[str, Any], cast: bool) -> nn.Module:
    """The base cut by the plan, with the weights of an open file."""
    names = set(file.keys())
    plan, bits = _unpacked(file, names, plan, base)
    small = _applied(base, plan)
    masks = masks_of(small, plan)
    tensors = dict(_stored(small, masks))
    loose = rest.get("loose", [])
    if type(loose) is not list:
        raise BadPlan("this is not a plan written by graphprune: loose: names are expected")
    missing = {name for name in tensors.keys() - names if "[" not in name and name not in _loose(small)}
    extra = {name for name in names - tensors.keys() - bits if "[" not in name and name not in loose}
    if missing or extra:
        _mismatch(small, missing, extra)
    for name in names & tensors.keys():
        _check_like(file.get_slice(name), name, tensors[name], masks.get(parameter_name(name)), cast)
    digest = _Digest()
    with torch.no_grad():
        for name in sorted(names):
            saved = file.get_tensor(name)
            digest.add(name, saved)
            if name not in tensors or name in bits:
                continue
            keep = masks.get(parameter_name(name))
            if keep is None:
                tensors[name].copy_(saved)
            else:
                tensors[name].masked_scatter_(keep, saved.to(tensors[name]))
    if rest.get("weights", digest.text) != digest.text:
        raise BadFile(f"the weights in {folder} are not those that were saved with its plan: damaged, or of another model")
    note_plan(small, plan)
    return remembered(small, rest.get("configuration"))


def _unpacked(file: Any, names: set[str], plan: Plan, base: nn.Module) -> tuple[Plan, set[str]]:
    """The plan with the masks that the file of the weights holds for it, and the names of these."""
    shapes = {parameter_name(name): tuple(tensor.shape) for name, _, _, tensor in leaf_tensors(base)}
    parts: list[Part] = []
    bits: set[str] = set()
    for part in plan.parts:
        if part.kind == "mask" and part.data is None:
            name = f"{part.name}.mask"
            if shapes.get(part.name) != plan.shapes[part.name]:
                raise BadPlan(f"the plan masks {part.name} of shape {plan.shapes[part.name]}, this model's is {shapes.get(part.name, 'not there')}")
            header = file.get_slice(name) if name in names else None
            if header is None or header.get_dtype() != "U8" or math.prod(header.get_shape()) != -(-math.prod(plan.shapes[part.name]) // 8):
                raise BadFile(f"the mask of {part.name} is not in the file of the weights, or is damaged")
            part = replace(part, data=file.get_tensor(name).numpy().tobytes())
            bits.add(name)
        parts.append(part)
    return replace(plan, parts=tuple(parts)), bits


def _applied(base: nn.Module, plan: Plan) -> nn.Module:
    try:
        return apply(base, plan)
    except GraphpruneError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadPlan(f"the plan cannot be carried out on this model ({type(error).__name__}: {error}): it was made for another, or damaged") from error


def _stored(model: nn.Module, masks: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors to keep: each once, under the first of its names; no masks, and nothing that is computed from others."""
    seen = {id(keep) for keep in masks.values()}
    for name, _, _, tensor in leaf_tensors(model):
        if id(tensor) not in seen and tensor.grad_fn is None:
            seen.add(id(tensor))
            yield name, tensor


def _loose(model: nn.Module) -> set[str]:
    """The tensors that are plain attributes, neither parameters nor buffers: a fresh model may lack what a run put there."""
    return {name for name, module, key, tensor in leaf_tensors(model) if not is_parameter(tensor) and key not in module._buffers}


def _mismatch(small: nn.Module, missing: set[str], extra: set[str]) -> None:
    """Names that are not on both sides: say which, and what it may be."""
    aliases: dict[int, list[str]] = {}
    for name, _, _, tensor in leaf_tensors(small):
        aliases.setdefault(id(tensor), []).append(name)
    for names in aliases.values():
        if len(names) > 1 and extra & set(names):
            raise BadFile(f"{' and '.join(names[:3])} are one tensor of this base and were saved as several; load into a base that does not tie them")
    if missing and not extra:
        text = f"the file holds no {sorted(missing)[0]}, which this base has ({len(missing)} missing); if it was one with another tensor, tie them first"
        raise BadFile(f"{text}; is the base of the same class, with the same settings?")
    wrong = f"{sorted(extra)[0]}, which this base does not have ({len(extra)} such, {len(missing)} missing)"
    raise BadFile(f"the file holds {wrong}; is the base of the same class, with the same settings?")


def _check_like(saved: Any, name: str, tensor: torch.Tensor, keep: torch.Tensor | None, cast: bool) -> None:
    """Is a tensor of the file, of which only the header is read, what the model has under that name?"""
    shape, kind = tuple(saved.get_shape()), saved.get_dtype()
    wanted = tuple(tensor.shape) if keep is None else (int(keep.sum()),)
    if shape != wanted:
        raise BadFile(f"{name} was saved with shape {shape}, this base, cut, has {wanted}")
    dtype = KINDS.get(tensor.dtype, str(tensor.dtype))
    if kind != dtype and not (cast and tensor.is_floating_point() and kind in FLOATS):
        raise BadFile(f"{name} was saved as {kind}, this base has {dtype} ({tensor.dtype}); convert the base first: base.to(dtype)")


class _Digest:
    """The sha256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        flat = tensor.detach().cpu().contiguous()
        self._hash.update(json.dumps([name, str(flat.dtype), list(flat.shape)]).encode())
        if flat.numel():
            self._hash.update(flat.reshape(-1).view(torch.uint8).numpy().data)

    @property
    def text(self) -> str:
        return self._hash.hexdigest()


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = _Digest()
    for name, tensor in tensors:
        digest.add(name, tensor)
    return digest.text


# As safetensors writes dtypes.
KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
}  # fmt: skip
FLOATS = {"F64", "F32", "F16", "BF16"}
