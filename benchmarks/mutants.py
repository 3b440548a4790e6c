"""Would the tests notice? Faults planted one at a time into graphprune's own code, and what the tests say.

    python benchmarks/mutants.py --mutants 300 --rows mutants.jsonl --out docs/mutants.md

A mutant is one change of one place: a comparison, a sign, a constant, ``and`` for ``or``, a condition turned round, ``break`` for ``continue``, a
statement left out. Places are drawn evenly over all that the files of ``FILES`` have; messages, annotations, docstrings and assertions are not changed.

The tests are collected once, and run once on the code as it is, to learn which lines each of them runs and how long it takes. Every mutant is then a fork
of that process in which the changed function has other code: it runs the tests that run the changed line, quickest first, until one fails. What is
no code of a function (a constant of a module, a default) is changed in a copy of the checkout instead, whose tests start anew. A mutant that no test
notices *survives*; what it changed is listed, so that it can be read: some change nothing that could be seen.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest
from common import ROOT, Rows, made_by

FILES = ("tracing/*.py", "coupling/*.py", "budget/*.py", "cutting/*.py", "select.py")
# Tests of time, of the command line, of whole libraries and of other processes take long, and are about other files; those of scores
# run backward as they are collected, and no fork of a process that did can.
LEFT_OUT = """automatic block_places checkpoint command configured copies coverage device distill distributed docs exports folder gradual granularity
    granularity_targets granularity_training imitation import iterate kernels latency learnt measure models mutants pretrained
    recurrent_repair repair repair_free scores scores_input scores_laws scores_rescaling scores_rows sparse unseen""".split()
LONGEST = 20  # seconds of the processor for a test on the code as it is: a clock that never rests on a busy machine judges nothing
DOCTESTS = ("tracing", "coupling", "budget", "cutting", "select.py")
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}


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


def mutant(file: Path, index: int) -> tuple[ast.Module, dict]:
    """The code of a file with its change number ``index``, every statement on its line, and what the change is."""
    tree = ast.parse(file.read_text())
    node, change = list(places(tree))[index]
    before = ast.unparse(copy.deepcopy(node)).partition("\n")[0]
    line = node.lineno  # type: ignore[attr-defined]
    changed(node, change)
    after = ast.unparse(node).partition("\n")[0]
    return ast.fix_missing_locations(tree), {"line": line, "change": change, "before": before[:160], "after": after[:160]}


# -- which tests run which lines ---------------------------------------------------------


class Executed(NamedTuple):
    """What the tests did on the code as it is: the seconds of each, and which tests run a line, by file and line."""

    seconds: dict[str, float]
    by_line: dict[str, dict[int, list[str]]]

    def tests(self, file: str, lines: list[int], most: float) -> list[str]:
        """The tests that run one of some lines, quickest first, as many as take ``most`` seconds; of no lines, those that run anything of the file."""
        known = self.by_line.get(file, {})
        names = {name for each in lines or known for name in known.get(each, ())}
        chosen, total = [], 0.0
        for name in sorted(names, key=lambda name: self.seconds[name]):
            total += self.seconds[name]
            if total > most and chosen:
                break
            chosen.append(name)
        return chosen


def watched(items: list[pytest.Item], to: str) -> None:
    """Run the tests on the code as it is, and write down what :class:`Executed` holds; one that fails in a fork judges nothing."""
    import coverage

    watch = coverage.Coverage(data_file=None, include=[str(ROOT / "graphprune" / "*")], config_file=False)
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    signal.signal(signal.SIGVTALRM, _too_long)
    watch.start()
    for item in items:
        watch.switch_context(item.nodeid)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
        failure = outcome(item)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        seconds[item.nodeid] = time.process_time() - start
        print(f"{len(seconds)} of {len(items)}: {seconds[item.nodeid]:.1f} s {item.nodeid} {failure}", flush=True)
        failed |= {item.nodeid: failure} if failure else {}
    watch.stop()
    data = watch.get_data()
    by_line = {}
    for file in data.measured_files():
        lines = {line: [name for name in names if name and name not in failed] for line, names in data.contexts_by_lineno(file).items()}
        by_line[str(Path(file).relative_to(ROOT))] = {line: names for line, names in lines.items() if names}
    Path(to).write_text(json.dumps({"seconds": seconds, "by_line": by_line, "failed": failed}))


class _Longer(BaseException):
    """A test takes too long: nobody between here and pytest takes it for a failure that a smaller example would show."""


def _too_long(*_: Any) -> None:
    raise _Longer(f"more than {LONGEST} s")


def outcome(item: pytest.Item) -> str:
    """How a test fails, in a line (nothing if it passes)."""
    from _pytest.runner import runtestprotocol

    for report in runtestprotocol(item, nextitem=None, log=False):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            return (crash.message if crash is not None else str(report.longrepr)).partition("\n")[0][:200] or "fails"
    return ""


# -- one mutant --------------------------------------------------------------------------


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of all functions in a module, also of those inside of others."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from codes(each)


def identity(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def functions() -> dict[tuple[str, str, int], list[FunctionType]]:
    """The functions of the package that there are, by their file, name and line."""
    every = defaultdict(list)
    for each in gc.get_objects():
        if isinstance(each, FunctionType) and each.__code__.co_filename.startswith(str(ROOT / "graphprune")):
            every[identity(each.__code__)].append(each)
    return every


def statement(tree: ast.Module, place: ast.AST) -> list[int]:
    """The lines of the innermost statement of a function that holds a place, without the statements inside of it; none for what is no code of a function."""

    def inside(node: ast.AST, lines: list[int]) -> list[int] | None:
        if isinstance(node, ast.stmt) and lines:
            lines = list(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            inner = [each for name in ("body", "orelse", "finalbody", "handlers", "cases") for each in getattr(node, name, ())]
            lines = [line for line in lines if not any(each.lineno <= line <= each.end_lineno for each in inner if each.lineno > node.lineno)]
        if node is place:
            return lines
        for name, field in ast.iter_fields(node):
            body = lines or ([0] if isinstance(node, ast.FunctionDef | ast.Lambda) and name == "body" else [])
            for child in field if isinstance(field, list) else [field]:
                answer = inside(child, body) if isinstance(child, ast.AST) else None
                if answer is not None:
                    return answer
        return None

    return inside(tree, []) or []


def forked(work: Any, seconds: float) -> tuple[str, bool]:
    """What ``work`` returns in a fork of this process, and whether it came to an end; ``seconds`` of the processor at most."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        return text, os.WIFEXITED(status)
    os.close(reading)
    os.setpgid(0, 0)
    signal.alarm(int(4 * seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**33, size + 2**33))
    try:
        text = work()
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    os.write(writing, text[:1000].encode())
    os._exit(0)


