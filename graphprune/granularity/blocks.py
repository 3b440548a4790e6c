"""Modules whose removal is possible: what they return has the shape of what they take, so the input can stand for it.

Read from the graph and from one run with hooks, never from names: which module holds which calls, whether its output is
its input plus something (*residual*), whether it is one of a chain, or whether all that happens to its output is that it
is added to something else (a *branch*).

>>> from ..tracing.trace import trace
>>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
>>> [found.name for found in Modules(trace(net, torch.zeros(1, 4)), net).layers()]
['1']
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..cutting.parts import Part
from ..operations.notation import Value
from ..tracing.dice import same_dice
from ..tracing.graph import Graph
from ..tracing.surroundings import unchanged
from ..tracing.trees import replace, tensors
from .liveness import Liveness

NUMBERS = (bool, int, float, str)  # one of them may be another by chance


@dataclass(frozen=True)
class Removable:
    """A module that can go: ``skips`` are the plan's parts (itself, and what only it needed); ``before`` and ``after`` the stream around it."""

    name: str
    skips: tuple[Part, ...]
    before: Value
    after: Value


@dataclass(frozen=True)
class Shape:
    """How a module was called: which arguments its output can be replaced by, going by their shapes, and the form of the output."""

    sources: tuple[int | str, ...]
    form: tuple[Any, ...]
    lost: tuple[int, ...] = ()  # the places of results that will be None


