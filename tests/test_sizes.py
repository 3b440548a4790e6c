"""Sizes in the code: whatever becomes of one, an axis either goes and the result is right, or it stays whole, with the check or without."""

import copy
import decimal
import fractions
import functools
import math
import operator
import pickle
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune.errors import NothingToPrune

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """8 -> 16, whatever is done between, 16 -> 4."""

    def __init__(self, between, **attributes):
        super().__init__()
        self.up, self.down, self.width = nn.Linear(8, 16), nn.Linear(16, 4), 16
        self.__dict__["between"] = between
        for name, value in attributes.items():
            (self.register_buffer if type(value) is torch.Tensor else self.__setattr__)(name, value)

    def forward(self, x):
        return self.down(self.between(self, self.up(x).relu()))


def masked(model, plan):
    """The original with zeros in place of what the plan removes, on the model's own code."""
    twin, masks = copy.deepcopy(model), plan.masks(model)
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if name in plan.cuts and tensor.is_floating_point():
            tensor.data.mul_(masks[name])
    return twin


def cut(between, verify, x=X, **attributes):
    """The share of the units that stays; 1.0 where the axis is left whole. What is cut must be right."""
    torch.manual_seed(0)
    net = Net(between, **attributes).double().eval()
    try:
        small, plan = graphprune.shrink(net, x, 0.5, criterion=graphprune.scores.random.with_(seed=0), return_plan=True, verify=verify)
    except NothingToPrune as error:
        assert "up.weight axis 0" in str(error), error
        return 1.0
    with torch.no_grad():
        for batch in (x, x[:2], x * 3):
            assert torch.allclose(small(batch), masked(net, plan)(batch), atol=1e-9)
    return small.up.out_features / 16


def read(h):
    return h.shape[1]


def put(index, value):
    def between(net, h):
        h = h.clone()
        h[index] = value
        return h

    return between


