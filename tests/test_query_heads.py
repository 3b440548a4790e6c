"""Queries within the group that shares a key go alone: keys and values stay whole, and the cut layer is the original with those queries zeroed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import NothingToPrune

HEADS, SHARED, SIZE = 12, 4, 4  # queries, keys, width of each
WIDTH = 16


class Grouped(nn.Module):
    """Three queries for every key; how keys are repeated is what differs below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * SIZE) for heads in (HEADS, SHARED, SHARED))
        self.o, self.head = nn.Linear(HEADS * SIZE, WIDTH), nn.Linear(WIDTH, 3)
        self.queries = HEADS // SHARED

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        q, k, v = (layer(x).view(*x.shape[:2], -1, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.head(x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2)))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (part.repeat_interleave(self.queries, 1) for part in (k, v))
        return (q @ k.mT / 2).softmax(-1) @ v


class Expanded(Grouped):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, shared, n, size = k.shape
        k, v = (part[:, :, None].expand(b, shared, self.queries, n, size).reshape(b, shared * self.queries, n, size) for part in (k, v))
        return (q @ k.mT / 2).softmax(-1) @ v


class Kernel(Grouped):
    """torch's own attention repeats the keys, if there are more queries."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.queries > 1, scale=0.5)


@pytest.mark.parametrize("layout", [Grouped, Expanded, Kernel])
@pytest.mark.parametrize("stay", [1, 2])
def test_queries_go_alone(layout, stay) -> None:
    model, x = layout().double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)
    small, plan = graphprune.shrink(model, x, what={"query_heads": stay}, score=graphprune.scores.random.with_(seed=stay), return_plan=True)
    assert small.q.out_features == small.o.in_features == stay * SHARED * SIZE and small.queries == stay
    assert small.k.out_features == small.v.out_features == SHARED * SIZE and not {"k.weight", "v.weight"} & set(plan.cuts)
    zero = copy.deepcopy(model)
    for name, parameter in zero.named_parameters():
        if name in plan.cuts:
            parameter.data[~plan.mask(name, tuple(parameter.shape))] = 0
    other = torch.randn(3, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(small(other), zero(other))
    torch.testing.assert_close(graphprune.zeroed(model, plan)(other)[0], zero(other))
    zero.o.weight.data.roll(SIZE, 1)
    wrong = copy.deepcopy(small)
    wrong.q.weight.data = wrong.q.weight.data.roll(SIZE, 0)
    assert not torch.allclose(wrong(other), zero(other))


@pytest.mark.parametrize("layout", [Grouped, Expanded, Kernel])
def test_with_whole_groups_and_the_rest(layout) -> None:
    model, x = layout().double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)
    small, plan = graphprune.shrink(model, x, what={"query_heads": 2, "heads": 3, "hidden": 12}, return_plan=True)
    assert small.q.weight.shape == (2 * 3 * SIZE, 12) and small.k.weight.shape == (3 * SIZE, 12)
    other = torch.randn(3, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(small(other), graphprune.zeroed(model, plan)(other)[0])


def test_where_no_queries_share_a_key_there_are_none() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(NothingToPrune, match="query_heads"):
        graphprune.shrink(model, torch.randn(2, 5, 8), what="query_heads")
