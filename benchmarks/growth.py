"""How the time of a cut grows with the number of groups: every budget, scope and layers, on a chain and on concatenations.

    python benchmarks/growth.py --rows growth.jsonl --out docs/growth.md

Seconds of the processor from model to cut model, without the self-check, one run each, one thread. The exponent is the slope of a line
through the logarithms (least squares). A case of which one size took more than ``--most`` seconds is not run at larger ones.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from pathlib import Path

import torch
from common import Rows, made_by
from torch import nn

import graphprune

WIDTH = 8


class Branches(nn.Module):
    """One concatenation of many branches."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.branches, self.head = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count)), nn.Linear(WIDTH * count, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([branch(x) for branch in self.branches], 1))


class Dense(nn.Module):
    """Every layer reads all before it: the graph has as many edges as layers, squared, and half."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(WIDTH + 4 * at, 4) for at in range(depth)), nn.Linear(WIDTH + 4 * depth, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(x)


def chain(depth: int) -> nn.Module:
    layers = [module for _ in range(depth) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


def bottle(depth: int) -> nn.Module:
    """A chain that is wider inside than at its ends, so that what is alive at its peak can shrink."""
    inside = [module for _ in range(depth) for module in (nn.Linear(2 * WIDTH, 2 * WIDTH), nn.ReLU())]
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), *inside, nn.Linear(2 * WIDTH, 4))


SIZES = (100, 300, 1000, 3000, 5000)
# Title: the model, the sizes, and what is asked for.
CASES = {
    "ratio": (chain, SIZES, {"ratio": 0.5}),
    "macs": (chain, SIZES, {"macs": 0.5}),
    "params": (chain, SIZES, {"params": 0.5}),
    "size": (chain, SIZES, {"size": 0.5}),
    "memory": (bottle, SIZES, {"memory": 0.75}),
    "macs, global": (chain, SIZES, {"macs": 0.5, "scope": "global"}),
    "macs, allocated": (chain, SIZES, {"macs": 0.5, "scope": "allocated"}),
    "memory, allocated": (bottle, SIZES, {"memory": 0.75, "scope": "allocated"}),
    "layers": (chain, SIZES, {"what": "layer", "ratio": 0.5}),
    "layers, macs": (chain, SIZES, {"what": "layer", "macs": 0.5}),
    "concatenation, ratio": (Branches, (100, 300, 1000, 2000), {"ratio": 0.5}),
    "concatenation, macs": (Branches, (100, 300, 1000, 2000), {"macs": 0.5}),
    "concatenation, macs, allocated": (Branches, (100, 300, 1000, 2000), {"macs": 0.5, "scope": "allocated"}),
    "dense, ratio": (Dense, (50, 100, 200, 400), {"ratio": 0.5}),
    "dense, macs": (Dense, (50, 100, 200, 400), {"macs": 0.5}),
}


def seconds(build, size: int, asked: dict) -> float:
    torch.manual_seed(0)
    model, x = build(size).eval(), torch.randn(1, WIDTH)
    start = time.process_time()
    graphprune.shrink(model, x, verify=False, **asked)
    return time.process_time() - start


def exponent(points: list[tuple[int, float]]) -> float:
    """The slope of a line through the logarithms.

    >>> round(exponent([(10, 2.0), (100, 200.0)]), 3)
    2.0
    """
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def table(rows: list[dict]) -> list[str]:
    lines = ["| asked for | model | sizes | seconds | exponent |", "|---|---|---|---|---|"]
    for title, (build, _, _) in CASES.items():
        points = sorted((row["size"], row["seconds"]) for row in rows if row["case"] == title)
        if len(points) > 1:
            sizes, times = ", ".join(str(size) for size, _ in points), ", ".join(f"{each:.2f}" for _, each in points)
            lines.append(f"| {title} | {build.__name__.lower()} | {sizes} | {times} | {exponent(points):.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="a file of rows, which a stopped run continues")
    parser.add_argument("--only", nargs="*", help="cases to run")
    parser.add_argument("--largest", type=int, default=max(SIZES))
    parser.add_argument("--most", type=float, default=60, help="seconds of one size after which larger ones are left out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(options.rows)
    graphprune.shrink(chain(4), torch.randn(1, WIDTH), macs=0.5)  # imports and first calls
    for size in sorted({size for _, sizes, _ in CASES.values() for size in sizes if size <= options.largest}):
        for title, (build, sizes, asked) in CASES.items():
            slow = any(row["case"] == title and row["seconds"] > options.most for row in rows.rows)
            known = any(row["case"] == title and row["size"] == size for row in rows.rows)
            if size in sizes and not slow and not known and (not options.only or title in options.only):
                rows.add({"case": title, "size": size, "seconds": seconds(build, size, asked)})
    print("\n".join(table(rows.rows)))
    if options.out:
        made = made_by(f"python benchmarks/growth.py --out {options.out}", "numpy", rows=rows)
        text = (
            "Seconds of the processor from model to cut model (trace, couple, score, choose, plan, cut; without the self-check), one thread, "
            "one run each. Sizes are layers of a chain (as many groups), branches of one concatenation, layers of a dense network. A dense "
            "network of n layers has n²/2 edges (and weights), so its exponent in the size of its graph is half of the one given."
        )
        options.out.write_text("\n".join(["# Growth with the number of groups", "", made, "", text, "", *table(rows.rows), ""]))


if __name__ == "__main__":
    main()
