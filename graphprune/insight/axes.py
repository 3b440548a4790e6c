"""Matplotlib axes to draw on: given ones, or new ones; it is imported only here, when something is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadFile
from ..formats.atomic import replacement

WRITTEN = ("png", "svg", "pdf")
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}  # what would make the bytes depend on the day


def axes_for(target: Any, width: float = 6.4, height: float = 4.0) -> Any:
    """``target`` itself when it is axes, else new ones; raises ImportError with what to install."""
    if hasattr(target, "plot"):
        return target
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'graphprune[report]'") from error
    return Figure(figsize=(width, height), layout="constrained").subplots()


def drawn(axes: Any, target: Any) -> Any:
    """Write the picture if ``target`` is a file (.png, .svg, .pdf), the same bytes every time, complete or not at all; returns the axes.

    Raises :class:`~graphprune.errors.BadFile` where it cannot be written, or in that form.
    """
    if isinstance(target, str | Path):
        from matplotlib import rc_context

        file = Path(target)
        known = axes.figure.canvas.get_supported_filetypes()
        form = file.suffix[1:].lower()
        if form not in known:
            raise BadFile(f"{file}: pictures are written as {', '.join('.' + name for name in WRITTEN)}; the name of the file says which")
        with rc_context({"svg.hashsalt": "graphprune"}), filed(file) as part:
            axes.figure.savefig(part, format=form, dpi=150, metadata=UNDATED.get(form))
    return axes


@contextmanager
def filed(file: Path) -> Iterator[Path]:
    """A place to write what becomes ``file``; raises :class:`~graphprune.errors.BadFile` where the disk refuses it, and then leaves the file as it was."""
    if file.parent.exists() and not file.parent.is_dir():
        raise BadFile(f"{file} cannot be written: {file.parent} is no folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacement(file) as part:
            yield part
    except OSError as error:
        raise BadFile.of(error, f"{file} cannot be written: {error.strerror or error}") from error
