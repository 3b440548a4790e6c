"""Cut before training and trained to the end: ResNet-20 on Fashion-MNIST, whole and slim, the same epochs for all.

    python benchmarks/scratch.py --out docs/scratch.md

Widths come from the scores at initialisation (SNIP on 128 labelled images, SynFlow on none) at equal MACs, beside the same share of every layer.
The images are those of the Debian package ``dataset-fashion-mnist``: 60,000 to train on, 10,000 to test. The networks take turns, epoch by
epoch, so that what disturbs the machine disturbs all. Every finished epoch is a line of ``--rows``.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from pathlib import Path

import torch
from common import Rows, macs
from realdata import CifarResNet, accuracy, load_fashion, normalise
from torch import nn

import graphprune

X = torch.zeros(1, 1, 28, 28)
BATCH, RATE, DECAY, WARM = 128, 0.1, 5e-4, 0.1


def networks(train: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, tuple[nn.Module, float]]:
    """Untrained networks by name, and the seconds that their cut took; all from the same initial weights."""
    torch.manual_seed(seed)
    whole = CifarResNet(20, channels=1)
    few = [(normalise(train[i : i + 32]), labels[i : i + 32]) for i in range(0, 128, 32)]
    made: dict[str, tuple[nn.Module, float]] = {"whole": (whole, 0.0)}
    snip = {"score": graphprune.scores.snip.on(few, nn.functional.cross_entropy), "scope": "global"}
    ways = {"the same share of every layer": {"score": "random"}, "snip": snip, "synflow": {"score": "synflow", "scope": "global"}}
    for name, fewer in (("the same share of every layer", 2), ("snip", 2), ("synflow", 2), ("snip", 4)):
        begin = time.perf_counter()
        small = graphprune.shrink(whole, X, macs=1 / fewer, widths=graphprune.Widths(multiple_of=4), verify=False, **ways[name])
        made[f"{name}, {fewer}x"] = small, time.perf_counter() - begin
    return made


def epoch(model: nn.Module, fast: nn.Module, optimizer: torch.optim.Optimizer, data: tuple, seed: int, number: int, epochs: int) -> tuple[float, float]:
    """Train for one epoch: mean loss and wall seconds. Every batch is shifted by up to two pixels, around the edge; every second one is flipped."""
    images, labels = data
    model.train()
    draw = torch.Generator().manual_seed(1000 * seed + number)
    order = torch.randperm(len(images), generator=draw)
    order = order[: len(order) // BATCH * BATCH].split(BATCH)
    total, begin = 0.0, time.perf_counter()
    for at, step in enumerate(order):
        now = (number + at / len(order)) / epochs
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (now + 1e-3) / WARM) * (1 + math.cos(math.pi * now)) / 2
        down, across = (int(n) for n in torch.randint(-2, 3, (2,), generator=draw))
        batch = normalise(images[step]).roll((down, across), (2, 3))
        batch = batch.flip(3) if at % 2 else batch
        loss = nn.functional.cross_entropy(fast(batch.to(memory_format=torch.channels_last)), labels[step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    return total / len(order), time.perf_counter() - begin


def table(rows: list[dict], options: argparse.Namespace) -> str:
    last = {row["network"]: row for row in rows if row["epoch"] == options.epochs}
    whole = last["whole"]
    lines = [
        "# Cut before training, trained to the end",
        "",
        f"Made by `python benchmarks/scratch.py --epochs {options.epochs}`; torch {torch.__version__}, one thread, float32, compiled. ResNet-20",
        f"on Fashion-MNIST, {options.epochs} epochs for every network (SGD, rate {RATE} with warm-up, cosine to zero, batch {BATCH}), seed",
        f"{options.seed}, all from the same initial weights. *Gap*: accuracy on 10,000 training images minus that on the 10,000 test images.",
        "Efficiency: faster over fewer MACs.",
        "",
        "| network | fewer MACs | parameters | cut, s | epoch, s | faster | efficiency | test, % | gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    seconds = {name: sorted(row["seconds"] for row in rows if row["network"] == name and row["epoch"] > (options.epochs > 1)) for name in last}
    for name, row in last.items():
        own = seconds[name][len(seconds[name]) // 2]
        faster, fewer = seconds["whole"][len(seconds["whole"]) // 2] / own, whole["macs"] / row["macs"]
        lines.append(
            f"| {name} | {fewer:.2f}x | {row['params']:,} | {row['cut']:.1f} | {own:.0f} | {faster:.2f}x | {faster / fewer:.2f} | "
            f"{row['test']:.2f} | {row['train'] - row['test']:.2f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="use only so many images (a trial)")
    parser.add_argument("--rows", type=Path, default=Path("scratch.jsonl"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train, labels, test, truth = (part[: options.images] for part in load_fashion())
    seen, test = normalise(train[:10000]), normalise(test)
    nets = []
    for name, (net, cut) in networks(train, labels, options.seed).items():
        net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
        size = {"macs": macs(net.eval(), X), "params": sum(p.numel() for p in net.parameters()), "cut": cut}
        nets.append((name, net, torch.compile(net), optimizer, size))
    kept = Rows(options.rows)
    for number in range(options.epochs):
        for name, net, fast, optimizer, size in nets:
            loss, seconds = epoch(net, fast, optimizer, (train, labels), options.seed, number, options.epochs)
            right = {"test": accuracy(net.eval(), test, truth), "train": accuracy(net, seen, labels[:10000])}
            kept.add({"network": name, "epoch": number + 1, "loss": loss, "seconds": seconds, **right, **size})
    text = table(kept.rows, options)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
