"""What is left of a model without some modules, kept up to date as they go and come back, is what a walk through the whole graph finds."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import networks
from test_exact import X
from torch import nn

import graphprune
from graphprune.cost import macs_by_call
from graphprune.granularity.blocks import Modules
from graphprune.granularity.liveness import Liveness
from graphprune.granularity.remaining import Remaining
from graphprune.tracing.trees import leaf_tensors, tensors

SOME = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def reached(graph, turned):
    """From the outputs back, over the detours."""
    live, seen, todo = set(), set(), list(graph.outputs)
    while todo:
        value = todo.pop()
        if id(value) in turned:
            if id(value) not in seen and turned[id(value)] is not None:
                todo.append(turned[id(value)])
            seen.add(id(value))
        elif value.node >= 0 and value.node not in live:
            live.add(value.node)
            todo += tensors((graph.nodes[value.node].args, graph.nodes[value.node].kwargs))
    return live


@SOME
@given(networks(), st.integers(0, 10**6))
def test_calls_die_and_come_back_as_a_walk_would_find(net, seed):
    graph, rng = graphprune.trace(net, X), np.random.default_rng(seed)
    liveness, turned = Liveness(graph), {}
    values = [value for node in graph.nodes for value in node.outs]
    for _ in range(20):
        value = values[rng.integers(len(values))]
        before = set(np.flatnonzero(liveness.live).tolist())
        if id(value) in turned:
            del turned[id(value)]
            changed = liveness.back(value)
        else:
            earlier = [other for other in values if other.node < value.node]
            turned[id(value)] = earlier[rng.integers(len(earlier))] if earlier and rng.random() < 0.6 else None
            changed = liveness.turn(value, turned[id(value)])
        after = set(np.flatnonzero(liveness.live).tolist())
        assert after == reached(graph, turned) and changed == before ^ after
    assert not turned or reached(graph, turned) != set(range(len(graph.nodes)))


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x, gate):
        return self.layer(x * gate.sigmoid())


class Residual(nn.Module):
    def __init__(self, width, depth, tied):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(depth))
        self.gated, self.gate, self.head = Gated(width), nn.Linear(width, width), nn.Linear(width, 3)
        if tied:
            self.blocks[1][0].weight = self.blocks[0][0].weight

    def forward(self, x):
        x = x + self.gated(x, self.gate(x))  # the gate is needed for this alone
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def chain(depth):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8, 2))


NETS = {"chain": lambda: chain(7), "residual": lambda: Residual(8, 5, False), "tied": lambda: Residual(8, 5, True)}


def counted(graph, model, modules, gone):
    """From the definition: tensors with a name outside of all that is skipped, and calls that reach an output."""
    inside = tuple(f"{part.name}." for one in gone for part in one.skips)
    stays = {id(tensor): tensor for name, _, _, tensor in leaf_tensors(model) if not name.startswith(inside)}.values()
    turned = {}
    for one in gone:
        before, after = modules.ends(one.name)
        turned[id(after)] = None if one.skips[0].data[2] else before
    macs = macs_by_call(graph)
    params = sum(tensor.numel() for tensor in stays if isinstance(tensor, nn.Parameter))
    return {"params": params, "macs": sum(macs[index] for index in reached(graph, turned)), "size": sum(t.numel() * t.element_size() for t in stays)}


@pytest.mark.parametrize("name", NETS)
def test_what_remains_is_counted_step_by_step(name):
    model, x = NETS[name](), torch.randn(2, 8)
    graph = graphprune.trace(model, x)
    modules = Modules(graph, model)
    every = modules.layers()
    remaining, gone, rng = Remaining(graph, model, modules), [], np.random.default_rng(0)
    assert len(every) >= 5 and remaining.costs == counted(graph, model, modules, [])
    whole = dict(remaining.costs)
    for _ in range(40):
        one = every[rng.integers(len(every))]
        if one in gone:
            gone.remove(one)
            remaining.restore(one)
        else:
            gone.append(one)
            remaining.remove(one)
        assert remaining.costs == counted(graph, model, modules, gone)
        assert (remaining.costs == whole) == (not gone)


def test_what_only_a_removed_module_needed_goes_with_it():
    model, x = Residual(8, 5, False), torch.randn(2, 8)
    skips = {one.name: [part.name for part in one.skips] for one in Modules(graphprune.trace(model, x), model).layers()}
    assert skips["gated"] == ["gated", "gate"] and skips["blocks.1"] == ["blocks.1"]


@pytest.mark.parametrize("target", ["params", "macs", "size"])
def test_fewer_layers_hold_their_limit_and_no_removed_one_would_fit(target):
    model, x = chain(9), torch.randn(2, 8)
    graph = graphprune.trace(model, x)
    modules = Modules(graph, model)
    plan = graphprune.plan(model, x, what="layer", **{target: 0.6})
    gone = [one for one in modules.layers() if one.name in {part.name for part in plan.parts}]
    limit = 0.6 * counted(graph, model, modules, [])[target]
    assert gone and counted(graph, model, modules, gone)[target] <= limit
    for one in gone:
        assert counted(graph, model, modules, [other for other in gone if other is not one])[target] > limit


def test_the_work_of_removing_layers_grows_with_their_number(monkeypatch):
    """Counted, not timed: values whose readers change, for each layer of a chain."""
    work, count = [], Liveness._count
    monkeypatch.setattr(Liveness, "_count", lambda self, todo, step: (lambda changed: work.append(1 + len(changed)) or changed)(count(self, todo, step)))
    each = []
    for depth in (20, 80):
        work.clear()
        graphprune.plan(chain(depth), torch.randn(1, 8), what="layer", macs=0.5)
        each.append(sum(work) / depth)
    assert each[1] < 1.5 * each[0]
