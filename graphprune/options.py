# pyright: strict, reportUnnecessaryIsInstance=false
"""The options of :func:`graphprune.shrink`: their list (:class:`PlanOptions`, :class:`ShrinkOptions`), and those that belong together.

:class:`Widths`, :class:`Runtime` and :class:`Repair` are each checked when they are made.

>>> Widths(multiple_of=8, ratios={"head": 0.25})
Widths(multiple_of=8, ratios={'head': 0.25})
>>> Runtime("onnxruntime", threads=1)
Runtime('onnxruntime', threads=1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from numbers import Real
from types import MappingProxyType
from typing import Any, TypedDict, cast

from torch import nn

from .catalogue import names
from .errors import BadCalibration, BadMeasure, BadOption, BadRatio, BadTarget
from .wording import nearest

FREED = {"positions": "position", "statistics": "statistic", "ranks": "rank"}  # what goes at the user's word alone, and the kind of the reasons why it stays
OBJECTIVES = {"score": 0.0, "time": 1.0}
TARGETS = ("block", "layer")  # of a repair
EFFORTS = ("fast", "standard", "best")  # how much is tried where a score is chosen


def unknown_runtime(name: Any) -> str:
    """What is wrong with a name that no runtime has."""
    near = nearest(name, names("runtime"), 1)
    return f"runtime is {name!r}; {f'the nearest is {near[0]!r}; ' if near else ''}there are {', '.join(names('runtime'))}"


class _Brief:
    """Shown with what differs from the defaults."""

    def __repr__(self) -> str:
        shown: list[str] = []
        for index, field in enumerate(dataclasses.fields(self)):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if not _same(value, default):
                value = _Batches(value) if field.name == "batches" else value
                shown.append(repr(value) if index == 0 and isinstance(value, str) else f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, str | int | float | dict) and value == default)


class _Batches:
    """Stands in for data, which a person does not want to see number by number."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __repr__(self) -> str:
        count = f"{len(self.batches)} " if isinstance(self.batches, Sized) else ""
        return f"<{count}batches>"


