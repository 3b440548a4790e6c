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


def alone(kind, steps=40, rate=0.05, **options):
    """Unit norms before, and after every step of plain descent on the penalty alone."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    regulariser = graphprune.SparseTraining(model, torch.zeros(1, 6, dtype=torch.float64), kind=kind, **options)
    optimizer, seen = torch.optim.SGD(model.parameters(), rate), [regulariser.norms()[0]]
    for _ in range(steps):
        optimizer.zero_grad()
        regulariser.step()
        optimizer.step()
        seen.append(regulariser.norms()[0])
    return regulariser, torch.stack(seen)


def test_without_a_task_every_penalty_shrinks_units_as_written():
    """Descent on the penalty alone has a closed form, step by step."""
    rate, sizes = 0.05, 6 + 1 + 2
    _, seen = alone("group_lasso", strength=0.1)
    assert (seen[1:] - (seen[:-1] - rate * 0.1 * sizes**0.5).abs()).abs().max() < 1e-12
    regulariser, seen = alone("growing", strength=0.5, every=5, limit=2.0, ratio=0.25)
    growth = torch.tensor([min(2.0, 0.5 * (1 + step // 5)) for step in range(40)], dtype=torch.float64)
    decay = torch.cat([torch.ones(1).double(), (1 - rate * growth).cumprod(0)])
    picked = regulariser.picked[0]
    assert (seen[:, picked] - seen[0, picked] * decay[:, None]).abs().max() < 1e-12
    others = sorted(set(range(16)) - set(picked))
    assert (seen[:, others] == seen[0, others]).all() and len(picked) == 4
    _, seen = alone("scaled", strength=0.05)
    squares = seen[:-1].square()
    share = (squares.amax(1, keepdim=True) - squares) / (squares.amax(1, keepdim=True) - squares.amin(1, keepdim=True))
    assert (seen[1:] - seen[:-1] * (1 - 2 * rate * 0.05 * 2 ** (4 * share))).abs().max() < 1e-12
    spread = seen.amin(1) / seen.amax(1)
    assert (spread.diff() < 0).all()  # the small fall faster than the large


def fit(kind, steps, **options):
    """A small regression trained to rest, with a rate that falls; the model, its regulariser, and the loss as a function."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    y = torch.stack([x[:, 0] - x[:, 1], x[:, 2]], 1)
    regulariser = graphprune.SparseTraining(model, x[:1], kind=kind, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = regulariser.norms()[0]
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        regulariser.step()
        optimizer.step()
        falling.step()
    return model, regulariser, before, lambda: F.mse_loss(model(x), y)


def test_growing_drives_the_picked_units_to_zero_and_no_others():
    model, regulariser, before, loss = fit("growing", 800, strength=0.05, every=10, limit=2.0)
    picked, after = regulariser.picked[0], regulariser.norms()[0]
    others = sorted(set(range(16)) - set(picked))
    assert (after[picked] < 1e-6 * before[picked]).all() and (after[others] > 0.1 * before[others]).all()
    assert loss() < 1e-3  # the others do the work
    control = fit("growing", 800, strength=0.0)[1].norms()[0]
    assert (control[picked] > 0.1 * before[picked]).all()
    plan = graphprune.shrink(model, torch.zeros(1, 6, dtype=torch.float64), 0.5, return_plan=True)[1]
    assert sorted(set(range(16)) - set(plan.cuts["0.weight"][0])) == picked


def test_group_lasso_ends_where_its_optimum_is():
    """The conditions of an optimum: what is left balances the loss exactly, what is not is smaller than one step."""
    strength, sizes = 0.02, (6 + 1 + 2) ** 0.5
    model, regulariser, before, loss = fit("group_lasso", 3000, strength=strength)
    norms = regulariser.norms()[0]
    gradient = torch.autograd.grad(loss(), list(model.parameters()))
    slopes = torch.cat([gradient[0], gradient[1][:, None], gradient[2].T], 1)
    weights = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1).detach()
    left = norms > 0.01
    balance = (slopes + strength * sizes * weights / norms[:, None].clamp(min=1e-12)).norm(dim=1)
    assert 2 <= int(left.sum()) <= 12 and (norms[~left] < 0.05 * strength * sizes).all() and (before > 0.3).all()
    assert (balance[left] < 0.03 * strength * sizes).all()
    plain = fit("group_lasso", 3000, strength=0.0)[1].norms()[0]
    assert (plain > 0.1).all()  # the control: without the penalty nothing vanishes


@pytest.mark.parametrize("strength", [0.0, 0.02])
def test_slimming_ends_where_the_lasso_does(strength):
    """Only scales are trained, so the problem is convex: where a scale is left the loss pulls with exactly ``strength``, elsewhere with less."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 1), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)).double()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model[1].weight)
    x = torch.randn(32, 2, 4, 4, dtype=torch.float64)
    y = (x[:, 0].mean((1, 2)) + 0.3 * torch.randn(32, dtype=torch.float64) > 0).long()
    regulariser = graphprune.SparseTraining(model, x[:1], kind="slimming", strength=strength)
    optimizer = torch.optim.SGD([model[1].weight], 0.5, momentum=0.9)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for _ in range(2000):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        regulariser.step()
        optimizer.step()
        falling.step()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model[1].weight])
    scale = model[1].weight.detach()
    left = scale.abs() > 1e-3
    assert (slope[left] + strength * scale[left].sign()).abs().max() < 1e-3
    assert (slope.abs() < strength + 1e-3).all()
    assert int(left.sum()) <= 4 if strength else left.all()


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
