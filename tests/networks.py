"""Networks drawn by Hypothesis from the constructs that pruning has to survive, in float64."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

WIDTHS = st.sampled_from([4, 6, 8, 12])


class Residual(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(c, mid, 3, padding=1), nn.BatchNorm2d(mid), nn.Conv2d(mid, c, 1)

    def forward(self, x):
        return x + self.b(self.n(self.a(x)).relu())


class Squeeze(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, mid, 1), nn.Conv2d(mid, c, 1)

    def forward(self, x):
        return x * self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Concat(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(c, mid, 1), nn.Conv2d(c, 4, 3, padding=1), nn.Conv2d(mid + 4 + c, c, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), F.silu(self.b(x)), x], 1))


class Split(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.mid, self.a, self.b, self.c = mid, nn.Conv2d(c, 3 * mid, 1), nn.Conv2d(mid, mid, 1), nn.Conv2d(2 * mid, c, 1)

    def forward(self, x):
        a, b, c = self.a(x).split(self.mid, 1)
        return self.c(torch.cat([self.b(a) * b.sigmoid(), c], 1))


class Shuffle(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 2 * mid, 1), nn.Conv2d(2 * mid, c, 1)
        self.d = nn.Conv2d(2 * mid, 2 * mid, 3, padding=1, groups=2 * mid)

    def forward(self, x):
        y = self.a(x)
        b, c, h, w = y.shape
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.b(self.d(y))


class Grouped(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(c, 4 * mid, 1), nn.Conv2d(4 * mid, 4 * mid, 3, padding=1, groups=4), nn.GroupNorm(4, 4 * mid)
        self.c = nn.Conv2d(4 * mid, c, 1)

    def forward(self, x):
        return self.c(self.n(self.b(self.a(x)).relu()))


class Attention(nn.Module):
    """Fused qkv over pixels as tokens, heads as an attribute, channels last inside."""

    def __init__(self, c, mid):
        super().__init__()
        self.heads, self.dim = 4, mid
        self.norm, self.qkv, self.out = nn.LayerNorm(c), nn.Linear(c, 12 * mid), nn.Linear(4 * mid, c)

    def forward(self, x):
        b, _, h, w = x.shape
        y = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(y).reshape(b, h * w, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, self.heads * self.dim)
        return x + self.out(y).transpose(1, 2).reshape(b, -1, h, w)


class Gated(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Linear(c, 2 * mid), nn.Linear(mid, c)

    def forward(self, x):
        a, b = self.a(x.permute(0, 2, 3, 1)).chunk(2, -1)
        return self.b(F.gelu(a) * b).permute(0, 3, 1, 2)


class Twice(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a = nn.Conv2d(c, c, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x):
        return self.a(F.hardswish(self.a(x)) * self.scale)


class Normed(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(c, mid, 1))
        self.b = nn.ConvTranspose2d(mid, c, 3, padding=1)

    def forward(self, x):
        return self.b(self.a(x).roll(1, 2)).tanh()


class Recurrent(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.LSTM(c, mid, batch_first=True), nn.Linear(mid, c)

    def forward(self, x):
        b, _, h, w = x.shape
        return x + self.b(self.a(x.flatten(2).transpose(1, 2))[0]).transpose(1, 2).reshape(b, -1, h, w)


class Pixels(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 4 * mid, 1), nn.Conv2d(4 * mid, c, 1)

    def forward(self, x):
        return self.b(F.pixel_unshuffle(F.pixel_shuffle(self.a(x), 2).relu(), 2))


class Tokens(nn.Module):
    """Pixels as tokens and back: what subclasses do happens in between, on (batch, pixels, channels)."""

    def forward(self, x):
        b, _, h, w = x.shape
        return x + self.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(b, -1, h, w)


class Queries(Tokens):
    """Four heads of queries, two of keys and values, expanded; rotary angles from a buffer."""

    def __init__(self, c, mid):
        super().__init__()
        self.size = 2 * mid
        self.q, self.k, self.v, self.o = nn.Linear(c, 8 * mid), nn.Linear(c, 4 * mid), nn.Linear(c, 4 * mid), nn.Linear(8 * mid, c)
        self.register_buffer("table", torch.rand(mid))

    def turned(self, x):
        angle = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), self.table)
        angle, (a, b) = torch.cat([angle, angle], -1), x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def wide(self, x):
        b, heads, n, d = x.shape
        return x[:, :, None].expand(b, heads, 2, n, d).reshape(b, heads * 2, n, d)

    def inner(self, y):
        q, k, v = (layer(y).view(*y.shape[:2], -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.wide(self.turned(k)), self.wide(v))
        return self.o(y.transpose(1, 2).flatten(2))


class Cross(Tokens):
    """torch's own attention module, keys and values from elsewhere."""

    def __init__(self, c, mid):
        super().__init__()
        self.up, self.a, self.down = nn.Linear(c, 2 * mid), nn.MultiheadAttention(2 * mid, 2, batch_first=True), nn.Linear(2 * mid, c)

    def inner(self, y):
        y = self.up(y)
        return self.down(self.a(y, y.roll(1, 1), y.relu(), need_weights=False)[0])


