"""Drawn uses of sizes: an expression of a size, put to a use, by which an axis goes rightly or stays whole; never a wrong result, never a refusal."""

import copy
import fractions
import functools
import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.errors import NothingToPrune

NAMES = {"np": np, "math": math, "fractions": fractions, "torch": torch, "F": nn.functional}  # what the drawn code may name

X = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@functools.lru_cache(maxsize=64)
def half(count):
    return count // 2


SEEDS = ["h.shape[1]", "h.size(-1)", "net.up.out_features", "net.width", "len(net.up.weight)", "h.shape[1:].numel()", "h[0].numel()"]
STEPS = [
    "{} // 2", "{} >> 1", "int({} / 2)", "int({})", "-(-{} // 3)", "divmod({}, 3)[0]", "round({} / 3)", "abs({} - 12)", "max({}, 2)", "min({}, 4)",
    "int(np.prod([{}, 1]))", "math.floor({} / 2)", "math.gcd({}, 8)", "math.isqrt({})", "len(range({}))", "int(str({}))", "sum([1] * {})", "len([0] * {})",
    "int(format({}, 'd'))", "int('%s' % {})", "int(fractions.Fraction({}, 2))", "{}.bit_length()", "half({})", "int(math.log2({} + 1))",
    "{} * 2 - 3", "{} % 5 + 1", "int(math.sqrt({}))",
    "{{3: 1}}.get({}, 2)", "int({} == 12) + 1", "int(torch.tensor({}))", "[{}][0]", "int(np.int64({}) // 2)", "{} ** 2 // 12", "(4 if {} % 4 == 0 else 3)",
]  # fmt: skip
USES = [
    "h * ({})", "h / (1 + {})", "h + ({})", "({}) - h", "torch.add(h, h, alpha={})", "h.clamp(max={})", "h * torch.full((1,), float({}))",
    "h.roll({}, 1)", "h.roll(-({}), 1)", "h.narrow(1, 0, ({} - 1) % h.shape[1] + 1).sum(1, keepdim=True) + h", "put(h, slice(0, {}), 0.5)",
    "put(h, slice({} % h.shape[1], None), 0.5)", "put(h, slice(-({}), None), 0.5)", "put(h, slice(0, None, {} % 3 + 1), 0.5)",
    "torch.cat([p * (i + 1) for i, p in enumerate(h.split({}, 1))], 1)", "torch.cat([p * (i + 1) for i, p in enumerate(h.chunk({}, 1))], 1)",
    "torch.cat([p * (i + 1) for i, p in enumerate(h.tensor_split({} % 12 + 1, 1))], 1)", "loop(h, {})",
    "h.view(len(h), -1, math.gcd({}, h.shape[1])).flip(1).reshape(h.shape)",
    "h.view(len(h), math.gcd({}, h.shape[1]), -1).cumsum(2).reshape(h.shape)", "F.pad(h, ({} % 4, 0))[:, : h.shape[1]]", "h * torch.arange({} + 1.0).sum()",
    "h * (2.0 if {} > 5 else 3.0)", "h + torch.zeros({}).numel()", "h[:, :1].expand(-1, h.shape[1]) * ({}) + h", "h[:, {} % h.shape[1]].unsqueeze(1) + h",
]  # fmt: skip


def put(h, part, value):
    h = h.clone()
    h[:, part] = value
    return h


def loop(h, count):
    for _ in range(count):
        h = h * 1.01
    return h


class Net(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.up, self.down, self.width = nn.Linear(6, 12), nn.Linear(12, 3), 12
        self.__dict__["use"] = eval(f"lambda net, h: {code}", {**NAMES, "half": half, "put": put, "loop": loop})

    def forward(self, x):
        return self.down(self.use(self, self.up(x).tanh()))


def masked(model, plan):
    twin, masks = copy.deepcopy(model), plan.masks(model)
    for name, tensor in twin.named_parameters():
        if name in plan.cuts:
            tensor.data.mul_(masks[name])
    return twin


@st.composite
def codes(draw):
    expression = draw(st.sampled_from(SEEDS))
    for step in draw(st.lists(st.sampled_from(STEPS), max_size=2)):
        expression = step.format(f"({expression})")
    return draw(st.sampled_from(USES)).format(f"({expression})")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(codes(), st.booleans(), st.sampled_from([0.25, 0.5, 0.75]))
def test_whatever_becomes_of_a_size(code, verify, ratio):
    torch.manual_seed(0)
    net = Net(code).double().eval()
    try:
        with torch.no_grad():
            net(X)
    except (RuntimeError, IndexError, ZeroDivisionError, ValueError):
        return
    try:
        small, plan = graphprune.shrink(net, X, ratio, return_plan=True, verify=verify)
    except NothingToPrune:
        return
    with torch.no_grad():
        for batch in (X, X[:1] * 2):
            assert torch.allclose(small(batch), masked(net, plan)(batch), atol=1e-9)
