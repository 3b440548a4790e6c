"""Sizes written as literals in a ``forward`` (``x.view(-1, 400)``) become attributes: :func:`spelled`.

Only the modules whose own code holds the literals change, and only their class: to a subclass of the same name, in which ``forward`` and the methods and
functions that it calls read ``self.size_1`` where the source says 400. Everything else (other methods, hooks, what happens under ``self.training``)
is the user's own. Tracing, solving and applying then treat the new attributes like any other.

>>> from torch.nn.utils.rnn import PackedSequence
>>> from graphprune.cutting import rewrite
>>> source = "def forward(self, x):\\n    return x.view(-1, 16 * 5 * 5)\\n"
>>> text, literals = rewrite.respelled(source, first=1, literals={})
>>> text.splitlines()[1].strip(), literals
('return x.view(-1, self.size_1)', {'size_1': 400})
"""

from __future__ import annotations

import ast
import copyreg
import dis
import inspect
import linecache
import textwrap
from collections.abc import Collection, Iterator
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import BadModel
from ..tracing.copies import ORIGIN, duplicate
from ..tracing.trees import leaf_tensors

_SUBCLASSES: WeakKeyDictionary[type, type] = WeakKeyDictionary()  # by the user's class


def spelled(model: nn.Module, paths: list[str] | tuple[str, ...]) -> nn.Module:
    """A copy that shares the tensors of ``model``, in which the literals in the code of the modules ``paths`` are attributes.

    Raises :class:`~graphprune.errors.BadModel` where that code cannot be rewritten (its source is not there, or holds no size).
    """
    twin = duplicate(model, {id(tensor): tensor for *_, tensor in leaf_tensors(model)})
    return spell(twin, paths)


def spell(model: nn.Module, paths: list[str] | tuple[str, ...]) -> nn.Module:
    """The same for the modules ``paths`` of ``model`` itself; returns the model."""
    for path in paths:
        module = model.get_submodule(path)
        try:
            kind = rewritten(type(module))
        except (ValueError, OSError, SyntaxError, TypeError) as error:
            raise BadModel(f"the code of {path or 'the model'} cannot be rewritten: {error}".splitlines()[0]) from error
        taken = [name for name in kind.literals if name in module.__dict__ and module.__dict__[name] != kind.literals[name]]
        if taken and type(module) is not kind:
            raise BadModel(f"the code of {path or 'the model'} cannot be rewritten: it has an attribute {taken[0]} of its own")
        module.__class__ = kind
        module.__dict__.update({name: value for name, value in kind.literals.items() if name not in module.__dict__})
    return model


def rewritten(kind: type) -> Any:
    """The subclass of a module's class that reads its literals from attributes (``literals``: their names and values)."""
    if ORIGIN in kind.__dict__:
        return kind
    if kind not in _SUBCLASSES:
        _SUBCLASSES[kind] = _subclass(kind)
    return _SUBCLASSES[kind]


def _subclass(kind: type) -> type:
    literals: dict[str, int] = {}
    methods: dict[str, Any] = {}
    for name, function, owner in _reached(kind):
        helper = owner is None
        source, first = _source(function)
        text, literals = respelled(source, first, literals, {f.__name__ for _, f, o in _reached(kind) if o is None}, helper)
        if text != source or helper:
            methods[name] = _compiled(text, function, owner or kind, f"{function.__code__.co_filename} [sizes of {kind.__qualname__}.{name}]")
    if not literals:
        raise ValueError("the size is written elsewhere")

    def reduce(self: Any, protocol: Any) -> Any:
        made = super(subclass, self).__reduce_ex__(protocol)
        return (_blank, (kind,), *made[2:]) if isinstance(made, tuple) and made[0] is vars(copyreg)["__newobj__"] else made

    space = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "__reduce_ex__": reduce, ORIGIN: kind}
    subclass = type(kind)(kind.__name__, (kind,), {**space, **methods, "literals": literals})
    return subclass


def _blank(kind: type) -> Any:
    """What unpickling and copying start from: a subclass has no name under which it could be imported."""
    subclass = rewritten(kind)
    return subclass.__new__(subclass)


