"""Would the tests notice? Faults planted one at a time into graphprune's own code, and what the tests say.

    python benchmarks/mutants.py --mutants 300 --rows mutants.jsonl --out docs/mutants.md

A mutant is one change of one place: a comparison, a sign, a constant, ``and`` for ``or``, a condition turned round, ``break`` for ``continue``, a
statement left out, the last item of a slice. Places are drawn evenly over all that the files of ``FILES`` have; messages, annotations, docstrings
and assertions are not changed. Each mutant is written into a copy of the checkout, whose tests run in the order of ``TESTS`` until one fails. A
mutant that no test notices *survives*; what it changed is listed, so that it can be read: some change nothing that could be seen.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, Rows, made_by

FILES = ("tracing/*.py", "coupling/*.py", "budget/*.py", "cutting/*.py", "select.py")
TESTS = (  # quick and strict first
    "tests/test_hazards.py",
    "tests/test_rules.py",
    "tests/test_links.py",
    "tests/test_check.py",
    "tests/test_units.py",
    "tests/test_statistics.py",
    "tests/test_outputs.py",
    "tests/test_sizes.py",
    "tests/test_made_weights.py",
    "tests/test_rewrite.py",
    "tests/test_unread.py",
    "tests/test_ways.py",
    "tests/test_state.py",
    "tests/test_untouched.py",
    "tests/test_sampled.py",
    "tests/test_exact.py",
    "tests/test_budget.py",
    "tests/test_laws.py",
    "tests/test_asked.py",
    "tests/test_planning.py",
    "tests/test_cost.py",
    "tests/test_compose.py",
    "tests/test_ledger.py",
    "tests/test_printing.py",
    "tests/test_walk.py",
    "tests/test_steps.py",
    "tests/test_remaining.py",
    "tests/test_wrappers.py",
    "tests/test_shapes.py",
    "tests/test_sizes_drawn.py",
    "tests/test_recurrent.py",
    "tests/test_experts.py",
    "tests/test_fused.py",
)
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}
LONGEST = 1800  # seconds for the tests of one mutant: a mutant that does not end is noticed


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every change that can be made: the node, and which change of it; in the order of the code."""
    for node in _code(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            yield node, "comparison"
        elif isinstance(node, ast.BoolOp):
            yield node, "and/or"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, "not"
        elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SIGNS and not _text(node):
            yield node, "sign"
        elif isinstance(node, ast.Constant) and (type(node.value) in (int, bool)):
            yield node, "constant"
        elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield node, "condition"
        elif isinstance(node, ast.Break | ast.Continue):
            yield node, "loop"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "statement"


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of code that computes: no annotations, messages, assertions, docstrings."""
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in field if isinstance(field, list) else [field]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            yield child
            yield from _code(child)


def _text(node: ast.BinOp | ast.AugAssign) -> bool:
    """Whether a sum is one of texts or lists."""
    sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
    return any(isinstance(side, ast.List | ast.Tuple | ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str)) for side in sides)


def changed(node: Any, change: str) -> None:
    """Make a change in place."""
    if change == "comparison":
        node.ops[0] = COMPARISONS[type(node.ops[0])]()
    elif change == "and/or":
        node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    elif change == "not":
        node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)
    elif change == "sign":
        node.op = SIGNS[type(node.op)]()
    elif change == "constant":
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif change == "condition":
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif change == "loop":
        node.__class__ = ast.Continue if isinstance(node, ast.Break) else ast.Break
    else:
        node.value = ast.Constant(None)


def mutant(file: Path, index: int) -> tuple[str, dict]:
    """The code of a file with its change number ``index``, and what it is."""
    tree = ast.parse(file.read_text())
    node, change = list(places(tree))[index]
    before = ast.unparse(copy.deepcopy(node)).partition("\n")[0]
    line = node.lineno  # type: ignore[attr-defined]
    changed(node, change)
    after = ast.unparse(node).partition("\n")[0]
    return ast.unparse(ast.fix_missing_locations(tree)), {"line": line, "change": change, "before": before[:160], "after": after[:160]}


def every() -> list[tuple[str, int]]:
    files = [file for pattern in FILES for file in sorted((ROOT / "graphprune").glob(pattern)) if file.name != "__init__.py"]
    return [(str(file.relative_to(ROOT)), index) for file in files for index, _ in enumerate(places(ast.parse(file.read_text())))]


def judged(copy_of: Path, tests: tuple[str, ...]) -> str:
    """The test that fails first, or nothing."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    env = {**os.environ, "PYTHONPATH": str(copy_of), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy_of, env=env, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].partition(" ")[2].partition(" - ")[0] if failed else "the tests cannot be imported"


def run(options: argparse.Namespace, rows: Rows) -> None:
    drawn = random.Random(options.seed).sample(every(), options.mutants)
    known = {(row["file"], row["index"]) for row in rows.rows}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "checkout"
        for part in ("graphprune", "tests", "benchmarks", "docs"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tree / name)
        if not options.skip_control and (failed := judged(tree, TESTS)):
            raise SystemExit(f"without any change {failed} fails")
        for name, index in drawn:
            if (name, index) in known:
                continue
            code, facts = mutant(ROOT / name, index)
            (tree / name).write_text(code)
            start = time.perf_counter()
            killer = judged(tree, TESTS)
            shutil.copy(ROOT / name, tree / name)
            rows.add({"file": name, "index": index, **facts, "killer": killer, "seconds": time.perf_counter() - start})


def table(rows: Rows, options: argparse.Namespace) -> str:
    killed = [row for row in rows.rows if row["killer"]]
    lines = [
        "# Faults planted in graphprune's own code",
        "",
        made_by(f"python benchmarks/mutants.py --mutants {options.mutants}", "pytest", rows=rows),
        "",
        f"{len(rows.rows)} of {len(every())} possible changes were drawn (seed {options.seed}), from {', '.join(f'`{each}`' for each in FILES)};",
        f"the tests noticed **{len(killed)} ({len(killed) / max(1, len(rows.rows)):.0%})**.",
        f"The tests are {len(TESTS)} of the files of `tests/`, until one fails.",
        "",
        "| change | drawn | noticed |",
        "|---|---|---|",
    ]
    total, noticed = Counter(row["change"] for row in rows.rows), Counter(row["change"] for row in killed)
    lines += [f"| {change} | {count} | {noticed[change]} |" for change, count in total.most_common()]
    survivors = [row for row in rows.rows if not row["killer"]]
    lines += ["", "## What no test noticed", ""] if survivors else []
    for row in sorted(survivors, key=lambda row: (row["file"], row["line"])):
        lines.append(f"- `{row['file']}:{row['line']}` ({row['change']}): `{row['before']}` became `{row['after']}`")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="mutants.jsonl")
    parser.add_argument("--out")
    parser.add_argument("--skip-control", action="store_true", help="do not run the tests on the code as it is first")
    options = parser.parse_args()
    rows = Rows(options.rows)
    run(options, rows)
    if options.out:
        Path(options.out).write_text(table(rows, options))


if __name__ == "__main__":
    main()
