"""What the run on the example did not need: calls whose result reaches nothing, and weights that no call reads.

A call whose result reaches no output asks nothing of its operands that cutting could break, if it runs at any size (a
position at an end, a slice): :func:`forget` takes back the locks it made. Weights that only training reads (auxiliary
heads) are reached by a second run in training mode; :func:`hold` leaves whole what no run reads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..operations.labels import Reason
from ..operations.notation import Value
from .node import Node
from .record import Recorder
from .trees import tensors


def forget(recorder: Recorder, outputs: list[Value]) -> None:
    """Take back the locks of calls that reach no output and that run whatever the sizes."""
    wanted = {id(value) for value in outputs} | recorder.read
    held: list[tuple[int, int]] = []
    for node, (start, end) in zip(reversed(recorder.nodes), reversed(recorder.spans), strict=True):
        if node.op.writes or any(id(value) in wanted for value in node.outs):
            wanted.update(map(id, node.held))
        elif end > start and node.op.any_size is not None and node.op.any_size(*node.args, **node.kwargs):
            held.append((start, end))
    for start, end in held:  # from the last to the first
        del recorder.labels.locks[start:end]


def unread(recorder: Recorder, nodes: list[Node]) -> list[str]:
    """The leaves (by name) that no call reads, no output is, and no number was taken from."""
    used = {value.leaf for node in nodes for value in node.held if value.leaf}
    return [name for name, value in recorder.leaves.items() if name not in used and id(value) not in recorder.read and value.fields]


def hold(recorder: Recorder, names: list[str]) -> None:
    """Leave whole what no run reads: nobody knows what it would have to fit."""
    if names:
        reason = recorder.labels.reason(Reason("not used in the run on the example"))
        for name in names:
            for field in recorder.leaves[name].fields:
                recorder.labels.lock(field, reason)


@contextmanager
def same_dice() -> Iterator[None]:
    """Random numbers drawn inside are not missed outside."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


def train_run(recorder: Recorder, model: Any, call: Callable[[], Any]) -> list[Value]:
    """Run once more in training mode, for what it asks of the labels; its calls are no part of the graph. Returns its outputs."""
    kept, spans, recorder.nodes, recorder.spans = recorder.nodes, recorder.spans, [], []
    try:
        with same_dice():
            model.train()
            return [recorder.value(tensor) for tensor in tensors(call(), torch.Tensor)]
    except Exception as error:  # training needs more than the example (targets, a larger batch): what is known by now holds
        _stopped(recorder, kept, error)
        return []
    finally:
        for node in recorder.nodes:
            for value in node.outs:
                value.node = -1
        recorder.extra, recorder.nodes, recorder.spans, recorder.step = recorder.nodes, kept, spans, -1


def _stopped(recorder: Recorder, before: list[Node], error: Exception) -> None:
    """Leave whole what a run that failed had made of weights that only training reads, and had still to read.

    The call that failed may have been its reader (a batch norm that wants more than one value), and what that asks is not known.
    """
    made = {id(recorder.leaves[name]) for name in unread(recorder, before)}
    read = {id(value) for node in recorder.nodes for value in node.held}
    reason = recorder.labels.reason(Reason(f"not known in training, which stops there on the example ({type(error).__name__})"))
    for node in recorder.nodes:
        if not any(id(value) in made for value in node.held):
            continue
        made.update(map(id, node.outs))
        for value in node.outs:
            if id(value) not in read and value.dtype.is_floating_point:
                for field in value.fields:
                    recorder.labels.lock(field, reason)
