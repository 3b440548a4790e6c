"""Sums of products taken one stage at a time are those of one pass, and what is held of them does not grow with the number of layers."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import NeedsBatches
from graphprune.scores import reconstruct, score, stages
from graphprune.scores.seen import places
from graphprune.scores.task import Task

WIDTH, INNER = 16, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Branches(nn.Module):
    """Two ways beside each other, and one value that is used far behind."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 24), nn.Linear(8, 32), nn.Linear(24, 16), nn.Linear(32, 16)
        self.last = nn.Linear(16 + 24, 3)

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        return self.last(torch.cat([(self.c(a) + self.d(b)).relu(), a], -1))


def net(layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, WIDTH), *[Block() for _ in range(layers)], nn.Linear(WIDTH, 4)).eval()


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 4)).eval()


def drawn(shape, count=3):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]


MODELS = {"blocks": (lambda: net(4), (40, 8)), "branches": (Branches, (30, 8)), "convolutions": (convolutions, (2, 3, 8, 8))}


@pytest.mark.parametrize("name", ["obs", "thinet", "lasso", "leverage", "pivoted_qr"])
@pytest.mark.parametrize("kind", MODELS)
def test_by_stages_as_in_one_pass(kind, name, monkeypatch):
    make, shape = MODELS[kind]
    model, data = make().eval(), drawn(shape)
    groups = graphprune.couple(graphprune.trace(model, data[0][:2]))
    wanted = score(groups, model, name, data)
    monkeypatch.setattr(reconstruct, "MEMORY", 0)
    found = score(groups, model, name, data)
    for mine, other in zip(found, wanted, strict=True):
        assert (mine - other).abs().max() <= 1e-4 * other.abs().max()
    fewer = score(groups, model, name, data[:1])
    assert any((mine - other).abs().max() > 1e-3 * other.abs().max() for mine, other in zip(fewer, wanted, strict=True))


def held(layers, monkeypatch):
    """The most matrices that are held at once, in entries, where only what is inside the blocks is scored."""
    model, now, most, real = net(layers), {}, [0], reconstruct.Waiting

    class Counted(real):
        def _take(self, rows):
            super()._take(rows)
            now[id(self)] = sum(part.numel() for part in self.found if isinstance(part, torch.Tensor))
            most[0] = max(most[0], sum(now.values()))

        def total(self):
            result = super().total()
            now.pop(id(self), None)
            return result

    monkeypatch.setattr(reconstruct, "Waiting", Counted)
    groups = graphprune.couple(graphprune.trace(model, torch.zeros(2, 8)))
    inner = [group.index for group in groups if group.size == INNER]
    every = [[] if index not in inner else mine for index, mine in enumerate(places(Task(groups, model)))]
    monkeypatch.setattr(reconstruct, "places", lambda task: every)
    score(groups, model, reconstruct.obs.with_(otherwise="l2"), drawn((40, 8)))
    monkeypatch.undo()
    return most[0]


def test_what_is_held_does_not_grow_with_the_layers(monkeypatch):
    monkeypatch.setattr(reconstruct, "MEMORY", 0)
    four = held(4, monkeypatch)
    monkeypatch.setattr(reconstruct, "MEMORY", 0)
    assert held(16, monkeypatch) <= 1.1 * four and four <= 1.5 * (INNER**2 + INNER)
    assert held(4, monkeypatch) >= 3.9 * INNER**2  # in one pass, all of them


def test_runs_rest_where_little_is_alive():
    """Between two blocks, not inside one."""
    model = net(5)
    groups = graphprune.couple(graphprune.trace(model, torch.zeros(2, 8)))
    plan = stages.stages(groups.graph, places(Task(groups, model)), [group.size**2 for group in groups])
    assert sorted(index for stage in plan for index in stage.groups) == list(range(len(groups)))
    assert plan[-1].rest is None and all(stage.rest.shape[-1] == WIDTH for stage in plan[:-1] if stage.rest is not None)


def test_a_batch_that_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(reconstruct, "MEMORY", 0)
    model = net(2)
    groups = graphprune.couple(graphprune.trace(model, torch.zeros(2, 8)))
    with pytest.raises(NeedsBatches, match="does not fit"):
        score(groups, model, "obs", [torch.zeros(4, 8), torch.zeros(4, 9)])
