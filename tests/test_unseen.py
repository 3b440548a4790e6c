"""What a removal costs on samples that no fit has seen, and how many rows the rows of a sample are worth."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.repair.sites import Site
from graphprune.repair.unseen import RIDGES, Halves, unseen

effect = sys.modules["graphprune.repair.effect"]
F64 = torch.float64


def cov(rows):
    return torch.cov(rows.T, correction=0)


def slow(fit, check, reads, gone, stay):
    """The loss of the best ridge regression of the removed columns on the kept ones, row by row."""
    fit, check = fit - fit.mean(0), check - check.mean(0)
    losses = [float(torch.einsum("np,pq,nq->n", check[:, gone], reads[gone][:, gone], check[:, gone]).mean())]
    for ridge in RIDGES if stay else ():
        level = ridge * fit[:, stay].square().sum(0)
        padded = torch.cat([fit[:, stay], torch.diag(level.sqrt())])
        maps = torch.linalg.lstsq(padded, torch.cat([fit[:, gone], torch.zeros(len(stay), len(gone), dtype=F64)])).solution
        rest = check[:, gone] - check[:, stay] @ maps
        losses.append(float(torch.einsum("np,pq,nq->n", rest, reads[gone][:, gone], rest).mean()))
    return min(losses)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 2), st.integers(1, 5))
def test_sums_of_losses_are_those_of_the_refit_on_other_samples(seed, units, each, steps):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    columns = units * each
    mixing, weight = draw(columns, columns), draw(3, columns)
    fit, check, reads = draw(60, columns) @ mixing, draw(30, columns) @ mixing, weight.T @ weight
    blocks = torch.randperm(columns, generator=generator).reshape(units, each)
    losses = draw(units).abs()
    found = unseen(losses, [Halves(cov(fit), cov(check), weight, blocks)], steps)
    order = losses.argsort(stable=True)
    highest, start, total, floor = 0.0, 0, 0.0, 0.0
    for count in sorted({round(units * step / steps) for step in range(1, steps + 1)} - {0}):
        gone, stay = (blocks[part].flatten().tolist() for part in (order[:count], order[count:]))
        there = max(highest, slow(fit, check, reads, gone, stay))
        part = losses[order[start:count]] / losses[order[start:count]].sum() * (there - highest)
        for unit, value in zip(order[start:count].tolist(), part.tolist(), strict=True):
            floor = max(floor, value)
            total += floor
            assert float(found[unit]) == pytest.approx(floor, rel=1e-6, abs=1e-9)
        start, highest = count, there
    assert total >= highest * (1 - 1e-9)
    assert torch.equal(found.argsort(stable=True), order)
    wrong = unseen(losses, [Halves(cov(check), cov(fit), 2 * weight, blocks)], steps)
    assert not torch.allclose(found, wrong, rtol=1e-3)


def site(rank):
    return Site(0, "w", None, None, None, False, ([1] * rank, [0] * rank, [1] * rank) if rank else None, None, None)


def test_rows_of_a_sample_that_are_equal_count_once():
    torch.manual_seed(0)
    images = torch.randn(50, 6, 1, 1).expand(50, 6, 4, 4)
    assert effect._independent(site(2), images, 800) == pytest.approx(50, rel=1e-3)
    words = torch.randn(40, 20, 6)  # nothing alike
    assert 400 < effect._independent(site(0), words, 800) <= 800
    assert effect._independent(site(0), words.reshape(800, 6), 800) == 800


class Maps(nn.Module):
    """Two layers side by side; what the second one reads is nearly the same everywhere in an image."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 96, 1), nn.Conv2d(24, 96, 1)
        self.one, self.two = nn.Conv2d(96, 8, 1), nn.Conv2d(96, 8, 1)

    def forward(self, x):
        first = self.one(self.narrow(x[:, :3]).relu())
        return first.mean((2, 3)) + self.two(self.wide(x[:, 3:]).relu()).mean((2, 3))


def test_what_few_samples_promise_is_corrected(monkeypatch):
    torch.manual_seed(0)
    net = Maps().double()
    draw = lambda n: torch.cat([torch.randn(n, 3, 6, 6, dtype=F64), torch.randn(n, 24, 1, 1, dtype=F64).expand(n, 24, 6, 6)], 1)  # noqa: E731
    few, many = ([draw(n) for _ in range(4)] for n in (10, 400))
    groups = graphprune.couple(graphprune.trace(net, few[0][:1]))
    wide = next(i for i, group in enumerate(groups) if "wide" in group.name)
    score = lambda batches: float(graphprune.score(groups, net, "effect", batches, progress=False)[wide].sort().values[:64].sum())  # noqa: E731
    true, found = score(many), score(few)
    assert 0.3 < found / true < 10
    monkeypatch.setattr(effect, "unseen", lambda losses, parts: losses)
    monkeypatch.setattr(effect, "_independent", lambda site, x, count: float(count))
    assert score(few) / true < 0.5 * found / true  # as promised: nearly nothing
