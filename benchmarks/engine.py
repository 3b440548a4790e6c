"""From model to pruned model, side by side with Torch-Pruning in one run; growth with depth; a 7B shape without weights.

    python benchmarks/engine.py --rows engine.jsonl --out docs/engine.md

Both remove half of every group by L2 norm. Times are medians of ``--repeats`` runs: seconds of the processor, one thread, alternating,
a process for each model.
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import signal
import statistics
import time
import warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import common
import torch
from torch import nn
from zoo_support import declare_operators

import graphprune

# One or two members of every family of torchvision's classifiers (their own code, plain to both engines), and from timm dense, high-resolution,
# token and pooling architectures. Chosen before measuring; a model that either side cannot cut into one that runs stays in the table, uncounted.
MODELS = """alexnet vgg11 resnet18 resnet50 resnet101 wide_resnet50_2 resnext50_32x4d densenet121 densenet169 densenet201 googlenet inception_v3
squeezenet1_0 mobilenet_v2 mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf
convnext_tiny vit_b_16 swin_t maxvit_t""".split()
TIMM = """dla34 hrnet_w18_small vovnet39a darknet53 inception_v4 hgnet_tiny convmixer_768_32 vit_tiny_patch16_224 deit3_small_patch16_224
mixer_s16_224 resmlp_12_224 poolformer_s12""".split()


def ours(model: nn.Module, x: torch.Tensor, verify: bool = False) -> nn.Module:
    return graphprune.shrink(model, x, 0.5, verify=verify)


def theirs(model: nn.Module, x: torch.Tensor) -> None:
    heads = [m for m in model.modules() if 1000 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    common.torch_pruned(model, x, 0.5, heads)


def timed(function, model: nn.Module, x: torch.Tensor) -> float:
    model = copy.deepcopy(model)
    start = time.process_time()
    made = function(model, x)
    seconds = time.process_time() - start
    del made  # giving its memory back is no part of making it
    return seconds


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    side = 299 if name.startswith("inception") else 224
    if name in TIMM:
        import timm

        return timm.create_model(name).eval(), torch.randn(1, 3, side, side)
    from torchvision import models

    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **extra).eval(), torch.randn(1, 3, side, side)


def _stop(*_) -> None:
    raise TimeoutError("stopped, it took too long")


def handles(function, model: nn.Module, x: torch.Tensor, most: int = 100) -> tuple[str, float]:
    """Empty when the model that comes out runs, is smaller and keeps its output's shape, else what went wrong; and the seconds. Warms up, too.

    Stopped after ``most`` seconds.
    """
    small = copy.deepcopy(model)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(most)
    start = time.perf_counter()
    try:
        small = function(small, x) or small
        seconds = time.perf_counter() - start
        with torch.no_grad():
            same = small(x).shape == model(x).shape
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:80], time.perf_counter() - start
    finally:
        signal.alarm(0)
    return ("" if same and count(small) < count(model) else "not smaller" if same else "another output shape"), seconds


def prepare() -> None:
    """What every process that measures does first."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    declare_operators()


def measured(name: str, repeats: int, limit: float, most: int) -> dict:
    """The seconds of both, and why either does not handle the model."""
    model, x = build(name)
    wrong, first = handles(theirs, model, x, most)
    failed = [f"{who}: {why}" for who, why in (("graphprune", handles(ours, model, x)[0]), ("Torch-Pruning", wrong)) if why]
    times: dict[str, list[float]] = {"plain": [], "checked": [], "peer": [first] if first >= limit else []}
    for _ in range(repeats):
        times["plain"].append(timed(ours, model, x))
        times["checked"].append(timed(partial(ours, verify=True), model, x))
        if not wrong and first < limit:
            times["peer"].append(timed(theirs, model, x))
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    return {"model": name, **medians, "failed": "; ".join(failed).replace("|", "/")}


def compare(repeats: int, names: list[str], limit: float, most: int, rows: common.Rows) -> None:
    """A row for each model. Every model has a fresh process of its own: what an earlier one left in memory slows the next one's pages down, for either."""
    todo = [name for name in names if name not in rows.by("model")]
    with get_context("spawn").Pool(1, prepare, maxtasksperchild=1) as pool:
        for row in pool.imap(partial(measured, repeats=repeats, limit=limit, most=most), todo):
            rows.add(row)


