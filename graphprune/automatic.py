"""``score="auto"``: :func:`with_score` tries a few scores and scopes, repairs each, and takes the one that loses least on inputs kept out.

No score is the best everywhere: the one that is made for repair wins on most convolutional networks and language models, plain norms under allocated
widths on some, so they are compared by what counts, the distance of the outputs after the repair. The list is short, goes from the one that wins most
often to the others, and ends when the error is small; the repair of a trial is a short one. ``Repair(effort=...)`` says how far it goes: ``"fast"`` takes
the first that can be planned, ``"best"`` tries all with the whole repair, and the one that loses least once more in rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from .coupling.vocabulary import predicted
from .cutting.apply import apply
from .cutting.plan import Plan
from .errors import BadOption, BadTarget, GraphpruneError, NothingToPrune, warn
from .options import Repair
from .planning.planner import Planner
from .planning.request import Request
from .repair import SETS, closed, repair
from .repair.calibration import parts
from .repair.predictions import information, scores
from .scores import SCORES, Score
from .scores.data import bar
from .tracing.graph import Graph
from .tracing.probe import batch_inputs
from .tracing.surroundings import unchanged
from .tracing.trees import tensors

AUTO = "auto"
CLEAR = 0.01  # share of the outputs' variance below which nothing else is tried
BAD = 0.5  # … and above which little of the function is left


@dataclass(frozen=True)
class Choice:
    """A score and the scope under which it is ranked (None: the one that was asked for)."""

    score: str
    scope: str | None

    def __str__(self) -> str:
        return self.score if self.scope is None else f"{self.score}, {self.scope}"


BUDGETS = (Choice("effect", "global"), Choice("l2", "allocated"), Choice("wanda_sp", "global"))
RATIOS = (Choice("effect", None), Choice("wanda_sp", None), Choice("l2", None))
SHORT = 4096  # positions that a fit of a trial sees: fewer than those of the repair that follows tell as well which units are missed
FURTHER = (Choice("effect", "isomorphic"), Choice("l2", "global"))  # which win now and then
ROUNDS = 4
Planners = Callable[[Repair | None], Planner]  # the planner of a repair, which may go in rounds


class Settled(NamedTuple):
    """A request whose score is settled, the repair that goes with it, and the plan, where that was made on the way."""

    request: Request
    repair: Repair | None
    plan: Plan | None = None


class _Trial(NamedTuple):
    """What a choice lost on inputs kept out (nan: nobody looked), and its plan."""

    lost: float
    choice: Choice
    rounds: int
    plan: Plan

    def __str__(self) -> str:
        return str(self.choice) if self.rounds == 1 else f"{self.choice}, in {self.rounds} rounds"


def with_score(graph: Graph, model: nn.Module, request: Request, asked: Repair | None, planners: Planners) -> Settled:
    """The request with a score: where "auto" is asked for, that of the choice whose repaired model is nearest to the original.

    Scores that read inputs and were given none read those of the repair. Raises what the planner raises, and
    :class:`~graphprune.errors.BadTarget` when no choice meets what is asked.
    """
    batches = None if asked is None else asked.batches
    if request.score != AUTO:
        _check_effort(asked, "a score is named; leave either out")
        return Settled(_with_data(request, batches), asked)
    if asked is None or batches is None or request.aims.timed or not all(each.spec.coarse for each in request.wanted):  # nothing to judge by
        _check_effort(asked, "here none is looked for: that takes batches, and a ratio or a budget (no time) of channels or other whole units")
        return Settled(replace(request, score="l2"), asked)
    first, *others = _tried(graph, model, request, asked, planners)
    what = "the outputs' variance" if predicted(graph) is None else "what the predictions say"
    if first.lost > BAD:
        lost = f"{first.lost:.0%} of {what} is lost on inputs kept out, even after a repair"
        warn(f"at this target little of the function is left: {lost}; train, or ask for less")
    note = f"note: chose {first}, and tried nothing else (effort='fast')"
    if not math.isnan(first.lost):
        a_repair = "a short repair" if asked.effort == "standard" else "the repair"
        rest = "".join(f"; {trial}: {trial.lost:.1%}" for trial in others)
        note = f"note: chose {first}: {first.lost:.1%} of {what} lost on inputs kept out, after {a_repair}{rest}"
    settled = replace(_by(first.choice, request, batches), notes=(*request.notes, note))
    if asked.rounds > first.rounds:  # tried as if it were one
        return Settled(settled, asked)
    return Settled(settled, replace(asked, rounds=first.rounds), replace(first.plan, notes=(*first.plan.notes, note)))


def _check_effort(asked: Repair | None, instead: str) -> None:
    if asked is not None and asked.effort != "standard":
        raise BadOption(f"effort={asked.effort!r} says how much is tried where a score is looked for, and {instead}")


def _tried(graph: Graph, model: nn.Module, request: Request, asked: Repair, planners: Planners) -> list[_Trial]:
    """The choices that were tried, the best one first; at least one."""
    batches, entries = list(asked.batches or ()), predicted(graph)
    fits, checks = parts(batches, asked.spare)
    short = asked.effort == "standard"
    steps, rows = (_short(closed_steps(asked)), min(asked.rows, SHORT)) if short else (closed_steps(asked), asked.rows)
    facts = {"target": asked.target, "spare": asked.spare, "rows": rows, "progress": asked.progress}

    def trial(choice: Choice, rounds: int) -> _Trial:
        plan = planners(replace(asked, rounds=rounds))(graph, model, _by(choice, request, asked.batches))
        if asked.effort == "fast":
            return _Trial(math.nan, choice, rounds, plan)
        first = plan.stages[0]
        small = repair(apply(model, first), model, first, fits, steps, graph=graph, **facts)
        return _Trial(_distance(model, small, checks or fits, entries), choice, rounds, plan)

    trials: list[_Trial] = []
    failed: GraphpruneError = BadTarget("no score could be computed")
    for choice in bar(_choices(request, asked.effort), "choosing a score", asked.progress):
        try:
            trials.append(trial(choice, 1))
        except NothingToPrune:
            raise
        except GraphpruneError as error:
            failed = error
            continue
        if asked.effort == "fast" or (asked.effort == "standard" and trials[-1].lost < CLEAR):
            break
    if not trials:
        raise failed
    trials.sort(key=lambda each: each.lost)
    if asked.effort == "best" and asked.rounds == 1:
        with suppress(GraphpruneError):  # what is asked may not be reached in rounds: then there is what there is
            trials.append(trial(trials[0].choice, ROUNDS))
    return sorted(trials, key=lambda each: each.lost)


def _by(choice: Choice, request: Request, batches: object) -> Request:
    return _with_data(replace(request, score=choice.score, scope=choice.scope or request.scope), batches)


def _choices(request: Request, effort: str) -> Sequence[Choice]:
    """What is tried: under a budget the scope is free unless it was asked for; a ratio is that of every group."""
    if request.aims.any and not request.scope_given:
        return (*BUDGETS, *FURTHER) if effort == "best" else BUDGETS
    return RATIOS


def _with_data(request: Request, batches: object) -> Request:
    """The request, whose score reads the inputs of the repair where it needs inputs alone and was given none."""
    score = SCORES.get(request.score) if isinstance(request.score, str) else request.score
    if batches is None or request.batches is not None or not isinstance(score, Score) or score.needs_now() != "inputs":
        return request
    return replace(request, batches=batches)


def _short(steps: tuple[str, ...] | str) -> tuple[str, ...]:
    """The steps of a trial: without the fit that goes over the data again and again."""
    named = (steps,) if isinstance(steps, str) else steps
    return tuple(step for name in named for step in (SETS["auto"] if name == "auto" else (name,)) if step != "censored")


def closed_steps(asked: Repair) -> tuple[str, ...] | str:
    """The closed forms among the steps: gradient steps take minutes, and come once the score is chosen."""
    steps = (asked.steps,) if isinstance(asked.steps, str) else tuple(asked.steps)
    return tuple(step for step in steps if step == "auto" or step in closed.STEPS) or "auto"


def _distance(model: nn.Module, small: nn.Module, batches: list, entries: int | None) -> float:
    """How far the outputs are apart: the share of the variance, or of what predictions of so many entries say."""
    modes = [(module, module.training) for each in (model, small) for module in each.modules()]
    try:
        model.eval()
        small.eval()
        with torch.no_grad(), unchanged(model):
            return closed.distance(model, small, batches) if entries is None else information(_predictions(model, small, batches, entries))
    finally:
        for module, mode in modes:
            module.training = mode


def _predictions(model: nn.Module, small: nn.Module, batches: list, entries: int) -> Iterator[list[torch.Tensor]]:
    """What both make of each batch."""
    for batch in batches:
        args, kwargs = batch_inputs(batch)
        pair = [scores(tensors(each(*args, **kwargs), torch.Tensor), entries) for each in (model, small)]
        yield [each for each in pair if each is not None]
