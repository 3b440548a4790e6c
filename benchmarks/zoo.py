"""Shrink public architectures at ratio 0.5, each in its own process, and say which come out exact.

    python benchmarks/zoo.py --json zoo.jsonl --out docs/zoo.md            # everything; run again to go on after a stop
    python benchmarks/zoo.py --only timm --jobs 2
    python benchmarks/zoo.py --json zoo.jsonl --out docs/zoo.md --table    # the table from the rows there are, nothing measured

Limits and seconds are CPU time on one thread, so that other work on the machine changes no verdict. Every parameter and
statistic is random, the arithmetic is float64; EXACT means that the cut model equals the zeroed original to 1e-8 (relative);
1e-4 where the model's own code insists on float32. *Reach* is MACs before / after, with widths that no configuration limits.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import multiprocessing.connection
import platform
import resource
import statistics
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from common import Rows, commit, macs
from flops import flops
from zoo_models import build, names
from zoo_support import declare_operators, randomise

import graphprune
from graphprune.cutting.verify import check

FREE = graphprune.Widths(uniform=False)


def grow(tree, times: int):
    """The same inputs with a larger batch; a list of images is itself a batch."""
    if isinstance(tree, torch.Tensor):
        return torch.cat([tree] * times) if tree.ndim else tree
    if isinstance(tree, list):
        return tree * times
    if isinstance(tree, tuple):
        return tuple(grow(item, times) for item in tree)
    return {key: grow(item, times) for key, item in tree.items()} if isinstance(tree, dict) else tree


def double(tree):
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, tuple | list):
        return type(tree)(double(item) for item in tree)
    return {key: double(item) for key, item in tree.items()} if isinstance(tree, dict) else tree


def targets(name: str, args: tuple) -> tuple:
    """What a detector asks for in training: one box and one class for each image."""
    if not name.startswith("detection/"):
        return ()
    box = {"boxes": args[0][0].new_tensor([[20.0, 20.0, 80.0, 90.0]]), "labels": torch.tensor([1])}
    return ([box] * len(args[0]),)


def one(name: str, send, limit: float) -> None:
    """Measure one architecture; runs in a process of its own, which ends when it has used ``limit`` seconds of CPU or 10 GiB."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    row = {"name": name, "verdict": "FAIL", "kind": name.split("/")[0], "commit": COMMIT}
    try:
        torch.manual_seed(0)
        model, args, kwargs = build(name)
        model, limit = randomise(model), 1e-8
        with torch.no_grad():
            try:
                model.double()(*double(args), **double(kwargs))
                args, kwargs = double(args), double(kwargs)
            except Exception:  # some code insists on float32
                model, limit = model.float(), 1e-4
                row["float32"] = True
        start = time.process_time()
        try:
            small, plan = graphprune.shrink(model, args, 0.5, example_kwargs=kwargs, return_plan=True, verify=False, widths=FREE)
        except graphprune.errors.NothingToPrune as error:
            row |= {"verdict": "LOCKED", "why": str(error)[:300]}
            return
        row["seconds"] = time.process_time() - start
        count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
        row |= {"class": type(small) is type(model), "rewritten": len(plan.rewrites), "params": count(model) / count(small), "notes": len(plan.notes)}
        row |= flops(model, args, kwargs)
        try:
            graph = graphprune.trace(model, args, kwargs)
            row["gap"] = check(graph, model, small, plan, tolerance=limit)
            row["verdict"] = "EXACT"
        except graphprune.errors.NotEqual as error:
            row |= {"verdict": "INEXACT" if "differs" in str(error) or "shape" in str(error)[:20] else "FAIL", "why": str(error)[:300]}
            return
        with contextlib.suppress(Exception):  # torch's counter wants a gradient in some custom functions
            row["reach"] = macs(model, *args, **kwargs) / max(1, macs(small, *args, **kwargs))
        try:
            with torch.no_grad():
                small.eval()(*grow(args, 2), **grow(kwargs, 2))
            row["batch"] = True
        except Exception as error:
            row |= {"batch": False, "why": f"another batch: {type(error).__name__}: {error}"[:300]}
        try:
            more = grow(args, 2)
            out = small.train()(*more, *targets(name, more), **grow(kwargs, 2))
            from graphprune.tracing.trees import tensors

            loss = sum(t.double().mean() for t in tensors(out, torch.Tensor) if t.is_floating_point() and t.requires_grad)
            loss.backward()
            torch.optim.SGD(small.parameters(), 1e-6).step()
            row["train"] = True
        except Exception as error:
            row |= {"train": False, "why": f"training: {type(error).__name__}: {error}"[:300]}
    except BaseException as error:
        row["why"] = f"{type(error).__name__}: {error} | {traceback.format_exc(limit=-2)}"[:500]
    finally:
        row["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        send.send(row)
        send.close()


def ended(name: str, code: int | None) -> dict:
    why = {-24: "CPU time limit", -9: "killed (memory, or CPU time limit)"}.get(code, f"the process ended with {code}")
    return {"name": name, "verdict": "FAIL", "kind": name.split("/")[0], "commit": COMMIT, "why": why}


def measure(todo: list[str], jobs: int, limit: float, report, work=one) -> list[dict]:
    """The row of every name, each from ``work(name, send, limit)`` in a process of its own."""
    rows, running, queue = [], [], list(todo)
    context = mp.get_context("fork")
    while queue or running:
        while queue and len(running) < jobs:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(queue[0], send, limit))
            process.start()
            send.close()
            running.append((queue.pop(0), process, receive))
        mp.connection.wait([receive for _, _, receive in running], timeout=1)
        for item in list(running):
            name, process, receive = item
            if not receive.poll():
                continue
            try:
                row = receive.recv()
            except EOFError:
                process.join()
                row = ended(name, process.exitcode)
            process.kill()
            process.join()
            running.remove(item)
            rows.append(row)
            report(row)
    return rows


