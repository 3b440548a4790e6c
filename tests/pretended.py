"""A device that is not there: tensors of a type "pretended" that compute on the processor and, like those of a GPU, meet no tensor of another device.

Where a machine has no GPU, this shows code that mixes devices. Kernels, clocks, streams and rounding of a GPU it does not show.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch knows of the device; not available, so that nothing goes there by itself."""

    def is_available(self) -> bool:
        return False


_setup_privateuseone_for_python_backend("pretended", Backend())
DEVICE = torch.device("pretended:0")
MOVES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # positions may lie on the processor


class Away(torch.Tensor):
    """A tensor on the pretended device; ``held`` is what the processor holds for it."""

    __slots__ = ("held",)  # not among the attributes, which are carried from tensor to tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Away:
        facts = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": DEVICE}
        away = torch.Tensor._make_wrapper_subclass(cls, held.shape, **facts)
        away.held = held
        return away

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, value: Away) -> None:
        torch._C.TensorBase.data.__set__(self, value)
        self.held = value.held

    def __repr__(self) -> str:
        return f"Away({self.held})"


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """The call on the processor; refused where tensors of both sides meet, but for single numbers and positions."""
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    away = {id(value.held): value for value in given if isinstance(value, Away)}
    name = func._schema.name
    strangers = [value for value in given if not isinstance(value, Away) and value.ndim]
    if away and strangers and name not in MOVES:
        places = [id(value) for group in args[1:2] if isinstance(group, (list, tuple)) for value in group] if name in INDEXING else []
        if any(id(value) not in places for value in strangers) or not isinstance(args[0], Away):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found one on {DEVICE} and one on {strangers[0].device} in {name}")
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    device = kwargs.get("device")
    if name == "aten::copy_":
        return args[0]
    if name == "aten::_local_scalar_dense" or (device is not None and device.type != DEVICE.type):
        return result
    return tree_map(lambda value: (away[id(value)] if id(value) in away else Away(value)) if isinstance(value, torch.Tensor) else value, result)


def _here(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == DEVICE.type:
        return torch.device("cpu")
    return value.held if isinstance(value, Away) else value


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> torch.Tensor:
    return Away(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return Away(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(one: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _here(to).copy_(_here(one))
    return to


LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
