"""The table of contents: trace, then couple, score, select and plan (:mod:`graphprune.planning`), apply, verify, repair."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from torch import nn

from .cutting.apply import apply
from .cutting.compose import compose, so_far
from .cutting.plan import Plan, note_plan
from .cutting.undo import undone
from .cutting.verify import check_model
from .cutting.vocabulary import check_tokens
from .deciding import PLANNER, decided, score_of
from .formats.building import built_once
from .formats.huggingface import follow, refusal
from .options import DEFAULTS, GOALS, PlanOptions, Repair, ShrinkOptions, Target
from .planning.outcome import disappointments
from .planning.request import Request, ask, flag
from .ranks import across_ranks, agreed
from .repair import after_cut, before_cut, refill
from .spelling import taking
from .tracing.graph import Graph
from .tracing.surroundings import looked_for_once
from .tracing.trace import trace

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)
CHOICES = ("on", "scope", "what", "keep", "widths")


@overload
def shrink(model: Model, example_input: Any, ratio: Target = None, *, return_plan: Literal[True], **options: Unpack[ShrinkOptions]) -> tuple[Model, Plan]: ...
@overload
def shrink(model: Model, example_input: Any, ratio: Target = None, *, return_plan: Literal[False] = False, **options: Unpack[ShrinkOptions]) -> Model: ...
@taking(ShrinkOptions)
@across_ranks
@looked_for_once()
@built_once()
def shrink(model: nn.Module, example_input: Any, ratio: Target = None, *, return_plan: bool = False, **options: Unpack[ShrinkOptions]) -> Any:
    """A smaller model, of the same class, that computes what ``model`` computes with the removed units set to zero.

    - ``example_input``: a tensor, a tuple (positional) or a dict (keyword) that the model can be called with.
    - ``examples``: further ones that must hold too: other lengths, another batch size, or functions ``(model) -> result`` (another method).
    - ``outputs``: which parts of what ``model`` returns keep their size (by default all): a name (``"logits"``), an index, a predicate ``(path, tensor) ->
      bool``, or several; the rest may shrink (states, feature maps that nobody reads).
    - ``ratio``: the share of units removed in every group, 0 <= ratio < 1 (default 0.5, and 0 when a target is given), or text (``"30%"``).
    - ``params``, ``macs``, ``size`` (bytes of the weights), ``memory`` (peak bytes of the activations): upper limits, which hold together. A float up to 1 is
      the share of the original that may stay, a larger number is absolute, text says its unit: ``macs=0.5``, ``params="1M"``, ``size="5 MB"``.
    - ``speedup`` (``2`` or ``"2x"``) or ``latency`` (``"8 ms"``, or the share that may stay): a measured time; ``on`` says where it counts,
      ``"onnxruntime"`` or ``graphprune.Runtime("onnxruntime", threads=1)``, and ``Runtime(objective="time")`` spends another budget on the fastest widths.
    - ``score``: what matters. With batches for a ``repair`` and a budget the default is ``"auto"``: a few scores and scopes are tried, and the one is taken
      whose repaired model is nearest to the original on inputs kept out (:mod:`graphprune.automatic`; a note in the plan says which); else it is ``"l2"``.
      Or a name of ``graphprune.available()["score"]``, ``graphprune.scores.taylor.on(batches, loss)`` for one that reads data, a mapping of ``what`` to
      scores, or a function: ``(groups, model, batches) -> tensors`` for channels and heads, ``(name, module) -> float`` for blocks and layers,
      ``weight -> tensor`` for everything finer.
    - ``scope``: ``"layer"`` (the same ratio everywhere; the default without a time), ``"global"``, ``"isomorphic"`` (ranked together), or ``"allocated"``
      (every width by what it costs and loses; the default with a time; :mod:`graphprune.budget.optimal`).
    - ``what``: what goes, a name of ``graphprune.available()["granularity"]``: "channel" (every axis), "heads", "mlp", "hidden", "layers" …, "kernel",
      "weight", or n:m as in "2:4"; several share the ratio or the budget: ``("mlp", "layers")``; a mapping says how much of each goes, or stays, or which:
      ``{"mlp": 0.3, "hidden": 3072, "layers": [21, 22]}``. :func:`graphprune.widths` lists what a model has.
    - ``keep``: what stays whole, by name, pattern, module type, module or predicate ``(name, module) -> bool``.
    - ``widths``: rules for single groups, :class:`graphprune.Widths` (``multiple_of``, ``at_least``, ``ratios`` …), or a mapping of names to widths.
    - ``repair``: batches of inputs (no labels) from which the cut model is repaired, or :class:`graphprune.Repair`; ``"data-free"`` needs none.
    - ``example_kwargs``: keywords of the call beside ``example_input``.
    - ``inplace`` cuts the model itself; ``return_plan`` returns ``(model, plan)`` (the plan is also at ``.graphprune_plan``); ``verify`` compares with
      :func:`zeroed` on the example.

    Raises the errors of :mod:`graphprune.errors`, and leaves ``model`` as it was. Warns where less happens than was asked for.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> shrink(net, torch.zeros(1, 4), ratio=0.5)[0].out_features
    4
    """
    check_model(model)
    inplace, verify = (flag(name, options.get(name, DEFAULTS[name])) for name in ("inplace", "verify"))
    return_plan = flag("return_plan", return_plan)
    repairs = before_cut(model, Repair.of(options.get("repair")))
    score = score_of(options.get("score"), repairs, any(options.get(name) is not None for name in GOALS))
    request, graph = _asked(model, example_input, ratio, options, score=score, inplace=inplace)
    chosen, small = decided(graph, model, request, repairs, verify)
    small, chosen = _finished(small, model, chosen, repairs, graph, verify)
    disappointments(graph, model, chosen, request)  # which may be made errors: nothing of the model has changed by now
    with undone(model, chosen.edits) if inplace else nullcontext():
        if inplace:
            cut = apply(model, chosen, inplace=True)
            small = cut if repairs is None else refill(cut, small)
        follow(small, graph, verify, chosen.tokens)
        chosen = replace(chosen, notes=(*chosen.notes, *refusal(small)))
        note_plan(small, so_far(model, chosen))
    return (small, chosen) if return_plan else small


def _finished(small: nn.Module, model: nn.Module, chosen: Plan, repairs: Repair | None, graph: Graph, verify: bool) -> tuple[nn.Module, Plan]:
    """The model that the first stage of a plan left, repaired, and then cut by the others; with the plan that says so."""
    first, *others = chosen.stages
    small, done = after_cut(small, model, first, repairs, graph)
    for stage in others:
        whole, small = small, apply(small, stage)
        if verify and stage.tokens is not None:
            check_tokens(whole, small, stage.tokens, graph.example)
        done = compose(done, stage)
    return small, done


@taking(PlanOptions)
@across_ranks
@looked_for_once()
@built_once()
def plan(model: nn.Module, example_input: Any, ratio: Target = None, **options: Unpack[PlanOptions]) -> Plan:
    """What :func:`shrink` would do, as a plan, without cutting anything: ``graphprune.apply(model, plan)`` does it.

    The options are those of :func:`shrink`. Raises the errors of :mod:`graphprune.errors`.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> chosen = plan(net, torch.zeros(1, 4), ratio=0.5)
    >>> apply(net, chosen)[0].out_features, net[0].out_features
    (4, 8)
    """
    check_model(model)
    request, graph = _asked(model, example_input, ratio, options, score=options.get("score") or "l2")
    chosen = PLANNER(graph, model, replace(request, proof="calls"))
    disappointments(graph, model, chosen, request)
    return agreed(chosen)


def _asked(model: nn.Module, example_input: Any, ratio: Target, options: PlanOptions, **facts: Any) -> tuple[Request, Graph]:
    """The request, checked before anything costs time, and the graph of the run that it is about."""
    targets = {name: options.get(name) for name in GOALS}
    request = ask(model, ratio, targets, **{name: value for name, value in options.items() if name in CHOICES}, **facts)
    examples, outputs = options.get("examples", ()), options.get("outputs")
    return request, trace(model, example_input, options.get("example_kwargs"), outputs=outputs, examples=examples)
