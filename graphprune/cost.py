"""What a model costs, exactly, as functions of how many units each group keeps: nothing is run.

MACs are those of all products: convolutions, matrix products and attention (taken apart into its two products); a FLOP
count is twice that. ``size`` is the bytes of all parameters and buffers. ``memory`` is the largest sum of bytes of
activations alive at one time, inputs and outputs included, when every tensor is freed after its last use; attention is
counted with its matrix of weights, which fused kernels avoid.

Every cost is a sum of products of axis lengths (:mod:`graphprune.coupling.lengths`), so one evaluation is a few array operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from .coupling.groups import Groups, couple
from .coupling.lengths import Lengths
from .errors import BadTarget
from .operations.labels import Array
from .operations.notation import Value
from .tracing.graph import Graph
from .tracing.node import Node
from .tracing.trace import trace
from .tracing.trees import tensors

FACTORS = 4
NUMBERS = 2**21  # how many numbers a table of lengths or items may have before it is computed a few rows at a time
NAMES = ("params", "macs", "size", "memory")


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-accumulates of one call on the example, bytes of the weights, peak bytes of the activations."""

    params: int
    macs: int
    size: int
    memory: int

    @property
    def flops(self) -> int:
        return 2 * self.macs

    def __str__(self) -> str:
        params, macs, flops = (_unit(n) for n in (self.params, self.macs, self.flops))
        return f"{params.strip()} params, {macs}MACs ({flops}FLOPs), {_mebi(self.size, 0)}, peak activations {_mebi(self.memory, 1)}"


def _mebi(size: int, digits: int) -> str:
    """
    >>> _mebi(2**30, 0), _mebi(80_000, 1), _mebi(400, 1)
    ('1024 MiB', '78.1 KiB', '400 bytes')
    """
    if size >= 2**20:
        return f"{size / 2**20:.{digits}f} MiB"
    return f"{size / 2**10:.1f} KiB" if size >= 2**10 else f"{size} bytes"


def _unit(number: float) -> str:
    """
    >>> _unit(138_357_544), _unit(15_470_264_320), _unit(999)
    ('138.36 M', '15.47 G', '999 ')
    """
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.2f} {letter}"
    return f"{number:.0f} "


class Part(Protocol):
    """A cost as a function of lengths, made of items: each is a function of a few forms, ``forms`` (items, at most 4; form 0 is 1).

    :meth:`each` gives some items at the lengths of their forms, so that a step that changes few lengths is priced by the few
    items that hold them (:mod:`graphprune.budget.ledger`).
    """

    @property
    def forms(self) -> Array: ...

    def __call__(self, lengths: Array) -> Array:
        """The cost, (rows,), for lengths (rows, forms)."""
        ...

    def each(self, items: Array, lengths: Array) -> Array:
        """The items, (n,), by number, each at the lengths of its forms (n, columns of ``forms``)."""
        ...

    def total(self, values: Array) -> float:
        """The cost, from the values of all items (items,)."""
        ...


@dataclass(frozen=True)
class Sum:
    """A sum of products of lengths: ``factors`` (terms,), ``forms`` (terms, 4), padded by form 0, which is 1."""

    factors: Array
    forms: Array

    def terms(self, lengths: Array) -> Array:
        """(rows, terms) for lengths (rows, forms)."""
        products = lengths[:, self.forms[:, 0]] * self.factors
        for column in range(1, FACTORS):
            if self.forms[:, column].any():
                products = products * lengths[:, self.forms[:, column]]
        return products

    def __call__(self, lengths: Array) -> Array:
        return self.terms(lengths).sum(axis=1)

    def each(self, items: Array, lengths: Array) -> Array:
        return self.factors[items] * lengths[:, 0] * lengths[:, 1] * lengths[:, 2] * lengths[:, 3]

    def total(self, values: Array) -> float:
        return float(values.sum())