def whole(value: Any) -> bool:
    """Whether a value is a whole number (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, repr=False)
class Widths(_Brief):
    """What the widths of single groups have to be.

    ``multiple_of``: a whole number (units of every group), ``"auto"`` (what the device likes: the default where a time is asked for), or a mapping from a
    name, a pattern or a kind of unit (``{"mlp": 256}``) to one. ``at_least``: units that stay of every group. ``ratios``: a share of units to remove, 0 <=
    ratio < 1, by name, pattern, module type, module or predicate ``(name, module) -> bool`` of the modules or parameters that make the units. ``to``:
    widths instead of shares, by the same keys: how many outputs the module keeps (``{"layers.*.mlp.gate_proj": 9216}``). ``uniform``: True, groups of one
    kind and size keep equally many units in all layers, and of a model with a configuration goes what that can say; False, widths are free; by default
    (None) a model with a configuration gets uniform widths where those chosen freely are none that it can say, unless widths that differ are asked for (a
    ``scope`` that ranks layers together, a time, ``ratios``, ``to``) or they would leave whole a kind that ``what`` names, or two thirds of what goes.
    ``rewrite``: modules whose code holds a size as a literal come back in a subclass that reads it from an attribute where that frees an axis; False leaves
    them whole. ``also``: axes that go at your word alone: ``"positions"`` (tokens, coordinates, entries of a memory, which are no features),
    ``"statistics"`` (features over which a mean, a product or a softmax is taken that is no norm: as in a norm, it is then taken over those that stay, by
    :func:`graphprune.zeroed`, too), and ``"ranks"`` (of low-rank updates beside a whole layer, as adapters have).
    Raises :class:`~graphprune.errors.BadRatio` or :class:`~graphprune.errors.BadTarget`.
    """

    multiple_of: int | str | Mapping[Any, int] | None = None
    at_least: int = 1
    ratios: Mapping[Any, float] | Callable[..., Any] | None = None
    to: Mapping[Any, int] = dataclasses.field(default_factory=dict[Any, int])
    uniform: bool | None = None
    rewrite: bool = True
    also: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_multiple(self.multiple_of)
        if not whole(self.at_least) or self.at_least < 1:
            raise BadRatio(f"at_least is {self.at_least!r}; it is how many units stay of every group, a whole number from 1 on")
        if self.ratios is not None and not isinstance(self.ratios, Mapping) and not callable(self.ratios):
            raise BadRatio(f'ratios is {self.ratios!r}; it maps names to shares of units to remove: {{"layer1.*": 0.25}}')
        if not isinstance(self.to, Mapping):
            raise BadRatio(f'to is {self.to!r}; it maps names to widths: {{"layers.*.mlp.gate_proj": 9216}}')
        for key, value in self.to.items():
            if not whole(value) or value < 1:
                raise BadRatio(f"the width of {key!r} is {value!r}; it is how many outputs stay, a whole number from 1 on; shares go to ratios=")
        if isinstance(self.also, str) or not all(name in FREED for name in self.also):
            raise BadOption(f"also is {self.also!r}; it lists {' and '.join(map(repr, FREED))}, or one of them")
        for name, values in {"uniform": (True, False, None), "rewrite": (True, False)}.items():
            if not any(getattr(self, name) is value for value in values):
                raise BadRatio(f"{name} is {getattr(self, name)!r}; it is {' or '.join(map(str, values))}")


def _check_multiple(step: Any) -> None:
    """Is this a multiple of widths: one for all groups, "auto", or one for each name?"""
    for key, value in cast("Mapping[Any, Any]", step).items() if isinstance(step, Mapping) else ():
        if not whole(value) or value < 1:
            raise BadTarget(f"multiple_of of {key!r} is {value!r}; it is a whole number from 1 on")
    if not isinstance(step, Mapping) and step not in (None, "auto") and not (whole(step) and step >= 1):
        raise BadTarget(f'multiple_of is {step!r}; it is a whole number from 1 on, "auto", or a mapping of names to whole numbers')


@dataclasses.dataclass(frozen=True, repr=False)
class Vocabulary(_Brief):
    """Which tokens stay, for ``shrink(..., what={"vocabulary": Vocabulary(...)})``.

    ``amount``: a share of tokens to remove, a whole number of tokens that stay, the ids that stay (a list, a range, a tensor), or None where the ratio or the
    budget of all decides. ``batches``: inputs of the model; tokens that they use most stay (left out: those of a score or of a repair). ``special``: ids that
    stay in any case, beside those that the configuration names, such as ``tokenizer.all_special_ids``. Raises :class:`~graphprune.errors.BadOption`.

    >>> Vocabulary(0.5, special=[100, 103])
    Vocabulary(amount=0.5, special=(100, 103))
    """

    amount: Any = None
    batches: Iterable[Any] | None = None
    special: Sequence[int] = ()

    def __post_init__(self) -> None:
        ids = token_ids(self.special)
        if ids is None:
            raise BadOption(f"special is {self.special!r}; it lists the ids of tokens that stay, whole numbers from 0 on")
        object.__setattr__(self, "special", ids)
        kind = type(self.batches).__name__
        if self.batches is not None and (isinstance(self.batches, str | Mapping) or not isinstance(self.batches, Iterable)):
            raise BadOption(f"batches is a {kind}; it is an iterable of inputs of the model, which hold the ids that are used")


def token_ids(value: Any) -> tuple[int, ...] | None:
    """The ids that a list, a set, a range, an array or a tensor holds; None where it is none of these.

    >>> token_ids(range(2, 5)), token_ids(8000)
    ((2, 3, 4), None)
    """
    value = value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1 else value
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return None
    ids = tuple(cast("Iterable[Any]", value))
    return ids if all(whole(each) and each >= 0 for each in ids) else None


@dataclasses.dataclass(frozen=True, repr=False)
class Runtime(_Brief):
    """Where a time counts (``speedup=``, ``latency=``), and how it is taken.

    ``name``: a name of ``graphprune.available()["runtime"]``. ``threads``: how many (default: as many as torch uses). ``measure``: your own clock, a function
    ``(model) -> seconds``. ``objective``: what another budget is spent on: ``"score"``, ``"time"`` (the fastest widths that use ``macs=0.5`` up), or a
    number between 0 (score) and 1 (time). Raises :class:`~graphprune.errors.BadMeasure` or :class:`~graphprune.errors.BadTarget`.
    """

    name: str = "eager"
    threads: int | None = None
    measure: Callable[[nn.Module], float] | None = None
    objective: str | float = "score"

    def __post_init__(self) -> None:
        known = names("runtime")
        if self.name not in known:
            raise BadMeasure(unknown_runtime(self.name))
        if self.threads is not None and (not whole(self.threads) or self.threads < 1):
            raise BadMeasure(f"threads is {self.threads!r}; it is a whole number from 1 on")

    @property
    def weight(self) -> Any:
        """How much time counts against the score, 0 to 1."""
        return OBJECTIVES.get(self.objective, self.objective) if isinstance(self.objective, str) else self.objective


def check_repair(target: Any, spare: Any, rows: Any, progress: Any) -> None:
    """Raise :class:`~graphprune.errors.BadCalibration` for options of a repair that make no sense."""
    if target not in TARGETS:
        raise BadCalibration(f"target is {target!r}; fits are made to the output of each {' or of each '.join(map(repr, TARGETS))}")
    if not isinstance(spare, Real) or isinstance(spare, bool) or not 0 <= float(spare) < 1:
        raise BadCalibration(f"spare is {spare!r}; it is the share of the batches that is kept out of the fits, 0 <= spare < 1")
    if not whole(rows) or rows < 1:
        raise BadCalibration(f"rows is {rows!r}; it is how many positions each fit sees, a whole number from 1 on")
    if not isinstance(progress, bool):
        raise BadCalibration(f"progress is {progress!r}; it is True or False")


@dataclasses.dataclass(frozen=True, repr=False)
class Repair(_Brief):
    """How the cut model is repaired: ``batches`` of inputs (no labels; a list or a data loader) and the ``steps`` of :func:`graphprune.repair`.

    ``batches`` may be left out for steps that need no data: ``Repair(steps="data-free")``. ``target``, ``spare`` and ``rows`` are those of
    :func:`graphprune.repair`. ``rounds``: a budget is reached in so many rounds, each planned on the repaired model of the one before: less is lost, for as
    many times the seconds. ``effort`` says how much is tried where the score is left open (:mod:`graphprune.automatic`): ``"fast"`` the first choice alone,
    ``"standard"`` a few until one is clear, ``"best"`` all of them, and the best again in rounds. Raises :class:`~graphprune.errors.BadCalibration`.
    """

    batches: Iterable[Any] | None = None
    steps: str | Sequence[str] = "auto"
    target: str = "block"
    spare: float = 0.25
    rows: int = 16384
    progress: bool = True
    rounds: int = 1
    effort: str = "standard"

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise BadCalibration(f"effort is {self.effort!r}; it is {', '.join(map(repr, EFFORTS[:-1]))} or {EFFORTS[-1]!r}")
        if not whole(self.rounds) or self.rounds < 1:
            raise BadCalibration(f"rounds is {self.rounds!r}; it is in how many rounds a budget is reached, a whole number from 1 on")
        if self.batches is None and self.steps == "auto":
            raise BadCalibration('a repair learns from inputs: Repair(batches), any iterable of input batches; Repair(steps="data-free") needs none')
        check_repair(self.target, self.spare, self.rows, self.progress)

    @classmethod
    def of(cls, asked: Any) -> Repair | None:
        """The repair that ``repair=`` asks for: None, batches, names of steps that need no data, or a :class:`Repair`."""
        if asked is None or isinstance(asked, cls):
            return asked
        if _names_steps(asked):
            return None if asked == "none" else cls(None, asked) if asked != "auto" else None
        return cls(asked)


def _names_steps(asked: Any) -> bool:
    """Whether ``repair=`` names steps, and gives no batches."""
    if not isinstance(asked, list | tuple):
        return isinstance(asked, str)
    steps = cast("Sequence[Any]", asked)
    return bool(steps) and all(isinstance(step, str) for step in steps)


Target = float | str | None
GOALS = ("params", "macs", "size", "memory", "latency", "speedup")


class PlanOptions(TypedDict, total=False):
    """What :func:`graphprune.plan` and :func:`graphprune.shrink` can be asked for by name; the page of :func:`graphprune.shrink` says what each means."""

    params: Target
    macs: Target
    size: Target
    memory: Target
    latency: Target
    speedup: Target
    on: Runtime | str | None
    score: Any
    scope: str | None
    what: Any
    keep: Sequence[Any] | str
    widths: Widths | Mapping[Any, int] | None
    example_kwargs: dict[str, Any] | None
    examples: Sequence[Any]
    outputs: Any


class ShrinkOptions(PlanOptions, total=False):
    """What :func:`graphprune.shrink` takes beside, since it also cuts."""

    repair: Repair | Iterable[Any] | str | None
    inplace: bool
    verify: bool


# What an option is where it is not given; None of all others.
DEFAULTS: Mapping[str, Any] = MappingProxyType({"what": "channel", "keep": (), "examples": (), "inplace": False, "verify": True})
