"""Every operation that is described (rules, moves, assembling, pointwise) obeys its law against torch.

One without an example here fails, and wrong descriptions are caught.

Rules: :func:`graphprune.check_rule`. Moves and assembling: what the operation does to a tensor *of labels* must be what is said of the labels.
"""

import re

import numpy as np
import pytest
import torch

from graphprune import check_rule
from graphprune.errors import BadRule
from graphprune.operations import OPERATIONS
from graphprune.operations.labels import Labels
from graphprune.operations.notation import Value, parse
from graphprune.operations.record import pointwise
from graphprune.tracing.picks import pick
from graphprune.tracing.trees import replace, tensors

aten = torch.ops.aten
ATEN = {op.short: op for op in OPERATIONS.values() if op.name.startswith("aten::") and not op.strict}
RULES, MOVES, ASSEMBLE = ({name: getattr(op, kind) for name, op in ATEN.items() if getattr(op, kind)} for kind in ("rule", "move", "assemble"))
UNTAGGED = {name for name, op in ATEN.items() if op.pointwise}


def real(*shape):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.rand(*shape, dtype=torch.float64, generator=generator) + 0.1


A, B, X3, X4, X5 = real(3), real(4), real(3, 4, 5), real(2, 4, 6, 6), real(2, 4, 4, 6, 6)
HEADS = (real(2, 3, 5, 4), real(2, 3, 6, 4), real(2, 3, 6, 4) * 2)
STATS = (real(4), real(4), real(4), real(4))
ROWS, ENDS = real(6, 8).float(), torch.tensor([2, 6], dtype=torch.int32)
POOL = {"max_pool2d_with_indices": (X4, [2, 2]), "max_pool3d_with_indices": (X5, [2, 2, 2]), "avg_pool2d": (X4, [2, 2]), "avg_pool3d": (X5, [2, 2, 2]),
        "_adaptive_avg_pool2d": (X4, [2, 3]), "_adaptive_avg_pool3d": (X5, [2, 2, 3]), "adaptive_max_pool2d": (X4, [2, 3]),
        "adaptive_max_pool3d": (X5, [2, 2, 3]), "upsample_nearest1d": (X3, [8]), "upsample_nearest2d": (X4, [8, 9]), "upsample_nearest3d": (X5, [5, 8, 9]),
        "upsample_bilinear2d": (X4, [8, 9], False), "upsample_bicubic2d": (X4, [8, 9], False), "upsample_linear1d": (X3, [8], False),
        "upsample_trilinear3d": (X5, [5, 8, 9], False), "_upsample_bicubic2d_aa": (X4, [3, 3], False), "_upsample_bilinear2d_aa": (X4, [3, 3], False),
        "_upsample_nearest_exact2d": (X4, [8, 9]), "reflection_pad2d": (X4, [1, 2, 1, 1]), "replication_pad2d": (X4, [1, 2, 1, 1]),
        "reflection_pad3d": (X5, [1, 2, 1, 1, 1, 1]), "replication_pad3d": (X5, [1, 2, 1, 1, 1, 1]), "avg_pool1d": (X3, [2]),
        "adaptive_avg_pool1d": (X3, [2]), "max_pool2d": (X4, [2, 2]), "adaptive_avg_pool2d": (X4, [2, 3])}  # fmt: skip
