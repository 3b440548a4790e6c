"""Every rule obeys its law against torch, and planted wrong rules are caught."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune import check_rule
from graphprune.errors import BadRule
from graphprune.operations import operation
from graphprune.operations.notation import Value, parse

size = st.integers(2, 4)


def real(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def text(name, *args, **kwargs):
    swap = [Value(tuple(a.shape)) if isinstance(a, torch.Tensor) else a for a in args]
    found = operation(f"aten::{name}").rule(*swap, **kwargs)
    return found.text.split("->")[0] + "->" + found.text.split("->")[1].split(",")[0]


@settings(max_examples=20, deadline=None)
@given(size, size, size, size)
def test_products(a, b, c, d):
    check_rule(torch.mm, text("mm", real(a, b), real(b, c)), real(a, b), real(b, c))
    check_rule(torch.bmm, text("bmm", real(a, b, c), real(a, c, d)), real(a, b, c), real(a, c, d))
    check_rule(torch.addmm, text("addmm", real(c), real(a, b), real(b, c)), real(c), real(a, b), real(b, c))
    check_rule(torch.mv, text("mv", real(a, b), real(b)), real(a, b), real(b))
    check_rule(F.linear, text("linear", real(a, b), real(c, b), real(c)), real(a, b), real(c, b), real(c))


@settings(max_examples=20, deadline=None)
@given(size, size, st.integers(2, 3), st.booleans())
def test_convolutions(i, o, g, transposed):
    x = real(2, g * i, 5, 5)
    weight = real(g * i, o, 3, 3) if transposed else real(g * o, i, 3, 3)
    bias = real(g * o)
    line = text("convolution", x, weight, bias, [1, 1], [1, 1], [1, 1], transposed, [0, 0], g)
    op = F.conv_transpose2d if transposed else F.conv2d

    def cut(axis, count):
        return lambda x, w, b: op(x, w, b, padding=1, groups=count if axis == "g" else g)

    check_rule(lambda x, w, b: op(x, w, b, padding=1, groups=g), line, x, weight, bias, cut=cut, g=g)


@settings(max_examples=20, deadline=None)
@given(size, size, size)
def test_norms_and_reductions(a, b, c):
    x = real(a, b, c)
    check_rule(lambda x: x.sum(1), text("sum", x, [1]).replace("[b]", "b"), x)
    check_rule(lambda x: x.mean(1), text("mean", x, [1]), x)
    check_rule(lambda x: x.softmax(-1), text("_softmax", x, 2, False), x)
    check_rule(lambda x: F.avg_pool1d(x, 1), "a b _ -> a b _", x)
    stats = real(b), real(b), real(b), real(b).abs() + 1
    line = text("native_batch_norm", x, *stats, False, 0.1, 1e-5)
    check_rule(lambda x, w, bias, mean, var: F.batch_norm(x, mean, var, w, bias), line, x, *stats)
    line = text("native_group_norm", real(a, 2 * b, c), real(2 * b), real(2 * b), a, 2 * b, c, 2, 1e-5)
    assert [len(axes) for axes in parse(line)[0]] == [3, 1, 1]
    cut = lambda axis, n: lambda x, w, bias: F.group_norm(x, n if axis == "g" else 2, w, bias)  # noqa: E731
    check_rule(lambda x, w, bias: F.group_norm(x, 2, w, bias), line, real(a, 2 * b, c), real(2 * b), real(2 * b), cut=cut, g=2)


@pytest.mark.parametrize(
    ("function", "wrong", "shapes"),
    [
        (torch.mm, "i n, i o -> n o", [(3, 3), (3, 3)]),
        (torch.mm, "n i, i o -> o n", [(3, 3), (3, 3)]),
        (torch.bmm, "b i n, b i o -> b n o", [(2, 3, 3), (2, 3, 3)]),
        (lambda x: x.softmax(-1), "a b -> a b", [(3, 4)]),
        (lambda x: x.mean(1), "a b -> a", [(3, 4)]),
        (lambda x: x.exp().sum(1), "a b -> a", [(3, 4)]),
        (lambda x, w: F.conv2d(x, w, groups=2), "b (i g) _ _, (g o) i _ _ -> b (g o) _ _", [(1, 4, 3, 3), (4, 2, 1, 1)]),
        (lambda x: x.flip(0), "a b -> a b", [(3, 4)]),
        (lambda x: F.layer_norm(x, x.shape[1:]), "a b -> a b", [(3, 4)]),
    ],
)
def test_planted_wrong_rules_are_caught(function, wrong, shapes):
    torch.manual_seed(1)
    with pytest.raises(BadRule):
        for seed in range(5):
            check_rule(function, wrong, *(real(*shape) for shape in shapes), seed=seed)
