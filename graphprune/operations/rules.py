"""One line for each operation that computes: see ``notation.py`` for the text, ``moves.py`` for what only moves.

A rule takes the call's own arguments (tensors are :class:`~graphprune.notation.Value`) and returns an ``expr``. An
operation without a rule locks the labels of its operands, and only those. :func:`rule` is public: describe your own.

>>> RULES["mm"](Value((2, 3)), Value((3, 4))).text
'n i, i o -> n o'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .notation import Expr, Value, expr

RULES: dict[str, Callable[..., Expr]] = {}


def rule(*names: str) -> Callable:
    """Describe the ATen operation ``names``: a function of its arguments that returns ``expr(text, *tensors)``."""

    def register(function: Callable[..., Expr]) -> Callable[..., Expr]:
        for name in names:
            RULES[name] = function
        return function

    return register


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pointwise(values: Sequence[Value], ranks: Sequence[int]) -> Expr:
    """All tensors of a pointwise call, aligned on the right as broadcasting does."""
    return Expr(_aligned(tuple([len(v.shape) for v in values]), tuple(ranks)), tuple(values))


@cache
def _aligned(given: tuple[int, ...], ranks: tuple[int, ...]) -> str:
    top = max(ranks)
    left, right = (",".join([" ".join(LETTERS[top - rank : top]) for rank in side]) for side in (given, ranks))
    return f"{left}->{right}"


def _dims(dim: Any, rank: int) -> set[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return set(range(rank))
    return {d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim)}


def _reduced(x: Value, dim: Any, keepdim: bool, outs: int = 1) -> Expr:
    over = _dims(dim, len(x.shape))
    left = [f"[{LETTERS[i]}]" if i in over else LETTERS[i] for i in range(len(x.shape))]
    right = [("1" if i in over else LETTERS[i]) for i in range(len(x.shape)) if keepdim or i not in over]
    return expr(" ".join(left) + "->" + ",".join([" ".join(right)] * outs), x)


@rule("mean", "sum", "amax", "amin", "prod", "any", "all", "logsumexp", "std", "var", "nansum", "max", "min")
def reduction(x, dim=None, keepdim=False, **kwargs):
    if isinstance(dim, Value):
        return pointwise([x, dim], [max(len(x.shape), len(dim.shape))])
    return _reduced(x, dim, bool(keepdim), outs=2)


@rule("var_mean", "std_mean")
def var_mean(x, dim=None, *, correction=None, keepdim=False):
    return _reduced(x, dim, keepdim, outs=2)


@rule("linalg_vector_norm", "norm")
def vector_norm(x, ord=2, dim=None, keepdim=False, **kwargs):
    return _reduced(x, dim, keepdim)


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(x, dim, *args, **kwargs):
    axes = [LETTERS[i] for i in range(len(x.shape))]
    axes[dim] = f"[{axes[dim]}]"
    return expr(" ".join(axes) + "->" + " ".join(axes), x)


@rule("mm")
def mm(x, y):
    return expr("n i, i o -> n o", x, y)


@rule("bmm")
def bmm(x, y):
    return expr("b n i, b i o -> b n o", x, y)


@rule("_grouped_mm", "_scaled_grouped_mm")
def grouped_mm(x, y, offsets=None, bias=None, *args, offs=None, **kwargs):
    # Rows (or columns) of one operand belong to the experts in turn, as the offsets say: they stay.
    offsets = offs if offsets is None else offsets
    if bias is not None or offsets is None:
        return bmm(x, y)
    left, right = {(2, 3): ("_ i, _ i o", "_ o"), (3, 2): ("_ n i, i _", "n _"), (2, 2): ("n _, _ o", "_ n o")}[len(x.shape), len(y.shape)]
    return expr(f"{left}, _ -> {right}", x, y, offsets)


@rule("mv")
def mv(x, y):
    return expr("n i, i -> n", x, y)


@rule("dot", "vdot")
def dot(x, y):
    return expr("i, i -> ", x, y)


@rule("addmm")
def addmm(bias, x, y, **kwargs):
    return expr(f"{' '.join('no'[-len(bias.shape) :])}, n i, i o -> n o", bias, x, y)


@rule("baddbmm")
def baddbmm(bias, x, y, **kwargs):
    return expr(f"{' '.join('bno'[-len(bias.shape) :])}, b n i, b i o -> b n o", bias, x, y)


@rule("_trilinear")
def trilinear(x, y, z, expand1, expand2, expand3, sumdim, unroll_dim=1):
    every = LETTERS[: len(x.shape) + len(expand1)]
    axes = [" ".join(a for i, a in enumerate(every) if i not in expanded) for expanded in (expand1, expand2, expand3, sumdim)]
    return expr(f"{', '.join(axes[:3])} -> {axes[3]}", x, y, z)


@rule("linear")
def linear(x, weight, bias=None):
    lead = " ".join(LETTERS[: len(x.shape) - 1])
    return expr(f"{lead} y, z y, z -> {lead} z", x, weight, bias)


@rule("convolution")
def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    return Expr(_convolution(len(x.shape) - 2, bool(transposed)), (x, weight, bias), {"g": groups})


@cache
def _convolution(rank: int, transposed: bool) -> str:
    space = " _" * rank
    kernel = f"(g i) o{space}" if transposed else f"(g o) i{space}"
    return f"b (g i){space}, {kernel}, (g o) -> b (g o){space}"


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(x, weight, bias, *rest):
    stats = [v for v in rest if isinstance(v, Value)]
    training = any([v is True for v in rest]) or len(stats) < 2
    mean, var = stats if len(stats) == 2 else (None, None)
    return Expr(_batch_norm(len(x.shape), training), (x, weight, bias, mean, var))


@cache
def _batch_norm(rank: int, training: bool) -> str:
    wrap = "[%s]" if training else "%s"
    axes = " ".join([wrap % LETTERS[i] if i != 1 else "b" for i in range(rank)])
    return f"{axes}, b, b, b, b -> {axes}"


@rule("native_layer_norm")
def layer_norm(x, shape, weight, bias, eps):
    lead, last = LETTERS[: len(x.shape) - len(shape)], LETTERS[len(x.shape) - len(shape) : len(x.shape)]
    mixed = [f"[{axis}]" for axis in last]
    own = " ".join(last)
    return expr(f"{' '.join([*lead, *mixed])}, {own}, {own} -> {' '.join([*lead, *mixed])}", x, weight, bias)


@rule("_fused_rms_norm")
def rms_norm(x, shape, weight, eps):
    return layer_norm(x, shape, weight, None, eps)


@rule("native_group_norm")
def group_norm(x, weight, bias, n, c, hxw, groups, eps):
    space = "".join(f" [{LETTERS[i + 10]}]" for i in range(len(x.shape) - 2))
    return expr(f"b (g [c]){space}, (g c), (g c) -> b (g [c]){space}", x, weight, bias, g=groups)


@rule("embedding")
def embedding(weight, index, *args, **kwargs):
    lead = " _" * len(index.shape)
    return expr(f"_ e,{lead} -> {lead} e", weight, index)


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
      "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
      "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d", "reflection_pad2d",
      "replication_pad2d", "reflection_pad3d", "replication_pad3d", "avg_pool1d", "adaptive_avg_pool1d",
      "max_pool2d", "mkldnn_adaptive_avg_pool2d", "adaptive_avg_pool2d")  # fmt: skip
def pooling(x, *args, **kwargs):
    space = {2: 1, 3: 1, 4: 2, 5: 3}[len(x.shape)]
    lead = " ".join(LETTERS[: len(x.shape) - space])
    axes = lead + " _" * space
    return expr(f"{axes} -> {axes}, {axes}", x)


@rule("im2col")
def unfold(x, kernel, *args):
    return expr("b c _ _ -> b (c _k) _", x, _k=kernel[0] * kernel[1])


@rule("col2im")
def fold(x, size, kernel, *args):
    return expr("b (c _k) _ -> b c _ _", x, _k=kernel[0] * kernel[1])


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fft(x, dim, *args):
    over = _dims(dim, len(x.shape))
    axes = " ".join("_" if i in over else LETTERS[i] for i in range(len(x.shape)))
    return expr(f"{axes} -> {axes}", x)


@rule("view_as_complex")
def view_as_complex(x):
    axes = " ".join(LETTERS[: len(x.shape) - 1])
    return expr(f"{axes} _ -> {axes}", x)


@rule("view_as_real")
def view_as_real(x):
    axes = " ".join(LETTERS[: len(x.shape)])
    return expr(f"{axes} -> {axes} _", x)


@rule("reflection_pad1d", "replication_pad1d")
def pad1d(x, *args):
    lead = " ".join(LETTERS[: len(x.shape) - 1])
    return expr(f"{lead} _ -> {lead} _", x)


@rule("grid_sampler_2d")
def grid_sample(x, grid, *args):
    return expr("b c _ _, b _ _ _ -> b c _ _", x, grid)


@rule("_weight_norm_interface")
def weight_norm(v, g, dim=0):
    # dim == -1 is torch's word for one norm over everything.
    axes = [LETTERS[i] if i == dim else f"[{LETTERS[i]}]" for i in range(len(v.shape))]
    scale = " ".join(LETTERS[i] if i == dim else "1" for i in range(len(g.shape)))
    return expr(f"{' '.join(axes)}, {scale} -> {' '.join(axes)}, {scale}", v, g)


@rule("gather")
def gather(x, dim, index, **kwargs):
    axes = ["_" if i == dim % len(x.shape) else LETTERS[i] for i in range(len(x.shape))]
    return expr(f"{' '.join(axes)}, {' '.join(axes)} -> {' '.join(axes)}", x, index)


@rule("index_select")
def index_select(x, dim, index):
    axes = ["_" if i == dim % len(x.shape) else LETTERS[i] for i in range(len(x.shape))]
    return expr(f"{' '.join(axes)}, _ -> {' '.join(axes)}", x, index)


@rule("index")
def index(x, indices):
    given = [i for i, v in enumerate(indices) if isinstance(v, Value)]
    axes = ["_" if i in given else LETTERS[i] for i in range(len(x.shape))]
    rank = max(len(indices[i].shape) for i in given)
    together = given == list(range(given[0], given[-1] + 1))
    rest = [a for i, a in enumerate(axes) if i not in given]
    at = given[0] if together else 0
    out = rest[:at] + ["_"] * rank + rest[at:]
    picked = [indices[i] for i in given]
    fixed = "".join("," + " _" * len(v.shape) for v in picked)
    return expr(f"{' '.join(axes)}{fixed} -> {' '.join(out)}", x, *picked)


@rule("cumsum", "cumprod", "sort", "argsort", "cummax")
def along(x, dim=-1, *args, **kwargs):
    dim = args[0] if args and isinstance(args[0], int) and not isinstance(args[0], bool) else dim
    dim = kwargs.get("dim", dim) if isinstance(kwargs.get("dim", dim), int) else -1
    axes = " ".join("_" if i == dim % len(x.shape) else LETTERS[i] for i in range(len(x.shape)))
    return expr(f"{axes} -> {axes}, {axes}", x)


@rule("topk")
def topk(x, k, dim=-1, *args, **kwargs):
    return along(x, dim=dim)


@rule("tril", "triu")
def triangle(x, *args):
    lead = " ".join(LETTERS[: len(x.shape) - 2])
    return expr(f"{lead} _ _ -> {lead} _ _", x)