class Modules:
    """What the modules of a model do in its graph."""

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.modules = dict(model.named_modules())
        self.shaped = _shaped(graph, model)
        self.users: dict[int, list[int]] = defaultdict(list)
        self.inside: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(graph.nodes):
            for value in tensors((node.args, node.kwargs)):
                self.users[id(value)].append(index)
            for path in paths(node.module):
                self.inside[path].append(index)
        self.final = {id(value) for value in graph.outputs}
        self.fixed = _fixed(graph)
        self.order = {name: at for at, name in enumerate(self.modules)}
        self.liveness = Liveness(graph)
        self._living = {path: sum(self.liveness.live[index] for index in calls) for path, calls in self.inside.items()}
        self._residual: dict[str, bool] = {}

    def blocks(self) -> list[Removable]:
        """Residual modules; where a model has none, modules with children in a chain. Of nested ones the elements of the innermost chain."""
        names = list(self._blocks("", self.model, residual=True)) or list(self._blocks("", self.model, residual=False))
        equals = {name.rpartition(".")[0] for name in names if _alike(self.modules[name.rpartition(".")[0]])}
        inside = lambda name: any(path.rpartition(".")[0] in equals for path in list(paths(name))[1:])  # of one of these that has to stay  # noqa: E731
        return list(self._kept([name for name in names if not inside(name)], zero=False))

    def layers(self) -> list[Removable]:
        """Branches that are only added to a stream, and single layers in a chain."""
        names = list(self._branches("", self.model))
        branches = list(self._kept(names, zero=True))
        taken = {part.name for removable in branches for part in removable.skips}
        chain = [name for name, module in self.modules.items() if self._hidden(name, module) and not any(path in taken for path in paths(name))]
        return branches + list(self._kept(chain, zero=False))

    def _kept(self, names: list[str] | Iterator[str], zero: bool) -> Iterator[Removable]:
        for name in names:
            ends = self.ends(name)
            skips = self.skips({name: zero}) if ends else None
            if ends is None or not skips or not any(p.ndim > 1 for part in skips for p in self.modules[part.name].parameters()):
                continue
            before, after = ends
            if zero:
                total = self._sum(after)
                assert total is not None  # a branch ends at a sum
                node = self.graph.nodes[total]
                before = next(v for v in tensors(node.args) if not self._from(v, after))
                after = node.outs[0]
            yield Removable(name, skips, before, after)

    def _blocks(self, path: str, module: nn.Module, residual: bool) -> Iterator[str]:
        for key, child in module.named_children():
            name = f"{path}.{key}" if path else key
            if self._block(name, child, module, residual) and not self._holds_blocks(name, residual):
                yield name
            else:
                yield from self._blocks(name, child, residual)

    def _block(self, name: str, module: nn.Module, parent: nn.Module, residual: bool) -> bool:
        if name not in self.shaped or not any(True for _ in module.children()) or self.ends(name) is None:
            return False
        return self.residual(name) if residual else self._chained(name, parent)

    def _holds_blocks(self, name: str, residual: bool) -> bool:
        """Is there a chain of blocks inside? Then its elements are the blocks, unless they differ in kind (attention, MLP) and the module is one of equals."""
        equal = _alike(self.modules[name.rpartition(".")[0]])
        for inner, module in self.modules[name].named_modules(prefix=name):
            if inner != name and inner in self.modules:
                parent = self.modules[inner.rpartition(".")[0]]
                if self._block(inner, module, parent, residual) and self._chained(inner, parent) and (_alike(parent) or not equal):
                    return True
        return False

    def _chained(self, name: str, parent: nn.Module) -> bool:
        if isinstance(parent, nn.Sequential):
            return True
        ends = self.ends(name)
        if not isinstance(parent, nn.ModuleList) or ends is None:
            return False
        calls = set(self.inside[name])
        return all(user in calls for user in self.users[id(ends[0])])  # parallel elements read the same input

    def _branches(self, path: str, module: nn.Module) -> Iterator[str]:
        for key, child in module.named_children():
            name = f"{path}.{key}" if path else key
            ends = self.ends(name) if name in self.shaped and any(True for _ in child.parameters()) else None
            if ends and self._sum(ends[1]) is not None:
                yield name
            else:
                yield from self._branches(name, child)

    def _hidden(self, name: str, module: nn.Module) -> bool:
        parent = self.modules.get(name.rpartition(".")[0]) if name else None
        single = not any(True for _ in module.children()) and any(p.ndim > 1 for p in module.parameters(recurse=False))
        return single and name in self.shaped and parent is not None and self._chained(name, parent) and self.ends(name) is not None

    def ends(self, name: str) -> tuple[Value, Value] | None:
        """What goes into a module and what comes out: the values at its border, None where the border is not that simple."""
        calls = set(self.inside.get(name, ()))
        out = [v for i in calls for v in self.graph.nodes[i].outs if id(v) in self.final or any(u not in calls for u in self.users[id(v)])]
        if len(out) != 1 or name not in self.shaped:
            return None
        inputs = [v for i in sorted(calls) for v in tensors((self.graph.nodes[i].args, self.graph.nodes[i].kwargs)) if v.node not in calls]
        fits = [v for v in inputs if v.shape == out[0].shape and (not v.leaf or v.leaf.startswith("<input"))]
        stream = self._stream(name, list({id(v): v for v in fits}.values()), out[0])
        return None if stream is None else (stream, out[0])

    def _stream(self, name: str, fits: list[Value], end: Value) -> Value | None:
        """What of the inputs that have the shape of a module's output stands for it: what is added to, where there are several."""
        fits = [v for v in fits if self._source(name, v) is not None]
        return next((v for v in fits if self._reaches(name, v, end)), fits[0]) if len(fits) > 1 else next(iter(fits), None)

    def _source(self, name: str, value: Value) -> int | str | None:
        """The argument of a module that a value was, of those that can stand for its output."""
        sources = self.shaped[name].sources
        return sources[0] if len(sources) == 1 else next((key for key, given in self.graph.given.get(name, ()) if given is value and key in sources), None)

    def residual(self, name: str) -> bool:
        """Is there a way from the output back to the input that only adds, normalises, moves or acts entry by entry?"""
        if name not in self._residual:
            ends = self.ends(name)
            self._residual[name] = ends is not None and self._reaches(name, *ends)
        return self._residual[name]

    def _reaches(self, name: str, start: Value, end: Value) -> bool:
        todo: list[tuple[Value, bool]] = [(end, False)]
        seen: set[tuple[int, bool]] = set()
        while todo:
            value, added = todo.pop()
            if value is start and added:
                return True
            if value is start or value.node not in self.inside[name] or (id(value), added) in seen:
                continue
            seen.add((id(value), added))
            node = self.graph.nodes[value.node]
            operands = [v for v in tensors((node.args, node.kwargs)) if id(v) not in self.fixed]
            if node.op.arithmetic == "add":
                todo += [(v, True) for v in operands]
            elif operands and (node.op.norm or node.op.move or (len(operands) == 1 and node.is_pointwise)):
                todo.append((operands[0], added))
        return False

    def _sum(self, value: Value) -> int | None:
        """The addition that is all that happens to a value, but for scaling by parameters, dropout and movement."""
        while True:
            users = set(self.users[id(value)])
            if len(users) != 1 or id(value) in self.final:
                return None
            index = users.pop()
            node = self.graph.nodes[index]
            operands = list(tensors((node.args, node.kwargs)))
            if node.op.arithmetic == "add":
                other = [v for v in operands if v is not value]
                stream = len(other) == 1 and other[0].shape == value.shape == node.outs[0].shape and id(other[0]) not in self.fixed
                return index if stream else None
            if node.op.move or (node.op.arithmetic == "mul" and all(v is value or id(v) in self.fixed for v in operands)):
                value = node.outs[0]
                continue
            return None

    def _from(self, value: Value, origin: Value) -> bool:
        """Does a value come from another by the steps of :meth:`_sum`?"""
        while value is not origin and value.node >= 0:
            operands = [v for v in tensors((self.graph.nodes[value.node].args, self.graph.nodes[value.node].kwargs)) if id(v) not in self.fixed]
            if len(operands) != 1:
                return False
            value = operands[0]
        return value is origin

    def skips(self, gone: dict[str, bool]) -> tuple[Part, ...] | None:
        """The parts that remove modules (True: their output becomes zero) and whatever only they needed; None where weights would be left over."""
        turned, changed = [], set()
        for name, zero in gone.items():
            before, after = self.ends(name) or (None, None)
            if after is not None:
                turned.append(after)
                changed |= self.liveness.turn(after, None if zero else before)
        dead = self._dead({index for index in changed if not self.liveness.live[index]}, gone)
        for after in reversed(turned):
            self.liveness.back(after)
        if any(name not in self.shaped for name in dead):
            return None
        order = [*gone, *dead]
        return tuple(Part("skip", name, (self._taken(name), self.shaped[name].form, gone.get(name, False))) for name in order)

    def _taken(self, name: str) -> int | str:
        """The argument that is handed on where a module was; of one that nobody needs any, of its shape."""
        ends = self.ends(name)
        source = self._source(name, ends[0]) if ends is not None else None
        return self.shaped[name].sources[0] if source is None else source

    def _dead(self, fallen: set[int], gone: dict[str, bool]) -> list[str]:
        """The outermost modules with weights of which no call lives any more, when these calls do not either.

        What lives of itself for nobody (an output that does not matter) is not needed less by that, and stays.
        """
        fewer = Counter(path for index in fallen for path in paths(self.graph.nodes[index].module))
        empty = {path for path, count in fewer.items() if count == self._living[path]}
        dead: list[str] = []
        inside = set(gone)  # of what is gone by itself
        for name in sorted(empty & self.order.keys(), key=self.order.__getitem__):
            module = self.modules[name]
            if any(path in inside for path in paths(name)):
                continue
            if all(any(path in inside for path in paths(f"{name}.{key}")) for key, _ in module.named_parameters()):
                continue  # what it holds is gone already
            if name in self.shaped or not any(True for _ in module.children()):
                dead.append(name)
                inside.add(name)
        return dead


