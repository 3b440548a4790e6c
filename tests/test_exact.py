"""The oracle: what is cut computes what the zeroed original computes, and zeroing other units differs."""

import copy
import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import BLOCKS, Flat, networks
from torch import nn

import graphprune
from graphprune.cutting.plan import make_plan
from graphprune.select import select

DRAWS = int(os.environ.get("GRAPHPRUNE_DRAWS", "150"))
X = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gap(left, right):
    left, right = left.detach(), right.detach()
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))


@settings(max_examples=DRAWS, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from([0.25, 0.5, 0.75]), st.sampled_from(["layer", "global", "isomorphic"]), st.integers(0, 99))
def test_removed_equals_zeroed(net, ratio, scope, seed):
    criterion = graphprune.scores.random.with_(seed=seed)
    small, plan = graphprune.shrink(net, X, ratio, criterion=criterion, scope=scope, return_plan=True, verify=False)
    (zero,) = graphprune.zeroed(net, plan)(X)
    assert gap(small(X), zero) < 1e-9
    assert type(small) is type(net)


@settings(max_examples=max(20, DRAWS // 10), deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_control_zeroing_other_units_differs(net):
    graph = graphprune.trace(net, X)
    groups = graphprune.couple(graph)
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    other = make_plan(groups, select(groups, [-s for s in graphprune.score(groups, net)], 0.5), {}, ())
    assert other.cuts != plan.cuts
    (zero,) = graphprune.zeroed(net, other)(X)
    assert gap(small(X), zero) > 1e-6


@pytest.mark.parametrize("block", BLOCKS)
def test_every_construct_really_shrinks(block):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 1), block(8, 8), Flat(8)).double().eval()
    small = graphprune.shrink(net, X, 0.5)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(small) < 0.62 * count(net)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(["layer", "global", "isomorphic"]))
def test_a_larger_ratio_never_leaves_more(net, scope):
    sizes = [sum(p.numel() for p in graphprune.shrink(net, X, r, scope=scope, verify=False).parameters()) for r in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_model_is_untouched_and_the_small_one_is_whole():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), Flat(8)).double().train()
    net[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training and small.training and small[2].training
    assert list(small.state_dict()) == list(before)
    assert not small[0].weight.requires_grad and small[3].out.weight.requires_grad
    assert (small[0].out_channels, small[1].num_features, small[3].out.in_features) == (4, 4, 64)
    masks = plan.masks(net)
    wide = graphprune.expand(small)
    assert all(torch.equal(wide[name], before[name] * masks[name]) for name in before)
    small(X).sum().backward()
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {name: t.numel() for name, t in small.state_dict().items()}
    assert "groups" not in plan.explain() and "0.weight axis 0: 8 -> 4" in plan.explain(verbose=True)


def test_inplace_keeps_the_object():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert graphprune.shrink(net, torch.randn(1, 4), 0.5, inplace=True) is net
    assert net[0].out_features == 4


def test_channels_last_and_ties_survive():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return {"logits": self.head(self.mid(self.embed(ids)).relu())}

    small = graphprune.shrink(Tied(), torch.tensor([[1, 2, 3]]), 0.5)
    assert small.head.weight is small.embed.weight and small.embed.embedding_dim == 4
    conv = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 2, 3)).to(memory_format=torch.channels_last)
    weight = graphprune.shrink(conv, torch.randn(1, 2, 8, 8), 0.5)[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_operation_locks_only_what_it_touches():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(torch.linalg.matrix_exp(self.b(self.a(x).relu()).tanh()))

    small, plan = graphprune.shrink(Odd(), torch.randn(8, 4), 0.5, return_plan=True)
    assert (small.a.out_features, small.b.out_features) == (4, 8)
    assert "matrix_exp" in plan.explain()


def test_nothing_of_the_run_waits_for_the_garbage_collector():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    count = lambda: sum(type(held) is nn.Linear for held in gc.get_objects())  # noqa: E731
    gc.collect()
    before = count()
    gc.disable()
    try:
        small = graphprune.shrink(net, torch.zeros(1, 4))
        assert count() == before + 2  # those of the smaller model; the copy that was run is gone
        circle = [copy.deepcopy(small)]
        circle.append(circle)
        del circle
        assert count() == before + 4  # what stands in a circle would be seen
    finally:
        gc.enable()


class Inference(nn.Module):
    """A forward that asks for inference mode itself: convolutions and norms arrive before they are taken apart."""

    def __init__(self):
        super().__init__()
        self.a, self.m, self.b, self.c = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Linear(16, 4)

    def plain(self, x):
        return self.c(self.b(self.m(self.a(x)).relu()).relu().mean((2, 3)))

    @torch.inference_mode()
    def forward(self, x):
        return self.plain(x)


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_inside_the_model_and_around_the_call(inside):
    net, x = Inference().eval().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if not inside:
        net.forward = net.plain
    with torch.inference_mode(not inside):
        small, plan = graphprune.shrink(net, x, return_plan=True)
        assert (small.a.out_channels, small.b.out_channels, small.c.in_features) == (4, 8, 8)
        assert torch.allclose(small(x), graphprune.zeroed(net, plan)(x)[0], atol=1e-12)
        better = graphprune.shrink(net, x, calibration=[torch.randn(64, 3, 8, 8, dtype=torch.float64) for _ in range(4)])
        assert not torch.equal(better.c.weight, small.c.weight)
