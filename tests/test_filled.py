"""Where code keeps a tensor outside of the model, the user's model runs afterwards as it did before: whether anybody knows that place or not."""

import contextvars
import enum
import functools
import math
import queue
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune.tracing import filled
from graphprune.tracing.trace import trace

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two(x):
    return x.new_ones(1) * 2


class Net(nn.Module):
    """8 -> 16 -> 4, times a tensor that is made in the first call."""

    def __init__(self, factor):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)
        self.__dict__["factor"] = factor

    def forward(self, x):
        return self.down(self.up(x).relu()) * self.factor(x)


def attribute(holder):
    """Keeps it as an attribute of ``holder()``."""

    def factor(x):
        if getattr(holder(), "graphprune_tests", None) is None:
            holder().graphprune_tests = two(x)
        return holder().graphprune_tests

    return factor


class Slotted:
    __slots__ = ("graphprune_tests",)


@dataclass(slots=True)
class SlottedData:
    graphprune_tests: object = None


class Member(enum.Enum):
    ONE = 1


class Kind(type):
    kept = {}


class OfKind(metaclass=Kind):
    pass


def in_a_default():
    def factor(x, kept=[]):  # noqa: B006
        kept.append(two(x)) if not kept else None
        return kept[0]

    return factor


def in_a_default_of_a_keyword():
    def factor(x, *, kept={}):  # noqa: B006
        return kept.setdefault("two", two(x)) if not kept else kept["two"]

    return factor


def on_the_function():
    def factor(x):
        if not hasattr(factor, "kept"):
            factor.kept = two(x)
        return factor.kept

    return factor


def in_a_tuple():
    kept = ({}, [])

    def factor(x):
        if "two" not in kept[0]:
            kept[0]["two"] = two(x)
        return kept[0]["two"]

    return factor


def in_a_context_variable():
    variable = contextvars.ContextVar("graphprune_tests", default=None)

    def factor(x):
        if variable.get() is None:
            variable.set(two(x))
        return variable.get()

    return factor


def in_a_queue():
    kept = queue.Queue()

    def factor(x):
        if kept.empty():
            kept.put(two(x))
        return kept.queue[0]

    return factor


def in_a_generator():
    def makes():
        made = None
        while True:
            x = yield made
            made = two(x) if made is None else made

    running = makes()
    next(running)
    return running.send


def deep():
    kept = {"a": {"b": [{"c": {"d": {}}}]}}

    def factor(x):
        inner = kept["a"]["b"][0]["c"]["d"]
        if "two" not in inner:
            inner["two"] = two(x)
        return inner["two"]

    return factor


def in_a_metaclass():
    def factor(x):
        if "two" not in OfKind.kept:
            OfKind.kept["two"] = two(x)
        return OfKind.kept["two"]

    return factor


def before_a_failure():
    """Also where the run without values ends in the middle, since the code asks for a value."""
    inner = in_a_queue()
    return lambda x: inner(x) * (2 if float(x.abs().sum()) > 0 else 3)


def far():
    return SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=SimpleNamespace(d=SimpleNamespace()))))


PLACES = {
    "slots": lambda: attribute(functools.partial(lambda holder: holder, Slotted())),
    "a dataclass with slots": lambda: attribute(functools.partial(lambda holder: holder, SlottedData())),
    "torch": lambda: attribute(lambda: torch),
    "torch's functions": lambda: attribute(lambda: F),
    "a class of torch's": lambda: attribute(lambda: nn.Linear),
    "a module of Python's": lambda: attribute(lambda: math),
    "a module that is no part of the model": lambda: attribute(functools.partial(lambda holder: holder, nn.Module())),
    "a member": lambda: attribute(lambda: Member.ONE),
    "far away": lambda: attribute(functools.partial(lambda holder: holder.a.b.c.d, far())),
    "a default": in_a_default,
    "a default of a keyword": in_a_default_of_a_keyword,
    "the function": on_the_function,
    "a tuple": in_a_tuple,
    "a context variable": in_a_context_variable,
    "a queue": in_a_queue,
    "a generator": in_a_generator,
    "deep": deep,
    "a metaclass": in_a_metaclass,
    "before a failure": before_a_failure,
}


@pytest.fixture(autouse=True)
def clean():
    yield
    for holder in (torch, F, nn.Linear, math, Member.ONE):
        if hasattr(holder, "graphprune_tests"):
            del holder.graphprune_tests
    Kind.kept.clear()


@pytest.mark.parametrize("place", PLACES)
def test_the_users_model_runs_as_before(place):
    torch.manual_seed(0)
    net = Net(PLACES[place]()).double().eval()
    wanted = net.down(net.up(X).relu()) * (4 if place == "before a failure" else 2)
    small = graphprune.shrink(net, X, 0.5)
    assert small.up.out_features == 8
    with torch.no_grad():
        assert torch.equal(net(X), wanted)
        assert small(X).shape == (3, 4)


def test_what_was_left_has_the_values_of_the_example():
    kept = queue.Queue()

    class Keeps(Net):
        def forward(self, x):
            hidden = self.up(x).relu_()
            if kept.empty():
                kept.put(hidden.mean(0)[:3] + self.down.weight[:3, 0])
            return self.down(hidden)

    net = Keeps(None).double().eval()
    trace(net, X)
    with torch.no_grad():
        assert torch.equal(kept.queue[0], net.up(X).relu().mean(0)[:3] + net.down.weight[:3, 0])


def test_the_control(monkeypatch):
    """Without it the user's model would meet a tensor without values."""
    monkeypatch.setattr(filled.LeftBehind, "note", lambda *_: None)
    net = Net(in_a_queue()).double().eval()
    with pytest.raises(graphprune.GraphpruneError):
        graphprune.shrink(net, X, 0.5)
    with pytest.raises(RuntimeError, match="meta"):
        net(X)
