"""Constructs beyond those of networks.py: what people write that a pruning engine trips over. Each maps (batch, c, 4, 4) to the same shape."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from torch import nn


class Pair(nn.Module):
    """Widen, do something, narrow again: what subclasses do happens on (batch, 2 * mid, 4, 4), after a ReLU."""

    def __init__(self, c, mid):
        super().__init__()
        self.width = 2 * mid
        self.a, self.b = nn.Conv2d(c, 2 * mid, 1), nn.Conv2d(2 * mid, c, 1)
        self.extra(2 * mid)

    def extra(self, width):
        pass

    def forward(self, x):
        return x + self.b(self.inner(self.a(x).relu()))

    def inner(self, y):
        return y


# -- sizes -------------------------------------------------------------------------------------------------------------------------


class IntView(Pair):
    def inner(self, y):
        return y.reshape(len(y), int(y.shape[1]), -1).view(y.shape)


class Shifted(Pair):
    def inner(self, y):
        half = y.size(1) >> 1
        return torch.cat([y[:, half:], y[:, :half]], 1)


class Divided(Pair):
    def inner(self, y):
        half = int(y.size(1) / 2)
        return torch.cat([y[:, :half] * 2, y[:, half:]], 1)


class Negative(Pair):
    def inner(self, y):
        half = y.shape[1] // 2
        return torch.cat([y[:, -half:], y[:, :-half].sigmoid()], 1)


class Divmod(Pair):
    def inner(self, y):
        count, rest = divmod(y.shape[1], 2)
        return y.view(len(y), count, 2 + rest, *y.shape[2:]).flatten(1, 2)


class Lengths(Pair):
    def inner(self, y):
        return y * len(self.a.weight) ** -0.5


class Numel(Pair):
    def inner(self, y):
        return y / math.sqrt(y[0, :, 0, 0].numel())


class Ranged(Pair):
    def inner(self, y):
        return torch.stack([y[:, i] * 2 for i in range(y.shape[1])], 1)


class Steps(Pair):
    def inner(self, y):
        return torch.cat([y[:, ::2], y[:, 1::2].tanh()], 1)


class Alpha(Pair):
    def inner(self, y):
        return torch.add(y, y.sin(), alpha=y.shape[1])


class Filled(Pair):
    def inner(self, y):
        return y + torch.full((1,), float(y.shape[1]), dtype=y.dtype)


class TensorSize(Pair):
    def inner(self, y):
        return y / torch.tensor(y.shape[1], dtype=y.dtype)


class Interpolated(Pair):
    def inner(self, y):
        return F.interpolate(y, scale_factor=2).mean((2, 3), keepdim=True) * F.adaptive_avg_pool2d(y, y.shape[1] // y.shape[1])


class Literal(Pair):
    """A part that is a number in the code is written to."""

    def inner(self, y):
        y = y.clone()
        y[:, :2] = 0
        return y


class LastLiteral(Pair):
    def inner(self, y):
        y = y.clone()
        y[:, -2:] = y[:, -2:] * 3
        return y


class Rolled(Pair):
    def inner(self, y):
        return y.roll(-1, 1) + y.roll(2, 1)


class TensorSplit(Pair):
    def inner(self, y):
        a, b = y.tensor_split(2, 1)
        return torch.cat([b.exp().log1p(), a], 1)


class TemporalShift(Pair):
    def inner(self, y):
        fold = y.shape[1] // 4
        out = torch.zeros_like(y)
        out[:, :fold, 1:] = y[:, :fold, :-1]
        out[:, fold : 2 * fold, :-1] = y[:, fold : 2 * fold, 1:]
        out[:, 2 * fold :] = y[:, 2 * fold :]
        return out


class Keyed(Pair):
    """A table of functions keyed by a width."""

    def extra(self, width):
        self.table = {width: torch.relu}

    def inner(self, y):
        return self.table.get(y.shape[1], torch.relu)(y)


@functools.lru_cache
def recipe(width, parts):
    return width // parts, parts


class Cached(Pair):
    """A recipe from a cache that is keyed by sizes."""

    def inner(self, y):
        size, parts = recipe(y.shape[1], 2)
        return y.view(len(y), parts, size, *y.shape[2:]).flip(1).flatten(1, 2)


class Named(Pair):
    def inner(self, y):
        return y * {str(y.shape[1]): 2.0}.get(f"{y.shape[1]}", 2.0)


# -- values ------------------------------------------------------------------------------------------------------------------------


class ThroughNumpy(Pair):
    def inner(self, y):
        return y + torch.from_numpy(y.detach().numpy().copy() * 0.5)


class ThroughList(Pair):
    def inner(self, y):
        return y * torch.tensor(y.detach().mean((0, 2, 3)).tolist(), dtype=y.dtype).view(1, -1, 1, 1)


class Branch(Pair):
    def inner(self, y):
        return y * 2 if float(y.detach().sum()) > -1e9 else y[:, :1]


class InPlace(Pair):
    def inner(self, y):
        return y.sub_(0.1).mul_(2)


class Data(Pair):
    def extra(self, width):
        self.gain = nn.Parameter(torch.ones(width, 1, 1))

    def inner(self, y):
        return y * self.gain.data.clone().clamp_(min=0.5)


# -- operations --------------------------------------------------------------------------------------------------------------------


class MaskedAssignment(Pair):
    def inner(self, y):
        y = y.clone()
        y[y > 0.3] = 0.3
        return y


class MaskedFill(Pair):
    def inner(self, y):
        return y.masked_fill(y > 0.5, 0.5)


class Scattered(Pair):
    def inner(self, y):
        flat = y.flatten(2)
        index = torch.arange(flat.shape[2]).flip(0).expand_as(flat)
        return torch.zeros_like(flat).scatter_add(2, index, flat).view(y.shape)


class IndexAdded(Pair):
    def inner(self, y):
        flat = y.flatten(2)
        return torch.zeros_like(flat).index_add(2, torch.arange(flat.shape[2]) // 2, flat).view(y.shape)


class IndexCopied(Pair):
    def inner(self, y):
        flat = y.flatten(2)
        return flat.clone().index_copy(2, torch.tensor([0, 1]), flat[:, :, 2:4] * 2).view(y.shape)


class Unpooled(Pair):
    def inner(self, y):
        small, index = F.max_pool2d(y, 2, return_indices=True)
        return F.max_unpool2d(small, index, 2)


class Sliding(Pair):
    def inner(self, y):
        return F.pad(y, (1, 1)).unfold(3, 3, 1).sum(-1)


class LogCumSum(Pair):
    def inner(self, y):
        return y.flatten(2).logcumsumexp(2).view(y.shape)


class Median(Pair):
    def inner(self, y):
        return y - y.flatten(2).median(2)[0][..., None, None]


class Glu(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 2 * mid, 1), nn.Conv2d(mid, c, 1)

    def forward(self, x):
        return x + self.b(F.glu(self.a(x), 1))


class Distances(nn.Module):
    """Attention by distances of tokens."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.v, self.o = nn.Linear(c, mid), nn.Linear(c, mid), nn.Linear(mid, c)

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        near = torch.cdist(self.a(y), self.a(y) + 0.1).neg().softmax(-1)
        return x + self.o(near @ self.v(y)).transpose(1, 2).reshape(x.shape)


