"""Bad input gives an error that says what, where and what now, and leaves the model as it was."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune import errors

NET = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
X = torch.zeros(1, 4)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 2, "half", True])
def test_ratio(ratio):
    with pytest.raises(errors.BadRatio, match="share of units"):
        graphprune.shrink(NET, X, ratio)


def test_wrong_example():
    with pytest.raises(errors.BadInput, match="Call model"):
        graphprune.shrink(NET, torch.zeros(1, 5))


def test_unknown_names_say_the_nearest():
    net = nn.ModuleDict({"backbone": nn.Linear(4, 8)})
    with pytest.raises(errors.UnknownName, match="backbone"):
        graphprune.shrink(net, X, keep=["backbon"])
    with pytest.raises(errors.UnknownName, match="l1"):
        graphprune.shrink(NET, X, criterion="l3")
    with pytest.raises(errors.UnknownName):
        graphprune.shrink(NET, X, ratios={"nothing.*": 0.2})


def test_nothing_to_prune_says_why():
    with pytest.raises(errors.NothingToPrune, match="output of the model"):
        graphprune.shrink(nn.Linear(4, 8), X)


def test_wrapped_scripted_compiled_and_mixed():
    wrong = [torch.jit.trace(NET, X), nn.DataParallel(NET), torch.compile(NET), "net"]
    mixed = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, device="meta"))
    for model in [*wrong, mixed]:
        with pytest.raises(errors.BadModel):
            graphprune.shrink(model, X)


def test_a_wrong_plan_is_refused():
    _, plan = graphprune.shrink(NET, X, return_plan=True)
    with pytest.raises(errors.BadPlan):
        graphprune.apply(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), plan)
    with pytest.raises(errors.BadPlan):
        graphprune.Plan.from_json("{}")


def test_a_difference_is_found():
    class Sly(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x)) * len(self.a.weight)

    net = Sly()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(errors.NotEqual):
        graphprune.shrink(net, torch.ones(1, 4), criterion="random")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_keep_and_overrides():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert graphprune.shrink(net, X, 0.5, keep=["0"])[0].out_features == 8
    assert graphprune.shrink(net, X, 0.5, ratios={"2": 0.75})[2].out_features == 2
    assert graphprune.shrink(net, X, 0.6, multiple_of=4)[0].out_features == 4
    assert graphprune.shrink(net, X, 0.9, min_units=3)[0].out_features == 3
    with pytest.raises(errors.NothingToPrune):
        graphprune.shrink(net, X, keep=nn.Linear)
