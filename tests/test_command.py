"""The command line: every command from a text to a result, recipes that give the same bytes, errors in a sentence with a status, no files in part."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import graphprune
from graphprune.adapters.inputs import calibration_of, example_of
from graphprune.adapters.models import model_of
from graphprune.command import main
from graphprune.errors import BadCalibration, BadInput, BadModel, UnknownName

pytest.importorskip("typer")
pytest.importorskip("yaml")

NET = """
    import time
    import torch
    from torch import nn

    class Holder:
        def __init__(self):
            self.inner = nn.Linear(3, 4)

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.mask = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, ids, mask):
            return self.mask(self.b(self.a(ids)).relu()) * mask.unsqueeze(-1)

    def net():
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, scale):
            return self.a(x) * scale

    ready = nn.Linear(3, 5)
    holder = Holder
    text = "no model"

    def broken():
        raise ValueError("out of cheese")

    def count(model):
        return -float(sum(p.numel() for p in model.parameters()))

    def slow(model):
        open('started', 'w').close()
        time.sleep(600)  # longer than any machine takes to send the signal
        return 1.0
"""
INPUT = ["-i", "1x3x8x8"]


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(textwrap.dedent(NET))
    return "mynet.py:net"


def out(capsys, *arguments, status=0):
    assert main(list(arguments)) == status, capsys.readouterr()
    caught = capsys.readouterr()
    return caught.err if status else caught.out


@pytest.mark.parametrize("asked", [("--ratio", "0.5"), ("--ratio", "50%"), ("--macs", "0.5"), ("--params", "60%"), ("--size", "0.6")])
def test_amounts_and_shapes_as_people_write_them(net, capsys, asked):
    saved = json.loads(out(capsys, "plan", net, "-i", "1,3,8,8", *asked, "--json"))
    assert saved["after"]["params"] < 0.7 * saved["before"]["params"]
    assert saved == json.loads(out(capsys, "plan", net, "-i", "1x3x8x8", *asked, "--json"))


@pytest.mark.parametrize("kind", ["score", "granularity", "runtime", "repair"])
def test_a_list_is_asked_for_as_it_is_headed(capsys, kind):
    plural = out(capsys, "list", {"granularity": "granularities"}.get(kind, kind + "s"))
    assert plural == out(capsys, "list", kind) and len(plural.splitlines()) > 3
    assert "no kind" in out(capsys, "list", kind + "z", status=1)


def test_shrink_saves_and_its_recipe_gives_the_same_bytes(net, capsys):
    text = out(capsys, "shrink", net, *INPUT, "--macs", "50%", "--multiple-of", "4", "-o", "small")
    assert "MACs" in text and "saved in small" in text
    again = json.loads(out(capsys, "run", "small/recipe.yaml", "-o", "again", "--json"))
    assert again["after"]["macs"] <= 0.5 * again["before"]["macs"]
    for name in ("model.safetensors", "plan.json"):
        assert Path("small", name).read_bytes() == Path("again", name).read_bytes()
    other = json.loads(out(capsys, "shrink", net, *INPUT, "--macs", "50%", "--multiple-of", "4", "--seed", "1", "-o", "other", "--json"))
    assert other["after"]["macs"] == again["after"]["macs"] and Path("other/model.safetensors").read_bytes() != Path("again/model.safetensors").read_bytes()
    small = model_of("small")
    assert graphprune.profile(small, torch.zeros(1, 3, 8, 8)).macs == again["after"]["macs"] and small[0].out_channels % 4 == 0
    assert "the plans do the same" in out(capsys, "compare", "small", "again")
    assert "do the same" not in out(capsys, "compare", "small", "other/plan.json")
    assert {path.name for path in Path("small").iterdir()} == {"model.safetensors", "plan.json", "recipe.yaml"}


def test_what_looks_and_asks(net, capsys):
    assert "2 groups" in out(capsys, "inspect", net, *INPUT)
    assert json.loads(out(capsys, "inspect", net, *INPUT, "--json"))["cost"]["params"] > 0
    assert "group 0" in out(capsys, "plan", net, *INPUT, "-r", "30%", "--explain", "-o", "deep/plan.json") and Path("deep/plan.json.recipe.yaml").exists()
    rows = json.loads(out(capsys, "sensitivity", net, *INPUT, "--ratios", "0.5", "--json", "-o", "s.csv"))["rows"]
    assert len(rows) == 2 and all(row["value"] < 0 for row in rows) and Path("s.csv").read_text().count("\n") == 3
    assert "-" in out(capsys, "tradeoff", net, *INPUT, "--evaluate", "mynet.py:count", "--shares", "50%")
    assert "python" in out(capsys, "doctor") and "torch" in json.loads(out(capsys, "doctor", "--json"))
    assert "ms (" in out(capsys, "measure", net, *INPUT, "--seconds", "0.05", "--threads", "1")


def test_report_export_and_repair(net, capsys):
    out(capsys, "shrink", net, *INPUT, "-r", "50%", "-o", "small")
    out(capsys, "report", net, *INPUT, "--plan", "small", "-o", "deep/r.html")
    assert "What stays whole" in Path("deep/r.html").read_text()
    out(capsys, "export", "small", *INPUT, "-o", "deep/small.pt2")
    x, small = torch.randn(1, 3, 8, 8), model_of("small")
    assert torch.allclose(model_of("deep/small.pt2")(x), small(x))
    out(capsys, "export", "small", *INPUT, "-o", "small.ts")
    assert torch.allclose(torch.jit.load("small.ts")(x), small(x))
    np.savez("data.npz", np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype("float32"))
    out(capsys, "repair", "small", "-c", "data.npz", "-o", "better")
    whole, data = model_of(net), torch.from_numpy(np.load("data.npz")["arr_0"])
    far = {name: float((model_of(name)(data) - whole(data)).norm().detach()) for name in ("small", "better")}
    assert far["better"] < far["small"]
    out(capsys, "run", "better/recipe.yaml", "-o", "twice")
    assert Path("better/model.safetensors").read_bytes() == Path("twice/model.safetensors").read_bytes()


MADE = [
    ("inspect", [], "a.json", 0), ("plan", ["-r", "30%"], "a.json", 1), ("report", ["-r", "50%"], "a.html", 1),
    ("sensitivity", ["--ratios", "50%"], "a.csv", 1), ("sensitivity", ["--ratios", "50%"], "a.svg", 1), ("tradeoff", ["--shares", "50%"], "a.csv", 1),
    ("tradeoff", ["--shares", "50%"], "a.png", 1), ("export", [], "a.pt2", 1), ("export", [], "a.onnx", 1),
]  # fmt: skip


@pytest.mark.parametrize(("command", "options", "name", "seeded"), MADE, ids=[f"{made[0]} {made[2]}" for made in MADE])
def test_what_a_command_writes_comes_with_a_recipe_that_gives_the_same_bytes(net, capsys, command, options, name, seeded):
    for needed in {".png": ["matplotlib"], ".svg": ["matplotlib"], ".onnx": ["onnx", "onnxscript"]}.get(Path(name).suffix, ()):
        pytest.importorskip(needed)
    out(capsys, command, net, *INPUT, *options, "-o", f"first/{name}")
    assert {path.name for path in Path("first").iterdir()} == {name, f"{name}.recipe.yaml"}
    out(capsys, "run", f"first/{name}.recipe.yaml", "-o", f"second/{name}")
    first = Path("first", name).read_bytes()
    assert first and first == Path("second", name).read_bytes()
    out(capsys, command, net, *INPUT, *options, "--seed", "1", "-o", f"third/{name}")
    assert not seeded or first != Path("third", name).read_bytes()  # control: other weights, other bytes


def test_results_of_a_comparison_and_of_a_timing_are_kept(net, capsys):
    out(capsys, "shrink", net, *INPUT, "-r", "50%", "-o", "small")
    out(capsys, "plan", net, *INPUT, "-r", "25%", "-o", "other.json")
    out(capsys, "compare", "small", "other.json", "-o", "differences.json")
    assert json.loads(Path("differences.json").read_text())["rows"]
    out(capsys, "run", "differences.json.recipe.yaml", "-o", "again.json")
    assert Path("differences.json").read_bytes() == Path("again.json").read_bytes()
    out(capsys, "measure", "small", *INPUT, "--against", net, "--seconds", "0.05", "--threads", "1", "-o", "time.json")
    assert json.loads(Path("time.json").read_text())["seconds"] > 0
    out(capsys, "run", "time.json.recipe.yaml", "-o", "later.json")
    assert json.loads(Path("later.json").read_text())["threads"] == 1


WRONG = [
    (["inspect", "mynet.py:net"], 2, "--input"),
    (["inspect", "mynet.py:net", "-i", "ids=1x3", "-i", "2x3"], 1, "name all of them or none"),
    (["inspect", "mynet.py:net", "-i", "missing.npy"], 1, "holds no input"),
    (["plan", "nothing", *INPUT], 1, "'nothing' is no model"),
    (["plan", "mynet.py:nett", *INPUT], 1, "has no 'nett'; there are"),
    (["plan", "other.py:net", *INPUT], 1, "there is no file other.py"),
    (["plan", "no.such.module:net", *INPUT], 1, "cannot be imported"),
    (["plan", "mynet.py:broken", *INPUT], 1, "out of cheese"),
    (["plan", "mynet.py:text", *INPUT], 1, "gives a str"),
    (["plan", "mynet.py:holder", *INPUT], 1, "it holds one in .inner"),
    (["plan", "mynet.py:net", "-i", "1x3x"], 1, "is no input"),
    (["plan", "mynet.py:net", "-i", "1x5x8x8"], 1, "does not run on the example"),
    (["plan", "mynet.py:net", *INPUT, "--macs", "much"], 1, "write it as"),
    (["plan", "mynet.py:net", *INPUT, "--macs", "1k"], 3, "smallest reachable value"),
    (["plan", "mynet.py:net", *INPUT, "--score", "l3"], 1, "no score named 'l3'"),
    (["plan", "mynet.py:net", *INPUT, "--score", "taylor"], 1, "--calibration"),
    (["plan", "mynet.py:net", *INPUT, "--runtime", "eager"], 1, "--speedup"),
    (["plan", "mynet.py:net", *INPUT, "--weights", "none.pt"], 1, "no file none.pt"),
    (["shrink", "mynet.py:net", *INPUT, "-c", "nowhere", "-o", "x"], 1, "there is no nowhere"),
    (["shrink", "mynet.py:net", *INPUT, "-o", "mynet.py/x"], 1, "cannot be written"),
    (["shrink", "mynet.py:net", *INPUT, "-r", "50%", "--spare", "0.5", "-o", "x"], 1, "--calibration"),
    (["plan", "mynet.py:net", *INPUT, "--ratio-of", "25%"], 1, "name=value"),
    (["plan", "mynet.py:net", *INPUT, "--width", "0=half"], 1, "whole number"),
    (["measure", "mynet.py:net", *INPUT, "--memory-format", "sideways"], 1, "channels_last"),
    (["shrink", "mynet.py:net", *INPUT], 2, "--out"),
    (["frobnicate"], 2, "No such command"),
    (["plan", "mynet.py:net", *INPUT, "--frob"], 2, "No such option"),
    (["repair", "mynet.py", "-c", "x", "-o", "y"], 1, "no folder that graphprune shrink wrote"),
    (["compare", "mynet.py", "mynet.py"], 1, "not a plan written by graphprune"),
    (["compare", "none.json", "none.json"], 1, "cannot be read"),
    (["run", "mynet.py"], 1, "is no recipe"),
    (["export", "mynet.py:net", *INPUT, "-o", "x.bin"], 1, "one of onnx"),
    (["sensitivity", "mynet.py:net", *INPUT, "--evaluate", "mynet.py:nothing"], 1, "is no function"),
    (["list", "colours"], 1, "no kind 'colours'"),
    (["doctor", "--verbose"], 2, "No such option"),
    (["shrink", "mynet.py:net", *INPUT, "-r", "1.5", "-o", "x"], 1, "ratio"),
    (["shrink", "mynet.py:net", *INPUT, "--keep", "9", "-o", "x"], 1, "fits no module or parameter"),
    (["shrink", "mynet.py:net", *INPUT, "--what", "feathers", "-o", "x"], 1, "feathers"),
    (["repair", "nowhere", "-c", "x", "-o", "y"], 1, "no folder that graphprune shrink wrote"),
    (["measure", "mynet.py:net", *INPUT, "--runtime", "abacus"], 1, "there are eager, compile"),
    (["measure", "mynet.py:net", *INPUT, "--threads", "0"], 1, "whole number from 1 on"),
    (["sensitivity", "mynet.py:net", *INPUT, "--ratios", "half"], 1, "half"),
    (["sensitivity", "mynet.py:net", *INPUT, "--ratios", "50%", "-o", "x.docx"], 1, "pictures are written as"),
    (["tradeoff", "mynet.py:net", *INPUT, "--by", "taste"], 1, "taste"),
    (["tradeoff", "mynet.py:net", *INPUT, "--shares", "0.1%"], 3, "0.1%"),
    (["export", "mynet.py:net", *INPUT, "-o", "mynet.py/x.pt2"], 1, "cannot be written"),
    (["export", "mynet.py:net", *INPUT], 2, "--out"),
    (["export", "mynet.py:net", *INPUT, "--dynamic", "-o", "x.ts"], 1, "--dynamic goes with onnx, program"),
    (["export", "mynet.py:net", *INPUT, "--to", "coreml", "-o", "x.mlmodel"], 1, "one of onnx"),
    (["report", "mynet.py:net", *INPUT, "--plan", "none.json"], 1, "cannot be read"),
    (["report", "mynet.py:net", *INPUT, "-r", "50%", "-o", "mynet.py/r.html"], 1, "cannot be written"),
    (["compare", "mynet.py"], 2, "Missing argument"),
    (["run", "none.yaml"], 1, "is no recipe"),
]


PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def plain(text):
    """What was printed, without the frames that the parser draws."""
    return " ".join(re.sub(r"[│╭╮╰╯─]+", " ", text).split())


def row(arguments, status, text):
    """A line of the table of mistakes: the command, its status, and the sentence."""
    said = re.search(r"graphprune: (?!warning)(.*)" if status != 2 else r" Error (.*)", plain(text))
    sentence = said[1] if said else plain(text)
    return f"| `graphprune {shlex.join(arguments)}` | {status} | {sentence[:150] + ('…' if len(sentence) > 150 else '')} |".replace("||", "| |")


@pytest.mark.parametrize(("arguments", "status", "words"), WRONG, ids=[" ".join(w[0][:1] + w[0][-2:]) for w in WRONG])
def test_mistakes_are_a_sentence_and_a_status(net, capsys, arguments, status, words):
    before = {path.name for path in Path().iterdir()}
    text = out(capsys, *arguments, status=status)
    assert words in plain(text) and "Traceback" not in text
    assert {path.name for path in Path().iterdir()} - before <= {"__pycache__"}
    assert status == 2 or row(arguments, status, text) in PAGE.read_text(), "python tests/test_command.py writes the table of docs/cli.md anew"


def test_every_command_has_its_mistakes():
    from graphprune.commands.work import COMMANDS

    assert {arguments[0] for arguments, *_ in WRONG} >= set(COMMANDS)


# How options of Python are spelled on the command line where the name is another one, and what only Python can say.
SPELLED = {
    "example_input": ["input"], "example_kwargs": ["input"], "widths": ["multiple_of", "at_least", "ratio_of", "width", "uniform", "rewrite", "also"],
    "on": ["runtime", "threads", "objective"], "outputs": ["output"], "repair": ["calibration", "steps", "target", "spare", "rows", "rounds", "effort"],
    "original": ["model"], "small": ["model"], "plan": ["plan"], "file": ["out"], "asked": ["ratio", "params", "macs", "size", "memory", "latency", "speedup"],
    "measure": ["time"], "reference": ["against"], "ratios": ["ratios"],
}  # fmt: skip
PYTHON_ONLY = {
    "examples": "further inputs, or functions of the model", "inplace": "the model of a command ends with it",
    "progress": "a bar is shown where a person may be looking",
    "graph": "a trace that is there already", "measurement": "what measure returned", "return_plan": "it is always printed",
}  # fmt: skip
OTHERWISE = {
    ("repair", "plan"): "in the folder",
    ("tradeoff", "on"): ["runtime", "threads"],
    ("tradeoff", "repair"): ["calibration", "steps", "target", "spare", "rows"],
    ("report", "measure"): [],
}
FIELDS = {"widths": graphprune.Widths, "on": graphprune.Runtime, "repair": graphprune.Repair}
FIELD_NAMES = {"ratios": "ratio_of", "to": "width", "name": "runtime", "batches": "calibration"}


def unspelled(command, function, spelled):
    """Options of a function that a command lacks."""
    missing = []
    for name in inspect.signature(function).parameters:
        wanted = OTHERWISE.get((command, name), SPELLED.get(name, [name]))
        if name not in PYTHON_ONLY and not isinstance(wanted, str):
            missing += [option for option in wanted if option not in spelled]
    return missing


def spellings(command):
    from graphprune.commands import app

    return set(inspect.signature(getattr(app, command)).parameters)


@pytest.mark.parametrize("command", ["plan", "shrink", "repair", "measure", "sensitivity", "tradeoff", "report"])
def test_what_python_can_be_asked_for_can_be_typed(command):
    function = getattr(graphprune, command)
    assert not unspelled(command, function, spellings(command))
    assert unspelled(command, function, spellings(command) - {"seconds", "ratio", "steps", "mode", "title"})  # control


@pytest.mark.parametrize("option", FIELDS)
def test_fields_of_options_that_belong_together_are_typed_one_by_one(option):
    names = {FIELD_NAMES.get(field.name, field.name) for field in dataclasses.fields(FIELDS[option])} - {"progress", "measure"}
    assert names == set(SPELLED[option])


def test_options_reach_what_they_are_for(net, capsys):
    def planned(*options):
        return {row["group"]: row["after"] for row in json.loads(out(capsys, "plan", net, *INPUT, *options, "--json"))["rows"]}

    whole = planned("-r", "0", "--ratio-of", "0=50%")
    assert sorted(whole.values()) == [8, 8] and sorted(planned("--width", "0=4", "--width", "3=2").values()) == [2, 4]
    assert sorted(planned("-r", "30%", "--multiple-of", "4").values()) == [8, 12]
    header, *lines = out(capsys, "tradeoff", net, *INPUT, "--shares", "50%", "--time", "--seconds", "0.05", "--threads", "1", "--keep", "7").splitlines()
    assert "speedup" in header and lines
    assert "ms (" in out(capsys, "measure", net, *INPUT, "--seconds", "0.05", "--threads", "1", "--memory-format", "channels_last", "--tolerance", "0.5")
    assert len(json.loads(out(capsys, "sensitivity", net, *INPUT, "--ratios", "50%", "--keep", "7", "--json"))["rows"]) == 1
    out(capsys, "report", net, *INPUT, "--params", "60%", "--title", "Ours & theirs", "-o", "r.html")
    assert "Ours &amp; theirs" in Path("r.html").read_text()
    np.savez("data.npz", np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype("float32"))
    out(capsys, "shrink", net, *INPUT, "-r", "50%", "-c", "data.npz", "--spare", "0.5", "--rows", "512", "--target", "layer", "--no-verify", "-o", "small")
    out(capsys, "run", "small/recipe.yaml", "-o", "again")
    assert Path("small/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def write_table():
    """The table of mistakes in docs/cli.md, from what the commands say."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("mynet.py").write_text(textwrap.dedent(NET))
        for arguments, status, _ in sorted(WRONG, key=lambda wrong: wrong[0][0]):
            stream = io.StringIO()
            with contextlib.redirect_stderr(stream):
                assert main(list(arguments)) == status, arguments
            rows.append(row(arguments, status, stream.getvalue()))
    text = PAGE.read_text()
    head = "| command | status | says |\n|---|---|---|\n"
    PAGE.write_text(text[: text.index(head) + len(head)] + "\n".join(rows) + "\n")


