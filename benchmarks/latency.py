"""Speed asked for and speed got: measured searches, re-measured in fresh processes, on stock runtimes.

    python benchmarks/latency.py --json latency.jsonl --out docs/latency.md            # everything, the most telling cells first
    python benchmarks/latency.py --json latency.jsonl --only cells --runtimes eager --models resnet50 resnet18
    python benchmarks/latency.py --json latency.jsonl --only report --out docs/latency.md

Every job runs in a process of its own on one thread; finished rows are read from ``--json`` and not measured again.
Batch norms are folded (``graphprune.fuse``) and convolutional models are ``channels_last`` on both sides of every
comparison. Weights are random (times do not depend on them), batch 1, ``--side`` pixels or 128 tokens; on a GPU
``--device cuda --batch 64 --half --only cells --runtimes eager``. A *cell* is a
model, a runtime and a target: ``search`` asks ``graphprune.shrink(speedup=…)`` and saves the result; ``fresh`` loads it in
another process and times it interleaved with the original; ``peer`` times Torch-Pruning and ours at equal MACs
(``pip install torch-pruning``); ``accuracy`` compares latency-aware, MAC-aware and uniform widths at equal measured time, ``objectives`` what one budget of
MACs gives when it is spent for score or for time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Rows, torch_pruned
from torch import nn

import graphprune

MODELS = "resnet50 mobilenet_v2 vit_s convnext_t resnet18 efficientnet_b0 minilm regnet_y densenet121 swin_t".split()
RUNTIMES = ("eager", "onnxruntime", "openvino", "compile")
TARGETS = (2.0, 1.5, 3.0)
OBJECTIVES = ("time", 0.5, "score")
TOKENS = 128
KEYS = ("job", "model", "runtime", "side", "batch", "device", "half")
CONVOLUTIONAL = "resnet50 mobilenet_v2 convnext_t resnet18 efficientnet_b0 regnet_y densenet121".split()


def build(job: dict) -> tuple[nn.Module, torch.Tensor]:
    """The model of a job in eval mode with plausible norm statistics, and an example input, both on its device and of its precision."""
    model, x = network(job["model"], job["side"], job["batch"])
    device, dtype = torch.device(job["device"]), torch.float16 if job["half"] else torch.float32
    return model.to(device, dtype), x.to(device, dtype) if x.is_floating_point() else x.to(device)


def network(name: str, side: int, batch: int) -> tuple[nn.Module, torch.Tensor]:
    """As :func:`build`, on the processor in float32."""
    from zoo_support import declare_operators

    declare_operators()
    torch.manual_seed(0)
    if name == "minilm":
        from transformers import BertConfig, BertModel

        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        return BertModel(BertConfig(**shape), add_pooling_layer=False).eval(), torch.randint(5, 30000, (batch, TOKENS))
    x = torch.randn(batch, 3, side, side)
    if name == "vit_s":
        import timm

        return timm.create_model("vit_small_patch16_224", img_size=side).eval(), x
    from torchvision import models

    full = {"convnext_t": "convnext_tiny", "regnet_y": "regnet_y_800mf"}.get(name, name)
    return calibrated(models.get_model(full, weights=None), side), x


def calibrated(model: nn.Module, side: int) -> nn.Module:
    """Norm statistics of random images, so that activations have ordinary sizes."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        (model.train() if norms else model)(torch.randn(2, 3, min(side, 96), min(side, 96)))
    return model.eval()


def ready(model: nn.Module, x: torch.Tensor, name: str) -> tuple[nn.Module, torch.Tensor]:
    """What both sides get besides pruning: folded norms, and channels last."""
    if name not in CONVOLUTIONAL:
        return model, x
    return graphprune.fuse(model, x).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


# --- jobs, each in a process of its own; a generator of rows -----------------------------------------------------------


