"""What a model returns: every tensor and number in any object keeps its size, unless the user says which of them matter."""

import collections
import dataclasses
import functools
import types

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import BadInput, NotEqual, NothingToPrune, UnknownName
from graphprune.tracing.outputs import items

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Plain:
    def __init__(self, inner):
        self.inner = inner


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


@dataclasses.dataclass
class Data:
    inner: object
    name: str = "data"


class Listed:
    """Iterable, and nothing else."""

    def __init__(self, inner):
        self.__dict__ = {}
        self.inner = [inner]

    def __iter__(self):
        return iter(self.inner)


class Bound:
    def __init__(self, inner):
        self.inner = inner

    def get(self):
        return self.inner


class Two(nn.Module):
    """A hidden state and what is made of it, wrapped by ``pack``."""

    def __init__(self, pack):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mid, self.down = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.__dict__["pack"] = pack
        self.double()

    def forward(self, x):
        h = self.up(x).relu()
        return self.pack(h, self.down(self.mid(h).relu()))


PACKS = {
    "object": lambda h, y: Plain(h),
    "object in an object": lambda h, y: (y, Plain({"a": Plain(h)})),
    "slots": lambda h, y: [y, Slotted(h)],
    "namespace": lambda h, y: types.SimpleNamespace(h=h, y=y),
    "dataclass of an object": lambda h, y: Data(Plain(h)),
    "generator": lambda h, y: (t for t in (y, h)),
    "iterator": lambda h, y: iter([h]),
    "map": lambda h, y: map(Plain, [h]),
    "values": lambda h, y: {"h": h}.values(),
    "items": lambda h, y: {"h": h}.items(),
    "deque": lambda h, y: collections.deque([h, y]),
    "set": lambda h, y: frozenset([h]),
    "iterable": lambda h, y: Listed(h),
    "distribution": lambda h, y: torch.distributions.Categorical(logits=h),
    "independent": lambda h, y: (y, torch.distributions.Independent(torch.distributions.Normal(h, 1.0), 1)),
    "closure": lambda h, y: lambda: h,
    "array": lambda h, y: h.numpy(),
    "array in a dict": lambda h, y: {"y": y, "h": [h.numpy()]},
    "numbers": lambda h, y: h.tolist(),
    "sparse": lambda h, y: h.to_sparse(),
    "partial": lambda h, y: (y, functools.partial(torch.add, h)),
    "partial by keyword": lambda h, y: (y, functools.partial(torch.add, other=h)),
    "method of a tensor": lambda h, y: (y, h.sin),
    "method of an object": lambda h, y: (y, Bound(h).get),
    "default of a function": lambda h, y: (y, lambda h=h: h),
    "exception": lambda h, y: (y, ValueError("no", h)),
    "shape": lambda h, y: (y, h.shape),
    "width": lambda h, y: (y, h.shape[1]),
    "width in a dict": lambda h, y: {"y": y, "width": h.size(-1)},
    "count": lambda h, y: [y, h.numel()],
}


@pytest.mark.parametrize("name", PACKS)
def test_outputs_in_any_object_keep_their_size(name):
    net = Two(PACKS[name])
    with torch.no_grad():
        small = graphprune.shrink(net, X, 0.5)
        wanted, found = items(net(X)), items(small(X))
    assert [(path, np.shape(item)) for path, item in found] == [(path, np.shape(item)) for path, item in wanted]
    assert small.up.out_features == 16


@pytest.mark.parametrize("number", [3, 2.5, True])
def test_numbers_that_are_always_the_same_hold_nothing(number):
    small, plan = graphprune.shrink(Two(lambda h, y: (y, number)), X, 0.5, return_plan=True)
    assert small.up.out_features == 8 and small(X)[1] == number


@pytest.mark.parametrize("number", [lambda h, y: float(h.sum()), lambda h, y: [h.sum().item(), y.max().item()], lambda h, y: {"n": h[0].sum().item()}])
def test_numbers_alone_are_compared(number):
    with torch.no_grad():
        net = Two(number)
        small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
        assert small.up.out_features < 16
        with pytest.raises(NotEqual, match="differs"):  # control: another cut than the plan says
            graphprune.cutting.verify.check(graphprune.trace(net, X), net, graphprune.apply(Two(number).double().requires_grad_(False), plan), _other(plan))


