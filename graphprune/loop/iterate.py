# pyright: strict, reportUnnecessaryIsInstance=false
"""Train, prune, retrain, in rounds, until the target is reached or accuracy would fall below the floor: :func:`iterate`.

Every phase (a cut, a training, an evaluation) starts from the model, the optimizer and the random states that the phase
before left, and all of these are on disk when it is finished. So a run that is killed and called again with the same
arguments ends with the model that it would have ended with, bit for bit.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..cutting.apply import apply
from ..cutting.compose import compose
from ..cutting.plan import Plan, note_plan, plan_of
from ..cutting.verify import check_model
from ..errors import BadLoop, BadTarget, LessThanAsked, NothingToPrune
from ..granularity.spec import parse
from ..options import Widths, whole
from ..planning.request import flag
from ..shrink import shrink
from ..spelling import OLD, modern
from ..tracing.fused import spelled_out
from ..tracing.trees import normal_inputs
from .checkpoint import Checkpoint, set_random_states
from .history import History, Row
from .optimizer import refresh_optimizer
from .rounds import KINDS, Way, pick_target, plan_way
from .schedule import check_steps

OURS = ("inplace", "return_plan", "example_kwargs")


@dataclass(frozen=True)
class Result:
    """The smallest model that is good enough, its plan relative to the original, every round, and why it ended there."""

    model: nn.Module
    plan: Plan
    history: History
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}\n\n{self.history}\n\n{self.plan}"

    def __repr__(self) -> str:
        return f"<Result: {self.reason}; {len(self.history)} rows; {self.plan!r}>"


def iterate(
    model: nn.Module,
    example_input: Any,
    target: float | Mapping[str, Any] | None = None,
    *,
    train: Callable[..., Any],
    evaluate: Callable[[nn.Module], float],
    floor: float | None = None,
    steps: int = 5,
    schedule: str = "linear",
    checkpoint: str | Path | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    train_first: bool = False,
    evaluate_cuts: bool = True,
    progress: bool = True,
    example_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Prune and retrain in ``steps`` rounds; ``model`` itself is left as it is.

    ``target`` is the share of units removed at the end (a ratio), or one of the targets of :func:`graphprune.shrink`, by name:
    ``{"macs": 0.5}``, ``{"params": 2_000_000}``, ``{"size": 0.5}``, ``{"memory": 0.5}``, ``{"latency": "12 ms"}``, ``{"speedup": 2}``;
    the same words work as keywords. All are counted (times: measured) against the original. ``train(model, round)`` is your own code; it trains
    in place or returns the trained model. ``evaluate(model)`` returns a number, larger is better. The run ends early when
    a round evaluates below ``floor``, with the model of the round before. ``schedule`` is ``"linear"``, ``"exponential"``
    or ``"cubic"``. ``checkpoint`` names a folder: call again with the same arguments to go on after an interruption.
    ``optimizer(parameters)`` makes one optimizer for the whole run, whose state is cut along; ``train`` then gets it as
    third argument. ``train_first`` starts with ``train(model, 0)``; ``evaluate_cuts`` also evaluates before retraining.
    All other keywords go to :func:`graphprune.shrink`. Raises :class:`~graphprune.errors.BadLoop` when ``train`` or
    ``evaluate`` fails; what was finished stays in the folder.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> done = iterate(net, torch.zeros(1, 4), 0.5, steps=2, train=lambda model, round: None, evaluate=lambda model: 1.0, progress=False)
    >>> done.model[0].out_features, [row.params for row in done.history.rows]
    (4, [58, 44, 30])
    """
    check_model(model)
    _check(options, floor, train, evaluate, {"train_first": train_first, "evaluate_cuts": evaluate_cuts, "progress": progress})
    options = modern(options)
    _check_amounts(options)
    asked = pick_target(target, options)
    phases = _phases(check_steps(steps), train_first, evaluate_cuts)
    example = normal_inputs(example_input, example_kwargs)
    settings = _settings(asked, steps, schedule, phases, optimizer, options)
    way = plan_way(model, example, asked, steps, schedule, options)
    job = _Job(model, example, train, evaluate, floor, way, Checkpoint(checkpoint), optimizer, settings)
    work = _resume(job) or _start(job)
    with _bar(len(phases), work.done, progress) as bar:
        for number, phase in phases[work.done :]:
            if work.ended:
                break
            bar.set_description(f"round {number}/{steps}: {phase}")
            work = PHASES[phase](job, work, number)
            job.commit(work)
            bar.update(1)
    reason = work.ended or f"all {steps} rounds are done"
    return Result(_with_plan(work.good, model, work.good_plan), work.good_plan, work.history, reason)