class Triangle(nn.Module):
    """Causal mixing of tokens by a masked weight."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.o, self.mix = nn.Linear(c, mid), nn.Linear(mid, c), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        y = self.mix.tril() @ self.a(x.flatten(2).transpose(1, 2))
        return x + self.o(y).transpose(1, 2).reshape(x.shape)


class Reordered(Pair):
    """An order that is computed from a buffer, and undone."""

    def extra(self, width):
        self.register_buffer("order", torch.randperm(width))

    def inner(self, y):
        return y[:, self.order].sin()[:, self.order.argsort()]


class Listed(Pair):
    def inner(self, y):
        return y + y[:, [0, 1]].sum(1, keepdim=True)


class Complex(nn.Module):
    """A spectral convolution: complex weights on the lowest frequencies."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b, self.w = nn.Conv2d(c, mid, 1), nn.Conv2d(mid, c, 1), nn.Parameter(torch.randn(mid, mid, 2, 2, 2))

    def forward(self, x):
        y = torch.fft.rfft2(self.a(x))
        low = torch.einsum("bixy,ioxy->boxy", y[:, :, :2, :2], torch.view_as_complex(self.w.contiguous()))
        out = torch.zeros(len(y), self.w.shape[1], *y.shape[2:], dtype=y.dtype)
        out[:, :, :2, :2] = low
        return x + self.b(torch.fft.irfft2(out, s=x.shape[2:]))


