"""Sizes that no run read: another method of the module needs them; they follow the axis that they say, or the plan says that they do not."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import GraphpruneError
from graphprune.planning.proof import Proof
from graphprune.tracing import trace as tracing

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Halves(nn.Module):
    """Two ways to the same end: one reads the size of a part, the other does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.part = 16
        self.up, self.one, self.down = nn.Linear(8, 32), nn.Linear(16, 16), nn.Linear(48, 4)
        self.double().eval()

    def forward(self, x):
        a, b = self.up(x).relu().chunk(2, 1)
        return self.down(torch.cat([a, b, self.one(b)], 1))

    def other(self, x):
        a, b = self.up(x).relu().split((self.part, self.part), 1)
        return self.down(torch.cat([a, b, self.one(b)], 1))


class Sliced(Halves):
    def other(self, x):
        y = self.up(x).relu()
        a, b = y[:, : self.part], y.narrow(1, self.part, self.part)
        return self.down(torch.cat([a, b, self.one(b)], 1))


class Viewed(Halves):
    def other(self, x):
        a, b = self.up(x).relu().view(len(x), 2, self.part).unbind(1)
        return self.down(torch.cat([a, b, self.one(b)], 1))


class Flagged(Halves):
    """A flag that an exporter sets, inside the same method."""

    exporting = False

    def forward(self, x):
        y = self.up(x).relu()
        a, b = y.split([self.part, self.part], dim=-1) if self.exporting else y.chunk(2, -1)
        return self.down(torch.cat([a, b, self.one(b)], 1))

    def other(self, x):
        self.exporting = True
        try:
            return self(x)
        finally:
            del self.exporting


class Inherited(Halves):
    """The code that reads it belongs to a parent."""


@pytest.mark.parametrize("kind", [Halves, Sliced, Viewed, Flagged, Inherited])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_another_method_reads_follows(kind, scope, monkeypatch):
    monkeypatch.setattr(tracing, "ways", lambda *_: ())  # else the flag is turned in a further run, which reads it
    net = kind()
    small, plan = graphprune.shrink(net, X, 0.5, scope=scope, score=graphprune.scores.random, return_plan=True)
    assert torch.allclose(net.other(X), net(X)) and small.part < 16 and "follow their axes: part" in " ".join(plan.notes)
    assert torch.allclose(small.other(X), small(X))
    small.part = 16  # control: what the original has
    with pytest.raises((RuntimeError, IndexError)):
        small.other(X)


class Inner(nn.Module):
    """As Halves, below other modules."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Sequential(Halves(), nn.Tanh()), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        return self.head(self.inner(x))


def test_inner_modules_follow():
    small, plan = graphprune.shrink(Inner(), X, 0.5, return_plan=True)
    assert small.inner[0].part == 8 and ("inner.0", "part", 8) in plan.edits
    assert graphprune.Plan.from_json(plan.to_json()).edits == plan.edits


class Factor(Halves):
    """It is not only a size."""

    def other(self, x):
        a, b = self.up(x).relu().split((self.part, self.part), 1)
        return self.down(torch.cat([a, b, self.one(b)], 1)) * self.part


class Counted(Halves):
    """Nothing says that it is a size."""

    def other(self, x):
        for _ in range(self.part):
            x = x + 1
        return x


class Stored(Halves):
    other = None

    def __init__(self):
        super().__init__()
        self.wide = 32


@pytest.mark.parametrize(("kind", "name"), [(Factor, "part = 16"), (Counted, "part = 16"), (Stored, "wide = 32")])
def test_what_cannot_be_followed_is_named(kind, name):
    small, plan = graphprune.shrink(kind(), X, 0.5, return_plan=True)
    assert any("still say what an axis was" in note and name in note for note in plan.notes)
    assert getattr(small, name.partition(" ")[0]) == int(name.rpartition(" ")[2])


class Steps(Halves):
    """A number that is no length of any axis that is cut."""

    def __init__(self):
        super().__init__()
        self.steps, self.inputs = 7, 8


def test_other_numbers_are_not_mentioned():
    small, plan = graphprune.shrink(Steps(), X, 0.5, return_plan=True)
    assert (small.steps, small.inputs) == (7, 8) and not any("steps" in note or "inputs" in note for note in plan.notes)


class Offering(Flagged):
    """Flags of the class, and a method that names one beside a size, which no forward comes to."""

    supported = True

    def describe(self):
        return self.part if self.supported else 0


class Helped(Flagged):
    """… and one that it does come to, through another method."""

    def forward(self, x):
        return self.ended(self.up(x).relu())

    def ended(self, y):
        a, b = y.split([self.part, self.part], dim=-1) if self.exporting else y.chunk(2, -1)
        return self.down(torch.cat([a, b, self.one(b)], 1))


@pytest.mark.parametrize("kind, turned", [(Flagged, ["exporting"]), (Offering, ["exporting"]), (Helped, ["exporting"]), (Halves, [])])
def test_only_flags_that_a_forward_comes_to_are_turned(kind, turned):
    assert [way.name for way in graphprune.trace(kind(), X).asked.others] == turned


class Told(nn.Module):
    """Code that asks where a tensor with a cut axis lies, and in which form."""

    def __init__(self, ask):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)
        self.__dict__["ask"] = ask

    def forward(self, x):
        y = self.up(x)
        return self.down(y * self.ask(y))


ASKS = {
    "a device": lambda y: torch.arange(1, 2, device=y.device),
    "the processor": lambda y: torch.ones(1, dtype=y.dtype) if y.is_cpu else torch.zeros(1, dtype=y.dtype, device=y.device),
    "a device by name": lambda y: torch.full((len(y), 1), 2.0, device=str(y.device)),
    "an index": lambda y: torch.ones(1, device="cpu" if y.device.index is None else y.device),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("home", ["cpu", "meta"])
def test_a_plan_is_proved_where_the_code_asks_for_a_device(ask, home, monkeypatch):
    differences, compared = [], Proof.difference

    def noted(proof, *args):
        differences.append(compared(proof, *args))
        return differences[-1]

    monkeypatch.setattr(Proof, "difference", noted)
    with torch.device(home):
        net = Told(ask)
    chosen = graphprune.plan(net, torch.ones(3, 8), 0.5, score="random")
    assert differences == [None] and len(chosen.cuts["up.weight"][0]) == 16
    differences.clear()
    with torch.device(home):  # the control: a plan that does something else is seen to
        net = Told(lambda y: ask(y).expand(y.shape[0], 32) if y.shape[1] == 32 else ask(y)[..., :1] + torch.zeros(1, 1, 1))
    with pytest.raises(GraphpruneError):
        graphprune.plan(net, torch.ones(3, 8), 0.5, score="random")
