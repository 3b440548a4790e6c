"""Roles as text, and the identity that ties a consumer's weights to the activation it reads."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Attention, Gated
from torch import nn

import graphprune
from graphprune.coupling.links import links
from graphprune.errors import BadInput
from graphprune.tracing.probe import batch_inputs, watch


def found(net, x):
    return links(graphprune.couple(graphprune.trace(net, x)))


def text(net, x):
    return [[f"{k.role} {k.leaf} {k.axis}" + ("" if k.direct else " computed") for k in group] for group in found(net, x)]


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.d, self.n = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.out = nn.Linear(6 * 16, 3)

    def forward(self, x):
        return self.out(self.n(self.d(self.a(x))).relu().flatten(1))


def test_roles_of_a_separable_convolution_and_a_flattened_map():
    net, x = Separable(), torch.randn(1, 2, 4, 4)
    passes = ["passes d.weight 0", "passes d.bias 0", *(f"passes n.{part} 0" for part in ("weight", "bias", "running_mean", "running_var"))]
    assert sorted(text(net, x)[0]) == sorted(["produces a.weight 0", "produces a.bias 0", *passes, "consumes out.weight 1"])
    last = found(net, x)[0][-1]
    assert last.value.shape == (1, 96) and last.along.tolist() == [unit for unit in range(6) for _ in range(16)] == last.units.tolist()


def test_roles_where_a_weight_is_computed():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), nn.Linear(8, 2)).eval()
    roles = text(net, torch.randn(1, 3))[0]
    assert "produces 0.parametrizations.weight.original1 0 computed" in roles or "produces 0.parametrizations.weight.original0 0 computed" in roles
    assert "consumes 1.weight 1" in roles


def test_heads_are_consumed_by_the_output_projection():
    net = nn.Sequential(nn.Conv2d(2, 8, 1), Attention(8, 4)).double().eval()
    heads = next(group for group in found(net, torch.randn(1, 2, 4, 4).double()) if any(link.leaf == "1.qkv.weight" and link.axis == 0 for link in group))
    (out,) = [link for link in heads if link.role == "consumes"]
    assert (out.leaf, out.value.shape[-1], len(set(out.along))) == ("1.out.weight", 16, 4)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.sampled_from(["conv", "linear", "functional"]), st.integers(0, 999))
def test_the_weights_of_a_consumer_and_its_activation_carry_the_same_gradient(width, batch, kind, seed):
    """For each unit: sum of gradient times weight over the consumer's slice == sum of activation times its gradient."""
    torch.manual_seed(seed)
    first = {"conv": nn.Conv2d(2, width, 3, padding=1), "linear": nn.Linear(2, width), "functional": nn.Linear(2, width)}[kind]

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, width))

        def forward(self, x):
            return F.linear(x, self.weight)

    last = {"conv": nn.Conv2d(width, 3, 3), "linear": nn.Linear(width, 3), "functional": Functional()}[kind]
    net = nn.Sequential(first, nn.Tanh(), last).double().eval()
    shape = (2, 5, 5) if kind == "conv" else (4, 2)
    graph = graphprune.trace(net, torch.randn(1, *shape, dtype=torch.float64))
    link = next(link for link in links(graphprune.couple(graph))[0] if link.role == "consumes")
    seen = []

    def see(value, tensor):
        assert value is link.value
        tensor.register_hook(lambda grad: seen.append((tensor.detach() * grad).movedim(link.dim, 0).flatten(1).sum(1)))

    with watch(net, graph, [link.value], see):
        net(torch.randn(batch, *shape, dtype=torch.float64)).square().sum().backward()
    weight = dict(net.named_parameters())[link.leaf]
    mine = (weight * weight.grad).detach().movedim(link.axis, 0).flatten(1).sum(1)
    assert torch.allclose(seen[0], mine, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(seen[0], mine.roll(1), rtol=1e-6)  # the control: other units


def test_a_watch_sees_the_cut_model_and_may_replace_what_it_sees():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(2, 8, 1), Gated(8, 8)).eval(), torch.randn(1, 2, 4, 4)
    graph = graphprune.trace(net, x)
    small = graphprune.shrink(net, x, 0.5)
    value = next(step.results[0] for step in graph.steps if step.name == "gelu")
    shapes = []
    with watch(small, graph, [value], lambda _, tensor: shapes.append(tuple(tensor.shape))):
        small(torch.randn(3, 2, 4, 4))
        small(torch.randn(2, 2, 4, 4))
    assert shapes == [(3, 4, 4, 4), (2, 4, 4, 4)]
    with watch(net, graph, [value], lambda _, tensor: tensor * 0), torch.no_grad():
        silent = net(x)
    assert torch.allclose(silent, net[1].b.bias[:, None, None].expand_as(silent), atol=1e-6)
    assert not torch.allclose(net(x), silent)


def test_another_path_is_an_error_and_the_watch_ends():
    class Branch(nn.Module):
        def forward(self, x):
            return x.relu() if x.shape[0] == 1 else x.tanh()

    net = nn.Sequential(nn.Linear(2, 4), Branch(), nn.Linear(4, 2))
    graph = graphprune.trace(net, torch.randn(1, 2))
    with pytest.raises(BadInput, match="tanh where the example had relu"), watch(net, graph, [graph.steps[0].results[0]], lambda *_: None):
        net(torch.randn(2, 2))
    assert net(torch.randn(2, 2)).shape == (2, 2) and not net._forward_pre_hooks


def test_a_batch_is_read_as_loaders_give_it():
    x, y = torch.zeros(2, 3), torch.zeros(2)
    assert batch_inputs(x) == ((x,), {}) and batch_inputs((x, y)) == ((x,), {})
    assert batch_inputs(((x, x), y)) == ((x, x), {}) and batch_inputs({"a": x}) == ((), {"a": x}) and batch_inputs(({"a": x}, y)) == ((), {"a": x})
