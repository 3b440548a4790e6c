"""Heads of attentions that are laid out in other ways: one key for all queries, projections in one piece, keys made of a part that all heads share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import NothingToPrune

QUERIES, SIZE, WIDTH = 6, 4, 16
X = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def weighed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / 2).softmax(-1) @ v


class Attention(nn.Module):
    """``parts`` returns queries, keys and values, (batch, heads, positions, entries)."""

    queries, value = QUERIES, SIZE

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.build()
        self.o = nn.Linear(QUERIES * self.value, WIDTH)

    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(WIDTH, QUERIES * SIZE), nn.Linear(WIDTH, SIZE), nn.Linear(WIDTH, SIZE)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = self.q(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
        return q, self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return x + self.o(weighed(*self.parts(x)).transpose(1, 2).flatten(2))


class OneKey(Attention):
    pass


class OneKeyExpanded(Attention):
    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().parts(x)
        return q, k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)


class OneKeyEinsum(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        q = self.q(x).unflatten(-1, (-1, SIZE))
        weights = torch.einsum("bnhd,bmd->bhnm", q, self.k(x)).softmax(-1)
        return x + self.o(torch.einsum("bhnm,bmd->bnhd", weights, self.v(x)).flatten(2))


class Split(Attention):
    """Queries, the key and the value in one projection, taken apart by lengths."""

    def build(self) -> None:
        self.inner = QUERIES * SIZE
        self.qkv = nn.Linear(WIDTH, self.inner + 2 * SIZE)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).split((self.inner, SIZE, SIZE), -1)
        return q.unflatten(-1, (-1, SIZE)).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)


class Numbered(Attention):
    """The same, the key and the value taken by positions that are written in the code."""

    def build(self) -> None:
        self.queries = QUERIES
        self.qkv = nn.Linear(WIDTH, (QUERIES + 2) * SIZE)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fused = self.qkv(x).view(*x.shape[:2], self.queries + 2, SIZE)
        q, k, v = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Latent(Attention):
    """Keys are a part of each head's own and one that all share; values are narrower, and both come from one narrow vector."""

    value, own, shared, rank = 3, 4, 2, 7

    def build(self) -> None:
        self.heads = QUERIES
        self.q = nn.Linear(WIDTH, QUERIES * (self.own + self.shared))
        self.narrow, self.wide = nn.Linear(WIDTH, self.rank + self.shared), nn.Linear(self.rank, QUERIES * (self.own + self.value))

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = self.q(x).view(*x.shape[:2], self.heads, self.own + self.shared).transpose(1, 2)
        narrow, every = self.narrow(x).split((self.rank, self.shared), -1)
        own, value = self.wide(narrow).view(*x.shape[:2], self.heads, self.own + self.value).transpose(1, 2).split((self.own, self.value), -1)
        every = every.unsqueeze(1).expand(-1, own.shape[1], -1, -1)
        return q, torch.cat((own, every), -1), value


LAYOUTS = [OneKey, OneKeyExpanded, OneKeyEinsum, Split, Numbered, Latent]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["heads", "query_heads"])
@pytest.mark.parametrize("stay", [2, 5])
def test_queries_go(layout, kind, stay) -> None:
    model = layout().double().eval()
    small, plan = graphprune.shrink(model, X, what={kind: stay}, score=graphprune.scores.random.with_(seed=stay), return_plan=True)
    assert small.o.in_features == stay * model.value and small.stem.out_features == WIDTH
    wanted = graphprune.zeroed(model, plan)(OTHER)[0]
    torch.testing.assert_close(small(OTHER), wanted)
    assert not torch.allclose(model(OTHER), wanted)
    wrong = copy.deepcopy(small)  # the control: other heads than those of the plan
    wrong.o.weight.data = wrong.o.weight.data.roll(model.value, 1)
    assert not torch.allclose(wrong(OTHER), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_all_queries_share_stays(layout) -> None:
    model = layout().double().eval()
    plan = graphprune.plan(model, X, what={"heads": 3})
    assert not {"k.weight", "v.weight", "narrow.weight"} & set(plan.cuts)
    if "qkv.weight" in plan.cuts:
        kept = plan.cuts["qkv.weight"][0]
        assert list(kept)[-2 * SIZE :] == list(range(QUERIES * SIZE, (QUERIES + 2) * SIZE)) and len(kept) == (3 + 2) * SIZE


class FromTheFirst(Attention):
    """The key and the value stand first, and positions that are counted from the first one on: only what lies behind them may go."""

    def build(self) -> None:
        self.queries = QUERIES
        self.qkv = nn.Linear(WIDTH, (QUERIES + 2) * SIZE)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fused = self.qkv(x).view(*x.shape[:2], self.queries + 2, SIZE)
        return tuple(part.transpose(1, 2) for part in (fused[..., 2:, :], fused[..., [0], :], fused[..., [1], :]))


class InTheMiddle(FromTheFirst):
    """Queries before the positions that are written down: these would have to change."""

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fused = self.qkv(x).view(*x.shape[:2], self.queries + 2, SIZE)
        return tuple(part.transpose(1, 2) for part in (fused[..., :6, :], fused[..., [6], :], fused[..., [7], :]))


def test_positions_counted_from_the_first_on() -> None:
    model = FromTheFirst().double().eval()
    small, plan = graphprune.shrink(model, X, what={"heads": 4}, return_plan=True)
    assert list(plan.cuts["qkv.weight"][0])[: 2 * SIZE] == list(range(2 * SIZE))
    torch.testing.assert_close(small(OTHER), graphprune.zeroed(model, plan)(OTHER)[0])


def test_positions_behind_what_would_go_hold_it() -> None:
    with pytest.raises(NothingToPrune):
        graphprune.shrink(InTheMiddle().double().eval(), X, what="heads", rewrite=False)
