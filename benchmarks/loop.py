"""Pruned and fine-tuned on CIFAR-10 (JPEG), side by side with Torch-Pruning at equal MACs and equal epochs; training time of pruned networks.

    python benchmarks/loop.py --json loop.json --out docs/loop-measured.md

Every job (one row) is written to ``--json`` when it is finished, and skipped when it is there: call again to go on. Parts: ``tune`` (fine-tuning),
``scratch`` (pruned before training), ``speed`` (time of a training step; wants a quiet machine), ``table`` (write ``--out`` from what is there).
"""

from __future__ import annotations

import argparse
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
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import realdata  # noqa: E402

import graphprune  # noqa: E402

X = torch.zeros(1, 3, 32, 32)
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def macs(model: nn.Module) -> int:
    mode = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(X)
    model.train(mode)
    return counter.get_total_flops() // 2


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Random crops of the padded images, flipped at random; normalised."""
    n = len(images)
    wide = nn.functional.pad(images, (4, 4, 4, 4))
    rows = torch.randint(9, (n, 1)) + torch.arange(32)
    columns = torch.randint(9, (n, 1)) + torch.arange(32)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    cut = wide[torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    return realdata.normalise(cut)


def train(model: nn.Module, data: Data, epochs: float, rate: float, seed: int = 0, distill: graphprune.Distillation | None = None, batch: int = 128) -> nn.Module:
    """SGD with momentum, a short warm-up and a cosine; bfloat16 products, the master weights in float32."""
    torch.manual_seed(seed)
    x, y = data[0], data[1]
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = int(epochs * len(x) // batch)
    warm = max(2, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / warm) * (1 + math.cos(math.pi * min(1.0, i / steps))) / 2)
    order = torch.cat([torch.randperm(len(x)) for _ in range(int(epochs) + 1)])
    for number in range(steps):
        picked = order[number * batch : (number + 1) * batch]
        images, labels = augmented(x[picked]).to(memory_format=torch.channels_last), y[picked]
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images)
            loss = nn.functional.cross_entropy(outputs.float(), labels)
            if distill is not None:
                loss = 0.1 * loss + 0.9 * distill(images, outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measured(model: nn.Module, data: Data) -> dict:
    test, seen = realdata.accuracy(model, data[2], data[3]), realdata.accuracy(model, data[0][:10000], data[1][:10000])
    return {"test": test, "train": seen, "macs": macs(model), "params": sum(p.numel() for p in model.parameters())}


def bisect(cut: Callable[[float], nn.Module], limit: float) -> nn.Module:
    """The largest model of a family that is within the limit of MACs."""
    low, high, best = 0.0, 0.9, None
    for _ in range(12):
        middle = (low + high) / 2
        model = cut(middle)
        if macs(model) <= limit:
            high, best = middle, model
        else:
            low = middle
    assert best is not None
    return best


def theirs(depth: int, factor: float, folder: Path) -> nn.Module:
    """Torch-Pruning as its README shows it: group L2 importance, one ratio for all layers, the classifier left out."""
    import torch_pruning as tp

    def cut(ratio: float) -> nn.Module:
        model = realdata.cifar_resnet(depth, folder)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        tp.pruner.MagnitudePruner(model, X, importance=importance, pruning_ratio=ratio, ignored_layers=[model.linear]).step()
        return model

    return bisect(cut, macs(realdata.cifar_resnet(depth, folder)) / factor)


def ours(depth: int, factor: float, folder: Path, data: Data, options: argparse.Namespace, checkpoint: Path | None, distilled: bool) -> graphprune.Result:
    teacher = realdata.cifar_resnet(depth, folder)
    calibration = list(realdata.normalise(data[0][:512]).split(128))

    def tune(model: nn.Module, round: int) -> None:
        epochs, seed = options.epochs / options.steps, 10 * options.seed + round
        if not distilled:
            train(model, data, epochs, options.rate, seed)
            return
        with graphprune.Distillation(teacher, model, temperature=4.0) as distill:
            train(model, data, epochs, options.rate, seed, distill)

    more = {"repair": "auto", "calibration": calibration} if options.repair else {}
    return graphprune.iterate(
        teacher,
        X,
        {"macs": 1 / factor},
        train=tune,
        evaluate=lambda model: realdata.accuracy(model, data[2], data[3]),
        steps=options.steps,
        scope=options.scope,
        criterion=options.criterion,
        checkpoint=checkpoint,
        progress=False,
        **more,
    )


class Log:
    """Finished jobs by name, in a file that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def job(self, name: str, work: Callable[[], dict]) -> None:
        if name in self.rows:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        row = work()
        row |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        self.rows = {**(json.loads(self.path.read_text()) if self.path.exists() else {}), name: row}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.rows, indent=1))
        os.replace(part, self.path)
        print(name, {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


def tune(log: Log, data: Data, options: argparse.Namespace) -> None:
    def peer(depth: int, factor: float, distilled: bool = False) -> dict:
        model = theirs(depth, factor, options.data)
        cut = realdata.accuracy(model, data[2], data[3])
        return {"cut": cut, **measured(train(model, data, options.epochs, options.rate, 10 * options.seed + 1), data)}

    def mine(depth: int, factor: float, distilled: bool) -> dict:
        folder = options.json.parent / f"{options.json.stem}-{depth}-{factor}-{options.seed}-{'distilled' if distilled else 'plain'}"
        done = ours(depth, factor, options.data, data, options, folder, distilled)
        return {"cut": done.history[1].cut, "history": done.history.to_dict(), **measured(done.model, data)}

    def whole(depth: int) -> dict:
        model = realdata.cifar_resnet(depth, options.data)
        return {"before": measured(model, data), **measured(train(model, data, options.epochs, options.rate, 10 * options.seed + 1), data)}

    for depth in options.depths:
        tag = f"resnet{depth}/{options.epochs}/{options.seed}"
        for side in options.sides:
            if side == "original":
                log.job(f"{tag}/original", lambda depth=depth: whole(depth))
                continue
            for factor in options.factors:
                run = {
                    "peer": lambda d=depth, f=factor: peer(d, f),
                    "ours": lambda d=depth, f=factor: mine(d, f, True),
                    "plain": lambda d=depth, f=factor: mine(d, f, False),
                }[side]
                log.job(f"{tag}/{side}/{factor}", run)


def slim(kind: str, data: Data, options: argparse.Namespace) -> nn.Module:
    """An untrained ResNet-20 with half the MACs, chosen before training."""
    torch.manual_seed(options.seed)
    model = realdata.CifarResNet(20)
    if kind == "original":
        return model
    few = [(realdata.normalise(data[0][i : i + 128]), data[1][i : i + 128]) for i in range(0, 512, 128)]
    more = {"batches": few, "loss": nn.functional.cross_entropy} if kind in ("snip", "grasp") else {}
    return graphprune.shrink(model, X, macs=0.5, criterion=kind, scope=options.scope, **more)


def scratch(log: Log, data: Data, options: argparse.Namespace) -> None:
    for kind in options.kinds:
        name = f"scratch/{options.epochs}/{options.seed}/{kind}"
        log.job(name, lambda kind=kind: measured(train(slim(kind, data, options), data, options.epochs, 0.1, options.seed), data))


def speed(log: Log, data: Data, options: argparse.Namespace) -> None:
    """Training steps of the original and of cut networks in turn; median seconds of each."""
    torch.manual_seed(0)
    whole = realdata.cifar_resnet(20, options.data)
    nets = {"original": whole}
    for share in (0.75, 0.5, 0.25):
        nets[f"l2 {share}"] = graphprune.shrink(whole, X, macs=share)
        nets[f"l2 {share} widths by 8"] = graphprune.shrink(whole, X, macs=share, multiple_of=8)
    nets["synflow 0.5 at init"] = slim("synflow", data, options)
    steps = {}
    for name, net in nets.items():
        net.to(memory_format=torch.channels_last).train()
        steps[name] = (net, torch.optim.SGD(net.parameters(), 0.01, momentum=0.9), [])
    images, labels = augmented(data[0][:128]).to(memory_format=torch.channels_last), data[1][:128]
    for _ in range(options.repeats):
        for net, optimizer, times in steps.values():
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
    for name, (net, _, times) in steps.items():
        log.job(f"speed/{name}", lambda net=net, times=times: {"seconds": statistics.median(times[2:]), "macs": macs(net)})


def table(log: Log) -> list[str]:
    rows = log.rows
    lines = ["| model | side | fewer MACs | right after the cut | test % | train % | gap | epochs | CPU min |", "|---|---|---|---|---|---|---|---|---|"]
    names = {"original": "original, same schedule", "peer": "Torch-Pruning", "ours": "graphprune, distilled", "plain": "graphprune, labels only"}
    for name in sorted(row for row in rows if row.startswith("resnet")):
        model, epochs, seed, side, *_ = name.split("/")
        row = rows[name]
        whole = next((r["macs"] for n, r in rows.items() if n.startswith(f"{model}/") and n.endswith("/original")), row["macs"])
        if "before" in row:
            first = row["before"]
            lines.append(f"| {model} | original, as given | 1.00x | | {first['test']:.2f} | {first['train']:.2f} | {first['train'] - first['test']:.2f} | 0 | |")
        cells = f"{whole / row['macs']:.2f}x | {row.get('cut', float('nan')):.2f} | {row['test']:.2f} | {row['train']:.2f} | {row['train'] - row['test']:.2f}"
        lines.append(f"| {model} | {names[side]} | {cells} | {epochs} | {row['cpu'] / 60:.1f} |".replace("nan", ""))
    lines += ["", "| from scratch | fewer MACs | test % | train % | gap | epochs | CPU min |", "|---|---|---|---|---|---|---|"]
    for name in sorted(row for row in rows if row.startswith("scratch")):
        _, epochs, seed, kind = name.split("/")
        row = rows[name]
        whole = rows[f"scratch/{epochs}/{seed}/original"]["macs"]
        cells = f"{whole / row['macs']:.2f}x | {row['test']:.2f} | {row['train']:.2f} | {row['train'] - row['test']:.2f} | {epochs} | {row['cpu'] / 60:.1f}"
        lines.append(f"| {kind} | {cells} |")
    lines += ["", "| training step, batch 128 | MACs | faster | efficiency |", "|---|---|---|---|"]
    for name in [row for row in rows if row.startswith("speed/")]:
        first, row = rows["speed/original"], rows[name]
        fewer, faster = first["macs"] / row["macs"], first["seconds"] / row["seconds"]
        lines.append(f"| {name[6:]} | {fewer:.2f}x fewer | {faster:.2f}x | {faster / fewer:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path, default=Path("loop.json"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", default=["tune", "scratch", "speed", "table"])
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--factors", type=float, nargs="+", default=[2.1, 2.6])
    parser.add_argument("--sides", nargs="+", default=["original", "peer", "ours"])
    parser.add_argument("--kinds", nargs="+", default=["original", "synflow", "snip"])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--scope", default="layer")
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--repair", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="use only so many training images (a trial)")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.data = realdata.find_data(options.data)
    log = Log(options.json)
    if set(options.parts) - {"table"}:
        data = realdata.load_cifar(options.data)
        mixed = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))[: options.images]  # the file is sorted by class
        data = (data[0][mixed], data[1][mixed], *data[2:])
        for part in options.parts:
            if part != "table":
                {"tune": tune, "scratch": scratch, "speed": speed}[part](log, data, options)
    if options.out:
        made = f"Made by `python benchmarks/loop.py`; torch {torch.__version__}, Torch-Pruning 1.6.1, one thread."
        options.out.write_text("\n".join(["# Fine-tuned, from scratch, and how fast: measured", "", made, "", *table(log), ""]))


if __name__ == "__main__":
    main()
