"""Amounts as text: ``"5 MB"``, ``"8 ms"``, ``"2x"``, ``"30%"``, ``"1.5 GMACs"``, for Python and for the command line alike.

:func:`amount` reads one for the target it is given for, and returns what that target takes as a number, so that text is only
another spelling: a share stays a float up to 1, a count is a whole number, a time is seconds.

>>> amount("size", "5 MB"), amount("macs", "30%"), amount("speedup", "2x"), amount("ratio", "50 %")
(5000000, 0.3, 2.0, 0.5)
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from .errors import BadAmount

POWERS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}  # both letters that stand for micro


class Kind(NamedTuple):
    """How an amount is written: the words that may follow a number, what they multiply it with, and examples for errors."""

    words: dict[str, float]
    share: bool
    whole: bool
    examples: str


def _counted(*words: str, times: float = 1) -> dict[str, float]:
    return {prefix + word: power * times for prefix, power in POWERS.items() for word in words}


_PARAMS = Kind({**_counted("", "params", "parameters")}, True, True, '"2M", "300k", "30%"')
_MACS = Kind({**_counted("", "MACs", "MAC"), **_counted("FLOPs", "FLOP", times=0.5)}, True, True, '"500M", "1.5 GMACs", "3 GFLOPs", "30%"')
_BYTES = Kind(
    {"": 1, "bytes": 1, "byte": 1, **{f"{prefix}B": power for prefix, power in {**POWERS, **BINARY}.items() if prefix != "B"}},
    True,
    True,
    '"5 MB", "5 MiB", "800 kB", "30%"',
)
_TIME = Kind(dict(SECONDS), True, False, '"12 ms", "0.5 s", "800 us", "30%"')
_TIMES = Kind({"": 1, "x": 1}, False, False, '"2x", "1.5x"')
_SHARE = Kind({}, True, False, '"30%", "0.3"')
KINDS = {"params": _PARAMS, "macs": _MACS, "size": _BYTES, "memory": _BYTES, "latency": _TIME, "speedup": _TIMES, "ratio": _SHARE}


def amount(name: str, value: Any) -> Any:
    """The number that the text ``value`` stands for as ``name`` (one of :data:`KINDS`); what is no text is returned as it is.

    ``"30%"`` and ``"0.3"`` are shares (a float up to 1), ``"5 MB"`` is 5,000,000 and ``"5 MiB"`` 5 x 2**20 bytes, ``"8 ms"`` 0.008 seconds, and two FLOPs
    are one MAC. A latency in seconds is returned as :class:`Seconds`, since a plain float up to 1 is a share of the original's time.
    A comma parts thousands ("1,500,000") and nothing else. Raises :class:`~graphprune.errors.BadAmount` for text that says no amount of this kind.

    >>> amount("params", "1.5M"), amount("macs", "3 GFLOPs"), amount("memory", "2 MiB"), amount("latency", "8 ms")
    (1500000, 1500000000, 2097152, Seconds(0.008))
    >>> amount("params", 0.25), amount("macs", "1"), amount("macs", "1.0")
    (0.25, 1, 1.0)
    """
    if not isinstance(value, str):
        return value
    kind = KINDS[name]
    match = re.fullmatch(r"\s*([0-9]+(?:_[0-9]+)*\.?[0-9]*|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?\s*([A-Za-zµμ%]*)\s*", value)
    if not match:
        raise _unreadable(name, value, kind)
    digits, word = match[1].replace("_", "").replace(",", "") + (match[2] or ""), match[3]
    number = float(digits)
    if word == "%":
        if not kind.share:
            raise _unreadable(name, value, kind)
        return _share(name, value, number / 100)
    none = name == "ratio" and not number  # what widths of single modules are asked beside
    if not word and kind.share and (none or not digits.isdigit()) and number <= 1:
        return _share(name, value, number)
    words = {known.lower(): factor for known, factor in kind.words.items() if known[:1] != "m"} | kind.words
    factor = kind.words.get(word, words.get(word.lower()))
    if factor is None or not number > 0 or not math.isfinite(number * factor):
        raise _unreadable(name, value, kind)
    if kind is _TIME:
        return Seconds(number * factor)
    return round(number * factor) if kind.whole else number * factor


class Seconds(float):
    """A time, where a plain float would be a share.

    >>> Seconds(0.008) * 2
    0.016
    """

    def __repr__(self) -> str:
        return f"Seconds({float(self)!r})"


def _share(name: str, text: str, share: float) -> float:
    if not 0 <= share <= 1 or (share == 0 and name != "ratio"):
        raise BadAmount(f"{name} is {text!r}; a share lies above 0 and is at most 100%")
    return share


def _unreadable(name: str, text: str, kind: Kind) -> BadAmount:
    means = {"ratio": "it is the share of units to remove", "speedup": "it is how many times faster the model shall be"}
    what = means.get(name, "it is the share of the original that may stay, or an amount")
    return BadAmount(f"{name} is {text!r}; {what}: write it as {kind.examples}")


def count(number: float, unit: str = "") -> str:
    """A number for people: three digits and a power of ten.

    >>> count(25_557_032), count(4_089_184_256, "MACs"), count(999), count(0)
    ('25.6 M', '4.09 GMACs', '999', '0')
    """
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= power * 0.9995:
            scaled = number / power
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1) * 1.0005)))}f} {letter}{unit}"
    return f"{number:.0f} {unit}".strip()


def share(part: float, whole: float) -> str:
    """A part of a whole in per cent, with one digit below ten.

    >>> share(1, 4), share(1, 30), share(0, 0)
    ('25 %', '3.3 %', '')
    """
    if not whole:
        return ""
    found = 100 * part / whole
    return f"{found:.0f} %" if found >= 9.95 or found == 0 else f"{found:.1f} %"
