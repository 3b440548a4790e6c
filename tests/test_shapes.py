"""Shapes without values: for every operation that has its own shape function, it and torch must agree on shapes, strides and types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.operations import OPERATIONS
from graphprune.operations.shapes import new, same

META = torch.device("meta")
SHAPES = {f"{name.replace('::', '.')}.{overload}": shape for name, op in OPERATIONS.items() for overload, shape in op.shapes.items()}


def empty(*size, **kwargs):
    return torch.empty(size, device=META, **kwargs)


def laid(size):
    """Tensors of one shape that lie in memory in different ways: in order, transposed, channels last, with gaps, with one entry repeated."""
    yield empty(*size)
    yield empty(*size[::-1]).permute(*reversed(range(len(size))))
    if len(size) == 4:
        yield empty(*size).to(memory_format=torch.channels_last)
        yield empty(size[0], size[2], size[3], size[1]).permute(0, 3, 1, 2)
    yield empty(*size[:-1], size[-1] + 2)[..., 1:-1]
    yield empty(*size[:-1], size[-1] + 2).transpose(0, 1)[..., 1:-1].transpose(0, 1)
    yield empty(1, *size[1:]).expand(size)
    yield empty(*size[:-2], sum(size[-2:]) - 1).unfold(-1, size[-1], 1)  # windows that share entries


def some(*sizes):
    return [x for size in sizes for x in laid(size)]


def shared(x):
    """Whether entries share memory: nothing can be written there."""
    own = [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]
    return 0 in own or len(set(own)) < len(own)


C = empty(6)
POINTWISE = [(x,) for x in some((2, 6, 5, 4), (1, 6, 4), (3, 6))]
OTHERS = [empty(6, 1, 1), empty(1, 6, 1, 1), empty(4), empty(5, 1), empty(6, 5, 4), empty(1, 1, 1, 1), empty(2, 6, 5, 4), empty(2, 6, 1, 1), empty(4, 5).t()]
PAIRS = [(x, y) for x in some((2, 6, 5, 4), (1, 6, 5, 4)) for y in OTHERS] + [(y, x) for x in laid((2, 6, 5, 4)) for y in OTHERS]
CASES = {
    "pow.Tensor_Scalar": [(x, 2) for (x,) in POINTWISE],
    "convolution.default": [(x, empty(8, 3, 3, 2), bias, [2, 1], [1, 0], [1, 2], False, [0, 0], 2) for x in laid((2, 6, 9, 7)) for bias in (None, empty(8))],
    "addmm.default": [(empty(5), empty(3, 4), empty(4, 5)), (empty(1), empty(3, 4), empty(5, 4).t()), (empty(3, 5), empty(3, 4), empty(4, 5))],
    "mm.default": [(empty(3, 4), empty(4, 5)), (empty(4, 3).t(), empty(5, 4).t())],
    "bmm.default": [(empty(2, 3, 4), empty(2, 4, 5)), (empty(2, 4, 3).transpose(1, 2), empty(2, 5, 4).transpose(1, 2))],
    "native_batch_norm.default": [(x, C, C, C, C, mode, 0.1, 1e-5) for x in laid((2, 6, 5, 4)) for mode in (True, False)]
    + [
        (empty(1, 6), None, None, C, C, False, 0.1, 1e-5),
        (empty(3, 6), None, None, C, C, True, 0.1, 1e-5),
        (empty(2, 6, 5, dtype=torch.float16), C, C, C, C, True, 0.1, 1e-5),
    ],
    "_native_batch_norm_legit_no_training.default": [(x, C, C, C, C, 0.1, 1e-5) for x in laid((2, 6, 5, 4))],
    "native_layer_norm.default": [(x, [4], empty(4), empty(4), 1e-5) for x in laid((2, 6, 5, 4))]
    + [(x, [5, 4], None, None, 1e-5) for x in laid((2, 6, 5, 4))]
    + [(empty(2, 4, dtype=torch.bfloat16), [4], None, None, 1e-5)],
    "native_group_norm.default": [(x, C, C, 2, 6, 20, 3, 1e-5) for x in laid((2, 6, 5, 4))],
    "_softmax.default": [(x, 1, False) for x in laid((2, 6, 4))],
    "_log_softmax.default": [(x, -1, False) for x in laid((2, 6, 4))],
    "_safe_softmax.default": [(x, -1) for x in laid((2, 6, 4))],
    "mean.dim": [(x, dim, keep) for x in laid((2, 6, 5, 4)) for dim in ([2, 3], [-1], [1]) for keep in (True, False)],
    "cat.default": [([empty(2, 3, 4), empty(2, 5, 4)], 1), ([empty(2, 3), empty(2, 1)], -1), ([empty(4, 2).t(), empty(2, 3)], 1)],
    "max_pool2d_with_indices.default": [
        (x, [3, 3], stride, [1, 1], [1, 1], ceil) for x in laid((2, 6, 8, 7)) for stride in ([2, 2], [3, 2], []) for ceil in (False, True)
    ],
    "avg_pool2d.default": [(x, [3, 2], [2, 2], [1, 0], ceil) for x in laid((2, 6, 8, 7)) for ceil in (False, True)],
    "_adaptive_avg_pool2d.default": [(x, [2, 3]) for x in laid((2, 6, 8, 7))],
    "_unsafe_view.default": [(empty(2, 6, 4), [12, 4]), (empty(2, 6, 4), [2, -1])],
    "embedding.default": [(empty(7, 4), torch.empty(2, 3, dtype=torch.long, device=META))],
}
for _name in ("sum.dim_IntList", "amax.default", "amin.default"):
    CASES[_name] = CASES["mean.dim"]
for _name in ("add", "sub", "mul", "div"):
    CASES[f"{_name}.Tensor"] = PAIRS
    CASES[f"{_name}.Scalar"] = [(x, 0.5) for (x,) in POINTWISE]
    CASES[f"{_name}_.Tensor"] = [(x, empty(2, 6, 5, 4)) for x in list(laid((2, 6, 5, 4)))[:-2]]
CASES["rsub.Scalar"] = CASES["add.Scalar"]


def call(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def told(result):
    """Shape, type, and the strides of the axes that have any."""
    found = [result] if isinstance(result, torch.Tensor) else list(result)
    return [(t.shape, t.dtype, tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)) for t in found]


def differs(name, function, args):
    """Whether the function answers, and answers otherwise than torch does; results of evaluation that nobody reads are left out."""
    mine = function(*args)
    if mine is None:
        return False
    theirs = call(name)(*args)
    mine, theirs = told(mine), told(theirs)
    return mine[:1] != theirs[:1] if "batch_norm" in name and (len(args) < 8 or not args[5]) else mine != theirs


@pytest.mark.parametrize("name", sorted(name.removeprefix("aten.") for name in SHAPES))
def test_torch_says_the_same(name):
    cases = CASES.get(name, POINTWISE if not name.endswith("_.default") else [case for case in POINTWISE if not shared(case[0])])
    answered = 0
    for args in cases:
        assert not differs(name, SHAPES[f"aten.{name}"], args), [told(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        answered += SHAPES[f"aten.{name}"](*args) is not None
    assert answered  # and not all is left to torch


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("mul.Tensor", lambda x, y: new(x, torch.broadcast_shapes(x.shape, y.shape))),  # always in order
        ("native_layer_norm.default", lambda x, *rest: (same(x), *SHAPES["aten.native_layer_norm.default"](x, *rest)[1:])),
        ("max_pool2d_with_indices.default", lambda x, *rest: SHAPES["aten.max_pool2d_with_indices.default"](x, *rest[:-1], False)),
        (
            "native_batch_norm.default",
            lambda x, *rest: (new(x, x.shape), *(SHAPES["aten.native_batch_norm.default"](x, *rest) or call("native_batch_norm.default")(x, *rest))[1:]),
        ),
    ],
)
def test_a_wrong_shape_is_caught(name, wrong):
    assert any(differs(name, wrong, args) for args in CASES[name])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_windows(size, kernel, stride, padding, dilation, ceil):
    args = (empty(1, 2, size, size + 1), [kernel] * 2, [stride] * 2, [min(padding, kernel // 2)] * 2, [dilation] * 2, ceil)
    try:
        call("max_pool2d_with_indices.default")(*args)
    except RuntimeError:  # no window fits
        return
    assert not differs("max_pool2d_with_indices.default", SHAPES["aten.max_pool2d_with_indices.default"], args)
