"""Queries, keys and values in one projection, in every order that is in use: heads go whole (keys with their queries), as the labels say and no name does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphprune

HEADS, KEYS, SIZE, WIDTH = 4, 2, 6, 12


class Attention(nn.Module):
    """One projection, taken apart by :meth:`split` into heads of queries, keys and values."""

    rows = 3 * HEADS * SIZE
    groups = HEADS

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.qkv, self.o = nn.Linear(WIDTH, self.rows), nn.Linear(HEADS * SIZE, WIDTH)
        self.heads, self.keys, self.size = HEADS, KEYS, SIZE

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise AssertionError("of the layouts below")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        q, k, v = self.split(self.qkv(x))
        return self.head(x + self.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Beside(Attention):
    """The queries, keys and values of a head beside each other."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.view(*x.shape[:2], -1, 3 * self.size).transpose(1, 2).chunk(3, -1)


class Turned(Beside):
    """A part of each query and key is turned by its position: one pair, or all of them, so that nothing is left as it is."""

    part = 2

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = super().split(x)
        return self.turned(q), self.turned(k), v

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / torch.arange(1, self.part // 2 + 1, dtype=x.dtype)
        angle = torch.cat((angle, angle), -1)
        turn, rest = x[..., : self.part], x[..., self.part :]
        left, right = turn[..., : self.part // 2], turn[..., self.part // 2 :]
        return torch.cat((turn * angle.cos() + torch.cat((-right, left), -1) * angle.sin(), rest), -1)


class TurnedWhole(Turned):
    part = SIZE


class Stacked(Attention):
    """An axis of three before the heads, as vision transformers have it."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class Blocks(Attention):
    """All queries, then all keys, then all values; fewer keys than queries, cut out by sizes of the module."""

    rows = (HEADS + 2 * KEYS) * SIZE
    groups = KEYS

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queries, keys = self.heads * self.size, self.keys * self.size
        parts = x[..., :queries], x[..., queries : queries + keys], x[..., queries + keys :]
        q, k, v = (part.view(*x.shape[:2], -1, self.size).transpose(1, 2) for part in parts)
        return q, k.repeat_interleave(HEADS // KEYS, 1), v.repeat_interleave(HEADS // KEYS, 1)


class Sets(Attention):
    """A set for every key: its queries, the key and the value."""

    rows = (HEADS + 2 * KEYS) * SIZE
    groups = KEYS

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sets = x.view(*x.shape[:2], -1, HEADS // KEYS + 2, self.size)
        q, k, v = sets[..., :-2, :], sets[..., [-2], :], sets[..., [-1], :]
        return tuple(part.flatten(2, 3).transpose(1, 2) for part in (q, k.expand(q.shape), v.expand(q.shape)))


LAYOUTS = [Beside, Turned, TurnedWhole, Stacked, Blocks, Sets]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_of_a_fused_projection_go_whole(layout) -> None:
    model, x = layout().double().eval(), torch.randn(2, 7, 5, dtype=torch.float64)
    small, plan = graphprune.shrink(model, x, 0.5, what="heads", score=graphprune.scores.random.with_(seed=3), return_plan=True)
    assert small.qkv.out_features == layout.rows // 2 and small.o.in_features == HEADS * SIZE // 2
    assert any(f"{layout.groups // 2} of {layout.groups} units stay" in line for line in plan.lines)
    kept = plan.cuts["o.weight"][1]
    assert len(kept) == SIZE * len({position // SIZE for position in kept})  # whole heads
    zero = copy.deepcopy(model)
    for name, parameter in zero.named_parameters():
        if name in plan.cuts:
            parameter.data[~plan.mask(name, tuple(parameter.shape))] = 0
    other = torch.randn(3, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(small(other), zero(other))
    wrong = copy.deepcopy(small)
    wrong.o.weight.data = wrong.o.weight.data.roll(SIZE, 1)
    assert not torch.allclose(wrong(other), zero(other))


class Split(Attention):
    """Three equal parts by the width, which is no size of a head."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.view(*x.shape[:2], -1, self.size).transpose(1, 2) for part in x.split(self.rows // 3, 2))


class Tanh(nn.Module):
    """GELU as many models write it: a sum of what is put in and a function of it, which is no branch of a stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x * x.sigmoid()


class Gated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.sigmoid() * x).clone() + x.relu()


@pytest.mark.parametrize("layout", [*LAYOUTS, Split])
@pytest.mark.parametrize("activation", [nn.ReLU, Tanh, Swish, Gated])
def test_hidden_units_go_and_nothing_else(layout, activation) -> None:
    class Layer(layout):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.act = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), activation()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            q, k, v = self.split(self.qkv(x))
            x = x + self.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
            return self.head(x + self.down(self.act(self.up(x))))

    model, x = Layer().double().eval(), torch.randn(2, 7, 5, dtype=torch.float64)
    small, plan = graphprune.shrink(model, x, 0.5, what="mlp", return_plan=True)
    assert set(plan.cuts) == {"up.weight", "up.bias", "down.weight"} and small.up.out_features == 10
    other = torch.randn(3, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(small(other), graphprune.zeroed(model, plan)(other)[0])
    stream = graphprune.shrink(model, x, 0.5, what="hidden", return_plan=True)[1]
    assert "stem.weight" in stream.cuts and all(0 not in stream.cuts.get(name, {}) for name in ("qkv.weight", "up.weight"))  # the control: another kind
