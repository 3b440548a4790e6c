"""A budget reached in rounds: one plan for the original, exact, within the budget, and worth its seconds."""

import pytest
import torch
from test_automatic import F64, lost, trained
from torch import nn

import graphprune
from graphprune.errors import BadCalibration, BadOption


def shrunk(net, batches, rounds, **target):
    repair = graphprune.Repair(batches, rounds=rounds, progress=False)
    return graphprune.shrink(net, batches[0][:1], score="effect", scope="global", repair=repair, return_plan=True, **target)


@pytest.mark.parametrize("target", [{"params": 0.4}, {"macs": 0.3}, {"params": 300, "macs": 0.9}])
def test_rounds_make_one_plan_of_the_original_within_the_budget(target):
    net, batches = trained()
    full = sum(parameter.numel() for parameter in net.parameters())
    small, plan = shrunk(net, batches, 4, **target)
    cut, zero = graphprune.apply(net, plan), graphprune.zeroed(net, plan)
    x = batches[0]
    with torch.no_grad():
        (wanted,) = zero(x)
        assert torch.allclose(cut(x), wanted, atol=1e-10)
        assert not torch.allclose(small(x), wanted, atol=1e-3)  # which is repaired
    bound = target.get("params", 1.0)
    assert sum(parameter.numel() for parameter in small.parameters()) <= (bound if bound > 1 else bound * full)
    assert any("4 rounds" in note for note in plan.notes)


def test_rounds_go_on_from_what_the_rounds_before_left():
    net, batches = trained()
    halves = [shrunk(net, batches, rounds, params=bound)[1] for rounds, bound in ((1, 0.7), (2, 0.4))]
    first, both = ({name: set(keep[0]) for name, keep in plan.cuts.items() if 0 in keep} for plan in halves)
    assert all(both.get(name, keep) <= keep for name, keep in first.items())


class Twins(nn.Module):
    """Two layers that make the same features, of which the second's readers are a little larger."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.first, self.second = (nn.Linear(8, size) for size in (8, 8, 4, 4))
        self.two.load_state_dict(self.one.state_dict())
        with torch.no_grad():
            self.second.weight.copy_(1.05 * self.first.weight)

    def forward(self, x):
        return self.first(torch.tanh(3 * self.one(x))) + self.second(torch.tanh(3 * self.two(x)))


def test_rounds_see_what_other_layers_can_say_by_now():
    net = Twins().double()
    batches = list(torch.randn(512, 8, dtype=F64).split(64))
    half = sum(tensor.numel() for tensor in (*net.one.parameters(), *net.second.parameters())) + 4
    (small, once), (better, slowly) = (shrunk(net, batches, rounds, params=half) for rounds in (1, 8))
    assert once.cuts["one.weight"][0] == once.cuts["two.weight"][0]  # of some features both went
    kept = [set(slowly.cuts[name][0]) for name in ("one.weight", "two.weight")]
    assert len(set.union(*kept)) > len(set(once.cuts["one.weight"][0]))
    assert lost(net, better, batches[6:]) < 0.75 * lost(net, small, batches[6:])


def test_what_rounds_cannot_share_out_is_refused():
    net, batches = trained()
    x = batches[0][:1]
    with pytest.raises(BadCalibration, match="rounds is 0"):
        graphprune.Repair(batches, rounds=0)
    with pytest.raises(BadOption, match="rounds=2 share out a budget"):
        graphprune.shrink(net, x, ratio=0.5, repair=graphprune.Repair(batches, rounds=2))
    with pytest.raises(BadOption, match="widths of single groups"):
        graphprune.shrink(net, x, params=0.5, widths=graphprune.Widths(ratios={"0": 0.2}), repair=graphprune.Repair(batches, rounds=2))
    with pytest.raises(BadCalibration, match="nothing to learn from"):
        graphprune.shrink(nn.Sequential(*net), x, params=0.5, repair=graphprune.Repair(steps="data-free", rounds=2))
