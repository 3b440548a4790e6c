"""Between numpy and torch, with the types that torch's own stubs leave open."""

from __future__ import annotations

from typing import Any, cast

import torch

from .operations.labels import Array


def tensor_of(array: Array) -> torch.Tensor:
    """A tensor over the memory of an array.

    >>> import numpy as np
    >>> tensor_of(np.arange(3))
    tensor([0, 1, 2])
    """
    return cast(Any, torch).from_numpy(array)
