"""How long each operation of a model takes, as a function of the widths: :func:`times`.

Every recorded call that computes is run by itself on tensors of the shapes it would have at a small grid of widths
(input and output width both vary) and timed; in between, times are interpolated. On a CPU every timing finds the caches as
in the middle of a model: what the call before it made is there, the weights are not. (Timed over and over, what is bound by
memory looks two to four times as fast as it is, and products half as much again.) Timings are kept on disk, one file for
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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..coupling.lengths import Lengths
from ..operations.labels import Array
from ..operations.notation import Value, solved
from ..tracing.graph import Graph
from ..tracing.node import Node
from ..tracing.trees import replace, tensors
from .measure import clock_for
from .operators import PROFILERS, Item, item, lone, together
from .runtimes import missing

GRID = (1.0, 0.75, 0.5, 0.25, 0.1)
BATCH, BYTES = 64, 2**28  # operations, and bytes of their tensors, in one session
SWEEP = 2**21  # numbers that are written to empty the caches of a core


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
    names: dict[int, tuple[Node, str, list[str]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        facts = [device_name(self.device), self.runtime, self.threads, torch.__version__, "cold weights"]
        self.path = folder() / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
        self.known = self._read() or {"facts": facts}

    def _read(self) -> dict[str, Any]:
        """What is on disk; what cannot be a timing is left out."""
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return {key: value for key, value in stored.items() if isinstance(value, int | float | list)} if isinstance(stored, dict) else {}

    def save(self) -> None:
        """Write what is known; a folder that cannot be written costs only the next search its speed."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({**self._read(), **self.known}))  # what others timed meanwhile stays
            temporary.replace(self.path)
        except OSError:
            pass

    def seconds(self, node: Node, shapes: Sequence[tuple[int, ...]]) -> float:
        """The time of one call with tensors of these shapes (in the order of its arguments); 0 when it does not run."""
        key = self.key(node, shapes)
        if key not in self.known:
            self.fill([(node, shapes)])
        return self.known[key]

    def key(self, node: Node, shapes: Sequence[tuple[int, ...]]) -> str:
        """The name of a timing: the operation, its plain arguments, and shape, memory order and dtype of its tensors."""
        # The node is kept beside what is known of it, so that its id stays its own.
        _, plain, kinds = self.names.get(id(node)) or self.names.setdefault(id(node), (node, *described(node)))
        return plain + "|".join([f"{shape}{kind}" for shape, kind in zip(shapes, kinds, strict=True)])

    def fill(self, calls: Sequence[tuple[Node, Sequence[tuple[int, ...]]]]) -> None:
        """Time what is not known yet; a runtime with sessions of its own gets many products at once."""
        missing = {key: call for key, call in ((self.key(*call), call) for call in calls) if key not in self.known}
        self.fresh += len(missing)
        batch: dict[str, Item] = {}
        for key, (node, shapes) in missing.items():
            part = self._item(node, shapes) if self.runtime in PROFILERS else None
            if part is None:
                self.known[key] = self._time(node, shapes)
                continue
            if len(batch) >= BATCH or part.bytes + sum(each.bytes for each in batch.values()) > BYTES:
                self._run(batch)
                batch = {}
            batch[key] = part
        self._run(batch)

    def _run(self, batch: dict[str, Item]) -> None:
        try:
            self.known.update(zip(batch, together(list(batch.values()), self.runtime, self.threads) if batch else (), strict=True))
        except ImportError as error:
            raise missing(self.runtime) from error
        except Exception:  # of the runtime's own kind; one that is refused would take the others along
            if len(batch) == 1:
                self.known.update(dict.fromkeys(batch, 0.0))
                return
            keys = list(batch)
            for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
                self._run({key: batch[key] for key in half})

    def _arguments(self, node: Node, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = tensors((node.args, node.kwargs))
        operands = iter([_tensor(shape, value, self.device) for shape, value in zip(shapes, values, strict=True)])
        args, kwargs = (replace(tree, lambda _: next(operands)) for tree in (node.args, node.kwargs))
        if "device" in kwargs:
            kwargs["device"] = self.device
        return fitted(node, args), kwargs

    def _item(self, node: Node, shapes: Sequence[tuple[int, ...]]) -> Item | None:
        return item(node, self._arguments(node, shapes)[0]) if node.products else None

    def _time(self, node: Node, shapes: Sequence[tuple[int, ...]]) -> float:
        try:
            args, kwargs = self._arguments(node, shapes)
            call = lone(node, args, kwargs, self.runtime)
            made = _just_made(node, list(tensors((args, kwargs), torch.Tensor)))
            between = (lambda: _sweep(made)) if self.device.type == "cpu" else None
            return 0.0 if call is None else fastest(call, clock_for(self.device, self.threads)[1], between)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return 0.0


def _just_made(node: Node, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """What another call has just made: the input of a product with a weight, else every operand."""
    product = node.product
    if product is None or not product.weight.value.zero:
        return operands
    return [tensor for value, tensor in zip(node.held, operands, strict=True) if value is product.input.value]


def shared(graph: Graph, runtime: str, threads: int | None) -> Table:
    """The one table of everything that is decided about a graph: two would time the same operations twice, and the next
    search would find only one of the two answers (and other alignments than this one)."""
    device = next((tensor.device for tensor in tensors(graph.example, torch.Tensor)), torch.device("cpu"))
    threads = threads or torch.get_num_threads()
    key = ("table", runtime, threads)
    if key not in graph.derived:
        graph.derived[key] = Table(device, runtime, threads)
    return graph.derived[key]


def described(node: Node) -> tuple[str, list[str]]:
    """The operation with the arguments that are no tensors (sizes that follow the widths are left out), and the kinds of its tensors."""
    plain = ""
    if node.op.follows is None:
        skip = node.op.size_arguments(node.args, node.kwargs)
        plain = str([replace(a, lambda _: "T") if i not in skip else "" for i, a in enumerate(node.args)])
    kinds = [f"{value.order or ''}{value.dtype}".replace("torch.", "") for value in tensors((node.args, node.kwargs))]
    name = node.op.short if node.name.startswith("aten::") else node.name
    return f"{name}|{plain}|".replace("torch.", "").replace(" ", ""), kinds


def _tensor(shape: tuple[int, ...], value: Value, device: torch.device) -> torch.Tensor:
    make = torch.ones if value.dtype.is_floating_point else torch.zeros
    if value.order is None:
        return make(shape, dtype=value.dtype, device=device)
    back = [value.order.index(axis) for axis in range(len(shape))]
    return make([shape[axis] for axis in value.order], dtype=value.dtype, device=device).permute(back)


def fitted(node: Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the sizes that have to follow the shapes of the tensors."""
    rule = node.rule
    sizes = {}
    if rule is not None and rule.sizes:
        shapes = {id(value): tensor.shape for value, tensor in zip(node.held, tensors((args, ()), torch.Tensor), strict=False)}
        sizes = solved(rule, [shapes.get(id(operand)) for operand in rule.operands])
    return node.refitted(args, sizes)


@cache
def _broom() -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(SWEEP)


def _sweep(made: list[torch.Tensor]) -> None:
    """The caches as a call finds them inside a model."""
    _broom().add_(1)
    for tensor in made:
        tensor.sum()


def fastest(
    call: Callable[[], Any], clock: Callable[[Callable[..., Any], int], float], between: Callable[[], None] | None = None, budget: float = 0.03
) -> float:
    """The smallest of several timings: what disturbs only adds. ``between`` runs before each of them, which is then of one call."""
    with torch.inference_mode():
        call()
        once = max(clock(call, 1), 1e-7)
        repeats = 1 if between else max(1, int(0.0004 / once))
        end, trials = time.perf_counter() + budget, []
        while len(trials) < 4 or (len(trials) < 12 and time.perf_counter() < end):
            if between:
                between()
            trials.append(clock(call, repeats))
    return min(trials)


def computes(node: Node) -> bool:
    """Whether a call makes or changes memory; views cost next to nothing."""
    return not (node.op.views or node.op.unmade) and bool(node.outs) and any(v.shape for v in node.outs)


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
        items = np.tile(np.arange(len(self.forms)), len(lengths))
        each = self.each(items, lengths[:, self.forms].reshape(len(items), 2))
        return self.fixed + each.reshape(len(lengths), len(self.forms)).sum(axis=1)

    def each(self, items: Array, lengths: Array) -> Array:
        """The seconds of some calls, (n,), each at its two lengths (n, 2)."""
        corners, shares = [], []
        for knob in range(2):
            length, grid = lengths[:, knob], self.grid[items, knob]
            row, corner = np.arange(len(items)), ((length[:, None] >= grid).sum(axis=1) - 1).clip(0, grid.shape[1] - 2)
            low, high = grid[row, corner], grid[row, corner + 1]
            corners.append(corner)
            shares.append(((length - low) / (high - low)).clip(0, 1))
        at = lambda i, j: self.seconds[items, corners[0] + i, corners[1] + j]  # noqa: E731
        low = at(0, 0) * (1 - shares[1]) + at(0, 1) * shares[1]
        high = at(1, 0) * (1 - shares[1]) + at(1, 1) * shares[1]
        return low * (1 - shares[0]) + high * shares[0]

    def total(self, values: Array) -> float:
        return self.fixed + float(values.sum())


def times(graph: Graph, table: Table, align: int = 16) -> Callable[[Lengths], Times]:
    """How to make the cost function "time" of a coupled graph (see :func:`~graphprune.cost.costs`)."""

    def make(lengths: Lengths) -> Times:
        fixed, calls = [], []
        for node in graph.nodes:
            if not computes(node):
                continue
            values = list(tensors((node.args, node.kwargs)))
            axes = [[lengths.form(value, dim) for dim in range(len(value.shape))] for value in values]
            forms = sorted({form for axis in axes for _, form in axis if form})
            if forms:
                calls.append((node, *_sampled(node, axes, forms, lengths, align)))
            else:
                fixed.append((node, [value.shape for value in values]))
        table.fill([*fixed, *((node, shapes) for node, _, _, every in calls for row in every for shapes in row)])
        if table.fresh:
            table.save()
        alone = sum(table.seconds(*call) for call in fixed)
        if not calls:
            return Times(alone, np.zeros((0, 2), dtype=np.int64), np.zeros((0, 2, 2)), np.zeros((0, 2, 2)))
        seconds = np.array([_square([[table.seconds(node, shapes) for shapes in row] for row in every]) for node, _, _, every in calls])
        return Times(alone, np.array([lead for _, lead, _, _ in calls]), np.array([grid for _, _, grid, _ in calls]), seconds)

    return make


def _sampled(node: Node, axes: list[Any], forms: list[int], lengths: Lengths, align: int) -> tuple[list[int], list[list[float]], list[Any]]:
    """The two lengths that a call depends on most, the grid of each, and the shapes of its tensors at every point of both."""
    product = bool(node.products)
    # What only moves or meets entries takes as long as its result is large (a concatenation: the sum of its parts).
    made = [] if product else [form for _, form in (lengths.form(node.outs[0], dim) for dim in range(len(node.outs[0].shape))) if form]
    lead = forms[:2] if product else (made or forms)[:1]
    points = [_points(lengths, form, align) for form in lead]
    full = {f: int(lengths.constant[f] + sum(s * lengths.groups.groups[g].size for g, s in lengths.slopes[f].items())) or 1 for f in (*forms, *lead)}
    every = []
    for first in points[0]:
        share = first / full[lead[0]]  # further widths go with the first
        row = []
        for second in points[1] if len(lead) > 1 else [1]:
            now = {form: max(1, round(size * share)) for form, size in full.items()}
            now |= {lead[0]: first} | ({lead[1]: second} if len(lead) > 1 else {}) | {0: 1}
            row.append([tuple(factor * now[form] for factor, form in axis) for axis in axes])
        every.append(row)
    return (lead + [0])[:2], [_padded(points[0]), _padded(points[1] if len(lead) > 1 else [1])], every


def _square(rows: list[list[float]]) -> Array:
    """(points, points), the last repeated; a narrower one never takes longer."""
    values = np.array(rows)
    values = values[np.ix_(*(np.minimum(np.arange(len(GRID)), n - 1) for n in values.shape))]
    return np.maximum.accumulate(np.maximum.accumulate(values, axis=0), axis=1)


def _points(lengths: Lengths, form: int, align: int) -> list[int]:
    """The lengths to time, growing: shares of the full one, on multiples of ``align`` where the axis is long enough."""
    low = lengths.constant[form]
    full = int(low + sum(slope * lengths.groups.groups[g].size for g, slope in lengths.slopes[form].items()))
    if form in lengths.joint:
        full = len(lengths.joint[form])
    step = align if full >= 4 * align else 1
    points = {max(int(low) + 1, min(full, max(step, round(share * full / step) * step))) for share in GRID[1:]}
    return sorted({full, *points})


def _padded(points: list[int]) -> list[float]:
    """Grids of equal length: the last point is followed by points that no width reaches."""
    return [float(p) for p in points] + [points[-1] + 1e12 * (i + 1) for i in range(len(GRID) - len(points))]
