"""What a model's code compiles by itself: functions and modules inside run as they are written, and what cannot be followed is said and left as it was."""

import threading

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import BadModel
from graphprune.tracing.surroundings import apart


def weighed(x, gain):
    return torch.nn.functional.gelu(x) * gain


class Compiled(nn.Module):
    def __init__(self, compiled=True):
        super().__init__()
        torch.manual_seed(0)
        make = (lambda what: torch.compile(what, backend="eager")) if compiled else (lambda what: what)
        self.a, self.gain, self.out = nn.Linear(4, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 2)
        self.inner = make(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.__dict__["weighed"] = make(weighed)

    def forward(self, x):
        return self.out(self.inner(self.weighed(self.a(x), self.gain)))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x)
        return self.out(torch.cond(x.sum() > 0, lambda v: self.b(v), lambda v: v.sin(), (x,)))


def stance():
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo warns of what it looks at
X, OTHER = (torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)) for rows in (3, 5))


def test_compiled_functions_and_modules_inside_are_cut_like_plain_ones():
    model, plain = Compiled(), Compiled(compiled=False)
    model(X)
    small, plan = graphprune.shrink(model, X, 0.5, return_plan=True)
    cuts = {name.replace("_orig_mod.", ""): axes for name, axes in plan.cuts.items()}
    assert cuts == graphprune.plan(plain, X, 0.5, score="l2").cuts and len(cuts["inner.0.weight"]) == 2
    torch.testing.assert_close(small(OTHER), graphprune.zeroed(model, plan)(OTHER)[0])
    assert not torch.allclose(small(OTHER), model(OTHER))  # the control
    torch.testing.assert_close(model(OTHER), plain(OTHER))
    assert stance() == "default"


def test_what_compiles_as_it_is_called_is_named_and_works_on():
    model = Branches()
    wanted = model(X)
    with pytest.raises(BadModel, match="torch.cond"):
        graphprune.shrink(model, X, 0.5)
    assert torch.equal(model(X), wanted) and stance() == "default"


def test_threads_turn_the_switch_once():
    torch.compile(weighed, backend="eager")  # dynamo is there
    inside, leave = threading.Barrier(3), threading.Barrier(3)
    seen = []

    def work():
        inside.wait(), leave.wait()
        seen.append(stance())

    threads = [threading.Thread(target=apart, args=(work,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert stance() == "force_eager"
    leave.wait()
    for thread in threads:
        thread.join()
    assert seen == ["force_eager"] * 2 and stance() == "default"
