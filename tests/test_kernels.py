"""Smaller kernels and thinner products compute what the masked convolution computes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.cutting.kernels import Thin, narrow, thin
from graphprune.cutting.parts import Part
from graphprune.granularity import positions

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw):
    """A convolution, an input it takes, and taps that stay along each axis of its kernel."""
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    odd = all(d * (k - 1) % 2 == 0 for k, d in zip(kernel, dilation, strict=True))  # torch warns for the others, and is right
    same = draw(st.booleans()) and set(stride) == {1} and odd
    padding = "same" if same else tuple(draw(st.integers(0, 3)) for _ in range(rank))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "circular", "replicate"]))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    conv = CONVS[rank](4, 8, kernel, stride, padding, dilation, groups, draw(st.booleans()), padding_mode=mode).double()
    size = [d * (k - 1) + draw(st.integers(4, 6)) for k, d in zip(kernel, dilation, strict=True)]
    kept = [draw(st.sampled_from(positions._even(k))) for k in kernel]
    return conv, torch.randn(2, 4, *size, dtype=torch.float64), kept


def masked_conv(conv, x, keep):
    """The reference: the same convolution with zeros in its weight."""
    return conv._conv_forward(x, conv.weight * keep, conv.bias)


def box_mask(conv, kept):
    keep = torch.zeros(conv.weight.shape)
    keep[(slice(None), slice(None), *torch.meshgrid(*map(torch.tensor, kept), indexing="ij"))] = 1
    return keep


@settings(max_examples=200, deadline=None)
@given(convolutions())
def test_a_smaller_kernel_equals_the_masked_one(drawn):
    conv, x, kept = drawn
    wanted = masked_conv(conv, x, box_mask(conv, kept))
    alone = masked_conv(conv, x[0], box_mask(conv, kept))
    narrow(conv, kept)
    assert tuple(conv.weight.shape[2:]) == tuple(map(len, kept)) == tuple(conv.kernel_size)
    assert conv(x).shape == wanted.shape
    assert (conv(x) - wanted).abs().max() < 1e-9
    assert (conv(x[0]) - alone).abs().max() < 1e-9


@settings(max_examples=50, deadline=None)
@given(convolutions())
def test_control_other_taps_differ(drawn):
    conv, x, kept = drawn
    axis = next((a for a, taps in enumerate(kept) if len(taps) < conv.kernel_size[a]), None)
    if axis is None or conv.padding_mode != "zeros":
        return
    free = next(t for t in range(conv.kernel_size[axis]) if t not in kept[axis])
    wrong = [*kept[:axis], (*kept[axis][:-1], free), *kept[axis + 1 :]]
    other = masked_conv(conv, x, box_mask(conv, wrong))
    narrow(conv, kept)
    assert (conv(x) - other).abs().max() > 1e-6


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_narrowing_twice_is_narrowing_once(drawn):
    conv, x, kept = drawn
    first = [tuple(range(len(taps))) for taps in kept]
    wanted = masked_conv(conv, x, box_mask(conv, [(taps[0],) for taps in kept]))
    narrow(conv, kept)
    narrow(conv, [taps[:1] for taps in first])
    assert (conv(x) - wanted).abs().max() < 1e-9


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_a_thinner_product_equals_the_masked_convolution(drawn, seed, ratio):
    conv, x, _ = drawn
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
        return
    columns = torch.rand(conv.weight.shape[1:], generator=torch.Generator().manual_seed(seed)) > ratio
    columns[0, 0, 0] = True
    wanted, lone = masked_conv(conv, x, columns), masked_conv(conv, x[0], columns)
    wrong = masked_conv(conv, x, columns.roll(1, 0))
    same = bool((columns.roll(1, 0) == columns).all())
    thin(conv, columns)
    assert isinstance(conv, Thin) and conv.weight.shape == (8, int(columns.sum()))
    assert (conv(x) - wanted).abs().max() < 1e-9
    assert (conv(x[0]) - lone).abs().max() < 1e-9
    assert same or (conv(x) - wrong).abs().max() > 1e-6  # the control: other channels


def test_symmetric_kernels_stay_stock_convolutions():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    narrow(conv, ((1,), (0, 1, 2)))
    assert type(conv) is nn.Conv2d and conv.padding == (0, 1)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    narrow(conv, ((0, 2), (1,)))
    assert type(conv) is nn.Conv2d and conv.dilation == (2, 1) and conv.padding == (1, 0)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    narrow(conv, ((0, 1), (0, 1, 2)))
    assert conv.pads == ((1, 0), (1, 1)) and isinstance(conv, nn.Conv2d)


def net(seed=0):
    torch.manual_seed(seed)
    return (
        nn.Sequential(nn.Conv2d(2, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(128, 3))
        .double()
        .eval()
    )


X = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.85])
def test_boxes_are_dense_exact_and_at_least_as_small_as_asked(ratio):
    model = net()
    small, plan = graphprune.shrink(model, X, ratio, granularity="group:box", return_plan=True)
    (zero,) = graphprune.zeroed(model, plan)(X)
    assert (small(X) - zero).abs().max() < 1e-12
    for index, taps in ((0, 25), (3, 9)):
        assert small[index].weight[0, 0].numel() <= taps - round(ratio * taps - 1e-9)
        assert small[index].weight.numel() == int(plan.masks(model)[f"{index}.weight"].sum())
    assert list(small.state_dict()) == list(model.state_dict())
    assert not any("mask" in name for name, _ in small.named_buffers())


def test_a_larger_ratio_never_leaves_a_larger_box():
    scores = torch.rand(5, 3)
    areas = [len(b[0]) * len(b[1]) for b in (positions.best_box(scores, r, "w") for r in (0.0, 0.2, 0.4, 0.6, 0.8, 0.93))]
    assert areas == sorted(areas, reverse=True) and areas[0] == 15 and areas[-1] == 1


def test_the_best_box_of_its_size_is_found():
    scores = torch.zeros(3, 3)
    scores[:, 1] = 1
    assert positions.best_box(scores, 2 / 3, "w") == ((0, 1, 2), (1,))


def test_groups_that_form_rows_become_a_smaller_kernel():
    model = net()
    with torch.no_grad():
        model[3].weight[:, :, 2] = 1e-3
    small, plan = graphprune.shrink(model, X, 1 / 3, granularity="group", keep="0", return_plan=True)
    assert small[3].kernel_size == (2, 3) and "dense kernel of 2 x 3" in plan.explain()
    assert (small(X) - graphprune.zeroed(model, plan)(X)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("faster", [True, False])
def test_the_product_is_used_only_where_the_clock_says_so(faster, monkeypatch):
    monkeypatch.setattr(positions, "times", lambda *_: (2.0, 1.0) if faster else (1.0, 2.0))
    model = net()
    small, plan = graphprune.shrink(model, X, 0.5, granularity="group", return_plan=True)
    kinds = {part.name: part.kind for part in plan.parts}
    assert kinds == {"0.weight": "columns" if faster else "mask", "3.weight": "mask"}
    assert isinstance(small[0], Thin) == faster
    assert (small(X) - graphprune.zeroed(model, plan)(X)[0]).abs().max() < 1e-12
    assert int(plan.masks(model)["0.weight"][0].sum()) == 25 and "will not run the model faster" in plan.explain()
    wide = graphprune.expand(small)
    assert all(torch.equal(wide[name], tensor * plan.masks(model)[name]) for name, tensor in model.state_dict().items())


def test_a_thinner_layer_trains_saves_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "times", lambda *_: (2.0, 1.0))
    for granularity in ("group", "group:box"):
        small = graphprune.shrink(net(), X, 0.5, granularity=granularity)
        optimizer = torch.optim.SGD(small.parameters(), 0.1)
        small(X).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())
        optimizer.step()
        graphprune.save(small, tmp_path / granularity[:6])
        again = graphprune.load(tmp_path / granularity[:6], net(seed=5))
        assert torch.equal(again(X), small(X))
        cut = graphprune.shrink(small, X, 0.5)  # channels of what has smaller kernels
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in small.parameters())


def test_times_measures_what_it_says():
    conv = nn.Conv2d(4, 4, 3)
    columns = torch.rand(4, 3, 3) > 0.5
    from graphprune.cutting.parts import pack

    before, after = positions.times(conv, Part("columns", "x.conv.weight", pack(columns)), (1, 4, 8, 8), seconds=0.01)
    assert before > 0 and after > 0 and type(conv) is nn.Conv2d and F.conv2d is not None
