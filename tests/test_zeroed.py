"""What the oracle makes of a weight: zeros where entries are removed, the very entries elsewhere, for every shape, kind and order in memory."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.cutting.plan import Plan
from graphprune.cutting.zeroed import SMALL, without

KINDS = [torch.float32, torch.float64, torch.float16, torch.bool, torch.int64, torch.complex64]


def filled(shape, dtype, order):
    data = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
    data = data.remainder(97).add(1).to(dtype)
    if dtype.is_floating_point:
        data.view(-1)[:: max(1, data.numel() // 3)] = torch.inf
    if order == "turned":
        return data.transpose(0, -1).contiguous().transpose(0, -1)
    return data.to(memory_format=torch.channels_last) if order == "last" and data.ndim == 4 else data


def expected(data, cuts):
    wanted = data.clone()
    for axis, kept in cuts.items():
        for at in set(range(data.shape[axis])) - set(kept):
            wanted.select(axis, at).fill_(0)
    return wanted


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_removed_entries_are_zero_and_all_others_are_as_they_were(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    tensor = filled(shape, data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(["plain", "turned", "last"])))
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, max_size=len(shape)))
    cuts = {axis: sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1), min_size=1))) for axis in axes}
    before = tensor.clone()
    result = without(tensor, Plan({"w": cuts}, {"w": tuple(shape)}), "w", {})
    assert torch.equal(result, expected(tensor, cuts)) and result.dtype == tensor.dtype
    result.zero_()  # it is a copy
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("shape", [(64, 48, 3, 3), (200, 150), (200, 150, 1, 1), (120, 1, 15, 15)])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (1, 0)])
def test_large_weights(shape, axes):
    assert torch.Size(shape).numel() > SMALL
    cuts = {axis: list(range(0, shape[axis], 2)) for axis in axes}
    known = {}
    for tensor in (filled(shape, torch.float32, "plain"), filled(shape, torch.float32, "turned")):  # which share what is known of the positions
        assert torch.equal(without(tensor, Plan({"w": cuts}, {"w": shape}), "w", known), expected(tensor, cuts))
    for one, other in itertools.combinations([filled(shape, torch.float32, "plain"), *(expected(tensor, {0: [at]}) for at in (0, 1))], 2):
        assert not torch.equal(one, other)  # the control
