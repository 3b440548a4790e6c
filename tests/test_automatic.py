"""With inputs to learn from and a budget, the score and the scope are chosen by what they lose; scores read the inputs of the repair."""

import copy

import pytest
import torch
from torch import nn

import graphprune
from graphprune import automatic
from graphprune.errors import LessThanAsked

F64 = torch.float64


def trained(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    x = torch.randn(512, 8, dtype=F64)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3:].sum(1).relu(), x[:, 4].sin()], 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    return net.eval(), list(torch.randn(256, 8, dtype=F64).split(32))


def lost(net, small, batches):
    with torch.no_grad():
        gap = sum(float((small(x) - net(x)).square().sum()) for x in batches)
        return gap / sum(float((net(x) - net(x).mean()).square().sum()) for x in batches)


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"params": 0.3}])
def test_no_choice_of_the_list_loses_less_than_the_one_chosen(target):
    net, batches = trained()
    before = copy.deepcopy(net.state_dict())
    small, plan = graphprune.shrink(net, batches[0][:1], repair=batches, return_plan=True, **target)
    note = next(line for line in plan.notes if line.startswith("note: chose"))
    fits, checks = batches[:-2], batches[-2:]
    losses = {}
    for each in automatic.BUDGETS:
        score = each.score if each.score == "l2" else getattr(graphprune.scores, each.score).on(batches)
        cut, made = graphprune.shrink(net, batches[0][:1], score=score, scope=each.scope, return_plan=True, **target)
        losses[str(each)] = lost(net, graphprune.repair(cut, net, made, fits, progress=False), checks)
    chosen = min(losses, key=losses.__getitem__)
    assert f"chose {chosen}:" in note or losses[note.split("chose ")[1].split(":")[0]] < automatic.CLEAR
    assert max(losses.values()) > min(losses.values())  # there was something to choose
    assert lost(net, small, checks) < 1.5 * min(losses.values())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_the_choice_is_the_same_every_time():
    net, batches = trained()
    one, two = (graphprune.shrink(net, batches[0][:1], macs=0.4, repair=batches, return_plan=True)[1] for _ in range(2))
    assert one.cuts == two.cuts and one.notes == two.notes


def test_a_ratio_keeps_its_meaning():
    net, batches = trained()
    small = graphprune.shrink(net, batches[0][:1], 0.5, score="auto", repair=batches)
    assert [module.out_features for module in small if isinstance(module, nn.Linear)] == [24, 16, 4]
    plain = graphprune.shrink(net, batches[0][:1], 0.5, repair=batches)
    assert [module.out_features for module in plain if isinstance(module, nn.Linear)] == [24, 16, 4]


def test_a_score_reads_the_inputs_of_the_repair():
    net, batches = trained()
    one = graphprune.shrink(net, batches[0][:1], 0.5, score="wanda_sp", repair=batches, return_plan=True)[1]
    two = graphprune.shrink(net, batches[0][:1], 0.5, score=graphprune.scores.wanda_sp.on(batches), repair=batches, return_plan=True)[1]
    assert one.cuts == two.cuts
    with pytest.raises(graphprune.errors.NeedsBatches):
        graphprune.shrink(net, batches[0][:1], 0.5, score="wanda_sp")


def test_a_target_that_leaves_nothing_of_the_function_is_said():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    batches = list(torch.randn(256, 8, dtype=F64).mul(3).split(32))
    with pytest.warns(UserWarning, match="little of the function is left"):
        graphprune.shrink(net, batches[0][:1], macs=0.015, repair=batches)


def test_without_inputs_nothing_changes():
    net, batches = trained()
    one = graphprune.plan(net, batches[0][:1], macs=0.5)
    two = graphprune.shrink(net, batches[0][:1], macs=0.5, return_plan=True)[1]
    assert one.cuts == two.cuts and not any("chose" in line for line in two.notes)
    with pytest.warns(LessThanAsked):
        graphprune.shrink(net, batches[0][:1], macs=2e9)


def test_effort_says_how_much_is_tried():
    """The more is tried, the less is lost; every one is the same again, and says what it tried. The control: another score loses more."""
    net, batches = trained()
    notes, losses, plans = {}, {}, {}
    for effort in ("fast", "standard", "best"):
        for _ in range(2):
            repair = graphprune.Repair(batches, effort=effort, progress=False)
            small, plan = graphprune.shrink(net, batches[0][:1], macs=0.25, repair=repair, return_plan=True)
            assert plans.setdefault(effort, plan).cuts == plan.cuts
        notes[effort] = [line for line in plan.notes if "chose" in line]
        losses[effort] = lost(net, small, batches[-2:])
        with torch.no_grad():
            assert torch.allclose(graphprune.apply(net, plan)(batches[0]), graphprune.zeroed(net, plan)(batches[0])[0], atol=1e-10)
    assert all(len(lines) == 1 for lines in notes.values())
    assert "tried nothing else" in notes["fast"][0] and notes["fast"][0].startswith("note: chose effect, global")
    assert "in 4 rounds" in notes["best"][0] and notes["best"][0].count("%") >= len(automatic.BUDGETS) + len(automatic.FURTHER)
    assert losses["best"] <= 1.05 * losses["standard"] <= 1.2 * losses["fast"]
    assert max(losses.values()) < lost(net, graphprune.shrink(net, batches[0][:1], macs=0.25, score="random"), batches[-2:])


def test_effort_that_has_no_effect_is_an_error():
    net, batches = trained()
    with pytest.raises(graphprune.errors.BadCalibration, match="effort is 'much'; it is 'fast', 'standard' or 'best'"):
        graphprune.Repair(batches, effort="much")
    with pytest.raises(graphprune.errors.BadOption, match="a score is named"):
        graphprune.shrink(net, batches[0][:1], macs=0.5, score="l2", repair=graphprune.Repair(batches, effort="best"))
    with pytest.raises(graphprune.errors.BadOption, match="none is looked for"):
        graphprune.shrink(net, batches[0][:1], latency=0.5, score="auto", repair=graphprune.Repair(batches, effort="best"))


def test_what_is_planned_on_the_way_is_not_planned_again(monkeypatch):
    from graphprune import deciding

    net, batches = trained()
    calls = []
    monkeypatch.setattr(deciding, "PLANNER", lambda *asked, planner=deciding.PLANNER: calls.append(asked[2].score) or planner(*asked))
    plan = graphprune.shrink(net, batches[0][:1], macs=0.25, repair=batches, return_plan=True)[1]
    assert calls == [each.score for each in automatic.BUDGETS][: len(calls)] and 1 <= len(calls) <= 3
    assert sum("chose" in line for line in plan.notes) == 1
