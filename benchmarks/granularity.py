"""Every granularity on a trained CIFAR ResNet-20: what goes, the gap to the zeroed original, accuracy, and measured time.

python benchmarks/granularity.py --data ../shared/data --images 10000 --out docs/granularity.md
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from realdata import accuracy, cifar_resnet, load_cifar, normalise
from torch import nn

import graphprune
from graphprune.parts import Part, pack
from graphprune.positions import times

ROWS = [
    ("channel", 0.25),
    ("block", 0.15),
    ("layer", 0.15),
    ("group:box", 0.3),
    ("group", 0.3),
    ("kernel", 0.3),
    ("vector", 0.3),
    ("weight", 0.5),
    ("2:4", 0.5),
]


def interleaved(models: list[nn.Module], x: torch.Tensor, repeats: int) -> list[float]:
    """Median milliseconds of each model, measured in turn so that all see the same machine."""
    spent: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for turn in range(repeats + 3):
            for model, mine in zip(models, spent, strict=True):
                start = time.perf_counter()
                model(x)
                if turn >= 3:
                    mine.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(mine) for mine in spent]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--images", type=int, default=10000, help="test images for the accuracy")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = cifar_resnet(20, options.data)
    train_x, _, test_x, test_y = load_cifar(options.data)
    # The files are sorted by class: the first images would all be of one, and a model that always answers with it would look perfect.
    every = max(1, len(test_y) // options.images)
    test_x, test_y, mixed = test_x[::every], test_y[::every], normalise(train_x[:: len(train_x) // 256][:256])
    batch = normalise(test_x[:: len(test_x) // 16][:16])
    assert len(test_y.bincount()) == 10 and int(test_y.bincount().min()) == int(test_y.bincount().max())
    lines = [
        f"CIFAR-10 (JPEG), ResNet-20, no training after pruning; every {every}th test image ({len(test_y)}, all classes equally often).",
        f"Batch 16, one thread, torch {torch.__version__}.",
        "",
        "| granularity | ratio | parameters | zero or gone | gap to zeroed | accuracy | ms | original, in turn |",
        "|---|---|---|---|---|---|---|---|",
        f"| original | | {sum(p.numel() for p in model.parameters())} | 0 % | | {accuracy(model, test_x, test_y):.2f} % | | |",
    ]
    whole = sum(p.numel() for p in model.parameters())
    for granularity, ratio in ROWS:
        more = {"criterion": "influence", "batches": [mixed]} if granularity in ("block", "layer") else {}
        small, plan = graphprune.shrink(model, batch[:1], ratio, granularity=granularity, return_plan=True, **more)
        double, exact = graphprune.apply(model.double(), plan), graphprune.zeroed(model.double(), plan)
        with torch.no_grad():
            wanted = exact(batch[:2].double())[0]
            gap = float((double(batch[:2].double()) - wanted).abs().max() / wanted.abs().max())
        model.float()
        live = sum(p.numel() for p in small.parameters()) - sum(int((~m).sum()) for m in graphprune.masked(small).values())
        mine, before = interleaved([small, model], batch, options.repeats)
        held = sum(p.numel() for p in small.parameters())
        right = accuracy(small, test_x, test_y)
        lines.append(f"| {granularity} | {ratio} | {held} | {1 - live / whole:.2%} | {gap:.0e} | {right:.2f} % | {mine:.2f} | {before:.2f} |")
    lines += ["", "A wide 3x3 convolution (256 -> 256, 28 x 28, batch 1): the product of fewer columns against the stock convolution.", ""]
    lines += ["| columns left | product, ms | convolution, ms |", "|---|---|---|"]
    conv = nn.Conv2d(256, 256, 3, padding=1)
    for left in (0.5, 0.25, 0.1, 0.05, 0.02):
        columns = torch.rand(256, 3, 3, generator=torch.Generator().manual_seed(0)) < left
        stock, product = times(conv, Part("columns", "conv.weight", pack(columns)), (1, 256, 28, 28), 9)
        lines.append(f"| {left:.0%} | {product * 1e3:.2f} | {stock * 1e3:.2f} |")
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("# Granularities, measured\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