class Judge:
    """The collected tests, and what they say of mutants."""

    def __init__(self, items: list[pytest.Item], executed: Executed, most: float) -> None:
        self.items = {item.nodeid: item for item in items}
        self.executed, self.most = executed, most
        self.functions = functions()

    def __call__(self, name: str, index: int) -> dict[str, Any]:
        """What became of a mutant: the test that notices it, and how it fails."""
        start = time.perf_counter()
        tree, facts = mutant(ROOT / name, index)
        place = list(places(original := ast.parse((ROOT / name).read_text())))[index][0]
        lines = statement(original, place)
        tests = self.executed.tests(name, lines, self.most)
        judged = self.patched(name, tree, tests) if lines else self.anew(name, tree, tests)
        return {"file": name, "index": index, **facts, **judged, "tests": len(tests), "seconds": round(time.perf_counter() - start, 2)}

    def patched(self, name: str, tree: ast.Module, tests: list[str]) -> dict[str, str]:
        def work() -> str:
            for code in codes(compile(tree, str(ROOT / name), "exec")):
                for function in self.functions.get(identity(code), ()):
                    function.__code__ = code
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                for test in tests:
                    if failure := outcome(self.items[test]):
                        return json.dumps({"killer": test, "how": failure})
            return "{}"

        text, ended = forked(work, 60 + 5 * sum(self.executed.seconds[test] for test in tests))
        if not ended or not text:
            return {"killer": "does not end, or ends the process", "how": ""}
        return {"killer": "", "how": "", **json.loads(text)} if text[0] == "{" else self.anew(name, tree, tests)

    def anew(self, name: str, tree: ast.Module, tests: list[str]) -> dict[str, str]:
        if not tests:
            return {"killer": "", "how": ""}
        with tempfile.TemporaryDirectory() as folder:
            checkout = Path(folder)
            for part in ("graphprune", "tests", "benchmarks", "docs"):
                shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("*.png"))
            for file in ("pyproject.toml", "README.md"):
                shutil.copy2(ROOT / file, checkout / file)
            (checkout / name).write_text(ast.unparse(tree))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
            env = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
            done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False, timeout=3600)
        if done.returncode == 0:
            return {"killer": "", "how": ""}
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        killer, _, how = failed[0].partition(" ")[2].partition(" - ") if failed else ("the tests cannot be imported", "", "")
        return {"killer": killer, "how": how}


