"""Retraining after any granularity: optimizers keep their state, averages follow, and rounds reach what was asked."""

import copy

import pytest
import torch
from test_depth import TOKENS, removed, stack
from test_granularity import MASKED, X, Y, net
from torch import nn

import graphprune
from graphprune.errors import BadPlan
from graphprune.granularity import positions


def step(model, optimizer, x=X, y=Y):
    optimizer.zero_grad()
    out = model(x)
    loss = nn.functional.cross_entropy(out, y) if out.ndim == 2 else out.square().mean()
    loss.backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("granularity", [*MASKED, "group", "group:box", "channel"])
def test_an_optimizer_goes_on_as_if_zeros_had_always_been_there(granularity, inplace, monkeypatch):
    """The law: a step of the small model is the step of the zeroed one, whose gradient and momentum are zero where entries are gone."""
    monkeypatch.setattr(positions, "times", lambda *_: (2.0, 1.0))
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    twin, other = copy.deepcopy(model), None
    plan = graphprune.shrink(model, X, 0.5, granularity=granularity, return_plan=True)[1]
    masks = plan.masks(twin)
    other = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.mul_(masks[name])
            parameter.register_hook(lambda grad, keep=masks[name]: grad * keep)
            other.state[parameter]["momentum_buffer"].mul_(masks[name])
        for name, buffer in twin.named_buffers():
            buffer.mul_(masks[name])
    small = graphprune.apply(model, plan, inplace=inplace)
    small.__dict__["graphprune_plan"] = plan
    optimizer = graphprune.refresh_optimizer(optimizer, plan, small, original=None if inplace else model)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    for _ in range(2):
        step(small, optimizer)
        step(twin, other)
    wide = graphprune.expand(small)
    for name, parameter in twin.named_parameters():
        assert (wide[name] - parameter * masks[name]).abs().max() < 1e-12, name
    assert any((wide[name] - value * masks[name]).abs().max() > 1e-6 for name, value in net().named_parameters())  # the control: it moved


def test_parameters_of_removed_modules_leave_the_optimizer():
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, TOKENS)
    small, plan = graphprune.shrink(model, TOKENS, 0.5, granularity="block", return_plan=True)
    optimizer = graphprune.refresh_optimizer(optimizer, plan, small, original=model)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in small.parameters()} == {id(p) for p in optimizer.state}
    before = [p.detach().clone() for p in small.parameters()]
    step(small, optimizer, TOKENS)
    assert all(bool((a != b).any()) for a, b in zip(before, small.parameters(), strict=True))


def test_averages_follow():
    model = net()
    small, plan = graphprune.shrink(model, X, 0.5, granularity="weight", return_plan=True)
    averaged = graphprune.refresh_ema(torch.optim.swa_utils.AveragedModel(model), plan)
    assert torch.equal(averaged(X), small(X)) and graphprune.masked(averaged.module).keys() == graphprune.masked(small).keys()
    with pytest.raises(BadPlan, match="average a copy"):
        graphprune.refresh_ema(dict(model.named_parameters()), plan)
    averaged = graphprune.refresh_ema(
        torch.optim.swa_utils.AveragedModel(stack()), graphprune.shrink(stack(), TOKENS, granularity="block", return_plan=True)[1]
    )
    assert len(removed(averaged)) == 2


@pytest.mark.parametrize("granularity", ["weight", "kernel", "group:box", "2:4"])
def test_rounds_of_pruning_and_training_reach_the_ratio(granularity, tmp_path):
    def train(model, number, optimizer):
        step(model.train(), optimizer)

    loop = {"train": train, "evaluate": lambda model: 1.0, "progress": False, "steps": 3, "optimizer": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)}
    model = net()
    done = graphprune.iterate(model, X, 0.6, granularity=granularity, ratios={"7": 0.3} if granularity == "weight" else None, checkpoint=tmp_path, **loop)
    masks = done.plan.masks(model)
    (zero,) = graphprune.zeroed(model, done.plan)(X)
    assert zero.shape == done.model.eval()(X).shape
    if granularity == "weight":
        assert [int((~masks[f"{i}.weight"]).sum()) for i in (0, 3, 7)] == [int(n * r + 0.4999) for n, r in ((144, 0.6), (288, 0.6), (768, 0.3))]
    if granularity == "kernel":
        assert int((~masks["3.weight"][..., 0, 0]).sum()) == int(32 * 0.6 + 0.4999)
    if granularity == "group:box":
        assert masks["3.weight"][0, 0].sum() <= 4
    again = graphprune.iterate(model, X, 0.6, granularity=granularity, ratios={"7": 0.3} if granularity == "weight" else None, checkpoint=tmp_path, **loop)
    assert torch.equal(again.model.eval()(X), done.model(X))


def test_rounds_meet_a_budget_of_entries():
    model = net()
    done = graphprune.iterate(model, X, params=0.4, granularity="weight", train=lambda m, n: None, evaluate=lambda m: 1.0, progress=False, steps=3)
    left = sum(int(done.plan.masks(model)[name].sum()) for name, _ in model.named_parameters())
    full = sum(p.numel() for p in model.parameters())
    assert 0.4 * full - 8 <= left <= 0.4 * full
