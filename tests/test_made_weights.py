"""Weights that are made on the way (norms, masks, the code of a model): what they are made of is cut, what they are for those that stay does not change."""

import warnings

import pytest
import torch
from test_units import zeros
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import graphprune

X = torch.randn(2, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WRAPS = {
    "old weight norm": weight_norm,
    "weight norm": parametrizations.weight_norm,
    "old spectral norm": spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal mask": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}


def old(wrap, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return wrap(*args, **options)


def layers(wrap, kind):
    make = {
        "linear": lambda: [nn.Flatten(2), nn.Linear(100, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)],
        "conv": lambda: [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1)],
        "depthwise": lambda: [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 4, 1)],
        "grouped": lambda: [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)],
        "transposed": lambda: [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1)],
    }[kind]()
    return nn.Sequential(*(old(wrap, layer) if index and hasattr(layer, "weight") and index < len(make) - 1 else layer for index, layer in enumerate(make)))


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
