"""A report of every architecture of the zoo, cut in half: whether it is written, how large it is, and whether the same input gives the same bytes.

python benchmarks/reports.py --json reports.jsonl --out docs/reports.md            # run again to go on after a stop
python benchmarks/reports.py --json reports.jsonl --out docs/reports.md --table    # from the rows there are
"""

from __future__ import annotations

import argparse
import re
import resource
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import Rows, made_by
from zoo import measure
from zoo_models import build, names
from zoo_support import declare_operators

import graphprune

VOID = {"meta", "br", "hr", "img", "input", "link", "col", "circle", "rect", "path", "line", "polyline", "use", "stop"}


def unbalanced(text: str) -> str:
    """The first tag of a page that is closed by another one; nothing where all are in order."""
    open_tags: list[str] = []
    for end, tag, alone in re.findall(r"<(/?)([a-z][a-z0-9]*)[^<>]*?(/?)>", text.partition("</head>")[2]):
        if tag == "html":
            continue  # opened before
        if end:
            if not open_tags or open_tags.pop() != tag:
                return tag
        elif not alone and tag not in VOID:
            open_tags.append(tag)
    return open_tags[0] if open_tags else ""


def one(name: str, send: Any, limit: float) -> None:
    """One architecture, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    row: dict[str, Any] = {"name": name}
    try:
        torch.manual_seed(0)
        model, args, kwargs = build(name)
        plan = graphprune.plan(model.eval(), args, 0.5, example_kwargs=kwargs)
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            files = [graphprune.report(model, args, plan, Path(folder) / f"{number}.html", example_kwargs=kwargs, asked={"ratio": 0.5}) for number in (0, 1)]
            row["seconds"] = (time.process_time() - start) / 2
            first, second = (file.read_bytes() for file in files)
        row |= {"bytes": len(first), "same": first == second, "unbalanced": unbalanced(first.decode())}
        row["groups"] = len(plan.outline.widths) if plan.outline else 0
    except BaseException as error:
        row["why"] = f"{type(error).__name__}: {error}"[:300]
    finally:
        send.send(row)
        send.close()


def good(row: dict[str, Any]) -> bool:
    return bool(row.get("same")) and not row.get("unbalanced") and "why" not in row


def page(rows: list[dict[str, Any]], known: Rows) -> str:
    written = sorted((row for row in rows if "bytes" in row), key=lambda row: row["bytes"])
    kinds = Counter(row["name"].rpartition("/")[0] for row in rows)
    largest = ", ".join(f"{row['name']} {row['bytes'] / 1e3:.0f} kB" for row in written[:-4:-1])
    wrong = [f"- {row['name']}: {row.get('why') or row['unbalanced'] or 'other bytes'}" for row in rows if not good(row)]
    families = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    lines = "\n".join(f"| {row['name']} | {row['groups']} | {row['bytes'] / 1e3:.0f} | {row['seconds']:.1f} |" for row in rows if "bytes" in row)
    return f"""# Reports of the zoo

{made_by("python benchmarks/reports.py --json reports.jsonl --out docs/reports.md", rows=known)}

**{sum(map(good, rows))} of {len(rows)} architectures, cut at ratio 0.5, give a whole report, with the same bytes when written again** ({families}).
Median {written[len(written) // 2]["bytes"] / 1e3:.0f} kB; the largest: {largest}. CPU seconds include tracing.
{chr(10).join(wrong)}

| model | groups | kB | CPU seconds |
|---|---:|---:|---:|
{lines}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that hold one of these (comma-separated)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further architecture after this long")
    parser.add_argument("--limit", type=float, default=240, help="CPU seconds per architecture")
    parser.add_argument("--json", type=Path, help="append every row here as it comes; those that are good are not made again")
    parser.add_argument("--out", type=Path, help="write the page (Markdown) here")
    parser.add_argument("--table", action="store_true", help="make no report")
    options = parser.parse_args()
    declare_operators()
    known = Rows(options.json)
    rows = {row["name"]: row for row in known.rows}
    queue = [name for name in spread(names()) if any(part in name for part in options.only.split(",")) and not good(rows.get(name, {}))]
    end = time.monotonic() + options.seconds

    def report(row: dict[str, Any]) -> None:
        rows[row["name"]] = known.add(row)

    while queue and time.monotonic() < end and not options.table:
        measure(queue[:1], 1, options.limit, report, one)
        queue = queue[1:]
    shown = sorted(rows.values(), key=lambda row: row["name"])
    print(f"{sum(map(good, shown))} of {len(shown)}")
    if options.out:
        options.out.write_text(page(shown, known))


def spread(wanted: list[str]) -> list[str]:
    """A few of every kind first, so that a run that is stopped has seen all of them."""
    places: Counter[str] = Counter()
    order = []
    for name in wanted:
        kind = name.rpartition("/")[0]
        order.append((places[kind], kind, name))
        places[kind] += 1
    return [name for *_, name in sorted(order)]


if __name__ == "__main__":
    main()
