"""Optimizers and averaged copies after a cut: one step of the cut model is the masked original's step on the surviving entries."""

import copy

import pytest
import torch
from networks import Flat, Grouped, Residual
from torch import nn
from torch.optim.swa_utils import AveragedModel

import graphprune
from graphprune import errors

X = torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.01, nesterov=True),
    # eps far above rounding: a step divides by it where a gradient is zero but for rounding (a bias before a batch norm)
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, eps=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=True, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True, eps=1e-3),
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), Residual(8, 6), Flat(8)).double()


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def trained(make, seed=0):
    net = network(seed).train()
    optimizer = make(net.parameters())
    for _ in range(3):
        step(net, optimizer)
    return net, optimizer


def masked_step(net, optimizer, masks):
    """The original with the removed entries at zero, and kept there: the slow reference."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            tensor.mul_(masks[name])
    step(net, optimizer)
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


def surviving(state, plan):
    out = {}
    for name, tensor in state.items():
        for axis, kept in plan.cuts.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.tensor(kept))
        out[name] = tensor
    return out


def far(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_after_the_cut_is_the_masked_step(kind, inplace):
    net, optimizer = trained(OPTIMIZERS[kind])
    wide, wide_optimizer = copy.deepcopy((net, optimizer))
    small, plan = graphprune.shrink(net, X, 0.5, inplace=inplace, return_plan=True)
    assert (small is net) == inplace
    graphprune.refresh_optimizer(optimizer, plan, small, original=None if inplace else net)
    before = {name: tensor.detach().clone() for name, tensor in small.named_parameters()}
    step(small, optimizer)
    wanted = surviving(masked_step(wide, wide_optimizer, plan.masks(wide)), plan)
    found = {name: tensor.detach() for name, tensor in small.state_dict().items()}
    assert far(found, wanted) < 1e-12
    assert all(not torch.equal(tensor, before[name]) for name, tensor in small.named_parameters())
    # control: the same step from a fresh state is another step
    torch.manual_seed(0)
    other = graphprune.apply(trained(OPTIMIZERS[kind])[0], plan)
    step(other, OPTIMIZERS[kind](other.parameters()))
    assert far({n: t.detach() for n, t in other.state_dict().items()}, wanted) > 1e-6


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_identity_shapes_groups_and_scheduler(kind):
    net = network().train()
    make = OPTIMIZERS[kind]
    optimizer = make([{"params": [p for n, p in net.named_parameters() if "bias" in n], "lr": 0.5}, {"params": [p for p in net.parameters() if p.ndim > 1]}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    step(net, optimizer)
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    steps = [float(s.get("step", 0)) for s in optimizer.state.values()]
    assert graphprune.refresh_optimizer(optimizer, plan, small, original=net) is optimizer
    names = {id(p): n for n, p in small.named_parameters()}
    held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert held == [[n for n, _ in net.named_parameters() if "bias" in n], [n for n, p in net.named_parameters() if p.ndim > 1]]
    for param, state in optimizer.state.items():
        assert all(t.shape == param.shape for t in state.values() if isinstance(t, torch.Tensor) and t.ndim)
    assert [float(s.get("step", 0)) for s in optimizer.state.values()] == steps
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups][0] == pytest.approx(0.05)


def test_names_kept_by_the_optimizer_are_enough():
    net = network()
    optimizer = torch.optim.SGD(net.named_parameters(), 0.1, momentum=0.9)
    step(net, optimizer)
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    graphprune.refresh_optimizer(optimizer, plan, small)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}


def test_factored_state_foreign_parameters_and_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.mid(self.embed(ids)).relu())

    net, ids, centre = Tied(), torch.tensor([[1, 2, 3]]), nn.Parameter(torch.ones(5))
    optimizer = torch.optim.Adafactor([*net.parameters(), centre], 0.1)
    (net(ids).square().sum() + centre.sum()).backward()
    optimizer.step()
    small, plan = graphprune.shrink(net, ids, 0.5, return_plan=True)
    graphprune.refresh_optimizer(optimizer, plan, small, original=net)
    held = optimizer.param_groups[0]["params"]
    assert held[-1] is centre and {id(p) for p in held[:-1]} == {id(p) for p in small.parameters()}
    assert optimizer.state[small.embed.weight]["row_var"].shape == (10, 1) and optimizer.state[small.embed.weight]["col_var"].shape == (1, 4)
    small(ids).square().sum().backward()
    optimizer.step()


def test_errors_change_nothing():
    net, optimizer = trained(OPTIMIZERS["sgd"])
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(errors.BadOptimizer, match="original="):
        graphprune.refresh_optimizer(optimizer, plan, small)
    smaller, second = graphprune.shrink(small, X, 0.5, return_plan=True)
    with pytest.raises(errors.BadOptimizer, match="plan of this cut"):
        graphprune.refresh_optimizer(optimizer, second, smaller, original=net)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before
    flat = torch.optim.LBFGS(net.parameters())
    flat.step(lambda: (flat.zero_grad(), net(X).square().sum().backward(), net(X).square().sum())[2])
    with pytest.raises(errors.BadOptimizer, match="new optimizer"):
        graphprune.refresh_optimizer(flat, plan, small, original=net)


def test_averaged_copies():
    net = network()
    ema, plain, shadow = AveragedModel(net), copy.deepcopy(net), {n: t.detach().clone() for n, t in net.state_dict().items()}
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    for averaged in (ema, plain, shadow):
        assert graphprune.refresh_ema(averaged, plan) is averaged
    assert all(torch.equal(shadow[n], t) and torch.equal(plain.state_dict()[n], t) for n, t in small.state_dict().items())
    assert torch.equal(plain.eval()(X), small.eval()(X)) and torch.equal(ema.eval()(X), small(X))
    ema.update_parameters(small)
    with pytest.raises(errors.BadPlan):
        graphprune.refresh_ema(shadow, plan)
    with pytest.raises(errors.BadPlan):
        graphprune.refresh_ema(nn.Linear(2, 2), plan)


def test_inplace_keeps_the_parameters():
    net = nn.Sequential(nn.Conv2d(2, 8, 1), Grouped(8, 4), Flat(8)).double()
    held = list(net.parameters())
    net(X).sum().backward()
    assert graphprune.shrink(net, X, 0.5, inplace=True) is net
    assert all(a is b for a, b in zip(net.parameters(), held, strict=True)) and net[0].weight.grad is None
    net(X).sum().backward()
    assert all(p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.parametrize("inplace", [False, True])
def test_scaler_and_scheduler_go_on_and_wrappers_are_put_on_again(inplace):
    net = network().float().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    scheduler, scaler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def amp_step(call):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(X.float()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    amp_step(torch.compile(net, backend="eager"))
    small, plan = graphprune.shrink(net, X[:1].float(), 0.5, inplace=inplace, return_plan=True)
    graphprune.refresh_optimizer(optimizer, plan, small, original=None if inplace else net)
    before = {name: tensor.detach().clone() for name, tensor in small.named_parameters()}
    amp_step(torch.compile(small, backend="eager"))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in small.named_parameters())
    assert scaler.get_scale() == 16.0 and optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in small.parameters())
