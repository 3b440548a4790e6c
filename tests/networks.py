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


BLOCKS = [Residual, Squeeze, Concat, Split, Shuffle, Grouped, Attention, Gated, Twice, Normed, Recurrent, Pixels]


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
