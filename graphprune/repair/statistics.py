"""Batch-norm statistics measured anew, exactly: mean and variance of every norm's input, norm after norm.

Each is the two-pass result over all calibration, with every earlier norm already using its own new statistics, in evaluation mode
(no dropout, no momentum, no mean of batch variances): what EagleEye (Li et al. 2020) approximates in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import nn

from ..errors import BadCalibration
from ..tracing.graph import Graph
from ..tracing.paced import runs, side_by_side
from ..tracing.trees import leaf_tensors
from .sites import norms

Tensor = torch.Tensor
Sums = tuple[int, Tensor, Tensor]


def sums(tensor: Tensor) -> Sums:
    """Count, mean and centred sum of squares of every channel (axis 1), in float64."""
    rows = tensor.detach().transpose(0, 1).flatten(1)
    mean = rows.mean(1, dtype=torch.float64)
    return rows.shape[1], mean, (rows.double() - mean[:, None]).square().sum(1)


def join(one: Sums, two: Sums) -> Sums:
    """The sums of both together (Chan, Golub and LeVeque 1983)."""
    total = one[0] + two[0]
    gap = two[1] - one[1]
    return total, one[1] + gap * two[0] / total, one[2] + two[2] + gap.square() * one[0] * two[0] / total


def reestimate(model: nn.Module, graph: Graph, batches: Sequence[Any], waiting: float = 1.0) -> int:
    """Set the statistics of every batch norm of ``model`` (in evaluation mode) to those of the batches; how many there were. ``waiting``: see :func:`runs`."""
    held = {name: tensor for name, _, _, tensor in leaf_tensors(model)}
    places = norms(graph)
    takes = {id(norm.x): (norm.x, sums) for _, norm in places}
    every = runs(model, graph, batches, takes, waiting)
    with side_by_side(every), torch.no_grad():
        for _, norm in places:
            count, mean, square = reduce(join, (run.until(norm.x) for run in every))
            if not bool(torch.isfinite(mean).all() and torch.isfinite(square).all()):
                raise BadCalibration(f"calibration gives values that are not finite at {norm.mean}; look at the batches and at the model before it")
            if count < 2 or math.isnan(count):
                raise BadCalibration(f"one value per channel at {norm.mean}; a variance needs more calibration")
            held[norm.mean].copy_(mean)
            held[norm.var].copy_(square / (count - 1))
    return len(places)
