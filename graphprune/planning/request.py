"""All that is asked of :func:`graphprune.shrink`, in the user's words and checked, as one value: :class:`Request`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from ..budget.targets import Aims
from ..cost import NAMES, cost
from ..coupling.groups import Groups, couple
from ..errors import BadAmount, BadOption, BadRatio, BadTarget, UnknownName
from ..granularity.spec import Spec, parse
from ..names import kept
from ..options import FREED, Runtime, Vocabulary, Widths, token_ids, whole
from ..quantities import Seconds, amount
from ..scores import OnData
from ..select import check_ratio
from ..tracing.graph import Graph
from .proof import Fault

DEPTH = ("block", "layer")  # whole modules
SCOPES = ("layer", "global", "isomorphic", "allocated")
REASONS = {
    "size": "masked entries are stored as zeros: ask for params= or macs=",
    "memory": "it leaves every activation as large as it is: cut channels",
}


@dataclass(frozen=True)
class Wanted:
    """One kind of unit that may go, as :func:`~graphprune.shrink` was asked, and how much of it.

    ``amount``: a share of units to remove (a float), how many stay (a whole number), which blocks or layers go (a tuple of numbers or names), or None
    where the ratio or the budget of all decides. Of a vocabulary: which tokens stay; ``batches`` say which are used, ``special`` which stay in any case.
    """

    spec: Spec
    name: str
    amount: Any = None
    batches: Iterable[Any] | None = None
    special: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """What one plan is made for: ``wanted`` by the rules of ``widths``, within ``aims``; ``keep`` names tensors, or one axis as (name, axis).

    ``score`` may be a mapping of kinds to scores; :meth:`stage` takes the one of its kinds. ``alone``: no other kinds share the ratio or the budget.
    ``multiple_of`` is that of the widths once the graph is known (it may be a function of the groups), and ``extra_costs`` maps the name of a further cost
    to (its limit, how to make it; see :func:`~graphprune.cost.costs`). ``tied``: axes, as (name, axis), whose groups keep the same share.
    """

    wanted: tuple[Wanted, ...]
    aims: Aims
    ratio: float
    scope: str
    score: Any
    keep: Sequence[str | tuple[str, int]]
    widths: Widths
    inplace: bool = False
    scope_given: bool = False
    alone: bool = True
    batches: Iterable[Any] | None = None
    loss: Callable[..., Any] | None = None
    calibration: Iterable[Any] | None = None  # the inputs of a repair
    multiple_of: Any = None
    extra_costs: Mapping[str, tuple[float, Callable[..., Any]]] = field(default_factory=dict)
    tied: Sequence[frozenset[tuple[str, int]]] = ()
    proof: str = ""  # "calls": every plan is rehearsed without values; "values": compared with the zeroed original, result by result
    faults: list[tuple[Graph, Fault]] = field(default_factory=list)  # what proved wrong so far
    listed: bool = False  # the experts that are modules of lists are meant, which go by a plan of their own
    notes: tuple[str, ...] = ()  # how this request came about, for the plan

    @property
    def spec(self) -> Spec:
        """The granularity of the first kind that is wanted; a stage has no others."""
        return self.wanted[0].spec

    @property
    def text(self) -> str:
        """The kinds that are wanted, as the user wrote them."""
        return " and ".join(each.name for each in self.wanted)

    @property
    def free(self) -> tuple[str, ...]:
        """The kinds of reasons that do not hold, as :func:`~graphprune.coupling.groups.couple` knows them."""
        return tuple(FREED[name] for name in self.widths.also)

    @property
    def uniform(self) -> bool | None:
        """Whether groups of one kind have the same width in all layers; None where that is only better, since a configuration says such widths."""
        if self.widths.uniform is not None or not any(each.spec.coarse for each in self.wanted):
            return self.widths.uniform
        differing = (self.scope_given and self.scope != "layer") or self.aims.timed or bool(self.aims.weight)
        return False if differing or self.widths.ratios is not None or self.widths.to else None

    @property
    def plain(self) -> bool:
        """Whether one ratio decides, group by group."""
        return self.scope == "layer" and not self.extra_costs and not self.aims.any and isinstance(self.multiple_of, int)

    @property
    def stages(self) -> tuple[Request, ...]:
        """One request for each planner, in the order in which they work: whole modules first, then widths, then entries."""
        depth = [(each,) for each in self.wanted if each.spec.name in DEPTH]
        alone = [(each,) for each in self.wanted if each.spec.alone and not each.spec.coupled]
        words = [(each,) for each in self.wanted if each.spec.coupled]  # last of all that are cut, since the cut model takes other ids
        widths = tuple(each for each in self.wanted if each.spec.coarse and not each.spec.alone)
        entries = [(each,) for each in self.wanted if not each.spec.coarse and each.spec.name not in DEPTH]
        every = (*depth, *alone, *((widths,) if widths else ()), *words, *entries)
        return tuple(replace(self.stage(each), alone=len(every) == 1) for each in every)

    def stage(self, wanted: tuple[Wanted, ...]) -> Request:
        """The request for some of the kinds, with the score that goes with them."""
        score, batches, loss = self.score, self.batches, self.loss
        if isinstance(score, Mapping):
            chosen = [value for key, value in score.items() if any(parse(key) == each.spec for each in wanted)]
            if any(value is not chosen[0] and value != chosen[0] for value in chosen):
                raise BadOption(f"{' and '.join(each.name for each in wanted)} are chosen together, by one score; {len(chosen)} were given")
            score = chosen[0] if chosen else "l2"
        if isinstance(score, OnData):
            score, batches, loss = score.score, score.batches, score.loss
        amount, plain = wanted[0].amount, not wanted[0].spec.coarse
        ratio = amount if plain and isinstance(amount, float) else self.ratio
        return replace(self, wanted=wanted, ratio=ratio, score=score, batches=batches, loss=loss)

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
    on: Runtime | str | None = None,
    score: Any = "l2",
    scope: str | None = None,
    what: Any = "channel",
    keep: Any = (),
    widths: Widths | Mapping[Any, int] | None = None,
    inplace: bool = False,
) -> Request:
    """The request for what a user wrote; raises the errors of :mod:`graphprune.errors` for what makes no sense, before anything costs time.

    >>> ask(nn.Linear(2, 2), "50%").ratio
    0.5
    >>> ask(nn.Linear(2, 2), what={"mlp": 64, "layers": [21, 22]}).wanted[1].amount
    (21, 22)
    """
    on = Runtime(on) if isinstance(on, str) else on
    aims = _aims(targets or {}, on or Runtime())
    widths = _widths(widths)
    given = ratio
    ratio = amount("ratio", ratio)
    if ratio is None:
        ratio = 0.0 if aims.any or widths.to else 0.5
    wanted = _wanted(what)
    _fits(wanted, widths, aims)
    if given is not None and all(each.amount is not None for each in wanted):
        raise BadOption(f"ratio={given!r} would have no effect: what={what!r} says how much goes of every kind; leave one of them out")
    if scope is not None and (not isinstance(scope, str) or scope not in SCOPES):
        raise BadRatio(f"scope is {scope!r}; it is 'layer', 'global' or 'isomorphic', and with a budget also 'allocated'")
    if on is not None and not (aims.timed or aims.weight or widths.multiple_of == "auto"):
        raise BadOption(f'on={on!r} would have no effect: it says where a time counts; ask for one (speedup=2, latency="8 ms") or for objective="time"')
    score, batches, loss = (score.score, score.batches, score.loss) if isinstance(score, OnData) else (score, None, None)
    facts = {"inplace": inplace, "scope_given": scope is not None, "batches": batches, "loss": loss}
    return Request(wanted, aims, check_ratio(ratio), aims.scope if scope is None else scope, score, kept(model, keep), widths, **facts)


def _wanted(what: Any) -> tuple[Wanted, ...]:
    """The kinds that ``what`` names: one, several, or a mapping to how much of each."""
    names = (what,) if isinstance(what, str) else tuple(what) if isinstance(what, Iterable) else ()
    if not all(isinstance(name, str) for name in names) or not (names or isinstance(what, Iterable)):
        raise UnknownName(f'what is {what!r}; it names what goes, such as "channel", ("mlp", "layers"), or {{"mlp": 0.3, "layers": 24}}')
    if isinstance(what, Mapping) and names:
        kinds = [_one(name, value) for name, value in what.items()]
    else:
        kinds = [Wanted(parse(name), name) for name in names]
    if not kinds:
        raise BadOption(f'what is {what!r}; it names what goes, such as "channel", ("mlp", "layers"), or {{"mlp": 0.3, "layers": 24}}')
    twice = [each.name for index, each in enumerate(kinds) if any(each.spec == other.spec for other in kinds[:index])]
    if twice:
        raise BadOption(f"what names {twice[0]!r} twice")
    return tuple(kinds)


def _one(name: str, value: Any) -> Wanted:
    """One kind with its amount."""
    if isinstance(value, Vocabulary):
        if not parse(name).coupled:
            raise BadOption(f"what={{{name!r}: {value!r}}}: a Vocabulary says which tokens stay; it goes with 'vocabulary'")
        return Wanted(parse(name), name, _checked(name, value.amount), value.batches, tuple(value.special))
    return Wanted(parse(name), name, _checked(name, value))


def _checked(name: str, value: Any) -> Any:
    """An amount of one kind: None, a share, a number, or a choice."""
    spec = parse(name)
    if spec.coupled and (chosen := token_ids(value)) is not None:
        return chosen
    try:
        value = amount("ratio", value)
    except BadAmount as error:
        number = "; a whole number of units that stay is written without quotes" if isinstance(value, str) and value.strip().isdecimal() else ""
        raise BadAmount(f"what={{{name!r}: {value!r}}}: a share of units to remove is written {name!r}: 0.3 or {name!r}: '30%'{number}") from error
    if isinstance(value, Sequence) and spec.name in DEPTH and value and all(whole(each) or isinstance(each, str) for each in value):
        return tuple(value)
    if value is None or (isinstance(value, int) and whole(value) and value > 0 and (spec.coarse or spec.name in DEPTH)):
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return value
    choice = ", or a list of the ones that go ([21, 22])" if spec.name in DEPTH else ", or a list of the ids that stay" if spec.coupled else ""
    raise BadRatio(f"what={{{name!r}: {value!r}}}: give a share of units to remove (0 <= share < 1), a whole number of units that stay{choice}")


def _fits(wanted: Sequence[Wanted], widths: Widths, aims: Aims) -> None:
    """Rules for widths, and times, need widths to work on."""
    if any(each.spec.coarse for each in wanted):
        return
    spec = wanted[0].spec
    if widths.multiple_of not in (None, 1) or widths.at_least != 1 or widths.to or widths.uniform:
        raise BadRatio("multiple_of=, at_least= (min_units=), to= and uniform= are about widths; they go with channels, heads and the like")
    if aims.timed or aims.weight:
        text = f"with granularity 'channel' or 'head'; {spec.text!r} takes a ratio, params= or macs="
        raise BadTarget(f"latency=, speedup= and objective= are met by widths, {text}")


def _widths(asked: Any) -> Widths:
    if asked is None or isinstance(asked, Widths):
        return asked or Widths()
    if isinstance(asked, Mapping):
        rules = {key: value for key, value in asked.items() if key in {each.name for each in fields(Widths)}}
        if rules:
            given = ", ".join(f"{key}={value!r}" for key, value in rules.items())
            raise BadOption(f"widths={asked!r} maps names of modules to widths; rules for all are widths=graphprune.Widths({given})")
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
