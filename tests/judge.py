"""A second, slow oracle, which shares no code with the engine: the original's own code, on a copy whose removed entries are zero.

It reads nothing but ``plan.cuts``. Weights that are made (weight normalisation, parametrizations) are made first and zeroed then; a norm of torch's own that
runs over removed channels takes its statistics of those that stay, as the README says, and nothing else does.

>>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> small, plan = graphprune.shrink(net, torch.ones(1, 4), ratio=0.5, return_plan=True)
>>> gap(small(torch.ones(1, 4)), emptied(net, plan)(torch.ones(1, 4))) < 1e-5
True
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import graphprune


def emptied(model: nn.Module, plan: graphprune.Plan) -> nn.Module:
    """A copy of the model with every removed entry set to zero; it keeps all shapes."""
    twin = copied(model)
    cuts = made(twin, plan.cuts)
    seen = set()
    for name, tensor in [*twin.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False)]:
        if name not in cuts or id(tensor) in seen or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        seen.add(id(tensor))
        with torch.no_grad():
            for axis, kept in cuts[name].items():
                tensor.index_fill_(axis, torch.tensor(removed(tensor.shape[axis], kept), dtype=torch.long), 0)
    for name, module in twin.named_modules():
        kept = cuts.get(f"{name}.weight".lstrip("."), {}).get(0)
        if kept is not None and isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            module.forward = Survivors(module, kept)
    return twin


def removed(size: int, kept: list[int]) -> list[int]:
    return sorted(set(range(size)) - set(kept))


class Fixed(nn.Module):
    """A weight that was made, from now on as it is."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        return self.weight


def made(model: nn.Module, cuts: dict[str, dict[int, list[int]]]) -> dict[str, dict[int, list[int]]]:
    """The cuts by the names of what modules use; weights that are made become parameters of the (copied) model."""
    cuts = dict(cuts)
    for name, module in list(model.named_modules()):
        start = f"{name}." if name else ""
        for tensor in list(module.parametrizations) if parametrize.is_parametrized(module) else ():
            makers = module.parametrizations[tensor]
            weight = getattr(module, tensor)
            sources = [f"{start}parametrizations.{tensor}.{leaf}" for leaf, value in makers.named_parameters() if value.shape == weight.shape]
            makers.append(Fixed(weight))  # removing them would change the class, which the original shares
            cuts.update({f"{start}parametrizations.{tensor}.{len(makers) - 1}.weight": cuts[source] for source in sources if source in cuts})
        if hasattr(module, "weight_v") and hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
            if f"{start}weight_v" in cuts:
                cuts[f"{start}weight"] = cuts[f"{start}weight_v"]
    return cuts


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of tensors that hooks computed."""
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


class Survivors:
    """The forward pass of a norm whose statistics are those of the channels that stay."""

    def __init__(self, module: nn.Module, kept: list[int]) -> None:
        self.module, self.kept = module, torch.tensor(kept)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module, kept, out = self.module, self.kept, torch.zeros_like(x)
        weight, bias = module.weight[kept], getattr(module, "bias", None)
        bias = None if bias is None else bias[kept]
        if isinstance(module, nn.GroupNorm):
            size = module.num_channels // module.num_groups
            for group in range(module.num_groups):
                inside = [(at, int(channel)) for at, channel in enumerate(kept) if int(channel) // size == group]
                if inside:
                    rows, channels = map(list, zip(*inside, strict=True))
                    out[:, channels] = F.group_norm(x[:, channels], 1, weight[rows], None if bias is None else bias[rows], module.eps)
        elif isinstance(module, nn.RMSNorm):
            out[..., kept] = F.rms_norm(x[..., kept], (len(kept),), weight, module.eps)
        else:
            out[..., kept] = F.layer_norm(x[..., kept], (len(kept),), weight, bias, module.eps)
        return out


def tensors_in(result: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a result, in order."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from tensors_in(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from tensors_in(value)


def gap(mine: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest entry of its tensor; infinite where shapes differ or there is nothing to compare."""
    mine, wanted = ([tensor.detach() for tensor in tensors_in(result)] for result in (mine, wanted))
    if not wanted or [tensor.shape for tensor in mine] != [tensor.shape for tensor in wanted]:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if a.numel() else 0.0 for a, b in zip(mine, wanted, strict=True))
