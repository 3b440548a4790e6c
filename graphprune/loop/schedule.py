"""How a target is approached in rounds: :func:`share` of the way, and what that asks of one cut.

Rounds are counted on the *original*: a group of 64 at a final ratio of 0.5 has 32 units left however many rounds it
took, because each cut is asked for the number that should be left then, not for a share of what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..coupling.groups import Group, Groups
from ..cutting.plan import Plan
from ..errors import BadRatio
from ..select import width

# The part of the final cut that is done after the part x of the rounds, at a final share s of what is removed.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, s: s * x,
    "exponential": lambda x, s: 1 - (1 - s) ** x,  # the same factor in every round
    "cubic": lambda x, s: s * (1 - (1 - x) ** 3),  # Zhu & Gupta 2017: fast while there is plenty
}


def share(final: float, number: int, steps: int, schedule: str = "linear") -> float:
    """The share removed after round ``number`` of ``steps``, of the original; ``final`` after the last.

    >>> [round(share(0.75, n, 2, kind), 4) for kind in SCHEDULES for n in (1, 2)]
    [0.375, 0.75, 0.5, 0.75, 0.6562, 0.75]
    """
    if schedule not in SCHEDULES:
        raise BadRatio(f"schedule is {schedule!r}; it is one of {', '.join(SCHEDULES)}")
    return final if number >= steps else SCHEDULES[schedule](number / steps, final)


def size_before(group: Group, plan: Plan) -> int | None:
    """How many units a group had before ``plan``; None where it shares all its axes with other groups."""
    for (name, axis), units in group.places.items():
        if (units >= 0).all():
            was = plan.shapes[name][axis] if axis in plan.cuts.get(name, {}) else len(units)
            return round(group.size * was / len(units))
    return None


def toward(plan: Plan, shares: Callable[[Groups], Mapping[int, tuple[float, float]]]) -> Callable[[Groups], dict[int, float]]:
    """Ratios for the next cut of a model already cut by ``plan``.

    ``shares`` gives for each group the share of its original size that should be gone now, and that of the round before.
    """

    def ratios(groups: Groups) -> dict[int, float]:
        widths = {}
        for index, (now, last) in shares(groups).items():
            group = groups.groups[index]
            before = size_before(group, plan)
            units = width(before, now) if before else width(group.size, 1 - (1 - now) / (1 - last))
            widths[index] = max(0.0, 1 - units / group.size)
        return widths

    return ratios


def check_steps(steps: Any) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise BadRatio(f"steps is {steps!r}; it is the number of rounds, a whole number of at least 1")
    return steps
