"""Models that are saved with ``save_pretrained`` and come back by ``from_pretrained``: the configuration follows what was cut, or saving is refused.

Such a model is rebuilt from its configuration, and a folder loads where that gives the names and shapes in its file. :func:`follow` finds the numbers that
do (:mod:`graphprune.formats.config`), builds the class from them, gives it the weights, and compares what it computes with the cut model: what is not equal
(a scale that is the root of a width) is not called saved. Known here are two ways to keep a configuration, an object with ``to_dict`` and ``from_dict``, and
a mapping with ``from_config``; no architecture is, and neither library is imported.

The saving of a cut model is guarded by an attribute of the instance, :class:`Saving`, which stands before the method of the class: the class is the user's
(or the library's) and stays as it is, ``type(small) is type(model)``, and copies and pickles of the model take their guard along.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..cutting.apply import apply
from ..cutting.masks import masked
from ..cutting.plan import Plan, plan_of
from ..cutting.tokens import Tokens
from ..cutting.vocabulary import parted
from ..errors import BadConfig, BadPlan
from ..planning.planner import Planner
from ..planning.request import Request
from ..tracing.copies import duplicate
from ..tracing.sizes import leaves as leaves_of
from ..tracing.trace import Graph
from ..tracing.trees import leaf_tensors, tensors
from .closing import Lists, closed
from .config import Gap, Path, Slot, Solution, Tree, changed, compare, search
from .tokens import write_tokens

RUNTIME = ("_attn_implementation", "_experts_implementation")  # how a model runs: chosen when it is loaded, not kept
CURES = (
    "shrink(..., widths=graphprune.Widths(uniform=True)) cuts only what a configuration can say; "
    "graphprune.save(small, folder) keeps this model, and graphprune.load(folder, base) reads it"
)
ROUNDS, TABLE = 12, 2**16  # plans that are tried, entries of tables that are compared
SLACK, COARSE = 16, 2e-2  # how far two runs of the same weights may be apart: in roundings, and at most


def configured(model: nn.Module) -> bool:
    """Whether a model is saved with a configuration that its class is built from; one that wraps such a model (an adapter) takes that beside it."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        ways = hasattr(type(model), "from_config")
    else:
        ways = hasattr(config, "to_dict") and hasattr(type(config), "from_dict") and _takes_one(type(model))
    return ways and callable(getattr(type(model), "save_pretrained", None)) and callable(getattr(type(model), "from_pretrained", None))


def _takes_one(kind: type[nn.Module]) -> bool:
    """Whether a class is built from one argument, and needs no other."""
    try:
        arguments = list(inspect.signature(kind.__init__).parameters.values())[1:]
    except (TypeError, ValueError):
        return True
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return sum(argument.kind in places and argument.default is inspect.Parameter.empty for argument in arguments) <= 1


def expressed(graph: Graph, model: nn.Module, request: Request, decide: Planner) -> Plan:
    """The plan that ``decide`` makes; where uniform widths are asked of a model with a configuration, one that its configuration can say.

    What no number of the configuration says is first given the share of what it is derived with (heads and the width they divide), then left whole,
    with the reason in the notes of the plan.
    """
    plan = decide(graph, model, request)
    if not (any(each.spec.coarse for each in request.wanted) and request.widths.uniform and configured(model)):
        return plan
    notes: list[str] = []
    tied: set[frozenset[Slot]] = set()
    for _ in range(ROUNDS):
        small = apply(model, parted(plan)[0])
        solution = search(_builder(small), small, _tree(small), used=_used(graph))
        wrong = frozenset(solution.gap.axes)
        reason = "" if solution.gap.loads else "no number of the configuration says this width alone"
        if not wrong and not reason:
            wrong = _factors(small, solution, graph)
            reason = "what the configuration says of this width is also a factor" if wrong else ""
        if not wrong:
            return replace(plan, notes=(*plan.notes, *notes))
        reach = solution.reach().values() if not solution.gap.loads else ()
        ties = {frozenset((*slots, *wrong)) for slots in reach if slots & wrong and slots - wrong} - tied
        if ties:
            tied |= ties
            request = replace(request, tied=(*request.tied, *ties))
        else:
            shut = {(name, axis) for name, axis in wrong if axis in plan.cuts.get(name, {})}
            shut = shut or {(name, axis) for name, _ in wrong for axis in plan.cuts.get(name, {})}
            if not shut:
                break
            notes.append(f"note: {sorted(shut)[0][0]} axis {sorted(shut)[0][1]} and {len(shut) - 1} more stay whole: {reason}")
            request = replace(request, keep=(*request.keep, *sorted(shut)), tied=())
        plan = decide(graph, model, request)
    return replace(plan, notes=(*plan.notes, *notes, "note: no configuration of this model says these widths"))


