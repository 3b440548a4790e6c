"""Costs are exact: equal to torch's own counter, and what the graph predicts is what the cut model costs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import BLOCKS, networks
from test_exact import X
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_support import declare_operators

import graphprune
from graphprune.cost import costs
from graphprune.cutting.plan import Survivors, make_plan
from graphprune.tracing.trees import tensors

declare_operators()


def counted(model, args, kwargs=None):
    """torch's counter, with fused paths off, which it does not see."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(*args, **(kwargs or {}))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def stays(groups, plan):
    """The kept units of every group, read from a plan."""
    found = []
    for group in groups:
        (name, axis), units = next(iter(group.places.items()))
        left = units[plan.cuts.get(name, {}).get(axis, slice(None))]
        found.append(torch.from_numpy(np.unique(left[left >= 0])))
    return found


def agrees(model, args, kwargs=None, counts=True, criterion="random", memory=True):
    groups = graphprune.couple(graphprune.trace(model, args, kwargs))
    small, plan = graphprune.shrink(model, args, 0.4, criterion=criterion, example_kwargs=kwargs, return_plan=True, verify=False)
    known, kept = costs(groups), stays(groups, plan)
    if make_plan(groups, kept, {}, ()).cuts != plan.cuts:  # the code holds a size that settles a field along another axis: these are not the plan's groups
        return known
    before, after = known.full, known.of(kept)
    real = graphprune.profile(small, args, kwargs)
    # With one head left, a reshape is a view where it was a copy before: that memory is an upper limit.
    assert after == (real if memory else replace(real, memory=after.memory)) and after.memory >= real.memory
    assert after.params < before.params and after.macs < before.macs and after.size < before.size
    for net, found in ((model, before), (small, after)):
        assert found.params == sum(p.numel() for p in net.parameters())
        assert not counts or found.flops == counted(net, args, kwargs)
    if known.lengths.even:
        at = known.at(np.array([[len(stay) for stay in kept]], dtype=float))
        assert {name: round(float(value[0])) for name, value in at.items()} == after.__dict__
    return known


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "swin_t"])
def test_torchvision(name):
    from torchvision import models

    agrees(models.get_model(name, weights=None).to("meta"), (torch.randn(1, 3, 224, 224, device="meta"),))


@pytest.mark.parametrize("name", ["levit_128s", "skresnet18"])
def test_timm(name):
    import timm

    agrees(timm.create_model(name).eval().to("meta"), (torch.randn(2, 3, 224, 224, device="meta"),))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_transformers(kind):
    import transformers

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.CONFIG_MAPPING[kind](**small, **({"num_key_value_heads": 2} if kind == "llama" else {}))
    auto = transformers.AutoModelForSequenceClassification if kind == "bert" else transformers.AutoModelForCausalLM
    agrees(auto.from_config(config), (), {"input_ids": torch.randint(3, 60, (1, 8))} | ({} if kind == "bert" else {"use_cache": False}))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.integers(0, 99))
def test_every_axis_of_every_tensor_has_the_predicted_length(net, seed):
    graph = graphprune.trace(net, X)
    groups = graphprune.couple(graph)
    known, rng = costs(groups), np.random.default_rng(seed)
    kept = [torch.from_numpy(np.sort(rng.choice(g.size, rng.integers(1, g.size + 1), replace=False))) for g in groups]
    survivors, found = Survivors(groups, kept), known.lengths.of(kept)
    for value in tensors([(node.args, node.kwargs, node.outs) for node in graph.nodes]):
        for dim in range(len(value.shape)):
            factor, form = known.lengths.form(value, dim)
            assert factor * found[form] == survivors.axis(value, dim).sum()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(BLOCKS[:12]))
def test_drawn_networks_before_and_after(net):
    agrees(net, (X,), counts=False)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_drawn_networks_of_all_constructs_before_and_after(net):
    agrees(net, (X,), counts=False, memory=False)


def test_uneven_units_are_counted_exactly():
    class Uneven(nn.Module):  # only the first four of eight channels are squared
        def __init__(self):
            super().__init__()
            self.half, self.a, self.b = 4, nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + (y[:, : self.half] * y[:, : self.half]).sum(1, keepdim=True).exp()

    first = lambda groups, *_: [torch.arange(g.size, 0, -1).double() for g in groups]  # noqa: E731
    assert agrees(Uneven(), (torch.randn(64, 4),), criterion=first).lengths.uneven


def test_known_figures_and_the_report_line():
    from torchvision import models

    with torch.device("meta"):
        vgg = models.vgg16(weights=None, init_weights=False)
    line = str(graphprune.profile(vgg, torch.zeros(1, 3, 224, 224)))
    assert line.startswith("138.36 M params, 15.47 GMACs (30.94 GFLOPs), 528 MiB")


def test_peak_memory_of_a_chain_and_of_a_shortcut():
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 16, 2))
    x, volume = torch.zeros(2, 3, 4, 4), lambda *shape: 4 * math.prod(shape)
    # The caller holds the input; the in-place ReLU and the flattening make nothing new.
    assert graphprune.profile(chain, x).memory == volume(2, 3, 16) + volume(2, 8, 16) + volume(2, 4, 16)

    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 4)

        def forward(self, x):
            return x + self.b(self.a(x).relu()) * 2

    y = torch.zeros(1, 4)
    assert graphprune.profile(Shortcut(), y).memory == volume(4) + 2 * volume(32)
    assert graphprune.profile(Shortcut().double(), y.double()).memory == 2 * (volume(4) + 2 * volume(32))
