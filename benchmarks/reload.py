"""Public transformer families, tiny and with random weights: what is cut, and whether plain ``from_pretrained`` gives it back.

``python benchmarks/reload.py [family …] --rows build/reload.jsonl --write docs/transformers.md``

Each row is one family and one thing to prune (uniform widths at one half, each kind of unit alone, half of the blocks): cut or whole with the reason, the
numbers of the configuration that changed, whether ``save_pretrained`` and then ``from_pretrained`` in a process of its own computes the same to the last bit,
and whether greedy ``generate`` writes the same, there too, with the cache and without."""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from common import Rows, made_by, parameters
from families import FAMILIES, build, result, written

import graphprune
from graphprune.errors import BadConfig, GraphpruneError

ROLES: dict[str, dict[str, Any]] = {
    "widths": {"what": "channel", "widths": graphprune.Widths(uniform=True)},
    "blocks": {"what": "block"},
}
TOKENS = "vocabulary"  # by the use in the example, which is what is compared: all its ids stay, or others take their place in both models
KINDS = ("mlp", "heads", "query_heads", "hidden", "experts", "expert_mlp", "head_dim")
ROLES |= {kind: {"what": kind, "widths": graphprune.Widths(uniform=True)} for kind in (*KINDS, TOKENS)}


def again(name: str, folder: str) -> tuple[torch.Tensor, torch.Tensor | str | None, torch.Tensor | None, dict[str, Any]]:
    """In a process of its own: what a folder computes, what it writes with the cache and without, and its configuration."""
    model, inputs = build(name)
    back = type(model).from_pretrained(folder).eval()
    if (Path(folder) / "graphprune_tokens.json").exists():
        inputs = graphprune.tokens(folder).example((), inputs)[1]
    try:
        words = written(back, inputs), written(back, inputs, cache=False)
    except (IndexError, RuntimeError) as error:  # the library cannot write with such a configuration
        words = f"{type(error).__name__}: {error}", None
    return result(back, inputs), *words, back.config.to_dict()


def row(name: str, role: str, others: Executor) -> dict[str, Any]:
    """Cut, save, load elsewhere and compare."""
    model, inputs = build(name)
    start, before = time.process_time(), parameters(model)
    try:
        asked = ROLES[role] | ({"what": {TOKENS: graphprune.Vocabulary(batches=[inputs])}} if role == TOKENS else {})
        small = graphprune.shrink(model, inputs, 0.5, **asked)
    except GraphpruneError as error:
        return {"cell": f"{name} {role}", "result": "whole", "reason": str(error).splitlines()[0]}
    spent = {"cell": f"{name} {role}", "left": round(parameters(small) / before, 3), "seconds": round(time.process_time() - start, 1)}
    spent["class kept"] = type(small) is type(model)
    if role == TOKENS:
        inputs = graphprune.tokens(small).example((), inputs)[1]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        try:
            small.save_pretrained(folder)
        except BadConfig as error:
            return spent | {"result": "refused", "reason": str(error)}
        logits, cached, plain, new = others.submit(again, name, folder).result()
    gap = float((logits - result(small, inputs)).abs().max())
    words, old = written(small, inputs), model.config.to_dict()
    changed = {key: value for key, value in new.items() if old.get(key) != value and isinstance(value, int | list | dict) and "_name" not in key}
    same = None if words is None or cached is None or plain is None else bool(torch.equal(words, cached) and torch.equal(words, plain))
    if isinstance(cached, str):
        same, spent = False, spent | {"generate fails": cached}
    return spent | {"result": "equal" if gap == 0 else f"differs by {gap:.1e}", "generate": same, "configuration": changed}


def page(rows: Rows) -> str:
    """The table of all families."""
    cells = rows.by("cell")
    roles = [role for role in ROLES if any(f"{name} {role}" in cells for name in FAMILIES)]
    lines = ["| family | " + " | ".join(roles) + " |", "|---|" + "---|" * len(roles)]
    for name in FAMILIES:
        if any(f"{name} {role}" in cells for role in roles):
            lines.append(f"| {name} | " + " | ".join(_cell(cells.get(f"{name} {role}")) for role in roles) + " |")
    counts = ["differs" if cell["result"].startswith("differs") else cell["result"] for cell in cells.values()]
    cut = [cell for cell in cells.values() if cell["result"] != "whole"]
    text = f"{len(counts)} cells: {counts.count('equal')} come back equal (0.0), {counts.count('refused')} are refused"
    text += f" with the reason, {counts.count('differs')} differ, {counts.count('whole')} are whole"
    wrote = [cell["generate"] for cell in cut if cell.get("generate") is not None]
    return "\n".join([*lines, "", f"{text}; greedy `generate` is the same in {sum(wrote)} of {len(wrote)} cells that write."])


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["result"] == "whole":
        return "-" if "is of the kind" in cell["reason"] else f"whole: {cell['reason'][:60]}"
    numbers = ", ".join(f"{key}={value}" for key, value in cell.get("configuration", {}).items() if isinstance(value, int))
    return f"{cell['result']}, {cell['left']:.2f} left" + (f" ({numbers})" if numbers else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--rows", type=Path, default=Path("build/reload.jsonl"))
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--only", nargs="*", default=list(ROLES), choices=list(ROLES))
    asked = parser.parse_args()
    asked.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(asked.rows)
    done = rows.by("cell")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as others:
        for name in asked.families or FAMILIES:
            for role in asked.only:
                if f"{name} {role}" not in done:
                    rows.add(row(name, role, others))
    table = f"{made_by('python benchmarks/reload.py --write docs/transformers.md', 'transformers', rows=rows)}\n\n{page(rows)}"
    print(table)
    if asked.write:
        head, mark, rest = asked.write.read_text().partition("<!-- families -->\n")
        asked.write.write_text(f"{head}{mark}{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
