"""Checkpoints that do not fit in memory: :func:`shrink` plans without the weights, reads them one after the other, and writes a smaller checkpoint.

What is in memory at a time is a few rows of one tensor (of tensors that a library keeps in other pieces than its modules do, one such tensor), whatever the
size of the model. A run that is killed goes on where it was when it is asked for again, and until the end there is no folder that looks like a result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..adapters.pretrained import Names, example, hollow
from ..cutting.apply import apply
from ..cutting.plan import Plan
from ..cutting.schema import CHECKSUM, checksum
from ..cutting.schema import read as read_plan
from ..cutting.tokens import Tokens
from ..cutting.verify import check_model
from ..errors import BadOption
from ..formats.closing import Lists
from ..formats.expressed import expressed
from ..formats.huggingface import as_written, follow, noted, remembered
from ..formats.rebuilt import configured
from ..formats.tokens import write_tokens
from ..options import Widths
from ..planning.outcome import disappointments
from ..planning.planner import decide
from ..planning.request import Request, ask
from ..scores import OnData
from ..tracing.trace import trace
from ..tracing.trees import tensors
from ..version import VERSION
from .layout import Layout
from .partial import Partial
from .scoring import scored
from .shards import ENDING, INDEX, Shards
from .stored import FromFiles
from .writing import length, write

PLAN, GENERATION = "plan.json", "generation_config.json"
TARGETS = ("params", "macs", "size", "memory")
ASKED = ("scope", "what", "keep")
TRACED = ("example_kwargs", "examples", "outputs")
WEIGHTS = (ENDING, INDEX, ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".part")


def shrink(
    folder: str | Path,
    out: str | Path,
    example_input: Any = None,
    ratio: float | str | None = None,
    *,
    model: nn.Module | None = None,
    score: Any = "l2",
    widths: Widths | Mapping[Any, int] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Plan:
    """Write a smaller checkpoint of ``folder`` (safetensors files, with a ``config.json``) to ``out``, which must not be there; returns the plan.

    - ``example_input``: what the model can be called with; language models and classifiers of images need none.
    - ``model``: for a folder without a configuration that a library knows, the whole model on the meta device, with the names of the files.
    - ``score``: ``"l2"`` and what else looks at one weight at a time: l1, linf, filter_norm, group_norm, lamp; or random. With data,
      ``graphprune.scores.on("wanda_sp", batches)``: wanda_sp, flap, activation, apoz, obs, thinet, lasso, leverage, pivoted_qr. The model then runs block by
      block, with the weights of two blocks in memory at most, and the statistics of one stage.
    - ``widths``: as for :func:`graphprune.shrink`; they are alike in all layers (``uniform``), for so a configuration can say them.
    - ``trust_remote_code``: whether Python files in the folder may run; without it they never do.
    - ``options``: ``params``, ``macs``, ``size``, ``memory``, ``scope``, ``what``, ``keep``, ``example_kwargs``, ``examples``, ``outputs`` of
      :func:`graphprune.shrink`, whose result, saved, has the same bits.

    Types of numbers stay, the configuration says what is left, other files are copied. The same call goes on after one that was killed or met a full disk.
    Raises :class:`~graphprune.errors.BadFile` for files that are missing, damaged, or not of this model, and where ``out`` cannot be written;
    :class:`~graphprune.errors.BadModel` for a configuration without a class; :class:`~graphprune.errors.BadConfig` where no configuration says what would be
    left; and what planning raises. ``folder`` is never written to.

    >>> import tempfile, torch
    >>> from safetensors.torch import load_file, save_file
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_file(net.state_dict(), folder / "model.safetensors")
    >>> plan = shrink(folder, folder / "small", torch.zeros(1, 4), ratio=0.5, model=net.to("meta"))
    >>> load_file(folder / "small" / "model.safetensors")["0.weight"].shape
    torch.Size([4, 4])
    """
    folder, out = Path(folder), Path(out)
    unknown = [name for name in options if name not in (*TARGETS, *ASKED, *TRACED)]
    if unknown:
        raise BadOption(f"a checkpoint is not shrunk by {unknown[0]}=; there are score, widths, {', '.join((*TARGETS, *ASKED, *TRACED))}")
    if isinstance(score, OnData):
        score = dataclasses.replace(score, batches=list(score.batches))
    shards = Shards.of(folder)
    whole = hollow(folder, trust_remote_code) if model is None else model.eval()
    check_model(whole)
    names = Names(whole, shards.shapes, folder)
    asked = {"ratio": ratio, "score": score, "widths": widths, **options}
    request = _request(whole, FromFiles.of(shards, names), asked)
    partial = Partial(out, _digest(shards, folder, asked))
    if partial.done:
        partial.clear()
        return Plan(**read_plan((out / PLAN).read_bytes())[0])
    with partial.begun():
        text = partial.noted(PLAN)
        if text is None:
            text = _decided(whole, request, example(whole) if example_input is None else example_input, {name: options.get(name) for name in TRACED})
            partial.note(PLAN, text)
        fields, rest = read_plan(text)
        plan = Plan(**fields)
        small, lists = _cut(whole, plan, rest.get("configuration"))
        layout = Layout(plan, whole, small, lists, names, shards)
        _write(layout, partial)
        _complete(small, folder, partial, plan.tokens)
        partial.text(PLAN, text)
        if model is None:  # what is written, read as anyone would read it
            Names(hollow(partial.files, trust_remote_code), Shards.of(partial.files).shapes, partial.files)
        partial.finish()
    return plan


def _request(whole: nn.Module, stored: FromFiles, asked: Mapping[str, Any]) -> Request:
    """What is asked for, checked, with scores that read the files."""
    what = asked.get("what", "channel")
    request = ask(
        whole,
        asked["ratio"],
        {name: asked.get(name) for name in TARGETS},
        score=scored(asked["score"], stored, what),
        widths=_uniform(whole, asked["widths"], what),
        **{name: asked[name] for name in ASKED if asked.get(name) is not None},
    )
    if any(each.spec.masks or each.spec.option == "box" for each in request.wanted):
        raise BadOption(f"what={request.text!r} leaves zeros in place, which a checkpoint does not get smaller by: give channels, heads, mlp, hidden or layers")
    return request


def _decided(whole: nn.Module, request: Request, inputs: Any, traced: Mapping[str, Any]) -> str:
    """The plan, and what the configuration becomes, as text."""
    graph = trace(whole, inputs, traced["example_kwargs"], outputs=traced["outputs"], examples=traced["examples"] or ())
    plan = expressed(graph, whole, request, decide)
    small = follow(apply(whole, plan), graph)
    as_written(small)  # refuses what no configuration says, before anything is written
    disappointments(graph, whole, plan, request)
    data = plan.to_dict() | ({"configuration": noted(small)} if configured(small) else {})
    return json.dumps(data | {CHECKSUM: checksum(json.loads(json.dumps(data)))})


def _uniform(whole: nn.Module, widths: Any, what: Any) -> Any:
    """Widths that a configuration can say."""
    names = cast("Iterable[Any]", what) if isinstance(what, list | tuple | Mapping) else (what,)
    if not configured(whole) or all(name in ("block", "layer", "layers") for name in names):
        return widths
    return dataclasses.replace(widths, uniform=True) if isinstance(widths, Widths) else Widths(to=widths or {}, uniform=True)


def _cut(whole: nn.Module, plan: Plan, note: Any) -> tuple[nn.Module, Lists]:
    """The cut model as it is written, on the meta device, and the lists of blocks that are shorter."""
    small = apply(whole, plan)
    return as_written(remembered(small, note))


def _write(layout: Layout, partial: Partial) -> None:
    """The files that are not there yet."""
    missing = [file for file in layout.files if not (partial.files / file).exists()]
    partial.room(sum(length(layout.kinds(file)) for file in missing))
    for file in missing:
        write(partial.files / file, layout.kinds(file), layout.pieces)
    index = layout.index()
    if index is not None:
        partial.text(index[0], json.dumps(index[1], indent=2))


def _complete(small: nn.Module, folder: Path, partial: Partial, kept: Tokens | None) -> None:
    """The configuration of what is left, and the files that are not about weights."""
    config: Any = getattr(small, "config", None)
    if configured(small):
        if isinstance(config, Mapping):
            small.save_config(partial.files)  # pyright: ignore[reportCallIssue]
        else:
            config.architectures = [type(small).__name__]
            config.save_pretrained(partial.files)
    if kept is not None:
        write_tokens(partial.files, kept)
        generation: Any = getattr(small, "generation_config", None)
        if generation is not None and (folder / GENERATION).is_file():  # it names tokens
            generation.save_pretrained(partial.files)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.endswith(WEIGHTS) and name not in ("config.json", PLAN) and not name.startswith("."):
            partial.copy(path, name)


def _digest(shards: Shards, folder: Path, asked: Mapping[str, Any]) -> str:
    """What tells this request from others, in any process."""
    config = folder / "config.json"
    said = {name: value for name, value in sorted(asked.items()) if value is not None}
    told, score = hashlib.sha256(), said["score"]
    if isinstance(score, OnData):
        said["score"] = score.score
        for tensor in tensors(score.batches, torch.Tensor):
            told.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    facts = [VERSION, shards.digest(), config.read_text(encoding="utf-8") if config.is_file() else "", repr(said)]
    told.update(json.dumps(facts).encode())
    return told.hexdigest()
