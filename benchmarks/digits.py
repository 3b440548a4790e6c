"""The main job from end to end, on real data and in about a minute: train a residual CNN on scikit-learn's handwritten digits, shrink it to a share of
its MACs, repair it from unlabelled images, fine-tune it, measure it, and write an ONNX file and a report to look at.

python benchmarks/digits.py
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import common
import torch
from sklearn.datasets import load_digits
from torch import nn

import graphprune


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


def network() -> nn.Module:
    stem = [nn.Conv2d(1, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks = [Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1), Block(128, 256, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64)[: len(x) // 64]:
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def row(name: str, model: nn.Module, test: tuple[torch.Tensor, torch.Tensor]) -> list[str]:
    x, y = test
    return [name, f"{accuracy(model, x, y):.2%}", f"{common.parameters(model):,}", f"{common.macs(model, x[:1]) / 1e6:.1f} M"]


def exported(model: nn.Module, x: torch.Tensor, path: Path) -> float:
    """Write an ONNX file that takes any batch; the largest difference to what ONNX Runtime makes of it, on the whole batch."""
    import numpy as np
    import onnxruntime

    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # operators of torchvision, which need not be there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own exporter
        program = torch.onnx.export(model, (x[:2],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        return float(np.abs(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] - model(x).numpy()).max())


START = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.25, help="share of the MACs that stays")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder of the ONNX file and the report")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(data.target)[order]
    train_x, train_y, test = x[:1297], y[:1297], (x[1297:], y[1297:])
    model = network()
    say(f"training a residual CNN of {common.parameters(model):,} parameters on {len(train_x)} handwritten digits")
    for epoch in range(options.epochs):
        train(model, train_x, train_y, 1, 0.05 * (1 - epoch / options.epochs))
        say(f"  epoch {epoch + 1} of {options.epochs}: {accuracy(model, *test):.2%} of {len(test[0])} test images")
    rows = [row("before", model, test)]
    batches = train_x[:256].split(64)  # inputs alone: a repair needs no labels
    say(f"shrinking to {options.macs:.0%} of the MACs, scored on 256 training images")
    cut, plan = graphprune.shrink(model, train_x[:2], macs=options.macs, scope="global", score=graphprune.scores.effect.on(batches), return_plan=True)
    rows.append(row("after the cut", cut, test))
    say("repairing in closed form, from the same images and no labels")
    small = graphprune.repair(cut, model, plan, batches)
    rows.append(row("repaired", small, test))
    say("fine-tuning")
    tuned = graphprune.apply(small, graphprune.Plan({}, {}))  # a copy
    train(tuned, train_x, train_y, max(1, options.epochs // 4), 0.01)
    rows.append(row("fine-tuned", tuned, test))
    say("measuring 64 images on one thread, interleaved with the original")
    timing = graphprune.measure(tuned, test[0][:64], model, threads=1)
    options.out.mkdir(parents=True, exist_ok=True)
    gap = exported(tuned, test[0], options.out / "digits.onnx")
    say(f"wrote {options.out / 'digits.onnx'} (any batch; ONNX Runtime differs by {gap:.0e})")
    page = graphprune.report(model, train_x[:2], plan, options.out / "report.html", asked={"macs": options.macs}, measurement=timing)
    say(f"wrote {page}: open it in a browser")
    widths = [max(len(cells[i]) for cells in rows) for i in range(4)]
    head = ["", "accuracy", "parameters", "MACs"]
    print("\n" + "\n".join("  ".join(f"{cell:>{max(wide, len(top))}}" for cell, wide, top in zip(cells, widths, head, strict=True)) for cells in [head, *rows]))
    assert timing.reference is not None
    print(f"latency of 64 images: {timing.reference * 1e3:.2f} ms before, {timing}")


if __name__ == "__main__":
    main()
