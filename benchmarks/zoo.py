"""Shrink public architectures at ratio 0.5, each in its own process, and say which come out exact.

    python benchmarks/zoo.py --out docs/zoo.md            # everything
    python benchmarks/zoo.py --only timm --jobs 2

Every parameter and statistic is random, the arithmetic is float64; EXACT means that the cut model equals the zeroed
original to 1e-8 (relative); 1e-4 where the model's own code insists on float32. *Reach* is MACs before / after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import resource
import statistics
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

from flops import flops  # noqa: E402
from zoo_models import build, names  # noqa: E402
from zoo_support import declare_operators, randomise  # noqa: E402

import graphprune  # noqa: E402
from graphprune.verify import check  # noqa: E402


def macs(model: torch.nn.Module, args: tuple, kwargs: dict) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


def grow(tree, times: int):
    """The same inputs with a larger batch."""
    if isinstance(tree, torch.Tensor):
        return torch.cat([tree] * times) if tree.ndim else tree
    if isinstance(tree, tuple | list):
        return type(tree)(grow(item, times) for item in tree)
    return {key: grow(item, times) for key, item in tree.items()} if isinstance(tree, dict) else tree


def double(tree):
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, tuple | list):
        return type(tree)(double(item) for item in tree)
    return {key: double(item) for key, item in tree.items()} if isinstance(tree, dict) else tree


def one(name: str, send) -> None:
    """Measure one architecture; runs in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
    row = {"name": name, "verdict": "FAIL", "kind": name.split("/")[0]}
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
        start = time.perf_counter()
        try:
            small, plan = graphprune.shrink(model, args, 0.5, example_kwargs=kwargs, return_plan=True, verify=False)
        except graphprune.errors.NothingToPrune as error:
            row |= {"verdict": "LOCKED", "why": str(error)[:300]}
            return
        row["seconds"] = time.perf_counter() - start
        count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
        row |= {"class": type(small) is type(model), "params": count(model) / count(small), "notes": len(plan.notes)}
        row |= flops(model, args, kwargs)
        try:
            graph = graphprune.trace(model, args, kwargs)
            row["gap"] = check(graph, model, small, plan, tolerance=limit)
            row["verdict"] = "EXACT"
        except graphprune.errors.NotEqual as error:
            row |= {"verdict": "INEXACT" if "differs" in str(error) or "shape" in str(error)[:20] else "FAIL", "why": str(error)[:300]}
            return
        with contextlib.suppress(AssertionError):  # torch's counter wants a gradient in some custom functions
            row["reach"] = macs(model, args, kwargs) / max(1, macs(small, args, kwargs))
        try:
            with torch.no_grad():
                small(*grow(args, 2), **grow(kwargs, 2))
            row["batch"] = True
        except Exception:
            row["batch"] = False
        try:
            out = small.train()(*grow(args, 2), **grow(kwargs, 2))
            from graphprune.trees import tensors

            loss = sum(t.double().mean() for t in tensors(out, torch.Tensor) if t.is_floating_point() and t.requires_grad)
            loss.backward()
            torch.optim.SGD(small.parameters(), 1e-6).step()
            row["train"] = True
        except Exception:
            row["train"] = False
    except BaseException as error:
        row["why"] = f"{type(error).__name__}: {error} | {traceback.format_exc(limit=-2)}"[:500]
    finally:
        row["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        send.send(row)
        send.close()


def measure(todo: list[str], jobs: int, limit: float, report) -> list[dict]:
    rows, running, queue = [], [], list(todo)
    context = mp.get_context("fork")
    while queue or running:
        while queue and len(running) < jobs:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=one, args=(queue[0], send))
            process.start()
            send.close()
            running.append((queue.pop(0), process, receive, time.time()))
        time.sleep(0.05)
        for item in list(running):
            name, process, receive, start = item
            late = time.time() - start > limit
            if not (receive.poll() or late or not process.is_alive()):
                continue
            try:
                row = receive.recv() if receive.poll() else {"name": name, "verdict": "FAIL", "kind": name.split("/")[0]}
            except EOFError:
                row = {"name": name, "verdict": "FAIL", "kind": name.split("/")[0]}
            row.setdefault("why", "time limit" if late else "the process died" if row["verdict"] == "FAIL" else "")
            process.kill()
            process.join()
            running.remove(item)
            rows.append(row)
            report(row)
    return sorted(rows, key=lambda row: row["name"])


