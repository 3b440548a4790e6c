"""From model to pruned model, side by side with Torch-Pruning in one run; growth with depth; a 7B shape without weights.

    python benchmarks/engine.py --out docs/engine.md

Both remove half of every group by L2 norm. Times are medians of ``--repeats`` runs, one thread, alternating.
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from zoo_support import declare_operators  # noqa: E402

import graphprune  # noqa: E402

MODELS = """alexnet vgg11 resnet18 resnet34 resnet50 resnet101 wide_resnet50_2 densenet121 densenet169 densenet201 googlenet
squeezenet1_0 mobilenet_v2 mnasnet1_0 mobilenet_v3_large efficientnet_b0 regnet_x_400mf regnet_y_400mf resnext50_32x4d convnext_tiny inception_v3""".split()


def ours(model: nn.Module, x: torch.Tensor, verify: bool = False) -> None:
    graphprune.shrink(model, x, 0.5, verify=verify)


def theirs(model: nn.Module, x: torch.Tensor) -> None:
    import torch_pruning as tp

    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    tp.pruner.MagnitudePruner(model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=heads).step()


def timed(function, model: nn.Module, x: torch.Tensor) -> float:
    model = copy.deepcopy(model)
    start = time.perf_counter()
    function(model, x)
    return time.perf_counter() - start


def compare(repeats: int) -> list[str]:
    from torchvision import models

    rows, ratios = ["| model | graphprune s | with self-check s | Torch-Pruning s | ratio |", "|---|---|---|---|---|"], []
    for name in MODELS:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, **extra).eval()
        x = torch.randn(1, 3, 299 if name == "inception_v3" else 224, 299 if name == "inception_v3" else 224)
        mine, checked, other = [], [], []
        try:
            for _ in range(repeats):
                mine.append(timed(ours, model, x))
                checked.append(timed(lambda m, x: ours(m, x, True), model, x))
                other.append(timed(theirs, model, x))
        except Exception as error:
            rows.append(f"| {name} | | | {type(error).__name__} | |")
            continue
        a, b, c = map(statistics.median, (mine, checked, other))
        ratios.append(c / a)
        rows.append(f"| {name} | {a:.3f} | {b:.3f} | {c:.3f} | {c / a:.1f}x |")
        print(rows[-1], flush=True)
    return [*rows, "", f"Median over {len(ratios)} models: {statistics.median(ratios):.1f}x faster without the self-check."]


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
    _, plan = graphprune.shrink(model, {"input_ids": torch.tensor([[1, 2, 3, 4]])}, 0.5, criterion="random", verify=False, return_plan=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(p.numel() for p in model.parameters())
    line = f"7B LLaMA shape ({count / 1e9:.2f} G parameters) on the meta device: model to plan and cut in {seconds:.1f} s, "
    return [line + f"peak memory of the process {peak / 2**20:.2f} GiB (before: {before / 2**20:.2f}), {len(plan.cuts)} tensors cut."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    declare_operators()
    seven = seven_billion()
    print(seven[0], flush=True)
    parts = [*seven, "", *growth(), "", *compare(options.repeats)]
    if options.out:
        made = f"Made by `python benchmarks/engine.py --out {options.out}`; torch {torch.__version__}, Torch-Pruning 1.6.1, one thread."
        options.out.write_text("\n".join(["# Engine speed", "", made, "", *parts, ""]))


if __name__ == "__main__":
    main()
