"""One weight after the other, in the order of the run: each is fitted to the original's outputs on what the repaired cut model feeds it.

Inputs come from the cut model with everything before already repaired, targets from the original (AIMET, SlimGPT), so a fit also
corrects what earlier ones left over. Where the result is added to a residual stream, the target is what the stream lacks; where an
activation stands behind, only what that lets pass counts. Part of the calibration is kept out of the fits, and a fit that does worse
there is dropped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..cutting.plan import Plan
from ..errors import BadCalibration
from ..tracing.notation import Value
from ..tracing.trace import Graph
from ..tracing.trees import leaf_tensors, tensors
from .censored import ROUNDS, Rows, censored, distance, intervals
from .moments import Moments, moments
from .paced import runs, side_by_side
from .pairs import mixes
from .rows import chosen, outputs, read, written
from .sites import Scale, Site, scales, sites
from .solve import Fit, least_squares, means, residual, variances

Tensor = torch.Tensor
RIDGES, CENSORED = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), (1e-3, 1e-2, 1e-1)
TRIAL = 6  # rounds of a censored fit that tries a ridge
FEWEST, EACH = 4096, 24  # rows of a fit: so many at least, and so many for each input


@dataclass(frozen=True)
class Repaired:
    """What one step did: the mean squared error of the outputs at ``where`` over their variance, on calibration kept out of the fit.

    For "censored" the error is the distance from what the activation behind makes the same of.
    """

    step: str
    where: str
    before: float
    after: float
    kept: bool

    def __str__(self) -> str:
        verdict = "" if self.kept else " (not kept)"
        return f"repair {self.step}: {self.where}: {self.before:.4f} -> {self.after:.4f}{verdict}"


@dataclass(frozen=True)
class Setting:
    """How fits are made: the steps in order, the target ("block": with the residual stream, "layer"), how many rows each sees, and where runs may wait.

    ``again``: what was chosen is fitted once more on all rows, so that those kept out no longer judge later steps fairly.
    """

    steps: tuple[str, ...]
    target: str = "block"
    rows: int = 16384
    waiting: float = 1.0
    again: bool = True


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
    counts = [_samples(batch) for batch in (*batches, *spare)]
    work.samples = max(1, sum(counts[: len(batches)]))
    wide = runs(original, graph, (*batches, *spare), work.takes(cut=False), setting.waiting)
    tight = runs(small, graph, (*batches, *spare), work.takes(cut=True), setting.waiting)
    with side_by_side([*wide, *tight]):
        for place in tqdm(sorted((*work.sites, *work.scales), key=lambda p: p.step), desc="repair", delay=5, leave=False, disable=not progress):
            if isinstance(place, Scale):
                done += work.fit_scale(place, [work.scaled(place, a, b) for a, b in zip(wide, tight, strict=True)], len(batches))
                continue
            parts = [work.seen(place, a, b) for a, b in zip(wide, tight, strict=True)]
            data = reduce(add, parts[: len(batches)])
            check = reduce(add, parts[len(batches) :]) if spare else data
            done += work.fit(place, data, check)
    return done + [Repaired("left", f"{name}: {reason}", math.nan, math.nan, False) for name, reason in left.items()]


def _finite(fit: Fit) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in fit)


def _samples(batch: Any) -> int:
    first = next((t for t in tensors(batch, torch.Tensor) if t.ndim), None)
    return len(first) if first is not None else 1


@dataclass(frozen=True)
class _Seen:
    """What a fit knows of some batches: moments, and rows with the intervals in which outputs should lie where the fit is censored."""

    moments: Moments
    rows: Rows | None

    def __add__(self, other: _Seen) -> _Seen:
        return _Seen(self.moments + other.moments, self.rows + other.rows if self.rows and other.rows else None)

    def error(self, step: str, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of ``W x + b``, or distance from the intervals, over the variance of the targets."""
        spread = float((self.moments.yy / self.moments.count).sum().clamp(min=torch.finfo(torch.float64).tiny))
        far = distance(self.rows, weight, bias) if step == "censored" and self.rows else float(residual(self.moments, weight, bias).sum())
        return far / spread


def taken(run: Any, value: Value, site: Site | Scale, role: str) -> Tensor:
    """The rows that a site needs of a value, in float32 at least; each is asked for once, and not held after."""
    rows = run.until(value).pop((site.step, role))
    return rows if rows.dtype == torch.float64 else rows.float()


