"""One weight fitted to what was seen: the candidates of every step, the choice among them on rows kept out, and writing them into the cut model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..cutting.plan import Plan
from ..errors import BadCalibration, warn
from ..tracing.trees import leaf_tensors
from .censored import ROUNDS, Rows, censored, distance
from .moments import Moments
from .sites import Scale, Site
from .solve import Fit, least_squares, means, residual, variances

Tensor = torch.Tensor
RIDGES, CENSORED = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), (1e-3, 1e-2, 1e-1)
TRIAL = 6  # rounds of a censored fit that tries a ridge


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
        before, after = (f"{number:.4f}" if abs(number) < 1e4 else f"{number:.1e}" for number in (self.before, self.after))
        numbers = "" if math.isnan(self.before) else f": {before} -> {after}{'' if self.kept else ' (not kept)'}"
        return f"repair {self.step}: {self.where}{numbers}"


def idle(step: str, why: str) -> Repaired:
    """A step that did nothing, and why."""
    return Repaired(step, why, math.nan, math.nan, False)


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
    scarce: dict[str, tuple[int, int]] = field(default_factory=dict)  # weights that saw no more rows than they have inputs: both numbers


@dataclass(frozen=True)
class Seen:
    """What a fit knows of some batches: moments, and rows with the intervals in which outputs should lie where the fit is censored."""

    moments: Moments
    rows: Rows | None

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.moments + other.moments, self.rows + other.rows if self.rows and other.rows else None)

    def error(self, step: str, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of ``W x + b``, or distance from the intervals."""
        return distance(self.rows, weight, bias) if step == "censored" and self.rows else float(residual(self.moments, weight, bias).sum())


