"""Train a residual CNN on scikit-learn's handwritten digits, shrink it, fine-tune briefly, and print what was gained.

python benchmarks/digits.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


def macs(model: nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def latencies(models: list[nn.Module], x: torch.Tensor, repeats: int = 31) -> list[float]:
    """Median milliseconds of each model, measured in turn so that all see the same machine."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(repeats):
            for model, mine in zip(models, times, strict=True):
                start = time.perf_counter()
                model(x)
                mine.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(mine) for mine in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    data = load_digits()
    order = torch.randperm(len(data.target))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(data.target)[order]
    train_x, train_y, test_x, test_y = x[:1297], y[:1297], x[1297:], y[1297:]
    model = network()
    train(model, train_x, train_y, options.epochs, 0.05)
    small = graphprune.shrink(model, test_x[:1], ratio=options.ratio)
    cut = accuracy(small, test_x, test_y)
    train(small, train_x, train_y, max(1, options.epochs // 2), 0.02)
    rows = [(n, accuracy(m, test_x, test_y), sum(p.numel() for p in m.parameters()), macs(m, test_x[:1])) for n, m in (("before", model), ("after", small))]
    speed = latencies([model, small], test_x[:64])
    print(f"{'':8}{'accuracy':>10}{'parameters':>12}{'MMACs':>8}{'ms / 64 images':>16}")
    for (name, right, params, mac), ms in zip(rows, speed, strict=True):
        print(f"{name:8}{right:>10.2%}{params:>12,}{mac / 1e6:>8.1f}{ms:>16.1f}")
    print(f"accuracy right after the cut {cut:.2%}; {speed[0] / speed[1]:.2f}x faster with {options.threads} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
