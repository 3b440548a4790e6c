"""Every score on a real trained network, and what each costs: the tables of docs/scores.md.

    python benchmarks/scores.py --data DIR --json scores.jsonl --out docs/scores.md          # accuracy, about 40 CPU minutes
    python benchmarks/scores.py --times --json scores.jsonl --out docs/scores.md             # seconds, under 10 minutes
    python benchmarks/scores.py --data DIR --blocks --json scores.jsonl --out docs/scores.md # whole blocks, about 6 minutes
    python benchmarks/scores.py --only-table --json scores.jsonl --out docs/scores.md        # the page again, from the rows

Rows are appended to ``--json`` as they are made, and those found there are not made again.

Accuracy: ResNet-20 on CIFAR-10 (JPEG), channels inside the residual blocks. The widths are the same for every score
(``scope="layer"``: one ratio for all groups, the largest that meets ``macs=``), so that the table compares the choice of channels and
nothing else. The seed draws the images a score sees, the score's own random numbers, and the order of the fine-tuning, which is the same
for all scores. Scores that choose the same channels share a measurement.

Times: all scores on ResNet-50 and ViT-B/16 with random weights. A score with data is compared with the passes over the same batches that it
asks for: forward, or forward and backward, with nothing watching.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Rows, made_by
from realdata import accuracy, cifar_resnet, load_cifar, normalise
from torch import nn

import graphprune
from graphprune.scores import SCORES, Score

SHARES = (0.7, 0.5, 0.3)
KEEP = ["conv1", "layer*.bn2", "linear"]
CALIBRATION, BATCH, STEPS, RATE = 512, 128, 40, 0.05
BASELINE = 8  # seeds of the random score
MANY = 512  # images of a usual calibration
LAST = torch.channels_last
BLOCKS = ("influence", "reconstruction", "taylor", "l2", "random")


# ------------------------------------------------------------------ accuracy


def prepared(x: torch.Tensor) -> torch.Tensor:
    return normalise(x).contiguous(memory_format=LAST)


def balanced(x: torch.Tensor, y: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count / classes`` images of each class."""
    each = count // int(y.max() + 1)
    chosen = torch.cat([(y == label).nonzero().ravel()[:each] for label in y.unique()])
    return prepared(x[chosen]), y[chosen]


