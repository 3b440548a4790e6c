# pyright: strict, reportUnnecessaryIsInstance=false
"""What can be asked for by name: scores, units, targets, repairs and runtimes, each a record with one line and the function that does it.

A file that offers something enters it where it is defined; :func:`register` does the same from outside, and :func:`available` lists all of them.
Who reads the catalogue first, loads these files (:func:`_loaded`): nothing is loaded with the package itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from .errors import BadOption, UnknownName
from .wording import nearest

KINDS = ("score", "granularity", "target", "repair", "runtime")
PLURALS = {"score": "scores", "granularity": "granularities", "target": "targets", "repair": "repairs", "runtime": "runtimes"}


@dataclass(frozen=True)
class Entry:
    """One thing that can be asked for: its kind and name, one line, the function behind it (None where the name is all there is), and further facts."""

    kind: str
    name: str
    line: str
    function: Callable[..., Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


_ENTRIES: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
_MAKERS: dict[str, Callable[..., Any]] = {}


_LOADING: list[bool] = []


def _loaded() -> None:
    """Load the files that offer something, once. They may read the catalogue while they are loaded; it is then as far as it is."""
    if not _LOADING:
        _LOADING.append(True)
        import_module(f"{__package__}.shrink")


def enter(kind: str, name: str, line: str, function: Callable[..., Any] | None = None, **facts: Any) -> Entry:
    """Enter ``name`` under one of :data:`KINDS`; a name entered again replaces what was there."""
    _ENTRIES[kind][name] = Entry(kind, name, line, function, facts)
    return _ENTRIES[kind][name]


def open_to_others(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for the function that makes an entry of this kind from what :func:`register` is given: ``(name, line, function, **facts)``."""

    def keep(maker: Callable[..., Any]) -> Callable[..., Any]:
        _MAKERS[kind] = maker
        return maker

    return keep


def register(kind: str, name: str, line: str, function: Callable[..., Any] | None = None, **facts: Any) -> Any:
    """Offer something of your own under a name: ``kind`` is "score", "granularity", "repair" or "runtime", ``line`` says what it does.

    Used as a decorator, or with the ``function`` itself. What the function is given, and which ``facts`` a kind takes, is in the page of each:
    ``docs/own-score.md``, ``own-granularity.md``, ``own-repair.md``, ``own-runtime.md``. A name that is there already is replaced.
    Raises :class:`~graphprune.errors.UnknownName` for an unknown kind and :class:`~graphprune.errors.BadOption` for anything that does not fit it.

    >>> @register("runtime", "mine", "a plain call of the model")
    ... def mine(model, args, kwargs, threads):
    ...     return lambda: model(*args, **kwargs)
    >>> available()["runtime"]["mine"]
    'a plain call of the model'
    >>> forget("runtime", "mine")
    """
    _loaded()
    if kind not in _MAKERS:
        raise UnknownName(f"no kind {kind!r} to register; there are {', '.join(sorted(_MAKERS))}")
    if not isinstance(name, str) or not name or ":" in name or not isinstance(line, str) or not line or "\n" in line:
        raise BadOption(f"{kind} {name!r}: give a name without a colon, and one line that says what it does")
    if function is None:

        def decorated(function: Callable[..., Any]) -> Any:
            return register(kind, name, line, function, **facts)

        return decorated
    if not callable(function):
        raise BadOption(f"{kind} {name!r}: {function!r} cannot be called")
    try:
        _MAKERS[kind](name, line, function, **facts)
    except TypeError as error:
        raise BadOption(f"{kind} {name!r}: {error}") from error
    return function


def forget(kind: str, name: str) -> None:
    """Take an entry back, if there is one."""
    _ENTRIES[kind].pop(name, None)


def names(kind: str) -> list[str]:
    """The names of one kind, in the order in which they were entered."""
    _loaded()
    return list(_ENTRIES[kind])


def entry(kind: str, name: str) -> Entry:
    """The record of that name; raises :class:`~graphprune.errors.UnknownName` with the nearest ones.

    >>> _ = enter("repair", "polish", "nothing at all")
    >>> entry("repair", "polish").line
    'nothing at all'
    >>> forget("repair", "polish")
    """
    _loaded()
    found = _ENTRIES[kind].get(name)
    if found is None:
        near = nearest(name, _ENTRIES[kind], 1)
        raise UnknownName(f"no {kind} {name!r}; {f'the nearest is {near[0]!r}; ' if near else ''}there are {', '.join(_ENTRIES[kind])}")
    return found


def available() -> dict[str, dict[str, str]]:
    """The names of all scores, granularities, targets, repairs and runtimes, with one line each (a copy).

    >>> available()["target"]["speedup"]
    'how many times faster, measured'
    """
    _loaded()
    return {kind: {name: found.line for name, found in entries.items()} for kind, entries in _ENTRIES.items()}


def table(names: dict[str, dict[str, str]]) -> str:
    """What :func:`available` returns, as text.

    >>> print(table({"repair": {"bn": "batch-norm statistics"}}))
    repairs
      bn  batch-norm statistics
    """
    blocks: list[str] = []
    for kind, lines in names.items():
        wide = max(map(len, lines), default=0)
        blocks.append("\n".join([PLURALS[kind], *(f"  {name:{wide}}  {line}" for name, line in lines.items())]))
    return "\n\n".join(blocks)