class Weights:
    """The tensors of both models by name; fits are written into those of the cut one."""

    def __init__(self, original: nn.Module, small: nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.wide = {name: t.detach() for name, _, _, t in leaf_tensors(original)}
        self.tight = {name: t.detach() for name, _, _, t in leaf_tensors(small)}

    def kept(self, site: Site) -> Tensor | None:
        """The outputs of the original that are left."""
        kept = self.plan.cuts.get(site.weight, {}).get(site.axis)
        return None if kept is None else torch.tensor(kept)

    def kept_of(self, site: Site, name: str) -> Tensor:
        keep = self.kept(site)
        return self.wide[name] if keep is None else self.wide[name][keep.to(self.wide[name].device)]

    def gain(self, site: Site) -> Tensor:
        """What a step of the stream is worth in outputs of the site: one over the scale of the batch norm between them."""
        if site.norm is None:
            return torch.ones(())
        var = self.kept_of(site, site.norm.var)
        scale = (self.kept_of(site, site.norm.weight) if site.norm.weight else torch.ones_like(var)) / (var + site.norm.eps).sqrt()
        dead = scale.abs() < 1e-3 * scale.abs().max()
        return torch.where(dead, torch.zeros_like(scale), 1 / torch.where(dead, torch.ones_like(scale), scale))

    def groups(self, site: Site, x: Tensor) -> int:
        return 1 if site.shape is None else x.shape[1] // self.tight[site.weight].shape[0 if site.more is not None else 1]

    def now(self, site: Site, data: Moments) -> tuple[Tensor, Tensor]:
        """The weight (groups, outputs, inputs) and the bias (groups, outputs) as they are."""
        weight = site.by_output(self.tight[site.weight]).double().flatten(1).reshape(data.y.shape[0], data.y.shape[1], -1)
        bias = torch.zeros_like(data.y)
        if site.bias is not None:
            bias = bias + self.tight[site.bias].double().reshape(bias.shape)
        if site.norm is not None:
            bias = bias + (self.kept_of(site, site.norm.mean) - self.tight[site.norm.mean]).double().reshape(bias.shape)
        return weight, bias

    def put(self, site: Site, weight: Tensor, bias: Tensor) -> None:
        """Write a fit into the cut model; an intercept without a bias goes into the running mean behind."""
        by_output = site.by_output(self.tight[site.weight])  # a view: what is written here is written there
        by_output.copy_(weight.flatten(0, 1).reshape(by_output.shape))
        bias = bias.flatten()
        if site.norm is not None:
            mean = self.tight[site.norm.mean]
            if site.bias is not None:
                bias = bias - self.tight[site.bias].double()
            mean.copy_(self.kept_of(site, site.norm.mean).double() - bias)
        elif site.bias is not None:
            self.tight[site.bias].copy_(bias)


def warn_scarce(scarce: Mapping[str, tuple[int, int]]) -> None:
    """One warning for all weights with little calibration, about the one that has least of it."""
    if scarce:
        name, (rows, inputs) = min(scarce.items(), key=lambda item: item[1][0] / item[1][1])
        others = f", and {len(scarce) - 1} more weights with no more rows than inputs" if len(scarce) > 1 else ""
        warn(f"{name}: {rows} calibration rows for {inputs} inputs{others}; the ridge decides, more calibration would do better")


def fit(weights: Weights, site: Site, data: Seen, check: Seen, setting: Setting) -> list[Repaired]:
    """The steps, one by one; each is kept where it does not do worse on the part kept out."""
    known = data.moments
    weight, bias = weights.now(site, known)
    spread = _spread(known, check.moments)
    error = lambda step, weight, bias: check.error(step, weight, bias) / spread  # noqa: E731
    if error("", weight, bias) < 1e-6:  # nothing before this weight was cut
        return []
    if known.count < 2:
        return [idle("left", f"{site.weight}: one calibration row, more are needed")]
    if float(known.xx.diagonal(dim1=1, dim2=2).abs().max()) == 0:
        raise BadCalibration(f"calibration gives the same input everywhere at {site.weight}; give varied batches")
    if {"least-squares", "censored"} & set(setting.steps) and known.count <= known.xx.shape[1]:
        setting.scarce[site.weight] = known.count, known.xx.shape[1]
    now, kept, done = (weight, bias), [], []
    for step in setting.steps:
        fits = [(make(data, now, TRIAL), make) for make in _makers(site, step, data)]
        fits = [(fit, make) for fit, make in fits if _finite(fit)]
        if not fits:
            continue
        before = error(step, *now)
        best, make = min(fits, key=lambda fit, step=step: error(step, *fit[0]))
        after = error(step, *best)
        done.append(Repaired(step, site.weight, before, after, after <= before))
        if after <= before:
            now = best
            kept.append(make)
    if kept:
        again, every = (weight, bias), data + check if setting.again and check is not data else data  # what was chosen, once more on all rows
        for make in kept:
            again = make(every, again, ROUNDS)
        weights.put(site, *(again if _finite(again) else now))
    return done


def _spread(fits: Moments, checks: Moments) -> float:
    """The variance of the targets over both parts: few rows kept out may have none."""
    count = fits.count + checks.count
    apart = fits.count * checks.count / count * (fits.y - checks.y).square()
    return float((fits.yy + checks.yy + apart).sum().clamp(min=torch.finfo(torch.float64).tiny)) / count


def _makers(site: Site, step: str, data: Seen) -> list[Callable[[Seen, Fit, int], Fit]]:
    """What makes the fits that a step tries from what was seen, the fit so far and the rounds it may take; none where it has nothing to do."""
    carried = site.bias is not None or site.norm is not None
    few = data.moments.count <= data.moments.xx.shape[1]
    if step == "least-squares":
        return [lambda d, now, _, r=ridge: least_squares(d.moments, r, now[0], carried) for ridge in (RIDGES[2:] if few else RIDGES)]
    if step == "censored":

        def fitted(seen: Seen, now: Fit, rounds: int, ridge: float) -> Fit:
            assert seen.rows is not None
            return censored(seen.rows, seen.moments, ridge, now, carried, rounds)

        ridges = (CENSORED[1:] if few else CENSORED) if data.rows else ()
        return [partial(fitted, ridge=ridge) for ridge in ridges]
    if not carried:
        return []
    return [lambda d, now, _: (now[0], means(d.moments, now[0]))] if step == "bias" else [lambda d, now, _: variances(d.moments, now[0])]


def fit_scale(weights: Weights, scale: Scale, parts: list[tuple[Tensor, Tensor]], fits: int) -> list[Repaired]:
    """Scale and shift of each channel with the least squared error; kept where they do not do worse on the part kept out."""
    x, y = (torch.cat([part[i] for part in parts[:fits]]) for i in (0, 1))
    checks = parts[fits:] or parts
    over, under = (torch.cat([part[i] for part in checks]) for i in (0, 1))
    weight, bias = weights.tight[scale.weight], weights.tight[scale.bias] if scale.bias else None
    centre = (x.mean(0), y.mean(0)) if bias is not None else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    power = (x - centre[0]).square().sum(0)
    new = torch.where(power > 0, ((x - centre[0]) * (y - centre[1])).sum(0) / power.clamp(min=torch.finfo(power.dtype).tiny), weight.double())
    shift = centre[1] - new * centre[0]
    every = torch.cat([part[1] for part in parts])
    spread = (every - every.mean(0)).square().mean(0).sum().clamp(min=torch.finfo(torch.float64).tiny)
    before = float((under - over * weight - (0 if bias is None else bias)).square().mean(0).sum() / spread)
    after = float((under - over * new - shift).square().mean(0).sum() / spread)
    if before < 1e-6:
        return []
    if after <= before:
        weight.copy_(new)
        if bias is not None:
            bias.copy_(shift)
    return [Repaired("scale", scale.weight, before, after, after <= before)]


def _finite(fit: Fit) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in fit)
