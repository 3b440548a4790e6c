"""Old spellings of options, which work for one version more and say what to write now: :func:`respelled`.

>>> with warnings.catch_warnings(record=True) as caught:
...     warnings.simplefilter("always")
...     modern({"criterion": "l1", "multiple_of": 8})
{'score': 'l1', 'widths': Widths(multiple_of=8)}
>>> print(caught[0].message)
criterion= is an old spelling; write score='l1'
"""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings  # noqa: F401  (the example above)
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .errors import BadOption, UnknownOption, warn
from .options import Repair, Runtime, Widths
from .scores.registry import OnData, check_data

WIDTHS = {"multiple_of": "multiple_of", "min_units": "at_least", "ratios": "ratios", "rewrite": "rewrite"}
RUNTIME = {"runtime": "name", "threads": "threads", "measure": "measure", "objective": "objective"}
OLD = ("criterion", "batches", "loss", "granularity", "calibration", *WIDTHS, *RUNTIME)
F = TypeVar("F", bound=Callable[..., Any])


def respelled(function: F) -> F:
    """A function of :func:`graphprune.shrink`'s options that also takes their old spellings, each with a DeprecationWarning."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        strange = next((name for name in options if name not in known and name not in OLD), None)
        if strange is not None:
            near = difflib.get_close_matches(strange, [*known, *OLD], 1)
            hint = f"the nearest is {near[0]!r}; " if near else ""
            raise UnknownOption(f"{function.__name__} has no option {strange!r}; {hint}help(graphprune.{function.__name__}) lists them")
        return function(*args, **modern(options, "repair" in known))

    return call  # type: ignore[return-value]


def modern(options: dict[str, Any], repairs: bool = True) -> dict[str, Any]:
    """The options in the present spelling; raises :class:`~graphprune.errors.BadOption` where one is given in both."""
    if not any(name in options for name in OLD) and options.get("scope") != "optimal" and not _steps(options):
        return options
    new = {name: value for name, value in options.items() if name not in OLD}
    old = {name: options[name] for name in OLD if name in options}
    if new.get("scope") == "optimal":
        new["scope"] = "allocated"
        _say(("scope",), "scope='allocated'")
    _move(old, new, "granularity", "what")
    _move(old, new, "criterion", "score")
    _data(old, new)
    _collect(old, new, WIDTHS, "widths", Widths)
    _runtime(old, new)
    if repairs:
        _repair(old, new)
    elif "calibration" in old:
        raise BadOption("calibration= repairs what was cut, and a plan cuts nothing; leave it out")
    return new


def _say(names: tuple[str, ...], text: str) -> None:
    shown = " and ".join(f"{name}=" for name in names)
    warn(f"{shown} {'is an old spelling' if len(names) == 1 else 'are old spellings'}; write {text}", DeprecationWarning)


def _move(old: dict, new: dict, before: str, now: str) -> None:
    if before not in old:
        return
    if now in new:
        raise BadOption(f"{before}= is the old spelling of {now}=; give {now}= alone")
    new[now] = old.pop(before)
    _say((before,), f"{now}={new[now]!r}")


def _data(old: dict, new: dict) -> None:
    """``batches`` and ``loss`` go into the score."""
    names = tuple(name for name in ("batches", "loss") if name in old)
    batches, loss = old.pop("batches", None), old.pop("loss", None)
    score = new.get("score", "l2")
    if isinstance(score, OnData) and names:
        raise BadOption("the score has its data already; leave batches= and loss= out")
    if batches is None and loss is None:
        return
    check_data(() if batches is None else batches, loss)
    if batches is not None:
        new["score"] = OnData(score, batches, loss)
    _say(names, f"score=graphprune.scores.on({score if isinstance(score, str) else '...'!r}, batches{', loss' if loss is not None else ''})")


def _collect(old: dict, new: dict, table: dict[str, str], now: str, make: Callable[..., Any]) -> None:
    facts = {table[name]: old.pop(name) for name in table if name in old}
    if not facts:
        return
    if new.get(now) is not None:
        raise BadOption(f"{', '.join(facts)} belong to {now}=; give {now}= alone")
    new[now] = make(**facts)
    _say(tuple(name for name in table if table[name] in facts), f"{now}=graphprune.{new[now]!r}")


def _runtime(old: dict, new: dict) -> None:
    """Where nothing is timed, a number of threads has no effect and is left out."""
    times = any(new.get(name) is not None for name in ("speedup", "latency"))
    _collect(old, new, RUNTIME, "on", Runtime)
    on = new.get("on")
    widths = new.get("widths")
    aligned = isinstance(widths, Widths) and widths.multiple_of == "auto"
    if isinstance(on, Runtime) and not times and not aligned and on == Runtime(threads=on.threads):
        new.pop("on")


def _steps(options: dict[str, Any]) -> bool:
    return "calibration" in options


def _repairs(value: Any) -> bool:
    """Whether a value says with what to repair, and not only by which steps."""
    steps = isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(step, str) for step in value))
    return isinstance(value, Iterable | Repair) and not steps


def _repair(old: dict, new: dict) -> None:
    if "calibration" not in old:
        return
    calibration, steps = old.pop("calibration"), new.pop("repair", "auto")
    if _repairs(steps):
        raise BadOption("calibration= is the old spelling of repair=Repair(batches); give repair= alone")
    if calibration is None:
        new["repair"] = steps
        return
    new["repair"] = None if steps in (None, "none") else Repair(calibration, steps)
    _say(("calibration",), "repair=batches" if steps == "auto" else f"repair=graphprune.Repair(batches, {steps!r})")