def summary(rows: list[dict]) -> str:
    exact = [row for row in rows if row["verdict"] == "EXACT"]
    counts = {v: sum(row["verdict"] == v for row in rows) for v in ("EXACT", "INEXACT", "LOCKED", "FAIL")}
    lines = [f"**{len(rows)} architectures: " + ", ".join(f"{n} {v}" for v, n in counts.items()) + f" ({counts['EXACT'] / max(1, len(rows)):.1%} exact)**", ""]
    for title, chosen in (("all", exact), ("CNN", [r for r in exact if not attention(r)]), ("transformers", [r for r in exact if attention(r)])):
        if chosen:
            reach = [row["reach"] for row in chosen if "reach" in row]
            kept, batch, train = (sum(bool(row.get(k)) for row in chosen) / len(chosen) for k in ("class", "batch", "train"))
            plain = sum(not row.get("rewritten") for row in chosen) / len(chosen)
            lines.append(
                f"- {title} ({len(chosen)}): median reach {statistics.median(reach):.2f}x (lowest {min(reach):.2f}x), class kept {kept:.1%} "
                f"(no module inside rewritten {plain:.1%}), another batch size {batch:.1%}, a training step {train:.1%}"
            )
    kinds = Counter(row["name"].rpartition("/")[0] for row in rows)
    lines.append("- families: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())))
    commits = Counter(row.get("commit", "?") for row in rows)
    lines.append("- commit: " + ", ".join(f"{name} ({n} rows)" if len(commits) > 1 else name for name, n in commits.most_common()))
    return "\n".join(lines)


TOKENS = "vit deit swin cait xcit pvt twins coat mixer gmlp resmlp levit crossvit beit eva pit tnt nest visformer convit maxvit volo hiera davit".split()


def attention(row: dict) -> bool:
    return row["kind"] == "transformers" or any(token in row["name"] for token in TOKENS)


def table(rows: list[dict]) -> str:
    head = "| model | verdict | reach | params | CPU seconds | peak GiB | class | batch | trains | remark |\n|---|---|---|---|---|---|---|---|---|---|\n"
    yes = lambda row, key: {True: "yes", False: "no"}.get(row.get(key), "")  # noqa: E731
    return head + "\n".join(
        f"| {r['name']} | {r['verdict']} | {r.get('reach', 0):.2f} | {r.get('params', 0):.2f} | {r.get('seconds', 0):.2f} | {r.get('peak', 0):.1f} | "
        f"{yes(r, 'class')} | {yes(r, 'batch')} | {yes(r, 'train')} | {r.get('why', '').splitlines()[0][:90].replace('|', '/') if r.get('why') else ''} |"
        for r in rows
    )


COMMIT = commit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only names that hold one of these (comma-separated)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=240, help="CPU seconds per architecture")
    parser.add_argument("--out", type=Path, help="write the table (Markdown) here")
    parser.add_argument("--json", type=Path, help="append every row here as it comes; rows already there are not measured again")
    parser.add_argument("--again", action="store_true", help="measure rows of other commits, and failures, again")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    declare_operators()
    import timm
    import torchvision
    import transformers

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, resource.RLIM_INFINITY))
    known = Rows(options.json)
    done = {row["name"]: row for row in known.rows}
    if options.again:
        done = {name: row for name, row in done.items() if row.get("commit") == COMMIT and row["verdict"] == "EXACT"}

    def report(row: dict) -> None:
        print(row["verdict"], row["name"], f"{row.get('reach', 0):.2f}", row.get("why", "")[:150].replace("\n", " "), flush=True)
        known.add(row, shown=False)

    wanted = [name for name in names() if any(part in name for part in options.only.split(","))]
    todo = [] if options.table else [name for name in wanted if name not in done]
    measured = measure(todo, options.jobs, options.limit, report)
    rows = sorted([*(done[name] for name in wanted if name in done), *measured], key=lambda row: row["name"])
    text = summary(rows)
    print(text)
    if options.out:
        libraries = (torch, timm, transformers, torchvision)
        versions = ", ".join([f"Python {platform.python_version()}", *(f"{m.__name__} {m.__version__}" for m in libraries)])
        options.out.write_text(
            f"# Zoo: public architectures at ratio 0.5\n\nMade by `python benchmarks/zoo.py --json zoo.jsonl --out {options.out}`; {versions}.\n"
            "Random weights and statistics, float64, each in its own process on one thread. EXACT: the cut model equals the zeroed original to 1e-8\n"
            "(1e-4 where the model's code insists on float32). Reach: MACs before / after.\n\n"
            f"{text}\n\n{table(rows)}\n"
        )


if __name__ == "__main__":
    main()
