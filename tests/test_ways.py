"""Code that the run on the example did not take, and that an exporter switches to, holds in the cut model as well."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.planning import widths
from graphprune.tracing import trace as tracing

X = torch.randn(2, 3, 6, 6, dtype=torch.float64)


class Base(nn.Module):
    """Halves of a convolution's channels, by a chunk in the run, and by sizes kept in attributes otherwise."""

    def __init__(self, width=12, blocks=2):
        super().__init__()
        self.width = width
        self.enter = nn.Conv2d(3, 2 * width, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.leave = nn.Conv2d((2 + blocks) * width, 5, 1)

    def tail(self, parts):
        parts = list(parts)
        for block in self.blocks:
            parts.append(block(parts[-1]).relu())
        return self.leave(torch.cat(parts, 1)).mean((2, 3))

    def forward(self, x):
        return self.tail(self.enter(x).chunk(2, 1))


class Method(Base):
    def forward_split(self, x):
        return self.tail(self.enter(x).split((self.width, self.width), 1))


class Prefixed(Base):
    def export_forward(self, x):
        y = self.enter(x)
        return self.tail((y[:, : self.width], y[:, self.width :]))


class Narrowed(Base):
    def forward_export(self, x):
        y = self.enter(x)
        return self.tail([y.narrow(1, 0, self.width), y.narrow(1, self.width, self.width)])


class Flag(Base):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.export = False

    def forward(self, x):
        y = self.enter(x)
        return self.tail(y.view(len(x), 2, self.width, *x.shape[2:]).unbind(1) if self.export else y.chunk(2, 1))


class Listed(Base):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.sizes = [self.width, self.width]
        self.fast = True

    def forward(self, x):
        return self.tail(self.enter(x).chunk(2, 1) if self.fast else self.slow(x))

    def slow(self, x):
        return self.enter(x).split(self.sizes, 1)


class Shared(Flag):
    """The flag is the class's."""

    export = False

    def __init__(self, *sizes):
        super().__init__(*sizes)
        del self.export


class Nested(nn.Module):
    """Several of them, one in the other, and a head."""

    def __init__(self, kind, *sizes):
        super().__init__()
        self.first, self.head = kind(*sizes), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.first(x).relu())


WAYS = {Method: "forward_split", Prefixed: "export_forward", Narrowed: "forward_export", Flag: "export", Listed: "fast", Shared: "export"}


def otherwise(model):
    """The model by its other way."""
    for module in model.modules():
        for kind, name in WAYS.items():
            if type(module) is kind:
                if name in ("export", "fast"):
                    setattr(module, name, not getattr(module, name))
                else:
                    module.forward = getattr(module, name)
    with torch.no_grad():
        return model(X)


def built(kind, nested, *sizes):
    torch.manual_seed(0)
    model = Nested(kind, *sizes) if nested else kind(*sizes)
    return model.double().eval()


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.sampled_from(list(WAYS)), st.booleans(), st.integers(2, 20), st.integers(0, 3), st.sampled_from([0.25, 0.5, 0.75]))
def test_the_other_way_of_the_cut_model_computes_the_same(kind, nested, width, blocks, ratio):
    small, plan = graphprune.shrink(built(kind, nested, width, blocks), X, ratio, return_plan=True)
    with torch.no_grad():
        wanted = graphprune.zeroed(built(kind, nested, width, blocks), plan)(X)[0]
    torch.testing.assert_close(otherwise(small), wanted)


def switch_off(monkeypatch, *parts):
    """Without the ways, or without what follows sizes that no run read (most of these models need one of the two)."""
    if "ways" in parts:
        monkeypatch.setattr(tracing, "ways", lambda *_: ())
    if "unread" in parts:
        monkeypatch.setattr(widths, "unread_sizes", lambda *_: ({}, []))


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("off", [(), ("unread",)])
def test_nothing_less_goes(kind, off, monkeypatch):
    switch_off(monkeypatch, *off)
    small = graphprune.shrink(built(kind, True), X, 0.5)
    wanted = small(X)
    assert small.first.enter.out_channels == 12
    torch.testing.assert_close(otherwise(small), wanted)


@pytest.mark.parametrize("kind", WAYS)
def test_without_both_the_other_one_fails(kind, monkeypatch):
    switch_off(monkeypatch, "ways", "unread")
    stale = graphprune.shrink(built(kind, True), X, 0.5)
    wanted = stale(X)
    assert stale.first.enter.out_channels == 12
    with pytest.raises((RuntimeError, AssertionError)):
        torch.testing.assert_close(otherwise(stale), wanted)


@pytest.mark.parametrize("kind", [kind for kind in WAYS if kind is not Listed])  # no run reads its list: the ways alone know of that
def test_without_the_ways_sizes_that_no_run_read_follow_their_axes(kind, monkeypatch):
    switch_off(monkeypatch, "ways")
    small, plan = graphprune.shrink(built(kind, True), X, 0.5, return_plan=True)
    wanted = small(X)
    assert small.first.enter.out_channels == 12 and "follow their axes: first.width" in " ".join(plan.notes)
    torch.testing.assert_close(otherwise(small), wanted)


class Other(Base):
    """Methods that are no way of the run: other results, other arguments, an error, what may not be called."""

    calls = 0

    def forward_features(self, x):
        return self.enter(x).split((self.width, self.width), 1)[0]

    def forward_with(self, x, scale):
        return self.tail(self.enter(x).split((self.width, self.width), 1)) * scale

    def forward_broken(self, x):
        raise ValueError(self.width)

    def save(self, x):
        type(self).calls += self.width


class Built(Base):
    """A flag that says how the module was built, and is never turned."""

    def __init__(self, split=False):
        super().__init__()
        self.split = split

    def forward(self, x):
        y = self.enter(x)
        return self.tail(y.split((self.width, self.width), 1) if self.split else y.chunk(2, 1))


def test_what_is_no_way_of_the_run_asks_for_nothing():
    assert not graphprune.trace(Built().double().eval(), X).asked.others
    model = built(Other, False)
    assert not graphprune.trace(model, X).asked.others
    assert graphprune.shrink(model, X, 0.5).enter.out_channels == 12 and Other.calls == 0


def test_the_model_is_as_it_was():
    model = built(Listed, True)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    graphprune.trace(model, X)
    assert all(module.__dict__.keys() == before[name].keys() for name, module in model.named_modules())
    assert model.first.fast is True and "forward" not in model.first.__dict__


class Answers(nn.Module):
    """Answers for its configuration, as models of diffusers do, and raises what that raises."""

    def __init__(self):
        super().__init__()
        self.width, self.table = 8, {"get": 1}
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def __getattr__(self, name):
        return {}[name] if hasattr({}, name) else super().__getattr__(name)

    def forward(self, x):
        x = self.a(x)
        if self.table.get("other") is not None:
            x = x.reshape(-1, self.width)
        return self.c(self.b(x))


def test_a_class_that_raises_for_a_name_is_cut():
    small = graphprune.shrink(Answers(), torch.randn(3, 4), 0.5)
    assert small.a.out_features == 4 and small(torch.randn(5, 4)).shape == (5, 2)