# -- weights that are made ---------------------------------------------------------------------------------------------------------


class OldWeightNorm(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.a, self.b = nn.utils.weight_norm(nn.Conv2d(c, mid, 3, padding=1)), nn.utils.weight_norm(nn.Conv2d(mid, c, 1))

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class NewWeightNorm(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.a, self.b = norm(nn.Conv2d(c, mid, 3, padding=1)), norm(nn.Conv2d(mid, c, 1))

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Spectral(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.a, self.b = norm(nn.Conv2d(c, mid, 3, padding=1)), norm(nn.Conv2d(mid, c, 1))

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Exponential(nn.Module):
    def forward(self, w):
        return w.exp() - 1


class Parametrised(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, mid, 1), nn.Conv2d(mid, c, 1)
        nn.utils.parametrize.register_parametrization(self.a, "weight", Exponential())

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Dynamic(nn.Module):
    """Weights of a convolution mixed from experts by the input (one mixture for the batch)."""

    def __init__(self, c, mid):
        super().__init__()
        self.bank, self.route, self.b = nn.Parameter(torch.randn(3, mid, c, 1, 1)), nn.Linear(c, 3), nn.Conv2d(mid, c, 1)

    def forward(self, x):
        share = self.route(x.mean((0, 2, 3))).softmax(-1)
        return x + self.b(F.conv2d(x, (share.view(-1, 1, 1, 1, 1) * self.bank).sum(0)).relu())


class Modulated(nn.Module):
    """Weights scaled by the input and normalised: demodulation."""

    def __init__(self, c, mid):
        super().__init__()
        self.style, self.w, self.b = nn.Linear(c, c), nn.Parameter(torch.randn(mid, c, 3, 3)), nn.Conv2d(mid, c, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        weight = self.w[None] * self.style(x.mean((2, 3))).view(b, 1, c, 1, 1)
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-4).rsqrt()
        y = F.conv2d(x.reshape(1, b * c, h, w), weight.flatten(0, 1), padding=1, groups=b).view(b, -1, h, w)
        return x + self.b(y.relu())


# -- norms and statistics ----------------------------------------------------------------------------------------------------------


class BareInstance(Pair):
    def extra(self, width):
        self.n = nn.InstanceNorm2d(width)

    def inner(self, y):
        return self.n(y)


class Pooled(Pair):
    """Spatial attention from statistics over channels."""

    def extra(self, width):
        self.s = nn.Conv2d(2, 1, 3, padding=1)

    def inner(self, y):
        return y * self.s(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)).sigmoid()


class ChannelSoftmax(Pair):
    def inner(self, y):
        return y * y.mean((2, 3), keepdim=True).softmax(1)


class Cosine(Pair):
    def inner(self, y):
        return F.normalize(y, dim=1)


class Response(Pair):
    def inner(self, y):
        return F.local_response_norm(y, 3)


class GlobalResponse(Pair):
    """GRN: every channel by its share of the mean norm."""

    def extra(self, width):
        self.gamma = nn.Parameter(torch.randn(width, 1, 1))

    def inner(self, y):
        norm = y.norm(dim=(2, 3), keepdim=True)
        return y + self.gamma * y * norm / (norm.mean(1, keepdim=True) + 1e-6)


# -- tokens, tables, state ---------------------------------------------------------------------------------------------------------


class Registers(nn.Module):
    """Learnt tokens beside those of the image, dropped again."""

    def __init__(self, c, mid):
        super().__init__()
        self.extra, self.up, self.qkv, self.o = nn.Parameter(torch.randn(1, 3, mid)), nn.Linear(c, mid), nn.Linear(mid, 3 * mid), nn.Linear(mid, c)

    def forward(self, x):
        y = torch.cat([self.extra.expand(len(x), -1, -1), self.up(x.flatten(2).transpose(1, 2))], 1)
        q, k, v = self.qkv(y).chunk(3, -1)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return x + self.o(y[:, 3:]).transpose(1, 2).reshape(x.shape)


class Positions(nn.Module):
    """A table with more positions than the example uses, read by a buffer."""

    def __init__(self, c, mid):
        super().__init__()
        self.up, self.table, self.o = nn.Linear(c, mid), nn.Embedding(32, mid), nn.Linear(mid, c)
        self.register_buffer("ids", torch.arange(32))

    def forward(self, x):
        y = self.up(x.flatten(2).transpose(1, 2))
        return x + self.o((y + self.table(self.ids[: y.shape[1]])).relu()).transpose(1, 2).reshape(x.shape)


class Memory(nn.Module):
    """Attention over a bank of learnt slots."""

    def __init__(self, c, mid):
        super().__init__()
        self.q, self.keys, self.values, self.o = nn.Linear(c, mid), nn.Parameter(torch.randn(5, mid)), nn.Parameter(torch.randn(5, mid)), nn.Linear(mid, c)

    def forward(self, x):
        share = (self.q(x.flatten(2).transpose(1, 2)) @ self.keys.T).softmax(-1)
        return x + self.o(share @ self.values).transpose(1, 2).reshape(x.shape)


class Coordinates(nn.Module):
    """A small network on a fixed table of coordinates makes biases of heads."""

    def __init__(self, c, mid):
        super().__init__()
        self.heads, self.qkv, self.o = 2, nn.Linear(c, 6 * mid), nn.Linear(2 * mid, c)
        self.mlp = nn.Sequential(nn.Linear(2, 2 * mid), nn.ReLU(), nn.Linear(2 * mid, 2))
        grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).view(16, 2)
        self.register_buffer("table", grid[:, None] - grid[None])

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).view(b, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        share = (q @ k.transpose(-2, -1) + self.mlp(self.table.to(x.dtype)).permute(2, 0, 1)).softmax(-1)
        return x + self.o((share @ v).transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


class Experts(nn.Module):
    """A dense mixture: two of four experts per token."""

    def __init__(self, c, mid):
        super().__init__()
        self.route, self.up, self.down = nn.Linear(c, 4), nn.Parameter(torch.randn(4, c, mid) * 0.3), nn.Parameter(torch.randn(4, mid, c) * 0.3)

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        top, index = self.route(y).softmax(-1).topk(2, -1)
        share = torch.zeros(*y.shape[:2], 4, dtype=y.dtype).scatter(-1, index, top)
        each = torch.einsum("ekc,bnek->bnec", self.down, torch.einsum("eck,bnc->bnek", self.up, y).relu())
        return x + (each * share[..., None]).sum(2).transpose(1, 2).reshape(x.shape)


class Cells(nn.Module):
    """A convolutional recurrent cell run over rows."""

    def __init__(self, c, mid):
        super().__init__()
        self.mid, self.gates, self.o = mid, nn.Conv1d(c + mid, 2 * mid, 1), nn.Conv1d(mid, c, 1)

    def forward(self, x):
        state, rows = x.new_zeros(len(x), self.mid, x.shape[3]), []
        for row in x.unbind(2):
            keep, new = self.gates(torch.cat([row, state], 1)).chunk(2, 1)
            state = keep.sigmoid() * state + (1 - keep.sigmoid()) * new.tanh()
            rows.append(self.o(state))
        return x + torch.stack(rows, 2)


class LinearAttention(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.heads, self.qkv, self.o = 2, nn.Conv2d(c, 6 * mid, 1), nn.Conv2d(2 * mid, c, 1)

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = (part.reshape(b, self.heads, -1, h * w) for part in self.qkv(x).chunk(3, 1))
        context = k.softmax(-1) @ v.transpose(-2, -1)
        return x + self.o((context.transpose(-2, -1) @ q.sigmoid()).reshape(b, -1, h, w))


class OneKey(nn.Module):
    """Several query heads over one head of keys and values, parts of one projection by attribute sizes."""

    def __init__(self, c, mid):
        super().__init__()
        self.config = SimpleNamespace(heads=2, size=mid)
        self.qkv, self.o = nn.Linear(c, 4 * mid), nn.Linear(2 * mid, c)

    def forward(self, x):
        y = self.qkv(x.flatten(2).transpose(1, 2))
        at = self.config.heads * self.config.size
        q, k, v = y[..., :at], y[..., at : at + self.config.size], y[..., at + self.config.size :]
        q = q.view(*q.shape[:2], self.config.heads, self.config.size).transpose(1, 2)
        share = (q * 0.4 @ k[:, None].transpose(-2, -1)).softmax(-1)
        return x + self.o((share @ v[:, None]).transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


class Focus(nn.Module):
    """Space to depth by slices."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(c, mid, 1), nn.Conv2d(4 * mid, 2 * mid, 1), nn.ConvTranspose2d(2 * mid, c, 2, 2)

    def forward(self, x):
        y = self.a(x)
        return x + self.c(self.b(torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]], 1)).relu())


class Partial(Pair):
    """A convolution on a quarter of the channels."""

    def extra(self, width):
        self.part = width // 4
        self.p = nn.Conv2d(self.part, self.part, 3, padding=1)

    def inner(self, y):
        a, b = y.split([self.part, self.width - self.part], 1)
        return torch.cat([self.p(a), b], 1)


class Detour(Pair):
    """A branch that training takes."""

    def inner(self, y):
        return F.dropout(y, 0.5) * 0.5 if self.training else y


class Kept(Pair):
    """A running average that the forward pass keeps."""

    def extra(self, width):
        self.register_buffer("average", torch.zeros(width))

    def inner(self, y):
        with torch.no_grad():
            self.average.lerp_(y.mean((0, 2, 3)), 0.1)
        return y - self.average.view(1, -1, 1, 1)


class Gumbel(Pair):
    """A hard choice without noise: the largest channel of each pixel passes."""

    def inner(self, y):
        return y * (y == y.amax((2, 3), keepdim=True)).to(y.dtype)


# -- more ways to write it -----------------------------------------------------------------------------------------------------------


class Rotary(Pair):
    """Halves turned into each other by a fixed angle."""

    def inner(self, y):
        half = y.shape[1] // 2
        a, b = y[:, :half], y[:, half:]
        return torch.cat([a * 0.6 - b * 0.8, b * 0.6 + a * 0.8], 1)


class ComplexPairs(Pair):
    def inner(self, y):
        z = torch.view_as_complex(y.movedim(1, -1).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * (0.6 + 0.8j)).flatten(-2).movedim(-1, 1)


def halves(y):
    return y if y.shape[1] <= 2 else torch.cat([halves(y[:, : y.shape[1] // 2]), halves(y[:, y.shape[1] // 2 :]).sin()], 1)


class Recursed(Pair):
    def inner(self, y):
        return halves(y)


class Zipped(Pair):
    def inner(self, y):
        return torch.cat([a * b for a, b in zip(y.chunk(2, 1), y.chunk(2, 1)[::-1], strict=True)], 1)


class Reduced(Pair):
    def inner(self, y):
        return functools.reduce(torch.maximum, y.split(self.width // 2, 1)).repeat(1, 2, 1, 1)


class Checkpointed(Pair):
    def inner(self, y):
        return torch.utils.checkpoint.checkpoint(torch.tanh, y, use_reentrant=False)


class Mapped(Pair):
    """Each sample by itself."""

    def inner(self, y):
        return torch.func.vmap(lambda one: one * one.sum())(y)


class LiteralBlocks(Pair):
    """A grouped convolution whose number of groups stands in the code."""

    def extra(self, width):
        self.kernel = nn.Parameter(torch.randn(width, width // 2, 1, 1))

    def inner(self, y):
        return F.conv2d(y, self.kernel, groups=2)


class NarrowedFromTheEnd(Pair):
    def inner(self, y):
        return y + y.narrow(1, -1, 1)


class LowRank(Pair):
    """An adapter beside a layer."""

    def extra(self, width):
        self.down, self.up, self.scale = nn.Conv2d(width, 4, 1, bias=False), nn.Conv2d(4, width, 1, bias=False), 8 / 4

    def inner(self, y):
        return y + self.up(self.down(y)) * self.scale


class Generated(Pair):
    """The weights of a product are computed from the input."""

    def extra(self, width):
        self.make = nn.Linear(width, 3 * width)

    def inner(self, y):
        weight = self.make(y.mean((2, 3))).unflatten(1, (3, -1))
        return y * torch.einsum("bchw,bkc->bkhw", y, weight).sum(1, keepdim=True)


class Codes(Pair):
    """The nearest of a book of codes."""

    def extra(self, width):
        self.book = nn.Embedding(5, width)

    def inner(self, y):
        flat = y.flatten(2).transpose(1, 2)
        near = torch.cdist(flat, self.book.weight[None].expand(len(y), -1, -1)).argmin(-1)
        return y + self.book(near).transpose(1, 2).view(y.shape)


class Prototypes(nn.Module):
    """Distances to learnt points, which a layer reads."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.points, self.o = nn.Linear(c, mid), nn.Parameter(torch.randn(6, mid)), nn.Linear(6, c)

    def forward(self, x):
        flat = self.a(x.flatten(2).transpose(1, 2))
        apart = (flat[:, :, None] - self.points).square().sum(-1)
        return x + self.o(apart.neg().exp()).transpose(1, 2).reshape(x.shape)


class Masked(Pair):
    """A fixed mask of channels."""

    def extra(self, width):
        self.register_buffer("open", torch.arange(width) % 3 > 0)

    def inner(self, y):
        return y.masked_fill(~self.open.view(-1, 1, 1), 0)


class Taken(nn.Module):
    """Some channels, by numbers in a buffer."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 2 * mid, 1), nn.Conv2d(mid, c, 1)
        self.register_buffer("taken", torch.randperm(2 * mid)[:mid])

    def forward(self, x):
        return x + self.b(self.a(x).relu()[:, self.taken])


class ListedSizes(Pair):
    def extra(self, width):
        self.sizes = [2, width - 2]

    def inner(self, y):
        a, b = y.split(self.sizes, 1)
        return torch.cat([a.sin(), b.cos() - 1], 1)


class ClassWidths(Pair):
    """Widths in a table of the class."""

    table = {"parts": 2}

    def inner(self, y):
        return y.unflatten(1, (self.table["parts"], -1)).flip(1).flatten(1, 2)


class PrunedWeights(nn.Module):
    """Weights that a mask of torch's own makes before each call."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, mid, 1), nn.Conv2d(mid, c, 1)
        nn.utils.prune.random_unstructured(self.a, "weight", 0.3)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Frequencies(nn.Module):
    """Sines and cosines of fixed random directions, read by a layer."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(10, mid, 1), nn.Conv2d(mid, c, 1)
        self.register_buffer("directions", torch.randn(5, c, 1, 1))

    def forward(self, x):
        turned = F.conv2d(x, self.directions)
        return x + self.b(self.a(torch.cat([turned.sin(), turned.cos()], 1)).relu())


class Grown(nn.Module):
    """A transposed convolution in groups, without a bias: its output axis has a factor of each operand."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(c, 2 * mid, 1), nn.ConvTranspose2d(2 * mid, 4 * mid, 2, 2, groups=2, bias=False), nn.Conv2d(4 * mid, c, 2, 2)

    def forward(self, x):
        return x + self.c(self.b(self.a(x).relu()).relu())


class PaddedShortcut(Pair):
    """A shortcut without weights beside a wider layer: as many zeros before and behind as the code says."""

    def extra(self, width):
        self.wide, self.narrow = nn.Conv2d(width, width + 4, 3, padding=1), nn.Conv2d(width + 4, width, 1)

    def inner(self, y):
        return self.narrow(self.wide(y) + F.pad(y, (0, 0, 0, 0, 2, 2)))


class Picked(Pair):
    """The first and the last channel are picked."""

    def inner(self, y):
        return y * y[:, 0, None].sigmoid() + y[:, -1].tanh()[:, None]


class OneStep(nn.Module):
    """A recurrent layer that is run for one step."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.LSTM(c, mid), nn.Linear(mid, c)

    def forward(self, x):
        return x + self.b(self.a(x.mean((2, 3))[None])[0])[0][:, :, None, None]


CONSTRUCTS = [
    IntView, Shifted, Divided, Negative, Divmod, Lengths, Numel, Ranged, Steps, Alpha, Filled, TensorSize, Interpolated, Literal, LastLiteral, Rolled,
    TensorSplit, TemporalShift, Keyed, Cached, Named, ThroughNumpy, ThroughList, Branch, InPlace, Data, MaskedAssignment, MaskedFill, Scattered,
    IndexAdded, IndexCopied, Unpooled, Sliding, LogCumSum, Median, Glu, Distances, Triangle, Reordered, Listed, Complex, OldWeightNorm, NewWeightNorm,
    Spectral, Parametrised, Dynamic, Modulated, BareInstance, Pooled, ChannelSoftmax, Cosine, Response, GlobalResponse, Registers, Positions, Memory,
    Coordinates, Experts, Cells, LinearAttention, OneKey, Focus, Partial, Detour, Kept, Gumbel,
    Rotary, ComplexPairs, Recursed, Zipped, Reduced, Checkpointed, Mapped, LiteralBlocks,
    NarrowedFromTheEnd, LowRank, Generated, Codes, Prototypes, Masked, Taken, ListedSizes, ClassWidths, PrunedWeights, Frequencies,
    Grown, OneStep, PaddedShortcut, Picked,
]  # fmt: skip
