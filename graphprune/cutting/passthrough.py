"""Modules that are gone: :class:`Passthrough` stands where one was, holds nothing, and hands on what it was given.

>>> gone = Passthrough(nn.Linear(2, 2), source=0)
>>> float(gone(torch.ones(1))), list(gone.parameters())
(1.0, [])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import BadPlan
from .parts import Part


class Passthrough(nn.Module):
    """Returns the argument ``source`` (a position or a keyword), or zeros of its shape, in the form the module had.

    ``form`` is ``()`` for a tensor, or ``(kind, length, place, handed on)`` for a "tuple" or "list": at ``place`` stands the tensor, at the places of the
    pairs ``handed on`` an argument (by position or keyword) as it is, and None everywhere else.
    Plain attributes of the module that was here (numbers, strings) can still be read, since parents look at them; what it
    held is None.
    """

    def __init__(self, was: nn.Module, source: int | str, form: tuple[Any, ...] = (), zero: bool = False) -> None:
        super().__init__()
        kept = {k: v for k, v in was.__dict__.items() if not k.startswith("_") and isinstance(v, int | float | str | None)}
        self.__dict__.update(kept)
        for name in (*was._parameters, *was._buffers, *was._modules):
            self.register_parameter(name, None)  # a parent that asks sees that it is gone
        self.was, self.source, self.form, self.zero = type(was).__name__, source, form, zero

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = lambda source: args[source] if isinstance(source, int) else kwargs[source]  # noqa: E731
        value = torch.zeros_like(given(self.source)) if self.zero else given(self.source)
        if not self.form:
            return value
        kind, length, place, *handed = self.form
        out = [None] * length
        out[place] = value
        for at, source in handed[0] if handed else ():
            out[at] = given(source)
        return tuple(out) if kind == "tuple" else out

    def extra_repr(self) -> str:
        return f"was {self.was}" + (", gives zeros" if self.zero else "")


class PassingOver(nn.ModuleList):
    """A list that gives out the modules that are there, in their order, and counts these alone; names stay what they were.

    >>> rest = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])
    >>> rest[0], rest.__class__ = Passthrough(rest[0], 0), PassingOver
    >>> len(rest), rest[0].out_features, [name for name, _ in rest.named_parameters()]
    (1, 3, ['1.weight', '1.bias'])
    """

    passes_over = True

    def keys_there(self) -> list[str]:
        """The names of the modules that are there."""
        return [key for key, child in self._modules.items() if not isinstance(child, Passthrough)]

    def _get_abs_string_index(self, idx: Any) -> str:
        return self.keys_there()[int(super()._get_abs_string_index(idx))]

    def __len__(self) -> int:
        return len(self.keys_there())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([child for child in self._modules.values() if child is not None and not isinstance(child, Passthrough)])

    def __getitem__(self, idx: Any) -> Any:
        return nn.ModuleList(list(self)[idx]) if isinstance(idx, slice) else super().__getitem__(idx)


def check_skip(model: nn.Module, part: Part, shape: tuple[int, ...]) -> None:
    """Is there a module for a plan's ``skip`` part?"""
    path, _, name = part.name.rpartition(".")
    try:
        model.get_submodule(path)._modules[name]
    except (AttributeError, KeyError) as error:
        raise BadPlan(f"the plan removes {part.name}, which this model does not have") from error


def apply_skips(model: nn.Module, parts: Sequence[Part]) -> None:
    """Do what a plan's ``skip`` parts say, in one walk: the modules' parameters leave the model."""
    gone: dict[int, nn.Module] = {}
    for part in parts:
        was = model.get_submodule(part.name)
        source, form, zero = part.data
        gone[id(was)] = Passthrough(was, source, tuple(form), bool(zero)).train(was.training)
    for module in list(model.modules()) if gone else ():
        for key, child in module._modules.items():
            if id(child) in gone:
                module._modules[key] = gone[id(child)]


def check_expert(model: nn.Module, part: Part, shape: tuple[int, ...]) -> None:
    """Is there a list with such a module?"""
    path, _, key = part.name.rpartition(".")
    try:
        holder = model.get_submodule(path)
        known = key in holder._modules
    except AttributeError:
        known = False
    if not known or type(holder) not in (nn.ModuleList, PassingOver):
        raise BadPlan(f"the plan removes the expert {part.name}, which is no module of a list of this model")


def apply_experts(model: nn.Module, parts: Sequence[Part]) -> None:
    """Do what a plan's ``expert`` parts say: the modules leave their lists, which pass over them."""
    for part in parts:
        path, _, key = part.name.rpartition(".")
        holder = model.get_submodule(path)
        was = holder._modules[key]
        assert was is not None
        holder._modules[key] = was if isinstance(was, Passthrough) else Passthrough(was, 0).train(was.training)
        holder.__class__ = PassingOver


def passed(part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """What the oracle's hook returns in place of a module's output: its own input, or zeros.

    >>> passed(Part("skip", "block", (0, (), False)), (1,), {}, None)
    1
    """
    source, form, zero = part.data
    value = args[source] if isinstance(source, int) else kwargs[source]
    value = torch.zeros_like(value) if zero else value
    return type(out)(value if i == form[2] else item for i, item in enumerate(out)) if form else value
