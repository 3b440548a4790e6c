"""A whole number of units is kept to the unit, or refused with the two nearest numbers that work."""

import re

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from test_head_dim import Rotated, Separate
from test_query_heads import Grouped
from torch import nn

import graphprune
from graphprune.errors import BadRatio


class Mixture(nn.Module):
    """Five experts in stacks, of which three are chosen."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 5)
        self.up, self.down = nn.Parameter(torch.randn(5, 4, 8)), nn.Parameter(torch.randn(5, 8, 4))

    def forward(self, x):
        scores, at = self.router(x).topk(3)
        inner = torch.einsum("ti,tkio->tko", x, self.up[at]).relu()
        return (scores.unsqueeze(-1) * torch.einsum("tki,tkio->tko", inner, self.down[at])).sum(1)


def refused(model, example, what, **options):
    with pytest.raises(BadRatio) as caught:
        graphprune.shrink(model, example, what=what, **options)
    found = re.search(r"[Tt]he nearest that work are (\d+) and (\d+)", str(caught.value))
    assert found, caught.value
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    "make, example, kind, asked, nearest",
    [
        (Rotated, (2, 6, 5), "head_dim", 5, (4, 6)),  # entries that positions turn go in pairs
        (Rotated, (2, 6, 5), "head_dim", 1, (2, 4)),
        (Separate, (2, 6, 5), "head_dim", 9, (7, 8)),
        (Grouped, (2, 6, 5), "heads", 6, (3, 4)),  # keys with the queries that share them
        (Grouped, (2, 6, 5), "query_heads", 7, (2, 3)),
        (Mixture, (6, 4), "experts", 2, (3, 4)),  # as many as the code chooses
        (Mixture, (6, 4), "experts", 8, (4, 5)),
        (Mixture, (6, 4), "expert_mlp", 9, (7, 8)),
    ],
)
def test_the_two_nearest_are_named_and_work(make, example, kind, asked, nearest):
    example = torch.randn(example)
    assert refused(make(), example, {kind: asked}) == nearest
    for width in nearest:
        graphprune.plan(make(), example, what={kind: width})


@settings(max_examples=12, deadline=None)
@given(size=st.integers(8, 40), step=st.integers(2, 6), data=st.data())
def test_multiples(size, step, data):
    asked = data.draw(st.integers(step + 1, size - 1).filter(lambda width: width % step))
    net = nn.Sequential(nn.Linear(3, size), nn.ReLU(), nn.Linear(size, 2))
    options = {"widths": graphprune.Widths(multiple_of=step)}
    below, above = refused(net, torch.zeros(1, 3), {"mlp": asked}, **options)
    assert (below, above) == (asked // step * step, min(size, asked // step * step + step))
    kept = graphprune.shrink(net, torch.zeros(1, 3), what={"mlp": below}, **options)
    assert kept[0].out_features == below  # the control: what works is kept to the unit


@pytest.mark.parametrize(
    "name, what, nearest",
    [
        ("bert", {"heads": 9}, (7, 8)),
        ("llama", {"heads": 8}, (3, 4)),
        ("qwen3_moe", {"experts": 1}, (2, 3)),
        ("gemma", {"heads": 9}, (7, 8)),  # one key: heads are its queries
        ("falcon", {"query_heads": 12}, (7, 8)),
        ("falcon_grouped", {"heads": 3}, (1, 2)),  # keys with their queries
        ("deepseek_v3", {"heads": 5}, (3, 4)),
        ("mixtral", {"experts": 1}, (2, 3)),
        ("gpt2", {"mlp": 129}, (127, 128)),
    ],
)
def test_families(name, what, nearest):
    model, inputs = build(name, layers=2)
    assert refused(model, inputs, what) == nearest
