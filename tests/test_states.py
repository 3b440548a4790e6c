"""States beside the logits follow what is cut, where the result names its parts and a configuration states the widths; nothing else does."""

import dataclasses
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import NotEqual
from graphprune.tracing.trees import replace

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Config:
    def __init__(self, **numbers):
        self.__dict__.update(numbers)


@dataclass
class Result:
    logits: torch.Tensor | None = None
    state: object = None
    loss: torch.Tensor | None = None


@dataclass
class Scores:
    scores: torch.Tensor | None = None
    state: object = None


def computed(net, h):
    """What the logits are computed from."""
    return Result(net.down(net.mid(h).relu()), h)


CONFIG = Config(hidden_size=16, inner=12)


class Net(nn.Module):
    """Two hidden layers; ``pack`` makes the result of the first one."""

    def __init__(self, pack, config=CONFIG):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mid, self.down = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.__dict__["pack"] = pack
        if config is not None:
            self.config = config
        self.double()

    def forward(self, x, state=None):
        h = self.up(x).relu()
        if state is not None:
            h = h + (state[0] if isinstance(state, list) else state)
        return self.pack(self, h)


FOLLOWING = {
    "a tensor": computed,
    "several": lambda net, h: Result(net.down(net.mid(h).relu()), (h, [h])),
    "of a layer behind": lambda net, h: (lambda inner: Result(net.down(inner.relu()), inner))(net.mid(h)),
    "with a loss": lambda net, h: Result(y := net.down(net.mid(h).relu()), h, y.square().mean()),
    "taken back": lambda net, h: Result(net.down(net.mid(h).relu()), h.tanh()),
    "a list that is taken back": lambda net, h: Result(net.down(net.mid(h).relu()), [h * 0.5]),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_states_follow(name):
    net = Net(FOLLOWING[name])
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert small.up.out_features == 8 and any("states beside the logits" in note for note in plan.notes)
    result, again = small(X), small(X, small(X).state) if "taken" in name else None
    wide, narrow = (graphprune.tracing.trees.tensors(each.state, torch.Tensor) for each in (net(X), result))
    assert all(len(one) == len(other) and other.shape[1] < one.shape[1] for one, other in zip(wide, narrow, strict=True))
    assert again is None or again.logits.shape == (3, 4)


HELD = {
    "no configuration": (computed, None),
    "a configuration of other sizes": (computed, Config(hidden_size=20)),
    "a tuple": (lambda net, h: dataclasses.astuple(computed(net, h)), Config(hidden_size=16)),
    "a dictionary": (lambda net, h: {"logits": net.down(net.mid(h)), "state": h}, Config(hidden_size=16)),
    "a namespace": (lambda net, h: types.SimpleNamespace(logits=net.down(net.mid(h)), state=h), Config(hidden_size=16)),
    "no logits": (lambda net, h: Scores(net.down(net.mid(h)), h), Config(hidden_size=16)),
    "logits that are made of something else": (lambda net, h: Result(net.down(net.mid(torch.zeros_like(h))), (h.sin(),)), Config(hidden_size=16)),
}


@pytest.mark.parametrize("name", HELD)
def test_everything_else_keeps_its_width(name):
    pack, config = HELD[name]

    class Plain(Net):
        def forward(self, x):
            return super().forward(x)

    small, plan = graphprune.shrink(Plain(pack, config), X, 0.5, return_plan=True)
    assert small.up.out_features == 16 and not any("states beside the logits" in note for note in plan.notes)


@pytest.mark.parametrize("outputs", [("logits", "state"), ["state"], lambda path, tensor: True])
def test_the_users_word_keeps_them(outputs):
    assert graphprune.shrink(Net(computed), X, 0.5, outputs=outputs).up.out_features == 16


def test_a_state_that_is_given_keeps_its_width():
    state = torch.randn(3, 16, dtype=torch.float64)
    assert graphprune.shrink(Net(FOLLOWING["taken back"]), (X, state), 0.5).up.out_features == 16


@pytest.mark.parametrize("fault", [lambda t: t.flip(1), lambda t: t * 1.01, lambda t: t[:, :4], lambda t: torch.zeros_like(t)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_check_compares_what_is_left_of_them(fault, dtype):
    """A planted fault in nothing but the state is seen; without it the two agree."""
    net = Net(computed).to(dtype)
    net.__dict__["fault"] = lambda state: state
    net.__dict__["pack"] = lambda net, h: (lambda result: dataclasses.replace(result, state=net.fault(result.state)))(computed(net, h))
    graph = graphprune.trace(net, X.to(dtype))
    small, plan = graphprune.shrink(net, X.to(dtype), 0.5, return_plan=True)
    assert graphprune.cutting.verify.check(graph, net, small, plan) < 1e-4
    small.__dict__["fault"] = lambda state: replace(state, fault)
    with pytest.raises(NotEqual, match="state"):
        graphprune.cutting.verify.check(graph, net, small, plan)
