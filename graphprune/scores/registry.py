"""A score by its literature name: :class:`Score` says what it needs and what it costs, and computes itself.

A family's file decorates plain functions of a :class:`~graphprune.scores.task.Task` with :func:`scorer`; the name, the
line and the reference are entered in the catalogue.

>>> found = named("l2")
>>> found.family, found.needs
('norm', 'nothing')
>>> named("l2").with_(reduce="mean").options
{'reduce': 'mean'}
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..catalogue import enter, forget, open_to_others  # noqa: F401  (forget: the example of register)
from ..catalogue import register as register_any
from ..coupling.groups import Groups
from ..errors import BadLoss, BadOption, BadScore, NeedsBatches, UnknownName
from ..wording import nearest
from .data import Data, undisturbed
from .normalise import normalised
from .task import Scores, Stored, Task

NEEDS = ("nothing", "inputs", "loss")
GENERAL = ("normalise", "within", "seed", "progress", "reduction")
SCORES: dict[str, Score] = {}


@dataclass(frozen=True)
class Score:
    """One score of the catalogue. ``needs`` is "nothing", "inputs" (batches) or "loss" (batches and a loss).

    Call it as ``score(groups, model, batches=…, loss=…, **options)``, give it to ``shrink(score=…)``, with the data it reads
    (:meth:`on`), or fix options with :meth:`with_`. Options of every score: ``normalise`` ("none", "mean", "max", "l2", "standardise") with ``within``
    ("group", "class"), ``seed``, ``progress``, and ``reduction`` ("mean" or "sum": how the loss joins the samples of a batch).
    """

    name: str
    family: str
    line: str
    reference: str
    needs: str
    cost: str
    function: Callable[..., Scores]
    options: dict[str, Any] = field(default_factory=dict)

    def with_(self, **options: Any) -> Score:
        """The same score with options fixed; raises UnknownName for an option it does not have."""
        known = [*_options(self.function), *GENERAL]
        for name in options:
            if name not in known:
                near = ", ".join(nearest(name, known) or known)
                raise UnknownName(f"the score {self.name!r} has no option {name!r}; the nearest are {near}")
        return replace(self, options={**self.options, **options})

    def on(self, batches: Iterable[Any], loss: Callable[..., Any] | None = None) -> OnData:
        """The same score with the data that it reads, for :func:`graphprune.shrink`."""
        return on(self, batches, loss)

    def __call__(
        self,
        groups: Groups,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        loss: Callable[..., Any] | None = None,
        *,
        stored: Stored | None = None,
        **options: Any,
    ) -> Scores:
        settings = dict(self.with_(**options).options)
        general = {name: settings.pop(name) for name in GENERAL if name in settings}
        seed, progress = general.get("seed", 0), general.get("progress", True)
        if "seed" in _options(self.function):
            settings["seed"] = seed
        data = None
        if self.needs_now(settings) != "nothing":
            if batches is None:
                raise NeedsBatches(without_data(self.name, self.needs_now(settings)))
            data = Data(model, batches, loss, general.get("reduction", "mean"), progress, self.name)
        with undisturbed(model, seed) if data else nullcontext():  # without data no score runs the model
            values = self.function(Task(groups, model, data, self.name, progress, stored), **settings)
        checked(groups, model, values, self.name)
        return normalised(groups, values, general.get("normalise", "none"), general.get("within", "group"))

    def needs_now(self, options: dict[str, Any] | None = None) -> str:
        """What it needs under its options (an ensemble needs what its members need)."""
        asked = getattr(self.function, "needs", None)
        return asked({**self.options, **(options or {})}) if asked else self.needs


@dataclass(frozen=True)
class OnData:
    """A score (a name, a :class:`Score`, a function) with the ``batches`` and the ``loss`` that it reads; :func:`on` makes it."""

    score: Any
    batches: Iterable[Any]
    loss: Callable[..., Any] | None = None


def on(score: Any, batches: Iterable[Any], loss: Callable[..., Any] | None = None) -> OnData:
    """A score with its data: ``shrink(..., score=graphprune.scores.on("influence", loader))``.

    ``batches`` is any iterable (a list, a data loader), ``loss`` a function ``(output, labels)`` or ``(model, batch)``. Raises
    :class:`~graphprune.errors.NeedsBatches` or :class:`~graphprune.errors.BadLoss` for anything else, and
    :class:`~graphprune.errors.BadOption` for a score that reads no data.

    >>> on("taylor", [torch.zeros(1)], torch.nn.functional.mse_loss).score
    'taylor'
    """
    check_data(batches, loss)
    known = SCORES.get(score) if isinstance(score, str) else score
    if isinstance(known, Score) and known.needs_now() == "nothing":
        raise BadOption(f"the score {known.name!r} reads the weights alone: batches and loss would have no effect; give score={known.name!r}")
    if isinstance(known, Score) and known.needs_now() == "inputs" and loss is not None:
        raise BadOption(f"the score {known.name!r} reads inputs alone: a loss would have no effect; leave it out")
    return OnData(score, batches, loss)


def check_data(batches: Any, loss: Any) -> None:
    """Raise :class:`~graphprune.errors.NeedsBatches` or :class:`~graphprune.errors.BadLoss` for what no score could read."""
    if not isinstance(batches, Iterable) or isinstance(batches, torch.Tensor | str | bytes | Mapping):
        raise NeedsBatches(f"batches is a {type(batches).__name__}; give an iterable of batches, such as [x] or a DataLoader")
    if loss is not None and not callable(loss):
        raise BadLoss(f"loss is {loss!r}; give a function (output, labels) or (model, batch)")


def without_data(name: str, needs: str) -> str:
    """What to write where a score reads data and has none.

    >>> without_data("apoz", "inputs")
    "the score 'apoz' needs input data; write score=graphprune.scores.apoz.on(batches), or give batches= to graphprune.score"
    """
    what, loss, more = ("input data", "", "") if needs == "inputs" else ("data and a loss", ", loss", " and loss=")
    return f"the score {name!r} needs {what}; write score=graphprune.scores.{name}.on(batches{loss}), or give batches={more} to graphprune.score"


def _options(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def scorer(
    family: str, line: str, reference: str, *, needs: str = "nothing", cost: str, default: dict[str, Any] | None = None
) -> Callable[[Callable[..., Scores]], Score]:
    """Enter a function ``(task, **options) -> Scores`` under its own name."""

    def entered(function: Callable[..., Scores]) -> Score:
        score = Score(function.__name__, family, line, reference, needs, cost, function, dict(default or {}))
        score.__dict__["__doc__"] = function.__doc__
        SCORES[score.name] = score
        enter("score", score.name, f"{line} ({reference})", score)
        return score

    return entered


@open_to_others("score")
def _enter(name: str, line: str, function: Callable[..., Scores], *, source: str = "your own", needs: str = "nothing", cost: str = "unknown") -> None:
    if needs not in NEEDS:
        raise BadOption(f"needs is {needs!r}; a score needs one of {', '.join(NEEDS)}")
    SCORES[name] = Score(name, "own", line, source, needs, cost, function)
    enter("score", name, f"{line} ({source})", SCORES[name])


def register(name: str, formula: str, source: str = "your own", needs: str = "nothing", function: Callable[..., Scores] | None = None) -> Any:
    """Offer a score under a name: ``function(task, **options)`` returns a float64 tensor (units,) for every group, larger means more important.

    Used as a decorator. ``task.groups`` are the groups, ``task.parameters`` the weights by name, ``task.total({name: tensor}, over, by)`` sums entry by entry
    over the slices of every unit (``over``: "all", "produces", "consumes" or "passes"), ``task.data`` the batches. ``needs`` is "nothing", "inputs" or "loss".
    Raises :class:`~graphprune.errors.BadOption`; ``docs/own-score.md`` shows one.

    >>> @register("half_l1", "half the sum of the absolute weights")
    ... def half_l1(task):
    ...     return task.total(task.parameters, by=lambda weight: weight.abs() / 2)
    >>> named("half_l1").needs
    'nothing'
    >>> forget("score", "half_l1"); _ = SCORES.pop("half_l1")
    """
    if function is None:
        return lambda function: register(name, formula, source, needs, function)
    return register_any("score", name, formula, function, source=source, needs=needs)


# What other tools, and people, call the families; each with the names to look at here.
ELSEWHERE = {
    "magnitude": ["l1", "l2"],
    "norm": ["l1", "l2"],
    "weight": ["l1", "l2"],
    "gradient": ["taylor", "fisher"],
    "grad": ["taylor", "fisher"],
    "hessian": ["obd", "obs"],
    "wanda": ["wanda_sp"],
    "bn": ["bn_scale"],
    "gamma": ["bn_scale"],
    "slimming": ["bn_scale"],
}


def named(name: str) -> Score:
    """The score of that name; raises UnknownName with the nearest ones."""
    if name not in SCORES:
        near = ELSEWHERE.get(str(name).lower()) or nearest(name, SCORES)
        hint = f"the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else f"there are {', '.join(SCORES)}"
        raise UnknownName(f"no score named {name!r}; {hint}; or give a function (groups, model, batches) -> tensors")
    return SCORES[name]


def accepts(function: Callable[..., Any], wanted: str, *args: Any, **options: Any) -> None:
    """Raise BadScore when a function of the user's own cannot be called so; what goes wrong inside it is left to itself.

    >>> accepts(lambda weight: weight, "(weight)", torch.ones(1))
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise BadScore(f"the criterion {name!r} takes {signature}, and is called as {wanted}: {error}") from None


