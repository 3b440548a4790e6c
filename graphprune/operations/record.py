# pyright: strict, reportPrivateUsage=false
"""All that is said of one operation, once: :class:`Operation`, and how it is said (:func:`rule`, :func:`move`, :func:`assemble`, :func:`describe`).

Operations are known by their full name, ``aten::convolution``; :func:`resolve` finds what is said of a function that torch calls. Whoever
wants to know something of a call asks its node, which asks here. :func:`rule` is public: describe your own (``docs/own-operation.md``).

>>> operation("aten::mm").rule(Value((2, 3)), Value((3, 4))).text
'n i, i o -> n o'
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..errors import BadRule
from .contraction import Product, product
from .labels import Array, Fields
from .notation import Expr, Value, checked

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PACKAGE = __name__.partition(".")[0]


class Onnx(NamedTuple):
    """A call of an ONNX file: its kind, its inputs and weights (tensors), and its attributes."""

    kind: str
    inputs: tuple[Any, ...]
    weights: list[Any]
    attributes: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Operation:
    """What is true of an operation. At most one of ``rule``, ``move``, ``assemble`` and ``pointwise`` says what it does to axes; none: it locks them.

    What the notation can say is said in the rule and read from there: what is multiplied, which operand is the weight, which sizes are factors.
    Functions take the operation's own arguments.
    """

    name: str
    rule: Callable[..., Expr] | None = None
    move: Callable[..., list[Array]] | None = None  # (labels, shape, shapes of the results, *arguments) -> labels of every result
    assemble: Callable[..., list[Fields]] | None = None  # (Labels, reason, shapes of the results, *arguments) -> fields of every result
    pointwise: bool = False

    # Of products.
    weight: str = ""  # the argument that is the weight, where the second factor is not
    products: Callable[..., list[Expr]] | None = None  # what is multiplied, where the rule cannot say it
    onnx: Callable[..., Onnx | None] | None = None  # how a runtime runs it by itself

    # What it does to values.
    norm: str = ""  # divides by statistics: "batch" (of each channel), "layer", "rms" or "group"
    layer: bool = False  # puts its weight to work on what it is given, even if that is a weight too
    table: bool = False  # rows of a table, by their numbers
    softmax: bool = False  # weights that add up to one
    arithmetic: str = ""  # "add", "sub", "mul" or "div" of two operands
    flat: Callable[..., tuple[float, float]] | None = None  # between which two values an activation is not constant
    pools: bool = False  # puts neighbours together, channel by channel
    drops: bool = False  # leaves some entries out while it trains
    fused: bool = False  # runtimes do it inside of the product before it

    # What it does to axes.
    follows: Callable[..., dict[int, Any]] | None = None  # arguments that repeat the shape of a tensor: position -> value for the tensors given
    aligned: bool = False  # its kernel wants rows of a multiple of 16 bytes
    makes: bool = False  # the result has axes of its own, whatever the operand has
    factory: bool = False  # a tensor out of nothing but sizes
    fills: bool = False  # entries are written anew: what was zero need not be
    shape_only: bool = False  # nothing of the operand but its shape is read
    filled: str | float | None = None  # what all entries of the result are, or the name of the argument that says it
    puts: bool = False  # one number in the place of some entries, or all
    overwrites: bool = False  # the first operand becomes the second
    copies: bool = False  # repeats its operand along new axes
    part: bool = False  # takes some of the positions of an axis
    picks: bool = False  # reads positions that a tensor names
    chooses: bool = False  # each entry of one of two tensors, as a mask says
    stays: bool = False  # a move that leaves every entry where it is
    regroups: bool = False  # the same entries in another shape
    planned: bool = False  # a plan may hold it, among the calls that make a weight: it counts nothing and writes nothing
    statistic: str = ""  # over the axes it takes away: "sum" and "norm" (zeros add nothing), "mean" (their number counts), or "other"
    neutral: float | None = None  # what may be among the entries of a statistic without changing it
    inverts: bool = False  # one over its operand, or over a root of it
    zero: str = ""  # what the result is where operands are zero: "one" (zero if any is), "all" (zero if all are), "first" (zero if the first is)
    entries: Callable[..., Array] | None = None  # which positions of an axis it takes, see positions.py
    chooses_from: Callable[..., tuple[Value, int, int] | None] | None = None  # the largest along an axis, their positions last: tensor, axis, how many
    addresses: Callable[..., list[tuple[Value, int, Value]]] | None = None  # (tensor, axis, positions of it that are read or written)
    enumerates: bool = False  # numbers that follow each other: 0, 1, 2 … unless it is told where to begin, or a step
    writes_at: bool = False  # the result is the tensor that was addressed, written to
    orders: bool = False  # the same entries in another order, then where they were
    tallies: bool = False  # how often each number is there
    accumulates: bool = False  # sums from the start of an axis to every position
    finds: bool = False  # the positions of what is not zero
    looks: bool = False  # gives a number of its operands to Python, which may branch on it
    unset: bool = False  # nobody wrote the values of the result yet
    any_size: Callable[..., bool] | None = None  # whether the call runs at any size, so that nobody minds if its result is not used
    unmade: bool = False  # costs no time though the result has memory of its own
    shapes: Mapping[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])  # shape functions by overload
    why: str = ""  # why the axes are left whole on purpose
    strict: bool = False  # described from outside: what is wrong with it is an error, and not a locked axis

    # Of one overload, see :func:`resolve`.
    func: Any = None
    arguments: tuple[str, ...] = ()
    writes: bool = False
    inplace: bool = False
    whole: bool = False  # torch takes it apart itself
    views: bool = False  # the result shares the operand's memory
    shape: Callable[..., Any] | None = None

    @property
    def short(self) -> str:
        """The name without its namespace."""
        return self.name.partition("::")[2]

    @property
    def draws(self) -> bool:
        """Whether the result depends on random numbers, those that torch draws next."""
        return self.func is not None and torch.Tag.nondeterministic_seeded in self.func.tags

    @property
    def moves(self) -> bool:
        """Whether entries only change their places, also where labels are made for repeated axes."""
        return self.move is not None or self.copies

    @property
    def keeps_zero(self) -> bool:
        """Whether every entry of the result is one of the operand's."""
        return (self.move is not None and not self.fills) or (self.assemble is not None and self.part) or self.copies

    def describes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Expr:
        """The rule's answer for a call; what is wrong with a rule from outside is a :class:`~graphprune.errors.BadRule`."""
        assert self.rule is not None
        if not self.strict:
            return self.rule(*args, **kwargs)
        try:
            answer = self.rule(*_marked(args), **kwargs)
        except BadRule:
            raise
        except Exception as error:
            raise BadRule(f"the rule of {self.name} fails for a call with {len(args)} arguments: {type(error).__name__}: {error}") from error
        return fixed(checked(answer, f"the rule of {self.name}"))

    def multiplies(self, described: Expr, args: Sequence[Any], kwargs: Mapping[str, Any], result: Value | None) -> tuple[Product, ...]:
        """The products of a call."""
        if self.products is not None:
            every = self.products(*args, **kwargs)
            made = [product(each, result if each is every[-1] else None) for each in every]
        else:
            at = -1
            if self.weight:
                value = self.argument(self.weight, args, kwargs)
                at = next((i for i, operand in enumerate(described.operands) if operand is value), -1)
            made = [product(described, result, at)]
        return tuple([each for each in made if each is not None])

    def argument(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], default: Any = None) -> Any:
        """An argument of a call by the name that the operation's own signature gives it."""
        if name in kwargs:
            return kwargs[name]
        at = self.arguments.index(name) if name in self.arguments else len(args)
        return args[at] if at < len(args) else default

    def size_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, str]:
        """The arguments (by position) that are factors of the rule, such as a number of groups, with the names they have there."""
        if self.rule is None:
            return {}
        marked = _marked(args)
        sizes = self.rule(*marked, **kwargs).sizes
        return {at: name for at, arg in enumerate(marked) for name, size in sizes.items() if size is arg and name[0] != "_"}


