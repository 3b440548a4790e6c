"""Weights that are made on the way (norms, masks, the code of a model): what they are made of is cut, what they are for those that stay does not change."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_units import zeros
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import graphprune
from graphprune import errors

X = torch.randn(2, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WRAPS = {
    "old weight norm": weight_norm,
    "weight norm": parametrizations.weight_norm,
    "old spectral norm": spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "masks": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    "own norm": lambda layer: wrapped(layer, Normed(layer.weight)),
    "own scale": lambda layer: wrapped(layer, Scaled()),
    "spectral norm of weight norm": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
    "spectral norm of own norm": lambda layer: parametrizations.spectral_norm(wrapped(layer, Normed(layer.weight))),
    "own norm of own scale": lambda layer: wrapped(wrapped(layer, Scaled()), Normed(layer.weight)),
    "spectral norm of own scale": lambda layer: parametrizations.spectral_norm(wrapped(layer, Scaled())),
    "whole norm": lambda layer: parametrizations.weight_norm(layer, dim=None),
}
KINDS = {
    "linear": lambda: [nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)],
    "conv": lambda: [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1)],
    "depthwise": lambda: [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 4, 1)],
    "grouped": lambda: [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)],
    "transposed": lambda: [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1)],
}


class Normed(nn.Module):
    """A parametrization of one's own: rows of unit length, times a learnt length."""

    def __init__(self, weight):
        super().__init__()
        self.length = nn.Parameter(torch.rand(len(weight), *[1] * (weight.ndim - 1)) + 0.5)

    def forward(self, weight):
        rows = weight.flatten(1).square().sum(1).sqrt()
        return self.length * weight / rows.view(-1, *[1] * (weight.ndim - 1))


class Scaled(nn.Module):
    """Times a number that the whole weight makes."""

    def forward(self, weight):
        return weight * weight.abs().sum().sqrt()


def wrapped(layer, parametrization):
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


def made(wrap, kind):
    """A small network whose inner layer, and its first, have a weight that is made."""
    torch.manual_seed(0)
    layers = KINDS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = nn.Sequential(*(WRAPS[wrap](layer) if index < 3 and hasattr(layer, "weight") else layer for index, layer in enumerate(layers)))
    net = net.double().eval()
    for name, tensor in net.named_parameters():
        tensor.data = torch.rand_like(tensor) + 0.5 if name.endswith(("_g", "original0", "length")) else torch.randn_like(tensor)
    return net


def gap(mine, theirs):
    return float((mine - theirs).abs().max() / theirs.abs().max())


def plain(net, kind, plan, shift=0):
    """The same layers with the weights that were made as plain ones, and what the plan removes set to zero in these."""
    torch.manual_seed(0)
    net(torch.zeros_like(X))  # hooks make their weight when they are called
    other = nn.Sequential(*KINDS[kind]()).double().eval()
    for index, layer in enumerate(other):
        if not hasattr(layer, "weight"):
            continue
        leaf = next((n for n in plan.cuts if n.startswith(f"{index}.") and plan.shapes[n] == tuple(layer.weight.shape)), "")
        mask = plan.mask(leaf, tuple(layer.weight.shape))
        for axis in plan.cuts.get(leaf, {}) if shift else ():
            mask = mask.roll(shift, axis)
        layer.weight.data = net[index].weight.detach() * mask
        layer.bias.data = net[index].bias.detach() * plan.mask(f"{index}.bias", tuple(layer.bias.shape))
    return other


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("wrap", list(WRAPS))
def test_made_weights_are_what_they_were_for_those_that_stay(wrap, kind):
    net = made(wrap, kind)
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    with torch.no_grad():
        other = torch.randn_like(X)
        mine, theirs, wrong = small(other), plain(net, kind, plan)(other), plain(net, kind, plan, 1)(other)
    assert gap(mine, theirs) < 1e-9 and gap(mine, wrong) > 1e-3
    assert small[0].weight.shape[0] == 8