@dataclass(frozen=True)
class Live:
    """The peak of what is alive: bytes of every storage, which is there from the call ``start`` to the call ``stop`` of ``moments`` calls."""

    size: Sum
    start: Array
    stop: Array
    moments: int

    @property
    def forms(self) -> Array:
        return self.size.forms

    def __call__(self, lengths: Array) -> Array:
        return np.array([self.total(row) for row in self.size.terms(lengths)])

    def each(self, items: Array, lengths: Array) -> Array:
        return self.size.each(items, lengths)

    def total(self, values: Array) -> float:
        return float(self.profile(values).max())

    def profile(self, values: Array, items: Array | slice = slice(None)) -> Array:
        """What is alive at every moment, (moments,), of storages with these bytes."""
        size = self.moments + 1
        changes = np.bincount(self.start[items], values, size) - np.bincount(np.minimum(self.stop[items] + 1, self.moments), values, size)
        return np.cumsum(changes)[:-1]


@dataclass(frozen=True)
class Costs:
    """The costs of a graph under any choice of units. Made by :func:`costs`."""

    lengths: Lengths
    parts: Mapping[str, Part]

    def at(self, widths: Array, names: Sequence[str] = NAMES) -> dict[str, Array]:
        """The named costs, (rows,) each, for numbers of kept units (rows, groups).

        Exact when all units of a group have equally many positions wherever they stand (``lengths.even``), the usual
        case; otherwise the mean over the units.
        """

        def mean(rows: Array) -> Array:
            lengths = self.lengths.linear(rows)
            for number, values in self.lengths.expected(rows).items():
                lengths[:, number] = values
            return lengths

        return self.rowwise(mean, widths, names)

    def rowwise(self, lengths_of: Callable[[Array], Array], widths: Array, names: Sequence[str]) -> dict[str, Array]:
        """The named costs, (rows,) each, where ``lengths_of`` makes lengths (rows, forms) of widths (rows, groups); a few rows at a time."""
        step = max(1, NUMBERS // max([len(self.lengths.constant), *(len(self.parts[name].forms) for name in names)]))
        blocks = [lengths_of(widths[at : at + step]) for at in range(0, len(widths), step)]
        return {name: np.concatenate([self.parts[name](block) for block in blocks]) for name in names}

    def of(self, kept: Sequence[torch.Tensor]) -> Cost:
        """The exact costs when these units stay."""
        lengths = self.lengths.of(kept)[None]
        return Cost(*(round(float(self.parts[name](lengths)[0])) for name in NAMES))

    @property
    def full(self) -> Cost:
        """What the uncut model costs."""
        return self.of([torch.arange(group.size) for group in self.lengths.groups])


def cost(groups: Groups, kept: Sequence[torch.Tensor] | None = None) -> Cost:
    """What a coupled graph costs when the ``kept`` units (a tensor of indices per group; default all) stay.

    >>> from graphprune.coupling.groups import couple
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> groups = couple(trace(net, torch.zeros(3, 4)))
    >>> cost(groups).macs, cost(groups, [torch.arange(4)]).macs
    (144, 72)
    """
    found = costs(groups)
    if kept is None:
        return found.full
    if len(kept) != len(groups):
        raise BadTarget(f"{len(kept)} sets of kept units were given for {len(groups)} groups")
    return found.of(kept)


def profile(model: nn.Module, example_input: Any, example_kwargs: dict[str, Any] | None = None) -> Cost:
    """Parameters, MACs, bytes and peak activation memory of a model on an example; raises what :func:`trace` raises.

    >>> print(profile(nn.Linear(1000, 500), torch.zeros(1, 1000)))
    500.50 k params, 500.00 kMACs (1.00 MFLOPs), 2 MiB, peak activations 5.9 KiB
    """
    return cost(couple(trace(model, example_input, example_kwargs)))


def macs_by_call(graph: Graph) -> list[float]:
    """The multiply-accumulates of every call of the uncut graph.

    >>> sum(macs_by_call(trace(nn.Linear(3, 5), torch.zeros(2, 3))))
    30.0
    """
    lengths = Lengths(couple(graph))
    terms = [list(products(node, lengths)) for node in graph.nodes]
    full = lengths.of([torch.arange(group.size) for group in lengths.groups])
    return [float(sum(factor * math.prod(full[form] for form in forms) for factor, forms in mine)) for mine in terms]


def costs(groups: Groups, more: Mapping[str, Callable[[Lengths], Part]] | None = None) -> Costs:
    """The cost functions of a coupled graph; ``more`` makes further ones, functions of lengths (rows, forms)."""
    graph, lengths = groups.graph, Lengths(groups)
    own = {name: leaf for name, leaf in graph.leaves.items() if not name.startswith("<")}
    trained = [leaf for name, leaf in own.items() if name in graph.parameters]
    volumes = {id(leaf): _volume(lengths, leaf.shape, leaf) for leaf in own.values()}
    params = _sum([volumes[id(leaf)] for leaf in trained])
    size = _sum([(leaf.dtype.itemsize * volumes[id(leaf)][0], volumes[id(leaf)][1]) for leaf in own.values()])
    macs = _sum([term for node in graph.nodes for term in products(node, lengths)])
    live = _live(graph, lengths, {leaf.storage for leaf in own.values()})
    others = {name: make(lengths) for name, make in (more or {}).items()}
    return Costs(lengths, {"params": params, "macs": macs, "size": size, "memory": live, **others})


def priced(groups: Groups, more: Mapping[str, Callable[[Lengths], Part]]) -> Costs:
    """:func:`costs`, made once for equal groups of one graph, however often it is coupled and asked."""
    derived, key = groups.graph.derived, ("costs", groups.key, *more.items())
    if key not in derived:
        derived[key] = costs(groups, more)
    return derived[key]


Term = tuple[float, tuple[int, ...]]


def _volume(lengths: Lengths, shape: Sequence[int], value: Value, dims: Sequence[int] | None = None) -> Term:
    factor, forms = 1, list[int]()
    for dim in range(len(shape)) if dims is None else dims:
        scale, form = lengths.form(value, dim)
        factor *= scale
        if form:
            forms.append(form)
    return factor, tuple(sorted(forms))


def _sum(terms: Sequence[Term]) -> Sum:
    """Equal products are added up."""
    merged: dict[tuple[int, ...], float] = {}
    for factor, forms in terms:
        merged[forms] = merged.get(forms, 0) + factor
    return _array([(factor, forms) for forms, factor in merged.items()])


def _array(terms: Sequence[Term]) -> Sum:
    table = np.zeros((len(terms), FACTORS), dtype=np.int64)
    for row, (_, forms) in enumerate(terms):
        table[row, : len(forms)] = forms
    return Sum(np.array([factor for factor, _ in terms], dtype=float), table)


def products(node: Node, lengths: Lengths) -> Iterator[Term]:
    """The multiply-accumulates of one call, as products of lengths."""
    for product in node.products:
        factor, axes = product.volume()
        forms: list[int] = []
        for value, dim in axes:
            scale, form = lengths.form(value, dim)
            factor *= scale
            if form:
                forms.append(form)
        yield float(factor), tuple(sorted(forms))


def _live(graph: Graph, lengths: Lengths, weights: set[int]) -> Live:
    owner: dict[int, Value] = {}
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    end = len(graph.nodes)
    for value in graph.inputs:
        owner.setdefault(value.storage, value)
        made[value.storage], last[value.storage] = 0, end
    read = {value.storage for value in (*graph.outputs, *tensors([(node.args, node.kwargs) for node in graph.nodes]))}
    for index, node in enumerate(graph.nodes):
        for value in node.outs:
            if value is not node.outs[0] and value.storage not in read:
                continue  # statistics that a norm leaves for its backward pass
            if value.storage not in weights and value.storage not in owner and math.prod(value.shape):
                owner[value.storage], made[value.storage] = value, index
        for value in (*node.outs, *tensors((node.args, node.kwargs))):
            if value.storage in owner:
                last[value.storage] = max(last.get(value.storage, 0), index)
    last.update({value.storage: end for value in graph.outputs if value.storage in owner})
    terms = [_volume(lengths, value.shape, value) for value in owner.values()]
    size = _array([(value.dtype.itemsize * factor, forms) for value, (factor, forms) in zip(owner.values(), terms, strict=True)])
    start, stop = (np.array([times[key] for key in owner], dtype=np.int64) for times in (made, last))
    return Live(size, start, stop, max(end, 1))
