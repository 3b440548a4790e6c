"""One small network for each hazard of the field: cut equals zeroed in float64, and what cannot be cut is left whole with a reason."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune.errors import NothingToPrune
from graphprune.tracing.record import Recorder
from graphprune.tracing.trace import trace
from graphprune.tracing.trees import tensors

HAZARDS = []
X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
# Where a position, not only a channel, means something, or a softmax runs over the channels: nothing may be removed.
WHOLE = set("Softmax FancyIdx LRN Gram TopK Cumsum MaxIdx DictOut SetItem AdaIN".split())
# Sizes written as numbers, or branches on sizes, hold the stem but not what is beside it.
PARTLY = set("Kron ChunkShift Inplace PadC OptA SplitLit Shuffle CtrlShape CondConv".split())


def hazard(cls):
    HAZARDS.append(cls)
    return cls


class Base(nn.Module):
    """A stem of 16 channels, the hazard, a head of 4."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.build()

    def build(self):
        pass

    def mid(self, x):
        return x

    def forward(self, x):
        return self.head(self.mid(self.stem(x).relu()))


@hazard
class Conv1dFlat(Base):
    def build(self):
        self.c = nn.Conv1d(16, 16, 3, padding=1)

    def mid(self, x):
        return self.c(x.flatten(2)).view(x.shape)


@hazard
class Conv3d(Base):
    def build(self):
        self.c = nn.Conv3d(16, 12, (1, 3, 3), padding=(0, 1, 1))
        self.d = nn.Conv3d(12, 16, 1)

    def mid(self, x):
        return self.d(self.c(x.unsqueeze(2)).relu()).squeeze(2)


@hazard
class DWMult(Base):
    def build(self):
        self.c = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.d = nn.Conv2d(32, 16, 1)

    def mid(self, x):
        return self.d(self.c(x).relu())


@hazard
class TransGrouped(Base):
    def build(self):
        self.c = nn.ConvTranspose2d(16, 32, 3, padding=1, groups=4)
        self.d = nn.Conv2d(32, 16, 1)

    def mid(self, x):
        return self.d(self.c(x).relu())


@hazard
class MHA(Base):
    def build(self):
        self.a = nn.MultiheadAttention(16, 4, batch_first=True)

    def mid(self, x):
        y = x.flatten(2).transpose(1, 2)
        return self.a(y, y, y, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


@hazard
class MHAW(Base):
    def build(self):
        self.a = nn.MultiheadAttention(16, 4)

    def mid(self, x):
        y = x.flatten(2).permute(2, 0, 1)
        return self.a(y, y, y)[0].permute(1, 2, 0).reshape(x.shape)


@hazard
class Einsum(Base):
    def build(self):
        self.q, self.k, self.v, self.o = [nn.Linear(16, 16) for _ in range(4)]

    def mid(self, x):
        b, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        q, k, v = [f(y).view(b, -1, 4, 4) for f in (self.q, self.k, self.v)]
        a = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
        return self.o(torch.einsum("bhqk,bkhd->bqhd", a.softmax(-1), v).reshape(b, h * w, 16)).transpose(1, 2).view(b, c, h, w)


@hazard
class EinsumAttr(Base):
    def build(self):
        self.q, self.k, self.v, self.o = [nn.Linear(16, 16) for _ in range(4)]
        self.h = 4
        self.d = 4

    def mid(self, x):
        b, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        q, k, v = [f(y).view(b, -1, self.h, self.d) for f in (self.q, self.k, self.v)]
        a = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
        return self.o(torch.einsum("bhqk,bkhd->bqhd", a.softmax(-1), v).reshape(b, h * w, -1)).transpose(1, 2).view(b, c, h, w)


@hazard
class GQA(Base):
    def build(self):
        self.q, self.k, self.v, self.o = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)
        self.h, self.kv, self.d = 8, 4, 4

    def mid(self, x):
        b, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        q = self.q(y).view(b, -1, self.h, self.d).transpose(1, 2)
        k = self.k(y).view(b, -1, self.kv, self.d).transpose(1, 2)
        v = self.v(y).view(b, -1, self.kv, self.d).transpose(1, 2)
        k = k.repeat_interleave(self.h // self.kv, 1)
        v = v.repeat_interleave(self.h // self.kv, 1)
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).reshape(b, h * w, -1)).transpose(1, 2).view(b, c, h, w)


