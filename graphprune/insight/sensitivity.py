# pyright: strict, reportPrivateUsage=false
"""Which layers hurt: :func:`sensitivity` cuts one group at a time and evaluates.

>>> import torch
>>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
>>> found = sensitivity(net, torch.zeros(1, 4), lambda model: sum(p.numel() for p in model.parameters()), ratios=(0.5,), progress=False)
>>> print(found)
original: 108
group     of  50%
0.weight   8  64 (4)
2.weight   6  75 (3)
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ..coupling.groups import Group, Groups
from ..errors import BadOption, NothingToPrune, UnknownName
from ..scores.data import bar
from ..select import check_ratio
from ..tables import Table
from ..wording import several
from .axes import axes_for, drawn
from .study import Evaluate, Study

MODES = ("exact", "cheap")


@dataclass(frozen=True)
class Effect:
    """One group at one ratio: the units that stay, what ``evaluate`` gives, the share of the group's score that goes, and the parameters and MACs left.

    ``evaluated``: whether the cut model was evaluated (mode "exact"), or the value lies between evaluated ones in proportion to the score that goes.
    """

    group: str
    where: str
    units: int
    ratio: float
    left: int
    value: float
    lost: float
    params: int
    macs: int
    evaluated: bool


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found; ``original`` is ``evaluate`` of the model as it is."""

    original: float
    effects: tuple[Effect, ...]

    def table(self) -> Table:
        """One row for every group and ratio."""
        columns = ("group", "where", "units", "ratio", "left", "value", "change", "lost", "params", "macs", "evaluated")
        rows = [(e.group, e.where, e.units, e.ratio, e.left, e.value, e.value - self.original, e.lost, e.params, e.macs, e.evaluated) for e in self.effects]
        return Table(columns, tuple(rows))

    def grid(self) -> Table:
        """One row for every group, one column for every ratio: the value, and in brackets the units that stay."""
        ratios = sorted({effect.ratio for effect in self.effects})
        rows: dict[str, dict[float, Effect]] = {}
        for effect in self.effects:
            rows.setdefault(effect.group, {})[effect.ratio] = effect
        cells = [(group, next(iter(row.values())).units, *(_cell(row.get(ratio)) for ratio in ratios)) for group, row in rows.items()]
        return Table(("group", "of", *(f"{ratio:.0%}" for ratio in ratios)), tuple(cells))

    def ranked(self) -> list[str]:
        """The groups, the most sensitive first: by the change at the largest ratio."""
        last = {effect.group: effect for effect in sorted(self.effects, key=lambda effect: effect.ratio)}
        return sorted(last, key=lambda group: last[group].value)

    def to_csv(self, file: Any = None) -> str:
        return self.table().to_csv(file)

    def plot(self, target: Any = None) -> Any:
        """One line for each group, the twelve most sensitive named; ``target`` is a file, matplotlib axes, or nothing. Returns the axes."""
        axes = axes_for(target, 8.0, 4.5)
        named = self.ranked()[:12]
        for group in self.ranked()[::-1]:
            points = [(effect.ratio, effect.value) for effect in self.effects if effect.group == group]
            style = {"label": group, "marker": "o", "markersize": 3} if group in named else {"color": "0.8", "linewidth": 0.8}
            axes.plot([0.0, *(x for x, _ in points)], [self.original, *(y for _, y in points)], **style)
        axes.set_xlabel("share of the group's units removed")
        axes.set_ylabel("evaluate")
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return drawn(axes, target)

    def __str__(self) -> str:
        return f"original: {self.original:.6g}\n{self.grid()}"

    def __repr__(self) -> str:
        return f"<Sensitivity: {len({e.group for e in self.effects})} groups, {len(self.effects)} cuts, original {self.original:.6g}>"

    def _repr_html_(self) -> str:
        return self.grid()._repr_html_()


def _cell(effect: Effect | None) -> str | None:
    return None if effect is None else f"{effect.value:.6g} ({effect.left}){'' if effect.evaluated else '~'}"


