"""Walking nests of tensors and the tensors that a module holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import BadInput, BadOption
from ..operations.notation import Value

# What most attributes of modules are: asking whether they are tensors takes longer than looking their type up.
TENSORLESS = frozenset({int, float, bool, str, type(None), OrderedDict, set})
EVERY = frozenset(nn.Module().__dict__)  # attributes that every module has: of tensors, only its parameters and buffers
HOLDERS = frozenset((list, tuple, dict))
PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


Leaf = tuple[str, nn.Module, str, torch.Tensor]  # qualified name, the module that holds it, its name there, the tensor


def tensors(tree: Any, kind: type = Value) -> list[Any]:
    """All tensors (or values) in nested tuples, lists, dictionaries and dataclasses."""
    collected: list[Any] = []
    _collect(tree, kind, collected)
    return collected


def _collect(tree: Any, kind: type, collected: list[Any]) -> None:
    holder = type(tree)
    if holder in PLAIN:
        return
    if holder is tuple or holder is list:
        for item in tree:
            if type(item) not in PLAIN:
                if isinstance(item, kind):
                    collected.append(item)
                else:
                    _collect(item, kind, collected)
    elif isinstance(tree, kind):
        collected.append(tree)
    elif isinstance(tree, (list, tuple, set)):  # noqa: UP038 (a union takes longer)
        for item in tree:
            _collect(item, kind, collected)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            _collect(item, kind, collected)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for entry in fields(tree):
            _collect(getattr(tree, entry.name, None), kind, collected)


def replace(tree: Any, swap: Any) -> Any:
    """The same nest with every tensor (or value) exchanged."""
    kind = type(tree)
    if kind in PLAIN:
        return tree
    if isinstance(tree, torch.Tensor | Value):
        return swap(tree)
    if kind is tuple or kind is list:
        return kind([item if type(item) in PLAIN else replace(item, swap) for item in tree])
    if kind is dict:
        return {key: replace(item, swap) for key, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*(replace(item, swap) for item in tree))
    return tree


def is_parameter(tensor: torch.Tensor) -> bool:
    """``isinstance(tensor, nn.Parameter)``, whose answer takes long for plain tensors."""
    return type(tensor) is not torch.Tensor and isinstance(tensor, nn.Parameter)


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, with its path: ``list(model.named_modules())`` in one walk."""
    walked: list[tuple[str, nn.Module]] = []
    _walk(model, "", set(), walked)
    return walked


def _walk(module: nn.Module, path: str, seen: set[int], walked: list[tuple[str, nn.Module]]) -> None:
    # A function inside another that calls itself would be a circle, and keep all modules until the next garbage collection.
    seen.add(id(module))
    walked.append((path, module))
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen:
            _walk(child, f"{path}.{name}" if path else name, seen, walked)


def leaf_tensors(model: nn.Module) -> Iterator[Leaf]:
    """Every tensor a model holds, by qualified name: parameters, buffers, plain attributes, and those in lists and dictionaries.

    The last have a name with brackets, ``"attn.cache[cpu]"``; a fresh model may lack them.
    """
    for prefix, module in modules_of(model):
        dot = f"{prefix}." if prefix else ""
        attributes = module.__dict__
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield dot + name, module, name, tensor
        for name, value in list(attributes.items()):
            if name in EVERY:
                continue
            kind = type(value)
            if kind in TENSORLESS:
                continue
            if kind in HOLDERS:
                if value and name[0] != "_" and (kind is dict or type(value[0]) not in PLAIN):
                    yield from [(dot + path, module, path, inner) for path, inner in _inside(value, name)]
            elif isinstance(value, torch.Tensor):
                yield dot + name, module, name, value


def _inside(holder: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested lists, tuples and dictionaries (caches), but for parameters, which belong to a module."""
    if type(holder) is not dict and type(holder[0]) in PLAIN:
        return
    pairs = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
    if type(pairs[0][1]) in PLAIN:
        return
    for key, item in pairs:
        if isinstance(item, torch.Tensor) and not isinstance(item, nn.Parameter):
            yield f"{path}[{key}]", item
        elif type(item) in HOLDERS and item:
            yield from _inside(item, f"{path}[{key}]")


def check_scope() -> None:
    """Raises :class:`~graphprune.errors.BadOption` inside of ``torch.device("meta")``, where nothing that is made has values.

    >>> with torch.device("meta"):
    ...     check_scope()
    Traceback (most recent call last):
    ...
    graphprune.errors.BadOption: tensors are made on the meta device here (torch.device("meta") around this call): leave that block first
    """
    if torch.get_default_device().type == "meta":
        raise BadOption('tensors are made on the meta device here (torch.device("meta") around this call): leave that block first')


def normal_inputs(example_input: Any, example_kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tensor, a tuple (positional) or a dict (keyword)."""
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise BadInput(f"example_kwargs is a {type(example_kwargs).__name__}; it is a dict of the keywords of the call")
    kwargs = dict(example_kwargs or {})
    if isinstance(example_input, Mapping):
        return (), {**example_input, **kwargs}
    if isinstance(example_input, tuple) and not isinstance(example_input, PackedSequence):  # which is one argument
        return example_input, kwargs
    return (example_input,), kwargs


def inner_modules(holder: Any) -> str:
    """Which modules an object holds, in words, where it holds any."""
    children = {**getattr(holder, "__dict__", {}), **getattr(holder, "__dict__", {}).get("_modules", {})}
    inner = [f".{name} ({type(value).__name__})" for name, value in children.items() if isinstance(value, nn.Module)]
    if not inner:
        return ""
    first = inner[0].partition(" ")[0]
    return f"; it holds {'one' if len(inner) == 1 else 'several'} in {', '.join(inner[:4])}: shrink that, and put it back (x{first} = shrink(x{first}, …))"
