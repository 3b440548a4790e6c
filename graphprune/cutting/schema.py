"""What the text of a plan may say: :func:`read`, which takes time and memory in proportion to the text and believes nothing in it.

Names are text, axes are below the rank, positions increase strictly and are below the shape, parts have the data of their kind.
Whether the plan belongs to a model is asked where it is applied.

>>> read('{"version": 1, "cuts": {"w": {"0": [1, 1]}}, "shapes": {"w": [2]}, "edits": [], "notes": [], "lines": []}')
Traceback (most recent call last):
...
graphprune.errors.BadPlan: this is not a plan written by graphprune: w axis 0: positions increase and lie between 0 and 1
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Sequence
from typing import Any

from ..errors import BadPlan
from ..operations import operation as known
from .gains import MOST, Gain
from .outline import Outline
from .parts import Part
from .tokens import Tokens

VERSION = 1
CHECKSUM = "sha256"  # of everything else, where a plan is kept in a file
TEXT = 2**28  # bytes of a plan; that of a model with 70 billion parameters has 2**26
DEEP, AXES, LONG = 8, 64, 2**62  # keys of an edit, axes of a tensor; sizes and numbers


def read(text: str | bytes, most: int = TEXT) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a :class:`~graphprune.cutting.plan.Plan`, and what else the text holds.

    Raises :class:`~graphprune.errors.BadPlan` when the text is none, is damaged, is of another version, or is longer than ``most``.
    """
    if not isinstance(text, str | bytes):
        raise BadPlan(f"this is not a plan written by graphprune: text is expected, not a {type(text).__name__}")
    if len(text) > most:
        raise BadPlan(f"this is not a plan written by graphprune: its text has {len(text)} characters, a plan for this model at most {most}")
    try:
        data = json.loads(text, parse_constant=_refused)
        if not isinstance(data, dict) or "cuts" not in data:
            raise ValueError("it is JSON, but no plan")
        if type(data.get("version")) is not int or data["version"] != VERSION:
            known = f"this graphprune reads version {VERSION}"
            raise BadPlan(f"the plan is of version {_short(data.get('version'))}, {known}; save it with this version, or load it with that one")
        fields = _fields(data)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BadPlan(f"this is not a plan written by graphprune: {what}") from error
    digest = data.pop(CHECKSUM, None)
    if digest is not None and digest != checksum(data):
        raise BadPlan("the plan was changed or damaged after it was written: its checksum is another; save the model again")
    return fields, {key: value for key, value in data.items() if key not in (*fields, "version")}