def test_models_and_inputs_from_texts(net, tmp_path):
    assert isinstance(model_of("mynet.py:ready"), torch.nn.Linear) and isinstance(model_of("torch.nn:Identity"), torch.nn.Identity)
    assert torch.equal(model_of(net)[0].weight, model_of(net)[0].weight) and not torch.equal(model_of(net)[0].weight, model_of(net, seed=1)[0].weight)
    torch.save(model_of(net, seed=7).state_dict(), "w.pt")
    assert torch.equal(model_of(net, "w.pt")[0].weight, model_of(net, seed=7)[0].weight)
    with pytest.raises(BadModel, match="does not fit"):
        model_of("mynet.py:ready", "w.pt")
    named = example_of(["ids=2x4:int64:20", "mask=2x4"])
    assert named["ids"].max() < 20 and model_of("mynet.py:Calls")(**named).shape == (2, 4, 5)
    assert [x.dtype for x in example_of(["1x2", "3:int64"])] == [torch.float32, torch.int64]
    np.save("x.npy", np.zeros((2, 3), dtype="float32"))
    assert example_of(["x.npy"]).shape == (2, 3)
    for wrong in (["a=1x2", "3"], [], ["1x2:float99"], ["y.npz"], ["mynet.pt"]):
        with pytest.raises(BadInput):
            example_of(wrong)
    for wrong in ("timm:no_such_model", "transformers:nowhere", "torchvision:nothing"):
        with pytest.raises(UnknownName):
            model_of(wrong)


