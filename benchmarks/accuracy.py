"""Accuracy after one-shot pruning without labels and without training, side by side with Torch-Pruning at equal MACs.

    python benchmarks/accuracy.py --data DIR --rows accuracy.jsonl --out docs/accuracy.md

Both prune the channels inside the residual blocks. Torch-Pruning 1.6 (needs ``pip install torch-pruning``) runs with L1, L2, BN scale, Taylor (which
gets the labels of the calibration images) and FPGM, layer by layer, and L2, BN scale and Taylor ranked globally: the ratio is the largest that
leaves at least the MACs of the target. Every one of its models is measured as it ships and after batch-norm re-estimation on the same images, and the
best of each, chosen on the test images, is compared. Ours then gets at most the MACs of the smaller of those two. Every finished cell is
a line of ``--rows`` and is not run again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import Rows, macs, made_by, reestimated
from realdata import accuracy, cifar_resnet, fashion_resnet, load_cifar, load_fashion, normalise
from torch import nn

import graphprune

TARGETS = {"resnet56": (1.5, 2.0, 2.15, 3.0, 4.0), "resnet20": (1.5, 2.0, 3.0, 4.0), "fashion": (1.5, 2.0, 3.0, 4.0)}
KEEP = ["conv1", "layer*.bn2", "linear"]
LOCAL = ("L1", "L2", "BN scale", "Taylor", "FPGM")
GLOBAL = ("L2", "BN scale", "Taylor")
COUNTS = (32, 64, 128, 256, 1024, 2048)
RATIOS = (0.25, 0.4, 0.5)
STEPS = {"BN re-estimation": ["bn"], "least squares": ["least-squares"], "then censored": ["least-squares", "censored"], "auto": "auto"}
NAMES = {"resnet56": "ResNet-56, CIFAR-10 (JPEG)", "resnet20": "ResNet-20, CIFAR-10 (JPEG)", "fashion": "ResNet-20, Fashion-MNIST"}


def load(name: str, data: str | None) -> tuple:
    """The model, training images and labels, test images and labels (test images normalised)."""
    if name == "fashion":
        model, (train, labels, test, truth) = fashion_resnet(data), load_fashion()
    else:
        model, (train, labels, test, truth) = cifar_resnet(int(name[6:]), data), load_cifar(data)
    return model, train, labels, normalise(test), truth


def sample(train: torch.Tensor, labels: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    return normalise(train[chosen]), labels[chosen]


def narrowed(cut: Callable[[float], nn.Module], x: torch.Tensor, budget: float, above: bool, rounds: int = 11) -> nn.Module:
    """The model whose MACs come nearest to the budget from above (or below), by bisection over the ratio."""
    low, high, best = 0.0, 0.99, None
    for _ in range(rounds):
        middle = (low + high) / 2
        model = cut(middle)
        over = macs(model, x) >= budget if above else macs(model, x) > budget
        low, high = (middle, high) if over else (low, middle)
        if over == above:
            best = model
    return best


def importances() -> dict[str, Callable]:
    """Torch-Pruning's criteria by name."""
    import torch_pruning as tp

    return {
        "L1": lambda: tp.importance.MagnitudeImportance(p=1),
        "L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "BN scale": lambda: tp.importance.BNScaleImportance(),
        "Taylor": lambda: tp.importance.GroupTaylorImportance(),
        "FPGM": lambda: tp.importance.FPGMImportance(),
    }


