"""How activations are added up for scores, and in which precision large matrices are searched: cheaper, and still the same scores."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.scores import reconstruct
from graphprune.scores.reconstruct import Form
from graphprune.scores.waiting import Waiting, inner, sampled

F64 = torch.float64
EFFECT = sys.modules["graphprune.repair.effect"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 10**6))
def test_rows_add_up_however_they_come(lengths, columns, seed):
    """The Gram matrix of all rows, for any batches, and though every batch is overwritten once it is added."""
    torch.manual_seed(seed)
    rows = torch.randn(sum(lengths), columns, dtype=F64)
    gathered, memory = Waiting(lambda part: (len(part), inner(part.T))), rows.clone()
    for part in memory.split(lengths):
        gathered.add(part)
        assert gathered.count <= columns
        part.fill_(torch.nan)
    count, gram = gathered.total()
    assert count == len(rows) and torch.allclose(gram, rows.T @ rows, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(gram, rows[1:].T @ rows[1:], rtol=1e-10, atol=1e-12)


def test_products_of_many_rows_are_put_together_from_blocks():
    rows = torch.randn(600, 5, dtype=F64)
    assert torch.allclose(inner(rows), rows @ rows.T, rtol=1e-12)


def test_rows_are_counted_by_sample_wherever_the_batch_stands():
    tokens = torch.randn(50, 2, 3)  # positions first, as inside attention
    taken = sampled(tokens, -1, 4, 2)
    assert taken.shape == (8, 3) and all(bool((tokens.flatten(0, 1) == row).all(1).any()) for row in taken)
    assert sampled(torch.randn(50, 3), -1, 4, 2).shape == (50, 3)  # one row for each sample: nothing to choose among


def hard(size: int, seed: int) -> Form:
    """What consumers read of units that follow a few directions, with a mean, of very different sizes."""
    torch.manual_seed(seed)
    mixed = torch.randn(20, size, dtype=F64) * torch.logspace(-2, 1, size, dtype=F64)[torch.randperm(size)]
    rows = (torch.randn(2 * size, 20, dtype=F64) @ mixed + 1e-3 * torch.randn(2 * size, size, dtype=F64)).relu() + 2
    weight = torch.randn(64, size, dtype=F64)
    return Form(rows.T @ rows / len(rows), weight.T @ weight, torch.arange(size)[:, None])


def places(scores: torch.Tensor) -> torch.Tensor:
    return scores.argsort().argsort().double()


def test_single_precision_removes_in_the_order_of_double(monkeypatch):
    """Of a large matrix with the default damping; with next to none the bound asks for double, and single would rank something else or fail."""
    form = hard(1100, 0)
    assert reconstruct._precision(1100, 1e-2) == torch.float32 and reconstruct._precision(1024, 1e-2) == reconstruct._precision(1100, 1e-6) == F64
    single, thin = (reconstruct._surgery([form], damping) for damping in (1e-2, 1e-6))
    monkeypatch.setattr(reconstruct, "SMALL", 10**6)
    double, exact = (reconstruct._surgery([form], damping) for damping in (1e-2, 1e-6))
    assert torch.equal(thin, exact) and not torch.equal(single, double)
    half = set(double.argsort()[:550].tolist())
    assert len(half & set(single.argsort()[:550].tolist())) >= 548 and float((places(single) - places(double)).abs().max()) <= 22
    monkeypatch.setattr(reconstruct, "_precision", lambda *_: torch.float32)
    try:
        wrong = reconstruct._surgery([form], 1e-6)
    except torch.linalg.LinAlgError:
        return
    assert float((places(wrong) - places(exact)).abs().max()) > 22


def wide():
    """Units that a much wider layer reads, at 40 positions of each sample."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    return net, graphprune.couple(graphprune.trace(net, torch.zeros(1, 40, 4, dtype=F64))), [torch.randn(32, 40, 4, dtype=F64) for _ in range(12)]


def test_gradients_told_by_what_is_read_give_the_same_effect(monkeypatch):
    net, groups, batches = wide()
    found = graphprune.score(groups, net, "effect", batches, progress=False)
    monkeypatch.setattr(EFFECT, "_told", lambda *_: False)
    for one, two in zip(found, graphprune.score(groups, net, "effect", batches, progress=False), strict=True):
        assert torch.allclose(one, two, rtol=1e-10) and not torch.allclose(one, two.roll(1), rtol=1e-2)


@pytest.mark.parametrize("part", ["rows", "gradients"])
def test_a_part_of_the_positions_stands_for_all_in_the_effect(part, monkeypatch):
    """Few positions of each sample: close to all of them, not equal, and the same again; unscaled gradients would be far off."""
    net, groups, batches = wide()
    every = graphprune.score(groups, net, "effect", batches, progress=False)[0]
    monkeypatch.setattr(EFFECT, "_each", lambda *given: 20 if (given[2] ** 2 / 2 == given[3]) == (part == "rows") else given[0])
    some, again = (graphprune.score(groups, net, "effect", batches, progress=False)[0] for _ in range(2))
    assert torch.equal(some, again) and not torch.equal(some, every)
    assert abs(math.log(some.sum() / every.sum())) < 0.3
    if part == "gradients":
        monkeypatch.setattr(EFFECT, "math", SimpleNamespace(ceil=math.ceil, prod=math.prod, sqrt=lambda _: 1.0))
        wrong = graphprune.score(groups, net, "effect", batches, progress=False)[0]
        assert abs(math.log(wrong.sum() / every.sum())) > 0.3


def test_only_activations_get_gradients(monkeypatch):
    """What "effect" asks of autograd is the weights that read the input, and all gradients of outputs still come by."""
    net, groups, batches = wide()
    asked, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs, **given: (asked.append(list(inputs)), grad(loss, inputs, **given))[1])
    graphprune.score(groups, net, "effect", batches[:1], progress=False)
    assert len(asked) == 1 and len(asked[0]) == 1 and asked[0][0] is net[0].weight
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


class Scaled(nn.Module):
    """Units that no convolution or matrix product reads."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(5, 4), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (self.table(x) * self.scale).sum(-1)


def test_effect_without_a_weight_to_refit_says_so():
    net, x = Scaled(), torch.zeros(2, dtype=torch.long)
    with pytest.warns(UserWarning, match="'effect' measures no consumer of 1 of 1 groups .*norms of their weights"):
        (scores,) = graphprune.score(graphprune.couple(graphprune.trace(net, x)), net, "effect", [x], progress=False)
    assert (scores > 0).all()