def _factors(small: nn.Module, solution: Solution, graph: Graph) -> frozenset[Slot]:
    """The axes whose numbers in the configuration are also factors, if the model that is built computes something else."""
    if not _differs(small, small, solution, graph):
        return frozenset()
    wanted, built = (_promised(small), _promised(small, solution.tree)) if _hollow(small) else (_values(small), _values(loaded(small, solution.tree)))
    off = {place for place, value in wanted.items() if _other(built.get(place, value), value)}
    culprits: set[Slot] = set()
    reach = solution.reach()
    for path in solution.changes:
        rest = tuple(item for item in solution.changes.items() if item[0] != path)
        if solution.mends(rest):  # a number that the code reads is right without this change
            culprits |= reach[path]
        try:
            values = _values(_builder(small, bare=True)(changed(_tree(small), rest)))
        except Exception:  # numbers that do not go together: this one cannot be asked about alone
            continue
        if any(values.get(place) != built[place] for place in off):
            culprits |= reach[path]
    return frozenset(culprits or set().union(*reach.values()))


def _values(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The numbers that modules hold: plain ones, and tables that are no weights, by what is in them."""
    values: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        values |= {(path, key): value for key, value in module.__dict__.items() if type(value) is float}
        lasting = {key for key in module._buffers if key not in module._non_persistent_buffers_set}
        tables = {key: tensor for key, tensor in module._buffers.items() if tensor is not None and key not in lasting and not tensor.is_meta}
        values |= {(path, key): tuple(tensor.detach().double().ravel().tolist()) for key, tensor in tables.items() if tensor.numel() <= TABLE}
    return values


def follow(small: nn.Module, graph: Graph | None = None, check: bool = True, tokens: Tokens | None = None) -> nn.Module:
    """Let the configuration of a cut model, in place, say what is left, and guard its ``save_pretrained``; other models are left as they are.

    ``graph`` is the run that the cut was planned with: its example is what ``check`` computes. Where no configuration gives this
    model, it keeps its own, and ``save_pretrained`` raises :class:`~graphprune.errors.BadConfig` with the reason.
    """
    if not configured(small):
        return small
    before = small.__dict__.get("save_pretrained")
    earlier = before if isinstance(before, Saving) else Saving(small)
    if masked(small):  # its class does not know such weights until they are baked; masks change no size
        small.__dict__["save_pretrained"] = Saving(small, earlier.changes, earlier.fewer, earlier.reason)
        return small
    whole, lists = closed(small)
    solution, reason = _solved(whole, small, lists, graph)
    if not reason and check and graph is not None:
        reason = _differs(whole, small, solution, graph, tokens)
    fewer = {path: value for path, value in solution.changes.items() if _of_lists(_tree(small), path, lists)}
    changes = {} if reason else {path: value for path, value in solution.changes.items() if path not in fewer}
    _configure(small, changes)
    small.__dict__["save_pretrained"] = Saving(small, {**earlier.changes, **changes}, fewer, reason)
    return small


def guarded(small: nn.Module) -> nn.Module:
    """A model that was cut without a run to learn from: it keeps its configuration, and cannot be saved with it."""
    if configured(small) and not isinstance(small.__dict__.get("save_pretrained"), Saving):
        small.__dict__["save_pretrained"] = Saving(small, reason=f"what a plan alone has cut, the configuration does not say. {CURES}")
    return small


def noted(small: nn.Module) -> dict[str, Any] | None:
    """What a saved folder has to say of the configuration of a model, for JSON."""
    saving = small.__dict__.get("save_pretrained")
    if not isinstance(saving, Saving):
        return None
    numbers = {name: [[list(path), value] for path, value in getattr(saving, name).items()] for name in ("changes", "fewer")}
    return numbers | {"reason": saving.reason}


def remembered(small: nn.Module, note: Any) -> nn.Module:
    """Put back, in place, what :func:`noted` said; raises :class:`~graphprune.errors.BadPlan` where that makes no sense for this model."""
    if not configured(small):
        return small
    if note is None:
        return guarded(small)
    try:
        changes, fewer = ({tuple(path): tuple(value) if isinstance(value, list) else value for path, value in note[name]} for name in ("changes", "fewer"))
        _configure(small, changes)
        small.__dict__["save_pretrained"] = Saving(small, changes, fewer, str(note["reason"]))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadPlan(f"what the folder says of the configuration does not fit this model: {error}") from error
    return small


class Saving:
    """``save_pretrained`` of a cut model: it writes what loads again, or says what stands in the way.

    ``changes`` are the numbers of the configuration that the model has by now, ``fewer`` those that say how many blocks there are: blocks that are gone are
    closed up as the model is written, while the model itself keeps its names, which its plan speaks of. ``reason`` is why the model cannot be
    written, found when it was cut.
    """

    def __init__(self, model: nn.Module, changes: Mapping[Path, Any] | None = None, fewer: Mapping[Path, Any] | None = None, reason: str = "") -> None:
        self.model, self.changes, self.fewer, self.reason = model, dict(changes or {}), dict(fewer or {}), reason

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        whole = as_written(self.model)[0]
        kind: Any = type(whole)
        result = kind.save_pretrained(whole, *args, **kwargs)
        folder, plan = args[0] if args else kwargs.get("save_directory"), plan_of(self.model)
        if kwargs.get("is_main_process", True) and folder is not None:
            write_tokens(Folder(folder), plan.tokens if plan is not None else None)
        return result


def as_written(small: nn.Module) -> tuple[nn.Module, Lists]:
    """A cut model as it is written, with its blocks closed up and a configuration that says so, and which lists of blocks were.

    Raises :class:`~graphprune.errors.BadConfig` where no configuration gives this model.
    """
    saving = small.__dict__.get("save_pretrained")
    if masked(small):
        raise BadConfig("weights of this model are masked, which its class does not know: small = graphprune.bake(small) first, or use graphprune.save")
    if isinstance(saving, Saving) and saving.reason:
        raise BadConfig(saving.reason)
    whole, lists = closed(small)
    if isinstance(saving, Saving):
        _configure(whole, saving.fewer)
    if configured(whole):
        reason = _reason(compare(_builder(whole), whole, _tree(whole)))
        if reason:  # it was changed by other hands since
            raise BadConfig(reason)
    return whole, lists


def _solved(whole: nn.Module, small: nn.Module, lists: Lists, graph: Graph | None) -> tuple[Solution, str]:
    """The configuration, and why it is not enough (or nothing)."""
    solution = search(_builder(whole), whole, _tree(whole), lists, [_moved(path, lists) for path in _used(graph)])
    return solution, _reason(solution.gap)


def _reason(gap: Gap) -> str:
    """Why no configuration gives a model, in words (or nothing)."""
    if gap.loads:
        return ""
    shown = [f"{name} axis {axis} has {wanted}, the configuration gives {built}" for (name, axis), (built, wanted) in sorted(gap.axes.items())[:3]]
    shown += [f"{name} is on one side only" for name in sorted(gap.names)[:3]]
    shown += ["its class cannot be built from it"] if gap.fails else []
    return f"no numbers in the configuration of this model describe what is left of it: {'; '.join(shown)}. {CURES}"


def _used(graph: Graph | None) -> set[Path]:
    """The attributes that the run read as sizes."""
    if graph is None:
        return set()
    every = [call.expr for call in graph.calls] + list(graph.floats)
    every += [expr for pair in graph.equals for expr in pair] + [expr for outcome in graph.outcomes for expr in outcome[1:3]]
    return {leaf[1] for expr in every for leaf in leaves_of(expr) if leaf[0] == "attr"}


def _moved(path: Path, lists: Lists) -> Path:
    """An attribute's place after the lists of blocks were closed up."""
    module = path[0]
    for name, (_, kept) in lists.items():
        dot = f"{name}." if name else ""
        if module.startswith(dot):
            number, _, rest = module[len(dot) :].partition(".")
            if number.isdigit() and int(number) in kept:
                module = f"{dot}{kept.index(int(number))}" + (f".{rest}" if rest else "")
    return (module, *path[1:])


def _of_lists(tree: Tree, path: Path, lists: Lists) -> bool:
    """Whether a change speaks of how many blocks there are."""
    value: Any = tree
    for key in path:
        value = value[key] if isinstance(value, list | tuple) or key in value else None
    return isinstance(value, list | tuple) or value in {size for size, _ in lists.values()}


def _tree(model: nn.Module) -> Tree:
    config: Any = model.config
    return copy.deepcopy(dict(config) if isinstance(config, Mapping) else config.to_dict())


def _builder(model: nn.Module, bare: bool = False) -> Callable[[Tree], nn.Module]:
    """The class, from a configuration: on the meta device, or (``bare``) with everything but the weights."""
    kind: Any = type(model)
    config = model.config

    def build(tree: Tree) -> nn.Module:
        with quiet(), torch.random.fork_rng(devices=[]), _Unfilled() if bare else torch.device("meta"):
            if isinstance(config, Mapping):
                return kind.from_config(tree)
            return kind(_object(config, tree))

    return build


def unfilled(model: nn.Module) -> nn.Module:
    """The class of a model built again, its weights on the meta device, its tables (positions, scales) computed."""
    return _builder(model, bare=True)(_tree(model))


def _object(config: Any, tree: Tree) -> Any:
    made = type(config).from_dict(copy.deepcopy(tree))
    for key in RUNTIME:
        if hasattr(config, key):
            setattr(made, key, getattr(config, key))
    return made


class _Unfilled(TorchFunctionMode):
    """Weights are made without memory, and what is computed (tables of positions, scales) with: layers make them by ``torch.empty``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a library says while a model is built on trial, or without weights, is not for the user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _differs(whole: nn.Module, small: nn.Module, solution: Solution, graph: Graph, tokens: Tokens | None = None) -> str:
    """Why a model that is built from the configuration, with the weights of the cut one, does not compute the same on the example (or nothing)."""
    if _hollow(small):
        wanted, built = _promised(whole), _promised(whole, solution.tree)
        other = bool(solution.gap.attributes) or any(_other(built.get(place, value), value) for place, value in wanted.items())
        return _factor(solution) if other else ""
    args, kwargs = graph.example if tokens is None else tokens.example(*graph.example)
    try:
        again = loaded(whole, solution.tree)
        twin = duplicate(small, {id(tensor): tensor for tensor in small.parameters()})
        with torch.no_grad():
            theirs = list(tensors(again(*copy.deepcopy(args), **copy.deepcopy(kwargs)), torch.Tensor))
            mine = list(tensors(twin.eval()(*copy.deepcopy(args), **copy.deepcopy(kwargs)), torch.Tensor))
    except Exception as error:
        return f"the model that its configuration builds does not run with these weights: {type(error).__name__}: {error}; graphprune.save keeps it"
    worst = max((_apart(a, b) for a, b in zip(mine, theirs, strict=False)), default=0.0)
    if len(mine) == len(theirs) and worst <= 1:
        return ""
    return _factor(solution)


def _factor(solution: Solution) -> str:
    keys = ", ".join(f"{'.'.join(map(str, path))}={value}" for path, value in solution.changes.items())
    return f"the model that its configuration builds ({keys}) has the same shapes and computes something else: a number is also a factor. {CURES}"


def _hollow(model: nn.Module) -> bool:
    """Whether the weights have no values, so that nothing can be computed with them."""
    return any(tensor.is_meta for tensor in model.parameters())


def _promised(model: nn.Module, tree: Tree | None = None) -> dict[tuple[str, str], Any]:
    """The numbers that modules hold (:func:`_values`) of a model without values, or of what its class builds from ``tree``.

    Tables are known from building alone; where blocks are gone, those of the model itself are left out, for it is built with all.
    """
    if tree is not None:
        return _values(_builder(model, bare=True)(tree))
    built = _builder(model, bare=True)(_tree(model))
    tables = _values(built) if len(list(built.modules())) == len(list(model.modules())) else {}
    return tables | _values(model)


def _other(built: Any, wanted: Any) -> bool:
    """Whether a number, or a table that was not cut, is another one."""
    return built != wanted if not isinstance(wanted, tuple) or len(built) == len(wanted) else False


def loaded(model: nn.Module, tree: Tree) -> nn.Module:
    """The class built from a configuration, in evaluation mode, with the very weights of ``model``."""
    kind: Any = type(model)
    again = _builder(model, bare=True)(tree)
    device = next((tensor.device for *_, tensor in leaf_tensors(model)), None)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}  # a run may write into them
    state = model.state_dict() | {name: buffers[name] for name in buffers.keys() & model.state_dict().keys()}
    again.load_state_dict(state, assign=True)
    if any(tensor.is_meta for *_, tensor in leaf_tensors(again)):
        with quiet(), torch.random.fork_rng(devices=[]):
            again = kind.from_config(tree) if isinstance(model.config, Mapping) else kind(_object(model.config, tree))
        again.load_state_dict(state, assign=True)
    return again.to(device).eval()


def _apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far two results are apart, in what may be between two runs."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return float("inf")
    if not mine.is_floating_point() or not mine.numel() or mine.is_meta:
        return 0.0 if mine.is_meta or torch.equal(mine, theirs) else float("inf")
    limit = min(COARSE, SLACK * torch.finfo(mine.dtype).eps)
    gap = torch.nan_to_num(mine.double() - theirs.double(), posinf=0.0, neginf=0.0).abs().max()
    return float(gap / limit / theirs.double().nan_to_num().abs().max().clamp(min=1e-30)) if torch.equal(mine.isnan(), theirs.isnan()) else float("inf")


def _configure(model: nn.Module, changes: Mapping[Path, Any]) -> None:
    """Put other numbers into the configuration of a model, and of its modules; objects that others may hold are left as they are."""
    if not changes:
        return
    old: Any = model.config
    if isinstance(old, Mapping):
        top: dict[str, Any] = {}
        for path, value in changes.items():
            top[path[0]] = _with({**top}.get(path[0], old[path[0]]), path[1:], value)
        configurable: Any = model  # of a library whose configurations are mappings
        configurable.register_to_config(**top)
        return
    tree = _tree(model)
    for path, value in changes.items():
        tree = _with(tree, path, value)
    derived = _object(old, tree).to_dict()
    memo: dict[int, Any] = {}
    new = copy.deepcopy(old, memo)
    _write(new, old.to_dict(), derived)
    for module in model.modules():
        for key, value in module.__dict__.items():
            if id(value) in memo and type(value).__module__ == type(memo[id(value)]).__module__ and hasattr(value, "to_dict"):
                module.__dict__[key] = memo[id(value)]


def _with(tree: Any, path: Path, value: Any) -> Any:
    """A nest with another value at a place."""
    if not path:
        return list(value) if isinstance(value, tuple) else value
    twin = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    inside = twin.get(path[0]) if isinstance(twin, dict) else twin[path[0]]
    twin[path[0]] = _with(inside, path[1:], value)
    return type(tree)(twin) if isinstance(tree, tuple) else twin


def _write(config: Any, before: Tree, after: Tree) -> None:
    """Let a configuration object say what another says."""
    for key, value in after.items():
        inside = getattr(config, key, None)
        if hasattr(inside, "to_dict") and isinstance(value, dict):
            _write(inside, before.get(key, {}), value)
        elif key not in before or before[key] != value:
            setattr(config, key, value)