@dataclass(frozen=True)
class _Job:
    """What the caller asked for."""

    original: nn.Module
    example: tuple[tuple[Any, ...], dict[str, Any]]
    train: Callable[..., Any]
    evaluate: Callable[[nn.Module], float]
    floor: float | None
    way: Way
    folder: Checkpoint
    factory: Callable[..., torch.optim.Optimizer] | None
    settings: dict[str, Any]

    def keep(self, work: _Work, name: str) -> _Work:
        self.folder.keep(name, work.model, work.plan, work.optimizer)
        return replace(work, name=name)

    def commit(self, work: _Work) -> None:
        state = {"settings": self.settings, "floor": self.floor, "done": work.done, "ended": work.ended, "rows": work.history.to_dict()}
        self.folder.commit({**state, "model": work.name, "good": work.good_name, "cut": work.cut_name})

    def fail(self, text: str, work: _Work, cause: Exception | None = None) -> BadLoop:
        """The error for a phase of the user's that failed: where the best model is, and what to do."""
        where = self.folder.folder
        kept = f"The last good model is kept: graphprune.load({str(where / work.good_name)!r}, base=model). " if where and work.good_name else ""
        again = (
            f"Finished phases are in {where}: call iterate again with the same arguments to go on." if where else "checkpoint=folder would keep what is done."
        )
        error = BadLoop(f"{text}. {kept}{again}")
        error.__cause__ = cause
        return error


@dataclass(frozen=True)
class _Work:
    """How far it is: the model in work, the last good one, and the names under which they are kept."""

    model: nn.Module
    plan: Plan
    optimizer: torch.optim.Optimizer | None
    good: nn.Module
    good_plan: Plan
    history: History = field(default_factory=History)
    done: int = 0
    ended: str = ""
    name: str = ""
    good_name: str = ""
    cut_name: str = ""


def _start(job: _Job) -> _Work:
    whole = Plan({}, {})
    copy = apply(job.original, whole)
    optimizer = job.factory(copy.parameters()) if job.factory else None
    work = job.keep(_Work(copy, whole, optimizer, copy, whole, cut_name="round-00"), "round-00")
    job.commit(work)
    return work


def _resume(job: _Job) -> _Work | None:
    state = job.folder.read()
    if state is None:
        return None
    other = [key for key in job.settings if state.get("settings", {}).get(key) != job.settings[key]]
    if state["ended"] and state["floor"] != job.floor:
        other.append("floor")
    if other:
        old = {**state.get("settings", {}), "floor": state["floor"]}[other[0]]
        raise BadLoop(f"{job.folder.folder} holds a run with {other[0]} = {old!r}; use another folder, or the arguments of that run")
    model, plan = _kept(job, state["model"])
    good, good_plan = (model, plan) if state["good"] == state["model"] or not state["good"] else _kept(job, state["good"])
    optimizer = job.factory(model.parameters()) if job.factory else None
    if optimizer is not None:
        job.folder.optimizer(state["model"], optimizer)
    set_random_states(state["random"])
    names = {"name": state["model"], "good_name": state["good"], "cut_name": state["cut"]}
    return _Work(model, plan, optimizer, good, good_plan, History.from_dict(state["rows"]), state["done"], state["ended"], **names)


