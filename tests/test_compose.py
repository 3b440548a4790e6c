"""Two cuts in a row and their composition give the same model; composition is associative, the empty plan changes nothing."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Flat, networks
from torch import nn

import graphprune
from graphprune import errors
from graphprune.cutting.plan import Plan

X = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def scored(seed):
    """Random scores, so that what is kept is no prefix."""

    def criterion(groups, model, batches):
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups]

    return criterion


def cut(net, ratio, seed):
    return graphprune.shrink(net, X, ratio, criterion=scored(seed), verify=False, return_plan=True)


def equal(left, right, gains=()):
    """Bit for bit; but for what takes up the change of a norm, which is multiplied once or twice."""
    mine, theirs, names = left.state_dict(), right.state_dict(), {gain.name for gain in gains}
    same = lambda name, a, b: torch.allclose(a, b, rtol=1e-12) if name in names else torch.equal(a, b)  # noqa: E731
    return list(mine) == list(theirs) and all(a.shape == b.shape and same(n, a, b) for (n, a), b in zip(mine.items(), theirs.values(), strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from([0.25, 0.5]), st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 99))
def test_apply_twice_equals_apply_the_composition(net, first, second, seed):
    once, one = cut(net, first, seed)
    twice, two = cut(once, second, seed + 1)
    both = graphprune.compose(one, two)
    straight = graphprune.apply(net, Plan.from_json(both.to_json()))
    assert equal(straight, twice, both.gains) and torch.allclose(straight(X), twice(X), rtol=1e-10, atol=1e-12)
    assert both.gains or torch.equal(straight(X), twice(X))
    assert twice.graphprune_plan == both
    wide = graphprune.expand(twice)
    masks, gained = both.masks(net), {gain.name for gain in both.gains}
    assert all(name in gained or torch.equal(wide[name], tensor * masks[name]) for name, tensor in net.state_dict().items())


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.integers(0, 99))
def test_composition_is_associative_and_has_a_unit(net, seed):
    small, plans = net, []
    for number in range(3):
        small, plan = cut(small, 0.25, seed + number)
        plans.append(plan)
    a, b, c = plans
    assert graphprune.compose(graphprune.compose(a, b), c) == graphprune.compose(a, graphprune.compose(b, c))
    nothing = Plan({}, {})
    assert graphprune.compose(nothing, a) == a == graphprune.compose(a, nothing)


def test_control_the_order_of_plans_matters():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), Flat(8)).double()
    once, one = cut(net, 0.5, 3)
    twice, two = cut(once, 0.5, 4)
    wrong = Plan(two.cuts, one.shapes, two.edits)  # second-round positions taken as positions of the original
    assert not equal(graphprune.apply(net, wrong), twice)
    with pytest.raises(errors.BadPlan, match="leaves"):
        graphprune.compose(two, one)


def test_a_model_cut_twice_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), Flat(8)).double()
    twice = graphprune.shrink(graphprune.shrink(net, X, 0.25), X, 0.5)
    graphprune.save(twice, tmp_path)
    assert equal(graphprune.load(tmp_path, base=net), twice)
