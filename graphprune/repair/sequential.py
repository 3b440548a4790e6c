"""One weight after the other, in the order of the run: each is fitted to the original's outputs on what the repaired cut model feeds it.

Inputs come from the cut model with everything before already repaired, targets from the original (AIMET, SlimGPT), so a fit also
corrects what earlier ones left over. Where the result is added to a residual stream, the target is what the stream lacks; where an
activation stands behind, only what that lets pass counts. Part of the calibration is kept out of the fits, and a fit that does worse
there is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import islice
from operator import add
from typing import Any

import torch
from torch import nn

from ..cutting.plan import Plan
from ..errors import BadCalibration
from ..operations.notation import Value
from ..scores.data import bar, samples
from ..tracing.graph import Graph
from ..tracing.paced import runs, side_by_side
from .censored import Rows, intervals
from .fitting import Repaired, Seen, Setting, Weights, fit, fit_scale, idle
from .moments import moments
from .pairs import mixes
from .recurrent import Fed, Recurrence, fit_recurrence, recurrences
from .rows import chosen, outputs, read, written
from .sites import Scale, Site, scales, sites

Tensor = torch.Tensor
FEWEST, EACH = 16384, 24  # rows of a fit: so many at least, and so many for each input


def repair_weights(
    original: nn.Module, small: nn.Module, graph: Graph, plan: Plan, batches: Sequence[Any], spare: Sequence[Any], setting: Setting, progress: bool = True
) -> list[Repaired]:
    """Fit every weight of ``small`` behind the first cut, in place; what was done, and why some weights were left."""
    if not batches:
        raise BadCalibration("repair needs at least one calibration batch")
    places, left = sites(graph)
    work = _Work(original, small, graph, plan, setting, [s for s in places if s.weight in dict(small.named_parameters(remove_duplicate=False))])
    if "least-squares" in setting.steps:
        work.mixes = mixes(original, graph, plan, work.sites, batches)
    done: list[Repaired] = []
    counts = [samples(batch) for batch in (*batches, *spare)]
    work.samples = max(1, sum(counts[: len(batches)]))
    wide = runs(original, graph, (*batches, *spare), work.takes(cut=False), setting.waiting)
    tight = runs(small, graph, (*batches, *spare), work.takes(cut=True), setting.waiting)
    with side_by_side([*wide, *tight]):
        for place in bar(sorted((*work.sites, *work.scales, *work.recurrences), key=lambda p: p.step), "repair", progress):
            if isinstance(place, Recurrence):
                done += work.recurrent(place, [(a, b) for a, b in zip(wide, tight, strict=True)], len(batches))
                continue
            if isinstance(place, Scale):
                done += fit_scale(work.weights, place, [work.scaled(place, a, b) for a, b in zip(wide, tight, strict=True)], len(batches))
                continue
            parts = (work.seen(place, a, b) for a, b in zip(wide, tight, strict=True))  # added up one by one: each is as large as the sum
            data = reduce(add, islice(parts, len(batches)))
            check = reduce(add, parts) if spare else data
            done += fit(work.weights, place, data, check, setting)
    fitted = tuple(f"{place.module}.".lstrip(".") for place in work.recurrences)
    return done + [idle("left", f"{name}: {reason}") for name, reason in left.items() if name in plan.cuts and not name.startswith(fitted)]


def taken(run: Any, value: Value, site: Site | Scale, role: str) -> Tensor:
    """The rows that a site needs of a value, in float32 at least; each is asked for once, and not held after."""
    rows = run.until(value).pop((site.step, role))
    return rows if rows.dtype == torch.float64 else rows.float()


class _Work:
    """What each site sees of two models."""

    def __init__(self, original: nn.Module, small: nn.Module, graph: Graph, plan: Plan, setting: Setting, places: list[Site]) -> None:
        self.weights, self.setting, self.sites = Weights(original, small, plan), setting, places
        self.mixes: dict[str, Tensor] = {}
        self.samples = 1
        # behind a cut stream the norms divide by another size, and not every reader of theirs can be fitted
        found = scales(graph) if {"least-squares", "variance"} & set(setting.steps) else []
        self.scales = [scale for scale in found if 0 in plan.cuts.get(scale.weight, {})]
        self.recurrences = recurrences(graph, original, small) if "least-squares" in setting.steps else []
        self.models = original, small

    def takes(self, cut: bool) -> dict[int, tuple[Value, Any]]:
        """What to keep of every watched value: the rows that each site needs of it."""
        wanted: dict[int, tuple[Value, list[Any]]] = {}
        for place in self.recurrences:
            for value in (place.x, *place.states):
                wanted.setdefault(id(value), (value, []))[1].append((place, "sequence"))
        for scale in self.scales:
            value, role = (scale.x, "x") if cut else (scale.y, "y")
            wanted.setdefault(id(value), (value, []))[1].append((scale, role))
        for site in self.sites:
            values = [("x", site.x)] if cut else [("y", site.y)]
            if site.flat is not None and self.censors(site) and not cut:
                values.append(("z", site.flat.z))
            if site.other is not None and self.setting.target == "block":
                values.append(("other", site.other))
            for role, value in values:
                wanted.setdefault(id(value), (value, []))[1].append((site, role))

        def take(users: list[Any]) -> Any:
            return lambda tensor: {(site.step, role): self.rows(site, role, tensor) for site, role in users}

        return {key: (value, take(users)) for key, (value, users) in wanted.items()}

    def rows(self, site: Site | Scale | Recurrence, role: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if isinstance(site, Recurrence):
            return tensor.clone()
        weight = self.weights.tight[site.weight]
        inputs = 1 if isinstance(site, Scale) else weight.numel() // weight.shape[site.axis]
        share = min(self.setting.rows, max(FEWEST, EACH * inputs)) / self.samples
        if isinstance(site, Scale):
            every = math.prod(tensor.shape[:-1])
            at = chosen(site, every, share * tensor.shape[0] / every, 4)
            flat = tensor.flatten(0, -2)
            return flat.clone() if at is None else flat[at.to(flat.device)]
        if site.shape is None:
            every = math.prod(tensor.shape[:-1])
            share = share * tensor.shape[0] / every if tensor.ndim > 1 else 1.0
        else:
            every = math.prod(outputs(site, tuple(tensor.shape), tuple(weight.shape[2:])) if role == "x" else tensor.shape[2:])
            share = share / every
        at = chosen(site, every, share, 4)
        if role == "x":
            return read(site, tensor, tuple(weight.shape[2:]), at, self.weights.groups(site, tensor))
        return written(site, tensor, at)

    def recurrent(self, place: Recurrence, runs: list[tuple[Any, Any]], fits: int) -> list[Repaired]:
        wide, tight = (model.get_submodule(place.module) for model in self.models)
        assert isinstance(wide, nn.RNNBase) and isinstance(tight, nn.RNNBase)

        def fed(run: Any) -> Fed:
            x, *states = (run.until(value)[place.step, "sequence"] for value in (place.x, *place.states))
            return Fed(x, tuple(states))

        return fit_recurrence(place.module, wide, tight, self.weights.plan, [(fed(one), fed(two)) for one, two in runs], fits)

    def censors(self, site: Site) -> bool:
        """Whether the targets are intervals: all that is between the weight and a flat activation is known."""
        known = site.other is None or self.setting.target == "block"
        return "censored" in self.setting.steps and site.flat is not None and known and site.weight not in self.mixes

    def seen(self, site: Site, wide: Any, tight: Any) -> Seen:
        """Of a batch: inputs of the cut model against what the original makes at the outputs that are left."""
        keep = self.weights.kept(site)

        def left(run: Any, value: Value, role: str) -> Tensor:
            """What the original has at the outputs that are left."""
            rows, mix = taken(run, value, site, role), self.mixes.get(site.weight)
            if mix is not None:
                return rows @ mix.to(rows)
            return rows if keep is None else rows[:, keep.to(rows.device)]

        def grouped(outs: Tensor) -> Tensor:
            return outs.reshape(len(outs), x.shape[0], -1).transpose(0, 1)

        y = left(wide, site.y, "y")
        x = taken(tight, site.x, site, "x")
        if site.other is not None and self.setting.target == "block":
            y = y + (left(wide, site.other, "other") - taken(tight, site.other, site, "other")) * self.weights.gain(site).to(y)
        found, rows = moments(x, grouped(y)), None
        if not all(bool(torch.isfinite(t).all()) for t in (found.xx, found.yx, found.yy)):
            raise BadCalibration(f"calibration gives values that are not finite at {site.weight}; look at the batches and at the model before it")
        if site.flat is not None and self.censors(site):
            low, high = intervals(y, left(wide, site.flat.z, "z"), self.weights.gain(site).to(y), site.flat.ends)
            rows = Rows(((x, grouped(low), grouped(high)),))
        return Seen(found, rows)

    def scaled(self, scale: Scale, wide: Any, tight: Any) -> tuple[Tensor, Tensor]:
        """Of a batch: what the cut model scales, and the original's results, (rows, channels)."""
        y = taken(wide, scale.y, scale, "y")[:, torch.tensor(self.weights.plan.cuts[scale.weight][0])].double()
        x = taken(tight, scale.x, scale, "x").double()
        if scale.norm == "layer_norm":
            x = x - x.mean(1, keepdim=True)
        return (x / (x.square().mean(1, keepdim=True) + scale.eps).sqrt() if scale.norm else x), y
