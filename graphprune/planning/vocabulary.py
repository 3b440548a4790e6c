"""Which tokens stay: those that are used most, those that the model or the user names, or those that the user chose; :func:`plan_vocabulary`.

Ids that the configuration names (padding, beginning, end …) always stay, and follow to their new numbers. Ids that the code compares with, or counts
positions from, keep their number where a few further tokens are enough for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..coupling.groups import Groups
from ..coupling.vocabulary import Vocabulary, coupled, vocabulary
from ..cutting.plan import Plan, Survivors, make_plan
from ..cutting.tokens import Tokens
from ..cutting.vocabulary import holders
from ..errors import BadRatio, BadTarget, NeedsBatches, NothingToPrune
from ..scores import Score, score
from ..tracing.graph import Graph
from ..tracing.probe import batch_inputs
from ..tracing.symbols import solve
from ..tracing.trees import leaf_tensors, modules_of
from .request import Request
from .unread import unread_sizes
from .widths import choose, why

NEAR, SHARE = 64, 16  # so many further tokens, and one of so many, may stay in order that ids which the code compares with keep their number
HOW = (
    "say what={'vocabulary': graphprune.Vocabulary(0.5, batches=texts)} with batches of ids as the model takes them (of a score, or of a repair, do as well), "
    "which stay ({'vocabulary': [ids]}), or how many ({'vocabulary': 8000}: without texts the lowest ids)"
)
Path = tuple[Any, ...]


def plan_vocabulary(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan for a smaller vocabulary.

    Raises :class:`~graphprune.errors.NothingToPrune` where the code does more with ids than to look them up, :class:`~graphprune.errors.NeedsBatches` where
    nothing says which tokens are used, and :class:`~graphprune.errors.BadRatio` where fewer than those that are named would stay.
    """
    if request.aims.timed or request.aims.weight:
        raise BadTarget("a time is met by widths alone; give the vocabulary an amount, or ask for params=, macs= or size=")
    words, groups = vocabulary(graph), coupled(graph)
    kept_whole = {item if isinstance(item, str) else item[0] for item in request.keep}
    if not len(groups) or kept_whole.intersection(words.tables):
        raise NothingToPrune(f"the vocabulary stays whole: {_held(words, groups, kept_whole)}")
    asked = request.wanted[0]
    named = {path: token for path, token in named_ids(model, words) if 0 <= token < words.size}
    always = _always(words, {*named.values(), *asked.special})
    kept, notes = _kept(groups, model, request, words, always)
    solved = groups.graph
    edits, wrong = solve(solved, Survivors(groups, kept).length)
    if any(each.certain for each in wrong):
        raise NothingToPrune(f"the vocabulary stays whole: {why(next(each for each in wrong if each.certain))}")
    more, said = unread_sizes(solved, model, groups, kept)
    ids = kept[0].tolist()
    tokens = Tokens(tuple(ids), words.size, words.inputs)
    counts, others = _counts(graph, words)
    edits = {**edits, **more, **dict.fromkeys(counts, len(ids)), **{path: int(tokens.new[token]) for path, token in named.items()}}
    plan = make_plan(groups, kept, edits, tuple(dict.fromkeys((*notes, *(said if others else ())))))
    slots = tuple((name, axis) for name, axes in plan.cuts.items() for axis in axes)
    return replace(plan, tokens=replace(tokens, slots=slots, paths=tuple(edits)))


def _counts(graph: Graph, words: Vocabulary) -> tuple[list[Path], bool]:
    """The attributes that say how many tokens there are though no run reads them, and whether there are others of that value."""
    same = [path for path, value in graph.symbols.items() if value == words.size and len(path) == 2]
    named = [path for path in same if "vocab" in path[1] or path[1] == "num_embeddings"]
    return named, len(named) < len(same)


def _held(words: Vocabulary, groups: Groups, kept_whole: set[str]) -> str:
    """What keeps the vocabulary whole."""
    if kept := kept_whole.intersection(words.tables):
        return f"{sorted(kept)[0]} is kept on request"
    if not words.size or words.why:
        return words.why or "no whole-number input of this model looks up rows of a table"
    reasons = (str(reason) for (name, axis), reason in groups.locked.items() if name in words.tables and axis == 0)
    return next(reasons, "its rows stay or go together with others")