def checked(groups: Groups, model: nn.Module, scores: Any, name: str) -> Scores:
    """The scores, when there is a finite float64 tensor of shape (units,) for every group; else BadScore with the place."""
    if not isinstance(scores, list | tuple) or len(scores) != len(groups):
        count = f"{len(scores)} of them" if isinstance(scores, list | tuple) else f"a {type(scores).__name__}"
        raise BadScore(f"the score {name!r} must be a list of {len(groups)} tensors, one for each group; got {count}")
    for group, group_scores in zip(groups, scores, strict=True):
        where = f"group {group.index} ({group.name})"
        if not isinstance(group_scores, torch.Tensor) or tuple(group_scores.shape) != (group.size,):
            shape = tuple(group_scores.shape) if isinstance(group_scores, torch.Tensor) else type(group_scores).__name__
            raise BadScore(f"the score {name!r} of {where} must be a tensor of shape ({group.size},), one entry for each unit; got {shape}")
        if math.isfinite(float(group_scores.sum())):  # then every entry is
            continue
        wrong = (~torch.isfinite(group_scores)).nonzero().ravel().tolist()
        if wrong:
            text = f"the score {name!r} is not finite for {len(wrong)} of {group.size} units of {where}, first unit {wrong[0]}"
            raise BadScore(f"{text}; {cause(model)}")
    return list(scores)


def cause(model: nn.Module) -> str:
    """Where values that are not finite may come from: tensors of the model, by name, or else the data."""
    broken = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    return f"these tensors are not finite: {', '.join(broken[:3])}" if broken else "the model's tensors are finite: look at the data and the loss"
