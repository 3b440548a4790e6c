"""Pruned and fine-tuned on CIFAR-10 (JPEG), side by side with Torch-Pruning at equal MACs and equal epochs; training time of pruned networks.

    python benchmarks/loop.py --data DIR --folder runs --out docs/loop-measured.md
    python benchmarks/loop.py --data DIR --folder runs --epoch-times --out docs/loop-measured.md

ResNet-56 loses channels inside its blocks. Ours: ``graphprune.iterate`` with one round (criterion ``effect``, widths by MACs, closed-form repair on 512
training images without labels), then training with the original's logits. Torch-Pruning 1.6 (needs ``pip install torch-pruning``): the best of its
criteria, chosen on training images after batch-norm re-estimation, at no fewer MACs than ours; trained on labels as its recipe does, and a second
time with the original's logits. All runs see the same images in the same order with the same augmentations and the same schedule. Every epoch is
kept in ``--folder`` (a line in ``loop.jsonl``, and the state of the run): call again to go on after a kill.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import accuracy as oneshot  # noqa: E402
import realdata  # noqa: E402

import graphprune  # noqa: E402
from graphprune.distill import soften  # noqa: E402

X = torch.zeros(1, 3, 32, 32)
RUNS = ("ours/2.1", "peer/2.1", "ours/2.6", "peer/2.6", "peer-distilled/2.1", "peer-distilled/2.6", "original/1")
BATCH, WARM, DECAY = 128, 0.1, 5e-4
TEMPERATURE, SOFT = 4.0, 0.5
Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Log:
    """Rows by run and epoch, appended to a file; a row written twice counts once, the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[str, dict]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {row["key"]: row for row in map(json.loads, (line for line in lines if line.endswith("}")))}

    def add(self, key: str, **row: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **row}) + "\n")
        print(key, {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, flush=True)


def replaced(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and rename: it is whole or as it was."""
    part = path.with_name(f".{path.name}")
    write(part)
    os.replace(part, path)


# -- data ------------------------------------------------------------------------------------------------------------------------


def load(options: argparse.Namespace) -> Images:
    train, labels, test, truth = realdata.load_cifar(options.data)
    mixed = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: options.images]  # the file is sorted by class
    return train[mixed], labels[mixed], test[: options.images], truth[: options.images]


def epoch_of(data: Images, seed: int, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Positions, shifts and flips of every batch of one epoch; the same for all runs."""
    draw = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(data[0]), generator=draw)
    order = order[: len(order) // BATCH * BATCH]
    shifts, flips = torch.randint(9, (len(order), 2), generator=draw), torch.rand(len(order), generator=draw) < 0.5
    return list(zip(order.split(BATCH), shifts.split(BATCH), flips.split(BATCH), strict=True))


def augmented(images: torch.Tensor, shifts: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Random crops of the padded images, flipped at random; normalised."""
    wide = nn.functional.pad(images, (4, 4, 4, 4))
    rows, columns = shifts[:, :1] + torch.arange(32), shifts[:, 1:] + torch.arange(32)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    cut = wide[torch.arange(len(images))[:, None, None, None], torch.arange(3)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    return realdata.normalise(cut).to(memory_format=torch.channels_last)


def taught(data: Images, options: argparse.Namespace, epoch: int) -> torch.Tensor:
    """The original's logits for the augmented images of one epoch, batch by batch; made once for all runs."""
    path = options.folder / f"logits-{options.depth}-{options.seed}-{epoch}-{len(data[0])}.pt"
    if not path.exists():
        teacher = realdata.cifar_resnet(options.depth, options.data).to(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = [teacher(augmented(data[0][at], *how)).float() for at, *how in epoch_of(data, options.seed, epoch)]
        replaced(path, lambda part: torch.save(torch.stack(found), part))
    return torch.load(path)


@torch.no_grad()
def top1(model: nn.Module, x: torch.Tensor, y: torch.Tensor, low: bool = False) -> float:
    """Top-1 in per cent; ``low`` computes in bfloat16."""
    mode, right = model.training, 0
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        for images, labels in zip(x.split(500), y.split(500), strict=True):
            right += int((model(realdata.normalise(images).to(memory_format=torch.channels_last)).argmax(1) == labels).sum())
    model.train(mode)
    return 100 * right / len(y)


# -- training --------------------------------------------------------------------------------------------------------------------


def tune(model: nn.Module, run: str, data: Images, options: argparse.Namespace, log: Log, distilled: bool) -> nn.Module:
    """SGD with momentum, a warm-up and a cosine to zero; bfloat16 products, the weights in float32; goes on where it was killed."""
    path = options.folder / f"{run.replace('/', '-')}.pt"
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), options.rate, momentum=0.9, weight_decay=DECAY, nesterov=True)
    steps = options.epochs * (len(data[0]) // BATCH)
    done = 0
    if path.exists():
        held = torch.load(path)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        done = held["epoch"]
    fast = torch.compile(model) if options.compile else model
    for epoch in range(done, options.epochs):
        answers = taught(data, options, epoch) if distilled else None
        wall, cpu, total = time.perf_counter(), time.process_time(), 0.0
        for number, (at, *how) in enumerate(epoch_of(data, options.seed, epoch)):
            now = (epoch * (len(data[0]) // BATCH) + number) / steps
            for group in optimizer.param_groups:
                group["lr"] = options.rate * min(1.0, (now + 1 / steps) / WARM) * (1 + math.cos(math.pi * now)) / 2
            with torch.autocast("cpu", torch.bfloat16):
                outputs = fast(augmented(data[0][at], *how))
            loss = nn.functional.cross_entropy(outputs.float(), data[1][at])
            if answers is not None:
                loss = (1 - SOFT) * loss + SOFT * soften(outputs.float(), answers[number], TEMPERATURE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        last = epoch + 1 == options.epochs
        log.add(f"{run}/{epoch + 1}", loss=total / (number + 1), test=top1(model, data[2], data[3], low=not last), **spent)
        replaced(path, lambda part, at=epoch + 1: torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": at}, part))
    return model.eval()


def calibration(data: Images) -> list[torch.Tensor]:
    return list(realdata.normalise(data[0][:512]).split(128))


def ours(run: str, factor: float, data: Images, options: argparse.Namespace, log: Log) -> nn.Module:
    original, images = realdata.cifar_resnet(options.depth, options.data), calibration(data)
    seconds = time.perf_counter()
    known: list = []

    def effect(groups, model, batches):
        if not known:
            known.append(graphprune.score(groups, model, "effect", images, progress=False))
        return known[0]

    def evaluate(model: nn.Module) -> float:
        return top1(model, data[2], data[3])

    def train(model: nn.Module, round: int) -> nn.Module:
        if f"{run}/0" not in log.rows():
            log.add(f"{run}/0", **start(model, data), how="effect, global, repaired", seconds=time.perf_counter() - seconds)
        return tune(model, run, data, options, log, distilled=True)

    more = {"criterion": effect, "scope": "global", "keep": oneshot.KEEP, "calibration": images, "verify": False}  # verified by the tests; here it is time
    folder = options.folder / run.replace("/", "-")
    return graphprune.iterate(original, X, {"macs": 1 / factor}, train=train, evaluate=evaluate, steps=1, checkpoint=folder, progress=False, **more).model


def start(model: nn.Module, data: Images) -> dict:
    size = {"macs": oneshot.macs(model.eval(), X), "params": sum(p.numel() for p in model.parameters())}
    return {**size, "test": top1(model, data[2], data[3])}


def peer(run: str, factor: float, data: Images, options: argparse.Namespace, log: Log) -> nn.Module:
    """Torch-Pruning's best cut, by training images after batch-norm re-estimation (which training does by itself)."""
    path = options.folder / f"peer-{factor}-cut.pt"
    if not path.exists():
        original, x = realdata.cifar_resnet(options.depth, options.data), realdata.normalise(data[0][:512])
        budget, best = oneshot.macs(original, X) / factor, None
        for globally, kinds in ((False, oneshot.LOCAL), (True, oneshot.GLOBAL)):
            for kind in kinds:
                small = oneshot.peer(original, kind, globally, budget, x, data[1][:512])
                right = top1(oneshot.reestimated(small, x), data[0][512:4512], data[1][512:4512], low=True)
                print(run, kind, "global" if globally else "local", right, oneshot.macs(small, X), flush=True)
                if best is None or right > best[0]:
                    best = (right, small, f"{kind}, {'global' if globally else 'layer by layer'}")
        assert best is not None
        replaced(path, lambda part: torch.save(best[1:], part))
    model, how = torch.load(path, weights_only=False)
    if f"{run}/0" not in log.rows():
        log.add(f"{run}/0", **start(model, data), how=how)
    return tune(model, run, data, options, log, distilled="distilled" in run)


def whole(run: str, _: float, data: Images, options: argparse.Namespace, log: Log) -> nn.Module:
    """The original, trained on with the same schedule."""
    model = realdata.cifar_resnet(options.depth, options.data)
    return tune(model, run, data, options, log, distilled=False)


def runs(data: Images, options: argparse.Namespace, log: Log) -> None:
    if "original/1/0" not in log.rows():
        model = realdata.cifar_resnet(options.depth, options.data)
        log.add("original/1/0", **start(model, data), train=top1(model, data[0][:10000], data[1][:10000]), how="as given")
    for run in options.runs:
        if f"{run}/end" in log.rows():
            continue
        side, factor = run.split("/")
        make = {"ours": ours, "peer": peer, "peer-distilled": peer, "original": whole}[side]
        model = make(run, float(factor), data, options, log)
        log.add(f"{run}/end", **start(model, data), train=top1(model, data[0][:10000], data[1][:10000]), epochs=options.epochs, rate=options.rate)


# -- time of a training step -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--folder", type=Path, default=Path("loop-runs"), help="rows, states of runs, stored logits")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", nargs="*", default=RUNS)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="use only so many images (a trial)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the training steps")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    log = Log(options.folder / "loop.jsonl")
    if options.runs:
        runs(load(options), options, log)


if __name__ == "__main__":
    main()