def sensitivity(
    model: nn.Module,
    example_input: Any,
    evaluate: Evaluate,
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    groups: Sequence[str] | str | None = None,
    mode: str = "exact",
    score: Any = "l2",
    keep: Any = (),
    example_kwargs: dict[str, Any] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Cut one group at a time, at every ratio, and evaluate; the model is traced once, scored once, and left as it is.

    - ``evaluate(model)`` returns one number, larger is better; it gets cut models in the mode of the original.
    - ``ratios``: shares of a group's units to remove, 0 < ratio < 1.
    - ``groups``: names or patterns of the groups (``print(graphprune.couple(graph))`` lists them) or of modules that hold one; all of them by default.
    - ``mode``: ``"exact"`` evaluates every cut; ``"cheap"`` evaluates every group once, at its largest ratio, and puts the others between that and the
      original, in proportion to the share of the score that goes (marked ``~``): a third of the evaluations with three ratios.
    - ``score`` says which units of a group go, ``keep`` what stays whole, both as in :func:`graphprune.shrink`.

    Groups that the model's code ties to each other are cut together, as they would be. Raises :class:`~graphprune.errors.UnknownName`,
    :class:`~graphprune.errors.BadRatio`, :class:`~graphprune.errors.BadOption`, and :class:`~graphprune.errors.BadScore` where ``evaluate`` fails.
    """
    if mode not in MODES:
        raise BadOption(f"mode is {mode!r}; it is 'exact' or 'cheap'")
    steps = sorted({check_ratio(ratio, "a ratio of sensitivity") for ratio in ratios} - {0.0})
    if not steps:
        raise BadOption("ratios is empty; give shares of units to remove, such as (0.25, 0.5, 0.75)")
    study = Study(model, example_input, score, example_kwargs, keep=keep)
    chosen = _chosen(study.groups, groups)
    original = study.value(evaluate, model, "the original")
    scores = study.scores()
    cells = [(group, ratio) for group in chosen for ratio in steps]
    effects: list[Effect] = []
    for group, ratio in bar(cells, "sensitivity", progress):
        try:
            plan = study.plan(0.0, ratios=partial(_alone, group.name, ratio))
        except NothingToPrune:  # the code ties this group to sizes that cannot follow
            continue
        if plan.outline is None or plan.outline.after == plan.outline.before:
            continue
        width = next((w for w in plan.outline.widths if w.name == group.name), None)
        units = width.after if width else group.size
        order, total = scores[group.index].sort().values.clamp(min=0), float(scores[group.index].clamp(min=0).sum())
        lost = float(order[: group.size - units].sum()) / total if total else (group.size - units) / group.size
        evaluated = mode == "exact" or ratio == steps[-1]
        value = study.value(evaluate, study.cut(plan), f"the model without {ratio:.0%} of {group.name}") if evaluated else original
        where = width.where if width else group.name
        effects.append(Effect(group.name, where, group.size, ratio, units, value, lost, *plan.outline.after, evaluated))
    return Sensitivity(original, tuple(_between(effects, original)))


def _alone(name: str, ratio: float, groups: Groups) -> dict[int, float]:
    return {group.index: ratio for group in groups if group.name == name}


def _between(effects: Sequence[Effect], original: float) -> list[Effect]:
    """Values that were not evaluated, in proportion to the score that goes."""
    last = {effect.group: effect for effect in effects if effect.evaluated}
    placed: list[Effect] = []
    for effect in effects:
        end = last.get(effect.group)
        if not effect.evaluated and end is not None:
            part = effect.lost / end.lost if end.lost else (effect.units - effect.left) / max(1, end.units - end.left)
            effect = replace(effect, value=original + (end.value - original) * part)
        placed.append(effect)
    return placed


def _chosen(groups: Groups, wanted: Sequence[str] | str | None) -> list[Group]:
    if wanted is None:
        return list(groups)
    chosen: dict[int, Group] = {}
    names = {group.index: {name for name, _ in group.places} | {name.rpartition(".")[0] for name, axis in group.places if axis == 0} for group in groups}
    for item in [wanted] if isinstance(wanted, str) else wanted:
        fits: Callable[[str], bool] = lambda name, item=item: name == item or fnmatch.fnmatchcase(name, item)  # noqa: E731
        exact = [group for group in groups if fits(group.name) or fits(group.name.rpartition(".")[0])]
        hits = exact or [group for group in groups if any(map(fits, names[group.index]))]
        if not hits:
            near = difflib.get_close_matches(item, [group.name for group in groups], 3)
            raise UnknownName(f"{item!r} is no group; {f'the nearest are {several(near)}' if near else 'print(graphprune.couple(graph)) lists them'}")
        chosen |= {group.index: group for group in hits}
    return [chosen[index] for index in sorted(chosen)]