TWO_OF, HALF, TARGETS, MATRIX = torch.tensor([2, 0]), X3 > 0.5, torch.tensor([1, 0, 3]), real(2, 3, 3) + 3 * torch.eye(3)
WITHIN = torch.tensor([[[1, 0, 2, 1, 0]] * 4, [[0, 2, 1, 0, 2]] * 4])
UNPOOL = aten.max_pool2d_with_indices(X4, [2, 2])
LEVELS = (torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32))
ONE = (torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32))
# Operations that leave channels alone, and some that keep more than they would have to.
SPARING = {
    "glu": (real(3, 4, 6), 2), **{name: (X3, 1) for name in ("logcumsumexp", "cummin", "median", "nanmedian", "mode", "argmax", "argmin")},
    "kthvalue": (X3, 2, 1),
    "aminmax": (X3,), "renorm": (X3, 2.0, 1, 0.5), "_cdist_forward": (X3, real(3, 6, 5), 2.0, None), "_euclidean_dist": (X3, real(3, 6, 5)),
    "_pdist_forward": (real(4, 3), 2.0), "dist": (X3, X3 * 2, 2.0), "scatter": (X3, 0, WITHIN, X3[:2]),
    "scatter_add": (X3, 0, WITHIN, X3[:2]), "scatter_reduce": (X3, 0, WITHIN, X3[:2], "amax"), "index_add": (X3, 1, TWO_OF, X3[:, :2]),
    "index_copy": (X3, 1, TWO_OF, X3[:, :2]), "index_reduce": (X3, 1, TWO_OF, X3[:, :2], "amax"), "index_fill": (X3, 1, TWO_OF, 2.0),
    "index_put": (X3, [HALF], torch.tensor(0.5).double()), "_unsafe_index_put": (X3, [None, TWO_OF], real(2, 5)),
    "_index_put_impl": (X3, [TWO_OF], real(2, 4, 1)), "select_scatter": (X3, real(3, 5), 1, 2), "slice_scatter": (X3, real(3, 2, 5), 1, 1, 3),
    "_embedding_bag": (real(7, 4), torch.tensor([1, 6, 2]), torch.tensor([0, 2])), "embedding_renorm": (real(7, 4), torch.tensor([1, 6]), 0.5, 2.0),
    "_embedding_bag_forward_only": (real(7, 4), torch.tensor([1, 6, 2]), torch.tensor([0, 2])), "unfold": (X3, 1, 2, 1), "diagonal": (X3, 0, 0, 2),
    "diag_embed": (X3, 0, 0, 2), "bucketize": (X3, torch.tensor([0.3, 0.6]).double()), "searchsorted": (torch.tensor([0.3, 0.6]).double(), X3),
    "isin": (X3, A), "grid_sampler_3d": (X5, real(2, 3, 3, 3, 3), 0, 0, False), "affine_grid_generator": (real(2, 2, 3), [2, 4, 5, 6], False),
    "_upsample_nearest_exact1d": (X3, [8]), "_upsample_nearest_exact3d": (X5, [5, 8, 9]), "max_unpool2d": (*UNPOOL, [6, 6]),
    "max_unpool3d": (*aten.max_pool3d_with_indices(X5, [2, 2, 2]), [4, 6, 6], [2, 2, 2], [0, 0, 0]),
    "fractional_max_pool2d": (X4, [2, 2], [3, 3], real(2, 4, 2) / 2), "fractional_max_pool3d": (X5, [2, 2, 2], [2, 3, 3], real(2, 4, 3) / 2),
    "conv_tbc": (real(6, 2, 3), real(3, 3, 5), real(5), 1), **{name: (X3, X3.flip(0), 1) for name in ("mse_loss", "smooth_l1_loss", "huber_loss")},
    "soft_margin_loss": (X3, X3.flip(0), 1), "binary_cross_entropy": (X3 / 2, X3.flip(0) / 2), "binary_cross_entropy_with_logits": (X3, X3.flip(0)),
    "nll_loss_forward": (real(3, 5), TARGETS, real(5), 0, -100), "nll_loss2d_forward": (X4, torch.ones(2, 6, 6, dtype=torch.long), B, 0, -100),
    "fake_quantize_per_channel_affine_cachemask": (X3.float(), *LEVELS, 1, 0, 255), "fake_quantize_per_channel_affine": (X3.float(), *LEVELS, 1, 0, 255),
    "_fake_quantize_learnable_per_channel_affine": (X3.float(), LEVELS[0], LEVELS[0] * 0, 1, 0, 255),
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": (X3.float(), ONE[2], ONE[3], torch.ones(1, dtype=torch.long), 0, 255),
    "_fake_quantize_learnable_per_tensor_affine": (X3.float(), ONE[2], ONE[0], 0, 255),
    "_fused_moving_avg_obs_fq_helper": (X3.float(), torch.ones(1, dtype=torch.long), torch.ones(1, dtype=torch.long), *ONE, 0.01, 0, 255, 0, False, False),
    "linalg_inv_ex": (MATRIX,), "linalg_cholesky_ex": (MATRIX @ MATRIX.mT,), "cholesky_inverse": (torch.linalg.cholesky(MATRIX @ MATRIX.mT),),
    "linalg_matrix_exp": (MATRIX / 4,), "linalg_qr": (MATRIX,), "linalg_lu_factor_ex": (MATRIX,), "_linalg_det": (MATRIX,), "_linalg_slogdet": (MATRIX,),
    "linalg_cross": (real(2, 4, 3), real(2, 4, 3).flip(0)),
}  # fmt: skip
RULE_CALLS = {
    **{name: (X3, [1]) for name in ("mean", "sum", "amax", "amin", "logsumexp", "nansum")},
    **{name: (X3, 1) for name in ("prod", "any", "all", "max", "min", "cumsum", "cumprod", "sort", "argsort", "cummax")},
    "_is_any_true": (X3 > 9,), "_is_all_true": (X3 > 9,),
    **{name: (X3, [1]) for name in ("std", "var", "var_mean", "std_mean")},
    "linalg_vector_norm": (X3, 2, [1]), "norm": (X3, 2, [1]),
    "_softmax": (X3, 1, False), "_log_softmax": (X3, 1, False), "_safe_softmax": (X3, 1), "softmax": (X3, 1), "log_softmax": (X3, 1),
    "mm": (real(3, 4), real(4, 5)), "bmm": (real(2, 3, 4), real(2, 4, 5)), "_grouped_mm": (ROWS, real(2, 8, 8).float(), ENDS),
    "mv": (real(3, 4), B), "dot": (B, real(4) * 2), "vdot": (B, real(4) * 2), "addmm": (real(5), real(3, 4), real(4, 5)),
    "segment_reduce": (real(6, 4), "sum", torch.tensor([1, 3, 2])), "_sparse_addmm": (real(3, 5), real(3, 4).to_sparse(), real(4, 5)),
    "baddbmm": (real(2, 3, 5), real(2, 3, 4), real(2, 4, 5)), "linear": (real(2, 3, 4), real(5, 4), real(5)),
    "_trilinear": (real(2, 4), real(3, 4, 5), real(2, 5), [1, 3], [0], [1, 2], [2, 3]),
    "convolution": (X4, real(6, 2, 3, 3), real(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
    "native_batch_norm": (X3, *STATS, False, 0.1, 1e-5), "_native_batch_norm_legit": (X3, *STATS, False, 0.1, 1e-5),
    "_native_batch_norm_legit_no_training": (X3, *STATS, 0.1, 1e-5), "native_layer_norm": (X3, [5], real(5), real(5), 1e-5),
    "_fused_rms_norm": (X3, [5], real(5), 1e-5), "native_group_norm": (X4, B, B * 2, 2, 4, 36, 2, 1e-5),
    "embedding": (real(7, 4), torch.tensor([[1, 6, 2]])), **POOL, "im2col": (X4, [2, 2], [1, 1], [0, 0], [1, 1]),
    "col2im": (real(2, 16, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]), "_fft_r2c": (X3, [2], 0, True), "_fft_c2c": (X3 + 1j * X3, [2], 0, True),
    "_fft_c2r": (X3 + 1j * X3, [2], 0, 8), "view_as_complex": (real(3, 4, 2),), "view_as_real": (X3 + 1j * X3,),
    "reflection_pad1d": (X3, [1, 2]), "replication_pad1d": (X3, [1, 2]), "grid_sampler_2d": (X4, real(2, 3, 3, 2), 0, 0, False),
    "_weight_norm_interface": (real(4, 3, 2), real(4, 1, 1), 0), "gather": (X3, 2, torch.tensor([[[2, 0, 1]] * 4] * 3)),
    "addbmm": (real(3, 5), real(2, 3, 4), real(2, 4, 5)), "addmv": (real(3), real(3, 4), B), "addr": (real(3, 4), A, B),
    **{name: HEADS for name in ("scaled_dot_product_attention", "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu")},
    "index_select": (X3, 1, torch.tensor([2, 0])), "index": (X3, [None, torch.tensor([2, 0]), None]), "topk": (X3, 2), "tril": (X3,),
    "triu": (X3,), **SPARING,
}  # fmt: skip
# No kernel for CPU tensors, or the same again: described by the very function of another.
SAME = {"cudnn_batch_norm": "native_batch_norm", "_scaled_grouped_mm": "_grouped_mm",
        "mkldnn_adaptive_avg_pool2d": "adaptive_avg_pool2d",
        **{f"_scaled_dot_product_{kind}": "_scaled_dot_product_flash_attention_for_cpu" for kind in
           ("flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")}}  # fmt: skip
OVERLOAD = {"scatter": "src", "scatter_reduce": "two", "index_fill": "int_Scalar", "isin": "Tensor_Tensor", "bucketize": "Tensor", "searchsorted": "Tensor",
            "median": "dim", "nanmedian": "dim", "fake_quantize_per_channel_affine": "default",
            "std": "correction", "var": "correction", "var_mean": "correction", "std_mean": "correction", "norm": "ScalarOpt_dim", "view_as_complex": "default",
            "max": "dim", "min": "dim", "any": "dim", "all": "dim", "prod": "dim_int", "mean": "dim", "sum": "dim_IntList"}  # fmt: skip


def sized(name, args):
    """Arguments that repeat a shape follow it."""
    args = list(args)
    if name in ("native_layer_norm", "_fused_rms_norm"):
        args[1] = list(args[2].shape)
    if name == "native_group_norm":
        args[3:6] = *args[0].shape[:2], args[0].shape[2:].numel()
    return args


def check_call(name, function, described, args):
    """The law of one call, for every result that is a number of its own."""
    lefts = described.text.split("->")[0].split(",")
    lefts = [part for part, operand in zip(lefts, described.operands, strict=True) if isinstance(operand, Value)]
    rights = parse(described.text)[1]
    given = [operand.leaf for operand in described.operands if isinstance(operand, Value)]  # the tensors themselves

    def call(index, groups=None):
        def run(*swapped):
            table = dict(zip(map(id, given), swapped, strict=True))
            new = sized(name, replace(list(args), lambda t: table.get(id(t), t)))
            if groups and name in ("convolution", "native_group_norm"):
                new[8 if name == "convolution" else 6] = groups
            found = function(*new)
            return list(tensors(found, torch.Tensor))[index]

        return run

    results, groups = list(tensors(function(*args), torch.Tensor)), described.sizes.get("g")
    for index, axes in enumerate(described.text.split("->")[1].split(",")):
        if index >= len(results) or results[index].ndim != len(rights[index]):
            continue
        cut = lambda axis, count, i=index: call(i, count if axis == "g" else groups)  # noqa: E731
        check_rule(call(index), ",".join(lefts) + "->" + axes, *given, cut=cut, **described.sizes)


def operation(name):
    packet = getattr(aten, name)
    if name == "_grouped_mm":
        return counted
    return getattr(packet, OVERLOAD[name]) if name in OVERLOAD else packet


def counted(x, y, ends):
    """Products of the rows that belong to an expert; what the kernel leaves in the others is whatever was in memory."""
    product = aten._grouped_mm(x, y, ends)
    product[int(ends.max()) :] = 0
    return product


def valued(args):
    return replace(list(args), lambda t: Value(tuple(t.shape), leaf=t, dtype=t.dtype))


@pytest.mark.parametrize("name", sorted(RULES))
def test_rule(name):
    if name in SAME:
        assert RULES[name] is RULES[SAME[name]]
        return
    assert name in RULE_CALLS, f"no law is tested for the rule of {name}: give it an example"
    args = RULE_CALLS[name]
    check_call(name, by_keyword(name, operation(name)), by_keyword(name, RULES[name])(*valued(args)), args)


KEYWORDS = {"segment_reduce": ("lengths",)}  # the last arguments of an example, where they have to be given by name


def by_keyword(name, function):
    keys = KEYWORDS.get(name, ())
    return lambda *args: function(*args[: len(args) - len(keys)], **dict(zip(keys, args[len(args) - len(keys) :], strict=True)))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_kind_of_convolution(dims, transposed, groups):
    weight = real(4, 6 // 2, *[3] * dims) if transposed else real(2 * groups, 4 // groups, *[3] * dims)
    outs = weight.shape[1] * groups if transposed else weight.shape[0]
    one = [1] * dims
    args = (real(2, 4, *[5] * dims), weight, real(outs), [2] * dims, one, [2] * dims if not transposed else one, transposed, [0] * dims, groups)
    check_call("convolution", aten.convolution, RULES["convolution"](*valued(args)), args)


PLANTED = {
    "mm": "n i, i o -> o n", "bmm": "b i n, b i o -> b n o", "addmm": "n, n i, i o -> n o", "linear": "a b y, y z, z -> a b z", "mv": "n i, n -> i",
    "convolution": "b (i g) _ _, (g o) i _ _, (g o) -> b (g o) _ _", "native_layer_norm": "a b c, c, c -> a b c", "_softmax": "a b c -> a b c",
    "native_group_norm": "b (g c) k l, (g c), (g c) -> b (g c) k l", "mean": "a b c -> a c", "var": "a b c -> a c", "embedding": "v e, a b -> a b e",
    "im2col": "b c _ _ -> b (_k c) _", "col2im": "b (_k c) _ -> b c _ _", "_fft_r2c": "a b c -> a b c", "gather": "a b c, a b c -> a b c",
    "index_select": "a b c, b -> a b c", "cumsum": "a b c -> a b c", "sort": "a b c -> a b c", "topk": "a b c -> a b c", "tril": "a b c -> a b c",
    "avg_pool2d": "a b c d -> a b c d", "_grouped_mm": "_ i, _ o i, _ -> _ o", "_weight_norm_interface": "a b c, a 1 1 -> a b c",
    "grid_sampler_2d": "b c h w, b _ _ _ -> b c h w", "view_as_complex": "a b c -> a c", "native_batch_norm": "a b c, a, a, a, a -> a b c",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_wrong_rule_is_caught(name):
    args = RULE_CALLS[name]
    right = RULES[name](*valued(args))
    wrong = type(right)(PLANTED[name], right.operands, right.sizes)
    with pytest.raises(BadRule):
        check_call(name, operation(name), wrong, args)


def test_the_checker_wants_every_axis_named():
    with pytest.raises(BadRule, match="names 1 axes here"):
        check_rule(torch.mm, "n i, i -> n", real(2, 3), real(3, 4))


DICE = {"poisson", "_standard_gamma", "normal", "binomial"}  # other numbers each time
POINTWISE = {"copy": (X3, X3 * 2), "where": (X3 > 0.5, X3, X3 * 2), "masked_fill": (X3, X3 > 0.5, 2.0), "lerp": (X3, X3 * 2, X3), "addcmul": (X3, X3, X3),
             "addcdiv": (X3, X3, X3), "clamp": (X3, 0.2, 0.6), "prelu": (X3, B), "_prelu_kernel": (X3, real(1, 4, 1)), "rsub": (X3, X3 * 2),
             "bitwise_not": (X3 > 0.5,), "rrelu_with_noise": (X3, X3 * 0), "complex": (X3, X3 * 2), "polar": (X3, X3 * 2), "floor_divide": (X3, X3 * 2),
             "fake_quantize_per_tensor_affine_cachemask": (X3.float(), 0.1, 0, 0, 255)}  # fmt: skip


@pytest.mark.parametrize("name", sorted(name for name in UNTAGGED - DICE if hasattr(aten, name)))
def test_pointwise_without_the_tag(name):
    args = POINTWISE.get(name, (X3 - 0.5,))
    given = [t for t in args if isinstance(t, torch.Tensor)]
    values = [Value(tuple(t.shape)) for t in given]
    text = pointwise(values, [3]).text if name != "prelu" else "a b c, b -> a b c"  # taken apart by torch before it is seen
    check_rule(lambda *new: tensors(operation(name)(*new, *args[len(given) :]), torch.Tensor)[0], text, *given)


LABELS = torch.arange(2 * 8 * 6 * 4).reshape(2, 8, 6, 4)
MOVE_CALLS = {
    "view": ([2, 2, 4, 24],), "_unsafe_view": ([16, 3, 2, 4],), "_reshape_alias": ([16, 24], [24, 1]), "reshape": ([2, 2, 4, -1],), "view_copy": ([2, -1],),
    "squeeze": (), "unsqueeze": (1,), "flatten": (1, 2), "squeeze_": (), "unsqueeze_": (1,), "permute": ([0, 3, 1, -2],), "transpose": (1, -1),
    "transpose_": (1, 2), "expand": ([3, 2, 8, 6, 4],), "flip": ([1, -1],), "split": (3, 1), "split_with_sizes": ([1, 5, 2], 1), "unsafe_split": (3, 1),
    "unsafe_split_with_sizes": ([1, 5, 2], 1), "split_with_sizes_copy": ([1, 5, 2], 1), "slice": (1, 1, 7, 2), "repeat": ([2, 1, 3, 1, 1],),
    "tile": ([2, 1, 3, 1, 1],), "roll": ([3, 1], [1, 3]), "pixel_shuffle": (2,), "pixel_unshuffle": (2,), "channel_shuffle": (4,),
    "native_channel_shuffle": (4,), "to": (torch.float64,), "rot90": (1, [1, 3]), "native_dropout": (0.0, True),
}  # fmt: skip
TWO = {"t": (), "t_": ()}
# Values are not moved but made, one for each entry: only the shape follows.
MADE = frozenset("empty_like zeros_like ones_like full_like rand_like randn_like bernoulli fill_ zero_ uniform_ normal_ bernoulli_ fill ".split()) | set(
    "exponential_ log_normal_ cauchy_ geometric_ random_ randint_like".split()
)
EXTRA = {"full_like": (1.5,), "fill": (1.5,), "fill_": (1.5,), "bernoulli_": (0.5,), "geometric_": (0.5,), "randint_like": (5,)}


def check_move(name, move, data, args):
    """What is said of labels is what torch does to a tensor of these labels, along each result."""
    told = getattr(aten, name)(data.clone() + 0j, *args).real if "conj" in name else getattr(aten, name)(data.clone(), *args)
    results = list(tensors(told, torch.Tensor)) if not isinstance(told, torch.Tensor) else [told]
    outs = [tuple(result.shape) for result in results]
    moved = move(data.numpy().astype(np.int32), tuple(data.shape), outs, *args)
    assert len(moved) == len(results)
    for field, result, shape in zip(moved, results, outs, strict=True):
        if result.dtype == torch.bool:  # a mask
            continue
        assert np.array_equal(np.broadcast_to(field, shape), result.numpy()), name


@pytest.mark.parametrize("name", sorted(MOVES))
def test_move(name):
    if name in MADE:
        data = LABELS.double() / LABELS.numel()
        result = getattr(aten, name)(data.clone(), *EXTRA.get(name, ()))
        assert result.shape == data.shape
        assert MOVES[name](LABELS.numpy(), tuple(data.shape), [tuple(result.shape)])[0] is not None
        return
    if name in TWO:
        check_move(name, MOVES[name], LABELS.flatten(1), TWO[name])
        return
    same = {"alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "positive", "conj", "_conj", "resolve_conj"}
    assert name in MOVE_CALLS or name in same, f"no law is tested for the move {name}: give it an example"
    data = LABELS.double() if name in ("native_dropout", "to") else LABELS
    check_move(name, MOVES[name], data, MOVE_CALLS.get(name, ()))
    if name in ("permute", "flip", "roll", "slice", "transpose", "clone"):  # a field over one axis alone
        field, args = LABELS[:, :, :1, :1], MOVE_CALLS.get(name, ())
        wide = getattr(aten, name)(field.expand(2, 8, 6, 4).contiguous(), *args)
        (moved,) = MOVES[name](field.numpy(), (2, 8, 6, 4), [tuple(wide.shape)], *args)
        assert np.array_equal(np.broadcast_to(moved, wide.shape), wide.numpy())


WRONG_MOVES = {
    "view": lambda f, s, o, *a: [f.reshape(o[0])[::-1]],
    "permute": lambda f, s, o, dims: [f.reshape(o[0])], "transpose": lambda f, s, o, *a: [f.reshape(o[0])],
    "flip": lambda f, s, o, dims: [f], "roll": lambda f, s, o, shifts, dims: [np.roll(np.roll(f, -shifts[0], dims[0]), shifts[1], dims[1])],
    "split_with_sizes": lambda f, s, o, sizes, dim: np.split(f, np.cumsum(sizes[::-1])[:-1], dim)[::-1], "slice": lambda f, s, o, *a: [f[:, 0:6:2]],
    "pixel_shuffle": lambda f, s, o, r: [f.reshape(o[0])], "channel_shuffle": lambda f, s, o, g: [f],
    "repeat": lambda f, s, o, times: [np.repeat(f[None].repeat(2, 0), 3, 2)],
    "t": lambda f, s, o: [f.reshape(o[0])], "unsqueeze": lambda f, s, o, dim: [f.reshape(o[0])[:, :, ::-1]],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WRONG_MOVES))
def test_a_wrong_move_is_caught(name):
    with pytest.raises(AssertionError):
        check_move(name, WRONG_MOVES[name], LABELS.flatten(1) if name == "t" else LABELS, MOVE_CALLS.get(name, ()))


def check_assembled(name, function, parts, args, call=None):
    """Every entry of a result carries the label (after joins) of each entry it was copied from; what was put in carries none of them.

    ``parts``: shapes of the tensors; ``args``: what follows them.
    """
    labels = Labels()
    values, data = [], []
    for shape in parts:
        own = labels.fresh(int(np.prod(shape))).reshape(shape)
        values.append(Value(tuple(shape), (own,)))
        data.append(torch.from_numpy(own.astype(np.int64)))
    several = name in ("cat", "concatenate", "stack")
    call = call or getattr(aten, name)
    told = call(data, *args) if several else call(*data, *args)
    results = list(told) if isinstance(told, list | tuple) else [told]
    outs = [tuple(result.shape) for result in results]
    fields = function(labels, labels.reason(None), outs, values if several else values[0], *args)
    parts_ = labels.partition()
    assert len(fields) == len(results)
    for held, result in zip(fields, results, strict=True):
        flat = result.numpy()
        roots = [np.broadcast_to(parts_.find(field.ravel()).reshape(field.shape), flat.shape) for field in held if field.ndim == flat.ndim]
        wanted = parts_.find(np.clip(flat, 0, None).ravel().astype(np.int32)).reshape(flat.shape)
        known = flat >= 0
        assert roots and np.any([root == wanted for root in roots], axis=0)[known].all(), name
        assert not np.any([root == wanted for root in roots], axis=0)[~known].any(), name
    return labels, parts_, values


FACTORY = {"zeros": ([4, 5],), "ones": ([4, 5],), "full": ([4, 5], 2.0), "empty": ([4, 5],), "rand": ([4, 5],), "randn": ([4, 5],),
           "empty_permuted": ([4, 5], [1, 0]), "empty_strided": ([4, 5], [5, 1])}  # fmt: skip
FACTORY |= {f"new_{name}": FACTORY[name] for name in ("zeros", "ones", "full", "empty", "empty_strided")}
PACKED = "_pack_padded_sequence"
OWN = {PACKED, "masked_scatter"}  # have tests of their own
ASSEMBLE_CALLS = {
    "expand": ([(2, 1, 4)], ([3, 2, 5, 4],)), "repeat": ([(2, 1, 4)], ([3, 2, 5, 1],)), "select": ([(2, 6, 4)], (1, 2)), "unbind": ([(2, 3, 4)], (1,)),
    "stack": ([(2, 3), (2, 3)], (1,)), "cat": ([(2, 3), (2, 5)], (1,)), "concatenate": ([(2, 3), (2, 5)], (-1,)),
    "constant_pad_nd": ([(1, 6, 1)], ([0, 0, 2, 1], -1)), "as_strided_": ([(1, 6)], ([1, 6], [6, 1])),
}  # fmt: skip


def test_packing_sequences():
    """Every number of the packed tensor carries the label of its feature; what depends on time or sample stays whole; lengths carry nothing."""
    labels = Labels()
    features, times = labels.fresh(6).reshape(1, 1, 6), labels.fresh(3).reshape(1, 3, 1)
    data = torch.from_numpy(np.broadcast_to(features, (2, 3, 6)).astype(np.int64).copy())
    packed, sizes = aten._pack_padded_sequence(data, torch.tensor([3, 1]), True)
    value = Value((2, 3, 6), (features, times))
    held, none = ASSEMBLE[PACKED](labels, labels.reason(None), [tuple(packed.shape), tuple(sizes.shape)], value, None, True)
    assert none == () and len(held) == 1 and np.array_equal(np.broadcast_to(held[0], packed.shape), packed.numpy())
    parts = labels.partition()
    assert parts.is_locked(times.ravel()).all() and not parts.is_locked(features.ravel()).any()


@pytest.mark.parametrize("rows", [True, False])
def test_scattering_where_a_mask_is_set(rows):
    """Every entry of the result carries the label of what it was copied from; features stay apart where whole rows are written, and are locked elsewhere."""
    labels = Labels()
    x, source, where = (labels.fresh(count).reshape(shape) for count, shape in ((4, (1, 4)), (4, (1, 4)), (4, (1, 4))))
    places = labels.fresh(3).reshape(3, 1)
    mask = torch.tensor([[True], [False], [True]]).expand(3, 4) if rows else torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0]]).bool()
    wide = lambda field, shape: torch.from_numpy(np.broadcast_to(field, shape).astype(np.int64).copy())  # noqa: E731
    result = aten.masked_scatter(wide(x, (3, 4)), mask, wide(source, (2, 4)) if rows else wide(source, (3, 4))).numpy()
    given = Value((3, 1) if rows else (3, 4), (places,) if rows else (places, where))
    (fields,) = ASSEMBLE["masked_scatter"](labels, labels.reason(None), [(3, 4)], Value((3, 4), (x,)), given, Value((2 if rows else 3, 4), (source,)))
    parts = labels.partition()
    roots = [np.broadcast_to(parts.find(field.ravel()).reshape(field.shape), (3, 4)) for field in fields if field.ndim == 2]
    wanted = parts.find(result.ravel().astype(np.int32)).reshape(3, 4)
    locked = parts.is_locked(result.ravel()).reshape(3, 4)
    assert (np.any([root == wanted for root in roots], axis=0) | locked).all()
    assert parts.is_locked(x.ravel()).any() != rows and parts.is_locked(source.ravel()).all() != rows
    assert len(np.unique(parts.find(x.ravel()))) == 4 or not rows


@pytest.mark.parametrize("name", sorted(set(ASSEMBLE) - OWN))
def test_assembling(name):
    if name in FACTORY:
        args = FACTORY[name]
        make = getattr(aten, name)
        made = make(real(2), *args) if name.startswith("new_") else make(*args)
        labels = Labels()
        (fields,) = ASSEMBLE[name](labels, 0, [tuple(made.shape)], *args)
        assert [field.shape for field in fields] == [(4, 1), (1, 5)] and labels.count == 9 and not labels.locks
        if name.endswith(("zeros", "ones", "full")):  # uniform, so that it can be cut wherever it is asked to be
            assert (made == made.flatten()[0]).all()
        return
    assert name in ASSEMBLE_CALLS, f"no law is tested for {name}: give it an example"
    labels, parts, values = check_assembled(name, ASSEMBLE[name], *ASSEMBLE_CALLS[name])
    if name in ("select", "unbind"):  # positions that are named one by one stay
        one = Labels()
        own = one.fresh(6).reshape(1, 6)
        ASSEMBLE[name](one, one.reason(None), [(2,)] * 6, Value((2, 6), (own,)), 1, *ASSEMBLE_CALLS[name][1][1:])
        assert one.partition().is_locked(own.ravel()).all()


WRONG_ASSEMBLY = {
    "cat": lambda labels, reason, outs, tensors, dim: ASSEMBLE["cat"](labels, reason, outs, tensors[::-1], dim),
    "select": lambda labels, reason, outs, x, dim, index: ASSEMBLE["select"](labels, reason, outs, x, dim, index + 1),
    "unbind": lambda labels, reason, outs, x, dim: ASSEMBLE["unbind"](labels, reason, outs, x, dim)[::-1],
    "stack": lambda labels, reason, outs, tensors, dim: [tuple(np.expand_dims(f.reshape(3, 2).T, 1) for f in tensors[0].fields)],
    "constant_pad_nd": lambda labels, reason, outs, x, padding, value: ASSEMBLE["constant_pad_nd"](labels, reason, outs, x, [0, 0, 1, 2], value),
    "repeat": lambda labels, reason, outs, x, times: [tuple(np.flip(f, 1) for f in ASSEMBLE["repeat"](labels, reason, outs, x, times)[0])],
    "expand": lambda labels, reason, outs, x, sizes: [tuple(np.flip(f, -1) for f in ASSEMBLE["expand"](labels, reason, outs, x, sizes)[0])],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WRONG_ASSEMBLY))
