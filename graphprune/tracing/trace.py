# pyright: strict, reportUnnecessaryIsInstance=false
"""One run of the model, without values, in which labels ride along: :func:`trace` returns the :class:`Graph`.

The run happens on a throw-away copy whose floating parameters lie on the meta device, under a dispatch mode that sees
every ATen operation and a function mode that sees what sizes the Python code asked for. Where control flow depends on
values, the run is repeated with real ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace as replace_fields
from typing import Any

import torch
from torch import nn

from ..errors import BadInput, BadModel, BadRule, UnknownName, no_module
from .dice import RUNNING, same_dice
from .examples import Examples
from .filled import LeftBehind, forget_frames
from .graph import Graph
from .node import line
from .record import META
from .refused import fails, raised_at
from .run import run
from .shadow import shadow
from .trees import normal_inputs
from .ways import ways

__all__ = ["trace"]

COMPILES = (
    "it calls something that torch compiles as it is called (torch.cond, torch.compile inside of forward), and what is compiled is not seen; write a branch as "
    "an if, or compile the model from outside"
)
NESTED = "it makes nested tensors, whose entries have no common shape and so no axes; run it on padded ones, or on one sequence at a time"


def trace(
    model: nn.Module,
    example_input: Any,
    example_kwargs: dict[str, Any] | None = None,
    *,
    outputs: Any = None,
    examples: Sequence[Any] = (),
    apart: bool = False,
) -> Graph:
    """Run ``model`` once and return what it computes, with the labels of every tensor.

    ``outputs`` says which parts of the result keep their size (by default all): a name, an index, a predicate ``(path, tensor) -> bool``, or several.
    ``examples`` are further ones that must hold, too: inputs as ``example_input``, or functions ``(model) -> result``.
    ``apart``: where something is repeated along the axis on which it lies (keys for the queries of their group), copies may go instead of what is copied.

    Raises :class:`~graphprune.errors.BadInput` when the model does not run on the example, :class:`~graphprune.errors.BadModel` when it does, but cannot
    be followed there, :class:`~graphprune.errors.UnknownName` when ``outputs`` names nothing.

    >>> len(trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(1, 4)).leaves)
    2
    """
    if not isinstance(model, nn.Module):
        raise BadModel(no_module(model))
    example = normal_inputs(example_input, example_kwargs)
    if isinstance(examples, torch.Tensor | str | Mapping) or not isinstance(examples, Iterable):
        raise BadInput(f"examples is a {type(examples).__name__}; it is a list of further inputs, or of functions (model) -> result")
    if isinstance(outputs, bool) or (isinstance(outputs, Sized) and not len(outputs)):
        raise BadInput(f"outputs is {outputs!r}; it is a name, an index, a function (path, tensor) -> bool, or several of these (None: all)")
    others = tuple(each if callable(each) else normal_inputs(each, example_kwargs) for each in examples)
    with RUNNING, same_dice(away=True):
        return _traced(model, Examples(example, outputs, others, apart))


def _traced(model: nn.Module, asked: Examples) -> Graph:
    behind = LeftBehind()
    try:
        graph = run(model, asked, real=False, behind=behind)
    except (BadRule, BadModel, UnknownName) as error:
        forget_frames(error)
        behind.fill(model, asked.example)
        raise
    except Exception as error:
        first = error
        forget_frames(error)
    else:
        behind.fill(model, asked.example)
        stale = any("[" in name for name in graph.unread)  # a cache that the run looked for under another device
        return run(model, asked, real=True) if stale else _other_ways(model, graph, asked)
    behind.fill(model, asked.example)
    return _with_values(model, asked, first)


def _with_values(model: nn.Module, asked: Examples, first: Exception) -> Graph:
    """The graph of a run with values, after one without them ended with ``first``."""
    try:
        return run(model, asked, real=True)
    except UnknownName:
        raise
    except Exception as error:
        compiles = _compiles(error)
        if compiles:
            torch.compiler.reset()  # what failed to compile in our run would not be compiled in the user's either
        fails(model, asked.example)
        where = f" ({line(at)})" if (at := raised_at(error)) else ""
        why = NESTED if "NestedTensor" in str(error) else COMPILES if compiles else f"{type(error).__name__}: {error}"
        text = f"the model runs on the example, but its run cannot be followed{where}: {why}"
        raise (error if isinstance(error, BadInput) else BadModel(text)) from (error if str(error) else first)


def _compiles(error: BaseException) -> bool:
    """Whether an error was raised while torch compiled something."""
    frames = error.__traceback__
    while frames:
        if frames.tb_frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
            return True
        frames = frames.tb_next
    return False


def _other_ways(model: nn.Module, graph: Graph, asked: Examples) -> Graph:
    """The graph, made again where the model has further ways that read sizes which this run did not."""
    further = ways(model, graph, lambda: shadow(model, real=False)[0], lambda t: t.detach().clone() if not t.is_floating_point() else t.detach().to(META))
    if not further:
        return graph
    try:
        return run(model, replace_fields(asked, others=(*asked.others, *further)), real=False)
    except Exception:  # a way that cannot be followed asks for nothing
        return graph
