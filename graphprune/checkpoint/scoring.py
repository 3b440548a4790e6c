"""Scores of a model whose weights are in files: :func:`scored` makes functions of their names, which planning calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..coupling.groups import Groups
from ..coupling.sums import PIECE, Rows
from ..errors import BadOption
from ..granularity.spec import parse
from ..planning.request import DEPTH
from ..scores import OnData, Score, named
from ..scores.task import Scores
from .resident import resident
from .stored import FromFiles

# Scores that look at one weight after the other.
STREAMED = ("l1", "l2", "linf", "filter_norm", "group_norm", "lamp", "random")
# Scores that read activations, and one weight after the other beside them.
CALIBRATED = ("wanda_sp", "flap", "activation", "apoz", "obs", "thinet", "lasso", "leverage", "pivoted_qr")


def scored(name: Any, stored: FromFiles, what: Any) -> Any:
    """A score by name (or a mapping of kinds to names), for the kinds of ``what``, as functions that read the files.

    Raises :class:`~graphprune.errors.BadOption` for scores that need more than one weight at a time.
    """
    kinds = [what] if isinstance(what, str) else list(what)
    names = name if isinstance(name, Mapping) else dict.fromkeys(kinds, name)
    found = {kind: (depth if parse(kind).name in DEPTH else tokens if parse(kind).coupled else widths)(each, stored) for kind, each in names.items()}
    return found if len(found) > 1 else next(iter(found.values()))


def widths(name: Any, stored: FromFiles) -> Any:
    data = name if isinstance(name, OnData) else None
    name = data.score if data is not None else name
    score = named(name) if isinstance(name, str) else name
    known = CALIBRATED if data is not None else STREAMED
    if not isinstance(score, Score) or score.name not in known or score.options.get("fold"):
        what, data_too = (score.name if isinstance(score, Score) else name), f"; with data (graphprune.scores.on) {', '.join(CALIBRATED)}"
        raise BadOption(f"score={what!r} cannot be read weight by weight from files; there are {', '.join(STREAMED)}{data_too}")

    def from_files(groups: Groups, model: nn.Module, batches: Any = None) -> Scores:
        if data is None:
            return score(groups, model, stored=stored)
        with resident(model, stored) as running:
            return score(groups, running, batches, stored=stored)

    from_files.__name__ = score.name
    return from_files if data is None else OnData(from_files, data.batches)


def tokens(name: Any, stored: FromFiles) -> Any:
    """The same for a vocabulary, of which texts say what is used, and no weights."""
    return OnData("l2", name.batches) if isinstance(name, OnData) else "l2"


def depth(name: Any, stored: FromFiles) -> Any:
    """The same for whole modules: the norm of their weights."""
    if name == "random":
        return name
    if name not in ("l1", "l2"):
        raise BadOption(f"score={name!r} of whole modules cannot be read from files; it is 'l1', 'l2' or 'random'")
    power = 1 if name == "l1" else 2

    def from_files(path: str, module: nn.Module) -> float:
        names = [leaf for leaf in stored if leaf.startswith(f"{path}.")]
        return sum(_total(stored.pieces[leaf], power) for leaf in names) ** (1 / power)

    return from_files


def _total(rows: Rows, power: int) -> float:
    step = max(1, PIECE // max(1, math.prod(rows.shape[1:])))
    return sum(float(rows[start : start + step].double().abs().pow(power).sum()) for start in range(0, rows.shape[0], step))