def drawn(x: torch.Tensor, y: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    return prepared(x[chosen]), y[chosen]


def top1(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return accuracy(model, x, y)


def tuned(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> nn.Module:
    """A copy after STEPS steps of SGD on images in an order drawn from the seed, the rate falling to zero."""
    model = copy.deepcopy(model).train()
    x, y = drawn(x, y, STEPS * BATCH, 1000 + seed)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model.eval()


def cut(model: nn.Module, found: list[torch.Tensor], share: float) -> tuple[nn.Module, str, float]:
    """The model with the best channels under these scores, a name for the choice, and the share of the MACs that is left."""
    example = torch.zeros(1, 3, 32, 32)
    small, plan = graphprune.shrink(model, example, macs=share, score=lambda *_: found, keep=KEEP, verify=False, return_plan=True)
    name = hashlib.sha1(json.dumps({leaf: sorted(axes.items()) for leaf, axes in plan.cuts.items()}, sort_keys=True).encode()).hexdigest()[:12]
    left = graphprune.profile(small, example).macs / graphprune.profile(model, example).macs
    return small.to(memory_format=LAST), name, left


def kept_groups(model: nn.Module) -> graphprune.Groups:
    """The groups that :func:`graphprune.shrink` scores under KEEP."""
    groups: list[Any] = []

    def look(found: graphprune.Groups, *_: Any) -> list[torch.Tensor]:
        groups.append(found)
        return [torch.zeros(group.size, dtype=torch.float64) for group in found]

    graphprune.shrink(model, torch.zeros(1, 3, 32, 32), 0.5, score=look, keep=KEEP, verify=False)
    return groups[-1]


def measure_accuracy(options: argparse.Namespace, rows: list[dict], done: Callable[[dict], None]) -> None:
    train, labels, test, truth = load_cifar(options.data)
    test, truth = balanced(test, truth, options.images)
    model = cifar_resnet(20, options.data).to(memory_format=LAST)
    groups = kept_groups(model)
    if not any(row["kind"] == "base" for row in rows):
        done({"kind": "base", "cut": top1(model, test, truth), "images": len(truth)})
        for seed in range(options.seeds):
            done({"kind": "base", "seed": seed, "tuned": top1(tuned(model, train, labels, seed), test, truth)})
    for seed in range(max(options.seeds, BASELINE)):
        known = {(row["choice"], row["share"]): row for row in rows if row["kind"] == "accuracy" and row["seed"] == seed}
        finished = {(row["score"], row["share"]) for row in rows if row["kind"] == "accuracy" and row["seed"] == seed}
        x, y = drawn(train, labels, CALIBRATION, seed)
        batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        for name, score in SCORES.items() if seed < options.seeds else [("random", SCORES["random"])]:
            if options.names and name not in options.names:
                continue
            if all((name, share) in finished for share in SHARES):
                continue
            start = time.process_time()
            found = graphprune.score(groups, model, score, batches, F.cross_entropy, seed=seed, progress=False)
            spent = time.process_time() - start
            for share in SHARES:
                if (name, share) in finished:
                    continue
                small, choice, left = cut(model, found, share)
                same = known.get((choice, share))
                before = same["cut"] if same else top1(small, test, truth)
                after = same["tuned"] if same else top1(tuned(small, train, labels, seed), test, truth)
                row = {"kind": "accuracy", "score": name, "share": share, "seed": seed, "cut": before, "tuned": after, "choice": choice}
                known[choice, share] = row
                done({**row, "left": left, "seconds": spent})


# ------------------------------------------------------------------ whole blocks


def scored_by(name: str, data: list) -> object:
    """The score of whole blocks of that name, with the data that it reads."""
    if name in ("l1", "l2"):
        return name
    return graphprune.scores.on(name, data, F.cross_entropy if name == "taylor" else None)


def measure_blocks(options: argparse.Namespace, rows: list[dict], done: Callable[[dict], None]) -> None:
    """The scores of whole blocks on the same network, images and fine-tuning; shares of the MACs that blocks cannot reach have no row."""
    train, labels, test, truth = load_cifar(options.data)
    test, truth = balanced(test, truth, options.images)
    model, example = cifar_resnet(20, options.data).to(memory_format=LAST), torch.zeros(1, 3, 32, 32)
    for seed in range(options.seeds):
        finished = {(row["score"], row["share"]) for row in rows if row["kind"] == "blocks" and row["seed"] == seed}
        known: dict[tuple, dict] = {(row["choice"], row["share"]): row for row in rows if row["kind"] == "blocks" and row["seed"] == seed}
        x, y = drawn(train, labels, CALIBRATION, seed)
        data = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        for name in options.names or BLOCKS:
            for share in SHARES:
                if (name, share) in finished:
                    continue
                noise = torch.Generator().manual_seed(seed)
                criterion = (lambda _, module, noise=noise: float(torch.rand((), generator=noise))) if name == "random" else scored_by(name, data)
                try:
                    small, plan = graphprune.shrink(model, example, macs=share, what="block", score=criterion, verify=False, return_plan=True)
                except graphprune.errors.BadTarget as error:
                    print(f"{name} at {share}: {error}", flush=True)
                    continue
                choice = " ".join(sorted(part.name for part in plan.parts))
                small = small.to(memory_format=LAST)
                same = known.get((choice, share))
                before = same["cut"] if same else top1(small, test, truth)
                after = same["tuned"] if same else top1(tuned(small, train, labels, seed), test, truth)
                left = graphprune.profile(small, example).macs / graphprune.profile(model, example).macs
                row = {"kind": "blocks", "score": name, "share": share, "seed": seed, "cut": before, "tuned": after, "choice": choice, "left": left}
                known[choice, share] = row
                done(row)


def blocks_part(rows: list[dict]) -> list[str]:
    mine = [row for row in rows if row["kind"] == "blocks"]
    if not mine:
        return ["Not measured yet: `benchmarks/scores.py --blocks`."]
    shares = [share for share in SHARES if any(row["share"] == share for row in mine)]
    lines = []
    for name in BLOCKS:
        cells = [[row for row in mine if row["score"] == name and row["share"] == share] for share in shares]
        if any(cells):
            lines.append([f"`{name}`", *(spread([row[kind] for row in cell]) for kind in ("cut", "tuned") for cell in cells)])
    heads = [f"{1 - statistics.mean(row['left'] for row in mine if row['share'] == share):.0%} fewer MACs" for share in shares]
    return [
        f"The same network, images, fine-tuning and seeds ({len({row['seed'] for row in mine})}) with granularity `block`: whole residual blocks go, as few as",
        f"meet `macs=` {', '.join(f'{share:g}' for share in shares)}; lower ones cannot be met, since the blocks that change the shape and one other stay.",
        "`influence` and `reconstruction` score nothing but blocks and layers; `taylor` is the first-order change of the loss without the block, `l2` the norm",
        "of its weights.",
        "",
        *table(["score", *heads, *(f"{head}, tuned" for head in heads)], lines),
    ]


# ------------------------------------------------------------------ times


def networks() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """How each is made, and the images of its batch."""
    from zoo_support import declare_operators  # torchvision imports without its compiled operators

    declare_operators()
    from torchvision import models

    return {"ResNet-50": (lambda: models.resnet50(weights=None), 16), "ViT-B/16": (lambda: models.vit_b_16(weights=None), 8)}


def settled(model: nn.Module) -> nn.Module:
    """Batch-norm statistics that fit the weights, and scales that differ, so that no activation is all zero or all the same."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()


def options_of(score: Score) -> dict[str, Any]:
    """``otherwise`` where the score has it: some groups lack what it measures (no batch norm, no weight that sums)."""
    return {"otherwise": "l2"} if "otherwise" in inspect.signature(score.function).parameters else {}


def forward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.no_grad():
        model(x)


def gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def single(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    for image, label in zip(x.split(1), y.split(1), strict=True):
        gradient(model, image, label)


def curvature(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    weights = list(model.parameters())
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True)
        torch.autograd.grad(sum(grad.sum() for grad in grads), weights)


# The passes over the batches that a score is made of, where they are not one forward (inputs) or one backward (loss).
PASSES = {"entropy": (forward, forward), "effect": (gradient,), "fisher": (single,), "grasp": (gradient, curvature)}


def passes_of(score: Score) -> tuple[Callable, ...]:
    return PASSES.get(score.name, {"nothing": (), "inputs": (forward,), "loss": (gradient,)}[score.needs_now()])


class Timed:
    """A batch, some times over, that tells when it has been read to the end: what comes after the last pass does not grow with the images."""

    def __init__(self, batch: tuple, times: int) -> None:
        self.batch, self.times, self.end = batch, times, 0.0

    def __iter__(self) -> Iterator[tuple]:
        for _ in range(self.times):
            yield self.batch
        self.end = time.process_time()


def measure_times(options: argparse.Namespace, rows: list[dict], done: Callable[[dict], None]) -> None:
    for name, (make, images) in networks().items():
        known = {row["score"] for row in rows if row["kind"] == "time" and row["model"] == name and row.get("batches", 1) == options.batches}
        wanted = [s for s in SCORES.values() if s.name not in known and (not options.names or s.name in options.names)]
        if not wanted or (options.models and name not in options.models):
            continue
        torch.manual_seed(0)
        model = settled(make())
        groups = graphprune.couple(graphprune.trace(model, torch.zeros(1, 3, 224, 224)))
        x, y = torch.randn(images, 3, 224, 224), torch.randint(0, 1000, (images,))
        forward(model, x, y)  # warm
        plain: dict[Callable, float] = {}
        for score in wanted:
            for made in passes_of(score):
                if made not in plain:
                    start = time.process_time()
                    for _ in range(min(options.batches, 8)):
                        made(model, x, y)
                    plain[made] = (time.process_time() - start) * options.batches / min(options.batches, 8)
            given = Timed((x, y), options.batches) if score.needs_now() != "nothing" else None
            start = time.process_time()
            graphprune.score(groups, model, score, given, F.cross_entropy if score.needs_now() == "loss" else None, progress=False, **options_of(score))
            end = time.process_time()
            read = given.end - start if given else 0.0
            base = sum(plain[made] for made in passes_of(score))
            made = " + ".join(made.__name__ for made in passes_of(score))
            done(
                {
                    "kind": "time",
                    "score": score.name,
                    "model": name,
                    "seconds": end - start,
                    "read": read,
                    "passes": base,
                    "made": made,
                    "images": images * options.batches,
                    "batches": options.batches,
                }
            )


# ------------------------------------------------------------------ the page


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in lines)]


def catalogue() -> list[str]:
    """One row for each score of the registry (a test compares the page with it)."""
    words = {"nothing": "no", "inputs": "inputs", "loss": "inputs and a loss"}
    rows = [[f"`{s.name}`", s.family, s.line, s.reference, words[s.needs], s.cost] for s in SCORES.values()]
    return table(["score", "family", "what it measures", "reference", "data", "cost"], rows)


def accuracy_part(rows: list[dict]) -> list[str]:
    mine = [row for row in rows if row["kind"] == "accuracy"]
    if not mine:
        return ["Not measured yet."]
    base = next(row for row in rows if row["kind"] == "base" and "cut" in row)
    whole = [row["tuned"] for row in rows if row["kind"] == "base" and "tuned" in row]
    every = {row["seed"] for row in mine if row["score"] == "random"}
    drawn = {row["seed"] for row in mine if row["score"] != "random"}
    lines: dict[str, list[str]] = {}
    means: dict[str, float] = {}
    for name in SCORES:
        cells = [[r for r in mine if r["score"] == name and r["share"] == share] for share in SHARES]
        if any(cells):
            lines[name] = [f"`{name}`", *(spread([r[kind] for r in cell]) for kind in ("cut", "tuned") for cell in cells)]
            means[name] = statistics.mean([statistics.mean([r["tuned"] for r in cell]) if cell else 0.0 for cell in cells])
    ordered = [lines[name] for name in sorted(lines, key=lambda n: -means[n])]
    fewer = [f"{round(100 * (1 - share))} %" for share in SHARES]
    head = ["score", *(f"{f} fewer MACs" for f in fewer), *(f"{f}, tuned" for f in fewer)]
    text = [
        f"ResNet-20 on CIFAR-10 (JPEG), {base['images']} test images (the first of each class, equally many), top-1 in per cent: {base['cut']:.1f}",
        f"before pruning, {spread(whole)} after the same fine-tuning without pruning. Channels inside the residual blocks go; the widths are the",
        'same for every score (`scope="layer"`, `macs=`), so only the choice of channels differs. No repair. Scores with data see',
        f"{CALIBRATION} training images. Fine-tuning: {STEPS} steps of {BATCH} training images, SGD with Nesterov momentum 0.9, rate {RATE:g} falling",
        "to zero, weight decay 5e-4, bfloat16 autocast; the same images in the same order for every score.",
        "",
        f"Mean and standard deviation over {len(drawn)} seeds ({len(every)} for `random`): images of the score, its random numbers, order of the",
        "fine-tuning. What needs no data and no random numbers chooses the same channels under every seed. The standard error from the sample of",
        "test images alone is about 1. Sorted by the mean of the last three columns.",
        "",
        *table(head, ordered),
        "",
        *remarks(mine),
    ]
    return text


def remarks(mine: list[dict]) -> list[str]:
    """What the rows say about the baseline, and which scores choose the same channels."""

    def mean(name: str, share: float, kind: str) -> float:
        return statistics.mean([r[kind] for r in mine if r["score"] == name and r["share"] == share])

    names = [n for n in SCORES if all(any(r["score"] == n and r["share"] == s for r in mine) for s in SHARES)]
    if "random" not in names:
        return []
    below = {kind: [f"`{n}`" for n in names if n != "random" and all(mean(n, s, kind) < mean("random", s, kind) for s in SHARES)] for kind in ("cut", "tuned")}
    choices = {n: tuple(sorted((r["share"], r["seed"], r["choice"]) for r in mine if r["score"] == n)) for n in names}
    twins: dict[tuple, list[str]] = {}
    for name, choice in choices.items():
        twins.setdefault(choice, []).append(f"`{name}`")
    alike = "; ".join(", ".join(group) for group in twins.values() if len(group) > 1)
    return [
        f"Below random at all three budgets without training: {', '.join(below['cut']) or 'none'}; after fine-tuning: {', '.join(below['tuned']) or 'none'}.",
        f"The same channels in every cell: {alike or 'none'} (they differ between groups, and the widths are fixed here).",
        "",
        "What to know of the lowest rows: `snip` and `grasp` are made for untrained networks; `grasp` removes first what raises the gradient's",
        "norm, which in a trained network is what its loss depends on. `taylor` squares the gradient of a batch's mean loss, which is nearly zero after",
        "training: `taylor_gate` and `fisher` take every sample by itself. `redundancy` looks at the angle between filters alone, and few filters of so narrow",
        "a network resemble each other.",
    ]


def times_part(rows: list[dict]) -> list[str]:
    mine = [row for row in rows if row["kind"] == "time"]
    if not mine:
        return ["Not measured yet."]
    models = list(dict.fromkeys(row["model"] for row in mine))
    found = {(row["score"], row["model"]): row for row in mine}

    def cells(row: dict | None) -> list[str]:
        if row is None:
            return ["", "", ""]
        if not row["made"]:
            return ["", "", f"{row['seconds']:.2f}"]
        return [f"{row['read'] / row.get('batches', 1):.2f}", f"{row['read'] / row['passes']:.2f}", f"{row['seconds'] - row['read']:.2f}"]

    def many(row: dict) -> float:
        """Over its passes, for MANY images: what follows the last pass is done once."""
        times = MANY / row["images"]
        return (row["read"] * times + row["seconds"] - row["read"]) / (row["passes"] * times)

    def named(over: list[dict], number: Callable[[dict], float]) -> str:
        return ", ".join(f"`{row['score']}` on {row['model']} ({number(row):.2f})" for row in over) or "none"

    lines = []
    for name in SCORES:
        held = [found.get((name, model)) for model in models]
        if any(held):
            lines.append([f"`{name}`", next(row["made"] or "none" for row in held if row), *(text for row in held for text in cells(row))])
    images = ", ".join(f"{next(r['images'] // r.get('batches', 1) for r in mine if r['model'] == model)} images for {model}" for model in models)
    whole = [f"`{row['score']}` on {row['model']} ({row['images']})" for row in found.values() if row.get("batches", 1) > 1]
    head = ["score", "passes", *(text for model in models for text in (f"{model}: reading, s", "over its passes", "once, s"))]
    with_data = [row for row in mine if row["made"]]
    slow = [row for row in mine if not row["made"] and row["seconds"] > 60]
    return [
        f"CPU seconds on one thread, one batch of 224 x 224 images ({images}), random weights, torch {torch.__version__.split('+')[0]}.",
        "*Passes*: what the score is made of, timed plainly over the same batch, with nothing watching: *forward*; *gradient*, forward and backward for all",
        "parameters (`effect` itself asks only for those of activations); *single*, the same for one image at a time; *curvature*, a product with the Hessian.",
        "*Reading*: the score's time until the last pass has ended, and its ratio to those passes, which does not grow with the number of images. *Once*: what",
        "follows, whatever the number of images (decompositions of matrices of units); for a score without data, all of it.",
        "",
        *table(head, lines),
        "",
        f"Without data and over 60 s: {named(slow, lambda row: row['seconds'])}. Reading over twice the passes: "
        f"{named([r for r in with_data if r['read'] > 2 * r['passes']], lambda r: r['read'] / r['passes'])}. "
        f"Everything over twice the passes, for {MANY} images: {named([r for r in with_data if many(r) > 2], many)}; the most: "
        f"{named(sorted(with_data, key=many, reverse=True)[:5], many)}. Read with so many images instead of one batch: {', '.join(whole) or 'none'}.",
    ]


def page(rows: list[dict]) -> str:
    parts = [
        "# Scores",
        "",
        made_by("python benchmarks/scores.py"),
        "",
        "`graphprune.score(groups, model, name, batches, loss)` or `shrink(..., score=name)`; larger means more important.",
        'Formulas stand in the docstrings (`help(graphprune.scores.l2)`), options are fixed by `graphprune.scores.l2.with_(reduce="mean")`.',
        "",
        "## Catalogue",
        "",
        *catalogue(),
        "",
        "## Accuracy on a trained network",
        "",
        *accuracy_part(rows),
        "",
        "## Whole blocks",
        "",
        *blocks_part(rows),
        "",
        "## Times",
        "",
        *times_part(rows),
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the real data (default ../shared/data)")
    parser.add_argument("--json", type=Path, default=Path("scores.jsonl"), help="rows, appended to as they are made")
    parser.add_argument("--out", type=Path, help="write the page from the rows")
    parser.add_argument("--times", action="store_true", help="measure seconds instead of accuracy")
    parser.add_argument("--blocks", action="store_true", help="measure scores of whole blocks instead of channels")
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    parser.add_argument("--names", nargs="*", help="these scores only")
    parser.add_argument("--models", nargs="*", help="with --times: these models only")
    parser.add_argument("--batches", type=int, default=1, help="with --times: how many batches of that size are read")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = Rows(options.json)
    rows = kept.rows

    if not options.only_table:
        (measure_times if options.times else measure_blocks if options.blocks else measure_accuracy)(options, rows, kept.add)
    if options.out:
        options.out.write_text(page(rows))


if __name__ == "__main__":
    main()