class Marked(int):
    """A number among the arguments of a call, which can be told from others of the same size."""


def _marked(args: Sequence[Any]) -> list[Any]:
    return [Marked(arg) if type(arg) is int else arg for arg in args]


def fixed(rule: Expr) -> Expr:
    """A rule in which factors that the call itself was told (a number of groups) stay: nobody would tell it another number.

    >>> fixed(Expr("n (g i), (g o) i -> n (g o)", (None, None), {"g": Marked(4)})).text
    'n (_g i), (_g o) i -> n (_g o)'
    """
    names = {name for name, size in rule.sizes.items() if type(size) is Marked and name[0] != "_"}
    if not names:
        return rule
    text = re.sub(r"[A-Za-z0-9_]+", lambda word: f"_{word[0]}" if word[0] in names else word[0], rule.text)
    return Expr(text, rule.operands, {f"_{name}" if name in names else name: int(size) for name, size in rule.sizes.items()})


OPERATIONS: dict[str, Operation] = {}
FACTS = frozenset(f.name for f in fields(Operation)) - {"name", "rule", "func", "arguments", "strict"}
# What a user may say of an operation beside its rule.
PUBLIC = frozenset("weight products norm arithmetic flat pools softmax onnx".split())


def operation(name: str) -> Operation:
    """What is said of an operation, by its full name."""
    return OPERATIONS.get(name) or Operation(name)


