"""Matplotlib axes to draw on: given ones, or new ones; it is imported only here, when something is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
    """Write the picture if ``target`` is a file (.png, .svg, .pdf), the same bytes every time; returns the axes."""
    if isinstance(target, str | Path):
        from matplotlib import rc_context

        plain = {"Date": None} if str(target).endswith((".svg", ".pdf")) else {"Software": None}
        with rc_context({"svg.hashsalt": "graphprune"}):
            axes.figure.savefig(target, dpi=150, metadata={"CreationDate": None} if str(target).endswith(".pdf") else plain)
    return axes
