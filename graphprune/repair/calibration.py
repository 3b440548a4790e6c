"""Calibration as it comes: which batches fit and which judge, one sample as an example, and how much of a run may wait in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BadCalibration, GraphpruneError, warn
from ..scores.data import brought, given
from ..scores.data import samples as count
from ..tracing.probe import batch_inputs
from ..tracing.trees import leaf_tensors, tensors
from ..tracing.trees import replace as exchange

LIMIT = 3 * 2**30  # bytes of activations that may wait in the middle of a network; a quarter of the memory where that is more


def listed(calibration: Iterable[Any] | None, model: nn.Module) -> list[Any]:
    """The batches, on the device of the model; raises :class:`~graphprune.errors.BadCalibration` where there are none, or values are not finite."""
    if isinstance(calibration, torch.Tensor | str | dict) or not isinstance(calibration, Iterable):
        kind = type(calibration).__name__
        single = ": write repair=[batch]" if isinstance(calibration, torch.Tensor | dict) else ""
        raise BadCalibration(f"what a repair learns from is an iterable of batches, such as repair=[x1, x2] or a DataLoader; it is a {kind}{single}")
    batches = [brought(batch, model) for batch in calibration]
    if not batches:
        raise BadCalibration("calibration is empty (a used-up iterator?); give at least one batch")
    for index, batch in enumerate(batches):
        if not count(batch):
            raise BadCalibration(f"calibration batch {index} holds no samples; leave it out")
        if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors(batch_inputs(batch), torch.Tensor)):
            raise BadCalibration(f"calibration batch {index} holds values that are not finite")
    return batches


def parts(batches: list[Any], spare: float) -> tuple[list[Any], list[Any]]:
    """The batches for the fits and those kept out; one batch alone is parted by samples."""
    if spare <= 0:
        return batches, []
    if len(batches) > 1:
        count = max(1, round(spare * len(batches)))
        return batches[:-count], batches[-count:]
    args, kwargs = batch_inputs(batches[0])
    size = samples((args, kwargs)) or 1
    if size < 2:
        warn("one calibration sample: nothing can be kept out, repairs are judged on it itself")
        return batches, []
    at = size - max(1, round(spare * size))
    pieces = [exchange((args, kwargs), lambda t, part=part: t[part] if t.ndim else t) for part in (slice(at), slice(at, size))]
    return [_batch(pieces[0])], [_batch(pieces[1])]


def _batch(piece: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = piece
    return (args, None) if args else kwargs


@contextmanager
def running(batch: Any = ()) -> Iterator[None]:
    """What goes wrong where a model runs on calibration, as an error that says so."""
    try:
        yield
    except GraphpruneError:
        raise
    except Exception as error:
        text = f"a calibration batch does not fit the model: {type(error).__name__}: {str(error)[:500]}"
        raise BadCalibration(f"{text}{given(tensors(batch, torch.Tensor))}") from error


def example(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One sample of a batch, or the whole batch where its tensors do not share a first length."""
    args, kwargs = batch_inputs(batch)
    return exchange((args, kwargs), lambda t: t[:1] if t.ndim else t) if samples((args, kwargs)) else (args, kwargs)


def samples(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> int | None:
    """The first length that all tensors share; None where they share none."""
    sizes = {len(t) for t in tensors(inputs, torch.Tensor) if t.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def waiting(model: nn.Module, batches: list[Any]) -> float:
    """The share of all activations in the middle of a network that fits into memory, 1 where all do."""
    return min(1.0, _memory(model) / _held(model, batches))


def _memory(model: nn.Module) -> int:
    """Bytes that activations may wait in, where the model lies: a quarter of what there is."""
    device = next((tensor.device for *_, tensor in leaf_tensors(model)), torch.device("cpu"))
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else LIMIT
    sizes = []
    try:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # a container may have less than its machine
    except (AttributeError, ValueError, OSError):  # not every system says, and "max" is no limit
        pass
    return min(sizes, default=4 * LIMIT) // 4


def _held(model: nn.Module, batches: list[Any]) -> int:
    """A bound, from the modules of one sample, on the bytes that wait when all batches stand in the middle of the network."""
    largest = [0]

    def see(_: nn.Module, __: Any, out: Any) -> None:
        sizes = [t.numel() * t.element_size() for t in tensors(out, torch.Tensor)]
        largest[0] = max(largest[0], *sizes, 0)

    hooks = [module.register_forward_hook(see) for module in model.modules()]
    try:
        args, kwargs = example(batches[0])
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, largest[0] * sum(map(count, batches)) * 8)  # a few tensors are alive in each of two models