@hazard
class FiLM(Base):
    def build(self):
        self.g = nn.Linear(16, 32)

    def mid(self, x):
        a, b = self.g(x.mean((2, 3))).chunk(2, 1)
        return x * (1 + a[:, :, None, None]) + b[:, :, None, None]


@hazard
class SK(Base):
    def build(self):
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 5, padding=2)
        self.f = nn.Linear(16, 8)
        self.g = nn.Linear(8, 32)

    def mid(self, x):
        u = torch.stack([self.a(x), self.b(x)], 1)
        z = self.g(self.f(u.sum(1).mean((2, 3))).relu()).view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return (u * z).sum(1)


@hazard
class WS(Base):
    def build(self):
        self.w = nn.Parameter(torch.randn(16, 16, 3, 3))

    def mid(self, x):
        w = self.w
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, padding=1)


@hazard
class SN(Base):
    def build(self):
        self.c = nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1))

    def mid(self, x):
        return self.c(x)


@hazard
class WN(Base):
    def build(self):
        self.c = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
        self.e = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return self.e(self.c(x).relu())


@hazard
class PlainTensor(Base):
    def build(self):
        self.t = torch.randn(1, 16, 1, 1)

    def mid(self, x):
        return x * self.t


@hazard
class Roll(Base):
    def mid(self, x):
        return x.roll(3, 1)


@hazard
class Flip(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return self.c(x.flip(1)) + x


@hazard
class PadC(Base):
    def build(self):
        self.c = nn.Conv2d(24, 16, 1)

    def mid(self, x):
        return self.c(F.pad(x, (0, 0, 0, 0, 4, 4)))


@hazard
class OptA(Base):
    def build(self):
        self.c = nn.Conv2d(16, 32, 3, 2, 1)
        self.d = nn.Conv2d(32, 16, 1)

    def mid(self, x):
        return self.d((self.c(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))).relu())


@hazard
class IndexSel(Base):
    def build(self):
        self.register_buffer("i", torch.tensor([3, 1, 2, 0, 5, 4, 7, 6, 8, 9, 10, 11, 15, 14, 13, 12]))

    def mid(self, x):
        return x.index_select(1, self.i)


@hazard
class FancyIdx(Base):
    def build(self):
        self.i = [3, 1, 2, 0, 5, 4, 7, 6, 8, 9, 10, 11, 15, 14, 13, 12]

    def mid(self, x):
        return x[:, self.i]


@hazard
class NHWC(Base):
    def build(self):
        self.l = nn.Linear(16 * 64, 16 * 64)

    def mid(self, x):
        return self.l(x.permute(0, 2, 3, 1).flatten(1)).view(x.shape[0], 8, 8, -1).permute(0, 3, 1, 2)


@hazard
class ChanLN(Base):
    def build(self):
        self.n = nn.LayerNorm(16)

    def mid(self, x):
        return self.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@hazard
class RMS(Base):
    def build(self):
        self.n = nn.RMSNorm(16)

    def mid(self, x):
        return self.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@hazard
class ManualRMS(Base):
    def build(self):
        self.w = nn.Parameter(torch.randn(16))

    def mid(self, x):
        y = x.permute(0, 2, 3, 1)
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w).permute(0, 3, 1, 2)


@hazard
class GN(Base):
    def build(self):
        self.n = nn.GroupNorm(4, 16)
        self.m = nn.GroupNorm(1, 16)

    def mid(self, x):
        return self.m(self.n(x).relu())


