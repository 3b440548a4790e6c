"""Random numbers that a run draws: they are put back, as if it had not happened."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

RUNNING = threading.RLock()  # random numbers that a run draws are put back, for all threads: one at a time


@contextmanager
def same_dice(away: bool = False) -> Iterator[None]:
    """Random numbers drawn inside are not missed outside. ``away``: they begin after one that was drawn, so that no seed of the model's own gives the same."""
    state, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            if away:
                torch.rand(1, device="cpu")
            yield
    finally:
        random.setstate(state)
        np.random.set_state(arrays)
