"""The steps of a shrink one by one, with public names: from any choice of units to a plan; what goes at the user's word; one planner for both tries."""

import dataclasses
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import gap
from test_statistics import WHOLE, Between
from test_units import Latents, Registers, zeros
from test_units import X as TOKENS
from torch import nn

import graphprune
from graphprune import Widths
from graphprune.errors import BadOption, BadPlan, NotEqual, NothingToPrune
from graphprune.options import PlanOptions, ShrinkOptions
from graphprune.planning.planner import decide, proved
from graphprune.planning.request import ask

F64 = torch.float64


class Residual(nn.Module):
    """A convolutional stream with a branch, and a head that flattens it."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.norm, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6 * 16, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.norm(self.a(x)).relu())
        return self.head(x.flatten(1))


class Heads(nn.Module):
    """Four heads of four channels, counted by an attribute."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(8, 48), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), -1, 3, self.heads, 4).unbind(2)
        y = nn.functional.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        return self.out(y.transpose(1, 2).flatten(2))


CASES = {
    "chain": (lambda: nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)), (3, 4)),
    "residual": (Residual, (2, 3, 4, 4)),
    "heads": (Heads, (2, 5, 8)),
}


@pytest.mark.parametrize("name", list(CASES))
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_choice_of_units_is_a_plan_whose_cut_equals_zeroed(name, data):
    make, shape = CASES[name]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    net, x = make().to(F64).eval(), torch.randn(shape, dtype=F64)
    groups = graphprune.couple(graphprune.trace(net, x))
    kept = [sorted(data.draw(st.sets(st.integers(0, group.size - 1), min_size=1))) for group in groups]
    plan = graphprune.plan_from(groups, net, kept)
    with torch.no_grad():
        small = graphprune.apply(net, plan)(x)
        assert gap(small, graphprune.zeroed(net, plan)(x)) < 1e-10
        if any(len(stay) < group.size for stay, group in zip(kept, groups, strict=True)):  # the control: other units would have been another function
            other = graphprune.plan_from(groups, net, [[(unit + 1) % group.size for unit in stay] for stay, group in zip(kept, groups, strict=True)])
            assert other != plan and (other.cuts == plan.cuts or gap(small, graphprune.zeroed(net, other)(x)) > 1e-9)
    assert [width.after for width in plan.outline.widths] == [len(stay) for stay in kept]


def test_the_steps_one_by_one_are_what_shrink_does():
    net, x = Residual().to(F64).eval(), torch.randn(2, 3, 4, 4, dtype=F64)
    groups = graphprune.couple(graphprune.trace(net, x))
    kept = graphprune.select(groups, graphprune.score(groups, net, "l2"), 0.5)
    assert graphprune.plan_from(groups, net, kept).cuts == graphprune.plan(net, x, 0.5).cuts


@pytest.mark.parametrize(
    "kept, says",
    [
        ([], "there are 2 groups, and units of 0"),
        ([[0], []], "one at least"),
        ([[0], [5]], "it has units 0 to 4"),
        ([[-1], [0]], "it has units 0 to 6"),
        ([[0.5], [0]], "numbers of its units"),
        ([[True, False], [0]], "numbers of its units"),
        ([["a"], [0]], "numbers of units"),
    ],
)
def test_what_is_no_choice_of_units_is_refused(kept, says):
    make, shape = CASES["chain"]
    net = make()
    with pytest.raises(BadPlan, match=says):
        graphprune.plan_from(graphprune.couple(graphprune.trace(net, torch.zeros(shape))), net, kept)


class Halves(nn.Module):
    """The code takes the first half of what the layer makes, by a number of its own."""

    def __init__(self, how):
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(4, 8), nn.Linear(4, 2)

    def forward(self, x):
        y = self.up(x)
        y = {"slice": lambda: y[:, :4], "view": lambda: y.view(-1, 2, 4)[:, 0], "split": lambda: y.split(4, 1)[0]}[self.how]()
        return self.down(y)


