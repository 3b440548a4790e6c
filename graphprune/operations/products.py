"""Matrix products and convolutions. What is multiplied, how often, and which operand is the weight stands in the text (:mod:`.contraction`)."""

from __future__ import annotations

from functools import cache

from .notation import Expr, Value, expr
from .record import LETTERS, Onnx, computes, describe


def _matmul(bias, x, weight, **kwargs) -> Onnx:
    return Onnx("MatMul", (x,), [weight], {})


@computes("mm", onnx=lambda x, y: Onnx("MatMul", (x,), [y], {}))
def mm(x, y):
    return expr("n i, i o -> n o", x, y)


@computes("bmm", onnx=lambda x, y: Onnx("MatMul", (x, y), [], {}))
def bmm(x, y):
    return expr("b n i, b i o -> b n o", x, y)


@computes("mv")
def mv(x, y):
    return expr("n i, i -> n", x, y)


@computes("dot", "vdot")
def dot(x, y):
    return expr("i, i -> ", x, y)


def _added(bias: Value, axes: str) -> str:
    """The axes of what is added to a product, which may have fewer."""
    return " ".join(axes[len(axes) - len(bias.shape) :])


@computes("addmm", onnx=_matmul)
def addmm(bias, x, y, **kwargs):
    return expr(f"{_added(bias, 'no')}, n i, i o -> n o", bias, x, y)


@computes("baddbmm", onnx=lambda bias, x, y, **kwargs: Onnx("MatMul", (x, y), [], {}))
def baddbmm(bias, x, y, **kwargs):
    return expr(f"{_added(bias, 'bno')}, b n i, b i o -> b n o", bias, x, y)


@computes("addbmm")
def addbmm(bias, x, y, **kwargs):
    return expr(f"{_added(bias, 'no')}, b n i, b i o -> n o", bias, x, y)


@computes("addmv")
def addmv(bias, x, y, **kwargs):
    return expr(f"{_added(bias, 'n')}, n i, i -> n", bias, x, y)


@computes("addr", products=lambda bias, x, y, **kwargs: [])
def addr(bias, x, y, **kwargs):
    return expr(f"{_added(bias, 'no')}, n, o -> n o", bias, x, y)


@computes("linear")
def linear(x, weight, bias=None):
    lead = " ".join(LETTERS[: len(x.shape) - 1])
    return expr(f"{lead} y, z y, z -> {lead} z", x, weight, bias)


@computes("_trilinear")
def trilinear(x, y, z, expand1, expand2, expand3, sumdim, unroll_dim=1):
    every = LETTERS[: len(x.shape) + len(expand1)]
    axes = [" ".join(a for i, a in enumerate(every) if i not in expanded) for expanded in (expand1, expand2, expand3, sumdim)]
    return expr(f"{', '.join(axes[:3])} -> {axes[3]}", x, y, z)


def _multiplied(x, y, offsets=None, bias=None, *args, offs=None, **kwargs):
    """Every row is multiplied once, with the matrix of one expert."""
    offsets = offs if offsets is None else offsets
    if bias is not None or offsets is None:
        return [bmm(x, y)]
    left, right = {(2, 3): ("_t i, _ i o", "_t o"), (3, 2): ("_ n i, i _t", "n _t"), (2, 2): ("n _t, _t o", "_ n o")}[len(x.shape), len(y.shape)]
    return [expr(f"{left}, _ -> {right}", x, y, offsets)]


@computes("_grouped_mm", "_scaled_grouped_mm", aligned=True, products=_multiplied)
def grouped_mm(x, y, offsets=None, bias=None, *args, offs=None, **kwargs):
    # Rows of the first operand belong to the experts in turn, as the offsets say: an expert goes with its offset, if that counts none.
    offsets = offs if offsets is None else offsets
    if bias is not None or offsets is None or (len(x.shape), len(y.shape)) != (2, 3):
        return _multiplied(x, y, offsets, bias)[0]
    return expr("_t i, e i o, e -> _t o", x, y, offsets)


def _conv(x, weight, bias, stride, padding, dilation, transposed, extra, groups) -> Onnx:
    facts = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups, "kernel_shape": list(weight.shape[2:])}
    facts |= {"output_padding": extra} if transposed else {}
    return Onnx("ConvTranspose" if transposed else "Conv", (x,), [weight] if bias is None else [weight, bias], facts)


@computes("convolution", weight="weight", layer=True, onnx=_conv)
def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    return Expr(_convolution(len(x.shape) - 2, bool(transposed)), (x, weight, bias), {"g": groups})


@cache
def _convolution(rank: int, transposed: bool) -> str:
    # Positions that are multiplied once for each tap of the kernel have names: those of the result, or where the kernel is spread out, of the input.
    places, taps = ("".join(f" _{letter}{axis}" for axis in range(rank)) for letter in "pt")
    free = " _" * rank
    if transposed:
        return f"b (g i){places}, (g i) o{taps}, (g o) -> b (g o){free}"
    return f"b (g i){free}, (g o) i{taps}, (g o) -> b (g o){places}"


@computes("conv_tbc", weight="weight")
def conv_tbc(x, weight, bias, pad=0):
    return expr("_ b i, _t i o, o -> _p b o", x, weight, bias)


@computes("torchvision::deform_conv2d", weight="weight")
def deform_conv(x, weight, offset, mask, bias, sh, sw, ph, pw, dh, dw, groups, offset_groups, use_mask):
    """Each tap of the kernel reads somewhere else; with several groups of offsets the channels of each stay where they are."""
    if offset_groups == 1:
        return expr("b (g i) _ _, (g o) i _t _u, b _ _ _, b _ _ _, (g o) -> b (g o) _p _q", x, weight, offset, mask if use_mask else None, bias, g=groups)
    return expr("b _i _ _, (g o) _i _t _u, b _ _ _, b _ _ _, (g o) -> b (g o) _p _q", x, weight, offset, mask if use_mask else None, bias, g=groups)


describe("dot", "vdot", "mv", "mm", "bmm", planned=True)