class Windows(nn.Module):
    """Attention within windows, with a table of relative positions."""

    def __init__(self, c, mid):
        super().__init__()
        self.heads, self.qkv, self.o = 2, nn.Linear(c, 6 * mid), nn.Linear(2 * mid, c)
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("places", torch.randint(0, 9, (4, 4)))

    def forward(self, x):
        b, c, h, w = x.shape
        y = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(len(y), 4, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * 0.5) @ k.transpose(-2, -1) + self.table[self.places.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        y = self.o((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)


class Affine(nn.Module):
    """FiLM: scale and shift from the pooled input."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Linear(c, mid), nn.Linear(mid, 2 * c)

    def forward(self, x):
        scale, shift = self.b(self.a(x.mean((2, 3))).tanh())[:, :, None, None].chunk(2, 1)
        return x * (1 + scale) + shift


class Halves(nn.Module):
    """GLU along channels, dilated before and transposed with groups after."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 4 * mid, 3, padding=2, dilation=2), nn.ConvTranspose2d(2 * mid, 2 * mid, 3, padding=1, groups=2)
        self.c = nn.Conv2d(2 * mid, c, 1)

    def forward(self, x):
        return self.c(self.b(F.glu(self.a(x), 1)).relu())


class Tied(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, mid, 1), nn.Conv2d(c, mid, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        y = self.a(x).sin() + self.b(x).relu()
        return F.conv_transpose2d(y, self.a.weight)


class Padded(nn.Module):
    """Zero channels on both sides, their number from an attribute."""

    def __init__(self, c, mid):
        super().__init__()
        self.more, self.a, self.b = mid // 2 * 4, nn.Conv2d(c, c + mid // 2 * 2, 1), nn.Conv2d(c + mid // 2 * 2, c, 1)

    def forward(self, x):
        return self.b((self.a(x) + F.pad(x, (0, 0, 0, 0, self.more // 4, self.more // 4))).relu())


class Flattened(nn.Module):
    """Channels last, then flat: every channel stands at many places."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Linear(c * 16, mid), nn.Linear(mid, c)

    def forward(self, x):
        return x * self.b(self.a(x.permute(0, 2, 3, 1).flatten(1)).relu())[:, :, None, None]


class Both(Tokens):
    """Two layers of a recurrent cell, both directions."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.GRU(c, mid, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(2 * mid, c)

    def inner(self, y):
        return self.b(self.a(y)[0])


class Picked(nn.Module):
    """Channels in another order, by an integer buffer."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 2 * mid, 1), nn.Conv2d(2 * mid, c, 1)
        self.register_buffer("order", torch.randperm(2 * mid))

    def forward(self, x):
        return self.b(self.a(x).relu()[:, self.order])


class Standardised(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.weight, self.n, self.b = nn.Parameter(torch.randn(mid, c, 3, 3)), nn.InstanceNorm2d(mid, affine=True), nn.Conv2d(mid, c, 1)

    def forward(self, x):
        w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self.b(self.n(F.conv2d(x, w, padding=1)).relu())


class Selected(nn.Module):
    """Two branches, weighted against each other channel by channel."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b, self.f, self.g = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1), nn.Linear(c, mid), nn.Linear(mid, 2 * c)

    def forward(self, x):
        both = torch.stack([self.a(x), self.b(x)], 1)
        share = self.g(self.f(both.sum(1).mean((2, 3))).relu()).view(len(x), 2, -1, 1, 1).softmax(1)
        return (both * share).sum(1)


class Summed(nn.Module):
    """Products written as einsum, with heads, and weights used outside of modules."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, mid, c)), nn.Parameter(torch.randn(c, 2, mid))
        self.norm = nn.RMSNorm(c)

    def forward(self, x):
        y = self.norm(x.permute(0, 2, 3, 1))
        return torch.einsum("chd,bijhd->bcij", self.b, torch.einsum("hdc,bijc->bijhd", self.a, y).relu())


class Unfolded(nn.Module):
    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b, self.p = nn.Conv2d(c * 9, mid, 1), nn.Conv2d(mid, c, 1), nn.PReLU(mid)

    def forward(self, x):
        b, _, h, w = x.shape
        return self.b(self.p(self.a(F.unfold(x, 3, padding=1).view(b, -1, h, w)).flip(1)))


class Deeper(nn.Module):
    """Three and one spatial axes, and a depthwise multiplier."""

    def __init__(self, c, mid):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv3d(c, mid, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv1d(mid, mid, 3, padding=1),
            nn.Conv2d(mid, 2 * mid, 3, padding=1, groups=mid),
        )
        self.d = nn.Conv2d(2 * mid, c, 1)

    def forward(self, x):
        y = self.a(x.unsqueeze(2)).squeeze(2)
        return self.d(self.c(self.b(y.flatten(2)).view(y.shape).relu()))


class Configured(nn.Module):
    """A size kept in an object, another in a dictionary."""

    class Sizes:
        pass

    def __init__(self, c, mid):
        super().__init__()
        self.config, self.cfg = Configured.Sizes(), {"part": mid}
        self.config.heads = 2
        self.a, self.b = nn.Conv2d(c, 4 * mid, 1), nn.Conv2d(2 * mid, c, 1)

    def forward(self, x):
        y = self.a(x).relu()
        b, _, h, w = y.shape
        y = y.view(b, self.config.heads, -1, h, w)
        left, right = y.split(self.cfg["part"], 2)
        return self.b((left * right).flatten(1, 2))


BLOCKS = [Residual, Squeeze, Concat, Split, Shuffle, Grouped, Attention, Gated, Twice, Normed, Recurrent, Pixels]
BLOCKS += [Queries, Cross, Windows, Affine, Halves, Tied, Padded, Flattened, Both, Picked, Standardised, Selected, Summed, Unfolded, Deeper, Configured]


class Flat(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.out = nn.Linear(c * 16, 3)

    def forward(self, x):
        return self.out(x.flatten(1))


@st.composite
def networks(draw):
    """A stem, one to four blocks, a head; every weight random."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    c = draw(WIDTHS)
    blocks = [draw(st.sampled_from(BLOCKS))(c, draw(WIDTHS)) for _ in range(draw(st.integers(1, 4)))]
    head = Flat(c) if draw(st.booleans()) else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3))
    net = nn.Sequential(nn.Conv2d(2, c, 3, padding=1), *blocks, head).double().eval()
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.4)
    return net