# What makes a factor of a size: the function would change with it.
FACTORS = {
    "int": lambda net, h: h / int(read(h)),
    "int of an attribute": lambda net, h: h / int(net.up.out_features),
    "index": lambda net, h: h / operator.index(net.width).__index__() * read(h).__index__(),
    "len": lambda net, h: h * len(net.up.weight) ** -0.5,
    "negative": lambda net, h: h * -read(h),
    "shift": lambda net, h: h / (read(h) >> 1),
    "shift up": lambda net, h: h / (read(h) << 1),
    "divmod": lambda net, h: h / divmod(read(h), 2)[0],
    "abs": lambda net, h: h * abs(8 - read(h)),
    "round": lambda net, h: h / round(read(h) / 3),
    "ceil": lambda net, h: h / -(-read(h) // 3),
    "square root": lambda net, h: h / np.sqrt(read(h)),
    "stride": lambda net, h: h / h.stride(0),
    "bytes": lambda net, h: h / h.nbytes,
    "fraction": lambda net, h: h * float(fractions.Fraction(1, read(h))),
    "power of two": lambda net, h: h * (2 if read(h) & (read(h) - 1) == 0 else 3) + read(h).bit_length(),
    "text": lambda net, h: h * (2 if f"{read(h):d}" == "16" else 3),
    "key": lambda net, h: h * {"16": 2.0}.get(str(read(h)), 3.0),
    "tensor": lambda net, h: h / torch.tensor(read(h)),
    "tensor of several": lambda net, h: h / torch.tensor([1, read(h)])[1],
    "scalar tensor": lambda net, h: h / torch.scalar_tensor(read(h), dtype=h.dtype),
    "new tensor": lambda net, h: h / h.new_tensor(read(h)),
    "full": lambda net, h: h / torch.full((1,), read(h)),
    "full_like": lambda net, h: h / torch.full_like(h, read(h)),
    "new_full": lambda net, h: h / h.new_full((1,), read(h)),
    "fill": lambda net, h: h / torch.ones(1, dtype=h.dtype).fill_(read(h)),
    "entries": lambda net, h: put((slice(None), slice(None)), read(h))(net, h) + h,
    "sum of positions": lambda net, h: h / torch.arange(read(h)).sum(),
    "linspace": lambda net, h: h * torch.linspace(0, 1, read(h))[1],
    "identity": lambda net, h: h * torch.eye(read(h)).sum(),
    "alpha": lambda net, h: torch.add(h, h, alpha=read(h)),
    "other": lambda net, h: torch.mul(h, other=read(h)),
    "multiply": lambda net, h: torch.multiply(h, read(h)),
    "divide": lambda net, h: torch.divide(h, read(h)),
    "subtract": lambda net, h: torch.subtract(h, read(h)),
    "power": lambda net, h: torch.float_power(h, 1 / read(h)),
    "from": lambda net, h: read(h) - h,
    "remainder": lambda net, h: (h * 99) % read(h),
    "fmod": lambda net, h: torch.fmod(h * 99, read(h)),
    "greater": lambda net, h: h * (h * 30 > read(h)),
    "where": lambda net, h: torch.where(h > 0.1, h, read(h)),
    "masked_fill": lambda net, h: h.masked_fill(h > 0.1, read(h)),
    "clamp": lambda net, h: (h * 20).clamp(max=read(h) // 4),
    "softplus": lambda net, h: F.softplus(h, beta=read(h)),
    "elu": lambda net, h: F.elu(h - 1, alpha=read(h)),
    "hardtanh": lambda net, h: F.hardtanh(h * 20, -1, read(h) // 4),
    "pad by a value": lambda net, h: F.pad(h[:, None], (0, 0, 1, 0), value=read(h)).sum(1),
    "pooled to": lambda net, h: F.adaptive_avg_pool1d(h[..., None].expand(-1, -1, 6), read(h) // 4).sum(-1),
    "interpolated to": lambda net, h: F.interpolate(h[..., None].expand(-1, -1, 2), size=read(h) // 2).sum(-1),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_keeps_its_axis_whole(name, verify):
    assert cut(FACTORS[name], verify) == 1.0


def mix(parts):
    return torch.cat([part * (index + 1) for index, part in enumerate(parts)], 1)


# Parts of an axis, given as literals.
PARTS = {
    "set the first": put((slice(None), slice(0, 8)), 0.0),
    "set the rest": put((slice(None), slice(8, None)), 0.5),
    "set the last": put((slice(None), slice(-4, None)), 0.0),
    "set all but the last": put((..., slice(None, -4)), 0.0),
    "set from an end": put((..., slice(0, 8)), 0.0),
    "set every other": put((slice(None), slice(0, None, 2)), 0.0),
    "set every third": put((slice(None), slice(1, None, 3)), 0.5),
    "set every other of a part": put((slice(None), slice(4, 12, 2)), 0.5),
    "roll back": lambda net, h: h.roll(-3, 1),
    "roll": lambda net, h: h.roll(5, 1),
    "roll back by a share": lambda net, h: h.roll(-(read(h) // 2), 1),
    "tensor_split": lambda net, h: mix(h.tensor_split(4, 1)),
    "tensor_split at": lambda net, h: mix(h.tensor_split((4, 10), 1)),
    "hsplit": lambda net, h: mix(torch.hsplit(h, 4)),
    "hsplit at": lambda net, h: mix(torch.hsplit(h, [6])),
    "chunk unevenly": lambda net, h: mix(h.chunk(3, 1)),
    "split unevenly": lambda net, h: mix(h.split(6, 1)),
    "split unevenly by a share": lambda net, h: mix(h.split(-(-h.shape[1] // 3), 1)),
    "tensor_split unevenly": lambda net, h: mix(h.tensor_split(3, 1)),
    "interleaved": lambda net, h: torch.cat([h[:, ::2].sigmoid() * h[:, 1::2]] * 2, 1),
    "interleaved by three": lambda net, h: torch.cat([h[:, ::3], h[:, 1::3], h[:, 2::3]], 1),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_an_axis_keep_their_entries(name, verify):
    share = cut(PARTS[name], verify)
    assert share < 0.8 or name not in (
        "tensor_split",
        "hsplit",
        "interleaved",
        "interleaved by three",
        "set every other",
        "chunk unevenly",
        "split unevenly by a share",
        "tensor_split unevenly",
    )
    assert share < 1 or name == "split unevenly"  # a literal that no shorter axis has


@pytest.mark.parametrize("verify", [False, True])
def test_a_literal_part_written_to_in_a_new_tensor(verify):
    def between(net, h):
        y = h.new_zeros(len(h), net.room)
        y[:, :16] = h
        y[:, 16:] = net.more(h)
        return net.back(y)

    cut(between, verify, room=24, more=nn.Linear(16, 8), back=nn.Linear(24, 16))


def set_data(net, h):
    h = h.clone()
    h.data = h.data.flip(1)
    return h


LEAVES = {
    "numpy": lambda net, h: torch.from_numpy(h.numpy() * np.arange(16.0)),
    "asarray": lambda net, h: torch.from_numpy(np.asarray(h) * 2),
    "statistic": lambda net, h: h * float(h.numpy().std(1).mean()),
    "list": lambda net, h: torch.tensor(h.tolist(), dtype=h.dtype),
    "pickled": lambda net, h: pickle.loads(pickle.dumps(h.detach())),
    "copied by its parts": lambda net, h: copy.copy(h.detach()) * 2,
    "bytes": lambda net, h: h * sum(h.untyped_storage().tolist()) / 1e4,
    "handed over": lambda net, h: torch.from_dlpack(h.detach()),
    "order as a list": lambda net, h: h[:, net.order] * (net.order.tolist()[3] + 1),
    "length of an order": lambda net, h: h[:, net.order] / len(net.order),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", LEAVES)
def test_values_that_leave_torch_hold_what_they_belong_to(name, verify):
    with torch.no_grad():
        assert cut(LEAVES[name], verify, order=torch.randperm(16)) == 1.0


MEMORY = {
    "deep copy": lambda net, h: copy.deepcopy(h.detach()) * 2,
    "address": lambda net, h: h * (2 if h.data_ptr() else 3),
    "the same memory": lambda net, h: h * (2 if h.data_ptr() == h.view(-1).data_ptr() else 3),
    "other memory": lambda net, h: h * (2 if h.data_ptr() == h.clone().data_ptr() else 3),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", MEMORY)
def test_where_values_lie_is_no_matter(name, verify):
    with torch.no_grad():
        assert cut(MEMORY[name], verify) == 0.5


@pytest.mark.parametrize("verify", [False, True])
def test_data_that_is_exchanged_carries_its_labels(verify):
    assert cut(set_data, verify) == 0.5


def test_the_control():
    assert cut(lambda net, h: h / 3, True) == 0.5


# Uses that no Python method of a number sees: the cut code, run without values, tells.
UNSEEN = {
    "product of a shape": lambda net, h: h / h.shape[1:].numel(),
    "numpy's product": lambda net, h: h / float(np.prod(h.shape[1:])),
    "logarithm": lambda net, h: h * math.log2(read(h)),
    "root": lambda net, h: h * math.isqrt(read(h)),
    "divisor": lambda net, h: h / math.gcd(read(h), 16),
    "loop": lambda net, h: [h := h * 1.1 for _ in range(read(h) // 4)][-1],
    "list": lambda net, h: h * len([0] * read(h)),
    "a mean": lambda net, h: h * statistics.mean([read(h), 4]),
    "a number of its kind": lambda net, h: h * type(read(h))(read(h)),
    "a threshold that few entries meet": lambda net, h: F.threshold(h, 1e-3 / read(h), 0.0),
    "a bound that few entries meet": lambda net, h: h.clamp(max=10.0 * read(h)),
    "a slope that few entries meet": lambda net, h: F.leaky_relu(h + 1e-3, 1 / read(h)),
    "decimal": lambda net, h: h * float(decimal.Decimal(read(h))),
    "loop over an attribute": lambda net, h: [h := h + 1 for _ in range(net.up.out_features)][-1],
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", UNSEEN)
def test_a_factor_that_no_one_saw_keeps_its_axis_whole(name, verify):
    assert cut(UNSEEN[name], verify) == 1.0


def halves(count):
    return lambda net, h: torch.cat(h.split(count(read(h)), 1)[::-1], 1)


# Plain numbers which the code makes of sizes again whenever it runs: right of the cut axis by themselves.
FOLLOW = {
    "int": halves(lambda c: int(c // 2)),
    "true division": halves(lambda c: int(c / 2)),
    "shift": halves(lambda c: c >> 1),
    "floor": halves(lambda c: math.floor(c / 2)),
    "round": halves(lambda c: round(c * 0.5)),
    "divmod": halves(lambda c: divmod(c, 2)[0]),
    "numpy": halves(lambda c: int(np.ceil(c / 2))),
    "text": halves(lambda c: int(f"{c}") // 2),
    "list": halves(lambda c: len([0] * c) // 2),
    "view": lambda net, h: h.view(len(h), 4, int(read(h) / 4)).transpose(1, 2).reshape(h.shape),
    "shape as plain numbers": lambda net, h: h.view(*map(int, h.shape)) * 2,
    "product": lambda net, h: h.view(len(h), int(np.prod(h.shape[1:]))),
    "zeros": lambda net, h: h + torch.zeros(len(h), int(read(h)), dtype=h.dtype),
    "share": lambda net, h: torch.cat([h[:, : read(h) // 4] * 2, h[:, read(h) // 4 :]], 1),
    "two shares": lambda net, h: torch.cat([h[:, read(h) // 2 :], h[:, : read(h) // 2]], 1),
    "share of a split": lambda net, h: mix(h.split([read(h) // 4, read(h) - read(h) // 4], 1)),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", FOLLOW)
def test_what_the_code_gets_right_by_itself_goes(name, verify):
    assert cut(FOLLOW[name], verify) == 0.5


@functools.lru_cache
def recipe(shape, parts):
    return (*shape[:1], parts, shape[1] // parts)


class Cached(nn.Module):
    """Two equal blocks that ask one cache for the shapes they want."""

    def __init__(self):
        super().__init__()
        self.up, self.parts = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)]), 4
        self.down = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            h = up(x)
            x = x + down(h.view(recipe(h.shape, self.parts)).relu().flatten(1))
        return x


def test_what_a_cache_holds_does_not_matter():
    net = Cached().eval()
    recipe.cache_clear()
    cold = graphprune.shrink(net, X.float(), 0.5, return_plan=True)[1]
    assert {type(size) for size in recipe(X.shape[:1] + (16,), 4)} == {int}  # nothing of the run is left in it
    net(X.float())
    warm = graphprune.shrink(net, X.float(), 0.5, return_plan=True)[1]
    assert cold.cuts == warm.cuts and {f"{name}.{i}.weight" for name in ("up", "down") for i in (0, 1)} <= set(cold.cuts)


@torch.library.custom_op("graphprune_tests::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


@turned.register_fake
def _(x):
    return torch.empty_like(x)


class Two(nn.Module):
    """Two branches, of which one makes a call whose rule is wrong."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(8, 12), nn.Linear(12, 4)
        self.mixed = nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.mixed(turned(self.a(x)).relu() + self.a(x)).relu()) + self.d(self.c(x).relu())


def test_a_plan_that_proves_wrong_is_taken_apart():
    graphprune.rule(torch.ops.graphprune_tests.turned)(lambda x: graphprune.expr("b c -> b c", x))
    torch.manual_seed(0)
    net = Two().double().eval()
    small, plan = graphprune.shrink(net, X, 0.5, criterion=graphprune.scores.random.with_(seed=0), return_plan=True)
    assert (small.a.out_features, small.c.out_features, small.mixed.out_features) == (16, 6, 8)
    assert any("turned" in note and "computes something else" in note for note in plan.notes)
    with torch.no_grad():
        assert torch.allclose(small(X), masked(net, plan)(X), atol=1e-9)


class HeadsOfAWholeWidth(nn.Module):
    """Attention whose heads are as wide as the width that comes in (which is the model's input, and stays) divided by their number."""

    def __init__(self, how, width=12, heads=3):
        super().__init__()
        self.how, self.heads, self.qkv = how, heads, nn.Linear(width, 3 * width)
        self.out, self.up, self.down, self.head = nn.Linear(width, width), nn.Linear(width, 20), nn.Linear(20, width), nn.Linear(width, 2)

    def forward(self, x):
        b, n, c = x.shape
        if self.how == "divided":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.how == "cut":
            q, k, v = (part.view(b, n, -1, c // self.heads).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        else:
            q, k, v = (torch.stack(part.split(int(c / self.heads), -1), 1) for part in self.qkv(x).split(c, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        y = x + self.out(y)
        return self.head(y + self.down(self.up(y).relu()))


@pytest.mark.parametrize("how", ["divided", "cut", "split"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_number_of_heads_stays_where_the_width_it_divides_does(how, verify):
    """Only what is around goes then; the control: between layers whose width may go, heads go too."""
    torch.manual_seed(0)
    net, x = HeadsOfAWholeWidth(how).double().eval(), torch.randn(2, 5, 12, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, return_plan=True, verify=verify)
    with torch.no_grad():
        assert torch.allclose(small(x), graphprune.zeroed(net, plan)(x)[0], atol=1e-10)
    assert small.up.out_features == 10
    if how != "split":  # whose number of parts is as fixed as the width
        free, y = nn.Sequential(nn.Linear(7, 12), HeadsOfAWholeWidth(how)).double().eval(), torch.randn(2, 5, 7, dtype=torch.float64)
        assert graphprune.shrink(free, y, verify=verify)[1].qkv.out_features < 36