def test_wrong_assembling_is_caught(name):
    with pytest.raises(AssertionError):
        check_assembled(name, WRONG_ASSEMBLY[name], *ASSEMBLE_CALLS[name])


def test_picking_by_a_buffer():
    order = torch.tensor([3, 0, -1, 3])
    for shape, dim in (((5,), 0), ((2, 5, 3), 1)):
        labels = Labels()
        own = labels.fresh(int(np.prod(shape))).reshape(shape)
        index = Value((4,), (labels.fresh(4),), leaf="order")
        ((field,),) = pick(labels, Value(shape, (own,)), dim, index, order, labels.reason(None))
        assert np.array_equal(field, torch.from_numpy(own.astype(np.int64)).index_select(dim, order % 5).numpy())
        parts = labels.partition()
        if len(shape) == 1:  # an entry of the buffer goes with what it picks
            assert np.array_equal(parts.find(index.fields[0]), parts.find(field))


def test_the_tables_above_name_only_what_there_is():
    assert set(RULE_CALLS) | set(SAME) == set(RULES) and set(ASSEMBLE_CALLS) | set(FACTORY) | OWN == set(ASSEMBLE)
    assert set(MOVE_CALLS) | set(TWO) | MADE <= set(MOVES)
    assert all(re.search("->", text) for text in PLANTED.values())
