"""A greedy removal as a score: choosing the lowest k units must give the first k that the greedy search removed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def in_order(order: Sequence[int], values: Sequence[float]) -> torch.Tensor:
    """Scores by unit from the units in the order of their removal and the cost of each removal.

    Costs that fall below an earlier one are raised to it, and equal ones are separated by the smallest step, so that the
    ranking is the order.

    >>> in_order([2, 0, 1], [0.5, 0.25, 1.0]).argsort().tolist()
    [2, 0, 1]
    """
    scores = np.zeros(len(order))
    floor = -np.inf
    for unit, value in zip(order, values, strict=True):
        floor = max(float(value), np.nextafter(floor, np.inf))
        scores[unit] = floor
    return torch.from_numpy(scores)
