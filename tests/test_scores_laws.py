"""Laws of the scores: identities, invariances, and a model that is left as it was."""

import pytest
import torch
import torch.nn.functional as F
from test_scores import BATCHES, GROUPS, NET, X, Y, found
from torch import nn

import graphprune
from graphprune import errors

DATA = "apoz activation wanda_sp flap snip fisher taylor_gate mask_fisher group_fisher grasp obs thinet lasso leverage chip hrank entropy".split()


@pytest.mark.parametrize("name", DATA)
def test_batches_may_be_of_any_size(name):
    whole = graphprune.score(GROUPS, NET, name, [(X, Y)], F.cross_entropy)
    single = graphprune.score(GROUPS, NET, name, [(X[i : i + 1], Y[i : i + 1]) for i in range(5)], F.cross_entropy)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(whole, single, strict=True))


def test_taylor_identity():
    one = [(X[:1], Y[:1])]
    weight = graphprune.score(GROUPS, NET, "taylor", one, F.cross_entropy, over="consumes")
    gate = graphprune.score(GROUPS, NET, "taylor_gate", one, F.cross_entropy)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-20) for a, b in zip(weight, gate, strict=True))


def test_of_two_equal_channels_one_stays():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        net[0].weight[3:], net[0].bias[3:] = net[0].weight[:3], net[0].bias[:3] = torch.randn(3, 4).double(), torch.rand(3).double()
    groups = graphprune.couple(graphprune.trace(net, torch.zeros(1, 4).double()))
    order = graphprune.score(groups, net, "obs", [torch.randn(64, 4).double()], damping=1e-8)[0].argsort()
    assert len({int(unit) % 3 for unit in order[:3]}) == 3


def test_nothing_changes():
    NET.train()
    NET.a.weight.requires_grad_(False)
    before, random = {n: t.clone() for n, t in NET.state_dict().items()}, torch.get_rng_state()
    try:
        found("grasp")
        found("flap")
        assert all(module.training for module in NET.modules()) and not NET.a.weight.requires_grad
        assert all(p.grad is None for p in NET.parameters()) and torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(t, before[n]) for n, t in NET.state_dict().items())
    finally:
        NET.a.weight.requires_grad_(True)
        NET.eval()


def test_bad_input():
    with pytest.raises(errors.NeedsBatches):
        graphprune.score(GROUPS, NET, "apoz")
    with pytest.raises(errors.NeedsBatches, match="at least one"):
        graphprune.score(GROUPS, NET, "apoz", [])
    with pytest.raises(errors.NeedsBatches, match="more than once"):
        graphprune.score(GROUPS, NET, "grasp", iter(BATCHES), F.cross_entropy)
    with pytest.raises(errors.BadLoss, match="does not depend"):
        graphprune.score(GROUPS, NET, "snip", BATCHES, lambda output, labels: labels.double().mean())
    with pytest.raises(errors.BadScore, match="shape"):
        graphprune.score(GROUPS, NET, lambda groups, model, batches: [torch.zeros(2) for _ in groups])
    with pytest.raises(errors.BadScore, match="not finite"):
        graphprune.score(GROUPS, NET, lambda groups, model, batches: [torch.full((g.size,), torch.nan) for g in groups])
    with pytest.raises(errors.BadScore, match="otherwise"):
        found("bn_scale")
    with pytest.raises(errors.UnknownName, match="reduce"):
        found("l2", reduces="sum")


def test_ties_keep_exact_counts():
    equal = [torch.ones(g.size, dtype=torch.float64) for g in GROUPS]
    for scope, count in {"layer": 5 + 4 + 6, "global": 14, "isomorphic": 5 + 4 + 6}.items():
        assert sum(map(len, graphprune.select(GROUPS, equal, 0.2, scope=scope))) == count