def full(name: str) -> str:
    """
    >>> full("mm"), full("mylib::mm")
    ('aten::mm', 'mylib::mm')
    """
    return name if "::" in name else f"aten::{name}"


def describe(*names: str, **facts: Any) -> None:
    """Say something of operations, in addition to what was said before."""
    for name in map(full, names):
        known = operation(name)
        if "shapes" in facts:
            facts = {**facts, "shapes": {**known.shapes, **facts["shapes"]}}
        OPERATIONS[name] = replace(known, **facts)


def _decorator(kind: str) -> Callable[..., Any]:
    def described(*names: str, **facts: Any) -> Callable[..., Any]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            describe(*names, **{kind: function}, **facts)
            return function

        return register

    return described


computes, move, assemble = (_decorator(kind) for kind in ("rule", "move", "assemble"))


def shape(*overloads: str) -> Callable[..., Any]:
    """Describe the shape of the results of overloads such as "mm.default": a function of the call's own arguments (None: ask torch)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for overload in overloads:
            name, _, which = overload.partition(".")
            describe(name, shapes={which: function})
        return function

    return register


def rule(*operations: Any, **facts: Any) -> Callable[[Callable[..., Expr]], Callable[..., Expr]]:
    """Describe an operation: the decorated function takes its arguments and returns ``graphprune.expr(text, *tensors)``.

    ``operations``: ``torch.ops.mylib.name`` (or one overload of it), what ``torch.library.custom_op`` returns, or a text "mylib::name"
    (without a namespace: "aten::"). Tensors come as objects with a ``shape``. Coupling, exact cuts, multiply-accumulates, times, scores
    and repairs follow from the text. Where the text cannot say it: ``weight`` (the argument that is the weight of a product; else a
    parameter, or the second factor), ``norm``, ``arithmetic``, ``flat``, ``pools``, ``softmax``, ``products``, ``onnx`` as in :class:`Operation`.

    Raises :class:`~graphprune.errors.BadRule` for anything else; a rule that does not fit its operation raises it when the operation is met.

    >>> @rule("mylib::scaled")
    ... def scaled(x, weight):
    ...     return expr("n i, o i -> n o", x, weight)
    """
    names = [_named(each) for each in operations]
    if not names:
        raise BadRule("rule() needs an operation: @graphprune.rule(torch.ops.mylib.name)")
    for fact in facts:
        if fact not in PUBLIC:
            raise BadRule(f"nothing named {fact!r} can be said of an operation; there are {', '.join(sorted(PUBLIC))}")

    def register(function: Callable[..., Expr]) -> Callable[..., Expr]:
        if not callable(function):
            raise BadRule(f"rule() decorates a function that returns graphprune.expr(text, *tensors), not {function!r}")
        for name in names:
            known = OPERATIONS.get(name.partition(".")[0]) or Operation(name)
            said = {"weight": "", "products": None, **facts}
            OPERATIONS[name] = replace(known, name=name, rule=function, move=None, assemble=None, picks=False, why="", strict=True, **said)
        return function

    return register


def _named(what: Any) -> str:
    """The full name of an operation, with its overload where one is meant."""
    if isinstance(what, torch._ops.OpOverload):
        return f"{what._schema.name}.{what._overloadname}"
    if isinstance(what, torch._ops.OpOverloadPacket):
        return what._qualified_op_name
    if isinstance(getattr(what, "_qualname", None), str):  # of torch.library.custom_op
        return what._qualname
    if isinstance(what, str) and what.replace("::", "").replace(".", "").isidentifier():
        namespace, _, name = full(what).partition("::")
        if namespace == "aten" and not hasattr(torch.ops.aten, name.partition(".")[0]):
            raise BadRule(f"torch has no operation aten::{name}; an operation of your own has its namespace before its name: 'mylib::{name}'")
        return full(what)
    raise BadRule(f"an operation is torch.ops.mylib.name or the text 'mylib::name', not {what!r}")


def resolve(func: Any) -> Operation:
    """What is true of a function that torch calls, its overload included."""
    schema = func._schema
    known = OPERATIONS.get(f"{schema.name}.{schema.overload_name or 'default'}") or OPERATIONS.get(schema.name)
    twin = OPERATIONS.get(schema.name[:-1]) if schema.name.endswith("_") else None
    if known is None or (twin is not None and not _says(known)):
        known = twin or known or Operation(schema.name)
    returned = schema.returns[0].alias_info if schema.returns else None
    return replace(
        known,
        name=schema.name,
        pointwise=known.pointwise or is_pointwise(func),
        func=func,
        arguments=tuple(argument.name for argument in schema.arguments),
        writes=schema.is_mutable,
        inplace=schema.name.endswith("_"),
        # Under inference_mode, which a model may ask for itself, calls come before they are taken apart.
        whole=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        views=returned is not None and not returned.is_write,
        shape=(OPERATIONS.get(schema.name) or known).shapes.get(schema.overload_name or "default"),
    )


def _says(known: Operation) -> bool:
    return any((known.rule, known.move, known.assemble, known.pointwise, known.factory, known.why))


def is_pointwise(func: Any) -> bool:
    """Whether torch marks it so; in-place overloads lack the mark of their functional twin."""
    if torch.Tag.pointwise in func.tags:
        return True
    space, _, name = func._schema.name.partition("::")
    twin = getattr(getattr(torch.ops, space), name[:-1], None) if name.endswith("_") and len(name) > 1 else None
    return twin is not None and any(torch.Tag.pointwise in getattr(twin, overload).tags for overload in twin.overloads())


def pointwise(values: Sequence[Value], ranks: Sequence[int]) -> Expr:
    """All tensors of a pointwise call, aligned on the right as broadcasting does."""
    return Expr(_aligned(tuple([len(v.shape) for v in values]), tuple(ranks)), tuple(values))


@lru_cache(maxsize=4096)
def _aligned(sizes: tuple[int, ...], ranks: tuple[int, ...]) -> str:
    top = max(ranks)
    left, right = (",".join([" ".join(LETTERS[top - rank : top]) for rank in side]) for side in (sizes, ranks))
    return f"{left}->{right}"


def template(op: Operation) -> str:
    """The rule that an operation lacks, as it would be written.

    >>> print(template(resolve(torch.ops.aten.renorm.default)))
        @graphprune.rule(torch.ops.aten.renorm)
        def renorm(self, p, dim, maxnorm): return graphprune.expr("… -> …", self)
    """
    namespace, _, name = op.name.partition("::")
    written: list[str] = []
    tensors: list[str] = []
    star = False
    for argument in op.func._schema.arguments if op.func is not None else ():
        parameter = argument.name + "_" if keyword.iskeyword(argument.name) else argument.name
        if argument.kwarg_only and not star:
            written.append("*")
            star = True
        written.append(parameter + (f"={argument.default_value!r}" if argument.has_default_value() else ""))
        if "Tensor" in str(argument.type):
            tensors.append(parameter)
    text = ", ".join("…" for _ in tensors)
    return (
        f"    @graphprune.rule(torch.ops.{namespace}.{name})\n"
        f'    def {name.strip("_") or name}({", ".join(written)}): return graphprune.expr("{text or "…"} -> …", {", ".join(tensors)})'
    )
