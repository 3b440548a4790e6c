"""What surrounds a model's code: as it was after every run, whoever changed it between the runs of a request."""

import functools
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graphprune
from graphprune.tracing.surroundings import looked_for_once, undisturbed_surroundings

X = torch.linspace(-1, 1, 12).reshape(3, 4)
STORE, LIST, LATE, SPACE = {}, [], None, SimpleNamespace(inner={})


class Lazy(UserDict):
    """A mapping whose keys are no view."""

    def keys(self):
        yield from self.data


LAZY = Lazy()


@functools.lru_cache
def remembered(width):
    return torch.ones(width)


class Fills(nn.Linear):
    """Writes into one holder of each kind, and into what the holders hold."""

    calls, table = 0, {}

    def forward(self, x):
        result = super().forward(x)
        STORE.setdefault("inner", {}).setdefault("last", result)
        LIST.append(result)
        SPACE.inner["last"] = LAZY["last"] = result
        if LATE is not None:
            LATE.append(result)
        Fills.calls += 1
        Fills.table["last"] = result
        return result * remembered(result.shape[-1])


@pytest.fixture(autouse=True)
def clean():
    yield
    for holder in (STORE, LIST, LAZY, SPACE.inner, Fills.table):
        holder.clear()
    globals()["LATE"], Fills.calls = None, 0
    remembered.cache_clear()


def state():
    """What everything is, by identity."""
    inner = STORE.get("inner")
    held = [
        list(STORE.items()),
        list(inner.items()) if inner else inner,
        list(LIST),
        dict(LAZY.data),
        dict(SPACE.inner),
        list(LATE) if LATE is not None else None,
    ]
    return [*held, Fills.calls, dict(Fills.table), remembered.cache_info().currsize]


def same(one, other):
    return repr(one) == repr(other)


def net():
    torch.manual_seed(0)
    return nn.Sequential(Fills(4, 8), nn.ReLU(), nn.Linear(8, 2))


def more_in_a_store(_):
    STORE["inner"] = {"mine": X}


def more_in_a_class(_):
    Fills.table["mine"], Fills.calls = X, 7


def another_holder(_):
    globals()["LATE"] = [X]


def another_namespace(_):
    SPACE.inner = {"mine": X}


def a_hook_of_its_own(model):
    model[2].register_forward_hook(lambda *_: LIST.append(None))


BETWEEN = [more_in_a_store, more_in_a_class, another_holder, another_namespace, a_hook_of_its_own]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda change: change.__name__)
@pytest.mark.parametrize("nested", [False, True])
def test_every_run_of_a_request_leaves_things_as_they_were_before_it(between, nested):
    model = net()
    with looked_for_once():
        for change in (lambda _: None, between, lambda _: None):
            change(model)
            before = state()
            with undisturbed_surroundings(model):
                model(X)
                assert not same(state(), before)
                if nested:
                    middle = state()
                    with undisturbed_surroundings(model):
                        model(2 * X)
                    assert same(state(), middle)
            assert same(state(), before)
        before = state()
        model(X)  # the control
        assert not same(state(), before)


def test_things_are_looked_for_once_and_again_when_they_changed(monkeypatch):
    looks = []
    monkeypatch.setattr("graphprune.tracing.reachable.methods", lambda kind, real=graphprune.tracing.reachable.methods: looks.append(kind) or real(kind))
    model = net()

    def runs(change=lambda _: None):
        looks.clear()
        change(model)
        with undisturbed_surroundings(model):
            model(X)
        return len(looks)

    assert runs() == runs() > 0  # the control: outside of a request every run looks
    with looked_for_once():
        assert runs() > 0 and runs() == 0
        with looked_for_once():
            assert runs() == 0 and runs(another_holder) > 0
        assert runs() == 0
    assert runs() > 0


@pytest.mark.parametrize("options", [{}, {"verify": False}, {"params": 0.6}, {"what": "channel", "scope": "global"}])
def test_a_request_leaves_things_as_they_were(options):
    model, before = net(), state()
    small = graphprune.shrink(model, X, 0.5, **options)
    assert same(state(), before)
    assert torch.isfinite(small(X)).all() and torch.isfinite(model(X)).all()
    assert not same(state(), before)
