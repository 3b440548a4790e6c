"""Targets with granularities other than channels: limits hold, as closely as units allow; what cannot be met is said; repairs; nothing is changed by errors."""

import pytest
import torch
from test_depth import TOKENS, images, removed, stack
from test_granularity import MASKED, X, net
from torch import nn

import graphprune
from graphprune.errors import BadCalibration, BadRatio, BadTarget
from graphprune.granularity import positions


def counted(model, plan):
    """The reference: entries that stay, and products with entries that stay, counted with hooks on a run of the original."""
    masks, macs = plan.masks(model), [0]

    def count(module, args, out):
        keep = masks[next(name for name, m in model.named_modules() if m is module) + ".weight"]
        if isinstance(module, nn.ConvTranspose2d):
            macs[0] += int(keep.sum()) * args[0].numel() // args[0].shape[1]
        else:
            macs[0] += int(keep.sum()) * out.numel() // out.shape[1]

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    model(X)
    for hook in hooks:
        hook.remove()
    return {"params": sum(int(masks[name].sum()) for name, _ in model.named_parameters()), "macs": macs[0]}


@pytest.mark.parametrize("scope", ["layer", "global", "isomorphic"])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "vector", "group:box", "group"])
def test_limits_hold_and_a_little_more_would_not(granularity, scope, monkeypatch):
    monkeypatch.setattr(positions, "times", lambda *_: (1.0, 2.0))
    model = net()
    full = counted(model, graphprune.Plan({}, {}))
    cost = graphprune.profile(model, X)
    assert (full["params"], full["macs"]) == (cost.params, cost.macs)
    for name, goal in (("params", 0.8), ("macs", 0.7), ("macs", int(0.6 * full["macs"]))):
        small, plan = graphprune.shrink(model, X, granularity=granularity, scope=scope, return_plan=True, **{name: goal})
        limit = goal * full[name] if isinstance(goal, float) else goal
        found = counted(model, plan)[name]
        largest = {"weight": 1, "kernel": 9, "vector": 3, "group:box": 40, "group": 8}[granularity] * 4 * (X.shape[0] * 64 if name == "macs" else 1)
        room = limit - full[name] * 0.25 if granularity == "group:box" else limit - largest
        assert room <= found <= limit
        assert f"{name}: at most {limit:,.0f}" in plan.explain() and f"{found:,.0f} " in plan.explain()
        assert (small(X) - graphprune.zeroed(model, plan)(X)[0]).abs().max() < 1e-12


def test_a_smaller_budget_never_keeps_an_entry_more():
    model, last = net(), None
    for share in (0.9, 0.6, 0.3, 0.1):
        masks = graphprune.shrink(model, X, params=share, granularity="weight", scope="global", return_plan=True)[1].masks(model)
        assert last is None or all(bool((masks[name] <= last[name]).all()) for name in masks)
        last = masks


@pytest.mark.parametrize("name", ["params", "macs", "size"])
def test_blocks_go_until_the_limit_holds(name):
    model = stack()
    full = graphprune.profile(model, TOKENS)
    small, plan = graphprune.shrink(model, TOKENS, granularity="block", return_plan=True, **{name: 0.6})
    found = graphprune.profile(small, TOKENS)
    assert getattr(found, name) <= 0.6 * getattr(full, name) and len(removed(small)) == 2
    limit = {"params": "parameters", "macs": "MACs", "size": "bytes"}[name]
    assert f"{getattr(found, name):,} {limit} left" in plan.explain()
    wider = graphprune.shrink(model, TOKENS, granularity="block", **{name: 0.9})
    assert len(removed(wider)) == 1  # the control: fewer go where more may stay