TIMM = """
from torch import nn

def list_models():
    return ["tiny", "small"]

def create_model(name, pretrained):
    return {"tiny": nn.Linear, "small": nn.Linear}[name](3, 4)
"""


@pytest.fixture
def library(net, monkeypatch):
    """Puts a library of that code where timm would be, and no torchvision beside it."""

    def put(code):
        Path("timm.py").write_text(code)
        monkeypatch.delitem(sys.modules, "timm", raising=False)
        monkeypatch.syspath_prepend(os.getcwd())
        importlib.invalidate_caches()
        monkeypatch.setattr("graphprune.adapters.models.NAMED", {"timm": lambda timm: timm.list_models()})

    yield put
    sys.modules.pop("timm", None)


def test_a_name_that_a_library_has(library):
    library(TIMM)
    assert model_of("timm:tiny").out_features == model_of("tiny").out_features == 4
    with pytest.raises(UnknownName, match="the nearest are tiny"):
        model_of("timm:tinyy")
    with pytest.raises(UnknownName, match="'tinyy' is no model; give"):
        model_of("tinyy")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_package_1", "timm cannot be imported (No module named 'no_such_package_1'); pip install no_such_package_1"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms does not exist"),
        ("from torch import no_such_name_1", "timm is installed but cannot be imported (ImportError"),
        ("raise OSError('libcudart.so.11: cannot open shared object file')", "do its version and torch's belong together?"),
    ],
)
def test_a_library_that_cannot_be_used_says_why(library, capsys, code, said):
    library(code)
    for name in ("timm:tiny", "tiny"):
        with pytest.raises(UnknownName, match=re.escape(said)):
            model_of(name)
    assert said in json.loads(out(capsys, "doctor", "--json"))["libraries"]["timm"]


