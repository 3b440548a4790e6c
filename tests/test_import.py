"""``import graphprune`` loads nothing but names; each is loaded when it is asked for, and means what it always meant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graphprune

HEAVY = ("networkx", "scipy", "sympy", "pandas", "matplotlib", "onnx", "onnxruntime", "openvino", "transformers", "typer", "torch._dynamo", "torch._inductor")


def new_modules(code: str) -> set[str]:
    """What a fresh Python has loaded after ``code``, beyond torch."""
    text = f"import sys, torch\nbefore = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    return set(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.splitlines()[-1].split())


def test_importing_loads_nothing():
    loaded = new_modules("import graphprune")
    assert {name for name in loaded if name.startswith("graphprune")} == {"graphprune", "graphprune.version"}
    assert not loaded & {*HEAVY}


def test_a_cut_loads_nothing_heavy():
    code = "import graphprune\ngraphprune.shrink(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.zeros(1, 4))"
    loaded = new_modules(code)
    assert "graphprune.shrink" in loaded  # the control: something is loaded
    assert not loaded & {*HEAVY}
    assert not {name for name in loaded if name.startswith(("graphprune.commands", "graphprune.insight", "graphprune.loop"))}


@pytest.mark.parametrize(
    "first",
    [
        "graphprune.Runtime('compile', threads=1)",
        "from graphprune.options import Runtime; Runtime('onnxruntime')",
        "assert all(len(found) > 3 for found in graphprune.available().values()), graphprune.available()",
        "graphprune.register('runtime', 'mine', 'of my own', lambda *_: None); assert {'mine', 'eager'} <= set(graphprune.available()['runtime'])",
        "from graphprune.catalogue import entry; assert entry('score', 'l2').line",
        "import graphprune.catalogue, graphprune.repair; assert 'l2' in graphprune.available()['score']",
    ],
)
def test_what_can_be_asked_for_by_name_is_there_from_the_first_call(first):
    new_modules(f"import graphprune\n{first}")
    with pytest.raises(subprocess.CalledProcessError):  # control
        new_modules("from graphprune.catalogue import _ENTRIES; assert _ENTRIES['score']")


def imports() -> dict[str, str]:
    """Of the names that type checkers see: where each comes from."""
    tree = ast.parse(Path(graphprune.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.asname or alias.name: f".{node.module or ''}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_type_checkers_and_python_see_the_same_names():
    assert {**imports(), "__version__": ""}.keys() == set(graphprune.__all__)
    assert {name: place for name, place in imports().items() if place != "."} == {
        name: place for place, names in graphprune.PLACES.items() for name in names.split()
    }
    assert set(graphprune.__all__) <= set(dir(graphprune))
    assert all(getattr(graphprune, name) is not None for name in graphprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'shrunk'"):
        _ = graphprune.shrunk


@pytest.mark.parametrize("first", ["import graphprune.cost, graphprune.select", "from graphprune.repair import refill", "import graphprune.shrink", "pass"])
def test_a_function_goes_before_the_file_of_its_name(first):
    names = ("cost", "select", "repair", "shrink")
    checks = "; ".join(f"assert type(graphprune.{name}).__name__ == 'function', graphprune.{name}" for name in names)
    loaded = new_modules(f"{first}\nimport graphprune\n{checks}\nassert type(graphprune.errors).__name__ == type(graphprune.scores).__name__ == 'module'")
    assert {f"graphprune.{name}" for name in names} <= loaded


def test_what_is_no_file_of_the_package_is_no_attribute():
    assert not hasattr(graphprune, "nothing_here") and not hasattr(graphprune, "__wrapped__")
    with pytest.raises(ImportError):
        exec("from graphprune import nothing_here")
