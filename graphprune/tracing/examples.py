"""What is run: :class:`Examples`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .surroundings import apart
from .trees import replace, tensors
from .ways import Way


@dataclass(frozen=True)
class Examples:
    """What is run: an example (positional and keyword arguments), which outputs matter, and further examples."""

    example: tuple[tuple[Any, ...], dict[str, Any]]
    outputs: Any = None
    others: tuple[Any, ...] = ()
    apart: bool = False

    def called(self, model: nn.Module, swap: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[list[torch.Tensor], Callable[[], Any]]]:
        """For every example its tensors, and the call; what the model writes into its inputs is written into copies."""
        for example in (self.example, *self.others):
            if isinstance(example, Way):
                args, kwargs = replace(example.args, swap), replace(example.kwargs, swap)
                yield tensors((args, kwargs), torch.Tensor), lambda way=example, args=args, kwargs=kwargs: apart(way.run, model, args, kwargs)
            elif callable(example):
                yield [], lambda example=example: apart(example, model)
            else:
                args, kwargs = replace(example[0], swap), replace(example[1], swap)
                yield tensors((args, kwargs), torch.Tensor), lambda args=args, kwargs=kwargs: apart(model, *args, **kwargs)
