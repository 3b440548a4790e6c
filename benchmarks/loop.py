"""Pruned and fine-tuned on CIFAR-10 (JPEG), side by side with Torch-Pruning at equal MACs and equal epochs; training time of pruned networks.

    python benchmarks/loop.py --data DIR --folder runs --out docs/loop.md
    python benchmarks/loop.py --data DIR --folder runs --epoch-times --out docs/loop.md

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
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import accuracy as oneshot
import common
import realdata
import torch
from torch import nn

import graphprune
from graphprune.loop.distill import soften
from graphprune.timing.measure import middle_of

X = torch.zeros(1, 3, 32, 32)
RUNS = ("ours/2.1", "peer/2.1", "ours/2.6", "peer/2.6", "peer-distilled/2.1", "peer-distilled/2.6", "original/1")
BATCH, WARM, DECAY = 128, 0.1, 5e-4
TEMPERATURE = 4.0
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
    part = path.with_name(f".{os.getpid()}-{path.name}")  # runs side by side may write the same
    write(part)
    os.replace(part, path)


# -- data ------------------------------------------------------------------------------------------------------------------------


def load(options: argparse.Namespace) -> Images:
    train, labels, test, truth = realdata.load_cifar(options.data)
    mixed = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: options.images]  # the file is sorted by class
    return tuple(held.to(options.device) for held in (train[mixed], labels[mixed], test[: options.images], truth[: options.images]))


def epoch_of(data: Images, seed: int, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Positions, shifts and flips of every batch of one epoch; the same for all runs."""
    draw = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(data[0]), generator=draw)
    order = order[: len(order) // BATCH * BATCH]
    shifts, flips = torch.randint(9, (len(order), 2), generator=draw), torch.rand(len(order), generator=draw) < 0.5
    return list(zip(*(drawn.to(data[0].device).split(BATCH) for drawn in (order, shifts, flips)), strict=True))


def augmented(images: torch.Tensor, shifts: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Random crops of the padded images, flipped at random; normalised."""
    wide = nn.functional.pad(images, (4, 4, 4, 4))
    along = torch.arange(max(32, len(images)), device=images.device)
    rows, columns = shifts[:, :1] + along[:32], shifts[:, 1:] + along[:32]
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    cut = wide[along[: len(images), None, None, None], along[:3, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    return realdata.normalise(cut).to(memory_format=torch.channels_last)


def taught(data: Images, options: argparse.Namespace, epoch: int) -> torch.Tensor:
    """The original's logits for the augmented images of one epoch, batch by batch; made once for all runs."""
    path = options.folder / f"logits-{options.depth}-{options.seed}-{epoch}-{len(data[0])}-{options.products}.pt"
    if not path.exists():
        teacher = graphprune.fuse(realdata.cifar_resnet(options.depth, options.data), X).to(options.device, memory_format=torch.channels_last)
        teacher = torch.compile(teacher) if options.compile else teacher
        with torch.no_grad(), products(options):
            drawn = [torch.cat(part).split(8 * BATCH) for part in zip(*epoch_of(data, options.seed, epoch), strict=True)]
            found = [teacher(augmented(data[0][at], *how)).float() for at, *how in zip(*drawn, strict=True)]
        replaced(path, lambda part: torch.save(torch.cat(found).unflatten(0, (-1, BATCH)), part))
    return torch.load(path, weights_only=True, map_location=options.device)


def products(options: argparse.Namespace) -> AbstractContextManager:
    """How products are computed in training: bfloat16 where the processor has it, which halves the time."""
    return torch.autocast(options.device, torch.bfloat16) if options.products == "bfloat16" else nullcontext()


def swift(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """What computes the training steps: compiled where asked; on a GPU recorded and played back, for its kernels are shorter than the calls that start them."""
    if options.device != "cuda":
        return torch.compile(model) if options.compile else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorded = copy.copy(model)
    recorded = torch.cuda.make_graphed_callables(recorded, (torch.zeros(options.batch, *X.shape[1:], device="cuda").to(memory_format=torch.channels_last),))
    model.load_state_dict(before)  # recording moves the statistics of batch norms
    return recorded


@torch.no_grad()
def top1(model: nn.Module, x: torch.Tensor, y: torch.Tensor, how: AbstractContextManager | None = None) -> float:
    """Top-1 in per cent, computed in float32, or as :func:`products` says."""
    mode, right = model.training, 0
    model.eval()
    with how or nullcontext():
        for images, labels in zip(x.split(500), y.split(500), strict=True):
            right += int((model(realdata.normalise(images).to(memory_format=torch.channels_last)).argmax(1) == labels).sum())
    model.train(mode)
    return 100 * right / len(y)


# -- training --------------------------------------------------------------------------------------------------------------------


def tune(model: nn.Module, run: str, data: Images, options: argparse.Namespace, log: Log, distilled: bool) -> nn.Module:
    """SGD with momentum; in every cycle a warm-up and a cosine to zero (Loshchilov & Hutter 2017) over the same images and logits; weights in float32.

    Goes on where it was killed.
    """
    path = options.folder / f"{run.replace('/', '-')}.pt"
    model.to(options.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), options.rate, momentum=0.9, weight_decay=DECAY, nesterov=True)
    cycle, done = options.epochs // options.cycles, 0
    if path.exists():
        held = torch.load(path, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        done = held["epoch"]
    fast = swift(model, options)
    for epoch in range(done, options.epochs):
        answers = taught(data, options, epoch % cycle) if distilled else None
        wall, cpu, total = time.perf_counter(), time.process_time(), torch.zeros((), device=options.device)
        parts = [part for drawn in epoch_of(data, options.seed, epoch % cycle) for part in zip(*(t.split(options.batch) for t in drawn), strict=True)]
        answers = None if answers is None else answers.flatten(0, 1).split(options.batch)
        steps = cycle * len(parts)
        for number, (at, *how) in enumerate(parts):
            now = (epoch % cycle * len(parts) + number) / steps
            for group in optimizer.param_groups:
                group["lr"] = options.rate * min(1.0, (now + 1 / steps) / WARM) * (1 + math.cos(math.pi * now)) / 2
            with products(options):
                outputs = fast(augmented(data[0][at], *how))
            loss = nn.functional.cross_entropy(outputs.float(), data[1][at])
            if answers is not None:
                loss = (1 - options.soft) * loss + options.soft * soften(outputs.float(), answers[number], TEMPERATURE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        last = epoch + 1 == options.epochs
        log.add(f"{run}/{epoch + 1}", loss=float(total) / (number + 1), test=top1(model, data[2], data[3], None if last else products(options)), **spent)
        replaced(path, lambda part, at=epoch + 1: torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": at}, part))
    return model.eval()


def calibration(data: Images) -> list[torch.Tensor]:
    return list(realdata.normalise(data[0][:512]).cpu().split(128))


def ours(run: str, factor: float, data: Images, options: argparse.Namespace, log: Log) -> nn.Module:
    original, images = realdata.cifar_resnet(options.depth, options.data), calibration(data)
    seconds = time.perf_counter()
    known: list = []

    def effect(groups, model, batches):
        if not known:
            known.append(graphprune.score(groups, model, "effect", images, progress=False))
        return known[0]

    def evaluate(model: nn.Module) -> float:
        return top1(model.to(options.device), data[2], data[3])

    def train(model: nn.Module, round: int) -> nn.Module:
        if f"{run}/0" not in log.rows():
            log.add(f"{run}/0", **start(model, data), how="effect, global, repaired", seconds=time.perf_counter() - seconds)
        return tune(model, run, data, options, log, distilled=True)

    more = {"criterion": effect, "scope": "global", "keep": oneshot.KEEP, "calibration": images, "verify": False}  # verified by the tests; here it is time
    folder = options.folder / run.replace("/", "-")
    return graphprune.iterate(original, X, {"macs": 1 / factor}, train=train, evaluate=evaluate, steps=1, checkpoint=folder, progress=False, **more).model


def start(model: nn.Module, data: Images) -> dict:
    size = {"macs": common.macs(model.cpu().eval(), X), "params": sum(p.numel() for p in model.parameters())}
    return {**size, "test": top1(model.to(data[0].device), data[2], data[3])}


def peer(run: str, factor: float, data: Images, options: argparse.Namespace, log: Log) -> nn.Module:
    """Torch-Pruning's best cut, by training images after batch-norm re-estimation (which training does by itself)."""
    path = options.folder / f"peer-{factor}-cut.json"
    original, x = realdata.cifar_resnet(options.depth, options.data), realdata.normalise(data[0][:512].cpu())
    budget = common.macs(original, X) / factor

    def cut(kind: str, globally: bool) -> nn.Module:
        return oneshot.peer(original, kind, globally, budget, x, data[1][:512].cpu())

    if not path.exists():
        found = {}
        for globally, kinds in ((False, oneshot.LOCAL), (True, oneshot.GLOBAL)):
            for kind in kinds:
                small = cut(kind, globally)
                settled = common.reestimated(small, x.split(128)).to(options.device)
                found[kind, globally] = top1(settled, data[0][512:4512], data[1][512:4512], products(options))
                print(run, kind, "global" if globally else "local", found[kind, globally], common.macs(small, X), flush=True)
        replaced(path, lambda part: part.write_text(json.dumps(max(found, key=found.__getitem__))))
    kind, globally = json.loads(path.read_text())  # the choice is kept, the cut made anew: it is the same every time
    model, how = cut(kind, globally), f"{kind}, {'global' if globally else 'layer by layer'}"
    if f"{run}/0" not in log.rows():
        log.add(f"{run}/0", **start(model, data), how=how)
    return tune(model, run, data, options, log, distilled="distilled" in run)


def whole(run: str, _: float, data: Images, options: argparse.Namespace, log: Log) -> nn.Module:
    """The original, trained on with the same schedule."""
    model = realdata.cifar_resnet(options.depth, options.data)
    return tune(model, run, data, options, log, distilled=False)


def runs(data: Images, options: argparse.Namespace, log: Log) -> None:
    recipe = {name: getattr(options, name) for name in ("epochs", "cycles", "rate", "batch", "soft", "products", "seed", "depth")}
    path = options.folder / "recipe.json"
    if path.exists() and {"cycles": 1, **json.loads(path.read_text())} != recipe:
        raise SystemExit(f"{options.folder} holds runs of another recipe, {path.read_text()}; give another --folder, for a table compares runs of one")
    path.write_text(json.dumps(recipe))
    if "original/1/0" not in log.rows():
        model = realdata.cifar_resnet(options.depth, options.data)
        log.add("original/1/0", **start(model, data), train=top1(model, data[0][:10000], data[1][:10000]), how="as given")
    for run in options.runs:
        if f"{run}/end" in log.rows():
            continue
        side, factor = run.split("/")
        make = {"ours": ours, "peer": peer, "peer-distilled": peer, "original": whole}[side]
        model = make(run, float(factor), data, options, log)
        log.add(f"{run}/end", **start(model, data), train=top1(model, data[0][:10000], data[1][:10000]), **recipe)


# -- time of an epoch ------------------------------------------------------------------------------------------------------------


def vgg() -> nn.Module:
    """VGG-11 with batch norm (Simonyan & Zisserman 2015) for 32 x 32 images."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        inputs = width or inputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


# name: how it is made, images of a step, rounds of timing, what widths are multiples of
NETS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "ResNet-20": (lambda: realdata.CifarResNet(20), 64, 40, 4),
    "VGG-11": (vgg, 32, 40, 8),
}
SCORES = ("snip", "grasp", "synflow")


def slim(make: Callable[[], nn.Module], data: Images, step: int) -> dict[str, tuple[str, nn.Module, float]]:
    """Untrained networks by name, how they came about, and the seconds that took: whole, cut before training, and in rounds of training."""
    torch.manual_seed(0)
    whole = make()
    few = [(realdata.normalise(data[0][i : i + 32]), data[1][i : i + 32]) for i in range(0, 128, 32)]
    found = {"whole": ("", whole, 0.0)}
    for criterion in SCORES:
        score = criterion if criterion == "synflow" else getattr(graphprune.scores, criterion).on(few, nn.functional.cross_entropy)
        for fewer in (2, 4):
            begin = time.perf_counter()
            small = graphprune.shrink(whole, X, macs=1 / fewer, score=score, widths=graphprune.Widths(multiple_of=step), verify=False)
            found[f"{criterion} {fewer}x"] = ("before training", small, time.perf_counter() - begin)
    rounds: list[nn.Module] = []
    options = {"evaluate": lambda model: 0.0, "evaluate_cuts": False, "steps": 3, "progress": False, "multiple_of": step, "verify": False}
    graphprune.iterate(whole, X, {"macs": 0.25}, train=lambda model, round: rounds.append(model), **options)
    return found | {f"round {number} of 3": ("iterate to 4x", model, 0.0) for number, model in enumerate(rounds, 1)}


def epoch_times(data: Images, options: argparse.Namespace, log: Log) -> None:
    """Training steps of all networks in turn, so that what disturbs the machine disturbs all; wall time, one thread, float32, channels last."""
    for name, (make, batch, repeats, step) in NETS.items():
        nets = {}
        for how, (kind, net, seconds) in slim(make, data, step).items():
            net.to(memory_format=torch.channels_last).train()
            nets[how] = (kind, net, torch.optim.SGD(net.parameters(), 0.01, momentum=0.9), seconds, [])
        images, labels = realdata.normalise(data[0][:batch]).to(memory_format=torch.channels_last), data[1][:batch]
        for number in range(3 + (options.repeats or repeats)):
            for _, net, optimizer, _, times in list(nets.values())[:: 1 if number % 2 else -1]:
                begin = time.perf_counter()
                loss = nn.functional.cross_entropy(net(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                times.append(time.perf_counter() - begin)
        whole = torch.tensor(nets["whole"][4][3:], dtype=torch.float64)
        for how, (kind, net, _, seconds, times) in nets.items():
            mine = torch.tensor(times[3:], dtype=torch.float64)
            faster, band = middle_of((whole / mine).numpy())
            epoch = statistics.median(times[3:]) * 50_000 / batch
            size = {"macs": common.macs(net.eval(), X), "kind": kind, "batch": batch}
            log.add(f"time/{name}/{how}", **size, epoch=epoch, faster=faster, band=band, seconds=seconds)


# -- tables ----------------------------------------------------------------------------------------------------------------------

NAMES = {
    "original": "original, trained on",
    "ours": "**graphprune**, repaired, distilled",
    "peer": "Torch-Pruning, labels",
    "peer-distilled": "Torch-Pruning, distilled",
}
BEGIN, END = "<!-- measured by benchmarks/loop.py -->", "<!-- end of what was measured -->"


def tuned(rows: dict[str, dict]) -> list[str]:
    first = rows.get("original/1/0")
    if first is None:
        return []
    recipe = {"epochs": "?", "cycles": 1, "rate": "?", "batch": BATCH, "soft": 0.5, "products": "bfloat16"}
    recipe |= next(({name: row[name] for name in recipe if name in row} for key, row in rows.items() if key.endswith("/end")), {})
    shares = f"{1 - recipe['soft']:.2g} cross-entropy + {recipe['soft']:.2g} softened logits of the original (temperature {TEMPERATURE:g})"
    schedule = "warm-up, cosine to zero" + (f", {recipe['cycles']} times over the same images and logits" if recipe["cycles"] > 1 else "")
    lines = [
        f"### Fine-tuned, {recipe['epochs']} epochs for every run",
        "",
        f"ResNet-56, CIFAR-10 (JPEG), all 10,000 test images, seed 0. SGD with momentum and Nesterov, rate {recipe['rate']} ({schedule}),",
        f"batch {recipe['batch']}, crops and flips, {recipe['products']} products; distilled: {shares}. All runs see the same",
        "images in the same order. The peer's criterion is the best of eight on training images. "
        "Gap: accuracy on 10,000 training images minus that on the test images.",
        "",
        "| run | fewer MACs | parameters | how it was cut | before training | after | to the original | gap | CPU min |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| original, as given | 1.00x | {first['params']:,} | | | {first['test']:.2f} | | {first['train'] - first['test']:.2f} | |",
    ]
    for run in sorted({key.rpartition("/")[0] for key in rows if key.split("/")[0] in NAMES}, key=lambda run: (run.split("/")[1], run)):
        begin, end = rows.get(f"{run}/0"), rows.get(f"{run}/end")
        side, factor = run.split("/")
        spent = sum(row.get("cpu", 0.0) for key, row in rows.items() if key.rpartition("/")[0] == run) / 60
        if begin and end:
            cells = (
                f"{first['macs'] / end['macs']:.2f}x | {end['params']:,} | {begin['how'] if factor != '1' else ''} | {begin['test']:.2f} | {end['test']:.2f}"
            )
            lines.append(f"| {NAMES[side]} | {cells} | {end['test'] - first['test']:+.2f} | {end['train'] - end['test']:.2f} | {spent:.1f} |")
        elif begin and factor != "1":
            done = [int(key.rpartition("/")[2]) for key in rows if key.rpartition("/")[0] == run and key.rpartition("/")[2].isdigit()]
            now = f"{rows[f'{run}/{max(done)}']['test']:.2f} after epoch {max(done)}" if max(done) else ""
            cells = f"{first['macs'] / begin['macs']:.2f}x | {begin['params']:,} | {begin['how']} | {begin['test']:.2f} | not finished; {now}"
            lines.append(f"| {NAMES[side]} | {cells} | | | {spent:.1f} |")
    return [*lines, "", "![accuracy against epochs](loop.png)", ""]


def timed(rows: dict[str, dict]) -> list[str]:
    lines = []
    for name, (_, batch, _, step) in NETS.items():
        mine = {key.split("/")[2]: row for key, row in rows.items() if key.startswith(f"time/{name}/")}
        if "whole" not in mine:
            continue
        whole = mine["whole"]
        lines += [
            f"### Time of an epoch: {name}, 32 x 32 images, batch {batch}, widths in multiples of {step}",
            "",
            "| network | | fewer MACs | epoch of 50,000 images, s | faster | efficiency | making it, s |",
            "|---|---|---|---|---|---|---|",
        ]
        for how, row in mine.items():
            fewer = whole["macs"] / row["macs"]
            speed = f"{row['faster']:.2f}x ({row['band'][0]:.2f} to {row['band'][1]:.2f}) | {row['faster'] / fewer:.2f}" if how != "whole" else "|"
            lines.append(f"| {how} | {row['kind']} | {fewer:.2f}x | {row['epoch']:.0f} | {speed} | {row['seconds']:.1f} |")
        lines.append("")
    note = "Wall time of whole training steps (forward, backward, SGD), interleaved, one thread, float32, channels last. Efficiency: faster over fewer MACs."
    return [note, "", *lines] if lines else []


def plot(rows: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, factor in zip(both, ("2.1", "2.6"), strict=True):
        axes.axhline(rows["original/1/0"]["test"], color="grey", linestyle=":", label="original, as given")
        for side in ("ours", "peer", "peer-distilled"):
            points = [(epoch, rows[f"{side}/{factor}/{epoch}"]["test"]) for epoch in range(100) if f"{side}/{factor}/{epoch}" in rows]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=NAMES[side].replace("*", ""))
        axes.set(title=f"ResNet-56, {factor}x fewer MACs", xlabel="epochs", ylim=(60, 92))
        axes.legend(loc="lower right")
    both[0].set_ylabel("top-1 of the test images, %")
    figure.savefig(path, dpi=110)


def report(rows: dict[str, dict], path: Path) -> None:
    """Write the tables between the two marks of a file, or as a file of its own."""
    old = path.read_text() if path.exists() else ""
    head, _, rest = old.partition(BEGIN) if BEGIN in old else ("# Fine-tuned: measured\n\n", "", END + "\n")
    made = f"{common.made_by('python benchmarks/loop.py', 'torch-pruning')} One thread."
    body = "\n".join([BEGIN, made, "", *tuned(rows), *timed(rows)])
    path.write_text(head + body + END + rest.partition(END)[2])
    if "original/1/0" in rows:
        plot(rows, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--folder", type=Path, default=Path("loop-runs"), help="rows, states of runs, stored logits")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", nargs="*", default=RUNS)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=1, help="the schedule starts anew so many times; each cycle has its share of the epochs")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=BATCH, choices=(16, 32, 64, BATCH), help=f"images of a step; images are drawn {BATCH} at a time")
    parser.add_argument("--soft", type=float, default=0.5, help="share of the original's softened logits in a distilled loss")
    parser.add_argument("--products", choices=("bfloat16", "float32"), default="bfloat16", help="float32 on a processor without bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="use only so many images (a trial)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the training steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is trained; cuts and repairs are made on the processor")
    parser.add_argument("--threads", type=int, default=1, help="of each step; times of epochs are compared with one")
    parser.add_argument("--epoch-times", action="store_true", help="time training steps instead; wants a quiet machine")
    parser.add_argument("--repeats", type=int, help="steps timed for each network")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.cycles < 1 or options.epochs % options.cycles:
        parser.error(f"--epochs {options.epochs} cannot be shared by --cycles {options.cycles}; give a multiple")
    options.folder.mkdir(parents=True, exist_ok=True)
    log = Log(options.folder / "loop.jsonl")
    if options.epoch_times:
        epoch_times(load(options), options, log)
    elif options.runs:
        runs(load(options), options, log)
    if options.out:
        report(log.rows(), options.out)


if __name__ == "__main__":
    main()