def test_costs_without_branches_are_those_of_the_cut_model():
    model, x = images(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    for granularity in ("block", "layer"):
        small, plan = graphprune.shrink(model, x, params=0.9, macs=0.9, granularity=granularity, return_plan=True)
        found = graphprune.profile(small, x)
        assert f"{found.params:,} parameters left" in plan.explain() and f"{found.macs:,} MACs left" in plan.explain()


def test_what_cannot_be_met_is_said_and_nothing_is_changed():
    model, blocks = net(), stack()
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    for granularity in (*MASKED[:4], "group", "group:box"):
        with pytest.raises(BadTarget, match="the smallest value that granularity"):
            graphprune.shrink(model, X, params=2, granularity=granularity, inplace=True)
        with pytest.raises(BadTarget, match="met by widths"):
            graphprune.shrink(model, X, speedup=2.0, granularity=granularity, inplace=True)
        with pytest.raises(BadTarget, match="every activation as large"):
            graphprune.shrink(model, X, memory=0.5, granularity=granularity, inplace=True)
        if granularity != "group:box":
            with pytest.raises(BadTarget, match="stored as zeros"):
                graphprune.shrink(model, X, size=0.5, granularity=granularity, inplace=True)
        with pytest.raises(BadRatio, match="about widths"):
            graphprune.shrink(model, X, multiple_of=8, granularity=granularity, inplace=True)
        with pytest.raises(BadRatio, match="scope"):
            graphprune.shrink(model, X, params=0.5, scope="optimal", granularity=granularity, inplace=True)
    for granularity in ("2:4", "weight:0.01"):
        with pytest.raises(BadTarget, match="says itself"):
            graphprune.shrink(model, X, params=0.5, granularity=granularity, inplace=True)
    with pytest.raises(BadTarget, match="'block' reaches"):
        graphprune.shrink(blocks, TOKENS, params=0.01, granularity="block")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and not hasattr(model[0], "parametrizations")


def test_heads_meet_targets():
    from networks import Attention, Flat

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), Attention(8, 4), nn.Conv2d(8, 8, 1), Flat(8)).double().eval()
    x = X[:, :, :4, :4]
    full = graphprune.profile(model, x).params
    small = graphprune.shrink(model, x, params=0.8, granularity="head")
    assert small[1].heads < 4 and graphprune.profile(small, x).params <= 0.8 * full and small[2].out_channels == 8


@pytest.mark.parametrize("granularity", ["weight", "group:box", "block"])
def test_statistics_are_measured_anew(granularity):
    model, x = images(), torch.randn(64, 2, 6, 6, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(x)  # statistics of its own data, as a trained model has them
    model.eval()
    plain = graphprune.shrink(model, x[:2], 0.4, granularity=granularity, criterion="random")
    small, plan = graphprune.shrink(model, x[:2], 0.4, granularity=granularity, criterion="random", calibration=[x[:32], x[32:]], repair="bn", return_plan=True)
    gap = lambda found: float((found(x) - model(x)).detach().square().mean())  # noqa: E731
    assert "repair bn" in plan.explain() and gap(small) < gap(plain)
    assert graphprune.masked(small).keys() == graphprune.masked(plain).keys()
    for step in ("least-squares", "bias", "variance"):
        with pytest.raises(BadCalibration, match="repair='bn'"):
            graphprune.shrink(model, x[:2], 0.4, granularity=granularity, calibration=[x], repair=step)


def test_the_automatic_repair_takes_what_there_is():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(16, 8)
    small = graphprune.shrink(model, x[:1], 0.5, granularity="weight", calibration=[x, x])
    assert torch.equal(small(x), graphprune.shrink(model, x[:1], 0.5, granularity="weight")(x))


def test_a_small_block_comes_back_when_a_large_one_is_enough():
    layers = [nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8)) for width in (2, 4, 64)]
    model, order = nn.Sequential(nn.Linear(8, 8), *layers, nn.Linear(8, 2)).double(), {"1": 0, "2": 1, "3": 2}
    x = torch.randn(2, 8, dtype=torch.float64)
    model = nn.Sequential(model[0], *layers, nn.Sequential(nn.Linear(8, 8), nn.ReLU()), model[4]).double()
    small = graphprune.shrink(model, x, params=0.5, granularity="block", criterion=lambda name, module: order.get(name, 9))
    assert removed(small) == ["3"]
