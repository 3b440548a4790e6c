"""For tests of asked times: a small network, and a table of timings that is neither another run's nor this machine's."""

import math

import pytest
import torch
from torch import nn

from graphprune.timing.table import Table

X = torch.zeros(2, 64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No timings of another run, and none of this machine: an operation takes as long as its tensors are large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Table, "_time", lambda table, node, shapes: 1e-7 + 1e-9 * sum(map(math.prod, shapes)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
