"""Sizes written as literals in a ``forward`` (``x.view(-1, 400)``) become attributes: :func:`spelled`.

Only the modules whose own code holds the literals are rewritten, as ``torch.fx.GraphModule``, with their children untouched; names of
parameters stay. Each literal becomes an integer attribute, which tracing, solving and applying then treat like any other. The code is
recorded in training and in evaluation mode, and what differs by ``self.training`` follows the module's own mode.

>>> class Net(nn.Module):
...     def forward(self, x):
...         return x.view(-1, 400)
>>> spelled(Net(), [""]).size_1
400
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..errors import BadModel
from ..tracing.copies import duplicate
from ..tracing.trees import leaf_tensors


class _Shallow(fx.Tracer):
    """Records one module's own code; its children are called, not entered."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def spelled(model: nn.Module, paths: list[str] | tuple[str, ...]) -> nn.Module:
    """A copy that shares the tensors of ``model``, in which the literals in the code of the modules ``paths`` are attributes.

    Raises :class:`~graphprune.errors.BadModel` where that code cannot be recorded (it branches on values, or by mode).
    """
    twin = duplicate(model, {id(tensor): tensor for *_, tensor in leaf_tensors(model)})
    return spell(twin, paths)


def spell(model: nn.Module, paths: list[str] | tuple[str, ...]) -> nn.Module:
    """Exchange the modules ``paths`` of ``model`` itself; returns the model (a new one where the path is empty)."""
    for path in sorted(paths, key=lambda p: (-len(p.split(".")), p == "", p)):
        try:
            module = _attributes(model.get_submodule(path))
        except Exception as error:
            raise BadModel(f"the code of {path or 'the model'} cannot be rewritten: {type(error).__name__}: {error}".splitlines()[0]) from error
        if not path:
            return module
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module
    return model


def _attributes(module: nn.Module) -> fx.GraphModule:
    mode = module.training
    graphs = []
    try:
        for training in (True, False):
            module.__dict__["training"] = training
            graphs.append(_Shallow().trace(module))
    finally:
        module.__dict__["training"] = mode
    graph, other = graphs
    small = fx.GraphModule(nn.Module(), fx.Graph(), type(module).__name__)
    small.__dict__.update({key: value for key, value in module.__dict__.items() if not isinstance(value, fx.Graph)})
    if len(graph.nodes) != len(other.nodes):
        raise ValueError("it takes another path in training mode")
    count = 0
    for node, twin in zip(list(graph.nodes), list(other.nodes), strict=True):
        if (node.op, node.target, node.name) != (twin.op, twin.target, twin.name):
            raise ValueError("it takes another path in training mode")
        if node.op not in ("call_function", "call_method"):
            continue
        with graph.inserting_before(node):
            args, count = _swap((node.args, node.kwargs), (twin.args, twin.kwargs), graph, small, count)
        node.args, node.kwargs = args
    small.graph = graph
    return small


def _swap(mine: Any, other: Any, graph: fx.Graph, small: nn.Module, count: int) -> tuple[Any, int]:
    """The arguments with every integer above 1 as an attribute, and a truth value that differs by mode as ``self.training``."""
    if isinstance(mine, bool) and mine is not other:
        if not mine:
            raise ValueError("it asks for evaluation mode")
        return _get(graph, "training"), count
    if type(mine) is int and mine > 1:
        if mine != other:
            raise ValueError("a size differs in training mode")
        count += 1
        setattr(small, f"size_{count}", mine)
        return _get(graph, f"size_{count}"), count
    if isinstance(mine, slice):
        parts, count = _swap((mine.start, mine.stop, mine.step), (other.start, other.stop, other.step), graph, small, count)
        return slice(*parts), count
    if isinstance(mine, tuple | list):
        items = []
        for left, right in zip(mine, other, strict=True):
            item, count = _swap(left, right, graph, small, count)
            items.append(item)
        return (tuple(items) if isinstance(mine, tuple) else items), count
    if isinstance(mine, dict):
        values, count = _swap(tuple(mine.values()), tuple(other[key] for key in mine), graph, small, count)
        return dict(zip(mine, values, strict=True)), count
    if not isinstance(mine, fx.Node) and mine != other:
        raise ValueError("an argument differs in training mode")
    return mine, count


def _get(graph: fx.Graph, name: str) -> fx.Node:
    return graph.create_node("get_attr", name)


def removed(shapes: dict, cuts: dict) -> int:
    """How many entries a plan's cuts take away."""
    total = 0
    for name, axes in cuts.items():
        whole = left = 1
        for axis, size in enumerate(shapes[name]):
            whole *= size
            left *= len(axes.get(axis, range(size)))
        total += whole - left
    return total
