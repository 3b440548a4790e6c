"""A model that runs on real batches without its weights in memory: :func:`resident`.

The weights of a block are read as it is entered, and dropped when others are.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..formats.rebuilt import configured, unfilled
from ..tracing.copies import duplicate
from ..tracing.probe import unwatched
from .stored import FromFiles

Tensor = torch.Tensor
BLOCKS = 2  # whose weights are in memory: the one that runs, and the one that the next run begins in
LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@contextmanager
def resident(model: nn.Module, stored: FromFiles) -> Iterator[nn.Module]:
    """A twin of ``model``, which is on the meta device; its tables and other tensors that no file holds are computed."""
    twin = _with_tables(model)
    weights = _Weights(stored)
    handles = []
    try:
        for path, module in _blocks(twin):
            handles.append(module.register_forward_pre_hook(weights.entered(path)))
            handles.append(module.register_forward_hook(weights.gone(path), always_call=True))
        yield twin
    finally:
        for handle in handles:
            handle.remove()


class _Weights:
    """The blocks whose weights are in memory, and how many runs are inside each: those that a run is inside of stay."""

    def __init__(self, stored: FromFiles) -> None:
        self.stored = stored
        self.held: OrderedDict[str, tuple[nn.Module, dict[str, Tensor]]] = OrderedDict()
        self.inside: Counter[str] = Counter()

    def entered(self, path: str) -> Any:
        def read(module: nn.Module, *_: Any) -> None:
            self.inside[path] += 1
            if path in self.held:
                self.held.move_to_end(path)
                return
            with unwatched():
                self.read(path, module)

        return read

    def read(self, path: str, module: nn.Module) -> None:
        idle = [name for name in self.held if not self.inside[name]]
        for name in idle[: max(0, len(self.held) - BLOCKS + 1)]:
            old, tensors = self.held.pop(name)
            _put(old, {own: tensor.to("meta") for own, tensor in tensors.items()})
        self.held[path] = module, {name: self.stored.tensor(f"{path}.{name}" if path else name) for name in _names(module)}
        _put(module, self.held[path][1])

    def gone(self, path: str) -> Any:
        def left(*_: Any) -> None:
            self.inside[path] -= 1

        return left


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The entries of lists of modules, and the modules with tensors of their own outside of them."""
    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:
        path, module = todo.pop()
        if any(True for _ in _own(module)):
            yield path, module
            continue
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if isinstance(module, LISTS) and any(True for _ in child.parameters()):
                yield inner, child
            else:
                todo.append((inner, child))


def _own(module: nn.Module) -> Iterator[str]:
    return (name for name, tensor in module._parameters.items() if tensor is not None)


def _names(module: nn.Module) -> list[str]:
    """The parameters and lasting buffers of a block, under every name that they have in it."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    return [name for name, tensor in tensors.items() if tensor.is_meta]


def _put(block: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        module = block.get_submodule(path)
        if own in module._parameters:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[own] = tensor


def _with_tables(model: nn.Module) -> nn.Module:
    twin = duplicate(model, {})
    if configured(model):
        tables = dict(unfilled(model).named_buffers(remove_duplicate=False))
        for name, buffer in list(twin.named_buffers(remove_duplicate=False)):
            if name in tables and not tables[name].is_meta:
                path, _, own = name.rpartition(".")
                twin.get_submodule(path)._buffers[own] = tables[name].to(buffer.dtype) if buffer.is_floating_point() else tables[name]
    return twin.eval()
