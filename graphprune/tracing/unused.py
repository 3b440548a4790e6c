"""What the run on the example did not need: calls whose result reaches nothing, and weights that no call reads.

A call whose result reaches no output asks nothing of its operands that cutting could break, if it runs at any size (a
position at an end, a slice): :func:`forget` takes back the locks it made. Weights that only training reads (auxiliary
heads) are reached by a second run in training mode; :func:`hold` leaves whole what no run reads.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

import torch

from ..errors import UnknownName
from ..operations.labels import Reason
from ..operations.notation import Value
from .dice import same_dice
from .foreign import foreign, methods, named
from .node import Node
from .outputs import items, selected
from .record import Recorder


def forget(recorder: Recorder, outputs: list[Value]) -> None:
    """Take back the locks of calls that reach no output and that run whatever the sizes."""
    wanted = {id(value) for value in outputs} | recorder.read
    spans: list[tuple[int, int]] = []
    for node, (start, end) in zip(reversed(recorder.nodes), reversed(recorder.spans), strict=True):
        if node.op.writes or any(id(value) in wanted for value in node.outs):
            wanted.update(map(id, node.held))
        elif end > start and node.op.any_size is not None and node.op.any_size(*node.args, **node.kwargs):
            spans.append((start, end))
    for start, end in spans:  # from the last to the first
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


def more_run(recorder: Recorder, call: Callable[[], Any], outputs: Any, state: frozenset[str] = frozenset()) -> list[Value]:
    """Run another example, for what it asks of the labels; its calls are no part of the graph. Returns its outputs, but for the parts of ``state``."""
    kept, spans, recorder.nodes, recorder.spans = recorder.nodes, recorder.spans, [], []
    recorder.earlier = len(kept) + len(recorder.extra)
    try:
        with same_dice():
            returned = [item for item in items(call()) if item[0].partition(".")[0] not in state]
            try:
                returned = selected(returned, outputs)
            except UnknownName:  # another result than that of the example: all of it matters
                pass
            outputs = [recorder.value(item) for _, item in returned if isinstance(item, torch.Tensor)]
        forget(recorder, outputs)
        return outputs
    finally:
        for node in recorder.nodes:
            for value in node.outs:
                value.node = -1
        recorder.further.append(recorder.nodes)
        recorder.earlier = 0
        recorder.extra, recorder.nodes, recorder.spans, recorder.step = recorder.extra + recorder.nodes, kept, spans, -1


def train_run(recorder: Recorder, call: Callable[[], Any], outputs: Any, state: frozenset[str] = frozenset()) -> list[Value]:
    """:func:`more_run` in training mode, which may need more than the example (targets, a larger batch): where it stops, what is known by now holds."""
    try:
        return more_run(recorder, call, outputs, state)
    except Exception as error:
        recorder.stopped = True
        _stopped(recorder, recorder.nodes, error)
        return []


def reads_mode(modules: list[tuple[str, Any]]) -> bool:
    """Whether code other than torch's own asks for ``training``: then it may do something else there."""
    todo = [item for _, module in modules for item in module.__dict__.values() if isinstance(item, FunctionType)]
    for kind in {type(module) for _, module in modules}:
        todo += [method for base in kind.__mro__ if not foreign(base) for method in methods(base)]
    seen: set[CodeType] = set()
    while todo:
        function = todo.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        names = named(function.__code__)
        if "training" in names and function.__name__ not in ("train", "eval"):
            return True
        helpers = [function.__globals__.get(name) for name in names]
        helpers += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        todo += [helper for helper in helpers if isinstance(helper, FunctionType) and not foreign(helper)]
    return False


def _stopped(recorder: Recorder, before: list[Node], error: Exception) -> None:
    """Leave whole what a run that failed had made of weights that only training reads, and had still to read.

    The call that failed may have been its reader (a batch norm that wants more than one value), and what that asks is not known.
    """
    made = {id(recorder.leaves[name]) for name in unread(recorder, before)}
    read = {id(value) for node in recorder.extra for value in node.held}
    reason = recorder.labels.reason(Reason(f"not known in training, which stops there on the example ({type(error).__name__})"))
    for node in recorder.extra:
        if not any(id(value) in made for value in node.held):
            continue
        made.update(map(id, node.outs))
        for value in node.outs:
            if id(value) not in read and value.dtype.is_floating_point:
                for field in value.fields:
                    recorder.labels.lock(field, reason)
