"""The model's own run on real batches, seen at the values of its graph: :func:`watch`.

A recorded graph knows at which call of the Python code a value passes. While a watch is active every run of the model,
with any batch size and with autograd alive, hands over the real tensor there. The cut model makes the same calls as the
original, so one graph serves both.

>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> graph = trace(net, torch.zeros(1, 4))
>>> hidden = next(step.results[0] for step in graph.steps if step.name == "relu")
>>> with watch(net, graph, [hidden], lambda value, tensor: print(tuple(tensor.shape))):
...     _ = net(torch.zeros(5, 4))
(5, 8)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from ..errors import BadInput
from ..operations.notation import Value
from .bodies import Bodies
from .functions import UNSTEPPED, floating
from .graph import Graph, Step
from .trace import trace
from .trees import replace, tensors

__all__ = ["batch_inputs", "trace", "unwatched", "watch"]

See = Callable[[Value, torch.Tensor], torch.Tensor | None]


class _Watch(TorchFunctionMode):
    """Counts the calls of a run; a watched argument is shown before its call, a watched result after it.

    What is called outside the model's forward passes as it is.
    """

    def __init__(self, steps: list[Step], places: dict[int, list[tuple[bool, int, Value]]], see: See) -> None:
        super().__init__()
        self.steps, self.places, self.see = steps, places, see
        self.at = -1  # the next call of the model; -1 outside its forward
        self.bodies = Bodies()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.at < 0 or name in UNSTEPPED:
            return func(*args, **kwargs)
        body = self.bodies[func]
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if not floating(list(tensors((args, kwargs), torch.Tensor))):
            result = func(*args, **kwargs)
            if not floating(list(tensors(result, torch.Tensor))):
                return result
            return self.shown(result, [(i, value) for is_input, i, value in self.next(name) if not is_input])
        places = self.next(name)
        if not places:
            return func(*args, **kwargs)
        args, kwargs = self.shown((args, kwargs), [(i, value) for is_input, i, value in places if is_input])
        assert kwargs is not None
        return self.shown(func(*args, **kwargs), [(i, value) for is_input, i, value in places if not is_input])

    def next(self, name: str) -> list[tuple[bool, int, Value]]:
        """What is watched at the next call of the example that works on activations, which has to be this one."""
        at, self.at = self.at, self.at + 1
        if at >= len(self.steps) or self.steps[at].name != name:
            known = self.steps[at].name if at < len(self.steps) else "the end"
            raise BadInput(f"the model takes another path on this batch than on the example: {name} where the example had {known}")
        return self.places.get(at, [])

    def shown(self, tree: Any, watched: list[tuple[int, Value]]) -> Any:
        if not watched:
            return tree
        seen_tensors = list(tensors(tree, torch.Tensor))
        swaps = {}
        for index, value in watched:
            other = self.see(value, seen_tensors[index])
            if other is not None:
                swaps[id(seen_tensors[index])] = other
        return replace(tree, lambda tensor: swaps.get(id(tensor), tensor)) if swaps else tree


@contextmanager
def watch(model: torch.nn.Module, graph: Graph, values: Iterable[Value], see: See) -> Iterator[None]:
    """While active, each run ``model(*args)`` calls ``see(value, tensor)`` for every watched value that passes.

    A value is shown once per run, at the first call that takes or returns it; what ``see`` returns, if anything, takes the tensor's place from that
    call on only where the call itself hands it on. Raises :class:`~graphprune.errors.BadInput` during a run that makes other calls than the example did.
    """
    wanted = {id(value): value for value in values}
    places: dict[int, list[tuple[bool, int, Value]]] = {}
    steps = [step for step in graph.steps if step.floats]
    for at, step in enumerate(steps):
        for is_input, values_of in ((True, step.args), (False, step.results)):
            for index, value in enumerate(values_of):
                if value is not None and wanted.pop(id(value), None) is not None:
                    places.setdefault(at, []).append((is_input, index, value))
    missing = next(iter(wanted.values()), None)
    if missing is not None:
        raise BadInput(f"a value of shape {missing.shape} passes no call of the model's own code and cannot be watched")
    mode = _Watch(steps, places, see)

    def move(at: int) -> Callable[..., None]:
        return lambda *_: setattr(mode, "at", at)

    start = model.register_forward_pre_hook(move(0))
    end = model.register_forward_hook(move(-1), always_call=True)
    try:
        with mode:
            yield
    finally:
        start.remove()
        end.remove()


def unwatched() -> Any:
    """A context in which what is called is no part of the model's run, though a watch is active."""
    return torch._C.DisableTorchFunction()


def batch_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's positional and keyword arguments in a batch of a data loader.

    A tensor is the only input; of a pair ``(inputs, labels)`` the first is meant (a tuple there is positional, a dict is keyword); a dict is keyword
    arguments; a longer tuple is positional.

    >>> batch_inputs((torch.zeros(2, 3), torch.zeros(2)))[0][0].shape
    torch.Size([2, 3])
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence) else ((inputs,), {})
