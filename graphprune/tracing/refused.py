"""A model that fails on its example, run by nobody but torch: :func:`fails` says so, and what about the example may be wrong.

>>> fails(nn.Linear(2, 3), ((torch.zeros(1, 2),), {}))
>>> fails(nn.Linear(2, 3), (((1, 2),), {}))
Traceback (most recent call last):
graphprune.errors.BadInput: the model does not run on the example input: TypeError: linear(): argument 'input' (position 1) must be Tensor, not tuple
Call model(example_input) yourself; pass a tuple for positional and a dict for keyword arguments.
The example looks like a shape; give a tensor: torch.randn(1, 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import BadInput
from .dice import same_dice
from .record import HERE, TORCH
from .shadow import shadow
from .surroundings import apart, undisturbed_surroundings
from .trees import inner_modules, replace, tensors

NOT_RUN = (
    "the model does not run on the example input: {}: {}\nCall model(example_input) yourself; pass a tuple for positional and a dict for keyword arguments."
)


def fails(model: nn.Module, example: Any, training: bool = False) -> None:
    """Raises :class:`~graphprune.errors.BadInput` if the model itself fails on an example, run by nobody but torch."""
    try:
        with torch.no_grad(), same_dice(), undisturbed_surroundings(model):
            twin = shadow(model, real=True)[0]
            twin = twin.train() if training else twin
            if callable(example):
                apart(example, twin)
            else:
                args, kwargs = (replace(part, lambda tensor: tensor.detach().clone()) for part in example)
                apart(twin, *args, **kwargs)
    except Exception as error:
        odd = _odd(example)
        said = str(error).partition("\n")[0] if odd else error
        inner = inner_modules(model) if isinstance(error, NotImplementedError) else ""
        hint = f" {type(model).__name__} has no forward of its own{inner}" if inner else odd
        raise BadInput(NOT_RUN.format(type(error).__name__, said) + hint) from error


def _odd(example: Any) -> str:
    """What an example that the model refuses looks like, where that says how to mend it: a shape, arrays of numpy, a list."""
    if callable(example):
        return ""
    args, kwargs = example
    values = [*args, *kwargs.values()]
    shape = args[0] if len(args) == 1 and isinstance(args[0], Sequence | torch.Size) else args
    if shape and not isinstance(shape, str) and all(type(each) is int for each in shape):
        return f"\nThe example looks like a shape; give a tensor: torch.randn({', '.join(map(str, shape))})."
    foreign = next((each for each in values if hasattr(each, "__array__") and not isinstance(each, torch.Tensor)), None)
    if foreign is not None:
        return f"\nThe example holds a {type(foreign).__module__}.{type(foreign).__name__}; give a tensor: torch.as_tensor(...)."
    if len(args) == 1 and isinstance(args[0], list) and tensors(args[0], torch.Tensor):
        return "\nThe example is a list, which is one argument; a tuple is several: tuple(example_input), and one tensor alone is given as it is."
    return ""


def raised_at(error: BaseException) -> tuple[str, int] | None:
    """The innermost place in the user's code at which an error was raised."""
    place, frames = None, error.__traceback__
    while frames:
        file = frames.tb_frame.f_code.co_filename
        if not file.startswith((HERE, TORCH)) and file[:1] not in ("", "<"):
            place = file, frames.tb_lineno
        frames = frames.tb_next
    return place
