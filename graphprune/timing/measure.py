# pyright: strict, reportUnnecessaryIsInstance=false
"""How long a model takes: :func:`measure` times it against a reference, interleaved, and says how sure it is.

A round times the reference, the model and the reference again; the two times of the reference against each other are the
control (it must give 1). Each timing follows a call of the same model that is not timed: right after another model the caches
are full of that one's weights, which costs a small network several per cent, so its speedup would depend on the company and
the order in which it is measured. The speedup is the median over rounds of reference / model; its band is the 95 % confidence
interval of that median, from order statistics (no distribution assumed). On one thread the clock is the CPU time of the
process, which other programs disturb least; on several threads it is wall time; on a GPU it is the device's own events.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..errors import BadMeasure, BadModel, no_module
from ..tracing.copies import duplicate
from ..tracing.trees import normal_inputs, replace, tensors
from .runtimes import Call, evaluating, prepare

Clock = Callable[[Call, int], float]
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of at most {total:.1f} s"


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call (median, and the quartiles ``low`` and ``high``); against a reference also ``speedup``, its
    95 % ``band``, the reference's seconds and the ``control`` (reference against itself: 1 when the clock can be trusted).
    """

    seconds: float
    low: float
    high: float
    rounds: int
    clock: str
    threads: int
    runtime: str
    memory_format: str
    reference: float | None = None
    speedup: float | None = None
    band: tuple[float, float] | None = None
    control: float | None = None

    @property
    def noise(self) -> float:
        """Half the width of the band (without a reference: of the quartiles), as a share of the value."""
        if self.speedup and self.band:
            return (self.band[1] - self.band[0]) / 2 / self.speedup
        return (self.high - self.low) / 2 / self.seconds

    def __str__(self) -> str:
        text = f"{self.seconds * 1e3:.2f} ms ({self.low * 1e3:.2f} to {self.high * 1e3:.2f})"
        if self.speedup and self.band and self.control:
            ratio, low, high, word = self.speedup, *self.band, "faster"
            if ratio < 1:
                ratio, low, high, word = 1 / ratio, 1 / high, 1 / low, "slower"
            text += f", {ratio:.2f}x {word} ({low:.2f} to {high:.2f}; reference against itself {self.control:.3f})"
        return f"{text}; {self.runtime}, {self.threads} thread{'s' if self.threads > 1 else ''}, {self.memory_format}, {self.clock} time, {self.rounds} rounds"


