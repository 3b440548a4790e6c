"""How long each operation of a model takes, as a function of the widths: :func:`times`.

Every recorded call that computes is run by itself on tensors of the shapes it would have at a small grid of widths
(input and output width both vary) and timed; in between, times are interpolated. Timings are kept on disk, one file for
each device, runtime, number of threads and version, in ``$XDG_CACHE_HOME/graphprune`` (default ``~/.cache/graphprune``),
so a second search times nothing. The sum over the calls predicts the model up to a factor that the search corrects.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cost import PRODUCTS, operation
from .labels import Array
from .lengths import Lengths
from .measure import clock_for
from .notation import Value
from .operators import lone
from .trace import Graph, Node
from .trees import replace, tensors

GRID = (1.0, 0.75, 0.5, 0.25, 0.1)
VIEWS = frozenset(
    "view _unsafe_view expand permute transpose t select slice split unbind detach alias unsqueeze squeeze as_strided empty empty_like new_empty".split()
)


def folder() -> Path:
    """Where timings are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphprune"


def device_name(device: torch.device) -> str:
    """The model of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass
class Table:
    """Seconds of single operations, measured when first asked for."""

    device: torch.device
    runtime: str = "eager"
    threads: int = 1
    known: dict[str, Any] = field(default_factory=dict)
    fresh: int = 0

    def __post_init__(self) -> None:
        facts = [device_name(self.device), self.runtime, self.threads, torch.__version__]
        self.path = folder() / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
        try:
            self.known = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.known = {"facts": facts}

    def save(self) -> None:
        """Write what is known; a folder that cannot be written costs only the next search its speed."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self.known))
            temporary.replace(self.path)
        except OSError:
            pass

    def seconds(self, node: Node, shapes: Sequence[tuple[int, ...]]) -> float:
        """The time of one call with tensors of these shapes (in the order of its arguments); 0 when it does not run."""
        values = list(tensors((node.args, node.kwargs)))
        key = "|".join([operation(node), _plain(node), *(f"{s}{v.order or ''}{v.dtype}" for s, v in zip(shapes, values, strict=True))])
        key = key.replace("torch.", "").replace(" ", "")
        if key not in self.known:
            self.known[key] = self._time(node, shapes, values)
            self.fresh += 1
        return self.known[key]

    def _time(self, node: Node, shapes: Sequence[tuple[int, ...]], values: list[Value]) -> float:
        given = iter([_tensor(shape, value, self.device) for shape, value in zip(shapes, values, strict=True)])
        args, kwargs = (replace(tree, lambda _: next(given)) for tree in (node.args, node.kwargs))
        if "device" in kwargs:
            kwargs["device"] = self.device
        try:
            call = lone(node, fitted(node, args), kwargs, self.runtime, self.threads)
            return 0.0 if call is None else fastest(call, clock_for(self.device, self.threads)[1])
        except (RuntimeError, TypeError, ValueError, IndexError):
            return 0.0


def _plain(node: Node) -> str:
    """The arguments that are no tensors; sizes that follow the widths are left out."""
    if operation(node) in ("native_layer_norm", "native_group_norm"):
        return ""
    skip = {8} if operation(node) == "convolution" else set()
    return str([replace(a, lambda _: "T") if i not in skip else "" for i, a in enumerate(node.args)])


def _tensor(shape: tuple[int, ...], value: Value, device: torch.device) -> torch.Tensor:
    make = torch.ones if value.dtype.is_floating_point else torch.zeros
    if value.order is None:
        return make(shape, dtype=value.dtype, device=device)
    back = [value.order.index(axis) for axis in range(len(shape))]
    return make([shape[axis] for axis in value.order], dtype=value.dtype, device=device).permute(back)


def fitted(node: Node, args: tuple) -> tuple:
    """The arguments with the sizes that have to follow the shapes of the tensors."""
    name, args = operation(node), list(args)
    if name == "native_layer_norm":
        args[1] = list(args[0].shape[-len(args[1]) :])
    elif name == "native_group_norm":
        args[2], args[3], args[4] = args[0].shape[0], args[0].shape[1], args[0][0, 0].numel()
        args[6] = args[6] if args[3] % args[6] == 0 else 1
    elif name == "convolution":
        args[8] = args[0].shape[1] // args[1].shape[1] if not args[6] else args[8]
    return tuple(args)


def fastest(call: Callable[[], Any], clock: Callable[[Callable, int], float], budget: float = 0.02) -> float:
    """The smallest of several timings: what disturbs only adds."""
    with torch.inference_mode():
        call()
        once = max(clock(call, 1), 1e-7)
        repeats = max(1, int(0.0004 / once))
        end, found = time.perf_counter() + budget, [clock(call, repeats)]
        while len(found) < 3 or (len(found) < 8 and time.perf_counter() < end):
            found.append(clock(call, repeats))
    return min(found)