def checksum(data: dict[str, Any]) -> str:
    """The digest of a plan's JSON, however it is spaced and sorted."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_positions(kept: Any, size: int, what: str) -> list[int]:
    """Positions along an axis of ``size`` entries; raises ValueError where they are none."""
    _integers(kept, what)
    if kept and not (kept[0] >= 0 and kept[-1] < size and all(map(operator.lt, kept, kept[1:]))):
        raise ValueError(f"{what}: positions increase and lie between 0 and {size - 1}")
    return kept


def _fields(data: dict[str, Any]) -> dict[str, Any]:
    shapes = {name: _shape(name, shape) for name, shape in _table(data["shapes"], "shapes").items()}
    cuts = {name: _cut(name, axes, shapes) for name, axes in _table(data["cuts"], "cuts").items()}
    numbers = {name: _numbers(name, new) for name, new in _table(data.get("numbers", {}), "numbers").items()}
    return {
        "cuts": cuts,
        "shapes": shapes,
        "edits": tuple(map(_edit, _list(data["edits"], "edits"))),
        "notes": tuple(_text(item, "notes") for item in _list(data["notes"], "notes")),
        "remarks": tuple(_text(item, "lines") for item in _list(data["lines"], "lines")),
        "rewrites": tuple(_text(item, "rewrites") for item in _list(data.get("rewrites", []), "rewrites")),
        "numbers": numbers,
        "parts": _parts(_list(data.get("parts", []), "parts"), shapes),
        "outline": Outline.from_dict(_table(data["outline"], "outline")) if "outline" in data else None,
        "gains": tuple(map(_gain, _list(data.get("gains", []), "gains"))),
        "tokens": Tokens.from_dict(_table(data["tokens"], "tokens")) if "tokens" in data else None,
    }


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    if len(_integers(shape, f"the shape of {name}", 0)) > AXES:
        raise ValueError(f"{name} has more than {AXES} axes")
    return tuple(shape)


def _cut(name: str, axes: Any, shapes: dict[str, tuple[int, ...]]) -> dict[int, list[int]]:
    if name not in shapes:
        raise ValueError(f"{name} is cut and has no shape")
    shape, cut = shapes[name], {}
    for axis, kept in _table(axes, f"the cuts of {name}").items():
        if axis not in map(str, range(len(shape))):
            raise ValueError(f"{name} has axes 0 to {len(shape) - 1}, and is cut along {_short(axis)}")
        cut[int(axis)] = check_positions(kept, shape[int(axis)], f"{name} axis {axis}")
    return cut


def _edit(edit: Any) -> tuple[Any, ...]:
    if not 3 <= len(_list(edit, "an edit")) <= DEEP + 3 or type(edit[0]) is not str or type(edit[1]) is not str:
        raise ValueError(f"the edit {_short(edit)} is not [module, attribute, …, new number]")
    if not all(type(key) is str and key[:1] != "_" or type(key) is int and 0 <= key < LONG for key in edit[1:-1]):
        raise ValueError(f"the edit {_short(edit)} changes what is not for a plan to change")
    _integers(edit[-1:], f"the edit {_short(edit)}", 0)
    return tuple(edit)


def _numbers(name: str, new: Any) -> list[int]:
    stay = [n for n in _integers(new, f"the numbers of {name}", -1) if n >= 0]
    if stay != list(range(len(stay))):
        raise ValueError(f"the numbers of {name} do not count the positions that stay")
    return new


def _gain(items: Any) -> Gain:
    if len(_list(items, "a gain")) != 5:
        raise ValueError(f"the gain {_short(items)} is not [tensor, power, calls, result, axes]")
    name, power, calls, result, axes = items
    if type(name) is not str or type(power) is not float or not 0.05 < abs(power) < 20 or type(result) is not int or not 0 <= result < AXES:
        raise ValueError(f"the gain of {_short(name)} is no factor")
    made: list[tuple[str, tuple[Any, ...]]] = []
    for operation, arguments in map(lambda call: _pair(call, "a call"), _list(calls, "calls")[: MOST + 1]):
        if (
            not known(f"aten::{_text(operation, 'an operation').partition('.')[0]}").planned
            or operation.count(".") != 1
            or not operation.rpartition(".")[2].isidentifier()
        ):
            raise ValueError(f"{_short(operation)} is not among the operations that make a weight")
        made.append((operation, tuple(_argument(item, len(made), AXES) for item in _list(arguments, "arguments"))))
    if not 0 < len(made) <= MOST:
        raise ValueError(f"the gain of {name} has {len(made)} calls, not 1 to {MOST}")
    places = []
    for axis, place in (_pair(item, "an axis") for item in _list(axes, "axes")):
        leaf, axis_inside = _pair(place, "an axis")
        if not type(axis) is type(axis_inside) is int or not 0 <= min(axis, axis_inside) <= max(axis, axis_inside) < AXES:
            raise ValueError(f"the gain of {name} follows {_short(place)}")
        places.append((axis, (_text(leaf, "a tensor"), axis_inside)))
    return Gain(name, power, tuple(made), result, tuple(places))


def _pair(items: Any, what: str) -> list[Any]:
    if len(_list(items, what)) != 2:
        raise ValueError(f"{what}: two entries are expected, not {_short(items)}")
    return items


def _argument(item: Any, before: int, deep: int) -> Any:
    """An argument of a call: a number, a list of numbers, a tensor by name or the result of a call before."""
    if item is None or type(item) in (bool, int, float):
        return item
    items = _list(item, "an argument")
    if items and items[0] == "leaf" and len(items) == 2:
        return ("leaf", _text(items[1], "a tensor"))
    if items and items[0] == "call" and len(items) == 3 and type(items[1]) is type(items[2]) is int and 0 <= items[1] < before and 0 <= items[2] < AXES:
        return tuple(items)
    if not deep or len(items) > AXES:
        raise ValueError(f"{_short(item)} is no argument")
    return tuple(_argument(inner, before, 0) for inner in items)


def _parts(parts: Sequence[Any], shapes: dict[str, tuple[int, ...]]) -> tuple[Part, ...]:
    checked: dict[tuple[str, str], Part] = {}
    for items in parts:
        if len(_list(items, "a part")) != 3:
            raise ValueError(f"the part {_short(items)} is not [kind, name, data]")
        kind, name = (_text(item, "a part") for item in items[:2])
        if kind not in PARTS:
            raise ValueError(f"a part of the kind {_short(kind)} is not known to this version")
        part = Part.from_json(items)
        PARTS[kind](part, shapes.get(name, ()))
        if (kind, name) in checked:
            raise ValueError(f"{name} has two parts of the kind {kind!r}")
        checked[kind, name] = part
    return tuple(checked.values())


def _mask(part: Part, shape: tuple[int, ...]) -> None:
    if not shape or part.data is not None and (type(part.data) is not bytes or len(part.data) != -(-math.prod(shape) // 8)):
        raise ValueError(f"the mask of {part.name} does not hold one bit for every entry of {shape}")


def _columns(part: Part, shape: tuple[int, ...]) -> None:
    if len(shape) != 4 or type(part.data) is not bytes or len(part.data) != -(-math.prod(shape[1:]) // 8):
        raise ValueError(f"the columns of {part.name} do not hold one bit for every (channel, tap) of {shape}")


def _kernel(part: Part, shape: tuple[int, ...]) -> None:
    if len(shape) < 3 or type(part.data) is not tuple or len(part.data) != len(shape) - 2:
        raise ValueError(f"the kernel of {part.name} is not a list of taps for each of its axes")
    for taps, size in zip(part.data, shape[2:], strict=True):
        if type(taps) is not tuple or not check_positions(list(taps), size, f"the kernel of {part.name}"):
            raise ValueError(f"the kernel of {part.name} keeps no taps")
        if len({b - a for a, b in zip(taps, taps[1:], strict=False)}) > 1:
            raise ValueError(f"the taps {_short(taps)} of {part.name} are not evenly spaced")


def _skip(part: Part, shape: tuple[int, ...]) -> None:
    data = part.data
    good = type(data) is tuple and len(data) == 3 and type(data[0]) in (int, str) and type(data[1]) is tuple and type(data[2]) in (bool, int)
    if not good or type(data[0]) is int and not 0 <= data[0] < 2**8:
        raise ValueError(f"the part that removes {part.name} does not say what it hands on")
    if data[1] and not _form(data[1]):
        raise ValueError(f"the part that removes {part.name} says the form {_short(data[1])}")


def _form(form: tuple[Any, ...]) -> bool:
    """Is it ("tuple" or "list", length, place), or with pairs (place, argument) of what is handed on?"""
    if len(form) not in (3, 4) or form[0] not in ("tuple", "list") or not type(form[1]) is type(form[2]) is int:
        return False
    pairs = form[3] if len(form) == 4 else ()
    if type(pairs) is not tuple or not all(type(pair) is tuple and len(pair) == 2 and type(pair[0]) is int and type(pair[1]) in (int, str) for pair in pairs):
        return False
    places = [form[2], *(place for place, _ in pairs)]
    return len(set(places)) == len(places) and all(0 <= place < form[1] <= 2**8 for place in places)


def _expert(part: Part, shape: tuple[int, ...]) -> None:
    if part.data is not None or not part.name.rpartition(".")[2].isdigit():
        raise ValueError(f"the part that removes {part.name} names no module of a list")


PARTS = {"mask": _mask, "columns": _columns, "kernel": _kernel, "skip": _skip, "expert": _expert}


def _integers(items: Any, what: str, least: int = -LONG) -> list[int]:
    if set(map(type, _list(items, what))) - {int} or items and not least <= min(items) <= max(items) < LONG:
        raise ValueError(f"{what}: these are not all whole numbers" + (f" from {least} on" if least > -LONG else ""))
    return items


def _list(items: Any, what: str) -> list[Any]:
    if type(items) is not list:
        raise ValueError(f"{what}: a list is expected, not {_short(items)}")
    return items


def _table(items: Any, what: str) -> dict[str, Any]:
    if type(items) is not dict:
        raise ValueError(f"{what}: names and values are expected, not {_short(items)}")
    return items


def _text(item: Any, what: str) -> str:
    if type(item) is not str:
        raise ValueError(f"{what}: text is expected, not {_short(item)}")
    return item


def _short(value: Any) -> str:
    """A value for a message, however large or deep."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a number of more digits than Python writes
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of a plan")
