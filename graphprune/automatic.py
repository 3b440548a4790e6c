"""``score="auto"``: :func:`with_score` tries a few scores and scopes, repairs each, and takes the one that loses least on inputs kept out.

No score is the best everywhere: the one that is made for repair wins on most convolutional networks and language models, plain norms under allocated
widths on some, so they are compared by what counts, the distance of the outputs after the repair. The list is short, goes from the one that wins most
often to the others, and ends when the error is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from .cutting.apply import apply
from .errors import BadTarget, GraphpruneError, NothingToPrune, warn
from .options import Repair
from .planning.planner import Planner
from .planning.request import Request
from .repair import closed, repair
from .repair.calibration import parts
from .repair.predictions import information, scores, vocabulary
from .scores import SCORES, Score
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


def with_score(graph: Graph, model: nn.Module, request: Request, asked: Repair | None, planner: Planner) -> Request:
    """The request with a score: where "auto" is asked for, that of the choice whose repaired model is nearest to the original.

    Scores that read inputs and were given none read those of the repair. Raises what the ``planner`` raises, and
    :class:`~graphprune.errors.BadTarget` when no choice meets what is asked.
    """
    batches = None if asked is None else asked.batches
    if request.score != AUTO:
        return _with_data(request, batches)
    if asked is None or batches is None or request.aims.timed or not all(each.spec.coarse for each in request.wanted):  # nothing to judge by
        return replace(request, score="l2")
    fits, checks = parts(list(batches), asked.spare)
    facts = {"target": asked.target, "spare": asked.spare, "rows": asked.rows, "progress": False}
    trials: list[tuple[float, Choice]] = []
    failed: GraphpruneError = BadTarget("no score could be computed")
    for choice in _choices(request):
        try:
            plan = planner(graph, model, _by(choice, request, batches)).stages[0]
        except NothingToPrune:
            raise
        except GraphpruneError as error:
            failed = error
            continue
        small = repair(apply(model, plan), model, plan, fits, closed_steps(asked), graph=graph, **facts)
        trials.append((_distance(model, small, checks or fits, vocabulary(graph)), choice))
        if trials[-1][0] < CLEAR:
            break
    if not trials:
        raise failed
    trials.sort(key=lambda trial: trial[0])
    error, choice = trials[0]
    what = "the outputs' variance" if vocabulary(graph) is None else "what the predictions say"
    if error > BAD:
        lost = f"{error:.0%} of {what} is lost on inputs kept out, after the repair"
        warn(f"at this target little of the function is left: {lost}; train, or ask for less")
    others = "".join(f"; {other}: {loss:.1%}" for loss, other in trials[1:])
    note = f"note: chose {choice}: {error:.1%} of {what} lost on inputs kept out, after the repair{others}"
    return replace(_by(choice, request, batches), notes=(*request.notes, note))


def _by(choice: Choice, request: Request, batches: object) -> Request:
    return _with_data(replace(request, score=choice.score, scope=choice.scope or request.scope), batches)


def _choices(request: Request) -> Iterator[Choice]:
    """What is tried: under a budget the scope is free unless it was asked for; a ratio is that of every group."""
    if request.aims.any and not request.scope_given:
        yield from BUDGETS
    else:
        yield from RATIOS


def _with_data(request: Request, batches: object) -> Request:
    """The request, whose score reads the inputs of the repair where it needs inputs alone and was given none."""
    score = SCORES.get(request.score) if isinstance(request.score, str) else request.score
    if batches is None or request.batches is not None or not isinstance(score, Score) or score.needs_now() != "inputs":
        return request
    return replace(request, batches=batches)


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
