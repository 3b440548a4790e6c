"""The map between the ids of the original's tokenizer and those of a model with fewer tokens: :func:`tokens` finds it, wherever the model is.

It lies beside the weights as ``graphprune_tokens.json``: ``kept`` holds the original id of every new one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..cutting.plan import Plan, plan_of
from ..cutting.tokens import FILE, Tokens
from ..errors import BadFile, BadPlan
from .atomic import read, write

MOST = 2**26  # bytes of the file


def tokens(source: Any) -> Tokens:
    """The tokens that a cut model, its plan, or the folder it was saved to keeps: ``to_new`` and ``to_old`` map ids.

    Raises :class:`~graphprune.errors.BadPlan` where the vocabulary is whole, and :class:`~graphprune.errors.BadFile` for a folder without such a map.

    >>> import torch, graphprune
    >>> net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    >>> small = graphprune.shrink(net, torch.tensor([[1, 5]]), what={"vocabulary": [0, 1, 5]})
    >>> small(tokens(small).to_new(torch.tensor([[5, 1]]))).shape, tokens(small).to_old([2])
    (torch.Size([1, 2, 3]), [5])
    """
    if isinstance(source, str | os.PathLike):
        return _read(Path(cast("str | os.PathLike[str]", source)))
    plan = plan_of(source) if isinstance(source, nn.Module) else source
    if not isinstance(plan, Plan) and not isinstance(source, nn.Module):
        raise BadPlan(f"a {type(source).__name__} has no tokens; give a model that was cut, its plan, or the folder that it was saved to")
    if plan is None or plan.tokens is None:
        raise BadPlan("the vocabulary of this model is whole: its ids are those of the original")
    return plan.tokens


def write_tokens(folder: Path, kept: Tokens | None) -> None:
    """Write the map beside a model that was saved there; one that is there from an earlier model, and is not true any more, goes."""
    if kept is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        write(folder / FILE, kept.to_json())


def _read(folder: Path) -> Tokens:
    path = folder if folder.suffix == ".json" else folder / FILE
    if not path.is_file():
        raise BadFile(f"{path} is not there: the model in this folder has its whole vocabulary, or was not written by graphprune")
    try:
        data: Any = json.loads(read(path, MOST))
        if not isinstance(data, dict) or cast("dict[str, Any]", data).get("version") != 1:
            raise ValueError("its version is not 1")
        return Tokens.from_dict(cast("dict[str, Any]", data))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFile(f"{path} holds no map of tokens: {error}") from error