def test_a_file_with_the_number_of_samples_open(net, capsys):
    """The example shows one sample, which an exporter takes for a constant; inputs with names, and one whose first axis is another."""
    out(capsys, "export", net, *INPUT, "--dynamic", "-o", "open.pt2")
    out(capsys, "export", net, *INPUT, "-o", "fixed.pt2")
    x = torch.randn(5, 3, 8, 8)
    assert torch.allclose(model_of("open.pt2")(x), model_of(net)(x), atol=1e-6)
    with pytest.raises(Exception, match="(?i)expected|guard|constraint|shape"):
        model_of("fixed.pt2")(x)  # control
    out(capsys, "export", "mynet.py:Calls", "-i", "ids=1x6:int64:20", "-i", "mask=1x6", "--dynamic", "-o", "calls.pt2")
    named = {"ids": torch.randint(20, (3, 6)), "mask": torch.rand(3, 6)}
    assert torch.allclose(model_of("calls.pt2")(**named), model_of("mynet.py:Calls")(**named), atol=1e-6)
    out(capsys, "export", "mynet.py:Scaled", "-i", "3x4", "-i", "4", "--dynamic", "-o", "scaled.pt2")
    pair = torch.randn(7, 4), torch.randn(4)
    assert torch.allclose(model_of("scaled.pt2")(*pair), model_of("mynet.py:Scaled")(*pair), atol=1e-6)