@pytest.mark.parametrize("wrap", ["old weight norm", "weight norm", "spectral norm", "own norm", "spectral norm of weight norm"])
def test_plans_with_gains_are_kept_composed_and_applied_to_other_weights(wrap):
    net = made(wrap, "conv")
    _, plan = graphprune.shrink(net, X, 0.25, return_plan=True)
    assert plan.gains and graphprune.Plan.from_json(plan.to_json()) == plan
    other = made(wrap, "conv")
    for parameter in other.parameters():
        parameter.data = parameter.data * 2 + 0.1
    small = graphprune.apply(other, plan)
    twice, again = graphprune.shrink(small, X, 0.5, return_plan=True)
    both = graphprune.compose(plan, again)
    with torch.no_grad():
        assert torch.allclose(small(X), plain(other, "conv", plan)(X), rtol=1e-9)
        assert torch.allclose(twice(X), plain(other, "conv", both)(X), rtol=1e-9)
        assert torch.allclose(graphprune.apply(other, both)(X), twice(X), rtol=1e-9)
        assert not torch.allclose(graphprune.apply(other, replace(both, gains=()))(X), twice(X), rtol=1e-3)
    inplace = graphprune.apply(other, plan, inplace=True)
    with torch.no_grad():
        assert inplace is other and torch.equal(inplace(X), small(X))


def test_weights_normalised_in_forward_keep_what_they_are():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.v, self.g, self.down = nn.Linear(10, 16), nn.Parameter(torch.randn(12, 16)), nn.Parameter(torch.rand(12, 1)), nn.Linear(12, 4)

        def weight(self):
            return self.g * self.v / self.v.norm(dim=1, keepdim=True)

        def forward(self, x):
            return self.down(F.linear(self.up(x).relu(), self.weight()).relu())

    net = Net().double().eval()
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    rows, columns = plan.cuts["v"][0], plan.cuts["v"][1]
    with torch.no_grad():
        assert torch.allclose(small.weight(), net.weight()[rows][:, columns], rtol=1e-9)
        assert not torch.allclose(small.v / small.v.norm(dim=1, keepdim=True) * net.g[rows], small.weight(), rtol=1e-2)


def test_a_plan_may_not_call_what_makes_no_weight():
    _, plan = graphprune.shrink(made("weight norm", "linear"), X, 0.5, return_plan=True)
    text = plan.to_json()
    assert "_weight_norm_interface.default" in text
    for wrong in ("fill_.Scalar", "resize_.default", "_weight_norm_interface", "_weight_norm_interface.__class__.x"):
        with pytest.raises(errors.BadPlan, match="not among the operations"):
            graphprune.Plan.from_json(text.replace("_weight_norm_interface.default", wrong))


BARE = [
    nn.InstanceNorm2d(16),
    nn.BatchNorm2d(16, affine=False),
    nn.BatchNorm2d(16, affine=False, track_running_stats=False),
    nn.GroupNorm(16, 16, affine=False),
]


@pytest.mark.parametrize("norm", BARE, ids=lambda norm: type(norm).__name__)
def test_norms_without_weights_follow_their_input(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), nn.Conv2d(16, 8, 3)).double().eval()
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert getattr(small[1], "num_features", getattr(small[1], "num_channels", None)) == 8 and small[0].out_channels == 8
    other = torch.randn_like(X)
    with torch.no_grad():
        assert torch.allclose(small(other), zeros(net, plan)(other), atol=1e-12)
        assert not torch.allclose(small(other), zeros(net, plan, 1)(other), atol=1e-3)


class OfItsWidth(nn.Module):
    """A norm without weights, of whatever width comes in."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x, x.shape[-1:])


LAST = {
    "rms": (lambda: nn.RMSNorm(16, elementwise_affine=False), nn.functional.rms_norm),
    "rms, two axes": (lambda: nn.Sequential(nn.Unflatten(1, (1, -1)), nn.RMSNorm((1, 16), elementwise_affine=False), nn.Flatten(1)), nn.functional.rms_norm),
    "layer": (lambda: nn.LayerNorm(16, elementwise_affine=False), nn.functional.layer_norm),
    "rms of a width": (lambda: OfItsWidth(nn.functional.rms_norm), nn.functional.rms_norm),
    "layer of a width": (lambda: OfItsWidth(nn.functional.layer_norm), nn.functional.layer_norm),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", LAST)
def test_norms_over_the_last_axis_follow_their_input(name, verify):
    make, norm = LAST[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), make(), nn.Linear(16, 4)).double().eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True, verify=verify)
    assert small[0].out_features == 8
    kept = plan.cuts["0.weight"][0]
    with torch.no_grad():
        for units, equal in ((kept, True), ([(unit + 1) % 16 for unit in kept], False)):
            wanted = norm(net[0](x)[:, units], (8,)) @ net[2].weight[:, kept].T + net[2].bias
            assert torch.allclose(small(x), wanted, atol=1e-12) == equal
