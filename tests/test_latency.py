"""A time that is asked for is met on a synthetic clock; nonsense and noise are refused; alignment is read off a staircase."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune.align import staircase
from graphprune.errors import BadMeasure, BadTarget
from graphprune.table import Table

X = torch.zeros(2, 64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No timings of another run, and none of this machine: an operation takes as long as its tensors are large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Table, "_time", lambda table, node, shapes: 1e-7 + 1e-9 * sum(map(math.prod, shapes)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))


def clock(model):
    """A machine with a constant overhead, which no table of operations knows."""
    return 1e-4 + 1e-9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scope", ["layer", "optimal"])
def test_the_asked_time_is_met_by_the_clock_that_counts(scope):
    model = net()
    small, plan = graphprune.shrink(model, X, speedup=1.5, measure=clock, scope=scope, threads=1, multiple_of=1, return_plan=True)
    assert clock(model) / clock(small) == pytest.approx(1.5, rel=0.02)
    assert "asked 1.5x faster" in plan.notes[-1] and "measured" in plan.notes[-1]


def test_what_cannot_be_reached_is_said_with_what_can():
    with pytest.raises(BadTarget, match="most that can be reached"):
        graphprune.shrink(net(), X, speedup=50, measure=clock, threads=1)


def test_nonsense_and_noise_are_refused():
    rng = np.random.default_rng(0)
    for measure in (lambda m: None, lambda m: -1.0, lambda m: float("nan")):
        with pytest.raises(BadMeasure, match="seconds of one call"):
            graphprune.shrink(net(), X, latency=0.5, measure=measure, threads=1)
    with pytest.raises(BadMeasure, match="scatters"):
        graphprune.shrink(net(), X, latency=0.5, measure=lambda m: float(rng.lognormal(0, 3)), threads=1)
    for wrong in ({"latency": 2.0}, {"latency": "12"}, {"speedup": 0.5}, {"speedup": 2, "latency": 0.5}, {"measure": clock}):
        with pytest.raises(BadTarget):
            graphprune.shrink(net(), X, **wrong)


def test_alignment_is_read_off_a_staircase():
    assert staircase(lambda width: -(-width // 16), 64) == 16
    assert staircase(lambda width: -(-width // 8), 64) == 8
    assert staircase(lambda width: width, 64) == 1