def peer(model: nn.Module, criterion: str, globally: bool, budget: float, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    import torch_pruning as tp

    grads: list[torch.Tensor] = []
    if criterion == "Taylor":
        for part, truth in zip(x.split(128), y.split(128), strict=True):
            found = torch.autograd.grad(nn.functional.cross_entropy(model(part), truth, reduction="sum") / len(x), list(model.parameters()))
            grads = [a + b for a, b in zip(grads, found, strict=True)] if grads else list(found)

    def cut(ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        for parameter, grad in zip(small.parameters(), grads, strict=False):
            parameter.grad = grad.clone()
        whole = [m for n, m in small.named_modules() if n in ("conv1", "linear") or n.endswith(".conv2")]
        inner = [m for n, m in small.named_modules() if n.endswith(".conv1")]
        step, share = divmod(ratio * 64, 1)  # a whole step for every layer is 3 % of the MACs: the last layers take theirs first
        later = {m: (step + 1) / 64 for m in inner[round(len(inner) * (1 - share)) :]}
        pruner = tp.pruner.BasePruner(
            small,
            x[:1],
            importance=importances()[criterion](),
            global_pruning=globally,
            pruning_ratio=ratio if globally else step / 64,
            pruning_ratio_dict=None if globally else later,
            max_pruning_ratio=0.95 if globally else 1.0,
            ignored_layers=whole,
        )
        pruner.step()
        small.zero_grad(set_to_none=True)
        return small.eval()

    return narrowed(cut, x[:1], budget, above=True, rounds=13)


def scored(model: nn.Module, x: torch.Tensor) -> tuple[Callable, float]:
    """Our criterion, computed once for all targets, and its seconds."""
    known: list = []
    start = time.perf_counter()

    def criterion(groups, model, batches):
        if not known:
            known.append(graphprune.score(groups, model, "effect", x.split(128), progress=False))
        return known[0]

    graphprune.shrink(model, x[:1], 0.5, score=criterion, scope="global", keep=KEEP, verify=False)
    return criterion, time.perf_counter() - start


def cut(model: nn.Module, criterion: Callable, budget: float, x: torch.Tensor) -> nn.Module:
    """Ours before the repair, at most at so many MACs."""
    options = {"score": criterion, "scope": "global", "keep": KEEP, "verify": False}
    return narrowed(lambda ratio: graphprune.shrink(model, x[:1], ratio, **options), x[:1], budget, above=False, rounds=14)


def ours(model: nn.Module, criterion: Callable, budget: float, x: torch.Tensor) -> tuple[nn.Module, nn.Module, float]:
    """The cut model, the repaired one, and the seconds of the repair."""

    small = cut(model, criterion, budget, x)
    start = time.perf_counter()
    better = graphprune.repair(small, model, None, x.split(max(4, min(128, len(x) // 4))), progress=False)
    return small, better, time.perf_counter() - start


def theirs(known: dict, name: str, target: float) -> dict[str, dict]:
    return {k.split("/", 3)[3]: v for k, v in known.items() if k.startswith(f"{name}/{target}/peer/")}


def bests(found: dict[str, dict]) -> tuple[str, str]:
    """Their best as it ships and their best after re-estimation."""
    return max(found, key=lambda k: found[k]["top1"]), max(found, key=lambda k: found[k]["bn"])


def cells(names: list[str], options: argparse.Namespace, known: dict, done: Callable) -> None:
    for name in names:
        model, train, labels, test, truth = load(name, options.data)
        test, truth = test[:: options.every], truth[:: options.every]
        base = accuracy(model, test, truth)
        x, y = sample(train, labels, 512, 0)
        full = macs(model, x[:1])
        for target in TARGETS[name]:
            for globally, kinds in ((False, LOCAL), (True, GLOBAL)):
                for kind in kinds:
                    key = f"{name}/{target}/peer/{'global' if globally else 'local'}/{kind}"
                    if key not in known:
                        small = peer(model, kind, globally, full / target, x, y)
                        found = {"top1": accuracy(small, test, truth), "bn": accuracy(reestimated(small, x.split(128)), test, truth)}
                        done(key, {**found, "macs": macs(small, x[:1]), "full": full})
        budget = {t: min(theirs(known, name, t)[k]["macs"] for k in bests(theirs(known, name, t))) for t in TARGETS[name]}
        for seed in range(options.seeds):
            wanted = [t for t in TARGETS[name] if f"{name}/{t}/ours/512/{seed}" not in known]
            if not wanted:
                continue
            x, y = sample(train, labels, 512, seed)
            criterion, spent = scored(model, x)
            for target in wanted:
                small, better, seconds = ours(model, criterion, budget[target], x)
                found = {"cut": accuracy(small, test, truth), "top1": accuracy(better, test, truth), "macs": macs(small, x[:1])}
                done(f"{name}/{target}/ours/512/{seed}", {**found, "full": full, "seconds": seconds + spent, "base": base})


def curve(name: str, options: argparse.Namespace, known: dict, done: Callable) -> None:
    """Accuracy at 2x over the number of calibration images."""
    wanted = [(n, s) for s in range(options.seeds) for n in COUNTS if f"{name}/2.0/ours/{n}/{s}" not in known]
    if not wanted:
        return
    model, train, labels, test, truth = load(name, options.data)
    test, truth = test[:: options.every], truth[:: options.every]
    for count, seed in wanted:
        x, _ = sample(train, labels, count, seed)
        criterion, spent = scored(model, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few samples: the repair says so
            small, better, seconds = ours(model, criterion, macs(model, x[:1]) / 2, x)
        done(f"{name}/2.0/ours/{count}/{seed}", {"top1": accuracy(better, test, truth), "seconds": seconds + spent})


def without_data(name: str, options: argparse.Namespace, known: dict, done: Callable) -> None:
    """The same cut (L2, the same share of every layer) as it is, after batch-norm re-estimation, repaired without data, and repaired with data."""
    wanted = [ratio for ratio in RATIOS if f"{name}/free/{ratio}" not in known]
    if not wanted:
        return
    model, train, labels, test, truth = load(name, options.data)
    test, truth = test[:: options.every], truth[:: options.every]
    x, _ = sample(train, labels, 512, 0)
    graph = graphprune.trace(model, x[:1])
    for ratio in wanted:
        small = graphprune.shrink(model, x[:1], ratio, keep=KEEP, verify=False)
        start = time.perf_counter()
        free = graphprune.repair(small, model, steps="data-free", graph=graph)
        seconds = time.perf_counter() - start
        ways = {"cut": small, "bn": reestimated(small, x.split(128)), "free": free, "auto": graphprune.repair(small, model, None, x.split(128), progress=False)}
        done(f"{name}/free/{ratio}", {**{way: accuracy(each, test, truth) for way, each in ways.items()}, "seconds": seconds})


def each_step(name: str, options: argparse.Namespace, known: dict, done: Callable) -> None:
    """The same cuts repaired in part and in whole."""
    model, train, labels, test, truth = load(name, options.data)
    test, truth = test[:: options.every], truth[:: options.every]
    for seed in range(options.seeds):
        wanted = [target for target in (2.0, 3.0, 4.0) if f"{name}/steps/{target}/{seed}" not in known]
        if not wanted:
            continue
        x, _ = sample(train, labels, 512, seed)
        criterion, _ = scored(model, x)
        for target in wanted:
            small = cut(model, criterion, macs(model, x[:1]) / target, x)
            found = {"cut": accuracy(small, test, truth)}
            for way, steps in STEPS.items():
                start = time.perf_counter()
                better = graphprune.repair(small, model, None, x.split(128), steps, progress=False)
                found |= {way: accuracy(better, test, truth), f"{way}, s": time.perf_counter() - start}
            done(f"{name}/steps/{target}/{seed}", found)


def table(known: dict, every: int, kept: Rows) -> str:
    images = "all test images" if every == 1 else f"every {every}th test image ({10000 // every:,})"
    lines = [
        "# Accuracy after one-shot pruning, without labels and without training",
        "",
        made_by("python benchmarks/accuracy.py --data DIR", "torch-pruning", rows=kept),
        "",
        f"`python benchmarks/accuracy.py --every {every} --curve --free`; torch {torch.__version__}, one thread, 512 calibration images (no",
        f"labels; from the training set), top-1 on {images}; CIFAR-10 is a JPEG copy. Both prune channels inside the blocks.",
        'Ours: score `effect` under `scope="global"`, then repair in closed form; mean and standard deviation over the seeds of the',
        "calibration sample (their number in the column *seeds*). Torch-Pruning 1.6.1: the best of eight runs (L1, L2, BN scale, Taylor with labels, FPGM",
        "layer by layer; L2, BN scale, Taylor globally), chosen on the test images; as it ships, and after batch-norm re-estimation on the same images.",
        "The MACs of each model are in brackets, as a share of the original's; ours are at most those of the models it is compared with.",
        "",
    ]
    for name, title in NAMES.items():
        rows = []
        for target in TARGETS[name]:
            mine = [v for k, v in known.items() if k.startswith(f"{name}/{target}/ours/512/") and "base" in v]
            other = theirs(known, name, target)
            if not mine or not other:
                continue
            base, tops = mine[0]["base"], [v["top1"] for v in mine]
            top, spread = statistics.mean(tops), statistics.stdev(tops) if len(tops) > 1 else 0.0
            ships, again = bests(other)
            drop, first, second = base - top, base - other[ships]["top1"], base - other[again]["bn"]
            share = [v["macs"] / v["full"] for v in (*mine, other[ships], other[again])]
            rows.append(
                f"| {target}x | **{top:.2f} ± {spread:.2f}** ({statistics.mean(share[:-2]):.4f}) | {len(mine)} | {drop:.2f} | "
                f"{other[ships]['top1']:.2f} ({ships}, {share[-2]:.4f}) | **{drop / first:.2f}** | "
                f"{other[again]['bn']:.2f} ({again}, {share[-1]:.4f}) | **{drop / second:.2f}** | "
                f"{statistics.mean(v['cut'] for v in mine):.2f} | {statistics.mean(v['seconds'] for v in mine):.0f} s |"
            )
        if rows:
            lines += [f"## {title}: {base:.2f} % before", ""]
            lines += [
                "| fewer MACs | ours, top-1 | seeds | our drop | Torch-Pruning as it ships | our drop / its | with BN re-estimation "
                "| our drop / its | ours before repair | time |"
            ]
            lines += ["|---|---|---|---|---|---|---|---|---|---|", *rows, ""]
    points = curve_points(known)
    if len(points) > 1:
        lines += ["## How many images (ResNet-20, 2x)", "", "| images | " + " | ".join(map(str, points)) + " |", "|---" * (len(points) + 1) + "|"]
        lines += ["| top-1 | " + " | ".join(f"{statistics.mean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else 0:.2f}" for v in points.values()) + " |"]
        lines += ["| seeds | " + " | ".join(str(len(v)) for v in points.values()) + " |", ""]
    rows = [(name, ratio, known[key]) for name in NAMES for ratio in RATIOS if (key := f"{name}/free/{ratio}") in known]
    if rows:
        lines += ["## Without any data", ""]
        lines += ["The same share of every layer's units by L2 norm; 512 images where data is used.", ""]
        lines += [
            '| model | units removed | cut | BN re-estimation (images) | `repair="data-free"` (no image) | `repair="auto"` (images) | seconds, data-free |'
        ]
        lines += ["|---" * 7 + "|"]
        for name, ratio, v in rows:
            lines += [f"| {NAMES[name]} | {ratio:.0%} | {v['cut']:.2f} | {v['bn']:.2f} | **{v['free']:.2f}** | {v['auto']:.2f} | {v['seconds']:.1f} |"]
        lines += [""]
    lines += steps_table(known)
    lines += ["![accuracy over MACs, and over the number of images](accuracy.png)", ""]
    return "\n".join(lines)


def steps_table(known: dict) -> list[str]:
    rows = {}
    for key, value in known.items():
        if "/steps/" in key:
            name, _, target, _ = key.split("/")
            rows.setdefault((name, target), []).append(value)
    if not rows:
        return []
    lines = ["## What each step of the repair gives", "", "The same cuts, repaired in part and in whole; means over the seeds of the sample.", ""]
    lines += ["| model | fewer MACs | seeds | cut | " + " | ".join(STEPS) + " | seconds, least squares and auto |", "|---" * (5 + len(STEPS)) + "|"]
    for (name, target), held in rows.items():
        mean = {key: statistics.mean(value[key] for value in held) for key in held[0]}
        cells = " | ".join(f"{mean[way]:.2f}" for way in ("cut", *STEPS))
        lines += [f"| {NAMES[name]} | {target}x | {len(held)} | {cells} | {mean['least squares, s']:.0f}, {mean['auto, s']:.0f} |"]
    return [*lines, ""]


def curve_points(known: dict) -> dict[int, list[float]]:
    """Top-1 of every seed by number of images."""
    found: dict[int, list[float]] = {}
    for key, value in known.items():
        if key.startswith("resnet20/2.0/ours/"):
            found.setdefault(int(key.split("/")[3]), []).append(value["top1"])
    return dict(sorted(found.items()))


def plot(known: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(NAMES) + 1, figsize=(16, 4))
    for axis, (name, title) in zip(axes, NAMES.items(), strict=False):
        for label, pick in (
            ("graphprune", lambda t, n=name: [v["top1"] for k, v in known.items() if k.startswith(f"{n}/{t}/ours/512/")]),
            ("Torch-Pruning + BN re-estimation (best)", lambda t, n=name: [v["bn"] for v in theirs(known, n, t).values()]),
            ("Torch-Pruning (best)", lambda t, n=name: [v["top1"] for v in theirs(known, n, t).values()]),
        ):
            points = [(t, statistics.mean(p) if label == "graphprune" else max(p)) for t in TARGETS[name] if (p := pick(t))]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(title=title, xlabel="times fewer MACs", ylim=(0, 100))
    axes[0].set_ylabel("top-1, %")
    axes[0].legend()
    points = curve_points(known)
    if points:
        means = [statistics.mean(v) for v in points.values()]
        axes[-1].errorbar(list(points), means, [statistics.stdev(v) if len(v) > 1 else 0.0 for v in points.values()], marker="o", capsize=3)
        axes[-1].set(title="ResNet-20, 2x", xlabel="calibration images", xscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="take every n-th test image")
    parser.add_argument("--rows", default="accuracy.jsonl", help="results so far, a line each; finished cells are not run again")
    parser.add_argument("--curve", action="store_true", help="also the curve over the number of images")
    parser.add_argument("--cells", action=argparse.BooleanOptionalAction, default=True, help="the comparison itself (--no-cells: only what else is named)")
    parser.add_argument("--steps", action="store_true", help="also what each step of the repair gives")
    parser.add_argument("--free", action="store_true", help="also the repair without data")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(options.rows)
    known = rows.by("cell")

    def done(key: str, found: dict) -> None:
        known[key] = found
        rows.add({"cell": key, **found})

    if options.cells:
        cells(options.models, options, known, done)
    if options.steps:
        for name in options.models:
            each_step(name, options, known, done)
    if options.curve:
        curve("resnet20", options, known, done)
    if options.free:
        for name in options.models:
            without_data(name, options, known, done)
    if options.out:
        Path(options.out).write_text(table(known, options.every, rows))
        plot(known, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
