"""The list of what torch can do, walked: every operation of ATen's core set and every function of ``torch.nn.functional`` is described.

A new torch with a new operation fails here, and says which. What is left whole on purpose says why.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune.errors import NothingToPrune
from graphprune.operations import OPERATIONS, resolve
from graphprune.operations.labels import Reason

aten = torch.ops.aten
CORE = [
    getattr(packet, overload)
    for packet in (getattr(aten, name) for name in dir(aten))
    if isinstance(packet, torch._ops.OpOverloadPacket)
    for overload in packet.overloads()
    if torch.Tag.core in getattr(packet, overload).tags
]


def test_atens_core_set_is_described():
    assert len({func._schema.name for func in CORE}) > 150
    unknown = []
    for func in CORE:
        op = resolve(func)
        if not any((op.rule, op.move, op.assemble, op.pointwise, op.why, op.whole)):
            unknown.append(op.name)
    assert not unknown, f"describe them in graphprune/operations, or say why they lock what they meet: {sorted(set(unknown))}"


def test_what_is_locked_on_purpose_says_why():
    locked = [op for op in OPERATIONS.values() if op.why]
    assert locked and all(len(op.why.split()) > 2 and not (op.rule or op.move or op.pointwise) for op in locked)


def test_an_operation_is_described_in_one_way():
    for op in OPERATIONS.values():
        ways = [way for way in ("rule", "move", "pointwise", "why") if getattr(op, way)]
        assert len(ways) <= 1, (op.name, ways)


SEQ, MAP, VOLUME = (2, 8, 9), (2, 8, 6, 6), (2, 8, 4, 4, 4)
ROWS = torch.tensor([1, 0])


def by(name, *args, first=False, before=lambda x: x):
    """A call of a function on x and these arguments, of which some are made of x; ``first``: of several results."""

    def call(x):
        found = getattr(F, name)(before(x), *(arg(x) if callable(arg) else arg for arg in args))
        return found[0] if first else found

    return call


# By name: the shape that the function gets from a layer (channels on axis 1, or on the last where there are two), and the call.
CALLS = {
    **{name: (MAP, getattr(F, name)) for name in """celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu selu
       sigmoid silu softplus softshrink softsign tanh tanhshrink celu_ elu_ hardtanh_ leaky_relu_ relu_ rrelu_ selu_ dropout alpha_dropout dropout2d
       feature_alpha_dropout""".split()},
    "dropout1d": (SEQ, F.dropout1d), "dropout3d": (VOLUME, F.dropout3d), "threshold": (MAP, lambda x: F.threshold(x, 0.1, 0.2)),
    "threshold_": (MAP, lambda x: F.threshold_(x, 0.1, 0.2)), "glu": (MAP, lambda x: F.glu(x, 1)),
    **{name: (MAP, by(name, 1)) for name in ("softmax", "softmin", "log_softmax", "normalize", "gumbel_softmax")},
    **{f"{kind}1d": (SEQ, by(f"{kind}1d", 3)) for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")},
    **{f"{kind}2d": (MAP, by(f"{kind}2d", 3)) for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")},
    **{f"{kind}3d": (VOLUME, by(f"{kind}3d", 2)) for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")},
    **{f"lp_pool{n}d": (shape, by(f"lp_pool{n}d", 2, 2)) for n, shape in ((1, SEQ), (2, MAP), (3, VOLUME))},
    **{f"max_pool{n}d_with_indices": (shape, by(f"max_pool{n}d_with_indices", 2, first=True)) for n, shape in ((1, SEQ), (2, MAP), (3, VOLUME))},
    **{f"adaptive_max_pool{n}d_with_indices": (shape, by(f"adaptive_max_pool{n}d_with_indices", 2, first=True))
       for n, shape in ((1, SEQ), (2, MAP), (3, VOLUME))},
    "fractional_max_pool2d": (MAP, lambda x: F.fractional_max_pool2d(x, 2, output_size=3)),
    "fractional_max_pool2d_with_indices": (MAP, lambda x: F.fractional_max_pool2d_with_indices(x, 2, output_size=3)[0]),
    "fractional_max_pool3d": (VOLUME, lambda x: F.fractional_max_pool3d(x, 2, output_size=2)),
    "fractional_max_pool3d_with_indices": (VOLUME, lambda x: F.fractional_max_pool3d_with_indices(x, 2, output_size=2)[0]),
    "max_unpool1d": (SEQ, lambda x: F.max_unpool1d(*F.max_pool1d(x, 3, return_indices=True), 3)),
    "max_unpool2d": (MAP, lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    "max_unpool3d": (VOLUME, lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2)),
    "interpolate": (MAP, lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")), "upsample": (MAP, lambda x: F.upsample(x, scale_factor=2)),
    "upsample_bilinear": (MAP, lambda x: F.upsample_bilinear(x, scale_factor=2)), "upsample_nearest": (MAP, lambda x: F.upsample_nearest(x, scale_factor=2)),
    "pad": (MAP, lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
    "grid_sample": (MAP, lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2).to(x), align_corners=False)),
    "unfold": (MAP, lambda x: F.unfold(x, 3)), "fold": (MAP, lambda x: F.fold(F.unfold(x, 3), 6, 3)),
    "local_response_norm": (MAP, lambda x: F.local_response_norm(x, 3)),
    "pixel_shuffle": (MAP, lambda x: F.pixel_shuffle(x, 2)), "pixel_unshuffle": (MAP, lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": (MAP, lambda x: F.channel_shuffle(x, 2)), "native_channel_shuffle": (MAP, lambda x: F.native_channel_shuffle(x, 2)),
    "batch_norm": (MAP, lambda x: F.batch_norm(x, torch.zeros(8).to(x), torch.ones(8).to(x))), "group_norm": (MAP, lambda x: F.group_norm(x, 2)),
    "instance_norm": (MAP, F.instance_norm), "layer_norm": (MAP, lambda x: F.layer_norm(x, x.shape[1:])),
    "rms_norm": (MAP, lambda x: F.rms_norm(x, x.shape[-1:])),
    "prelu": (MAP, lambda x: F.prelu(x, torch.ones(1).to(x))), "conv1d": (SEQ, lambda x: F.conv1d(x, torch.ones(4, 8, 3).to(x))),
    "conv2d": (MAP, lambda x: F.conv2d(x, torch.ones(4, 8, 3, 3).to(x))), "conv3d": (VOLUME, lambda x: F.conv3d(x, torch.ones(4, 8, 2, 2, 2).to(x))),
    "conv_transpose1d": (SEQ, lambda x: F.conv_transpose1d(x, torch.ones(8, 4, 3).to(x))),
    "conv_transpose2d": (MAP, lambda x: F.conv_transpose2d(x, torch.ones(8, 4, 3, 3).to(x))),
    "conv_transpose3d": (VOLUME, lambda x: F.conv_transpose3d(x, torch.ones(8, 4, 2, 2, 2).to(x))),
    "conv_tbc": (SEQ, lambda x: F.conv_tbc(x.permute(2, 0, 1).contiguous(), torch.ones(3, 8, 4).to(x), torch.ones(4).to(x), 1)),
    "linear": (SEQ, lambda x: F.linear(x.mT, torch.ones(4, 8).to(x))), "bilinear": (SEQ, lambda x: F.bilinear(x.mT, x.mT, torch.ones(3, 8, 8).to(x))),
    "embedding": (SEQ, lambda x: F.embedding(ROWS, x.flatten(1).t())), "embedding_bag": (SEQ, lambda x: F.embedding_bag(ROWS[None], x.mT.flatten(0, 1))),
    "scaled_dot_product_attention": (SEQ, lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT)),
    "multi_head_attention_forward": (SEQ, lambda x: nn.MultiheadAttention(8, 2).to(x.device)(x.permute(2, 0, 1), x.permute(2, 0, 1), x.permute(2, 0, 1))[0]),
    "affine_grid": (SEQ, lambda x: F.affine_grid(x.mean(2)[:, :6].view(2, 2, 3), [2, 3, 4, 4], align_corners=False)),
    "one_hot": (SEQ, lambda x: F.one_hot(x.argmax(1), 8)),
    "pdist": (SEQ, lambda x: F.pdist(x.flatten(1))), "pairwise_distance": (SEQ, lambda x: F.pairwise_distance(x.mT, x.mT * 2)),
    "cosine_similarity": (SEQ, lambda x: F.cosine_similarity(x, x * 2)), "kl_div": (SEQ, lambda x: F.kl_div(x, x.flip(2), reduction="batchmean")),
    **{name: (SEQ, by(name, lambda x: x.flip(2))) for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss",
       "poisson_nll_loss", "hinge_embedding_loss")},
    **{name: (SEQ, by(name, lambda x: x.flip(2).sigmoid(), before=torch.sigmoid)) for name in ("binary_cross_entropy", "binary_cross_entropy_with_logits")},
    "gaussian_nll_loss": (SEQ, lambda x: F.gaussian_nll_loss(x, x.flip(2), torch.ones(2, 8, 9).to(x))),
    "nll_loss": (SEQ, lambda x: F.nll_loss(x.mean(2), ROWS)), "cross_entropy": (SEQ, lambda x: F.cross_entropy(x.mean(2), ROWS)),
    "multilabel_soft_margin_loss": (SEQ, lambda x: F.multilabel_soft_margin_loss(x.mean(2), x.mean(2))),
    "margin_ranking_loss": (SEQ, lambda x: F.margin_ranking_loss(x, x.flip(2), torch.ones(2, 8, 9).to(x))),
    "cosine_embedding_loss": (SEQ, lambda x: F.cosine_embedding_loss(x.mean(2), x.amax(2), torch.ones(2).to(x))),
    "triplet_margin_loss": (SEQ, lambda x: F.triplet_margin_loss(x, x.flip(2), x * 2)),
    "triplet_margin_with_distance_loss": (SEQ, lambda x: F.triplet_margin_with_distance_loss(x, x.flip(2), x * 2)),
    "ctc_loss": (SEQ, lambda x: F.ctc_loss(x.permute(2, 0, 1).log_softmax(2), torch.ones(2, 3, dtype=torch.long), torch.full((2,), 9), torch.full((2,), 3))),
    "multi_margin_loss": (SEQ, lambda x: F.multi_margin_loss(x.mean(2), ROWS)),
    "multilabel_margin_loss": (SEQ, lambda x: F.multilabel_margin_loss(x.mean(2), torch.zeros(2, 8, dtype=torch.long))),
    "linear_cross_entropy": (SEQ, lambda x: F.linear_cross_entropy(x.mean(2), torch.ones(5, 8).to(x), ROWS)),
    "grouped_mm": (SEQ, lambda x: F.grouped_mm(x.mT.reshape(18, 8), torch.ones(2, 8, 8).to(x), offs=torch.tensor([9, 18], dtype=torch.int32))),
}  # fmt: skip
# Products of numbers in 8 bits, which no processor of the tests has; described with the plain ones.
UNTRIED = {"scaled_mm", "scaled_grouped_mm"}


def functions():
    """The names of all functions that ``torch.nn.functional`` makes public."""
    for name in dir(F):
        made = getattr(F, name)
        mine = callable(made) and not inspect.isclass(made) and not name.startswith(("_", "has_torch", "handle_torch", "boolean_dispatch", "assert_int"))
        if mine and name[0].islower() and "reproducibility" not in name:
            yield name


def test_every_function_is_walked():
    assert not set(functions()) - set(CALLS) - UNTRIED, "give them an example"


class Caller(nn.Module):
    def __init__(self, shape, call):
        super().__init__()
        self.layer, self.call = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](3, 8, 1), call

    def forward(self, x):
        return self.call(self.layer(x))


def reasons(shape, call) -> list[Reason]:
    net = Caller(shape, call).eval()
    return graphprune.trace(net, torch.rand(shape[0], 3, *shape[2:])).labels.reasons


@pytest.mark.filterwarnings("ignore:.*upsample.* is deprecated")
@pytest.mark.parametrize("name", [name for name in sorted(CALLS) if hasattr(F, name)])
def test_a_function_is_described(name):
    """Every operation that a function is made of."""
    unknown = [str(reason) for reason in reasons(*CALLS[name]) if reason.text.startswith(("no rule", "not understood", "its rule"))]
    assert not unknown, unknown


def test_the_walk_sees_what_is_unknown():
    assert any(reason.text.startswith("no rule") for reason in reasons(SEQ, lambda x: torch.linalg.svd(x)[1]))


# ---- operations that leave channels alone: cut, exactly


def positions(x):
    return torch.tensor([0, 2, 1, 1, 4, 5, 3, 2, 0])


def chosen(x):
    """Which rows are written: a mask with one entry for all channels."""
    return (torch.arange(9 * len(x)) % 3 > 0).view(-1, 9, 1)


def written(x, index, value):
    x = x.clone()
    x[index(x) if callable(index) else index] = value(x) if callable(value) else value
    return x


MASK = torch.tensor([[True, False, True, True, False, True, True, False, False]] * 2)
LEAVING = {
    "a gated half": lambda x: torch.cat([F.glu(x, -1)] * 2, -1), "a mask over positions": lambda x: written(x, MASK, 0.0),
    "a mask over everything": lambda x: written(x, lambda x: x > 0.3, 0.5), "a mask with a row": lambda x: written(x, MASK, lambda x: x[0, 0].clone()),
    "rows by their numbers": lambda x: written(x, (slice(None), torch.tensor([0, 3])), lambda x: x[:, :2] * 2),
    "index_add": lambda x: torch.zeros_like(x).index_add(1, positions(x), x), "index_copy": lambda x: x.index_copy(1, torch.tensor([1, 0]), x[:, 2:4]),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([1, 0]), 2.0),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, positions(x)[None, :, None].expand_as(x), x),
    "scatter_reduce": lambda x: torch.zeros_like(x).scatter_reduce(1, positions(x)[None, :, None].expand_as(x), x, "amax"),
    "unpooling": lambda x: F.max_unpool1d(*F.max_pool1d(x.mT, 3, return_indices=True), 3).mT, "windows": lambda x: x.unfold(1, 3, 1).mean(-1),
    "a running sum of exponentials": lambda x: x.logcumsumexp(1), "the median over positions": lambda x: x + x.median(1, keepdim=True)[0],
    "the second smallest": lambda x: x - x.kthvalue(2, 1)[0][:, None], "a mode": lambda x: x + x.round().mode(1, keepdim=True)[0], "rrelu": F.rrelu,
    "a rotation in space": lambda x: x.unflatten(1, (3, 3)).rot90(1, (1, 2)).flatten(1, 2), "diagonals": lambda x: x.unflatten(1, (3, 3)).diagonal(0, 1, 2).mT,
    "quantised by channel": lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x),
    "least and most": lambda x: x + torch.aminmax(x, dim=1, keepdim=True)[1],
    "rows chosen by a mask": lambda x: x + x[chosen(x)[..., 0]].sum(0), "rows of a mask that is told": lambda x: x[:, torch.arange(9) % 2 == 0],
    "rows written through a mask": lambda x: written(x, chosen(x)[..., 0], x[chosen(x)[..., 0]] * 2),
    "rows of another put in": lambda x: x.masked_scatter(chosen(x).expand_as(x), x.flip(1) * 3),
    "rows of another put in flat": lambda x: x.masked_scatter(chosen(x).repeat(1, 1, x.shape[2]), (x * 2).flatten(0, 1)),
    "rows put in under a broadcast mask": lambda x: x.masked_scatter(chosen(x), x[chosen(x)[..., 0]].sin()),
    "segments": lambda x: x + torch.segment_reduce(x.flatten(0, 1), "sum", lengths=torch.tensor([9] * len(x)), axis=0)[:, None],
    "neighbours": lambda x: torch.stack([torch.sparse.mm(torch.eye(9).roll(1, 0).to(x).to_sparse(), one) for one in x]),
    "a part written": lambda x: torch.select_scatter(x, x[:, 1], 1, 2), "buckets": lambda x: x + torch.bucketize(x, torch.tensor([0.1, 0.5]).to(x)),
}  # fmt: skip


class Channels(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.first, self.call, self.last = nn.Linear(6, 16), call, nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.call(self.first(x).sigmoid()))


@pytest.mark.parametrize("name", LEAVING)
def test_channels_go_through_what_leaves_them_alone(name):
    torch.manual_seed(0)
    net, x = Channels(LEAVING[name]).double().eval(), torch.randn(2, 9, 6).double()
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    assert small.first.out_features == 8
    assert torch.allclose(small(x), graphprune.zeroed(net, plan)(x)[0], rtol=1e-9, atol=1e-10)


NUMBERING = [
    lambda x: x.masked_select(x > 9).sum() + x,
    lambda x: x + torch.diag_embed(x[:, 0]).sum(1)[:, None],
    lambda x: torch.masked_scatter(x, x > 0.5, x * 2),
    lambda x: torch.masked_scatter(x, chosen(x).expand_as(x), (x * 2).flatten()),
    lambda x: x + x[x > 0.4].sum(),
]


@pytest.mark.parametrize("call", NUMBERING)
def test_what_numbers_channels_leaves_them_whole(call):
    torch.manual_seed(0)
    net, x = Channels(call).double().eval(), torch.randn(2, 9, 6).double()
    with pytest.raises(NothingToPrune):
        graphprune.shrink(net, x, 0.5)


def test_distances_to_a_book_of_codes():
    """Codes and what is compared with them keep the same features."""

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.codes, self.last = nn.Linear(6, 16), nn.Parameter(torch.randn(7, 16)), nn.Linear(7, 4)

        def forward(self, x):
            return self.last(torch.cdist(self.first(x), self.codes))

    torch.manual_seed(0)
    net, x = Quantised().double().eval(), torch.randn(5, 6).double()
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    assert small.codes.shape[1] == 8 and small.first.out_features == 8
    assert torch.allclose(small(x), graphprune.zeroed(net, plan)(x)[0], rtol=1e-9, atol=1e-10)
