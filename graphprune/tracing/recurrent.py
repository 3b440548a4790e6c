"""Recurrent calls: the state behind a call is the state before the next one, however many steps the example takes.

With two steps the run shows it, for the second reads what the first has written. With one, nothing but the initial state meets the weights of the state:
zeros that no weight has made.
"""

from __future__ import annotations

from typing import Any

import torch

from ..operations.labels import Reason
from ..operations.notation import meet
from ..operations.record import pointwise
from .record import Recorder
from .trees import tensors

RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})  # calls of many layers and steps
STATEFUL = RECURRENT | {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}


def hand_on(recorder: Recorder, args: tuple[Any, ...], results: list[torch.Tensor]) -> None:
    """Join the axes of every state that a recurrent call was given with those of the state that it returns."""
    before = next(states for arg in args[1:] if (states := [t for t in tensors((arg,), torch.Tensor) if t.is_floating_point()]))
    place = Reason("the state of a recurrent layer keeps its size", module=recorder.stack[-1] if recorder.stack else "", where=recorder.place())
    for state, after in zip(before, results[len(results) - len(before) :], strict=True):
        one, other = recorder.value(state), recorder.value(after)
        if one.shape == other.shape and (one.fields or other.fields):
            meet(recorder.labels, pointwise([one, other], [len(one.shape)]), [one.shape], recorder.labels.reason(place))
