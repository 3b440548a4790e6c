"""All or nothing: :func:`undone` puts a model back as it was when changing it in place fails half-way.

>>> import torch
>>> net = nn.Linear(2, 3)
>>> with contextlib.suppress(ValueError), undone(net):
...     net.weight.data = torch.zeros(1, 2)
...     net.out_features = 1
...     raise ValueError
>>> net.weight.shape, net.out_features
(torch.Size([3, 2]), 3)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..tracing.trees import leaf_tensors, modules_of

OWN = ("_parameters", "_buffers", "_modules")


@contextmanager
def undone(model: nn.Module, edits: tuple[tuple[Any, ...], ...] = ()) -> Iterator[None]:
    """Whatever fails inside leaves modules, their tensors (by reference, not by value) and the holders of ``edits`` as they were."""
    kinds = [(module, type(module)) for _, module in modules_of(model)]
    kept = [(holder, dict(holder)) for holder in _holders(model, edits)]
    data = [(tensor, tensor.data, tensor.grad if tensor.is_leaf else None) for *_, tensor in leaf_tensors(model)]
    try:
        yield
    except BaseException:
        for module, kind in kinds:
            module.__class__ = kind
        for holder, before in kept:
            holder.clear()
            holder.update(before)
        for tensor, before, grad in data:
            tensor.data = before
            if tensor.is_leaf:
                tensor.grad = grad
        raise


def _holders(model: nn.Module, edits: tuple[tuple[Any, ...], ...]) -> Iterator[dict[Any, Any]]:
    for _, module in modules_of(model):
        yield from (module.__dict__[name] for name in OWN)
        yield module.__dict__
    for path, *keys, _ in edits:
        with contextlib.suppress(AttributeError, KeyError, IndexError, TypeError):
            inner: Any = model.get_submodule(path).__dict__
            for key in keys[:-1]:
                inner = inner[key]
                if not isinstance(inner, list | tuple):
                    inner = inner if isinstance(inner, dict) else inner.__dict__
                    yield inner