def _reached(kind: type) -> Iterator[tuple[str, FunctionType, type | None]]:
    """``forward`` and the methods of the class that it calls, with the classes they stand in; and functions of the same package, as methods of no class."""
    package = kind.__module__.partition(".")[0]
    todo, seen = ["forward"], {"forward"}
    while todo:
        name = todo.pop(0)
        owner = next((base for base in kind.__mro__ if name in base.__dict__), None)
        function = owner.__dict__[name] if owner else None
        if not owner or not isinstance(function, FunctionType) or owner.__module__.partition(".")[0] == "torch":
            continue
        yield name, function, owner
        called = {step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL"}
        for other in function.__code__.co_names:
            helper = function.__globals__.get(other) if other in called else None  # an attribute may have the name of a function
            if other not in seen and isinstance(helper, FunctionType) and helper.__module__.partition(".")[0] == package and not helper.__closure__:
                yield f"_{other}_", helper, None
            elif other not in seen and hasattr(kind, other):
                todo.append(other)
            seen.add(other)


def _source(function: FunctionType) -> tuple[str, int]:
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError as error:
        raise ValueError("its source is not there") from error
    if hasattr(function, "__wrapped__"):
        raise ValueError(f"{function.__name__} is decorated")
    return textwrap.dedent("".join(lines)), first


class _Literals(ast.NodeVisitor):
    """Where in a function whole numbers above 1 stand, folded as Python folds them; and calls of the helpers."""

    def __init__(self, helpers: Collection[str]) -> None:
        self.helpers = helpers
        self.numbers: list[tuple[ast.expr, int]] = []
        self.calls: list[ast.Name] = []

    def visit(self, node: ast.AST) -> None:
        number = _folded(node)
        if number is not None and isinstance(node, ast.expr):
            if number > 1:
                self.numbers.append((node, number))
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.helpers:
            self.calls.append(node.func)
        if isinstance(node, ast.ClassDef | ast.JoinedStr | ast.pattern):
            return
        if isinstance(node, ast.AnnAssign):
            self.visit(node.value or node.target)
            return
        self.generic_visit(node)


def _folded(node: ast.AST) -> int | None:
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Add | ast.Sub | ast.FloorDiv | ast.Pow):
        left, right = _folded(node.left), _folded(node.right)
        if left is None or right is None or (isinstance(node.op, ast.FloorDiv) and not right) or (isinstance(node.op, ast.Pow) and not 0 <= right < 64):
            return None
        compute = {ast.Mult: int.__mul__, ast.Add: int.__add__, ast.Sub: int.__sub__, ast.FloorDiv: int.__floordiv__, ast.Pow: int.__pow__}
        return compute[type(node.op)](left, right)
    return None


def respelled(source: str, first: int, literals: dict[str, int], helpers: Collection[str] = (), helper: bool = False) -> tuple[str, dict[str, int]]:
    """The source of a method, line for line, with attributes for its literals; and these, added to the ones that are known.

    A ``helper`` is a function that becomes a method, and ``helpers`` are the names of all of them. ``first`` is the source's line in its file, for messages.
    """
    function = ast.parse(source).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise ValueError(f"line {first} is no plain function")
    arguments = [*function.args.posonlyargs, *function.args.args]
    if not arguments:
        raise ValueError(f"{function.name} takes no arguments")
    owner = "self" if helper else arguments[0].arg
    visitor = _Literals(helpers)
    for statement in function.body:
        visitor.visit(statement)
    literals = dict(literals)
    edits: list[tuple[ast.expr, str]] = []
    for node, number in sorted(visitor.numbers, key=lambda pair: (pair[0].lineno, pair[0].col_offset)):
        name = f"size_{len(literals) + 1}"
        literals[name] = number
        edits.append((node, f"{owner}.{name}"))
    edits += [(node, f"{owner}._{node.id}_") for node in visitor.calls]
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    for node, text in sorted(edits, key=lambda pair: (pair[0].lineno, pair[0].col_offset), reverse=True):
        assert node.end_lineno is not None and node.end_col_offset is not None
        _put(lines, node.lineno - 1, node.col_offset, node.end_lineno - 1, node.end_col_offset, text)
    if helper:
        _put(lines, arguments[0].lineno - 1, arguments[0].col_offset, arguments[0].lineno - 1, arguments[0].col_offset, "self, ")
    return b"".join(lines).decode(), literals


def _put(lines: list[bytes], start: int, column: int, end: int, last: int, text: str) -> None:
    """Exchange a piece of text for another, which takes as many lines."""
    rest = lines[end][last:]
    lines[start] = lines[start][:column] + text.encode() + (rest if start == end else b"\n")
    if start != end:
        lines[start + 1 : end + 1] = [b"\n"] * (end - start - 1) + [rest]


def _compiled(text: str, function: FunctionType, owner: type, file: str) -> FunctionType:
    """The function that the text makes in the place of another: its names, defaults, globals and closure."""
    free = [name for name in function.__code__.co_freevars if name != "__class__"]
    # The code may name its class (``super(Net, self)``), which is not the one that stands around it here.
    outside = "" if owner.__name__ in free else f"    global {owner.__name__}\n"
    tree = ast.parse(f"def outer({', '.join(free)}):\n{outside}    class {owner.__name__}:\n        pass")
    first, method = function.__code__.co_firstlineno, ast.parse(text).body[0]
    tree.body[0].body[-1].body = [ast.increment_lineno(method, first - 1)]  # type: ignore[attr-defined]
    code: Any = compile(tree, file, "exec")
    for name in ("outer", owner.__name__, function.__name__):
        code = next(part for part in code.co_consts if inspect.iscode(part) and part.co_name == name)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(cells[name] for name in code.co_freevars))
    made.__kwdefaults__, made.__annotations__, made.__doc__ = function.__kwdefaults__, function.__annotations__, function.__doc__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    lines = ["\n"] * (first - 1) + text.splitlines(keepends=True)
    linecache.cache[file] = (len("".join(lines)), None, lines, file)  # for tracebacks and whoever reads sources (torch.jit)
    return made


def removed(shapes: dict[Any, Any], cuts: dict[Any, Any]) -> int:
    """How many entries a plan's cuts take away."""
    total = 0
    for name, axes in cuts.items():
        whole = staying = 1
        for axis, size in enumerate(shapes[name]):
            whole *= size
            staying *= len(axes.get(axis, range(size)))
        total += whole - staying
    return total