@hazard
class IN(Base):
    def build(self):
        self.n = nn.InstanceNorm2d(16, affine=True)

    def mid(self, x):
        return self.n(x)


@hazard
class LRN(Base):
    def build(self):
        self.n = nn.LocalResponseNorm(5)

    def mid(self, x):
        return self.n(x)


@hazard
class Shuffle(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.d = nn.Conv2d(16, 16, 1, groups=4)

    def mid(self, x):
        y = self.c(x)
        b, c, h, w = y.shape
        y = y.view(b, 4, c // 4, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.d(y)


@hazard
class ChShuffle(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.sh = nn.ChannelShuffle(4)

    def mid(self, x):
        return self.sh(self.c(x))


@hazard
class PixSh(Base):
    def build(self):
        self.c = nn.Conv2d(16, 64, 1)
        self.p = nn.PixelShuffle(2)
        self.d = nn.Conv2d(16, 16, 2, 2)

    def mid(self, x):
        return self.d(self.p(self.c(x)))


@hazard
class SE(Base):
    def build(self):
        self.a = nn.Conv2d(16, 8, 1)
        self.b = nn.Conv2d(8, 16, 1)

    def mid(self, x):
        return x * self.b(self.a(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


@hazard
class GLU(Base):
    def build(self):
        self.a = nn.Conv2d(16, 32, 1)

    def mid(self, x):
        return F.glu(self.a(x), 1)


@hazard
class Maxout(Base):
    def build(self):
        self.a = nn.Conv2d(16, 32, 1)

    def mid(self, x):
        y = self.a(x)
        return y.view(y.shape[0], -1, 2, 8, 8).amax(2)


@hazard
class Bilinear(Base):
    def build(self):
        self.b = nn.Bilinear(16, 16, 16)

    def mid(self, x):
        y = x.permute(0, 2, 3, 1).contiguous()
        return self.b(y, y).permute(0, 3, 1, 2)


@hazard
class PReLU(Base):
    def build(self):
        self.p = nn.PReLU(16)

    def mid(self, x):
        return self.p(x)


@hazard
class GRU(Base):
    def build(self):
        self.g = nn.GRU(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.o = nn.Linear(24, 16)

    def mid(self, x):
        return self.o(self.g(x.flatten(2).transpose(1, 2))[0]).transpose(1, 2).view(x.shape)


@hazard
class LSTMp(Base):
    def build(self):
        self.g = nn.LSTM(16, 12, num_layers=1, proj_size=6, batch_first=True)
        self.o = nn.Linear(6, 16)

    def mid(self, x):
        return self.o(self.g(x.flatten(2).transpose(1, 2))[0]).transpose(1, 2).view(x.shape)


@hazard
class Cells(Base):
    def build(self):
        self.g = nn.LSTMCell(16, 12)
        self.o = nn.Linear(12, 16)

    def mid(self, x):
        h, c = self.g(x.mean((2, 3)))
        h, c = self.g(x.amax((2, 3)), (h, c))
        return x + self.o(h)[:, :, None, None]


@hazard
class Stack(Base):
    def build(self):
        self.a = nn.Conv2d(16, 16, 1)
        self.b = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return torch.stack([self.a(x), self.b(x)]).mean(0)


@hazard
class SplitList(Base):
    def build(self):
        self.sizes = [4, 6, 6]
        self.a = nn.Conv2d(4, 4, 1)
        self.b = nn.Conv2d(6, 6, 1)

    def mid(self, x):
        a, b, c = x.split(self.sizes, 1)
        return torch.cat([self.a(a), self.b(b), c], 1)


@hazard
class SplitLit(Base):
    def build(self):
        self.a = nn.Conv2d(8, 8, 1)

    def mid(self, x):
        a, b = x.split(8, 1)
        return torch.cat([self.a(a), b], 1)


@hazard
class ViewLit(Base):
    def build(self):
        self.l = nn.Linear(16 * 64, 32)
        self.m = nn.Linear(32, 16)

    def mid(self, x):
        return x + self.m(self.l(x.view(-1, 16 * 64)).relu())[:, :, None, None]


@hazard
class SliceHalf(Base):
    def build(self):
        self.a = nn.Conv2d(8, 16, 1)

    def mid(self, x):
        c = x.shape[1] // 2
        return self.a(x[:, :c]) * torch.cat([x[:, c:], x[:, :c]], 1)


@hazard
class Res2(Base):
    def build(self):
        self.cs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.w = 4

    def mid(self, x):
        xs = torch.split(x, self.w, 1)
        out = [xs[0]]
        y = None
        for i, c in enumerate(self.cs):
            y = xs[i + 1] if y is None else y + xs[i + 1]
            y = c(y)
            out.append(y)
        return torch.cat(out, 1)


@hazard
class CtrlShape(Base):
    def build(self):
        self.a = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return self.a(x) if x.shape[1] > 12 else x


@hazard
class SqrtDim(Base):
    def build(self):
        self.a = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        y = self.a(x)
        return y / math.sqrt(y.shape[1])


@hazard
class Softmax(Base):
    def build(self):
        self.a = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return self.a(x).softmax(1) * x


@hazard
class Norm2(Base):
    def mid(self, x):
        return F.normalize(x, dim=1)


@hazard
class CosSim(Base):
    def build(self):
        self.a = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return x * F.cosine_similarity(x, self.a(x), dim=1).unsqueeze(1)


@hazard
class Gram(Base):
    def build(self):
        self.l = nn.Linear(256, 16)

    def mid(self, x):
        f = x.flatten(2)
        g = f @ f.transpose(1, 2)
        return x * self.l(g.flatten(1))[:, :, None, None]


@hazard
class TopK(Base):
    def mid(self, x):
        return x * (x >= x.topk(4, 1).values[:, -1:]).to(x.dtype)


@hazard
class Cumsum(Base):
    def mid(self, x):
        return x.cumsum(1)


@hazard
class MaxIdx(Base):
    def mid(self, x):
        return x + x.argmax(1, keepdim=True).to(x.dtype)


@hazard
class Unfold(Base):
    def build(self):
        self.c = nn.Conv2d(16 * 9, 16, 1)

    def mid(self, x):
        return self.c(F.unfold(x, 3, padding=1).view(x.shape[0], -1, 8, 8))


@hazard
class Deform(Base):
    def build(self):
        self.o = nn.Conv2d(16, 2, 1)

    def mid(self, x):
        g = self.o(x).permute(0, 2, 3, 1).tanh()
        return F.grid_sample(x, g, align_corners=False)


@hazard
class Tied(Base):
    def build(self):
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.b.weight = self.a.weight

    def mid(self, x):
        return self.b(self.a(x).relu())


@hazard
class TransposedTied(Base):
    def build(self):
        self.a = nn.Linear(16, 24)

    def mid(self, x):
        y = self.a(x.permute(0, 2, 3, 1)).relu()
        return F.linear(y, self.a.weight.t()).permute(0, 3, 1, 2)


@hazard
class DictOut(Base):
    def forward(self, x):
        y = self.stem(x).relu()
        return {"a": self.head(y), "b": [y.mean((2, 3))]}


@hazard
class ParamOutside(Base):
    def build(self):
        self.w = nn.ParameterList([nn.Parameter(torch.randn(16, 16)) for _ in range(2)])

    def mid(self, x):
        for w in self.w:
            x = torch.einsum("oi,bihw->bohw", w, x).relu()
        return x


@hazard
class CondConv(Base):
    def build(self):
        self.r = nn.Linear(16, 3)
        self.w = nn.Parameter(torch.randn(3, 16, 16, 3, 3))

    def mid(self, x):
        b, c, h, w = x.shape
        r = self.r(x.mean((2, 3))).sigmoid()
        k = (r @ self.w.flatten(1)).view(-1, *self.w.shape[2:])
        return F.conv2d(x.reshape(1, b * c, h, w), k.reshape(b * self.w.shape[1], c, 3, 3), padding=1, groups=b).view(b, -1, h, w)


@hazard
class LayerScale(Base):
    def build(self):
        self.g = nn.Parameter(torch.randn(16))
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return x + self.g.view(1, -1, 1, 1) * self.c(x)


@hazard
class BN1dFlat(Base):
    def build(self):
        self.n = nn.BatchNorm1d(16 * 64)

    def mid(self, x):
        return self.n(x.flatten(1)).view(x.shape)


@hazard
class Window(Base):
    def build(self):
        self.q = nn.Linear(16, 48)
        self.o = nn.Linear(16, 16)
        self.h = 4
        self.t = nn.Parameter(torch.randn(49, 4))
        self.register_buffer("i", torch.randint(0, 49, (16, 16)))

    def mid(self, x):
        b, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).view(b, 2, 4, 2, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.q(y).reshape(y.shape[0], 16, 3, self.h, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1)) * 0.5 + self.t[self.i.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        y = self.o((a.softmax(-1) @ v).transpose(1, 2).reshape(y.shape[0], 16, -1))
        return y.view(b, 2, 2, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1).permute(0, 3, 1, 2)


@hazard
class Rotary(Base):
    def build(self):
        self.q, self.k, self.v, self.o = [nn.Linear(16, 16) for _ in range(4)]
        self.h, self.d = 4, 4
        self.register_buffer("f", torch.randn(64, 4))

    def mid(self, x):
        b, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        q, k, v = [f(y).view(b, -1, self.h, self.d).transpose(1, 2) for f in (self.q, self.k, self.v)]

        def rot(t):
            a, bb = t.chunk(2, -1)
            return t * self.f.cos() + torch.cat([-bb, a], -1) * self.f.sin()

        return self.o(F.scaled_dot_product_attention(rot(q), rot(k), v).transpose(1, 2).reshape(b, h * w, -1)).transpose(1, 2).view(b, c, h, w)


@hazard
class Involution(Base):
    def build(self):
        self.k = nn.Conv2d(16, 4 * 9, 1)
        self.g = 4

    def mid(self, x):
        b, c, h, w = x.shape
        k = self.k(x).view(b, self.g, 1, 9, h, w)
        u = F.unfold(x, 3, padding=1).view(b, self.g, c // self.g, 9, h, w)
        return (k * u).sum(3).view(b, c, h, w)


@hazard
class Inplace(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        y = self.c(x)
        y += x
        y[:, :4] = y[:, :4] * 2
        return y.relu_()


@hazard
class SetItem(Base):
    def mid(self, x):
        y = torch.zeros_like(x)
        y[:, :8] = x[:, 8:]
        y[:, 8:] = x[:, :8]
        return y


@hazard
class ChunkShift(Base):
    def mid(self, x):
        y = torch.zeros_like(x)
        y[:, :4, 1:] = x[:, :4, :-1]
        y[:, 4:8, :-1] = x[:, 4:8, 1:]
        y[:, 8:] = x[:, 8:]
        return y


@hazard
class Outer(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        a = x.mean((2, 3))
        return x + self.c((a[:, :, None] * a[:, None, :]).sum(2)[:, :, None, None])


@hazard
class Kron(Base):
    def build(self):
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)

    def mid(self, x):
        y = x.permute(0, 2, 3, 1).unflatten(-1, (4, 4))
        return torch.kron(self.a.weight, self.b.weight).matmul(y.flatten(-2).unsqueeze(-1)).squeeze(-1).permute(0, 3, 1, 2)


@hazard
class AdaIN(Base):
    def build(self):
        self.f = nn.Linear(16, 32)

    def mid(self, x):
        st = self.f(x.amax((2, 3)))
        a, b = st[:, :16], st[:, 16:]
        n = F.instance_norm(x)
        return n * a[:, :, None, None] + b[:, :, None, None]


@hazard
class SlicesOut(Base):
    def build(self):
        self.c = nn.Conv2d(16, 32, 1)

    def mid(self, x):
        y = self.c(x)
        return y[:, 0::2] + y[:, 1::2]


@hazard
class MoE(Base):
    def build(self):
        self.g = nn.Linear(16, 4)
        self.e = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4))

    def mid(self, x):
        y = x.permute(0, 2, 3, 1)
        g = self.g(y).softmax(-1)
        return sum(g[..., i : i + 1] * e(y) for i, e in enumerate(self.e)).permute(0, 3, 1, 2)


@hazard
class MoEb(Base):
    def build(self):
        self.g = nn.Linear(16, 4)
        self.w1 = nn.Parameter(torch.randn(4, 16, 24) * 0.2)
        self.w2 = nn.Parameter(torch.randn(4, 24, 16) * 0.2)

    def mid(self, x):
        y = x.permute(0, 2, 3, 1).flatten(0, 2)
        g = self.g(y).softmax(-1)
        z = torch.bmm(torch.bmm(y.unsqueeze(0).expand(4, -1, -1), self.w1).relu(), self.w2)
        z = (z * g.t().unsqueeze(-1)).sum(0)
        return z.view(x.shape[0], 8, 8, -1).permute(0, 3, 1, 2)


@hazard
class CfgObj(Base):
    def build(self):
        from types import SimpleNamespace

        self.config = SimpleNamespace(heads=4, dim=4)
        self.q, self.k, self.v, self.o = [nn.Linear(16, 16) for _ in range(4)]

    def mid(self, x):
        b, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        n = self.config.heads
        q, k, v = [f(y).view(b, -1, n, self.config.dim).transpose(1, 2) for f in (self.q, self.k, self.v)]
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).reshape(b, h * w, -1)).transpose(1, 2).view(b, c, h, w)


@hazard
class TEL(Base):
    def build(self):
        self.t = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def mid(self, x):
        return self.t(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


@hazard
class TDL(Base):
    def build(self):
        self.t = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)

    def mid(self, x):
        y = x.flatten(2).transpose(1, 2)
        return self.t(y, y * 2).transpose(1, 2).reshape(x.shape)


@hazard
class LinAttn(Base):
    def build(self):
        self.qkv = nn.Conv2d(16, 48, 1)
        self.o = nn.Conv2d(16, 16, 1)
        self.h = 4

    def mid(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, 3, self.h, -1, h * w).unbind(1)
        k = k.softmax(-1)
        ctx = k @ v.transpose(-2, -1)
        o = ctx.transpose(-2, -1) @ q
        return self.o(o.reshape(b, -1, h, w))


@hazard
class ChAttn(Base):
    def build(self):
        self.qkv = nn.Linear(16, 48)
        self.o = nn.Linear(16, 16)
        self.h = 4
        self.t = nn.Parameter(torch.ones(4, 1, 1))

    def mid(self, x):
        y = x.flatten(2).transpose(1, 2)
        b, n, c = y.shape
        q, k, v = self.qkv(y).reshape(b, n, 3, self.h, c // self.h).permute(2, 0, 3, 4, 1)
        a = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.t).softmax(-1)
        return self.o((a @ v).permute(0, 3, 1, 2).reshape(b, n, c)).transpose(1, 2).view(x.shape)


@hazard
class EmbBag(Base):
    def build(self):
        self.e = nn.Embedding(10, 16)

    def mid(self, x):
        return x * self.e(torch.arange(3)).mean(0)[:, None, None]


@hazard
class PosEmb(Base):
    def build(self):
        self.p = nn.Parameter(torch.randn(1, 16, 8, 8))
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.l = nn.Linear(16, 16)

    def mid(self, x):
        y = (x + self.p).flatten(2).transpose(1, 2)
        y = torch.cat([self.cls.expand(y.shape[0], -1, -1), y], 1)
        y = self.l(y)[:, 1:]
        return y.transpose(1, 2).reshape(x.shape)


@hazard
class Interp(Base):
    def mid(self, x):
        return F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear")


@hazard
class Where(Base):
    def mid(self, x):
        return torch.where(x > 0.5, x, torch.zeros_like(x)) + torch.where(x > 0.5, x, 0.25)


@hazard
class MaskFill(Base):
    def mid(self, x):
        return x.masked_fill(x < 0.3, 0.0)


@hazard
class Drop(Base):
    def build(self):
        self.d = nn.Dropout2d(0.5)
        self.a = nn.AlphaDropout(0.5)

    def mid(self, x):
        return self.a(self.d(x))


@hazard
class Ckpt(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.c, x, use_reentrant=False)


@hazard
class Fft(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return self.c(torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]))


@hazard
class ComplexW(Base):
    def build(self):
        self.w = nn.Parameter(torch.randn(16, 8, 5, 2))
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        return self.c(torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.w), s=x.shape[-2:]))


@hazard
class Custom(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        class Sw(torch.autograd.Function):
            @staticmethod
            def forward(ctx, i):
                return i * i.sigmoid()

            @staticmethod
            def backward(ctx, g):
                return g

        return self.c(Sw.apply(x))


@hazard
class Checker(Base):
    def build(self):
        self.c = nn.Conv2d(16, 16, 1)

    def mid(self, x):
        assert x.shape[1] == self.c.in_channels
        return self.c(x)


def drawn(cls):
    torch.manual_seed(0)
    net = cls().double().eval()
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return net


@pytest.mark.parametrize("cls", [c for c in HAZARDS if c.__name__ not in WHOLE], ids=lambda c: c.__name__)
@torch.no_grad()
def test_cut_equals_zeroed(cls):
    net = drawn(cls)
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True, rewrite=False)
    count = [sum(p.numel() for p in m.parameters()) for m in (net, small)]
    assert count[0] / count[1] > (1.04 if cls.__name__ in PARTLY else 1.4)
    assert type(small) is cls
    for mine, theirs in zip(tensors(small(Y), torch.Tensor), graphprune.zeroed(net, plan)(Y), strict=True):
        assert float((mine - theirs).abs().max()) < 1e-9 * float(theirs.abs().max())
    for mine, theirs in zip(tensors(small(Y), torch.Tensor), tensors(net(Y), torch.Tensor), strict=True):
        assert float((mine - theirs).abs().max()) > 1e-6  # the control: something was really removed


@pytest.mark.parametrize("cls", [c for c in HAZARDS if c.__name__ in WHOLE], ids=lambda c: c.__name__)
def test_what_cannot_be_cut_stays_whole_with_a_reason(cls):
    with pytest.raises(NothingToPrune, match="stem.weight axis"):
        graphprune.shrink(drawn(cls), X, 0.5, rewrite=False)


@pytest.mark.parametrize("cls", [c for c in HAZARDS if c.__name__ in WHOLE | PARTLY | {"Einsum"}], ids=lambda c: c.__name__)
@torch.no_grad()
def test_with_rewritten_code_the_cut_still_equals_zeroed(cls):
    """On another batch than the one that was checked; what stays whole says so."""
    net = drawn(cls)
    try:
        small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    except NothingToPrune:
        return
    for mine, theirs in zip(tensors(small(Y), torch.Tensor), graphprune.zeroed(net, plan)(Y), strict=True):
        assert float((mine - theirs).abs().max()) < 1e-9 * float(theirs.abs().max())
    for mine, theirs in zip(tensors(small(Y), torch.Tensor), tensors(net(Y), torch.Tensor), strict=True):
        assert float((mine - theirs).abs().max()) > 1e-6  # the control: something was really removed


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers_lose_half_of_their_hidden_units(kind, layers, both):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 16)
            self.b = kind(16, 12, num_layers=layers, bidirectional=both, batch_first=True)
            self.c = nn.Linear(24 if both else 12, 3)

        def forward(self, x):
            return self.c(self.b(self.a(x))[0])

    small = graphprune.shrink(Net().eval(), torch.randn(2, 7, 5), 0.5)
    assert (small.a.out_features, small.b.input_size, small.b.hidden_size) == (8, 8, 6)