def _kept(job: _Job, name: str) -> tuple[nn.Module, Plan]:
    model = job.folder.model(name, job.original)
    return model, model.__dict__["graphprune_plan"]


def _with_plan(model: nn.Module, original: nn.Module, plan: Plan) -> nn.Module:
    earlier = plan_of(original)
    note_plan(model, compose(earlier, plan) if earlier is not None else plan)
    return model


def _cut(job: _Job, work: _Work, number: int) -> _Work:
    """Remove what should be gone after this round."""
    args, kwargs = job.example
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LessThanAsked)  # a round may well have nothing to do
            small, plan = shrink(work.model, args, example_kwargs=kwargs, return_plan=True, **job.way.demand(number, work.model, work.plan))
    except (NothingToPrune, BadTarget) as error:
        if number == 1:
            raise
        return replace(work, model=work.good, plan=work.good_plan, done=work.done + 1, ended=f"round {number}: no more can be removed ({error})")
    optimizer = refresh_optimizer(work.optimizer, plan, small, original=work.model) if work.optimizer is not None else None
    work = replace(work, model=small, plan=compose(work.plan, plan), optimizer=optimizer, done=work.done + 1)
    work = job.keep(_row(job, work, number), f"round-{number:02d}-cut")
    return replace(work, cut_name=work.name)


def _look(job: _Job, work: _Work, number: int) -> _Work:
    """Evaluate right after the cut."""
    row = replace(work.history[-1], cut=_value(job, work, f"after the cut of round {number}"))
    return replace(work, history=work.history.with_row(row), done=work.done + 1)


def _train(job: _Job, work: _Work, number: int) -> _Work:
    """The user's own training."""
    try:
        returned = job.train(work.model, number, *([work.optimizer] if work.optimizer is not None else []))
    except Exception as error:
        raise job.fail(f"train raised in round {number}: {type(error).__name__}: {error}", work, error) from error
    model = returned if isinstance(returned, nn.Module) else work.model
    return job.keep(replace(work, model=model, done=work.done + 1), f"round-{number:02d}-trained")


def _evaluate(job: _Job, work: _Work, number: int) -> _Work:
    """Evaluate after training: the round counts, or the run ends with the one before."""
    value = _value(job, work, f"in round {number}" if number else "on the original")
    floor = -math.inf if job.floor is None else job.floor
    if number == 0:
        if value < floor:
            raise BadLoop(f"the floor {floor} is above the original's own {value}: every round would end below it. Lower the floor")
        work = _row(job, work, 0)
    row = replace(work.history[-1], trained=value, good=value >= floor)
    work = replace(work, history=work.history.with_row(row), done=work.done + 1)
    if not row.good:
        return replace(work, ended=f"round {number} evaluates at {value:.6g}, below the floor {floor:.6g}; the model of round {number - 1} is returned")
    return replace(work, good=work.model, good_plan=work.plan, good_name=work.name)


PHASES: dict[str, Callable[[_Job, _Work, int], _Work]] = {"cut": _cut, "look": _look, "train": _train, "evaluate": _evaluate}


def _phases(steps: int, train_first: bool, look: bool) -> list[tuple[int, str]]:
    each = ["cut", "look", "train", "evaluate"] if look else ["cut", "train", "evaluate"]
    first = ["train", "evaluate"] if train_first else ["evaluate"]
    return [(0, phase) for phase in first] + [(number, phase) for number in range(1, steps + 1) for phase in each]


def _value(job: _Job, work: _Work, where: str) -> float:
    try:
        value = float(job.evaluate(work.model))
    except Exception as error:
        raise job.fail(f"evaluate raised {where}: {type(error).__name__}: {error}", work, error) from error
    if not math.isnan(value):
        return value
    trained = work.cut_name and work.name != work.cut_name
    if trained:  # do not keep what training made: the next call trains this round again
        job.commit(_untrained(work))
    raise job.fail(f"evaluate returned NaN {where}" + ("; this round will be trained again" if trained else ""), work)


