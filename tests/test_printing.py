"""What people print: it fits a screen whatever the model, its numbers are those of the model that comes out, and it says what stays whole and why."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import networks
from torch import nn

import graphprune
from graphprune.errors import UnknownName
from graphprune.timing.measure import Measurement

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def fits(thing):
    text = str(thing)
    assert len(text) <= 8000 and text.count("\n") <= 80, text[:2000]
    assert len(repr(thing)) <= 400, repr(thing)[:1000]
    return text


class Branches(nn.Module):
    """Many groups side by side, no two alike."""

    def __init__(self, count):
        super().__init__()
        self.arms = nn.ModuleList(nn.Conv2d(3, 3 + i, 1) for i in range(count))
        self.out = nn.Linear(sum(3 + i for i in range(count)), 5)

    def forward(self, x):
        return self.out(torch.cat([arm(x).mean((2, 3)) for arm in self.arms], 1))


def chain(count):
    return nn.Sequential(nn.Conv2d(3, 8, 1), *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(count)))


def named(count):
    return nn.Sequential(nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 1) for _ in range(count)), nn.Flatten(), nn.Linear(256, 40))


@pytest.mark.parametrize("net", [Branches(90), chain(120), named(200), Branches(2)], ids=["branches", "blocks", "flat", "small"])
def test_everything_fits_a_screen(net):
    net = net.double().eval()
    graph = graphprune.trace(net, X)
    groups = graphprune.couple(graph)
    _, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    for thing in (graph, groups, groups[0], plan, graph.nodes[0], graph.inputs[0], graph.labels):
        fits(thing)
    assert len(groups.table()) == len(groups) == len(plan.table())
    assert plan._repr_html_().count("<tr>") == 1 + len(groups)


@settings(max_examples=15, deadline=None)
@given(networks(), st.sampled_from([0.25, 0.5, 0.75]))
def test_totals_and_kept_positions_are_those_of_the_small_model(drawn, ratio):
    net, x = drawn, torch.randn(2, 2, 4, 4, dtype=torch.float64)
    widths = graphprune.Widths(at_least=2)  # torch multiplies where there is one entry to contract over, and counts no product for that
    small, plan = graphprune.shrink(net, x, ratio, widths=widths, return_plan=True)
    before, after = graphprune.profile(net, x), graphprune.profile(small, x)
    outline = plan.outline
    assert (outline.before.params, outline.before.macs) == (before.params, before.macs)
    assert (outline.after.params, outline.after.macs) == (after.params, after.macs)
    fits(plan)
    tensors, cut = dict(net.named_parameters()), dict(small.named_parameters())
    for name, tensor in tensors.items():
        at = torch.meshgrid(*(torch.tensor(plan.kept(name, axis)) for axis in range(tensor.ndim)), indexing="ij")
        assert tensor[at].shape == cut[name].shape
        if "parametrizations" not in name:  # the gain of a norm of weights makes up for what was cut
            assert torch.equal(tensor[at], cut[name])
    for row in plan.table("tensors"):
        if row["tensor"] in cut:
            assert row["after"] == "x".join(map(str, cut[row["tensor"]].shape))
    again = graphprune.Plan.from_json(plan.to_json())
    assert again.outline == outline and str(again) == str(plan) and again.explain() == plan.explain()


@settings(max_examples=8, deadline=None)
@given(networks())
def test_two_cuts_as_one_and_two_plans_side_by_side(drawn):
    net, x = drawn, torch.randn(2, 2, 4, 4, dtype=torch.float64)
    half, first = graphprune.shrink(net, x, 0.25, return_plan=True)
    small, second = graphprune.shrink(half, x, 0.25, return_plan=True)
    both = graphprune.compose(first, second)
    assert both.outline.before == first.outline.before and both.outline.after == second.outline.after
    assert graphprune.profile(small, x).params == both.outline.after.params
    whole = {name: shape for each in (both.outline.shapes, both.outline.buffers) for name, shape in each.items()}
    for row in both.table():
        if whole[row["group"]][row["axis"]] == row["before"]:  # one position for each unit
            assert row["after"] == len(both.kept(row["group"], row["axis"]))
    assert len(first.compare(first)) == 0
    rows = list(first.compare(both))
    assert rows[0]["other"] == both.outline.after.params and rows[0]["this"] == first.outline.after.params
    changed = {row["what"] for row in rows[2:]}
    assert changed == {row["what"] for row in both.compare(first)} - {"all parameters", "all MACs"} and changed


def test_explain_says_totals_first_and_kernels_only_when_asked():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)).double()
    _, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    lines = plan.explain().splitlines()
    assert lines[0].startswith("parameters 2.12 k -> 776 (37 %), MACs ") and "MACs" in lines[0]
    assert sum(line.startswith("group ") for line in lines) == 2
    assert not [line for line in lines if "axis 2" in line or "axis 3" in line]
    assert any("an output of the model keeps its size: 2 axes, 516 parameters" in line for line in lines)
    every = plan.explain(verbose=True)
    assert "whole: 4.weight axis 0" in every and "  2.weight axis 1: 16 -> 8" in every


class Held(nn.Module):
    """An operation that nobody described holds an axis."""

    def __init__(self, hold):
        super().__init__()
        self.a, self.b, self.hold = nn.Linear(8, 6), nn.Linear(6, 6), hold

    def forward(self, x):
        y = self.a(x)
        return self.b(self.hold(y)).sum()


@pytest.mark.parametrize(
    ("hold", "text"),
    [
        (lambda y: y.cummax(1).values, "cummax"),
        (lambda y: y.cumsum(1), "cumsum"),
        (lambda y: y.sort(1).values, "sort"),
        (lambda y: torch.fft.fft(y).real, "fft"),
    ],
)
def test_a_lock_is_said_with_its_operation_and_what_it_costs(hold, text):
    net = Held(hold).double()
    _, plan = graphprune.shrink(net, torch.randn(6, 8, dtype=torch.float64), 0.5, return_plan=True, verify=False)
    whole = [line for line in plan.explain().splitlines() if line.startswith("whole: ") and text in line]
    assert len(whole) == 1 and "parameters (" in whole[0] and "a.weight axis 0" in whole[0]
    assert whole[0].split(": ")[1] in str(plan)
    assert [row for row in plan.table("tensors") if row["tensor"] == "a.weight"][0]["whole"].count(text) == 1


def test_changes_beyond_axes_have_rows():
    net = chain(3).double().eval()
    _, masked = graphprune.shrink(net, X, 0.5, granularity="weight", return_plan=True)
    _, shorter = graphprune.shrink(net, X, 0.5, granularity="layer", return_plan=True)
    assert {row["what"] for row in masked.table()} == {"masked"} and {row["what"] for row in shorter.table("changes")} == {"removed"}
    assert all(row["after"] == pytest.approx(0.5 * row["before"], abs=1) for row in masked.table())
    fits(masked), fits(shorter)
    assert "1.84 k of" not in masked.explain() and "weights stay" in repr(masked) and "(67 %)" in shorter.explain().splitlines()[0]
    assert len(masked.compare(shorter)) >= 4 and len(masked.compare(masked)) == 0
    json.loads(masked.to_json())


def test_questions_that_fit_nothing():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    _, plan = graphprune.shrink(net, torch.zeros(1, 4), return_plan=True)
    with pytest.raises(UnknownName, match="nearest are 0"):
        plan.kept("00.weight")
    with pytest.raises(UnknownName, match="2 axes"):
        plan.kept("0", 2)
    with pytest.raises(UnknownName, match="'tensors'"):
        plan.table("rows")
    with pytest.raises(KeyError, match="there are group"):
        plan.table()["width"]
    stranger = graphprune.Plan({"z.weight": {0: [0]}}, {"z.weight": (2, 2)})
    with pytest.raises(UnknownName, match="of two models"):
        plan.compare(stranger)
    assert plan.kept("0") == plan.kept("0.weight") and plan.kept("1", -1) == plan.kept("0")


@pytest.mark.parametrize(
    ("speedup", "words"), [(0.5, "2.00x slower (1.67 to 2.50"), (2.0, "2.00x faster (1.80 to 2.20"), (0.9, "slower"), (1.0, "1.00x faster")]
)
def test_slower_is_called_slower(speedup, words):
    band = (0.4, 0.6) if speedup == 0.5 else (speedup * 0.9, speedup * 1.1)
    text = str(Measurement(0.01, 0.009, 0.011, 9, "CPU", 1, "eager", "as given", 0.01 * speedup, speedup, band, 1.0))
    assert words in text and "1 thread," in text and ("faster" in text) != ("slower" in text)


def test_a_table_for_people_and_for_machines():
    table = graphprune.shrink(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4), return_plan=True)[1].table()
    assert table["before"] == [8] and table["after"] == [4] and next(iter(table))["group"] == "0.weight"
    assert table.to_csv().splitlines()[0] == "group,axis,where,before,after,kept,params,macs,places"
    assert "50.0 %" in str(table) and ",0.5," in table.to_csv() and table.markdown().startswith("| group |")


@pytest.mark.parametrize(
    ("model", "shape", "tensor"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)), (1, 3, 8, 8), "0.weight"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (1, 4), "0.weight"),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ConvTranspose1d(8, 2, 3)), (1, 3, 8), "0.weight"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Linear(8, 2)), (3, 4), "0.weight"),
    ],
)
def test_what_meets_the_input_says_so_and_nothing_else_does(model, shape, tensor):
    said = {row["tensor"]: row["whole"] for row in graphprune.plan(model.eval(), torch.randn(shape), 0.5).table("tensors")}
    assert "meets the model's input" in said[tensor]
    others = [text for name, text in said.items() if not name.startswith("0.") and text]
    assert others and not any("the model's input" in text for text in others)


def test_a_cut_without_a_repair_says_what_one_would_do():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = list(torch.randn(64, 8).split(16))
    plans = {
        repair: graphprune.shrink(net, batches[0][:1], repair=given, return_plan=True)[1]
        for repair, given in (("none", None), ("data-free", "data-free"), ("batches", batches))
    }
    assert "not repaired: repair=batches" in str(plans["none"])
    assert "not repaired" not in str(plans["data-free"]) + str(plans["batches"])
    assert "not repaired" not in str(graphprune.plan(net, batches[0][:1], ratio=0))  # nothing is cut