def every() -> list[tuple[str, int]]:
    files = [file for pattern in FILES for file in sorted((ROOT / "graphprune").glob(pattern)) if file.name != "__init__.py"]
    return [(str(file.relative_to(ROOT)), index) for file in files for index, _ in enumerate(places(ast.parse(file.read_text())))]


class Mutants:
    """A plugin of pytest: once the tests are collected, they judge mutants instead of running."""

    def __init__(self, options: argparse.Namespace, rows: Rows) -> None:
        self.options, self.rows = options, rows

    def pytest_configure(self) -> None:
        import hypothesis

        hypothesis.settings.register_profile("mutants", derandomize=True, deadline=None, database=None)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        options = self.options
        if not Path(options.executed).exists():
            text, ended = forked(lambda: watched(session.items, options.executed) or "", 7200)
            if not ended or text:
                raise SystemExit(f"the tests did not come to an end on the code as it is: {text}")
        notes = json.loads(Path(options.executed).read_text())
        for test, failure in notes["failed"].items():
            print(f"judges nothing, for it fails without any change: {test}: {failure}", flush=True)
        lines = {file: {int(line): names for line, names in lines.items()} for file, lines in notes["by_line"].items()}
        judge = Judge(session.items, Executed(notes["seconds"], lines), options.most)
        known = {(row["file"], row["index"]) for row in self.rows.rows}
        for name, index in random.Random(options.seed).sample(every(), options.mutants):
            if (name, index) not in known:
                self.rows.add(judge(name, index))
        return True


def run(options: argparse.Namespace, rows: Rows) -> None:
    os.chdir(ROOT)
    tests = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if file.stem.removeprefix("test_") not in LEFT_OUT]
    tests += [str(ROOT / "graphprune" / part) for part in DOCTESTS]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-s", *(options.tests or tests)], plugins=[Mutants(options, rows)])
    if code not in (0, 5):
        raise SystemExit(code)


def table(rows: Rows, options: argparse.Namespace) -> str:
    killed = [row for row in rows.rows if row["killer"]]
    apart = [row for row in rows.rows if not row["killer"] and not row["tests"]]
    lines = [
        "# Faults planted in graphprune's own code",
        "",
        made_by(f"python benchmarks/mutants.py --mutants {options.mutants} --seed {options.seed}", "pytest", "hypothesis", rows=rows),
        "",
        f"{len(rows.rows)} of {len(every())} possible changes were drawn (seed {options.seed}), from {', '.join(f'`{each}`' for each in FILES)};",
        f"the tests noticed **{len(killed)} ({len(killed) / max(1, len(rows.rows)):.1%})**;",
        f"{len(apart)} of the others lie in code that none of these tests runs.",
        f"Tests of {', '.join(sorted(LEFT_OUT))} are left out (they take long, or need a process of their own), and a mutant is given",
        f"those tests alone that run its line, the quickest first, for {options.most:g} seconds: the share is a lower bound.",
        "",
        "| change | drawn | noticed |",
        "|---|---|---|",
    ]
    total, noticed = Counter(row["change"] for row in rows.rows), Counter(row["change"] for row in killed)
    lines += [f"| {change} | {count} | {noticed[change]} |" for change, count in total.most_common()]
    survivors = [row for row in rows.rows if not row["killer"]]
    lines += ["", "## What no test noticed", ""] if survivors else []
    for row in sorted(survivors, key=lambda row: (row["file"], row["line"])):
        lines.append(f"- `{row['file']}:{row['line']}` ({row['change']}): `{row['before']}` became `{row['after']}`{'' if row['tests'] else ' (not run)'}")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="mutants.jsonl")
    parser.add_argument("--executed", default="mutants-executed.json", help="which test runs which line; made where it is missing")
    parser.add_argument("--most", type=float, default=120, help="seconds of tests for one mutant, as the tests take on the code as it is")
    parser.add_argument("--tests", nargs="*", help="files or tests (by default those of tests/ that are quick)")
    parser.add_argument("--out")
    options = parser.parse_args()
    options.executed = str(Path(options.executed).resolve())
    rows = Rows(Path(options.rows).resolve())
    run(options, rows)
    if options.out:
        Path(options.out).write_text(table(rows, options))


if __name__ == "__main__":
    main()
