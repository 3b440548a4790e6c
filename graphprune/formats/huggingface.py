"""Models that are saved with ``save_pretrained`` and come back by ``from_pretrained``: the configuration follows what was cut, or saving is refused.

Such a model is rebuilt from its configuration, and a folder loads where that gives the names and shapes in its file. :func:`follow` finds the numbers that
do (:mod:`graphprune.formats.config`), builds the class from them (:mod:`graphprune.formats.rebuilt`), and compares what it computes with the cut model
(:mod:`graphprune.formats.agreement`): what is not equal is not called saved.

The saving of a cut model is guarded by an attribute of the instance, :class:`Saving`, which stands before the method of the class: the class is the user's
(or the library's) and stays as it is, ``type(small) is type(model)``, and copies and pickles of the model take their guard along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as Folder
from typing import Any

from torch import nn

from ..cutting.masks import masked
from ..cutting.plan import plan_of
from ..cutting.tokens import Tokens
from ..errors import BadConfig, BadPlan
from ..tracing.graph import Graph
from ..tracing.sizes import leaves as leaves_of
from .advice import advice
from .agreement import CURES, difference
from .closing import Lists, closed
from .config import Gap, Path, Tree, compare, search
from .configuring import configure
from .rebuilt import builder, configured, tree_of
from .tokens import write_tokens


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
    solution = search(builder(whole), whole, tree_of(whole), lists, read_as_sizes(graph, lists))
    reason = _reason(solution.gap, advice(solution, graph, lists) if graph is not None and not solution.gap.loads else "")
    if not reason and check and graph is not None:
        reason = difference(whole, small, solution, graph, tokens)
    fewer = {path: value for path, value in solution.changes.items() if _of_lists(tree_of(small), path, lists)}
    changes = {} if reason else {path: value for path, value in solution.changes.items() if path not in fewer}
    configure(small, changes)
    small.__dict__["save_pretrained"] = Saving(small, {**earlier.changes, **changes}, fewer, reason)
    return small


def refusal(small: nn.Module) -> tuple[str, ...]:
    """A note for the plan of a cut model whose ``save_pretrained`` raises an error (or none)."""
    saving = small.__dict__.get("save_pretrained")
    return (f"note: save_pretrained refuses this model: {saving.reason}",) if isinstance(saving, Saving) and saving.reason else ()


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
        configure(small, changes)
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
        configure(whole, saving.fewer)
    if configured(whole):
        reason = _reason(compare(builder(whole), whole, tree_of(whole)))
        if reason:  # it was changed by other hands since
            raise BadConfig(reason)
    return whole, lists


def _reason(gap: Gap, more: str = "") -> str:
    """Why no configuration gives a model, in words (or nothing); ``more`` says what to ask for instead."""
    if gap.loads:
        return ""
    shown = [f"{name} axis {axis} has {wanted}, the configuration gives {built}" for (name, axis), (built, wanted) in sorted(gap.axes.items())[:3]]
    shown += [f"{name} is on one side only" for name in sorted(gap.names)[:3]]
    shown += ["its class cannot be built from it"] if gap.fails else []
    return f"no numbers in the configuration of this model describe what is left of it: {'; '.join(shown)}. {more}{CURES}"


def read_as_sizes(graph: Graph | None, lists: Lists) -> set[Path]:
    """The attributes that the run read as sizes, at their places after the lists of blocks were closed up."""
    if graph is None:
        return set()
    every = [call.expr for call in graph.calls] + list(graph.floats)
    every += [expr for pair in graph.equals for expr in pair] + [expr for outcome in graph.outcomes for expr in outcome[1:3]]
    return {_moved(leaf[1], lists) for expr in every for leaf in leaves_of(expr) if leaf[0] == "attr"}


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
