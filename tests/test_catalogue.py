"""What can be asked for by name is listed, with one line each, and what is listed can be asked for."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import graphprune
from graphprune.__main__ import main
from graphprune.errors import UnknownName
from graphprune.granularity.spec import parse
from graphprune.repair import STEPS


def test_every_kind_is_listed_with_one_line_each():
    found = graphprune.available()
    assert list(found) == ["score", "granularity", "target", "repair", "runtime"]
    assert len(found["score"]) > 30 and {"l2", "taylor", "fpgm", "obs", "snip", "random"} <= set(found["score"])
    assert set(found["repair"]) == {"auto", "data-free", "none", *STEPS}
    assert {"channel", "head", "block", "layer", "group", "kernel", "vector", "weight", "n:m"} <= set(found["granularity"])
    assert all(line and "\n" not in line for lines in found.values() for line in lines.values())
    found["score"].clear()
    assert graphprune.available()["score"]  # a copy


def test_what_is_listed_is_accepted():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4)
    for name in graphprune.available()["repair"]:
        graphprune.shrink(net, x, repair=name, calibration=[torch.randn(8, 4), torch.randn(8, 4)])
    with pytest.raises(UnknownName):
        graphprune.shrink(net, x, repair="magic", calibration=[x])
    for name in graphprune.available()["granularity"]:
        assert parse("2:4" if name == "n:m" else name)
    goals = {"ratio": 0.5, "params": 0.9, "macs": 0.9, "size": 0.9, "memory": 0.9, "latency": 1.0, "speedup": 1.0}
    assert set(goals) == set(graphprune.available()["target"])
    for name in ("ratio", "params", "macs", "size", "memory"):
        graphprune.shrink(net, x, **{name: goals[name]})


def test_the_command_line_prints_it(capsys):
    pytest.importorskip("typer")
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and line in text for lines in graphprune.available().values() for name, line in lines.items())
    assert main(["list", "repair"]) == 0 and "granularities" not in capsys.readouterr().out
    assert main(["list", "nothing"]) == 1
    assert "there are score" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "graphprune", "list", "granularity"], capture_output=True, text=True, check=True)
    assert "kernel" in done.stdout and not done.stderr