def test_what_numbers_copies_is_known_by_arrays_that_live(monkeypatch):
    """An id in the record must not pass to the next array of that size: GQA was then left whole, in one run of sixty."""
    moved, before = {}, Recorder.copies

    def copies(recorder, fields, columns, reason):
        moved.update((id(array), (recorder, weakref.ref(array))) for column in columns for array in column)  # the latest at its place
        return before(recorder, fields, columns, reason)

    monkeypatch.setattr(Recorder, "copies", copies)
    trace(drawn(GQA), X)
    numbering = [array() is not None for number, (recorder, array) in moved.items() if number in recorder.copied]
    assert numbering and all(numbering)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize(("groups", "wide"), [(2, 16), (2, 32), (4, 32), (16, 16), (16, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions_in_groups(kind, groups, wide, bias):
    """Whether there is a bias makes no difference: its axis is that of the result."""
    rank = int(kind.__name__[-2])
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 16, 1), nn.ReLU(), kind(16, wide, 2, 2, groups=groups, bias=bias), nn.ReLU(), conv(wide, 2, 1)).double().eval()
    x = torch.randn(2, 3, *[4] * rank, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    assert (small[2].in_channels, small[2].out_channels) == (8, wide // 2)
    assert (small(x) - graphprune.zeroed(net, plan)(x)[0]).abs().max() < 1e-12 < (small(x) - net(x)).abs().max()


PICKED = {
    "first": (lambda h: h * h[:, 0].sigmoid()[:, None], {0}),
    "last": (lambda h: h * h[:, -1].sigmoid()[:, None], {15}),
    "both": (lambda h: h * h[:, -1].sigmoid()[:, None] + h[:, 0, None], {0, 15}),
    "select": (lambda h: h + h.select(1, 0)[:, None], {0}),
    "one in the middle": (lambda h: h + h[:, 5, None], set(range(16))),
}


@pytest.mark.parametrize("name", PICKED)
def test_a_channel_that_is_picked_stays_and_the_others_go(name):
    """The first stays the first whatever goes behind it; one in the middle would be another one."""
    middle, stays = PICKED[name]

    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.down(middle(self.up(x).relu()))

    net, x = Picked().double(), torch.randn(3, 8, dtype=torch.float64)
    groups = graphprune.couple(graphprune.trace(net, x))
    assert sum(group.size for group in groups) == 16 - len(stays)
    if len(stays) < 16:
        small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
        assert stays <= set(plan.cuts["down.weight"][1])
        assert (small(x) - graphprune.zeroed(net, plan)(x)[0]).abs().max() < 1e-12 < (small(x) - net(x)).abs().max()


@pytest.mark.parametrize("zeros", [(2, 2), (4, 0), (0, 4), (1, 3)])
@pytest.mark.parametrize("rewrite", [False, True])
def test_a_literal_number_of_zeros_holds_the_places_beside_them_alone(zeros, rewrite):
    """What is padded goes; the rows of the wider layer that meet the zeros stay unless the code may be rewritten, and the plan says why."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.wide, self.down = nn.Linear(8, 16), nn.Linear(16, 20), nn.Linear(20, 3)

        def forward(self, x):
            h = self.up(x).relu()
            return self.down(self.wide(h) + nn.functional.pad(h, zeros))

    net, x = Padded().double(), torch.randn(3, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, 0.5, widths=graphprune.Widths(rewrite=rewrite), return_plan=True)
    assert small.up.out_features == 8 and small.wide.out_features <= 12
    assert small.wide.out_features < 12 or any("pad" in note for note in plan.notes)
    assert (small(x) - graphprune.zeroed(net, plan)(x)[0]).abs().max() < 1e-12 < (small(x) - net(x)).abs().max()
