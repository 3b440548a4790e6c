"""Long things said briefly: lists of module paths, arrays, nests of arguments.

>>> folded(["layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1"])
'layer1.{0-2}.conv1'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NUMBER = re.compile(r"\d+")


def pattern(path: str) -> str:
    """A path with its numbers left out, which repeated blocks share.

    >>> pattern("blocks.11.mlp.fc1")
    'blocks.#.mlp.fc#'
    """
    return NUMBER.sub("#", path)


def folded(paths: Iterable[str], most: int = 3) -> str:
    """Paths that differ in their numbers alone as one; at most ``most`` of what remains, and how many more there are.

    >>> folded(["stem", "blocks.0.fc", "blocks.1.fc", "blocks.3.fc", "head"])
    'stem, blocks.{0,1,3}.fc, head'
    >>> folded(["a.0.x.0", "a.0.x.1", "a.1.x.0", "a.1.x.1"]), folded(["a.0.x.0", "a.1.x.1", "a.2.x.1"])
    ('a.{0,1}.x.{0,1}', 'a.*.x.* (3)')
    >>> folded("abcde")
    'a, b, c and 2 more'
    """
    kinds: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        kinds.setdefault(pattern(path), []).append(path)
    return several([_one(same) for same in kinds.values()], most)


def _one(same: Sequence[str]) -> str:
    if len(same) == 1:
        return same[0]
    columns = [sorted(set(column)) for column in zip(*([int(n) for n in NUMBER.findall(path)] for path in same), strict=True)]
    varying = [len(column) for column in columns if len(column) > 1]
    boxed = int(np.prod(varying)) == len(same)
    fields = iter(_range(column) if boxed or len(column) == 1 else "*" for column in columns)
    text = NUMBER.sub(lambda _: next(fields), same[0])
    return text if boxed else f"{text} ({len(same)})"


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
    return f"{{{numbers[0]}-{numbers[-1]}}}" if runs else "{" + ",".join(map(str, numbers)) + "}"


def several(items: Sequence[str], most: int = 3) -> str:
    """The first few of a list, and how many more there are.

    >>> several(["a", "b"]), several(["a", "b", "c", "d"], 2)
    ('a, b', 'a, b and 2 more')
    """
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def nearest(name: Any, known: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """The known names that a wrong one may stand for, the best first: near in spelling, in other letters' case, or a part of each other.

    >>> nearest("L1", ["l2", "l1"]), nearest("onnx", ["eager", "onnxruntime"]), nearest("layer1", ["head"])
    (['l1'], ['onnxruntime'], [])
    """
    text, names = str(name), list(dict.fromkeys(known))
    lower: dict[str, str] = {each.lower(): each for each in reversed(names)}
    if text.lower() in lower:
        return [lower[text.lower()]]
    parts = [each for key, each in lower.items() if len(text) > 2 and len(key) > 2 and (key.startswith(text.lower()) or text.lower().startswith(key))]
    close = [lower[key] for key in difflib.get_close_matches(text.lower(), lower, most, cutoff)]
    return list(dict.fromkeys(close + parts))[:most]


def brief(value: Any, most: int = 6) -> str:
    """Any value as text of about a line: arrays and long sequences with their middle left out.

    >>> brief(np.arange(100)), brief([1, 2]), len(brief("x" * 200))
    ('[0 1 2 … 98 99]', '[1, 2]', 60)
    """
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or len(value) <= most:
            return f"array{value.shape}" if value.size > most else str(value)
        return f"[{' '.join(map(str, value[:3]))} … {' '.join(map(str, value[-2:]))}]"
    if isinstance(value, list | tuple):
        inner = [brief(item, most) for item in value[:most]] + (["…"] if len(value) > most else [])
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
        return opening + ", ".join(inner) + closing
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def counted(number: int, one: str, many: str = "") -> str:
    """
    >>> counted(1, "axis", "axes"), counted(3, "group")
    ('1 axis', '3 groups')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
