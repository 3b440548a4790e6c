"""Whether the model that a configuration builds computes what the cut model computes: :func:`difference`.

Equal shapes are not enough: a width may also be a factor (a scale that is the root of a width). With weights both models run on the example; without,
the numbers and the tables that their modules hold are compared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..cutting.tokens import Tokens
from ..tracing.copies import duplicate
from ..tracing.graph import Graph
from ..tracing.trees import tensors
from .config import Solution, Tree
from .rebuilt import builder, loaded, tree_of

CURES = (
    "shrink(..., widths=graphprune.Widths(uniform=True)) cuts only what a configuration can say, or tells that it can say nothing of it; "
    "graphprune.save(small, folder) keeps this model, and graphprune.load(folder, base) reads it"
)
TABLE = 2**16  # entries of tables that are compared
SLACK, COARSE = 16, 2e-2  # how far two runs of the same weights may be apart: in roundings, and at most


def difference(whole: nn.Module, small: nn.Module, solution: Solution, graph: Graph, tokens: Tokens | None = None) -> str:
    """Why a model that is built from the configuration, with the weights of the cut one, does not compute the same on the example (or nothing)."""
    if without_values(small):
        wanted, built = promised_numbers(whole), promised_numbers(whole, solution.tree)
        other = bool(solution.gap.attributes) or any(is_another(built.get(place, value), value) for place, value in wanted.items())
        return also_a_factor(solution) if other else ""
    args, kwargs = graph.example if tokens is None else tokens.example(*graph.example)
    try:
        again = loaded(whole, solution.tree)
        twin = duplicate(small, {id(tensor): tensor for tensor in small.parameters()})
        with torch.no_grad():
            rebuilt = list(tensors(again(*copy.deepcopy(args), **copy.deepcopy(kwargs)), torch.Tensor))
            wanted = list(tensors(twin.eval()(*copy.deepcopy(args), **copy.deepcopy(kwargs)), torch.Tensor))
    except Exception as error:
        return f"the model that its configuration builds does not run with these weights: {type(error).__name__}: {error}; graphprune.save keeps it"
    worst = max((_apart(a, b) for a, b in zip(wanted, rebuilt, strict=False)), default=0.0)
    if len(wanted) == len(rebuilt) and worst <= 1:
        return ""
    return also_a_factor(solution)


def also_a_factor(solution: Solution) -> str:
    keys = ", ".join(f"{'.'.join(map(str, path))}={value}" for path, value in solution.changes.items())
    return f"the model that its configuration builds ({keys}) has the same shapes and computes something else: a number is also a factor. {CURES}"


def without_values(model: nn.Module) -> bool:
    """Whether the weights have no values, so that nothing can be computed with them."""
    return any(tensor.is_meta for tensor in model.parameters())


def promised_numbers(model: nn.Module, tree: Tree | None = None) -> dict[tuple[str, str], Any]:
    """The numbers that modules hold (:func:`numbers_of`) of a model without values, or of what its class builds from ``tree``.

    Tables are known from building alone; where blocks are gone, those of the model itself are left out, for it is built with all.
    """
    if tree is not None:
        return numbers_of(builder(model, bare=True)(tree))
    built = builder(model, bare=True)(tree_of(model))
    tables = numbers_of(built) if len(list(built.modules())) == len(list(model.modules())) else {}
    return tables | numbers_of(model)


def numbers_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The numbers that modules hold: plain ones, and tables that are no weights, by what is in them."""
    values: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        values |= {(path, key): value for key, value in module.__dict__.items() if type(value) is float}
        lasting = {key for key in module._buffers if key not in module._non_persistent_buffers_set}
        tables = {key: tensor for key, tensor in module._buffers.items() if tensor is not None and key not in lasting and not tensor.is_meta}
        values |= {(path, key): tuple(tensor.detach().double().ravel().tolist()) for key, tensor in tables.items() if tensor.numel() <= TABLE}
    return values


def is_another(built: Any, wanted: Any) -> bool:
    """Whether a number, or a table that was not cut, is another one."""
    return built != wanted if not isinstance(wanted, tuple) or len(built) == len(wanted) else False


def _apart(wanted: torch.Tensor, rebuilt: torch.Tensor) -> float:
    """How far two results are apart, in what may be between two runs."""
    if wanted.shape != rebuilt.shape or wanted.dtype != rebuilt.dtype:
        return float("inf")
    if not wanted.is_floating_point() or not wanted.numel() or wanted.is_meta:
        return 0.0 if wanted.is_meta or torch.equal(wanted, rebuilt) else float("inf")
    limit = min(COARSE, SLACK * torch.finfo(wanted.dtype).eps)
    gap = torch.nan_to_num(wanted.double() - rebuilt.double(), posinf=0.0, neginf=0.0).abs().max()
    return float(gap / limit / rebuilt.double().nan_to_num().abs().max().clamp(min=1e-30)) if torch.equal(wanted.isnan(), rebuilt.isnan()) else float("inf")
