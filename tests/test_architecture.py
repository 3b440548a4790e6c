"""The walks of docs/architecture.md are true: every function that they name is there, and a run meets them in that order."""

import functools
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune

ROOT = Path(graphprune.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
NAMED = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


class Net(nn.Module):
    """Its code gives an attribute to a view, so that a width has something to solve for."""

    def __init__(self):
        super().__init__()
        self.width, self.up, self.middle, self.down = 16, nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.down(self.middle(self.up(x).relu().view(-1, self.width)).relu())


def walks():
    text = PAGE.read_text().partition("## Three walks")[2].partition("\n## ")[0]
    return {part.partition("**")[0]: [NAMED.findall(line) for line in part.splitlines() if re.match(r"\d+\. ", line)] for part in text.split("\n**")[1:]}


@functools.cache
def met():
    """The functions of the package in the order in which a run first enters them, by file and name."""
    order = {}

    def see(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT):
            order.setdefault((str(file.relative_to(ROOT)), frame.f_code.co_name), len(order))

    net = Net().eval()
    sys.setprofile(see)
    try:
        graphprune.shrink(net, torch.zeros(3, 4), macs=0.5)
    finally:
        sys.setprofile(None)
    return order


def test_there_are_three_walks_of_at_most_ten_steps():
    assert set(walks()) == {"A model", "A label", "A width"}
    assert all(3 < len(steps) <= 10 and all(steps) for steps in walks().values())


@pytest.mark.parametrize("walk", ["A model", "A label", "A width"])
def test_every_function_of_a_walk_is_there(walk):
    for file, name in (each for step in walks()[walk] for each in step):
        module = importlib.import_module("graphprune." + file.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
        functools.reduce(getattr, name.split("."), module)


@pytest.mark.parametrize("walk", ["A model", "A label", "A width"])
def test_a_run_meets_the_steps_in_their_order(walk):
    first = [[met()[file, name.split(".")[-1]] for file, name in step if not name[0].isupper() or "." in name] for step in walks()[walk]]
    starts = [step[0] for step in first if step]
    assert starts == sorted(starts), [walks()[walk][at] for at in range(len(starts) - 1) if starts[at] > starts[at + 1]]
    assert starts != sorted(starts, reverse=True)  # the control