class _Work:
    """Two models, their tensors by name, and the sites."""

    def __init__(self, original: nn.Module, small: nn.Module, graph: Graph, plan: Plan, setting: Setting, places: list[Site]) -> None:
        self.plan, self.setting, self.sites = plan, setting, places
        self.mixes: dict[str, Tensor] = {}
        self.samples = 1
        # behind a cut stream the norms divide by another size, and not every reader of theirs can be fitted
        found = scales(graph) if {"least-squares", "variance"} & set(setting.steps) else []
        self.scales = [scale for scale in found if 0 in plan.cuts.get(scale.weight, {})]
        self.wide = {name: t.detach() for name, _, _, t in leaf_tensors(original)}
        self.tight = {name: t.detach() for name, _, _, t in leaf_tensors(small)}

    def kept(self, site: Site) -> Tensor | None:
        """The outputs of the original that are left."""
        kept = self.plan.cuts.get(site.weight, {}).get(site.axis)
        return None if kept is None else torch.tensor(kept)

    def takes(self, cut: bool) -> dict[int, tuple[Value, Any]]:
        """What to keep of every watched value: the rows that each site needs of it."""
        wanted: dict[int, tuple[Value, list]] = {}
        for scale in self.scales:
            value, role = (scale.x, "x") if cut else (scale.y, "y")
            wanted.setdefault(id(value), (value, []))[1].append((scale, role))
        for site in self.sites:
            values = [("x", site.x)] if cut else [("y", site.y)]
            if self.censors(site) and not cut:
                values.append(("z", site.flat.z))
            if site.other is not None and self.setting.target == "block":
                values.append(("other", site.other))
            for role, value in values:
                wanted.setdefault(id(value), (value, []))[1].append((site, role))

        def take(users: list) -> Any:
            return lambda tensor: {(site.step, role): self.rows(site, role, tensor) for site, role in users}

        return {key: (value, take(users)) for key, (value, users) in wanted.items()}

    def rows(self, site: Site | Scale, role: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        weight = self.tight[site.weight]
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
            return read(site, tensor, tuple(weight.shape[2:]), at, self.groups(site, tensor))
        return written(site, tensor, at)

    def groups(self, site: Site, x: Tensor) -> int:
        return 1 if site.shape is None else x.shape[1] // self.tight[site.weight].shape[1]

    def censors(self, site: Site) -> bool:
        """Whether the targets are intervals: all that is between the weight and a flat activation is known."""
        known = site.other is None or self.setting.target == "block"
        return "censored" in self.setting.steps and site.flat is not None and known and site.weight not in self.mixes

    def seen(self, site: Site, wide: Any, tight: Any) -> _Seen:
        """Of a batch: inputs of the cut model against what the original makes at the outputs that are left."""
        keep = self.kept(site)

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
            y = y + (left(wide, site.other, "other") - taken(tight, site.other, site, "other")) * self.gain(site).to(y)
        found, rows = moments(x, grouped(y)), None
        if not all(bool(torch.isfinite(t).all()) for t in (found.xx, found.yx, found.yy)):
            raise BadCalibration(f"calibration gives values that are not finite at {site.weight}; look at the batches and at the model before it")
        if self.censors(site):
            low, high = intervals(y, left(wide, site.flat.z, "z"), self.gain(site).to(y), site.flat.ends)
            rows = Rows(((x, grouped(low), grouped(high)),))
        return _Seen(found, rows)

    def scaled(self, scale: Scale, wide: Any, tight: Any) -> tuple[Tensor, Tensor]:
        """Of a batch: what the cut model scales, and the original's results, (rows, channels)."""
        y = taken(wide, scale.y, scale, "y")[:, torch.tensor(self.plan.cuts[scale.weight][0])].double()
        x = taken(tight, scale.x, scale, "x").double()
        if scale.norm == "layer_norm":
            x = x - x.mean(1, keepdim=True)
        return (x / (x.square().mean(1, keepdim=True) + scale.eps).sqrt() if scale.norm else x), y

    def fit_scale(self, scale: Scale, parts: list[tuple[Tensor, Tensor]], fits: int) -> list[Repaired]:
        """Scale and shift of each channel with the least squared error; kept where they do not do worse on the part kept out."""
        x, y = (torch.cat([part[i] for part in parts[:fits]]) for i in (0, 1))
        checks = parts[fits:] or parts
        over, under = (torch.cat([part[i] for part in checks]) for i in (0, 1))
        weight, bias = self.tight[scale.weight], self.tight[scale.bias] if scale.bias else None
        centre = (x.mean(0), y.mean(0)) if bias is not None else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
        power = (x - centre[0]).square().sum(0)
        new = torch.where(power > 0, ((x - centre[0]) * (y - centre[1])).sum(0) / power.clamp(min=torch.finfo(power.dtype).tiny), weight.double())
        shift = centre[1] - new * centre[0]
        spread = (under - under.mean(0)).square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        before = float((under - over * weight - (0 if bias is None else bias)).square().sum() / spread)
        after = float((under - over * new - shift).square().sum() / spread)
        if before < 1e-6:
            return []
        if after <= before:
            weight.copy_(new)
            if bias is not None:
                bias.copy_(shift)
        return [Repaired("scale", scale.weight, before, after, after <= before)]

    def gain(self, site: Site) -> Tensor:
        """What a step of the stream is worth in outputs of the site: one over the scale of the batch norm between them."""
        if site.norm is None:
            return torch.ones(())
        var = self.kept_of(site, site.norm.var)
        scale = (self.kept_of(site, site.norm.weight) if site.norm.weight else torch.ones_like(var)) / (var + site.norm.eps).sqrt()
        dead = scale.abs() < 1e-3 * scale.abs().max()
        return torch.where(dead, torch.zeros_like(scale), 1 / torch.where(dead, torch.ones_like(scale), scale))

    def kept_of(self, site: Site, name: str) -> Tensor:
        keep = self.kept(site)
        return self.wide[name] if keep is None else self.wide[name][keep.to(self.wide[name].device)]

    def fit(self, site: Site, data: _Seen, check: _Seen) -> list[Repaired]:
        """The steps, one by one; each is kept where it does not do worse on the part kept out."""
        known = data.moments
        weight, bias = self.now(site, known)
        if check.error("", weight, bias) < 1e-6:  # nothing before this weight was cut
            return []
        if float(known.xx.diagonal(dim1=1, dim2=2).abs().max()) == 0:
            raise BadCalibration(f"calibration gives the same input everywhere at {site.weight}; give varied batches")
        if {"least-squares", "censored"} & set(self.setting.steps) and known.count <= known.xx.shape[1]:
            warnings.warn(
                f"{site.weight}: {known.count} calibration rows for {known.xx.shape[1]} inputs; the ridge decides, more calibration would do better",
                stacklevel=6,
            )
        now, kept, done = (weight, bias), [], []
        for step in self.setting.steps:
            fits = [(make(data, now, TRIAL), make) for make in self.makers(site, step, data)]
            fits = [(fit, make) for fit, make in fits if _finite(fit)]
            if not fits:
                continue
            error = check.error(step, *now)
            best, make = min(fits, key=lambda fit, step=step: check.error(step, *fit[0]))
            after = check.error(step, *best)
            done.append(Repaired(step, site.weight, error, after, after <= error))
            if after <= error:
                now = best
                kept.append(make)
        if kept and not self.setting.again:
            self.put(site, *now)
        elif kept:
            again, every = (weight, bias), data + check if check is not data else data  # what was chosen, once more on all rows
            for make in kept:
                again = make(every, again, ROUNDS)
            self.put(site, *(again if _finite(again) else now))
        return done

    def makers(self, site: Site, step: str, data: _Seen) -> list[Callable[[_Seen, Fit, int], Fit]]:
        """What makes the fits that a step tries from what was seen, the fit so far and the rounds it may take; none where it has nothing to do."""
        carried = self.carries(site)
        few = data.moments.count <= data.moments.xx.shape[1]
        if step == "least-squares":
            return [lambda d, now, _, r=ridge: least_squares(d.moments, r, now[0], carried) for ridge in (RIDGES[2:] if few else RIDGES)]
        if step == "censored":
            ridges = (CENSORED[1:] if few else CENSORED) if data.rows else ()
            return [lambda d, now, rounds, r=ridge: censored(d.rows, d.moments, r, now, carried, rounds) for ridge in ridges]
        if not carried:
            return []
        return [lambda d, now, _: (now[0], means(d.moments, now[0]))] if step == "bias" else [lambda d, now, _: variances(d.moments, now[0])]

    def carries(self, site: Site) -> bool:
        return site.bias is not None or site.norm is not None

    def now(self, site: Site, data: Moments) -> tuple[Tensor, Tensor]:
        """The weight (groups, outputs, inputs) and the bias (groups, outputs) as they are."""
        weight = self.tight[site.weight]
        weight = (weight.T if site.turned else weight).double().flatten(1).reshape(data.y.shape[0], data.y.shape[1], -1)
        bias = torch.zeros_like(data.y)
        if site.bias is not None:
            bias = bias + self.tight[site.bias].double().reshape(bias.shape)
        if site.norm is not None:
            bias = bias + (self.kept_of(site, site.norm.mean) - self.tight[site.norm.mean]).double().reshape(bias.shape)
        return weight, bias

    def put(self, site: Site, weight: Tensor, bias: Tensor) -> None:
        """Write a fit into the cut model; an intercept without a bias goes into the running mean behind."""
        held = self.tight[site.weight]
        flat = weight.flatten(0, 1)
        held.copy_((flat.T if site.turned else flat).reshape(held.shape))
        bias = bias.flatten()
        if site.norm is not None:
            mean = self.tight[site.norm.mean]
            if site.bias is not None:
                bias = bias - self.tight[site.bias].double()
            mean.copy_(self.kept_of(site, site.norm.mean).double() - bias)
        elif site.bias is not None:
            self.tight[site.bias].copy_(bias)
