"""Every granularity: what was asked and reached, the gap to the zeroed original, accuracy, and time measured side by side.

python benchmarks/granularity.py --data ../shared/data --out docs/granularity.md
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import common
import torch
from realdata import accuracy, cifar_resnet, load_cifar, normalise
from torch import nn
from zoo_support import declare_operators

import graphprune
from graphprune.cutting.parts import Part, pack
from graphprune.granularity.positions import times

SHARE = 0.7
CONVOLUTIONS = ["channel", "block", "layer", "group:box", "group", "kernel", "vector", "weight", "2:4"]
TRANSFORMER = ["channel", "head", "block", "layer", "weight", "2:4"]
HEAD = "| granularity | asked | reached | parameters stored | gap to zeroed | change of the output |"
TIME = " ms | original, in turn | speed | band |"


def goal(granularity: str) -> dict[str, Any]:
    """What is asked: the same share of parameters of every granularity, but n:m says itself how much, and heads are not that much of a model."""
    return {"ratio": 1 / 3} if granularity == "head" else {} if granularity == "2:4" else {"params": SHARE}


def asked(granularity: str) -> str:
    return {"head": "1/3 of the heads", "2:4": "2 of 4 stay"}.get(granularity, f"{SHARE:.0%} of the parameters")


def reached(model: nn.Module, granularity: str, plan: graphprune.Plan, left: int) -> str:
    if granularity == "2:4":
        keep = torch.cat([mask.ravel() for name, mask in plan.masks(model).items() if any(part.name == name for part in plan.parts)])
        return f"{keep.double().mean():.2%} of the masked weights"
    return f"{left / sum(p.numel() for p in model.parameters()):.2%} of the parameters"


def live(model: nn.Module) -> int:
    """Parameters that are there and not masked."""
    return sum(p.numel() for p in model.parameters()) - sum(int((~mask).sum()) for mask in graphprune.masked(model).values())


def exactness(model: nn.Module, plan: graphprune.Plan, x: torch.Tensor) -> tuple[float, float]:
    """In float64, relative to the largest output: the distance to the zeroed original, and (the control) to the original."""
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        found, original, wanted = graphprune.apply(wide, plan)(x.double()), wide(x.double()), graphprune.zeroed(wide, plan)(x.double())[0]
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / scale, float((found - original).abs().max()) / scale


def rows(
    model: nn.Module, x: torch.Tensor, names: list[str], data: list[torch.Tensor], judge: Callable[[nn.Module], str], seconds: float, threads: int
) -> list[str]:
    lines = []
    for granularity in names:
        more = {"score": graphprune.scores.on("influence", data)} if granularity in ("block", "layer") else {}
        small, plan = graphprune.shrink(model, x[:1], what=granularity, return_plan=True, **more, **goal(granularity))
        gap, change = exactness(model, plan, x[:2])
        found = graphprune.measure(small, x, model, threads=threads, seconds=seconds)
        low, high = found.band
        line = f"| {granularity} | {asked(granularity)} | {reached(model, granularity, plan, live(small))} | {sum(p.numel() for p in small.parameters()):,} "
        line += f"| {gap:.0e} | {change:.0e} {judge(small, plan)}| {found.seconds * 1e3:.2f} | {found.reference * 1e3:.2f} "
        lines.append(line + f"| {found.speedup:.2f}x | {low:.2f} to {high:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--images", type=int, default=2000, help="test images for the accuracy")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for one comparison of times, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = cifar_resnet(20, options.data)
    train_x, _, test_x, test_y = load_cifar(options.data)
    # The files are sorted by class: the first images would all be of one, and a model that always answers with it would look perfect.
    every = max(1, len(test_y) // options.images)
    test_x, test_y, mixed = test_x[::every], test_y[::every], normalise(train_x[:: len(train_x) // 512][:512])
    batch = normalise(test_x[:: len(test_x) // 16][:16])
    assert len(test_y.bincount()) == 10 and int(test_y.bincount().min()) == int(test_y.bincount().max())
    calibration = list(mixed.split(64))

    def judge(small: nn.Module, plan: graphprune.Plan) -> str:
        again = graphprune.repair(small, model, plan, calibration, "bn", progress=False)
        return f"| {accuracy(small, test_x, test_y):.2f} % | {accuracy(again, test_x, test_y):.2f} % "

    known = f"ResNet-20 on CIFAR-10 (JPEG), {sum(p.numel() for p in model.parameters()):,} parameters, {accuracy(model, test_x, test_y):.2f} % of every "
    lines = [
        f"{known}{every}th test image ({len(test_y)}, all classes equally often). No training after pruning; `bn`: batch-norm statistics measured",
        f"anew on {len(mixed)} training images without labels. Batch {len(batch)}, {options.threads} thread, torch {torch.__version__}.",
        "Scores: l2 of the weights; block influence on those images for blocks and layers.",
        "",
        f"{HEAD} accuracy | with `bn` |{TIME}",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows(model, batch, CONVOLUTIONS, calibration, judge, options.seconds, options.threads),
    ]
    declare_operators()
    import timm

    vit = timm.create_model("deit_tiny_patch16_224", num_classes=1000).eval()
    photos = torch.randn(2, 3, 224, 224)
    lines += [
        "",
        f"A vision transformer (DeiT-Tiny, {sum(p.numel() for p in vit.parameters()):,} parameters, 3 heads in each of 12 blocks).",
        "Random weights, so no accuracy. Batch 2, 224 x 224.",
        "",
        f"{HEAD}{TIME}",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows(vit, photos, TRANSFORMER, [photos], lambda *_: "", options.seconds, options.threads),
        "",
        "A wide 3x3 convolution (256 -> 256, 28 x 28, batch 1): the product of fewer (channel, tap) columns against the stock convolution, measured in turn.",
        '`what="group"` takes the product only in layers where such a measurement on the user\'s machine says that it is faster.',
        "",
        "| columns left | product, ms | convolution, ms |",
        "|---|---|---|",
    ]
    conv = nn.Conv2d(256, 256, 3, padding=1)
    for left in (0.5, 0.25, 0.1, 0.05, 0.02):
        columns = torch.rand(256, 3, 3, generator=torch.Generator().manual_seed(0)) < left
        stock, product = times(conv, Part("columns", "conv.weight", pack(columns)), (1, 256, 28, 28))
        lines.append(f"| {left:.0%} | {product * 1e3:.2f} | {stock * 1e3:.2f} |")
    lines += [
        "",
        "Gap: largest difference to the zeroed original in float64, relative to the largest output; beside it, as control, the difference to the original.",
        "Masked rows (kernel, vector, weight, n:m, and group where no measurement favours the product) store and multiply zeros: stock hardware does not run",
        "them faster, and each call applies the mask; `graphprune.bake` removes that cost. 2:4 masks of linear layers become semi-structured tensors on CUDA",
        "devices of compute capability 8.0 or more (`graphprune.semi_structured`); that path is not measured here.",
    ]
    if options.out:
        with open(options.out, "w") as file:
            file.write(f"# Granularities, measured\n\n{common.made_by('python benchmarks/granularity.py')}\n\n" + "\n".join(lines) + "\n")
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