def _alike(module: nn.Module) -> bool:
    """Whether a module is a list of modules of one class."""
    return isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in module.children()}) == 1


def paths(name: str) -> Iterator[str]:
    """A module's path, and those of the modules that hold it.

    >>> list(paths("a.b.c"))
    ['a.b.c', 'a.b', 'a']
    """
    while name:
        yield name
        name = name.rpartition(".")[0]


def _fixed(graph: Graph) -> set[int]:
    """The values that do not depend on the inputs: parameters, constants, and what is computed from them alone."""
    fixed = {id(leaf) for leaf in graph.leaves.values()}
    for node in graph.nodes:
        if all(id(value) in fixed for value in tensors((node.args, node.kwargs))):
            fixed |= {id(value) for value in node.outs}
    return fixed


def _shaped(graph: Graph, model: nn.Module) -> dict[str, Shape]:
    """The modules that were called once and took a tensor of the shape and kind that they returned."""
    calls: dict[str, list[Any]] = defaultdict(list)
    _hooked(graph, model, {name: partial(_noted, calls[name]) for name, _ in model.named_modules()})
    shapes = {name: called[0] for name, called in calls.items() if name and len(called) == 1 and called[0]}
    fewer = {name: shape for name, shape in shapes.items() if shape.lost}
    spared = {name for name in fewer if not _read_elsewhere(graph, name)}
    try:  # whoever takes what a module returns apart may ask the rest for more than its values
        _hooked(graph, model, {name: partial(_without, fewer[name].lost) for name in spared})
    except Exception:
        spared = set()
    return {name: shape for name, shape in shapes.items() if not shape.lost or name in spared}