def search(job: dict) -> Iterator[dict]:
    """Ask for every target, and save what comes back."""
    model, x = ready(*build(job), job["model"])
    for target in job["targets"]:
        row, start = {"target": target}, time.perf_counter()
        try:
            options = {"on": graphprune.Runtime(job["runtime"], threads=1), "return_plan": True}
            small, plan = graphprune.shrink(model, x, speedup=target, **options)
            found = re.search(
                r"predicted ([\d.]+)x, measured ([\d.]+)x \(([\d.]+) to ([\d.]+); ([\d.]+) ms; the original against itself ([\d.]+)", plan.notes[-1]
            )
            row |= dict(zip(("predicted", "measured", "low", "high", "ms", "control"), map(float, found.groups()), strict=True))
            row |= {"macs": graphprune.profile(model, x).macs / graphprune.profile(small, x).macs}
            graphprune.save(small, Path(job["folder"]) / f"{job['model']}-{job['runtime']}-{job['side']}-{target}")
        except graphprune.GraphpruneError as error:
            row["why"] = str(error).splitlines()[0][:400]
        yield {**row, "seconds": time.perf_counter() - start}
        if target == job["targets"][0]:
            start = time.perf_counter()
            try:
                graphprune.shrink(model, x, speedup=target, **options)
            except graphprune.GraphpruneError:
                continue
            yield {"kind": "warm", "target": target, "seconds": time.perf_counter() - start}


def fresh(job: dict) -> Iterator[dict]:
    """Load what was saved, and time all of it interleaved with the original."""
    model, x = ready(*build(job), job["model"])
    folders = {t: Path(job["folder"]) / f"{job['model']}-{job['runtime']}-{job['side']}-{t}" for t in job["targets"]}
    small = {target: graphprune.load(folder, model).eval() for target, folder in folders.items() if (folder / "plan.json").exists()}
    if not small:
        return
    full = graphprune.profile(model, x).macs
    for target, found in zip(small, timed(model, list(small.values()), x, job), strict=True):
        yield {"target": target, **found, "macs": full / graphprune.profile(small[target], x).macs}
    if job["runtime"] == "eager":
        yield {"kind": "parts", "target": 0, **parts(model, x)}


