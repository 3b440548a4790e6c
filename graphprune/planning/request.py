"""All that is asked of :func:`graphprune.shrink`, in the user's words and checked, as one value: :class:`Request`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..budget.targets import Aims
from ..cost import NAMES, cost
from ..coupling.groups import Groups, couple
from ..errors import BadOption, BadRatio, BadTarget
from ..granularity.spec import Spec, parse
from ..names import named
from ..options import Runtime, Widths
from ..quantities import Seconds, amount
from ..scores import OnData
from ..select import check_ratio
from ..tracing.trace import Graph
from .proof import Fault

REASONS = {
    "size": "masked entries are stored as zeros: ask for params= or macs=",
    "memory": "it leaves every activation as large as it is: cut channels",
}


@dataclass(frozen=True)
class Request:
    """What :func:`~graphprune.shrink` was asked for; ``keep`` names tensors, or one axis as (name, axis); :mod:`graphprune.names` reads ``widths.ratios``.

    ``multiple_of`` is that of the widths once the graph is known (it may be a function of the groups), and ``extra_costs`` maps the name of a further cost
    to (its limit, how to make it; see :func:`~graphprune.cost.costs`). ``tied``: axes, as (name, axis), whose groups keep the same share.
    """

    spec: Spec
    aims: Aims
    ratio: float
    scope: str
    score: Any
    batches: Iterable | None
    loss: Callable | None
    keep: Sequence[str | tuple[str, int]]
    widths: Widths
    inplace: bool = False
    scope_given: bool = False
    multiple_of: Any = None
    extra_costs: Mapping[str, tuple[float, Callable]] = field(default_factory=dict)
    tied: Sequence[frozenset[tuple[str, int]]] = ()
    proof: str = ""  # "calls": every plan is rehearsed without values; "values": compared with the zeroed original, result by result
    faults: list[tuple[Graph, Fault]] = field(default_factory=list)  # what proved wrong so far
    notes: tuple[str, ...] = ()  # how this request came about, for the plan

    def __post_init__(self) -> None:
        if self.spec.coarse:
            return
        if self.widths.multiple_of not in (None, 1) or self.widths.at_least != 1:
            raise BadRatio("multiple_of= and at_least= (min_units=) are about widths; they go with channels or heads")
        if self.aims.timed or self.aims.weight:
            text = f"with channels or heads; {self.spec.text!r} takes a ratio, params= or macs="
            raise BadTarget(f"latency=, speedup= and objective= are met by widths, {text}")

    @property
    def plain(self) -> bool:
        """Whether one ratio decides, group by group."""
        return self.scope == "layer" and not self.extra_costs and not self.aims.any and isinstance(self.multiple_of, int)

    def ties(self, groups: Groups) -> list[frozenset[int]]:
        """The groups along the axes that are ``tied``."""
        ties = [frozenset(group.index for group in groups if not slots.isdisjoint(group.places)) for slots in self.tied]
        return [tie for tie in ties if len(tie) > 1]

    def limits(self, graph: Graph, allowed: Sequence[str]) -> dict[str, float]:
        """The absolute limits; raises :class:`~graphprune.errors.BadTarget` for those that the granularity cannot meet."""
        asked = [name for name in NAMES if getattr(self.aims, name) is not None]
        for name in asked:
            if name not in allowed:
                raise BadTarget(f"{name}= cannot be met with granularity {self.spec.text!r}: {REASONS.get(name, 'it says itself how much goes')}")
        return self.aims.limits(cost(couple(graph))) if asked else {}


def ask(
    model: nn.Module,
    ratio: Any = None,
    targets: Mapping[str, Any] | None = None,
    *,
    on: Runtime | None = None,
    score: Any = "l2",
    scope: str | None = None,
    what: Any = "channel",
    keep: Any = (),
    widths: Widths | Mapping | None = None,
    inplace: bool = False,
) -> Request:
    """The request for what a user wrote; raises the errors of :mod:`graphprune.errors` for what makes no sense, before anything costs time.

    >>> ask(nn.Linear(2, 2), "50%").ratio
    0.5
    """
    aims = _aims(targets or {}, on or Runtime())
    ratio = amount("ratio", ratio)
    ratio = check_ratio((0.0 if aims.any else 0.5) if ratio is None else ratio)
    widths = _widths(widths)
    if on is not None and not (aims.timed or aims.weight or widths.multiple_of == "auto"):
        raise BadOption(f'on={on!r} would have no effect: it says where a time counts; ask for one (speedup=2, latency="8 ms") or for objective="time"')
    score, batches, loss = (score.score, score.batches, score.loss) if isinstance(score, OnData) else (score, None, None)
    scopes = scope or aims.scope
    return Request(parse(what), aims, ratio, scopes, score, batches, loss, named(model, keep), widths, inplace, scope is not None)


def _widths(asked: Any) -> Widths:
    if asked is None or isinstance(asked, Widths):
        return asked or Widths()
    if isinstance(asked, Mapping):
        return Widths(to=asked)
    raise BadOption(f"widths is {asked!r}; give graphprune.Widths(multiple_of=8, at_least=4, ratios={{...}}), or a mapping of names to widths")


def _aims(targets: Mapping[str, Any], on: Runtime) -> Aims:
    if not isinstance(on, Runtime):
        raise BadOption(f'on is {on!r}; give graphprune.Runtime("onnxruntime", threads=1)')
    return Aims(
        **{name: _amount(name, value) for name, value in targets.items()}, runtime=on.name, threads=on.threads, measure=on.measure, objective=on.objective
    )


def _amount(name: str, value: Any) -> Any:
    """The number behind a target; times stay text, since a plain number would be a share."""
    read = amount(name, value)
    if isinstance(read, Seconds):
        return f"{float(read):.12g} s"
    if name in NAMES and isinstance(read, int) and not isinstance(read, bool) and read == 1:
        raise BadTarget(
            f"{name}={value!r} would be one {'byte' if name in ('size', 'memory') else name[:-1]}; write {name}=1.0 for as much as the original has"
        )
    return read


def flag(name: str, value: Any) -> bool:
    """``value``, when it is True or False."""
    if not isinstance(value, bool):
        raise BadOption(f"{name} is {value!r}; it is True or False")
    return value