def table(rows: list[dict]) -> list[str]:
    lines = ["| model | with check s | without s | Torch-Pruning s | with check | without |", "|---|---|---|---|---|---|"]
    ratios: list[tuple[float, float]] = []
    for row in rows:
        start = f"| {row['model']} | {row['checked']:.3f} | {row['plain']:.3f} |"
        if row["failed"]:
            lines.append(f"{start} {row['failed']} | | |")
            continue
        ratios.append((row["peer"] / row["checked"], row["peer"] / row["plain"]))
        lines.append(f"{start} {row['peer']:.3f} | {ratios[-1][0]:.1f}x | {ratios[-1][1]:.1f}x |")
    if not ratios:
        return lines
    with_check, without = (statistics.median(column) for column in zip(*ratios, strict=True))
    slower = sum(pair[0] < 1 for pair in ratios)
    both = f"{with_check:.1f}x as fast with the check (the default; slower in {slower}), {without:.1f}x without"
    text = f"Median over {len(ratios)} models that both handle: {both}."
    return [*lines, "", text]


class Chain(nn.Module):
    def __init__(self, depth: int, width: int, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        grown = [width + i * 8 if dense else width for i in range(depth)]
        self.convs = nn.ModuleList(nn.Conv2d(n, 8 if dense else width, 3, padding=1) for n in grown)
        self.head = nn.Linear(width + depth * 8 if dense else width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = torch.cat([x, conv(x).relu()], 1) if self.dense else x + conv(x).relu()
        return self.head(x.mean((2, 3)))


def growth() -> list[str]:
    rows = ["| what grows | sizes | seconds | exponent in the size of the graph |", "|---|---|---|---|"]
    cases = {
        "residual chain (depth)": [(d, Chain(d, 16, False), 16, d) for d in (16, 32, 64, 128)],
        "dense chain (depth)": [(d, Chain(d, 16, True), 16, d * (d + 1) / 2) for d in (16, 32, 64, 128)],
        "width": [(w, Chain(8, w, False), w, w) for w in (64, 128, 256, 512)],
    }
    for title, sizes in cases.items():
        points = []
        for label, model, width, size in sizes:
            stem = nn.Sequential(nn.Conv2d(3, width, 1), model)
            x = torch.randn(1, 3, 8, 8)
            points.append((label, size, statistics.median(_plan_time(stem, x) for _ in range(3))))
        logs = [(math.log(s), math.log(t)) for _, s, t in points]
        mx, my = (statistics.mean(v) for v in zip(*logs, strict=True))
        slope = sum((a - mx) * (b - my) for a, b in logs) / sum((a - mx) ** 2 for a, _ in logs)
        rows.append(f"| {title} | {', '.join(str(p[0]) for p in points)} | {', '.join(f'{p[2]:.2f}' for p in points)} | {slope:.2f} |")
        print(rows[-1], flush=True)
    return [*rows, "", "Size: layers for the residual chain, edges (every concatenated input) for the dense one, channels for width."]


def _plan_time(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    groups = graphprune.couple(graphprune.trace(model, x))
    graphprune.select(groups, graphprune.score(groups, model), 0.5)
    return time.perf_counter() - start


def seven_billion() -> list[str]:
    import transformers

    config = transformers.LlamaConfig(use_cache=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    _, plan = graphprune.shrink(model, {"input_ids": torch.tensor([[1, 2, 3, 4]])}, 0.5, score="random", verify=False, return_plan=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(p.numel() for p in model.parameters())
    line = f"7B LLaMA shape ({count / 1e9:.2f} G parameters) on the meta device: model to plan and cut in {seconds:.1f} s, "
    return [line + f"peak memory of the process {peak / 2**20:.2f} GiB (before: {before / 2**20:.2f}), {len(plan.cuts)} tensors cut."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of models to compare, nothing else")
    parser.add_argument("--limit", type=float, default=20, help="seconds of the peer above which its first run is its time")
    parser.add_argument("--most", type=int, default=100, help="seconds after which the peer is stopped: it does not handle the model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=Path, help="a file of rows, which a stopped run continues")
    options = parser.parse_args()
    prepare()
    rows = common.Rows(options.rows)
    compare(options.repeats, MODELS + TIMM if options.only is None else options.only, options.limit, options.most, rows)
    print("\n".join(table(rows.rows)))
    if options.out:
        made = f"{common.made_by(f'python benchmarks/engine.py --out {options.out}', 'torch-pruning', 'torchvision', 'timm', rows=rows)} One thread."
        parts = [*seven_billion(), "", *growth(), "", *table(rows.rows)]
        options.out.write_text("\n".join(["# Engine speed", "", made, "", *parts, ""]))


if __name__ == "__main__":
    main()
