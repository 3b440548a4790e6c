"""The width of heads: heads stay, what queries and keys are compared by goes (rotated entries in pairs), and what of the values is handed on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphprune

HEADS, SIZE, WIDTH = 2, 8, 12


class Separate(nn.Module):
    """A layer for each of queries, keys and values; a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.o = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(HEADS * SIZE, WIDTH)
        self.make()

    def make(self) -> None:
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in "qkv")

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        q, k, v = self.split(x)
        return self.head(x + self.o(((q @ k.mT / 3).softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Rotated(Separate):
    """Entry i and entry i + half of a query are a pair, turned by the position; half of them are left alone."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = super().split(x)
        return self.rotate(q), self.rotate(k), v

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.speed
        angle = torch.cat((at, at), -1)
        left, right = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-right, left), -1) * angle.sin()

    def make(self) -> None:
        super().make()
        self.register_buffer("speed", torch.rand(SIZE // 2))


class Fused(Separate):
    """Queries, keys and values of a head lie beside each other."""

    def make(self) -> None:
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)


class Blocks(Fused):
    """All queries, then all keys, then all values, as vision transformers have them."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("layout", [Separate, Rotated, Fused, Blocks])
def test_heads_stay_and_become_narrower(layout) -> None:
    model, x = layout().double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)
    small, plan = graphprune.shrink(model, x, what={"head_dim": 0.5}, score=graphprune.scores.random.with_(seed=1), return_plan=True)
    assert small.o.in_features == HEADS * SIZE // 2
    zero = copy.deepcopy(model)
    for name, tensor in (*zero.named_parameters(), *zero.named_buffers()):
        if name in plan.cuts:
            tensor.data[~plan.mask(name, tuple(tensor.shape))] = 0
    other = torch.randn(3, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(small(other), zero(other))
    kept = plan.cuts["o.weight"][1]
    assert {position // SIZE for position in kept} == set(range(HEADS))
    wrong = copy.deepcopy(small)
    wrong.o.weight.data = wrong.o.weight.data.roll(1, 1)
    assert not torch.allclose(wrong(other), zero(other))


def test_pairs_that_positions_turn_go_together() -> None:
    model, x = Rotated().double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)
    plan = graphprune.plan(model, x, what={"head_dim": 0.5}, score=graphprune.scores.random.with_(seed=2))
    kept = {position % SIZE for position in plan.cuts["q.weight"][0]}
    assert {position % (SIZE // 2) for position in kept} == set(plan.cuts["speed"][0]) and len(kept) == SIZE // 2
    assert plan.cuts["q.weight"][0] == plan.cuts["k.weight"][0]


def test_values_keep_a_width_of_their_own() -> None:
    model, x = Separate().double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)
    small = graphprune.shrink(model, x, what="head_dim", ratio=0, widths=graphprune.Widths(ratios={"v": 0.5}))
    assert small.v.out_features == HEADS * SIZE // 2 and small.q.out_features == HEADS * SIZE


class Routed(nn.Module):
    """A softmax over what learnt weights make of the stream, which gates it: no queries, no keys."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.up, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.gated(x, self.router(x).softmax(-1)))

    def gated(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return (self.up(x).unflatten(-1, (4, WIDTH)) * gates.unsqueeze(-1)).sum(-2)


class Chosen(Routed):
    def gated(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        share, at = gates.topk(2)
        return x * share.sum(-1, keepdim=True)


class Largest(Routed):
    def gated(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return x * gates.amax(-1, keepdim=True)


@pytest.mark.parametrize("layout", [Routed, Chosen, Largest])
def test_a_router_has_no_heads(layout) -> None:
    overview = graphprune.widths(layout().eval(), torch.randn(2, 6, 5))
    assert not overview["head_dim"] and not overview["heads"] and [row.where for row in overview["hidden"]] == ["stem"]
    assert graphprune.widths(Separate().eval(), torch.randn(2, 6, 5))["head_dim"]  # the control
