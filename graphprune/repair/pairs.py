"""Queries and keys: a query's products with the kept key positions have to say what its products with all of them said.

For logits ``q·k`` of which only positions K are left, ``argmin E(q·k − q″·k_K)²`` over ``q″`` is ``A q`` with
``A = cov(k)_KK⁻¹ cov(k)_K,:`` (a constant for each query does not change a softmax, so covariances are meant). What the queries' weight is
then fitted to is ``A q`` instead of the kept rows of q: :func:`mixes`. Where something stands between the weight and the product that is not
a move (a rotation by position), the pair is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..cutting.plan import Plan
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.node import Node
from ..tracing.probe import batch_inputs, watch
from .sites import Site

Tensor = torch.Tensor
RIDGE = 1e-6


def mixes(original: nn.Module, graph: Graph, plan: Plan, places: Sequence[Site], batches: Sequence[Any], ridge: float = RIDGE) -> dict[str, Tensor]:
    """For each queries' weight by name, the matrix (all outputs, kept outputs) that makes the target from the original's outputs."""
    cut_pairs = [pair for pair in pairs(graph, places) if _cut(plan, pair[1])]
    if not cut_pairs:
        return {}
    seen = _covariances(original, graph, [key for _, key, _, _ in cut_pairs], batches)
    result: dict[str, Tensor] = {}
    for query, key, q, k in cut_pairs:
        keep, rows = plan.cuts[key.weight][key.axis], plan.cuts.get(query.weight, {}).get(query.axis)
        if rows is None:
            continue
        at = {channel: column for column, channel in enumerate(rows)}
        mix = result.get(query.weight)
        if mix is None:
            mix = torch.zeros(graph.leaves[query.weight].shape[query.axis], len(rows), dtype=torch.float64)
            mix[torch.tensor(rows), torch.arange(len(rows))] = 1.0
        kept = torch.isin(k, torch.tensor(keep))
        cov = seen[key.weight]
        for queries, keys, positions in zip(q.tolist(), k, kept, strict=True):
            columns = [at.get(queries[d]) for d in positions.nonzero().ravel().tolist()]
            if not columns or None in columns:  # a head that is gone asks nothing
                continue
            gram = cov[keys[positions]][:, keys[positions]]
            gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            mix[queries] = 0.0
            mix[torch.tensor(queries)[:, None], torch.tensor(columns)[None]] = torch.linalg.solve(gram, cov[keys[positions]][:, keys]).T
        result[query.weight] = mix
    return result


def pairs(graph: Graph, places: Sequence[Site]) -> list[tuple[Site, Site, Tensor, Tensor]]:
    """Queries' and keys' sites of every product of two activations, and the channels (heads, positions) that meet there."""
    every = []
    sources = _Sources(graph, places)
    for node in graph.nodes:
        product = node.product
        if product is None or product.others or any(len(axes) != 1 for axes in (product.input.summed, product.weight.summed)):
            continue
        left, right = (sources.of(operand.value) for operand in product.operands)
        if left is None or right is None or len(product.shared) != 1:
            continue
        (query, q), (key, k) = left, right
        # (heads, queries, channels) and (heads, channels, keys)
        q = q.movedim(product.input.summed[0], -1)
        k = k.movedim(product.weight.summed[0], 1)
        if (q == q[:, :1]).all() and (k == k[:, :, :1]).all():  # the channels of both stand along the axis that is summed
            rows, one = torch.cat([q[:, 0], k[:, :, 0]], 1).unique(dim=0), q.shape[2]
            every.append((query, key, rows[:, :one], rows[:, one:]))
    return every


class _Sources:
    """The site behind a value that only moves lead to, and the channel of the site that each entry comes from."""

    def __init__(self, graph: Graph, places: Sequence[Site]) -> None:
        self.graph = graph
        self.made = {id(site.y): site for site in places}

    def of(self, value: Value) -> tuple[Site, Tensor] | None:
        path = []
        while id(value) not in self.made:
            node = self.graph.nodes[value.node] if value.node >= 0 else None
            source = self.moved(node) if node is not None else None
            if node is None or source is None:
                return None
            path.append((node, next(i for i, out in enumerate(node.outs) if out is value)))
            value = source
        site = self.made[id(value)]
        axis = 1 if site.shape is not None else len(value.shape) - 1
        index = torch.arange(value.shape[axis]).reshape([-1 if d == axis else 1 for d in range(len(value.shape))]).expand(value.shape)
        for node, at in reversed(path):
            if node.op.arithmetic:
                continue  # by a number: a factor of both sides
            index = index.contiguous() if node.op.regroups else index
            index = node.func(index, *node.args[1:], **{k: v for k, v in node.kwargs.items() if k != "memory_format"})
            index = index[at] if isinstance(index, tuple | list) else index
        return site, index

    @staticmethod
    def moved(node: Node) -> Value | None:
        """The one value whose entries a call puts into other places, or multiplies by a number."""
        values = [arg for arg in node.args if isinstance(arg, Value)]
        passes = node.is_move or node.op.part or node.op.arithmetic in ("mul", "div")
        return values[0] if passes and len(values) == 1 and values[0] is node.args[0] else None


def _cut(plan: Plan, key: Site) -> bool:
    return key.axis in plan.cuts.get(key.weight, {})


def _covariances(model: nn.Module, graph: Graph, keys: Sequence[Site], batches: Sequence[Any]) -> Mapping[str, Tensor]:
    """Of the outputs of the keys' weights on the original."""
    sums: dict[str, tuple[int, Any, Any]] = {}  # how many rows, their sum, the sum of their outer products
    names = {id(site.y): site for site in keys}

    def see(value: Value, tensor: Tensor) -> None:
        site = names[id(value)]
        rows = tensor.detach().movedim(1 if site.shape is not None else -1, -1).flatten(0, -2).double().cpu()
        count, total, square = sums.get(site.weight, (0, 0.0, 0.0))
        sums[site.weight] = count + len(rows), total + rows.sum(0), square + rows.T @ rows

    with torch.no_grad(), watch(model, graph, [site.y for site in names.values()], see):
        for batch in batches:
            args, kwargs = batch_inputs(batch)
            model(*args, **kwargs)
    return {name: square / count - torch.outer(total / count, total / count) for name, (count, total, square) in sums.items()}
