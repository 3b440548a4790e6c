# pyright: strict, reportUnnecessaryIsInstance=false
"""Repair a cut model from a few unlabelled inputs, in closed form and, where asked, by gradient steps: :func:`repair`.

Slicing alone collapses trained networks; what remains can say most of what was removed. Steps by name:

- ``"least-squares"``: every weight behind the first cut is fitted, with intercept and ridge, to the original's activations (queries to what
  their products with the kept keys have to say), and so are the scales of norms over a cut stream;
- ``"censored"``: weights before an activation that is flat in parts (ReLU) fitted to what it lets pass, after the steps that follow here;
- ``"variance"``, ``"bias"``: only the scale and the mean of every output, or only the mean;
- ``"bn"``: batch-norm statistics measured anew, exactly;
- ``"merge"``, ``"fold"``, ``"rescale"``: without any data, from the network's own statistics (``"data-free"`` is all three): removed channels
  told by the kept ones, their means folded into the bias behind, lost variance made up in the norms;
- ``"distill"``, ``"mimic"``: minutes of gradient steps towards the original's class probabilities, or whatever it returns; after all others.

Each step keeps its result only where it is no worse on calibration kept out of it, and says what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..catalogue import enter, entry, open_to_others
from ..catalogue import names as listed_names
from ..cutting.apply import apply
from ..cutting.plan import Plan, plan_of
from ..errors import BadCalibration, BadOption, UnknownName
from ..options import Repair, check_repair
from ..tracing.copies import duplicate
from ..tracing.fused import gathered
from ..tracing.graph import Graph
from ..tracing.surroundings import unchanged
from ..tracing.trace import trace
from ..tracing.trees import leaf_tensors
from .calibration import example, listed, parts, running, waiting
from .closed import STEPS as CLOSED
from .closed import WEIGHTS, Closed, distance
from .effect import effect
from .fitting import Repaired, idle, warn_scarce
from .free import STEPS as FREE
from .imitation import DISTANCES, imitate, teachable

__all__ = ["Repaired", "effect", "repair"]

SETS = {"auto": ("least-squares", "censored", "bn"), "data-free": FREE}
STEPS = (*CLOSED, *DISTANCES)
for _name, _line in {
    "auto": "with calibration=: least squares, plain and censored, then batch-norm statistics, each kept only where it helps on inputs kept out of it",
    "data-free": "merge, fold and rescale: without calibration, from the network's own statistics",
    "none": "nothing is repaired",
    "merge": "removed channels told by the kept ones, from the network's own statistics",
    "fold": "means of removed channels to the bias behind, from the network's own statistics",
    "rescale": "the variance lost in a cut made up in the norms, from the network's own statistics",
    "bias": "means of every output as they were, on calibration",
    "variance": "means and variances of every output as they were, on calibration",
    "least-squares": "every weight behind a cut fitted to the original's activations, on calibration",
    "censored": "every weight before a ReLU, or another activation with flat parts, fitted to what that lets pass, on calibration",
    "bn": "batch-norm statistics measured anew, exactly, on calibration; also with masks, smaller kernels and removed modules",
    "distill": "after the others, minutes of gradient steps towards the original's class probabilities on calibration, without labels",
    "mimic": "as distill, towards all that the original returns (features, boxes, images)",
}.items():
    enter("repair", _name, _line)


def repair(
    small: nn.Module,
    original: nn.Module,
    plan: Plan | None = None,
    calibration: Iterable[Any] | None = None,
    steps: str | Sequence[str] | None = "auto",
    *,
    graph: Graph | None = None,
    target: str = "block",
    spare: float = 0.25,
    rows: int = 16384,
    progress: bool = True,
) -> nn.Module:
    """A repaired copy of ``small``, the model that ``plan`` cut from ``original``; both are left as they were.

    ``calibration`` is any iterable of batches: inputs, pairs of inputs and labels (which are not used), or all arguments of ``forward`` as a tuple of
    three or more or as a dict; the last ``spare`` share is kept out of
    the fits to judge them. ``steps``: "auto" (least squares, plain and censored, then batch-norm statistics if that helps), "data-free" (which needs no
    calibration, and is judged on it if there is some), "none", or a list of names, such as ``("auto", "distill")``: then gradient steps towards
    the original's answers follow, still without labels, of all parameters but those that are frozen beside others that are not (closed forms fit
    any); they pay where calibration is plentiful (text more than
    a few hundred images), and where they do not help on what is kept out, the result is that of the closed forms alone.
    ``target="block"`` fits what is added to a residual stream to what the stream lacks, ``"layer"`` to the layer's own output. ``rows`` is
    how many positions each fit sees. The plan of the result (``.graphprune_plan``) records what was done.
    Where the vocabulary was cut as well, ``calibration`` is what the tokenizer writes, in ids of the original, also of tokens that went.
    Raises :class:`~graphprune.errors.BadCalibration` and :class:`~graphprune.errors.UnknownName`.

    >>> import graphprune
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> small, plan = graphprune.shrink(net, torch.zeros(1, 4), return_plan=True)
    >>> better = repair(small, net, plan, [torch.randn(64, 4) for _ in range(4)])
    >>> better.graphprune_plan.lines[-1].startswith("repair least-squares: 2.weight")
    True
    """
    check_repair(target, spare, rows, progress)
    names = _named(steps)
    plan = plan or plan_of(small)
    if plan is None:
        raise BadCalibration("the cut model carries no plan; pass the one that shrink(..., return_plan=True) returned")
    if plan.tokens is not None:
        options: dict[str, Any] = {"graph": graph, "target": target, "spare": spare, "rows": rows, "progress": progress}
        return _between(small, original, plan, lambda whole, first: repair(whole, original, first, calibration, steps, **options))
    names = _possible(names, steps, plan)
    result = gathered(duplicate(small, {}))
    if not names:
        return result
    fits, checks = ([], []) if calibration is None and set(names) <= set(FREE) else parts(listed(calibration, original), spare)
    if graph is None and not fits:
        raise BadCalibration("a repair without data needs graph=, what trace(original, example_input) returns")
    # Counters and caches do not go on as the models run; a step of somebody else's may write into any tensor of the result.
    with _quiet(original, result), unchanged(original, *(() if any(map(_is_own, names)) else (result,))):
        if fits:
            _tried(original, names, example(fits[0]))
        room = waiting(original, [*fits, *checks]) if fits else 1.0
        graph = graph or trace(original, *example(fits[0]))
        closed = Closed(original, result, graph, plan, names, fits, checks, target, rows, room, progress)
        with torch.no_grad(), running():
            done = _carried_out(closed, small)
        warn_scarce(closed.scarce)
    done += [idle(name, "the model has nothing for it to do") for name in _written(steps) if name not in {*SETS, *_did(done)}]
    recorded = replace(plan, remarks=(*plan.remarks, *map(str, done)))
    result.__dict__.update(graphprune_plan=recorded, graphprune_repairs=tuple(done))
    return result


def _between(small: nn.Module, original: nn.Module, plan: Plan, repaired: Callable[[nn.Module, Plan], nn.Module]) -> nn.Module:
    """A repair of a model with fewer tokens: of the one that still has all of them (rows that went are those of the original), and then cut again."""
    first, last = plan.stages
    whole = apply(original, first)
    with torch.no_grad():
        every = {name: tensor for name, _, _, tensor in leaf_tensors(whole)}
        cuts = {id(every[name]): axes for name, axes in last.cuts.items() if name in every}  # tied tensors are cut under one name
        kept = {name: _places(tensor, cuts.get(id(tensor), {})) for name, tensor in every.items()}
        for name, _, _, tensor in leaf_tensors(small):
            if name in every:
                every[name][kept[name]] = tensor.detach()
        better = repaired(whole, first)
        result = gathered(duplicate(small, {}))
        every = {name: tensor for name, _, _, tensor in leaf_tensors(better)}
        for name, _, _, tensor in leaf_tensors(result):
            if name in every and name not in last.numbers:
                tensor.copy_(every[name][kept[name]])
    known = plan_of(better)
    assert known is not None
    recorded = replace(plan, remarks=(*plan.remarks, *known.remarks[len(first.remarks) :]))
    result.__dict__.update(graphprune_plan=recorded, graphprune_repairs=better.__dict__.get("graphprune_repairs", ()))
    return result


def _places(tensor: torch.Tensor, axes: Mapping[int, Sequence[int]]) -> Any:
    """An index of the given positions of some axes of a tensor, and all of the others."""
    if not axes:
        return ...
    return torch.meshgrid(*(torch.as_tensor(axes.get(axis, range(size)), device=tensor.device) for axis, size in enumerate(tensor.shape)), indexing="ij")


def _carried_out(closed: Closed, small: nn.Module) -> list[Repaired]:
    """The closed forms, steps from outside, then gradient steps; where these help nothing on what is kept out, the closed forms alone, from ``small`` on."""
    names, fits, checks = closed.names, closed.fits, closed.checks
    learning = [name for name in names if name in DISTANCES]
    done = closed.run(again=not learning or not checks)  # what judges gradient steps must not have been seen by the fits
    done += [_own(name, closed.original, closed.small, fits, checks) for name in names if _is_own(name)]
    learned = [one for name in learning for one in imitate(closed.original, closed.small, name, fits, checks, closed.progress)]
    if learned and checks and not any(one.kept for one in learned):
        refill(closed.small, small)
        done = closed.run(again=True)
    return done + learned


def before_cut(model: nn.Module, asked: Repair | None) -> Repair | None:
    """What :func:`graphprune.shrink` does before anything costs time: the batches as a list, or the error that says what is wrong with them or the steps."""
    if asked is None:
        return None
    names = _named(asked.steps)
    if asked.batches is None and not set(names) <= set(FREE):
        raise BadCalibration(f"repair={asked.steps!r} needs calibration: Repair(batches, {asked.steps!r}), any iterable of input batches")
    if not names:
        return None
    if asked.batches is None:
        return asked
    batches = listed(asked.batches, model)
    with _quiet(model), unchanged(model):
        _tried(model, names, example(batches[0]))
    return replace(asked, batches=batches)


def after_cut(small: nn.Module, original: nn.Module, plan: Plan, asked: Repair | None, graph: Graph) -> tuple[nn.Module, Plan]:
    """What :func:`graphprune.shrink` does after the cut: the repaired model and its plan, or both as they were where nothing is to be repaired."""
    if asked is None:
        return small, plan
    facts: dict[str, Any] = {"target": asked.target, "spare": asked.spare, "rows": asked.rows, "progress": asked.progress}
    better = repair(small, original, plan, asked.batches, asked.steps, graph=graph, **facts)
    return better, plan_of(better) or plan


def refill(model: nn.Module, repaired: nn.Module) -> nn.Module:
    """Copy the repaired weights and statistics into a model of the same shapes."""
    leaves = {name: tensor for name, _, _, tensor in leaf_tensors(repaired)}
    with torch.no_grad():
        for name, _, _, tensor in leaf_tensors(model):
            tensor.copy_(leaves[name])
    return model


def _tried(model: nn.Module, names: Sequence[str], sample: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """One sample through the model: whether it fits, and whether gradient steps could learn from what comes out."""
    with torch.no_grad(), running(sample):
        model(*sample[0], **sample[1])
        for name in names:
            if name in DISTANCES:
                teachable(model, name, sample)


def _named(steps: str | Sequence[str] | None) -> tuple[str, ...]:
    if steps is None or steps == "none":
        return ()
    if not isinstance(steps, Iterable):
        raise UnknownName(f"repair={steps!r} is no name of a repair; there are auto, data-free, none, {', '.join(STEPS)}")
    if "none" in _written(steps):
        raise UnknownName(f"repair={steps!r}: 'none' stands alone")
    names = tuple(dict.fromkeys(one for name in _written(steps) for one in SETS.get(name, (name,))))
    for name in names:
        if name not in STEPS and not _is_own(name):
            raise UnknownName(f"no repair named {name!r}; there are {', '.join(listed_names('repair'))}")
    return names


@open_to_others("repair")
def _enter(name: str, line: str, function: Callable[[nn.Module, nn.Module, list[Any]], Any]) -> None:
    """From outside: ``function(small, original, batches)`` changes the weights of ``small``; what it did stays where it helps on batches kept out."""
    if name in (*STEPS, *SETS, "none"):
        raise BadOption(f"there is a repair {name!r} already; give yours another name")
    enter("repair", name, line, function, own=True)


def _is_own(name: str) -> bool:
    return name in listed_names("repair") and entry("repair", name).facts.get("own", False)


def _own(name: str, original: nn.Module, small: nn.Module, fits: list[Any], checks: list[Any]) -> Repaired:
    """A step of somebody else's, kept where the outputs come no further from the original's."""
    function = entry("repair", name).function
    assert function is not None
    before = distance(original, small, checks or fits)
    old = {leaf: tensor.detach().clone() for leaf, _, _, tensor in leaf_tensors(small)}
    function(small, original, fits)
    after = distance(original, small, checks or fits)
    better = after <= before
    for leaf, _, _, tensor in leaf_tensors(small) if not better else ():
        tensor.copy_(old[leaf])
    return Repaired(name, "outputs of the model", before, after, better)


def _written(steps: str | Sequence[str] | None) -> tuple[str, ...]:
    if steps is None:
        return ()
    return (steps,) if isinstance(steps, str) else tuple(steps)


def _did(done: Sequence[Repaired]) -> set[str]:
    return {name for one in done for name in one.step.split(" and ")}


def _possible(names: tuple[str, ...], steps: str | Sequence[str] | None, plan: Plan) -> tuple[str, ...]:
    """Weights are fitted where channels were cut; after anything else only statistics can be measured anew."""
    wrong = [name for name in names if name in WEIGHTS] if plan.parts else []
    asked = [name for name in wrong if name in _written(steps)]
    if asked:
        kinds = ", ".join(sorted({part.kind for part in plan.parts}))
        raise BadCalibration(f"{asked[0]!r} fits weights behind cut channels, this plan has parts of other kinds ({kinds}): take repair='bn', or retrain")
    return tuple(name for name in names if name not in wrong)


@contextmanager
def _quiet(*models: nn.Module) -> Any:
    """Evaluation mode for the time being."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