def summary(rows: list[dict]) -> str:
    exact = [row for row in rows if row["verdict"] == "EXACT"]
    counts = {v: sum(row["verdict"] == v for row in rows) for v in ("EXACT", "INEXACT", "LOCKED", "FAIL")}
    lines = [f"{len(rows)} architectures: " + ", ".join(f"{n} {v}" for v, n in counts.items())]
    for title, chosen in (("all", exact), ("CNN", [r for r in exact if not attention(r)]), ("transformers", [r for r in exact if attention(r)])):
        if chosen:
            reach = statistics.median(row["reach"] for row in chosen if "reach" in row)
            kept, batch, train = (sum(bool(row.get(k)) for row in chosen) / len(chosen) for k in ("class", "batch", "train"))
            lines.append(f"{title}: median reach {reach:.2f}x, class kept {kept:.0%}, other batch {batch:.0%}, trains {train:.0%}")
    return "\n".join(lines)


TOKENS = "vit deit swin cait xcit pvt twins coat mixer gmlp resmlp levit crossvit beit eva pit tnt nest visformer convit maxvit volo hiera davit".split()


def attention(row: dict) -> bool:
    return row["kind"] == "transformers" or any(token in row["name"] for token in TOKENS)


def table(rows: list[dict]) -> str:
    head = "| model | verdict | reach | params | seconds | peak GiB | class | batch | trains | remark |\n|---|---|---|---|---|---|---|---|---|---|\n"
    yes = lambda row, key: {True: "yes", False: "no"}.get(row.get(key), "")  # noqa: E731
    return head + "\n".join(
        f"| {r['name']} | {r['verdict']} | {r.get('reach', 0):.2f} | {r.get('params', 0):.2f} | {r.get('seconds', 0):.2f} | {r.get('peak', 0):.1f} | "
        f"{yes(r, 'class')} | {yes(r, 'batch')} | {yes(r, 'train')} | {r.get('why', '').splitlines()[0][:90].replace('|', '/') if r.get('why') else ''} |"
        for r in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="substring of the names to measure")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds per architecture")
    parser.add_argument("--out", type=Path, help="write the table (Markdown) here")
    parser.add_argument("--json", type=Path, help="append every row here as it comes; rows already there are not measured again")
    options = parser.parse_args()
    declare_operators()
    import timm  # noqa: F401  (imported once, before the processes fork)
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    known = [json.loads(line) for line in options.json.read_text().splitlines()] if options.json and options.json.exists() else []
    done = {row["name"]: row for row in known}

    def report(row: dict) -> None:
        print(row["verdict"], row["name"], f"{row.get('reach', 0):.2f}", row.get("why", "")[:150].replace("\n", " "), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")

    wanted = [name for name in names() if options.only in name]
    measured = measure([name for name in wanted if name not in done], options.jobs, options.limit, report)
    rows = sorted([*(done[name] for name in wanted if name in done), *measured], key=lambda row: row["name"])
    text = summary(rows)
    print(text)
    if options.out:
        import platform

        libraries = (torch, timm, transformers, torchvision)
        versions = ", ".join([f"Python {platform.python_version()}", *(f"{m.__name__} {m.__version__}" for m in libraries)])
        options.out.write_text(
            f"# Zoo: public architectures at ratio 0.5\n\nMade by `python benchmarks/zoo.py --out {options.out}`; {versions}.\n\n{text}\n\n{table(rows)}\n"
        )


if __name__ == "__main__":
    main()