def _hooked(graph: Graph, model: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> None:
    """Run the example in evaluation mode with hooks on modules, after which the model is as it was."""
    if not hooks:
        return
    args, kwargs = (replace(part, lambda tensor: tensor.detach().clone()) for part in graph.example)  # a model may write into its inputs
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), same_dice(), unchanged(model):
        modules = dict(model.named_modules())
        handles = [modules[name].register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
        try:
            model.eval()
            model(*args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode
            for handle in handles:
                handle.remove()


def _noted(calls: list[Shape | None], _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    calls.append(_form(args, kwargs, out))


def _without(places: Sequence[int], _: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
    """What a module returned, with None at some places."""
    return type(out)(None if at in places else item for at, item in enumerate(out))


def _read_elsewhere(graph: Graph, name: str) -> bool:
    """Whether a further run (training mode, another example) reads more than one result of a module."""
    for run in graph.reruns:
        inside = {index for index, node in enumerate(run.nodes) if name in paths(node.module)}
        made = {id(value) for index in inside for value in run.nodes[index].outs}
        read = {id(value) for index, node in enumerate(run.nodes) if index not in inside for value in node.held} | {id(value) for value in run.outputs}
        if len(made & read) > 1:
            return True
    return False


def _form(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Shape | None:
    """Which argument can stand for the output: the first tensor of its shape and dtype.

    Of several results one has to be such a tensor. The others are arguments that are handed on as they are, or tensors (attention weights); whether
    anybody reads these is for :meth:`Modules.ends` to say.
    """
    given = [*enumerate(args), *kwargs.items()]
    if type(out) not in (tuple, list):
        sources = _stand_ins(out, given)
        return Shape(sources, ()) if sources else None
    handed = _handed(out, given)
    made = [i for i, key in handed.items() if key is None] or list(handed)[:1]
    streams = {i: sources for i in made if (sources := _stand_ins(out[i], given))}
    if len(streams) != 1 or not all(isinstance(out[i], torch.Tensor) for i in made):
        return None
    place, sources = next(iter(streams.items()))
    pairs = tuple((i, key) for i, key in handed.items() if key is not None and i != place)
    if any(isinstance(out[i], torch.Tensor) and out[i].shape == out[place].shape for i, _ in pairs):
        return None  # the stream may be what was written to in place
    lost = tuple(i for i in made if i != place)
    return Shape(sources, (type(out).__name__, len(out), place, *((pairs,) if pairs else ())), lost)


def _handed(out: Sequence[Any], given: Sequence[tuple[int | str, Any]]) -> dict[int, int | str | None]:
    """For every result that there is, the argument that it is (None: it was made)."""
    objects = [(key, value) for key, value in given if not isinstance(value, NUMBERS)]
    return {i: next((key for key, value in objects if value is item), None) for i, item in enumerate(out) if item is not None}


def _stand_ins(out: Any, given: Sequence[tuple[int | str, Any]]) -> tuple[int | str, ...]:
    """The arguments of the shape and dtype of a result; one of several that are the same tensor."""
    if not isinstance(out, torch.Tensor) or not out.is_floating_point():
        return ()
    fits = {id(item): key for key, item in reversed(given) if isinstance(item, torch.Tensor) and item.shape == out.shape and item.dtype == out.dtype}
    return tuple(key for key, _ in given if key in fits.values())
