"""What can be asked for by name: scores, granularities, targets and repairs, each with one line; :func:`available` lists them.

A file that offers something registers it where it is defined; nothing else is kept here.
"""

from __future__ import annotations

KINDS = ("score", "granularity", "target", "repair")
PLURALS = {"score": "scores", "granularity": "granularities", "target": "targets", "repair": "repairs"}
_LINES: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str, line: str) -> None:
    """Enter ``name`` under one of :data:`KINDS`; a name entered again replaces its line."""
    _LINES[kind][name] = line


def available() -> dict[str, dict[str, str]]:
    """The names of all scores, granularities, targets and repairs, with one line each (a copy).

    >>> register("score", "my_own", "what it measures")
    >>> available()["score"].pop("my_own")
    'what it measures'
    >>> _ = _LINES["score"].pop("my_own")
    """
    return {kind: dict(lines) for kind, lines in _LINES.items()}


def table(names: dict[str, dict[str, str]]) -> str:
    """What :func:`available` returns, as text.

    >>> print(table({"repair": {"bn": "batch-norm statistics"}}))
    repairs
      bn  batch-norm statistics
    """
    blocks = []
    for kind, lines in names.items():
        wide = max(map(len, lines), default=0)
        blocks.append("\n".join([PLURALS[kind], *(f"  {name:{wide}}  {line}" for name, line in lines.items())]))
    return "\n\n".join(blocks)