def test_a_file_for_onnx_runtime_with_the_number_of_samples_open(net, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    out(capsys, "export", net, *INPUT, "--dynamic", "-o", "open.onnx")
    session, x = runtime.InferenceSession("open.onnx", providers=["CPUExecutionProvider"]), torch.randn(5, 3, 8, 8)
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.allclose(outputs, model_of(net)(x).detach().numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the exporter's own libraries
def test_a_file_for_executorch(net, capsys):
    runtime = pytest.importorskip("executorch.runtime")
    pytest.importorskip("executorch.exir")
    out(capsys, "export", net, *INPUT, "-o", "net.pte")
    program, x = runtime.Runtime.get().load_program("net.pte"), torch.randn(1, 3, 8, 8)
    assert torch.allclose(program.load_method("forward").execute([x])[0], model_of(net)(x), atol=1e-5)


def test_what_is_advised_is_spelled_as_it_is_typed(net, capsys):
    for command in (["plan", net, *INPUT, "-r", "50%"], ["shrink", net, *INPUT, "-r", "50%", "-o", "small"], ["inspect", net, *INPUT]):
        text = out(capsys, *command)
        assert "plan.explain(" not in text and "graph.nodes" not in text and "repair=" not in text
    assert "--calibration" in out(capsys, "plan", net, *INPUT, "-r", "50%")
    assert "plan.explain(" in str(graphprune.plan(model_of(net), torch.zeros(1, 3, 8, 8)))  # control: in Python


@pytest.mark.parametrize("factory", ["ready", "net", "Calls"])
def test_no_line_outside_of_the_model_is_named(net, capsys, factory):
    """Of a model of torch's own layers no line is the user's: neither this test's nor the command line's."""
    options = {"ready": ["-i", "1x3"], "net": INPUT, "Calls": ["-i", "ids=1x6:int64:20", "-i", "mask=1x6"]}[factory]
    data = json.loads(out(capsys, "inspect", f"mynet.py:{factory}", *options, "--json"))
    lines = {line for each in data["whole"] for line in re.findall(r"\w+\.py:\d+", each["reason"])}
    assert {line.partition(":")[0] for line in lines} <= ({"mynet.py"} if factory == "Calls" else set())


def test_the_version(capsys):
    assert out(capsys, "--version").strip() == graphprune.__version__


def test_images_as_calibration(net):
    image = pytest.importorskip("PIL.Image")
    folder = Path("photos/inner")
    folder.mkdir(parents=True)
    for number in range(5):
        image.new("RGB", (20 + number, 12), (255, 0, 51 * number)).save(folder / f"{number}.png")
    batches = calibration_of("photos", torch.zeros(1, 3, 8, 8), batch=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert batches[0][0, 0].eq(1).all() and batches[1][0, 2].sub(0.4).abs().max() < 0.01
    shifted = calibration_of("photos", torch.zeros(1, 3, 8, 8), mean=(1.0, 0, 0), std=(0.5, 1, 1))
    assert shifted[0][0, 0].eq(0).all()
    for wrong in (lambda: calibration_of("photos", torch.zeros(1, 5)), lambda: calibration_of("mynet.py", torch.zeros(1, 5)), lambda: calibration_of(".", 1)):
        with pytest.raises(BadCalibration):
            wrong()


def test_an_interrupt_leaves_no_file(net):
    command = [sys.executable, "-m", "graphprune", "sensitivity", net, *INPUT, "--evaluate", "mynet.py:slow", "-o", "s.csv"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = time.time()
    while not Path("started").exists() and child.poll() is None and time.time() - started < 400:
        time.sleep(0.1)
    assert Path("started").exists()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130 and errors.strip().endswith("no file was left in part") and "Traceback" not in errors
    assert {path.name for path in Path().iterdir()} <= {"mynet.py", "started", "__pycache__"}


@pytest.mark.parametrize("place", ["command", "evaluation", "result", "file"])
def test_an_interrupt_is_one_wherever_it_comes(net, capsys, monkeypatch, place):
    from graphprune.commands import work

    def pressed(*_, **__):
        raise KeyboardInterrupt

    if place == "command":
        monkeypatch.setitem(work.COMMANDS, "tradeoff", pressed)
    else:
        monkeypatch.setattr(work, {"evaluation": "_evaluate", "result": "printed", "file": "_recipe"}[place], pressed)
    said = out(capsys, "tradeoff", net, *INPUT, "--shares", "50%", "-o", "front.csv", status=130)
    assert said.strip().endswith("no file was left in part")
    assert not [path for path in Path().iterdir() if "part" in path.name]


def test_importing_the_package_imports_none_of_the_extras():
    code = "import sys, graphprune; print([m for m in ('typer', 'rich', 'yaml', 'jinja2', 'matplotlib', 'pandas', 'PIL', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    commands = re.search(r"```sh\n(.*?)```", page, re.S)[1].splitlines()
    assert len(commands) > 10
    for line in commands:
        assert line.startswith("graphprune ") and main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert Path("small/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


if __name__ == "__main__":
    write_table()