def timed(model: nn.Module, others: list[nn.Module], x: torch.Tensor, job: dict) -> list[dict]:
    """Speedups against ``model`` with bands, all in the same rounds, and the control."""
    from graphprune.timing.measure import clock_for, interleave, middle_of
    from graphprune.timing.runtimes import prepare

    torch.set_num_threads(1)
    first = prepare(model, (x,), {}, job["runtime"], 1)
    calls = [first, *(prepare(other, (x,), {}, job["runtime"], 1) for other in others), first]
    rows = interleave(calls, clock_for(x.device, 1)[1], job["measure"], 0.0, least=7)
    reference, control = rows[:, [0, -1]].mean(1), middle_of(rows[:, 0] / rows[:, -1])
    found = []
    for index in range(1, len(calls) - 1):
        speedup, (low, high) = middle_of(reference / rows[:, index])
        facts = {"ms": float(1e3 * sorted(rows[:, index])[len(rows) // 2]), "reference": float(1e3 * sorted(reference)[len(rows) // 2])}
        found.append({"speedup": speedup, "low": low, "high": high, **facts, "control": control[0], "rounds": len(rows)})
    return found


def parts(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Where the original's time goes, operation by operation: shares of dense products, depthwise products, and all else (bound
    by memory), and the milliseconds of all by themselves."""
    from graphprune.cost import products
    from graphprune.coupling.groups import couple
    from graphprune.coupling.lengths import Lengths
    from graphprune.timing.table import Table, computes
    from graphprune.tracing.trees import tensors

    graph = graphprune.trace(model, x)
    table, lengths = Table(x.device, "eager", 1), Lengths(couple(graph))
    found = {"products": 0.0, "depthwise": 0.0, "rest": 0.0}
    for node in graph.nodes:
        if computes(node):
            single = node.product is not None and bool(node.product.weight.taps) and all(node.weight.shape[dim] == 1 for dim in node.product.weight.summed)
            kind = "depthwise" if single else "products" if list(products(node, lengths)) else "rest"
            found[kind] += table.seconds(node, [value.shape for value in tensors((node.args, node.kwargs))])
    total = sum(found.values())
    return {kind: seconds / total for kind, seconds in found.items()} | {"ms": 1e3 * total}


def peer(job: dict) -> Iterator[dict]:
    """Torch-Pruning by its documented recipe, at the MACs that its ``round_to`` allows nearest to the target; ours with no fewer
    MACs, spent for speed (``objective="time"``), for score per time (0.5) and for score alone; all timed in the same rounds."""
    plain, x = build(job)
    model, x = ready(plain, x, job["model"])
    full = graphprune.profile(model, x).macs
    for target in job["targets"]:
        try:
            count, theirs = min(narrowed(plain, x, full / target, job["round_to"]).items(), key=lambda made: abs(math.log(made[0] * target / full)))
            made = [at_least(model, x, count, objective) for objective in OBJECTIVES]
            first, *rows = timed(model, [ready(theirs, x, job["model"])[0], *(small for small, _ in made)], x, job)
        except Exception as error:
            yield {"target": target, "why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        theirs = {"theirs": first["speedup"], "their_macs": full / count, "control": first["control"]}
        for objective, (_, macs), row in zip(OBJECTIVES, made, rows, strict=True):
            noise = max((each["high"] - each["low"]) / 2 / each["speedup"] for each in (first, row))
            gain = row["speedup"] / first["speedup"]
            yield {"target": target, "kind": f"objective {objective}", **theirs, "ours": row["speedup"], "macs": full / macs, "gain": gain, "noise": noise}
        yield {"target": target, **theirs}


def spent(objective: str | float) -> dict:
    """A budget of MACs spent for score, for time, or between, on one thread."""
    return {"on": graphprune.Runtime(threads=1, objective=objective)}


def at_least(model: nn.Module, x: torch.Tensor, macs: float, objective: str | float) -> tuple[nn.Module, float]:
    """Ours with at least so many MACs, as few more as the widths allow, and how many it has."""
    full = graphprune.profile(model, x).macs
    for more in (0.0, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12):
        share, steps = min(1.0, macs / full * (1 + more)), graphprune.Widths(multiple_of="auto")
        small = graphprune.shrink(model, x, macs=share, **spent(objective), scope="allocated", widths=steps)
        found = graphprune.profile(small, x).macs
        if found >= macs:
            break
    return small, found


def narrowed(plain: nn.Module, x: torch.Tensor, budget: float, round_to: int) -> dict[float, nn.Module]:
    """Torch-Pruning's models with MACs nearest below and above the budget, by bisection over its ratio."""
    import copy

    plain, x = copy.deepcopy(plain), x.contiguous()
    made, low, high = {}, 0.0, 0.95
    for _ in range(7):
        middle = (low + high) / 2
        small = copy.deepcopy(plain)
        ignored = [m for m in small.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_pruned(small, x, middle, ignored, round_to=round_to)
        count = graphprune.profile(small.eval(), x).macs
        made[count] = small
        low, high = (middle, high) if count > budget else (low, middle)
    ends = [max((count for count in made if count <= budget), default=min(made)), min((count for count in made if count > budget), default=max(made))]
    return {count: made[count] for count in ends}


def trained(job: dict) -> tuple:
    """A trained model, its batch, a function that cuts it by scores which are computed once, and one that says what the test
    images say: before and after the same repair."""
    from accuracy import load, sample
    from realdata import accuracy as top1

    torch.set_num_threads(1)
    model, train, labels, test, truth = load(job["model"], job["data"])
    test, truth = test[:: job["every"]], truth[:: job["every"]]
    images, _ = sample(train, labels, 512, 0)
    x = images[: job["batch"]].to(memory_format=torch.channels_last)
    model = graphprune.fuse(model, x).to(memory_format=torch.channels_last)
    known: list = []

    def criterion(groups: Any, model: nn.Module, batches: Any) -> Any:
        size = tuple((group.size, tuple(group.places)) for group in groups)
        if not known or known[0] != size:
            known[:] = [size, graphprune.score(groups, model, job["criterion"], images.split(128), progress=False)]
        return known[1]

    def cut(*ratio: float, **wish: Any) -> nn.Module:
        return graphprune.shrink(model, x, *ratio, score=criterion, verify=False, widths=graphprune.Widths(multiple_of=job["multiple_of"]), **wish)

    def judged(small: nn.Module) -> dict[str, float]:
        after = top1(graphprune.repair(small, model, None, images.split(128), progress=False), test, truth)
        return {"top1": after, "cut": top1(small, test, truth), "macs": graphprune.profile(model, x).macs / graphprune.profile(small, x).macs}

    return model, x, cut, judged, top1(model, test, truth)


def accuracy(job: dict) -> Iterator[dict]:
    """Latency-aware, MAC-aware and uniform widths at the same measured time: what the test images say, after the same repair."""
    model, x, cut, judged, base = trained(job)
    for target in job["targets"]:
        made = {
            "latency-aware": cut(speedup=target, on=graphprune.Runtime(threads=1)),
            "MAC-aware": met(model, x, target, lambda ratio: cut(macs=1 - ratio, scope="allocated")),
            "uniform": met(model, x, target, cut),
        }
        rows = timed(model, list(made.values()), x, {**job, "runtime": "eager"})
        for (way, small), row in zip(made.items(), rows, strict=True):
            yield {"target": target, "way": way, "base": base, **judged(small), **row}


def objectives(job: dict) -> Iterator[dict]:
    """One budget of MACs spent for score, for score per time, and for time: what the clock says, and what the test images say."""
    model, x, cut, judged, base = trained(job)
    for target in job["targets"]:
        made = {objective: cut(macs=1 / target, **spent(objective), scope="allocated") for objective in OBJECTIVES}
        rows = timed(model, list(made.values()), x, {**job, "runtime": "eager"})
        for (way, small), row in zip(made.items(), rows, strict=True):
            yield {"target": target, "way": str(way), "base": base, **judged(small), **row}


def met(model: nn.Module, x: torch.Tensor, target: float, make: Callable[[float], nn.Module]) -> nn.Module:
    """The model of a ratio whose measured speedup is the target: bisection, each step timed against the original."""
    low, high, best = 0.0, 0.95, None
    for _ in range(7):
        middle = (low + high) / 2
        try:
            small = make(middle)
        except graphprune.errors.BadTarget:  # below what can be reached
            high = middle
            continue
        found = graphprune.measure(small, x, model, threads=1, seconds=1.5).speedup
        if best is None or abs(found / target - 1) < best[0]:
            best = abs(found / target - 1), small
        if best[0] < 0.01:
            break
        low, high = (middle, high) if found < target else (low, middle)
    return best[1]


JOBS = {"search": search, "fresh": fresh, "peer": peer, "accuracy": accuracy, "objectives": objectives}

# --- the parent: which jobs there are, their rows, the report ------------------------------------------------------------


def planned(options: argparse.Namespace) -> list[dict]:
    """Jobs in the order of what they tell."""
    common = {
        "side": options.side,
        "batch": options.batch,
        "device": options.device,
        "half": options.half,
        "targets": options.targets,
        "folder": str(options.folder),
        "measure": options.seconds,
    }
    jobs = []
    for runtime in options.runtimes:
        for model in options.models:
            cell = {"model": model, "runtime": runtime, **common}
            if "cells" in options.only:
                jobs += [{"job": "search", **cell}, {"job": "fresh", **cell}]
            if "peers" in options.only and runtime == "eager" and model not in ("minilm", "swin_t"):
                jobs.append({"job": "peer", **cell, "targets": options.peer_targets, "round_to": options.round_to})
    for name in [name for name in ("accuracy", "objectives") if name in options.only]:
        more = {"data": options.data, "every": options.every, "batch": 64, "criterion": options.criterion, "multiple_of": options.multiple_of}
        extra = [{"job": name, "model": m, "runtime": "eager", **common, "targets": options.accuracy_targets, **more} for m in options.accuracy_models]
        first = next((i for i, job in enumerate(jobs) if job["runtime"] == "compile"), len(jobs))
        jobs[first:first] = extra
    return jobs


def run(job: dict, options: argparse.Namespace) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(options.folder / "cache")}
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    start, rows = time.perf_counter(), []
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.job_limit, check=False)
        out, error = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out, error = late.stdout or "", f"over {options.job_limit} s"
        out = out.decode() if isinstance(out, bytes) else out
    for line in out.splitlines():
        if line.startswith("ROW "):
            rows.append({**{k: job[k] for k in KEYS}, **json.loads(line[4:])})
    if not rows:
        rows = [{**{k: job[k] for k in KEYS}, "target": 0, "why": error.strip().splitlines()[-1][:300] if error.strip() else ""}]
    return [{**row, "took": time.perf_counter() - start} for row in rows]


def named(row: dict) -> str:
    return " ".join(str(row.get(k, "")) for k in ("job", "model", "runtime", "target", "kind", "way") if row.get(k, "") != "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["cells", "peers", "accuracy", "objectives"], help="cells, peers, accuracy, objectives; or report alone")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--runtimes", nargs="*", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--targets", nargs="*", type=float, default=list(TARGETS))
    parser.add_argument("--peer-targets", nargs="*", type=float, default=[2.0])
    parser.add_argument("--batch", type=int, default=1, help="of cells and peers")
    parser.add_argument("--device", default="cpu", help="cuda: of cells in eager PyTorch and torch.compile")
    parser.add_argument("--half", action="store_true", help="float16 instead of float32")
    parser.add_argument("--side", type=int, default=224, help="pixels of the input (smaller: quicker cells)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of interleaved timing in a fresh process")
    parser.add_argument("--round-to", type=int, default=16, help="Torch-Pruning's own alignment")
    parser.add_argument("--data", help="folder of the trained models (accuracy)")
    parser.add_argument("--accuracy-models", nargs="*", default=["resnet20", "resnet56"])
    parser.add_argument("--accuracy-targets", nargs="*", type=float, default=[1.5, 1.25])
    parser.add_argument("--criterion", default="effect")
    parser.add_argument("--multiple-of", type=int, default=1)
    parser.add_argument("--every", type=int, default=2, help="take every n-th test image")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/graphprune-latency"), help="saved models and the table of timings")
    parser.add_argument("--json", type=Path, default=Path("latency.jsonl"))
    parser.add_argument("--limit", type=float, default=1e9, help="start no job after so many seconds")
    parser.add_argument("--job-limit", type=float, default=600)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        job = json.loads(options.worker)
        where = {"on": torch.cuda.get_device_name(), "torch": torch.__version__} if job["device"] == "cuda" else {}
        for row in JOBS[job["job"]](job):
            print("ROW", json.dumps({**row, **where}), flush=True)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = Rows(options.json)
    end = time.time() + options.limit
    for job in planned(options):
        done = {row["target"] for row in kept.rows if all(row.get(k, job[k]) == job[k] for k in KEYS) and not row.get("kind")}
        job["targets"] = [target for target in job["targets"] if target not in done]
        if not job["targets"] or 0 in done or time.time() > end:
            continue
        rows = run(job, options)
        for row in rows:
            facts = {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}
            print(named(row), facts, row.get("why", ""), flush=True)
            kept.add(row, shown=False)
    if options.out:
        from latency_report import write

        write(kept, options.out)


if __name__ == "__main__":
    main()
