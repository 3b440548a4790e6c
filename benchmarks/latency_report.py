"""The tables and plots of ``benchmarks/latency.py``, from its rows."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from common import Rows, made_by

NEAR = 0.05
TITLES = {
    "resnet50": "ResNet-50", "resnet18": "ResNet-18", "mobilenet_v2": "MobileNetV2", "efficientnet_b0": "EfficientNet-B0", "regnet_y": "RegNetY-800MF",
    "convnext_t": "ConvNeXt-T", "vit_s": "ViT-S", "swin_t": "Swin-T", "minilm": "MiniLM encoder", "densenet121": "DenseNet-121",
    "resnet20": "ResNet-20", "resnet56": "ResNet-56",
}  # fmt: skip


def write(kept: Rows, path: Path) -> None:
    """The report as Markdown, and its plots beside it; the last row of each cell counts."""
    rows = kept.rows
    latest = {tuple(row.get(k) for k in ("job", "model", "runtime", "side", "target", "kind", "way")): row for row in rows}
    pick = lambda job, kind=None: [r for r in latest.values() if r["job"] == job and r.get("kind") == kind]  # noqa: E731
    asked, again = pick("search"), {_cell(r): r for r in pick("fresh")}
    peers = [row for kind in ("time", "0.5", "score") for row in pick("peer", f"objective {kind}")]
    parts = {r["model"]: r for r in pick("fresh", "parts")}
    sides = sorted({r["side"] for r in rows})
    text = [
        "# Speed asked for, speed got",
        "",
        f"{made_by('python benchmarks/latency.py', 'onnxruntime', 'openvino', 'torch-pruning', rows=kept)} {_setting(rows[-1])}, "
        f"{' and '.join(map(str, sides))} pixels (MiniLM: 128 tokens), random weights. Both sides of every comparison have their batch norms folded "
        "(`graphprune.fuse`) and, for convolutional models, `channels_last`. *Fresh* is another process that loads what the search saved and times it in "
        "the same rounds as the original: median, and its 95 % band. *Efficiency*: fresh speedup / (MACs before / MACs after).",
        "",
        *_summary(asked, again),
        "",
        *_cells(asked, again),
        *_efficiency(again.values(), parts, peers),
        *_peers(peers, [row for row in pick("peer") if "why" in row]),
        *_accuracy(pick("accuracy"), pick("objectives")),
        *_search(asked, pick("search", "warm")),
    ]
    path.write_text("\n".join(text).rstrip() + "\n")
    _plot(asked, again, [row for row in peers if row["kind"] == "objective time"], path.with_suffix(".png"))


def _cell(row: dict) -> tuple:
    return row["model"], row["runtime"], row["side"], row["target"]


def _setting(row: dict) -> str:
    """Machine, version, precision and batch of a row, and with it of all."""
    where = f"{row['on']}, torch {row['torch']}, clock of the device" if "on" in row else f"{_machine()}, torch {torch.__version__}, one thread"
    return f"{where}, {'float16' if row.get('half') else 'float32'}, batch {row.get('batch', 1)}"


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _summary(asked: list[dict], again: dict[tuple, dict]) -> list[str]:
    lines = []
    for runtime in dict.fromkeys(r["runtime"] for r in asked):
        mine = [r for r in asked if r["runtime"] == runtime and r["target"]]
        cells = [(r, again[_cell(r)]) for r in mine if _cell(r) in again]
        errors = [abs(fresh["speedup"] / r["target"] - 1) for r, fresh in cells]
        near, out = sum(e <= NEAR for e in errors), sum("why" in r for r in mine)
        if errors:
            lines.append(
                f"- **{runtime}**: {near} of {len(errors)} cells within {NEAR:.0%} of what was asked, in a fresh process "
                f"(median error {statistics.median(errors):.1%}, worst {max(errors):.1%}){f'; {out} targets could not be reached' if out else ''}"
            )
    return lines


def _cells(asked: list[dict], again: dict[tuple, dict]) -> list[str]:
    lines = ["## Every cell", "", "| model | runtime | asked | predicted | at search | fresh (band) | error | MACs | efficiency | control | original |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in sorted(asked, key=lambda r: (r["runtime"], r["model"], r["target"])):
        fresh = again.get(_cell(row))
        head = f"| {TITLES[row['model']]} | {row['runtime']} | {row['target']:g}x |"
        if "why" in row or fresh is None:
            lines.append(f"{head} {row.get('why', 'not measured again').replace('|', '/')[:160]} | | | | | | | |")
            continue
        lines.append(
            f"{head} {row['predicted']:.2f}x | {row['measured']:.2f}x | **{fresh['speedup']:.2f}x** ({fresh['low']:.2f} to {fresh['high']:.2f}) | "
            f"{fresh['speedup'] / row['target'] - 1:+.1%} | {fresh['macs']:.2f}x | {fresh['speedup'] / fresh['macs']:.2f} | {fresh['control']:.3f} | "
            f"{fresh['reference']:.1f} ms |"
        )
    return [*lines, ""]


def _efficiency(fresh: Iterable[dict], parts: dict[str, dict], peers: list[dict]) -> list[str]:
    lines = [
        "## Efficiency, and where the time goes",
        "",
        "A time is met with the widths that keep the most score, not the most MACs, so efficiency is a result and no goal. Median over the targets; then",
        "where the uncut original's time goes in eager PyTorch, operation by operation, and how much of it no operation by itself explains (*between*: calls,",
        "Python, caches that the operations do not share). Dense products are bound by arithmetic and fall with the square of the width, as MACs do;",
        "depthwise convolutions, norms, activations and additions move about as many bytes as they compute numbers, are bound by memory, and fall with the",
        "width; what lies between stays. *Roofline*: the efficiency that these shares d, m (depthwise and all else) and b leave at R times fewer MACs,",
        "1 / (d / R + m / sqrt(R) + b) / R, median over the targets.",
        "",
        "| model | runtime | efficiency | roofline | dense products | depthwise | all else | between |",
        "|---|---|---|---|---|---|---|---|",
    ]
    every: dict[tuple[str, str], list[dict]] = {}
    for row in fresh:
        every.setdefault((row["model"], row["runtime"]), []).append(row)
    for (model, runtime), rows in every.items():
        shares = _shares(parts.get(model), rows) if runtime == "eager" else None
        bound = statistics.median(_roofline(shares, row["macs"]) for row in rows) if shares else None
        last = f"{bound:.2f} | {' | '.join(f'{share:.0%}' for share in shares)}" if shares else " | | | | "
        lines.append(f"| {TITLES[model]} | {runtime} | {statistics.median(_gain(row) for row in rows):.2f} | {last} |")
    for runtime in dict.fromkeys(runtime for _, runtime in every):
        lines.append(
            f"| median | {runtime} | **{statistics.median(_gain(row) for (_, r), rows in every.items() if r == runtime for row in rows):.2f}** | | | | | |"
        )
    fast = [row["ours"] / row["macs"] for row in peers if row["kind"] == "objective time"]
    if fast:
        low, middle, high = min(fast), statistics.median(fast), max(fast)
        lines += ["", f'With a budget of MACs and `objective="time"` (next section) it is **{middle:.2f}** in the median ({low:.2f} to {high:.2f}).']
    return [*lines, ""]


def _gain(row: dict) -> float:
    return row["speedup"] / row["macs"]


def _shares(parts: dict | None, rows: list[dict]) -> list[float] | None:
    """Of the original's measured time: dense products, depthwise, all else, and what lies between them."""
    if not parts:
        return None
    alone = min(1.0, parts.get("ms", rows[0]["reference"]) / statistics.median(row["reference"] for row in rows))
    return [*(alone * parts[kind] for kind in ("products", "depthwise", "rest")), 1 - alone]


def _roofline(shares: list[float], macs: float) -> float:
    dense, depthwise, rest, between = shares
    return 1 / (dense / macs + (depthwise + rest) / macs**0.5 + between) / macs


def _peers(rows: list[dict], refused: list[dict]) -> list[str]:
    if not rows and not refused:
        return []
    lines = [
        "## Beside Torch-Pruning at equal MACs",
        "",
        "Torch-Pruning: `GroupMagnitudeImportance(p=2)` with `BasePruner`, `round_to=16`, the classifier ignored, its ratio found by bisection so that its",
        "MACs come nearest to half. Ours: `shrink(model, x, macs=…, objective=…)` with at least as many MACs (no more than the widths make necessary): for",
        '"time" the fastest such widths that the table of operations predicts, for 0.5 the most score per time, for "score" the most score. All of',
        "them and the original in the same rounds, norms folded and `channels_last` for all.",
        "",
        "What this is: the speed that the same number of MACs can have, depending on which channels go. What it is not: a comparison of accuracy. The fastest",
        "widths give up whole regions of the network (the largest images, the stream between the blocks) whatever their scores, so they are a corner of what",
        "is possible and want training; 0.5 keeps a good part of every group. The sections after this one compare accuracy, at equal time and at equal MACs.",
        "",
        '| model | MACs theirs / ours | theirs | ours, "time" | faster by | ours, 0.5 | faster by | ours, "score" | faster by | noise |',
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["target"]), {})[row["kind"].removeprefix("objective ")] = row
    for (model, _), found in cells.items():
        first, macs = found["time"], " / ".join(f"{row['macs']:.2f}x" for row in found.values())
        each = " | ".join(f"{row['ours']:.2f}x | **{row['gain'] - 1:+.0%}**" for row in found.values())
        lines.append(
            f"| {TITLES[model]} | {first['their_macs']:.2f}x / {macs} | {first['theirs']:.2f}x | {each} | {max(r['noise'] for r in found.values()):.1%} |"
        )
    lines += [f"| {TITLES[row['model']]} | Torch-Pruning does not run: {row['why'].replace('|', '/')[:120]} | | | | | | | | |" for row in refused]
    middle = [statistics.median(found[kind]["gain"] for found in cells.values()) - 1 for kind in ("time", "0.5", "score")] if cells else []
    return [*lines, f"| median | | | {' | '.join(f'| **{gain:+.0%}**' for gain in middle)} | |" if cells else "", ""]


def _accuracy(rows: list[dict], budgets: list[dict]) -> list[str]:
    lines = []
    head = "Trained on CIFAR-10 (JPEG), batch 64, eager, no training after the cut: closed-form repair on 512 images; top-1 on test images."
    for title, text, column, mine in (
        ("Accuracy at equal measured time", head, "widths", rows),
        ("Accuracy at equal MACs, spent for score or for speed", f"{head} Asked: MACs before / after.", "objective", budgets),
    ):
        mine = [row for row in mine if "top1" in row]
        if not mine:
            continue
        lines += [f"## {title}", "", text, "", f"| model | asked | {column} | measured (band) | MACs | top-1 after repair | before repair | uncut |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for row in mine:
            lines.append(
                f"| {TITLES[row['model']]} | {row['target']:g}x | {row['way']} | {row['speedup']:.2f}x ({row['low']:.2f} to {row['high']:.2f}) | "
                f"{row['macs']:.2f}x | **{row['top1']:.2f}** | {row['cut']:.2f} | {row['base']:.2f} |"
            )
        lines.append("")
    return lines


def _search(asked: list[dict], warm: list[dict]) -> list[str]:
    lines = [
        "## How long the search takes",
        "",
        "*First*: the first target with what the table held then; *warm*: the same again. ResNet-50 runs first in every runtime, so",
        "its first search is a cold one.",
        "",
    ]
    lines += ["| model | runtime | first | warm |", "|---|---|---|---|"]
    seconds = {_cell(r): r["seconds"] for r in asked if "seconds" in r}
    for row in warm:
        if _cell(row) in seconds:
            lines.append(f"| {TITLES[row['model']]} | {row['runtime']} | {seconds[_cell(row)]:.1f} s | {row['seconds']:.1f} s |")
    return [*lines, ""]


def _plot(asked: list[dict], again: dict[tuple, dict], peers: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for index, runtime in enumerate(dict.fromkeys(r["runtime"] for r in asked)):
        points = [(r["target"] * (1 + 0.01 * index), again[_cell(r)]["speedup"]) for r in asked if r["runtime"] == runtime and _cell(r) in again]
        if points:
            left.plot(*zip(*points, strict=True), "o", alpha=0.6, label=runtime)
    targets = sorted({r["target"] for r in asked if r["target"]}) or [1.0]
    ends = [min(targets) * 0.95, max(targets) * 1.05]
    left.plot(ends, ends, "k-", lw=0.8)
    left.fill_between(ends, [e * (1 - NEAR) for e in ends], [e * (1 + NEAR) for e in ends], alpha=0.15, color="k")
    left.set(xlabel="speedup asked", ylabel="speedup measured in a fresh process", title="asked and got (band: 5 %)")
    if asked:
        left.legend()
    names = [TITLES[row["model"]] for row in peers]
    right.barh(names, [row["theirs"] for row in peers], height=0.35, align="edge", label="Torch-Pruning")
    right.barh(names, [row["ours"] for row in peers], height=-0.35, align="edge", label='graphprune, objective="time"')
    right.set(xlabel="measured speedup at equal MACs", title="beside Torch-Pruning (eager)")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
