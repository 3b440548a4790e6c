"""What the Python code of a model calls: :class:`Functions` gives out sizes that remember, writes down the calls that use them, and the steps of the run.

Below it, :class:`~graphprune.tracing.record.Recorder` sees the ATen calls that these are made of.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..operations.labels import Reason
from .bodies import Bodies
from .fused import attention, unfused
from .graph import Step
from .needs import Call, calls_of, sized, sizes_in
from .record import CPU, HERE, META, Recorder
from .recurrent import RECURRENT, STATEFUL, hand_on
from .sizes import Size
from .trees import replace, tensors

# What asks a tensor for a property: these calls are no steps of the model.
UNSTEPPED = frozenset("__get__ size dim numel __len__ is_floating_point is_complex stride data_ptr element_size get_device".split())

# Recurrent calls want their first state, that has values here, where the weights lie. A run with values shows what a processor
# does (the gates of all steps at once), but not what they are made of on a GPU: that one has kernels of its own, which nothing sees into.
FUSED = RECURRENT | {"scaled_dot_product_attention", "scaled_dot_product_attention.default"}


def _batch_norm(*args: Any) -> torch.Tensor:
    return torch.native_batch_norm(*args[:8])[0]


def _deep_copy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    return memo.setdefault(id(tensor), tensor.clone())


# What a function does in one call, where torch's way to it makes several, or takes the memory for it.
DIRECT: dict[Any, Callable[..., Any]] = {torch.batch_norm: _batch_norm, torch.Tensor.__deepcopy__: _deep_copy}
PASS, SHAPE, GET, SIZE, NUMEL, TENSOR, PLAIN, LEAVES, MEMORY, ADDRESS, DATA, DEVICE, CALL = range(13)
# Calls by their name: those that give out sizes, those that give plain numbers made of them, those by which values leave torch, also with the memory that
# they lie in, or that say where that is (a tensor without values has none, and torch's own code that asks for it does not expect that).
KINDS = {"size": SIZE, "numel": NUMEL, "tensor": TENSOR, "__len__": PLAIN, "stride": PLAIN, "numpy": LEAVES, "tolist": LEAVES, "__array__": LEAVES}
KINDS |= {"storage": MEMORY, "untyped_storage": MEMORY, "_typed_storage": MEMORY, "__reduce_ex__": MEMORY, "__dlpack__": MEMORY, "data_ptr": ADDRESS}
PROPERTIES = {("__get__", torch.Tensor.shape): SHAPE, ("__get__", torch.Tensor.nbytes): PLAIN}
PROPERTIES |= {("__set__", torch.Tensor.data): DATA, ("__get__", torch.Tensor.device): DEVICE, ("__get__", torch.Tensor.is_cpu): DEVICE}
ANSWERS = {torch.Tensor.device: CPU, torch.Tensor.is_cpu: True}  # of a model on the processor


@lru_cache(maxsize=4096)
def kind_of(func: Any) -> tuple[int, str, bool]:
    """What to do about a function (nothing for most), its name, and whether it is a step of the model."""
    name = getattr(func, "__name__", "")
    if name == "__get__" or name == "__set__":
        return PROPERTIES.get((name, getattr(func, "__self__", None)), GET), name, False
    kind = KINDS.get(name, CALL if sized(name) else PASS)
    return kind, name, name not in UNSTEPPED


def floating(operands: list[torch.Tensor]) -> bool:
    """Whether a call on these works on activations, not only on positions and masks (which depend on the number of samples in some models)."""
    for tensor in operands:
        if tensor.is_floating_point() or tensor.is_complex():
            return True
    return False


def indexed(index: Any) -> Any:
    """Lists of positions as tensors with values; torch itself would make them where the indexed tensor lies, which may hold none."""
    if isinstance(index, tuple):
        return tuple([indexed(part) for part in index])
    return torch.tensor(index, device="cpu") if type(index) is list and index and all(type(entry) in (int, bool) for entry in index) else index


class Functions(TorchFunctionMode):
    """Sees what the Python code asks for: gives out sizes that remember, and writes down calls that use them."""

    def __init__(self, recorder: Recorder, calls: list[Call], away: bool, home: bool = False) -> None:
        super().__init__()
        self.away = away  # the model lies on another device than the processor
        self.home = home  # it lies on the processor
        self.recorder, self.calls = recorder, calls
        self.bodies = Bodies()
        self.steps: list[Step] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        kind, name, step = kind_of(func)
        body = self.bodies[func]
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if kind == TENSOR and str(kwargs.get("device", "")) == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}  # written-out values stay real
        if kind == MEMORY or kind == ADDRESS:
            if sys._getframe(1).f_code.co_filename.startswith(HERE):
                return func(*args, **kwargs)  # the recorder asks, not the model
            if args[0].is_meta:
                raise TypeError(f"{name} is asked of a tensor that has no values in this run")
        since = self.recorder.counted
        result = self.stepped(func, name, args, kwargs) if step else func(*args, **kwargs)
        return self.returned(kind, func, name, args, kwargs, result, since)

    def returned(self, kind: int, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, since: int) -> Any:
        """The result of a call for the code that made it, once the sizes that it was given are noted."""
        if kind == PASS or kind == TENSOR:
            sizes = sizes_in(args, kwargs)
            if sizes:
                self.recorder.uses.floats.extend([size.expr for size in sizes])
            return result
        if kind == CALL:
            calls_of(self.calls, self.recorder, name, args, kwargs, result, self.recorder.stack[-1] if self.recorder.stack else "", since)
            return result
        return result if kind == GET else self.answered(kind, func, name, args, kwargs, result)

    def answered(self, kind: int, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """What the code is told that asks for a size, a device or values."""
        if kind == DEVICE:
            return ANSWERS[func.__self__] if self.home and args[0].is_meta else result  # code that asks takes the path that it takes with values
        if kind == SHAPE:
            return self.sizes(args[0], result)
        if kind == SIZE and args:
            sizes = self.sizes(args[0], args[0].size())
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return sizes if dim is None else sizes[dim]
        if kind == NUMEL:
            return math.prod(self.sizes(args[0], args[0].size()))
        if kind == PLAIN:
            self.doubted(args[0], 1 if name == "__len__" else args[0].ndim)
        elif kind == LEAVES or kind == MEMORY:
            self.leave(args[0], name)
        elif kind == DATA:
            self.recorder.values[id(args[0])] = self.recorder.value(args[1])
        return result

    def doubted(self, tensor: torch.Tensor, rank: int) -> None:
        """A plain number was made of the first entries of the shape."""
        for size in self.sizes(tensor, tensor.size())[:rank]:
            if type(size) is Size:
                self.recorder.uses.doubt(size.expr)

    def leave(self, tensor: torch.Tensor, name: str) -> None:
        """Values that leave torch: what becomes of them cannot be followed, so what they belong to stays whole."""
        value = self.recorder.value(tensor)
        self.recorder.read.add(id(value))
        module = self.recorder.stack[-1] if self.recorder.stack else ""
        reason = self.recorder.labels.reason(Reason("its values leave torch", name, module, self.recorder.place()))
        for array in value.fields:
            self.recorder.labels.lock(array, reason)

    def stepped(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = self.recorder.values
        operands = tensors((args, kwargs) if kwargs else args, torch.Tensor)
        values = tuple([known.get(id(tensor)) for tensor in operands])
        floats = floating(operands)
        self.recorder.step = len(self.steps)
        if name == "__getitem__" or name == "__setitem__":
            args = (args[0], indexed(args[1]), *args[2:])
        if self.away and name in RECURRENT and any(tensor.is_meta for tensor in operands):
            args, kwargs = replace((args, kwargs), self.valueless)
        result = self.plainly(func, name, args, kwargs, operands)
        self.recorder.step = -1
        results = [result] if isinstance(result, torch.Tensor) else tensors(result, torch.Tensor)
        if name in STATEFUL:
            hand_on(self.recorder, args, results)
        self.steps.append(Step(name, values, tuple([known.get(id(tensor)) for tensor in results]), floats or floating(results)))
        return result

    def plainly(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[torch.Tensor]) -> Any:
        """The call, without kernels that do many operations in one."""
        if name in FUSED and not any(tensor.is_meta for tensor in operands):
            if name not in RECURRENT:
                return attention(*args, **kwargs)
            with unfused():
                return func(*args, **kwargs)
        return DIRECT.get(func, func)(*args, **kwargs)

    def valueless(self, tensor: torch.Tensor) -> torch.Tensor:
        """A floating tensor on the meta device, known as what it was."""
        if tensor.is_meta or not tensor.is_floating_point():
            return tensor
        with _disable_current_modes():
            twin = tensor.detach().to(META)
        self.recorder.values[id(twin)] = self.recorder.value(tensor)
        self.recorder.alive.append(twin)
        return twin

    def sizes(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        value = self.recorder.values.get(id(tensor))
        if value is None or not value.fields:
            return shape
        moving = {axis for entries in value.fields for axis, n in enumerate(entries.shape) if n > 1}
        return torch.Size([Size(n, ("dim", value, i), self.recorder.uses) if i in moving else n for i, n in enumerate(shape)])
