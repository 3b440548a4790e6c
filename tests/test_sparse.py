"""Sparse training: what is added to .grad is the gradient of the written penalty, and the picked units really fall."""

import pytest
import torch
import torch.nn.functional as F
from networks import Attention, Residual, Twice
from torch import nn

import graphprune
from graphprune.errors import BadModel, BadRatio, NothingToPrune, UnknownName

X = torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net(seed=0):
    torch.manual_seed(seed)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8, 6), Attention(8, 4), Twice(8, 4), *head).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def units(model, groups):
    """The reference: for every unit of every group the list of its slices, taken one by one."""
    for group in groups:
        yield [
            [
                model.get_parameter(leaf).select(axis, position)
                for (leaf, axis), owners in group.places.items()
                if leaf in dict(model.named_parameters())
                for position in (owners == unit).nonzero()[0]
            ]
            for unit in range(group.size)
        ]


def written(model, kind, strength, picked=()):
    """The penalty as the papers write it, slice by slice."""
    if kind == "slimming":
        return strength * sum(m.weight.abs().sum() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    total = 0
    for index, group in enumerate(units(model, graphprune.couple(graphprune.trace(model, X)))):
        squares = [sum(part.square().sum() for part in parts) for parts in group]
        counts = [sum(part.numel() for part in parts) for parts in group]
        if kind == "group_lasso":
            total = total + strength * sum(n**0.5 * s.sqrt() for n, s in zip(counts, squares, strict=True))
        elif kind == "growing":
            total = total + strength / 2 * sum(squares[u] for u in picked[index])
        else:
            plain = [float(s.detach()) for s in squares]
            scale = [2 ** (4 * (max(plain) - s) / (max(plain) - min(plain))) for s in plain]
            total = total + strength * sum(f * s for f, s in zip(scale, squares, strict=True))
    return total


@pytest.mark.parametrize("kind", ["slimming", "group_lasso", "growing", "scaled"])
def test_step_adds_the_gradient_of_the_written_penalty(kind):
    model = net()
    regulariser = graphprune.SparseTraining(model, X, kind=kind, strength=0.3, ratio=0.5)
    loss = model(X).square().sum()
    loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    penalty = written(model, kind, 0.3, regulariser.picked)
    wanted = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    own = torch.autograd.grad(regulariser.penalty(), list(model.parameters()), allow_unused=True)
    assert abs(float((regulariser.penalty() - penalty).detach())) < 1e-10
    regulariser.step()
    moved = 0
    for (name, parameter), by_hand, by_us in zip(model.named_parameters(), wanted, own, strict=True):
        added = parameter.grad - before[name]
        by_hand, by_us = (torch.zeros_like(added) if g is None else g for g in (by_hand, by_us))
        assert (added - by_hand).abs().max() < 1e-10 and (added - by_us).abs().max() < 1e-10, name
        moved += int(added.any())
    standing = {leaf for group in graphprune.couple(graphprune.trace(model, X)) for leaf, _ in group.places} & {name for name, _ in model.named_parameters()}
    assert moved == (2 if kind == "slimming" else len(standing)) > 1


def test_slimming_is_the_subgradient_of_liu():
    model = net()
    graphprune.SparseTraining(model, X, kind="slimming", strength=0.1).step()
    assert torch.equal(model[1].weight.grad, 0.1 * model[1].weight.detach().sign()) and model[0].weight.grad is None


def test_growing_grows_and_stops():
    model = net()
    regulariser = graphprune.SparseTraining(model, X, kind="growing", strength=0.1, every=3, limit=0.25, ratio=0.25)
    seen = []
    for _ in range(9):
        seen.append(regulariser.growth)
        regulariser.step()
    assert seen == [0.1] * 3 + [0.2] * 3 + [0.25] * 3
    assert [len(picked) for picked in regulariser.picked] == [
        graphprune.select.__globals__["width"](n, 0) - graphprune.select.__globals__["width"](n, 0.25) for n in regulariser.sizes
    ]


@pytest.mark.parametrize("kind", ["group_lasso", "growing", "scaled"])
def test_picked_units_fall_and_without_they_do_not(kind):
    def train(regularised):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).double()
        x = torch.randn(64, 6, dtype=torch.float64)
        y = torch.stack([x[:, 0] - x[:, 1], x[:, 2]], 1)
        regulariser = graphprune.SparseTraining(model, x[:1], kind=kind, strength={"growing": 0.02, "group_lasso": 0.02, "scaled": 0.002}[kind], every=20)
        picked = regulariser.picked[0] if kind == "growing" else regulariser.norms()[0].argsort()[:4].tolist()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        before = regulariser.norms()[0][picked].mean()
        for _ in range(400):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            if regularised:
                regulariser.step()
            optimizer.step()
        return float(before), float(regulariser.norms()[0][picked].mean()), model, picked

    before, after, model, picked = train(True)
    start, control, _, _ = train(False)
    assert start == before and after < 0.75 * before and after < 0.75 * control and control > 0.7 * before
    if kind == "growing":
        plan = graphprune.shrink(model, torch.zeros(1, 6, dtype=torch.float64), 0.5, return_plan=True)[1]
        assert sorted(set(range(16)) - set(plan.cuts["0.weight"][0])) == picked


def test_scales_fall_under_slimming():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(32, 2, 4, 4)
    y = (x[:, 0].mean((1, 2)) > 0).long()
    for strength in (0.0, 0.05):
        twin = nn.Sequential(*[type(m)(*a) for m, a in zip(model, [(2, 16, 1), (16,), (), (1,), (), (16, 2)], strict=True)])
        twin.load_state_dict(model.state_dict())
        regulariser = graphprune.SparseTraining(twin, x[:1], kind="slimming", strength=strength)
        optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        for _ in range(250):
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            regulariser.step()
            optimizer.step()
        small = int((twin[1].weight.detach().abs() < 0.1).sum())
        assert small >= 5 if strength else small == 0, (strength, twin[1].weight)


def test_nothing_but_the_gradient_is_touched():
    model = net().train()
    model[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    regulariser = graphprune.SparseTraining(model, X, keep="3", strength=1.0)
    regulariser.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and model[0].bias.grad is None and model[3].a.bias.grad is None and model[4].qkv.weight.grad is not None


def test_a_unit_of_zeros_has_a_finite_gradient():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for kind in ("group_lasso", "growing", "scaled"):
        regulariser = graphprune.SparseTraining(model, torch.zeros(1, 2), kind=kind)
        regulariser.step()
        regulariser.penalty().backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_bad_input():
    model = net()
    with pytest.raises(UnknownName, match="group_lasso"):
        graphprune.SparseTraining(model, X, kind="lasso")
    for wrong in ({"strength": -1}, {"every": 0}, {"limit": float("nan")}, {"ratio": 1.0}):
        with pytest.raises(BadRatio):
            graphprune.SparseTraining(model, X, kind="growing", **wrong)
    with pytest.raises(NothingToPrune, match="batch norm"):
        graphprune.SparseTraining(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.zeros(1, 2), kind="slimming")
    with pytest.raises(NothingToPrune):
        graphprune.SparseTraining(nn.Sequential(nn.ReLU()), torch.zeros(1, 2))
    regulariser = graphprune.SparseTraining(model, X)
    graphprune.shrink(model, X, 0.5, inplace=True)
    with pytest.raises(BadModel, match="after cutting"):
        regulariser.step()