def measure(
    model: nn.Module,
    example_input: Any,
    reference: nn.Module | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    runtime: str = "eager",
    threads: int | None = None,
    memory_format: torch.memory_format | None = None,
    seconds: float = 10.0,
    tolerance: float = 0.01,
    progress: bool = True,
) -> Measurement:
    """Time ``model`` (and ``reference``, interleaved) on the example, in eval mode and without gradients.

    Goes on until the band is within ``tolerance`` of the value or ``seconds`` are used up (at least five rounds).
    ``threads=None`` leaves torch's setting; ``memory_format`` converts copies of both models and of four-dimensional
    inputs. ``progress`` shows a bar where it takes more than two seconds and a person may be looking.
    Raises :class:`~graphprune.errors.BadMeasure` when a runtime is missing or refuses the model, :class:`~graphprune.errors.BadModel` for what is none.

    >>> wide, slim = nn.Linear(512, 512), nn.Linear(512, 64)
    >>> found = measure(slim, torch.zeros(64, 512), wide, threads=1, seconds=0.2)
    >>> found.speedup > 1, found.threads
    (True, 1)
    """
    models = [model] if reference is None else [model, reference]
    for each, what in zip(models, ("the model", "the reference"), strict=False):
        if not isinstance(each, nn.Module):
            raise BadModel(no_module(each, what))
    args, kwargs = normal_inputs(example_input, example_kwargs)
    if memory_format is not None:
        models = [duplicate(each, {}).to(memory_format=memory_format) for each in models]  # pyright: ignore[reportCallIssue]
        swap: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.to(memory_format=memory_format) if t.ndim == 4 else t  # noqa: E731
        args, kwargs = replace(args, swap), replace(kwargs, swap)
    device = next((t.device for t in tensors((args, kwargs), torch.Tensor)), torch.device("cpu"))
    with using_threads(threads), evaluating(models[0]), evaluating(models[-1]):
        calls = [prepare(each, args, kwargs, runtime, threads) for each in models]
        name, clock = clock_for(device, torch.get_num_threads())
        with timer("measure", seconds, progress) as tick:
            rows = interleave(calls if reference is None else [calls[1], calls[0], calls[1]], clock, seconds, tolerance, tick=tick)
        used = torch.get_num_threads()
    times = rows[:, 1 if reference is not None else 0]
    low, middle, high = (float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
    plain = Measurement(middle, low, high, len(rows), name, used, runtime, str(memory_format or "as given").replace("torch.", ""))
    if reference is None:
        return plain
    ratio, band = middle_of(rows[:, [0, 2]].mean(1) / times)
    control, _ = middle_of(rows[:, 0] / rows[:, 2])
    return replace_fields(plain, reference=float(np.median(rows[:, [0, 2]])), speedup=ratio, band=band, control=control)


def middle_of(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The median, and its 95 % confidence interval from order statistics.

    >>> middle_of(np.arange(25.0))
    (12.0, (7.0, 17.0))
    """
    ordered = np.sort(values)
    count = len(ordered)
    reach = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach) - 1)
    return float(np.median(ordered)), (float(ordered[low]), float(ordered[high]))


Enough = Callable[[np.ndarray], bool]


def interleave(
    calls: Sequence[Call],
    clock: Clock,
    seconds: float,
    enough: Enough | float,
    least: int = 5,
    warm: bool = True,
    chained: bool = False,
    tick: Callable[[], None] | None = None,
) -> np.ndarray:
    """Seconds per call, one row for each round, until ``enough`` (a function of the rows, or the share within which the
    band of the first two must be) or until ``seconds`` are used up.

    Every other round runs backwards, so that a drift cancels. ``warm``: every timing follows a call that is not timed, so
    that it does not depend on what ran before. ``chained``: where a round begins with the call that the last
    one ended with, that timing counts for both (quicker; neighbouring rows are then not quite independent).
    """
    done: Enough = enough if callable(enough) else lambda rows: _settled(rows, enough)
    once = {call: 1.0 for call in calls}
    for _ in range(2 if warm else 0):
        once = {call: clock(call, 1) for call in once}  # a reference that stands at both ends is one call
    repeats = [max(1, math.ceil(0.003 / max(once[call], 1e-9))) for call in calls]
    rows: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rows) < least or (time.perf_counter() < end and not done(np.array(rows))):
        order = list(range(len(calls)) if len(rows) % 2 == 0 else reversed(range(len(calls))))
        row = [0.0] * len(calls)
        if chained and rows:
            first = order.pop(0)
            row[first] = rows[-1][first]
        for index in order:
            if warm:
                calls[index]()
            row[index] = clock(calls[index], repeats[index])
        if not all(math.isfinite(each) and each > 0 for each in row):
            raise BadMeasure("the clock returned zero or less; time more work per call (a larger batch)")
        rows.append(row)
        if tick is not None:
            tick()
    return np.array(rows)


@contextmanager
def timer(name: str, seconds: float, progress: bool) -> Generator[Callable[[], None], None, None]:
    """A bar that fills in ``seconds`` at most, shown after two of them where a person may be looking; a function that moves it on."""
    start = time.perf_counter()
    with tqdm(total=round(seconds, 1), desc=name, delay=2, leave=False, unit="s", disable=None if progress else True, bar_format=BAR) as shown:

        def tick() -> None:
            shown.n = round(min(seconds, time.perf_counter() - start), 1)
            shown.refresh() if time.perf_counter() - start > 2 else None

        yield tick


def _settled(rows: np.ndarray, tolerance: float) -> bool:
    values = rows[:, 0] / rows[:, 1] if rows.shape[1] > 1 else rows[:, 0]
    middle, (low, high) = middle_of(values)
    return high - low <= 2 * tolerance * middle


def clock_for(device: torch.device, threads: int) -> tuple[str, Clock]:
    """The clock of a device: its name, and a function (call, repeats) -> seconds of one call."""
    if device.type == "cuda":
        return "device", _events
    return ("CPU", _stopwatch(time.process_time)) if threads == 1 else ("wall", _stopwatch(time.perf_counter))


def _stopwatch(now: Callable[[], float]) -> Clock:
    def clock(call: Call, repeats: int) -> float:
        start = now()
        for _ in range(repeats):
            call()
        return (now() - start) / repeats

    return clock


def _events(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


@contextmanager
def using_threads(threads: int | None) -> Generator[None, None, None]:
    """torch on so many threads for a while."""
    before = torch.get_num_threads()
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise BadMeasure(f"threads is {threads!r}; it is a whole number from 1 on")
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)