def _always(words: Vocabulary, ids: set[int]) -> list[int]:
    """The tokens that stay in any case."""
    ids |= {token for token in words.compared if token < words.size}
    low = [token for token in words.compared if token - sum(other < token for other in ids) <= min(NEAR, words.size // SHARE)]
    ids |= {*range(max(low, default=-1) + 1)}
    for token in sorted(ids):
        if not 0 <= token < words.size:
            raise BadRatio(f"the token {token} is to stay; the vocabulary has ids from 0 to {words.size - 1}")
    return sorted(ids)


def _kept(groups: Groups, model: nn.Module, request: Request, words: Vocabulary, always: list[int]) -> tuple[list[torch.Tensor], list[str]]:
    """The ids that stay, in order, and what there is to say about them."""
    asked, size = request.wanted[0], words.size
    if isinstance(asked.amount, tuple):
        wrong = [token for token in asked.amount if not isinstance(token, int) or not 0 <= token < size]
        if wrong:
            raise BadRatio(f"the token {wrong[0]!r} is to stay; the vocabulary has ids from 0 to {size - 1}")
        added = sorted({*always} - {*asked.amount})
        notes = [f"note: {len(added)} tokens that the model names stay as well: {', '.join(map(str, added[:12]))}{' …' * (len(added) > 12)}"] if added else []
        return [torch.tensor(sorted({*asked.amount, *always}))], notes
    if isinstance(asked.amount, int) and not max(1, len(always)) <= asked.amount <= size:
        raise BadRatio(f"{asked.amount} tokens were asked for; of {size}, {len(always)} are named by the model or by you and stay in any case")
    scores, notes = _use(groups, model, request, words)
    scores = scores.clone()
    scores[always] += scores.max() + 1  # they stay whatever is used
    widths = replace(request.widths, at_least=max(request.widths.at_least, len(always)))
    ratios = {} if asked.amount is None else {0: asked.amount if isinstance(asked.amount, float) else 1 - asked.amount / size}
    kept = choose(groups, [scores], replace(request, widths=widths), ratios, [])
    return [each.sort().values for each in kept], notes


def _use(groups: Groups, model: nn.Module, request: Request, words: Vocabulary) -> tuple[torch.Tensor, list[str]]:
    """How often every token is used, and ties in favour of the lowest ids (tokenizers number the most frequent ones first)."""
    asked = request.wanted[0]
    order = 0.5 * (1 - torch.arange(words.size, dtype=torch.float64) / words.size)
    batches = next((each for each in (asked.batches, request.batches, request.calibration) if each is not None), None)
    if callable(request.score) and not isinstance(request.score, Score):
        return score(groups, model, request.score, request.batches, request.loss)[0], []  # type: ignore[arg-type]  # it was looked at in the request
    if batches is not None:
        counts = _counted(batches, words)
        used = int((counts > 0).sum())
        return counts + order, [f"note: {used} of {words.size} tokens are used in {int(counts.sum())} of the calibration texts"]
    if isinstance(asked.amount, int):
        return order, ["note: no texts say which tokens are used; those with the lowest ids stay"]
    raise NeedsBatches(f"nothing says which tokens are used: {HOW}")


def _counted(batches: Iterable, words: Vocabulary) -> torch.Tensor:
    """How often each id is in batches of inputs; raises :class:`~graphprune.errors.NeedsBatches` where these hold no ids."""
    counts = torch.zeros(words.size, dtype=torch.float64)
    if isinstance(batches, torch.Tensor | str | Mapping) or not isinstance(batches, Iterable):
        raise NeedsBatches(f"texts are an iterable of batches of ids, as the model takes them; got a {type(batches).__name__}")
    for number, batch in enumerate(batches):
        ids = _ids(batch, words)
        if ids is None:
            raise NeedsBatches(f"batch {number} holds no token ids under {' or '.join(map(repr, words.inputs))}, which the model looks up")
        if ids.numel() and int(ids.max()) >= words.size:
            raise NeedsBatches(f"batch {number} holds the id {int(ids.max())}; the vocabulary has {words.size} tokens: was it made by another tokenizer?")
        counts += torch.bincount(ids[ids >= 0], minlength=words.size)
    return counts


def _ids(batch: Any, words: Vocabulary) -> torch.Tensor | None:
    """All ids of a batch, flat; the first positional tensor is taken for them where the example named them."""
    args, kwargs = batch_inputs(batch)
    tensors = [kwargs[name] for name in words.inputs if name in kwargs] + [args[at] for at in words.inputs if isinstance(at, int) and at < len(args)]
    tensors = tensors or list(args[:1])
    ids = [each.reshape(-1).long().cpu() for each in tensors if isinstance(each, torch.Tensor) and not each.is_floating_point()]
    return torch.cat(ids) if ids else None


def named_ids(model: nn.Module, words: Vocabulary) -> Iterator[tuple[Path, int]]:
    """The attributes of a model, and of its configurations, that name a token: their path, and the id.

    They are known by how attributes of this kind are called (``…_token_id``, ``padding_idx`` …).
    """
    tables = {id(tensor) for name, _, _, tensor in leaf_tensors(model) if name in words.tables}
    for name, module in modules_of(model):
        if isinstance(module, nn.Embedding) and id(module.weight) not in tables:
            continue  # a table of something else, whose rows have other numbers
        for key, value in module.__dict__.items():
            yield from (((name, *path), token) for path, token in _named(key, value))
    for name, key, holder in holders(model):
        yield from (((name, key, *path), token) for path, token in _inside(holder))


def _inside(holder: Any, depth: int = 3) -> Iterator[tuple[Path, int]]:
    for key, value in vars(holder).items():
        yield from _named(key, value)
        if depth and key[:1] != "_" and hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from (((key, *path), token) for path, token in _inside(value, depth - 1))


def _named(key: str, value: Any) -> Iterator[tuple[Path, int]]:
    """The ids that an attribute names: one, a list, or lists of lists; of pairs (place, id) the second."""
    if key[:1] == "_":
        return
    if type(value) is int:
        if key == "padding_idx" or key.endswith(("token_id", "token_index")):
            yield (key,), value
    elif isinstance(value, list | tuple) and key.endswith(("token_id", "token_ids", "token_index", "_tokens", "words_ids", "decoder_ids")):
        for at, item in enumerate(value):
            if type(item) is int:
                yield (key, at), item
            elif isinstance(item, list | tuple):
                first = 1 if key.endswith("decoder_ids") else 0
                yield from (((key, at, place), each) for place, each in enumerate(item) if place >= first and type(each) is int)
    elif isinstance(value, Mapping) and key.endswith("_to_id"):
        yield from (((key, name), each) for name, each in value.items() if type(each) is int and type(name) is str)
