"""What torch's own Python functions call: :class:`Bodies` opens them for one run, and for nobody else.

Functions such as ``torch.nn.functional.softmax`` hand a call to the active function mode as a whole, and run their body out of its sight. A run that
wants to see inside takes the body in a copy that asks no mode first; torch itself, other threads and tensor subclasses elsewhere notice nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

SPACES = (nn.functional, torch.functional)


def _never(*_: object) -> bool:
    return False


class Bodies(dict[Any, Callable | None]):
    """Looked up by a function: the copy of its body, or None where there is nothing to open.

    >>> bodies = Bodies()
    >>> bodies[nn.functional.softmax] is nn.functional.softmax, bodies[torch.relu]
    (False, None)
    """

    def __init__(self) -> None:
        super().__init__()
        self.spaces: dict[int, dict[str, Any]] = {}  # the globals of the copies, by the id of those that they stand for

    def __missing__(self, function: Any) -> Callable[..., Any] | None:
        self[function] = copy = self._copy(function) if type(function) is FunctionType else None
        return copy

    def _copy(self, function: FunctionType) -> Callable[..., Any] | None:
        space = next((vars(space) for space in SPACES if vars(space) is function.__globals__), None)
        if space is None or not any(name.startswith("has_torch_function") for name in function.__code__.co_names):
            return None
        if id(space) not in self.spaces:
            self.spaces[id(space)] = {name: _never if name.startswith("has_torch_function") else value for name, value in space.items()}
        copy = FunctionType(function.__code__, self.spaces[id(space)], function.__name__, function.__defaults__, function.__closure__)
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy
