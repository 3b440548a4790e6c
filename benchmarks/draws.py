"""Draw networks from every construct of tests/networks.py and compare: cut equals zeroed, and zeroing other units differs.

    python benchmarks/draws.py --draws 2000 --json draws.jsonl --out docs/draws.md

Runs in pieces of 100 draws, each with a seed of its own; pieces already in the file are not run again.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from common import Rows, made_by
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from networks import BLOCKS, networks

import graphprune
from graphprune.errors import NothingToPrune

X = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
RATIOS, SCOPES = st.sampled_from([0.25, 0.5, 0.75]), st.sampled_from(["layer", "global", "isomorphic"])


def gap(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))


def piece(number: int, draws: int) -> dict:
    """One run of Hypothesis; the worst relative gaps to the zeroed original, and the least to one with other units zeroed."""
    row = {"seed": number, "draws": 0, "whole": 0, "controls": 0, "equal": 0, "worst": 0.0, "control": float("inf"), "blocks": Counter(), "failures": []}

    @seed(number)
    @settings(max_examples=draws, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(networks(), RATIOS, SCOPES, st.integers(0, 99))
    def law(net, ratio, scope, dice):
        row["draws"] += 1
        blocks = [type(block).__name__ for block in net][1:-1]
        row["blocks"].update(blocks)
        options = {"scope": scope, "return_plan": True, "verify": False}
        try:
            small, plan = graphprune.shrink(net, X, ratio, score=graphprune.scores.random.with_(seed=dice), **options)
            _, other = graphprune.shrink(net, X, ratio, score=graphprune.scores.random.with_(seed=dice + 1000), **options)
        except NothingToPrune:
            row["whole"] += 1
            return
        with torch.no_grad():
            mine, (zero,) = small(Y), graphprune.zeroed(net, plan)(Y)
            row["worst"] = max(row["worst"], gap(mine, zero))
            if other.cuts != plan.cuts:
                row["controls"] += 1
                differs = gap(mine, graphprune.zeroed(net, other)(Y)[0])
                row["control"] = min(row["control"], differs)
                row["equal"] += differs < 1e-9  # no unit of this network reaches the output, whichever are kept
        if not gap(mine, zero) < 1e-9:
            row["failures"].append([ratio, scope, dice, *blocks])

    started = time.process_time()
    law()
    row["cpu"] = time.process_time() - started
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--piece", type=int, default=100)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pieces", type=int, default=10**6, help="run at most so many pieces now")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = Rows(options.json)
    done = set(kept.by("seed"))
    for number in [n for n in range(-(-options.draws // options.piece)) if n not in done][: options.pieces]:
        row = kept.add(piece(number, options.piece), shown=False)
        print({key: row[key] for key in ("seed", "draws", "whole", "worst", "control", "failures")}, flush=True)
    if options.out:
        options.out.write_text(report(kept.rows))


def report(rows: list[dict]) -> str:
    total = {key: sum(row[key] for row in rows) for key in ("draws", "whole", "controls", "equal", "cpu")}
    blocks: Counter = sum((Counter(row["blocks"]) for row in rows), Counter())
    counts = ", ".join(f"{name} {count}" for name, count in sorted(blocks.items()))
    return (
        f"# Drawn networks\n\n{made_by('python benchmarks/draws.py --json draws.jsonl --out docs/draws.md')}\n\n"
        f"Hypothesis drew {total['draws']} networks of one to four of {len(BLOCKS)} constructs (tests/networks.py), every weight random, in float64, "
        "with a random score, ratios 0.25 to 0.75\nand the scopes layer, global and isomorphic; compared on another batch size than the example.\n\n"
        f"- cut differs from zeroed (relative to 1e-9): **{sum(len(row['failures']) for row in rows)}**\n"
        f"- largest relative gap between cut and zeroed: {max(row['worst'] for row in rows):.1e}\n"
        f"- control, other units zeroed: {total['controls'] - total['equal']} of {total['controls']} differ (by more than 1e-9)\n"
        f"- networks with nothing to prune: {total['whole']}\n- CPU time: {total['cpu']:.0f} s\n\nConstructs drawn: {counts}.\n"
    )


if __name__ == "__main__":
    main()
