"""A long soak: networks drawn from every construct of tests/networks.py and tests/constructs.py, under every kind of target, cut with and without the check,
and judged by a second, slow oracle that shares no code with the engine (tests/judge.py).

    python benchmarks/soak.py --networks 20000 --json soak.jsonl --out docs/soak.md

Runs in pieces of ``--piece`` networks, each in a process of its own; pieces already in the file are not run again. What comes of a network:

* *equal*: the cut model computes what the judge computes, on the example and on another batch size; *whole*: nothing could be removed, with a reason;
* *silent*: another result with the check on; *unchecked*: another result with ``verify=False`` which the check refuses;
* *refused*: an error of graphprune; *raised*: any other error.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import random
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import Rows, made_by
from constructs import CONSTRUCTS
from judge import emptied, gap
from networks import BLOCKS, Flat
from torch import nn

import graphprune
from graphprune.errors import GraphpruneError, NothingToPrune

# Norms that are no modules of torch take their statistics of what stays, which a judge that knows only zeros cannot say.
NORMS = ("Standardised", "GlobalResponse")
KINDS = tuple(kind for kind in (*BLOCKS, *CONSTRUCTS) if kind.__name__ not in NORMS)
LIMIT = 1e-8
OUTCOMES = ("equal", "whole", "silent", "unchecked", "refused", "raised")


def network(dice: random.Random, only: str = "") -> tuple[nn.Module, list[str]]:
    """A stem, one to three constructs, a head; every weight random, float64, evaluation mode."""
    torch.manual_seed(dice.randrange(10**9))
    width = dice.choice((4, 6, 8, 12))
    kinds = [dice.choice(KINDS) for _ in range(dice.choice((1, 1, 2, 3)))]
    if only:
        kinds[0] = next(kind for kind in KINDS if kind.__name__ == only)
    inner = [kind(width, dice.choice((4, 6, 8))) for kind in kinds]
    head = Flat(width) if dice.random() < 0.5 else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    net = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), *inner, head).double().eval()
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point() and not name.endswith(("table", "_u", "_v", "original0")):
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.4)
    return net, [kind.__name__ for kind in kinds]


def request(dice: random.Random) -> dict[str, Any]:
    """What is asked of the network."""
    wanted: dict[str, Any] = dice.choice(({"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.75}, {"macs": 0.5}, {"params": 0.4}))
    wanted = {**wanted, "scope": dice.choice(("layer", "global", "isomorphic"))}
    return {**wanted, "widths": graphprune.Widths(multiple_of=2)} if dice.random() < 0.1 else wanted


def outcome(net: nn.Module, wanted: dict[str, Any], seed: int, verify: bool) -> tuple[str, str]:
    """What comes of one call of ``shrink``, and what there is to say about it."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(count, 2, 4, 4, dtype=torch.float64, generator=generator) for count in (2, 3))
    score = graphprune.scores.random.with_(seed=seed)
    try:
        small, plan = graphprune.shrink(net, x.clone(), score=score, verify=verify, return_plan=True, **wanted)
    except NothingToPrune as error:
        return "whole", str(error).splitlines()[0][:120]
    except GraphpruneError as error:
        return "refused", f"{type(error).__name__}: {error}".splitlines()[0][:200]
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}".splitlines()[0][:200]
    zero = emptied(net, plan)
    with torch.no_grad():
        for batch in (x, other):
            try:
                far = gap(small.eval()(batch.clone()), zero(batch.clone()))
            except Exception as error:
                return "silent", f"the cut model fails: {type(error).__name__}: {error}".splitlines()[0][:200]
            if not far < LIMIT:
                return "silent", f"differs by {far:.1e}"
    return ("equal" if plan.cuts else "whole"), ""


def piece(number: int, count: int, only: str = "") -> dict:
    """Draw and judge ``count`` networks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dice = random.Random(number)
    outcomes: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    faults, started = [], time.process_time()
    for index in range(count):
        seed = dice.randrange(10**9)
        net, names = network(dice, only)
        wanted = request(dice)
        drawn.update(names)
        what, why = outcome(net, wanted, seed, verify=True)
        if what in ("equal", "whole"):
            unchecked, reason = outcome(net, wanted, seed, verify=False)
            if unchecked == "silent":
                what, why = "unchecked", reason
        outcomes[what] += 1
        if what not in ("equal", "whole"):
            faults.append([what, "+".join(names), str(wanted), why, index])
    return {"piece": number, "count": count, "outcomes": outcomes, "drawn": drawn, "faults": faults, "seconds": time.process_time() - started}


def report(rows: Rows) -> str:
    total = {key: sum(row["outcomes"].get(key, 0) for row in rows.rows) for key in OUTCOMES}
    drawn: Counter[str] = sum((Counter(row["drawn"]) for row in rows.rows), Counter())
    faults = [fault for row in rows.rows for fault in row["faults"]]
    lines = ["# Soak", "", made_by("python benchmarks/soak.py --networks N --json soak.jsonl --out docs/soak.md", rows=rows), ""]
    lines += [
        f"{sum(row['count'] for row in rows.rows):,} networks of one to three of {len(KINDS)} constructs, seeds 0 to {len(rows.rows) - 1}; ratios, MACs and"
    ]
    lines += [
        "parameters asked for, three scopes, random scores, float64; judged by `tests/judge.py` on the example and on another batch size to 1e-8 (relative).",
        "",
    ]
    lines += ["| outcome | networks |", "|---|---|", *(f"| {name} | {count:,} |" for name, count in total.items()), ""]
    lines += [
        f"{sum(row['seconds'] for row in rows.rows) / 60:.0f} CPU minutes. Every construct was drawn at least {min(drawn.values(), default=0)} times.",
        "",
    ]
    if faults:
        lines += ["| outcome | constructs | asked | what |", "|---|---|---|---|"]
        lines += [f"| {what} | {names} | {wanted} | {why.replace('|', '/')} |" for what, names, wanted, why, _ in sorted(faults)[:200]] + [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=20_000)
    parser.add_argument("--piece", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="the first construct of every network")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = Rows(options.json)
    known = set(rows.by("piece"))
    todo = [number for number in range(-(-options.networks // options.piece)) if number not in known]
    with mp.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(piece, (number, options.piece, options.only)) for number in todo]
        for job in jobs:
            row = rows.add(job.get(), shown=False)
            print(row["piece"], dict(row["outcomes"]), f"{row['seconds']:.0f} s", flush=True)
            for fault in row["faults"]:
                print("   ", *fault, flush=True)
    if options.out:
        options.out.write_text(report(rows))


if __name__ == "__main__":
    main()