def _untrained(work: _Work) -> _Work:
    return replace(work, name=work.cut_name, done=work.done - 1)


def _row(job: _Job, work: _Work, number: int) -> _Work:
    params = sum(parameter.numel() for parameter in work.model.parameters())
    row = Row(number, job.way.removed(number), params, macs(work.model, job.example))
    return replace(work, history=work.history.with_row(row))


def macs(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    """Multiply-accumulates of one run on the example."""
    training = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), spelled_out(model), FlopCounterMode(display=False) as counter:
            model.eval()(*example[0], **example[1])
    finally:
        for module, mode in training:
            module.training = mode
    return counter.get_total_flops() // 2


def _check_amounts(options: Mapping[str, Any]) -> None:
    """Refuse what every round would do again, on what the round before left."""
    what: Any = options.get("what", "channel")
    widths: Any = options.get("widths")
    amounts: Mapping[str, Any] = cast("Mapping[str, Any]", what) if isinstance(what, Mapping) else {}
    shares = [name for name, amount in amounts.items() if amount is not None and not whole(amount)]
    if shares:
        raise BadLoop(f"what={{{shares[0]!r}: {amounts[shares[0]]!r}}} would be taken in every round, of what the round before left; give the target alone")
    kinds = [parse(name) for name in cast("Iterable[Any]", what)] if isinstance(what, Mapping | list | tuple) else []
    if len(kinds) > 1 and any(kind.masks for kind in kinds):
        raise BadLoop("masked entries are counted again in every round, units that are cut are not: prune entries in a run of their own")
    if isinstance(widths, Widths) and widths.ratios and len(kinds) > 1:
        raise BadLoop("ratios of single groups are approached round by round for one kind of unit; what= names several")


def _check(options: dict[str, Any], floor: Any, train: Any, evaluate: Any, flags: Mapping[str, Any]) -> None:
    for name, function in (("train", train), ("evaluate", evaluate)):
        if not callable(function):
            raise BadLoop(f"{name} is {function!r}; it is a function")
    for name, value in flags.items():
        flag(name, value)
    known = inspect.signature(shrink).parameters
    for name, value in options.items():
        if name in OURS or (name not in known and name not in KINDS and name not in OLD):
            near = difflib.get_close_matches(name, [each for each in known if each not in OURS], 1)
            hint = f" (the nearest is {near[0]!r})" if near else ""
            raise BadLoop(f"iterate has no option {name!r}{hint}; beside its own it takes those of shrink, without {', '.join(OURS)}")
        if isinstance(value, Iterator):
            raise BadLoop(f"{name} is an iterator, which the first round would use up; pass a list, a data loader or anything that can start again")
    if floor is not None and (not isinstance(floor, Real) or isinstance(floor, bool) or math.isnan(floor)):
        raise BadLoop(f"floor is {floor!r}; it is the smallest number that evaluate may return")


def _settings(target: dict[Any, Any], steps: int, schedule: str, phases: list[Any], optimizer: Any, options: dict[str, Any]) -> dict[Any, Any]:
    """What has to be the same for a run to go on, as JSON holds it."""

    def plain(value: Any) -> Any:
        try:
            return json.loads(json.dumps(value))
        except TypeError:
            if is_dataclass(value) and not isinstance(value, type):
                return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
            return getattr(value, "__qualname__", type(value).__qualname__)

    named = {name: plain(value) for name, value in sorted(options.items())}
    first = [phase for _, phase in phases]
    return {"target": target, "steps": steps, "schedule": schedule, "phases": first, "optimizer": optimizer is not None, "options": named}


def _bar(total: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, disable=None if shown else True, unit="phase")