@pytest.mark.parametrize("how", ["slice", "view", "split"])
def test_a_width_that_the_code_cannot_follow_is_refused_with_the_place(how):
    net, x = Halves(how), torch.zeros(1, 4)
    groups = graphprune.couple(graphprune.trace(net, x))
    with pytest.raises(BadPlan, match=r"cannot follow these widths.*test_steps.py:\d+"):
        graphprune.plan_from(groups, net, [[0] for _ in groups])


@pytest.mark.parametrize("make", [lambda: Registers("before"), lambda: Registers("after"), Latents], ids=["before", "after", "latents"])
def test_positions_go_at_the_users_word_and_equal_the_zeroed_original(make):
    torch.manual_seed(0)
    net = make().to(F64).eval()
    table = {"tokens", "latents"}
    whole = graphprune.plan(net, TOKENS, 0.5)
    assert not any(0 in axes for name, axes in whole.cuts.items() if name in table)
    small, plan = graphprune.shrink(net, TOKENS, 0.5, widths=Widths(also=("positions",)), return_plan=True)
    assert any(0 in axes for name, axes in plan.cuts.items() if name in table)
    with torch.no_grad():
        assert gap(small(TOKENS), graphprune.zeroed(net, plan)(TOKENS)) < 1e-10


@pytest.mark.parametrize("name", ["mean", "softmax", "variance", "logsumexp"])
def test_statistics_go_at_the_users_word_and_are_taken_over_what_stays(name):
    net, x = Between(WHOLE[name]).to(F64).eval(), torch.randn(3, 8, dtype=F64)
    with pytest.raises(NothingToPrune):
        graphprune.shrink(net, x, 0.5)
    small, plan = graphprune.shrink(net, x, 0.5, widths=Widths(also=("statistics",)), return_plan=True)
    assert small.up.out_features == 8
    with torch.no_grad():
        assert torch.allclose(small(x), small.down(WHOLE[name](small.up(x).relu())))
        assert gap(small(x), zeros(net, plan)(x)) > 1e-6  # the control: over zeros it would be another one


@pytest.mark.parametrize("also", ["positions", ("position",), ("channels",), (1,)])
def test_other_words_are_refused(also):
    with pytest.raises(BadOption, match="'positions' and 'statistics'"):
        Widths(also=also)


def test_what_proves_wrong_is_planned_again_by_the_same_planner():
    """The control is the plan that is wrong for good, which raises."""
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(F64).eval(), torch.randn(3, 4, dtype=F64)
    graph, request = graphprune.trace(net, x), ask(net, 0.5)
    right = decide(graph, net, request)
    others = sorted(set(range(8)) - set(right.cuts["2.weight"][1]))
    wrong = dataclasses.replace(right, cuts={**right.cuts, "2.weight": {1: others}})
    proofs = []

    def planner(graph, model, request):
        proofs.append(request.proof)
        return right if request.proof else wrong

    plan, small = proved(graph, net, request, planner)
    assert plan is right and proofs == ["", "values"] and small[0].out_features == 4
    with pytest.raises(NotEqual):
        proved(graph, net, request, lambda *_: wrong)


def test_the_options_are_listed_once():
    first = ["model", "example_input", "ratio"]
    assert list(inspect.signature(graphprune.plan).parameters) == [*first, *PlanOptions.__annotations__]
    assert list(inspect.signature(graphprune.shrink).parameters) == [*first, "return_plan", *ShrinkOptions.__annotations__]
    for function in (graphprune.plan, graphprune.shrink):
        with pytest.raises(BadOption, match="nearest is speedup="):
            function(nn.Linear(2, 2), torch.zeros(1, 2), spedup=2)
    with pytest.raises(BadOption, match="no option 'inplace'"):
        graphprune.plan(nn.Linear(2, 2), torch.zeros(1, 2), inplace=True)
