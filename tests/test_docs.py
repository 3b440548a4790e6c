"""The code of the pages runs, block after block, with public names only; what a page adds to graphprune is short."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from zoo_support import declare_operators

import graphprune
from graphprune import catalogue, spelling
from graphprune.scores import SCORES

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = [DOCS.parent / "README.md"] + [DOCS / f"{name}.md" for name in ("index", "tutorial", "insight", "report", "cli")] + sorted(DOCS.glob("guide-*.md"))
PAGES = sorted(DOCS.glob("own-*.md"))
NEEDS = {
    "tutorial": ["sklearn"],
    "guide-deploy": ["onnxruntime", "onnxscript", "openvino"],
    "guide-llm": ["transformers"],
    "guide-yolo": ["ultralytics", "cv2", "onnx", "onnxruntime"],
    "guide-frameworks": ["lightning", "transformers", "accelerate", "diffusers", "segmentation_models_pytorch"],
}
LONGEST = 15  # lines of the block that adds something
RECIPES = {"guide-yolo", "guide-frameworks"}  # whose blocks are at most so long, and run in a process of their own: the libraries warn, and set torch up
RECIPE = 30


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", [page for page in (*PAGES, *GUIDES) if page.stem not in RECIPES], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    absent = [package for package in NEEDS.get(page.stem, ()) if importlib.util.find_spec(package) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    if page.stem == "guide-llm":
        declare_operators()  # which transformers asks torchvision for
    monkeypatch.chdir(tmp_path)  # a page may write files
    catalogue.available()  # loads the names that are there from the start, whichever test comes first
    for kind, entries in catalogue._ENTRIES.items():  # … and a page may enter names, which end with it
        monkeypatch.setitem(catalogue._ENTRIES, kind, dict(entries))
    known = {*SCORES}
    names: dict = {"__name__": page.stem.replace("-", "_")}
    parts = blocks(page)
    assert parts, f"{page.name} shows no code"
    assert page in GUIDES or len(parts[0].strip().splitlines()) <= LONGEST, "what is added takes at most 15 lines"
    for number, code in enumerate(parts):
        exec(compile(code, f"{page.name}:{number}", "exec"), names)
    for name in {*SCORES} - known:
        del SCORES[name]


@pytest.mark.skipif("GRAPHPRUNE_RECIPES" not in os.environ, reason="minutes, and many libraries: set GRAPHPRUNE_RECIPES")
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_recipes_of_a_page_run(name, monkeypatch, tmp_path):
    absent = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    monkeypatch.chdir(tmp_path)
    run_alone(DOCS / f"{name}.md")


def run_alone(page):
    """The blocks one after the other in a new process, which says how far it came."""
    parts = blocks(page)
    assert parts and max(len(part.strip().splitlines()) for part in parts) <= RECIPE, f"a recipe of {page.name} has more than {RECIPE} lines"
    program = ["import sys", f"sys.path.insert(0, {str(Path(__file__).parent)!r})", "from zoo_support import declare_operators", "declare_operators()", *parts]
    script = Path("page.py")
    script.write_text("\n".join([*program, "print('the end of the page')"]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("the end of the page\n"), done.stderr[-3000:]


def test_a_page_that_fails_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in ("assert 1 == 2", "raise SystemExit", "x = 1\n" * (RECIPE + 1)):
        page = tmp_path / "guide-wrong.md"
        page.write_text(f"```python\n{code}\n```\n")
        with pytest.raises(AssertionError):
            run_alone(page)


@pytest.mark.parametrize("page", [*PAGES, *GUIDES], ids=lambda page: page.stem)
def test_a_page_uses_public_names_only(page):
    for code in blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                deep = [name for name in names if name.startswith("graphprune.") and name.count(".") > 1]
                assert not deep, f"{page.name} imports {deep}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "graphprune":
                assert not node.attr.startswith("_") and hasattr(graphprune, node.attr)


def test_the_reference_lists_all_that_is_public():
    listed = set(re.findall(r"^::: graphprune\.(\w+)$", (DOCS / "reference.md").read_text(), flags=re.M))
    assert listed >= set(graphprune.__all__) - {"GraphpruneError", "__version__", "scores"}
    assert all(hasattr(graphprune, name) for name in listed)


def test_every_page_is_reached_and_every_link_leads_somewhere():
    pages = {page.name: page.read_text() for page in DOCS.glob("*.md")}
    listed = (DOCS.parent / ".mkdocs.yml").read_text()
    for page in GUIDES[1:] + PAGES:
        assert page.name in listed, f"{page.name} is not in the site's menu"
    for name, text in pages.items():
        for target in re.findall(r"\]\(([\w.-]+\.(?:md|png))\)", text):
            assert (DOCS / target).is_file(), f"{name} links to {target}"


def test_there_is_a_page():
    assert {page.stem for page in PAGES} >= {f"own-{kind}" for kind in ("operation", "score", "runtime", "granularity", "repair")}


def old_spellings(page: Path) -> list[str]:
    """Options of calls that a page writes as they were written before."""
    calls = [node for code in blocks(page) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [each.arg for call in calls if call.func.attr in ("shrink", "plan", "iterate") for each in call.keywords if each.arg in spelling.OLD]


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_no_page_writes_an_option_as_it_was_written_before(page):
    assert not old_spellings(page)


def test_an_old_spelling_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('```python\nsmall = graphprune.shrink(net, x, criterion="l1", macs=0.5)\n```\n')
    assert old_spellings(page) == ["criterion"]
