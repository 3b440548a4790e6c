"""The tool that plants faults in graphprune's own code plants one at a time, everywhere, and leaves code that compiles."""

import ast
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import mutants  # noqa: E402


def test_every_kind_of_change_is_drawn_and_changes_one_place():
    sites = mutants.every()
    assert len(sites) > 3000
    kinds = set()
    for name, index in random.Random(1).sample(sites, 60):
        tree, facts = mutants.mutant(mutants.ROOT / name, index)
        code = ast.unparse(tree)
        kinds.add(facts["change"])
        before = ast.unparse(ast.parse((mutants.ROOT / name).read_text())).splitlines()
        after = code.splitlines()
        compile(code, name, "exec")
        different = [i for i, (one, two) in enumerate(zip(before, after, strict=False)) if one != two]
        assert different and (len(before) != len(after) or len(different) == 1)
    assert len(kinds) >= 5


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("def f(x: int = 1) -> int:\n    '''1 < 2'''\n    return x", 1),  # the default alone
        ("assert 1 < 2", 0),
        ("def f():\n    raise ValueError(f'{1 + 1}')", 0),
        ("a = b < 1", 2),
        ("for x in y:\n    if x:\n        break", 2),
        ("a = [1] + b", 1),  # the constant, not the sum
    ],
)
def test_messages_annotations_and_assertions_are_left_alone(code, count):
    assert len(list(mutants.places(ast.parse(code)))) == count
