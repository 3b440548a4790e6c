"""Sizes that only a further run uses: training mode, another example, another method. They hold like those of the first run, with the check or without."""

import pytest
import torch
from judge import emptied, gap
from torch import nn

import graphprune
from graphprune.errors import NothingToPrune
from graphprune.planning.proof import Proof
from graphprune.tracing.trace import trace

F64 = torch.float64
X, LONG = (torch.randn(rows, 8, dtype=F64, generator=torch.Generator().manual_seed(rows)) for rows in (3, 5))


def written(h):
    h = h.clone()
    h[:, :4] = 0
    return h


FURTHER = {
    "a part by literals": lambda h: torch.cat([h[:, :8], h[:, 8:] * 2], 1),
    "a part from the end": lambda h: torch.cat([h[:, -6:] * 3, h[:, :-6]], 1),
    "written to": written,
    "noise of a literal width": lambda h: h + torch.randn(16, generator=torch.Generator().manual_seed(0)).to(h),
    "a factor": lambda h: h / h.shape[1],
    "a factor that forgot what it is": lambda h: h * (1 + True * h.shape[1]),
    "halves of the size": lambda h: torch.cat([h[:, : h.shape[1] // 2] * 2, h[:, h.shape[1] // 2 :]], 1),
}


class Further(nn.Module):
    """8 -> 16 -> 4, with something between that only some runs do."""

    def __init__(self, between):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)
        self.__dict__["between"] = between

    def hidden(self, x):
        return self.up(x).relu()

    def again(self, x):
        return self.down(self.between(self.hidden(x)))


class InTraining(Further):
    def forward(self, x):
        return self.again(x) if self.training else self.down(self.hidden(x))


class WhenLong(Further):
    def forward(self, x):
        return self.again(x) if len(x) > 3 else self.down(self.hidden(x))


class Another(Further):
    def forward(self, x):
        return self.down(self.hidden(x))


WAYS = {
    "training": (InTraining, (), lambda net: net.train()(X)),
    "a longer example": (WhenLong, (LONG,), lambda net: net(LONG)),
    "another method": (Another, (lambda net: net.again(X),), lambda net: net.again(X)),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("between", FURTHER)
def test_what_a_further_run_does_holds(between, way, verify):
    kind, examples, run = WAYS[way]
    torch.manual_seed(0)
    net = kind(FURTHER[between]).double().eval()
    score = graphprune.scores.random.with_(seed=0)
    try:
        small, plan = graphprune.shrink(net, X, 0.5, score=score, examples=examples, return_plan=True, verify=verify)
    except NothingToPrune as error:
        assert "up.weight axis 0" in str(error)
        return
    zero = emptied(net, plan)
    with torch.no_grad():
        assert gap(run(small), run(zero)) < 1e-9
        assert gap(small.eval()(X), zero.eval()(X)) < 1e-9


def test_what_the_code_gets_right_in_a_further_run_goes():
    net = InTraining(FURTHER["halves of the size"]).double().eval()
    assert graphprune.shrink(net, X, 0.5).up.out_features == 8


def test_the_control(monkeypatch):
    """Without a look at further runs a part by literals in training mode is cut in the wrong places."""
    monkeypatch.setattr(Proof, "judge", lambda *_, **__: ([], []))
    torch.manual_seed(0)
    net = InTraining(FURTHER["a part by literals"]).double().eval()
    small, plan = graphprune.shrink(net, X, 0.5, score=graphprune.scores.random.with_(seed=0), return_plan=True, verify=False)
    with torch.no_grad():
        assert gap(small.train()(X), emptied(net, plan).train()(X)) > 1e-3


def test_calls_are_numbered_over_all_runs():
    graph = trace(WhenLong(FURTHER["a part by literals"]).eval(), X.float(), examples=(LONG.float(),))
    (rerun,) = graph.reruns
    assert rerun.start == len(graph.nodes) and rerun.which == 0
    assert {call.op for call in graph.calls if rerun.covers(call.since)} >= {"__getitem__"}


class Always(Further):
    """… in every run."""

    def forward(self, x):
        return self.down(self.between(self.up(x)))


BESIDE = {
    "an empty part": lambda h: torch.cat([h, h[..., h.shape[-1] :]], -1),
    "an empty part of another axis": lambda h: torch.cat([h, h[len(h) :]], 0),
    "an empty part that is computed with": lambda h: h + (h[len(h) :] * h.new_ones(1)).sum(),
    "an empty part, moved": lambda h: torch.cat([h.t(), h[len(h) :].t()], 1).t(),
}


@pytest.mark.parametrize("between", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("home", ["cpu", "meta"])
def test_a_plan_made_without_values_takes_what_one_with_values_takes(between, home):
    net, x = Always(between).double(), X
    checked = graphprune.shrink(net, x, 0.5, return_plan=True)[1]
    chosen = graphprune.plan(net.to(home), x, 0.5, score="random")
    assert chosen.cuts.keys() == checked.cuts.keys() == {"up.weight", "up.bias", "down.weight"} and not any("shorter" in note for note in chosen.notes)
    with pytest.raises(NothingToPrune):  # the control
        graphprune.plan(Always(lambda h: between(h) * torch.arange(16, dtype=h.dtype, device=h.device)).double().to(home), x, 0.5, score="random")


class Taken(nn.Module):
    """Takes single features: for the shape alone, or to use them; in training, too, where other code runs."""

    def __init__(self, used=False, at=-1):
        super().__init__()
        self.inside, self.out, self.used, self.at = nn.Linear(4, 8), nn.Linear(8, 3), used, at

    def forward(self, x):
        y = torch.nn.functional.dropout(self.inside(x), 0.1, self.training)
        one = y[:, self.at] if self.training or self.at < 0 else y[:, 0]
        y = y * (1.0 if self.training else 2.0)
        return self.out(y) + (one.unsqueeze(-1) if self.used else 0.0 * one.shape[0])


@pytest.mark.parametrize("training", [False, True])
def test_a_feature_taken_for_its_shape_alone_stays_only_where_it_has_to(training):
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    free = graphprune.plan(Taken().train(training), x, 0.5)
    assert len(free.cuts["inside.weight"][0]) == 4
    used = graphprune.plan(Taken(used=True).train(training), x, 0.5).cuts["inside.weight"][0]  # the controls: one that is used
    assert len(used) == 5 and 7 in used
    with pytest.raises(NothingToPrune, match="select"):  # and one at a place that has to be there
        graphprune.plan(Taken(at=7).train(training), x, 0.5)