def computes(node: Node) -> bool:
    """Whether a call makes or changes memory; views cost next to nothing."""
    return operation(node) not in VIEWS and bool(node.outs) and any(v.shape for v in node.outs)


@dataclass(frozen=True)
class Times:
    """Seconds of all calls together: (rows,) for lengths (rows, forms).

    ``fixed`` does not depend on widths; call i depends on ``forms[i]`` (two of them, form 0 where it needs one only),
    measured at ``grid[i]`` (2, points), with ``seconds[i]`` (points, points).
    """

    fixed: float
    forms: Array
    grid: Array
    seconds: Array

    def __call__(self, lengths: Array) -> Array:
        if not len(self.forms):
            return np.full(len(lengths), self.fixed)
        at, part = [], []
        for knob in range(2):
            x, grid = lengths[:, self.forms[:, knob]], self.grid[:, knob]
            low = ((x[:, :, None] >= grid[None]).sum(axis=2) - 1).clip(0, grid.shape[1] - 2)
            left = np.take_along_axis(grid, low.T, axis=1).T
            right = np.take_along_axis(grid, low.T + 1, axis=1).T
            at.append(low)
            part.append(((x - left) / (right - left)).clip(0, 1))
        row = np.arange(len(self.forms))[None]
        corner = lambda i, j: self.seconds[row, at[0] + i, at[1] + j]  # noqa: E731
        low = corner(0, 0) * (1 - part[1]) + corner(0, 1) * part[1]
        high = corner(1, 0) * (1 - part[1]) + corner(1, 1) * part[1]
        return self.fixed + (low * (1 - part[0]) + high * part[0]).sum(axis=1)


def times(graph: Graph, table: Table, align: int = 16) -> Callable[[Lengths], Times]:
    """How to make the cost function "time" of a coupled graph (see :func:`~graphprune.cost.costs`)."""

    def make(lengths: Lengths) -> Times:
        fixed, calls = 0.0, []
        for node in graph.nodes:
            if not computes(node):
                continue
            values = list(tensors((node.args, node.kwargs)))
            axes = [[lengths.form(value, dim) for dim in range(len(value.shape))] for value in values]
            forms = sorted({form for axis in axes for _, form in axis if form})
            if not forms:
                fixed += table.seconds(node, [value.shape for value in values])
                continue
            calls.append(_sampled(node, axes, forms, lengths, table, align))
        table.save()
        if not calls:
            return Times(fixed, np.zeros((0, 2), dtype=np.int64), np.zeros((0, 2, 2)), np.zeros((0, 2, 2)))
        return Times(fixed, *(np.array(column) for column in zip(*calls, strict=True)))

    return make


def _sampled(node: Node, axes: list, forms: list[int], lengths: Lengths, table: Table, align: int) -> tuple:
    product = operation(node) in PRODUCTS or operation(node) == "convolution"
    lead = forms[:2] if product else forms[:1]
    points = [_points(lengths, form, align) for form in lead]
    full = [int(lengths.constant[f] + sum(s * lengths.groups.groups[g].size for g, s in lengths.slopes[f].items())) or 1 for f in forms]
    seconds = np.zeros((len(GRID), len(GRID)))
    for i, first in enumerate(points[0]):
        for j, second in enumerate(points[1] if len(lead) > 1 else [1]):
            share = first / full[0]  # further widths go with the first
            now = {form: max(1, round(size * share)) for form, size in zip(forms, full, strict=True)}
            now |= {lead[0]: first} | ({lead[1]: second} if len(lead) > 1 else {}) | {0: 1}
            seconds[i, j] = table.seconds(node, [tuple(factor * now[form] for factor, form in axis) for axis in axes])
    grid = [_padded(points[0]), _padded(points[1] if len(lead) > 1 else [1])]
    count = [len(points[0]), len(points[1]) if len(lead) > 1 else 1]
    seconds = seconds[np.ix_(*(np.minimum(np.arange(len(GRID)), n - 1) for n in count))]
    seconds = np.maximum.accumulate(np.maximum.accumulate(seconds, axis=0), axis=1)
    return (lead + [0])[:2], grid, seconds


def _points(lengths: Lengths, form: int, align: int) -> list[int]:
    """The lengths to time, growing: shares of the full one, on multiples of ``align`` where the axis is long enough."""
    low = lengths.constant[form]
    full = int(low + sum(slope * lengths.groups.groups[g].size for g, slope in lengths.slopes[form].items()))
    if form in lengths.joint:
        full = len(lengths.joint[form])
    step = align if full >= 4 * align else 1
    found = {max(int(low) + 1, min(full, max(step, round(share * full / step) * step))) for share in GRID[1:]}
    return sorted({full, *found})


def _padded(points: list[int]) -> list[float]:
    """Grids of equal length: the last point is followed by points that no width reaches."""
    return [float(p) for p in points] + [points[-1] + 1e12 * (i + 1) for i in range(len(GRID) - len(points))]