def _other(plan):
    def moved(kept, size):
        gone = [position for position in range(size) if position not in kept]
        return gone[: len(kept)] if len(gone) >= len(kept) else kept

    cuts = {name: {axis: moved(kept, plan.shapes[name][axis]) for axis, kept in axes.items()} for name, axes in plan.cuts.items()}
    return dataclasses.replace(plan, cuts=cuts)


@pytest.mark.parametrize("result", [object(), None, "text", {"a": None}, []])
def test_a_result_without_anything_to_compare_is_no_pass(result):
    with pytest.raises((BadInput, NotEqual, NothingToPrune)):
        graphprune.shrink(Two(lambda h, y: result), X, 0.5)


def test_an_endless_result_is_refused():
    with pytest.raises(BadInput, match="more than"):
        graphprune.shrink(Two(lambda h, y: iter(int, 1)), X, 0.5)


def pair(h, y):
    return {"logits": y, "states": (h, h * 2), "extra": Plain(h)}


@pytest.mark.parametrize(
    ("outputs", "free"),
    [(None, False), ("logits", True), (["logits"], True), (0, True), (-1, False), (["logits", "states.1"], False), ("states", False),
     (lambda path, tensor: tensor.shape[-1] == 4, True)],
)  # fmt: skip
def test_outputs_that_matter(outputs, free):
    net = Two(pair)
    small, plan = graphprune.shrink(net, X, 0.5, outputs=outputs, return_plan=True)
    assert small.up.out_features == (8 if free else 16)
    if outputs not in (-1, "states"):
        assert torch.allclose(small(X)["logits"], graphprune.zeroed(net, plan)(X)[0]) and small(X)["logits"].shape == (3, 4)
    if outputs in (-1, "states"):
        assert small.down.out_features == 2  # nobody asked for the logits


def test_outputs_that_are_not_there():
    with pytest.raises(UnknownName, match=r"logits, states\.0"):
        graphprune.shrink(Two(pair), X, 0.5, outputs="logit")
    with pytest.raises(BadInput, match="neither a name"):
        graphprune.shrink(Two(pair), X, 0.5, outputs=1.5)


def test_state_that_the_model_takes_back_is_its_own_business():
    class Stateful(Two):
        def forward(self, x, cache=None):
            h = self.up(x).relu() + (cache.inner if cache is not None else 0)
            return {"y": self.down(self.mid(h).relu()), "cache": Plain(h)}

    net = Stateful(None)
    small = graphprune.shrink(net, X, 0.5)
    assert small.up.out_features == 8
    first = small(X)
    assert small(X, first["cache"])["y"].shape == (3, 4)


@pytest.mark.parametrize("way", ["keywords", "both", "nested"])
def test_a_wrapper_hands_the_state_on(way):
    """What it wraps says which arguments there are."""

    class Stateful(Two):
        def forward(self, x, cache=None):
            h = self.up(x).relu() + (cache.inner if cache is not None else 0)
            return {"y": self.down(self.mid(h).relu()), "cache": Plain(h)}

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    class Keywords(Wrapper):
        def forward(self, **inputs):
            return self.inner(**inputs)

    class Both(Wrapper):
        def forward(self, *args, **inputs):
            return self.inner(*args, **inputs)

    kinds = {"keywords": Keywords, "both": Both, "nested": lambda inner: Both(Keywords(inner))}
    net = kinds[way](Stateful(None))
    small = graphprune.shrink(net, {"x": X}, 0.5)
    assert min(min(p.shape) for p in small.parameters()) < 8 and small(x=X, cache=small(x=X)["cache"])["y"].shape == (3, 4)
    given = Plain(torch.zeros(3, 16, dtype=torch.float64))
    with pytest.raises(NothingToPrune):  # who makes the state has to know its width
        graphprune.shrink(net, {"x": X, "cache": given}, 0.5, keep=("*.mid",))


def test_recurrent_state_may_shrink():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.head = nn.GRU(8, 12, batch_first=True), nn.Linear(12, 3)

        def forward(self, x):
            out, state = self.r(x)
            return self.head(out), state

    x = torch.randn(2, 5, 8)
    assert graphprune.shrink(Recurrent(), x, 0.5, outputs=0).r.hidden_size == 6
    with pytest.raises(NothingToPrune):
        graphprune.shrink(Recurrent(), x, 0.5)
