"""Whether a cut model that was saved computes the same, to the last bit, where it is loaded: a new process, a fresh model with other weights.

    python benchmarks/roundtrip.py --json roundtrip.jsonl --out docs/roundtrip.md            # run again to go on after a stop
    python benchmarks/roundtrip.py --json roundtrip.jsonl --out docs/roundtrip.md --table    # from the rows there are

Every parameter and statistic is random, the ratio is 0.5. Two ways: ``graphprune.save`` and ``graphprune.load``; and the plan's JSON beside a state dict
(``torch.save``, read with ``weights_only=True``). A process for each architecture writes, and a new interpreter, which has seen none of it, reads several.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Rows, made_by, parameters
from reports import spread
from torch import nn
from zoo import measure
from zoo_models import build, names
from zoo_support import declare_operators, randomise

import graphprune
from graphprune.tracing.trees import tensors

WAYS = ("folder", "state dict")
TOGETHER = 24  # architectures that one reader reads
LIBRARIES = ("timm", "transformers.modeling_utils", "diffusers.models.unets.unet_2d_condition", "segmentation_models_pytorch", "ultralytics.nn.tasks")


def outputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What it computes in evaluation mode; what it draws, it draws from the same seed."""
    torch.manual_seed(7)
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(model.eval()(*args, **kwargs), torch.Tensor)]


def write(name: str, send: Any, limit: float, root: Path) -> None:
    """Cut one architecture and save it both ways, with its inputs and outputs; runs in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    row: dict[str, Any] = {"name": name}
    start = time.process_time()
    try:
        torch.manual_seed(0)
        model, args, kwargs = build(name)
        randomise(model)
        small, plan = graphprune.shrink(model, args, 0.5, example_kwargs=kwargs, return_plan=True, verify=False)
        folder = graphprune.save(small, root / name)
        torch.save({"plan": plan.to_json(), "weights": small.state_dict()}, folder / "small.pt")
        torch.save({"args": args, "kwargs": kwargs, "outputs": outputs(small, args, kwargs)}, folder / "call.pt")
        row |= {"parameters": [parameters(model), parameters(small)], "bytes": sum(file.stat().st_size for file in folder.glob("model.safetensors"))}
    except BaseException as error:
        row["why"] = f"{type(error).__name__}: {error}"[:300]
    finally:
        send.send(row | {"seconds": time.process_time() - start})
        send.close()


def restored(way: str, folder: Path, base: nn.Module) -> nn.Module:
    if way == "folder":
        return graphprune.load(folder, base)
    saved = torch.load(folder / "small.pt", weights_only=True)
    small = graphprune.apply(base, graphprune.Plan.from_json(saved["plan"]))
    small.load_state_dict(saved["weights"])
    return small


def read(name: str, folder: Path) -> dict[str, Any]:
    """How each way came back: the largest difference of outputs, of which only 0.0 counts, or an error."""
    row: dict[str, Any] = {"name": name}
    call = torch.load(folder / "call.pt", weights_only=True)
    for way in WAYS:
        start = time.process_time()
        try:
            torch.manual_seed(1)
            base = randomise(build(name)[0], seed=1)
            small = restored(way, folder, base)
            pairs = list(zip(outputs(small, call["args"], call["kwargs"]), call["outputs"], strict=True))
            same = all(a.dtype == b.dtype and a.shape == b.shape and bool(torch.isfinite(b.double()).all()) for a, b in pairs)
            if not any(b.numel() for _, b in pairs):
                raise ValueError("every output is empty (a detector that sees nothing): there is nothing to compare")
            gap = max(float((a.double() - b.double()).abs().max()) for a, b in pairs if b.numel())
            row[way] = gap if same else "other shapes or types, or no finite numbers"
        except Exception as error:
            row[way] = f"{type(error).__name__}: {error}"[:300]
        row["read seconds"] = row.get("read seconds", 0) + time.process_time() - start
    return row


def read_all(root: Path) -> None:
    """The reader: a line of JSON for every architecture under the folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for call in sorted(root.rglob("call.pt")):
        print(json.dumps(read(str(call.parent.relative_to(root)), call.parent)), flush=True)


def together(batch: list[str], limit: float) -> list[dict[str, Any]]:
    """The rows of a few architectures: written one by one, read by one new interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = {row["name"]: row for row in measure(batch, 1, limit, lambda row: None, partial(write, root=root))}
        done = subprocess.run([sys.executable, __file__, "--read", folder], capture_output=True, text=True, check=False, cwd=ROOT)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            rows[row["name"]] |= row
    for row in rows.values():
        if "why" not in row and WAYS[-1] not in row:
            row["why"] = f"the reader ended with {done.returncode}: {done.stderr[-200:]}"
    return [rows[name] for name in batch]


def good(row: dict[str, Any]) -> bool:
    return all(row.get(way) == 0.0 for way in WAYS)


def page(rows: list[dict[str, Any]], known: Rows) -> str:
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(row["name"].rpartition("/")[0] for row in rows).items()))
    counts = ", ".join(f"{way} {sum(row.get(way) == 0.0 for row in rows)} of {len(rows)}" for way in WAYS)
    wrong = [f"- {row['name']}: {row.get('why') or [row.get(way) for way in WAYS]}" for row in rows if not good(row)]
    lines = "\n".join(
        f"| {row['name']} | {row['parameters'][0] / 1e6:.3g} → {row['parameters'][1] / 1e6:.3g} | {row['bytes'] / 1e6:.3g} | "
        f"{' | '.join('equal' if row[way] == 0.0 else f'**{row[way]}**' for way in WAYS)} |"
        for row in rows
        if all(way in row for way in WAYS)
    )
    return f"""# Saved, and loaded in a new process

{made_by("python benchmarks/roundtrip.py --json roundtrip.jsonl --out docs/roundtrip.md", "timm", "transformers", "diffusers", rows=known)}

**{sum(map(good, rows))} of {len(rows)} architectures, cut at ratio 0.5, compute the same to the last bit after a round trip** ({kinds}).
A new interpreter builds the architecture with other random weights and statistics, loads, and runs the same input. Two ways: the folder of
`graphprune.save` and `graphprune.load`, and the plan's JSON beside a state dict (`torch.save`, read with `weights_only=True`). Equal, by way: {counts}.
{chr(10).join(wrong)}

| model | parameters, millions | folder, MB | {" | ".join(WAYS)} |
|---|---|---:|---|---|
{lines}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that hold one of these (comma-separated)")
    parser.add_argument("--most", type=int, default=1000, help="architectures in this run")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further architectures after this long")
    parser.add_argument("--limit", type=float, default=240, help="CPU seconds to cut and save an architecture")
    parser.add_argument("--json", type=Path, help="append every row here as it comes; those that are equal are not made again")
    parser.add_argument("--out", type=Path, help="write the page (Markdown) here")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    declare_operators()
    for library in LIBRARIES:  # once, for all processes that write
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    if options.read:
        return read_all(options.read)
    known = Rows(options.json)
    rows = {row["name"]: row for row in known.rows}
    queue = [name for name in spread(names()) if any(part in name for part in options.only.split(",")) and not good(rows.get(name, {}))][: options.most]
    end = time.monotonic() + options.seconds
    while queue and time.monotonic() < end and not options.table:
        for row in together(queue[:TOGETHER], options.limit):
            rows[row["name"]] = known.add(row)
        queue = queue[TOGETHER:]
    shown = sorted(rows.values(), key=lambda row: row["name"])
    print(f"{sum(map(good, shown))} of {len(shown)} equal")
    if options.out:
        options.out.write_text(page(shown, known))


if __name__ == "__main__":
    main()
