"""The rescaling matrix: which scores stay when a network is rescaled without changing its function, and which must change.

R1: a filter (and its bias) times f, the batch norm's mean times f and its variance times f². R2: the batch norm's scale and shift times f, the
columns that read the channel over f; a ReLU passes f on.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_scores import BATCHES, GROUPS, NET, X

import graphprune
from graphprune import scores

# name: (options, unchanged under R1, unchanged under R2), of the first group, whose channels are rescaled.
MATRIX = {
    "l1": ({}, False, False),
    "l2": ({}, False, False),
    "linf": ({"over": "produces"}, False, True),
    "filter_norm": ({}, False, True),
    "group_norm": ({}, False, False),
    "lamp": ({}, False, False),
    "fpgm": ({}, False, True),
    "redundancy": ({}, False, True),
    "ensemble": ({"of": ("l2", "filter_norm")}, False, False),
    "bn_scale": ({"otherwise": "l2"}, True, False),
    "synaptic": ({"otherwise": "l2"}, True, True),
    "product": ({}, True, True),
    "random": ({}, True, True),
    "taylor": ({}, True, True),
    "taylor_gate": ({}, True, True),
    "fisher": ({}, True, True),
    "mask_fisher": ({}, True, True),
    "group_fisher": ({}, True, True),
    "snip": ({}, True, True),
    "grasp": ({}, False, False),  # a gradient's norm is not free of the scale of the weights
    "obd": ({}, True, True),
    "synflow": ({"rounds": 1}, False, True),
    "apoz": ({}, True, True),
    "activation": ({}, True, False),
    "wanda_sp": ({}, True, True),
    "flap": ({}, True, True),
    "entropy": ({}, True, True),
    "hrank": ({}, True, True),
    "chip": ({}, True, False),
    "obs": ({"damping": 1e-13}, True, True),
    "effect": ({"damping": 1e-13}, True, True),
    "thinet": ({}, True, True),
    "lasso": ({}, True, True),
    "leverage": ({"energy": 0.7}, True, False),
    "pivoted_qr": ({}, True, False),
}
FACTORS = torch.tensor([0.3, 2.5, 0.8, 4.0, 1.7, 0.5], dtype=torch.float64)


def rescaled(which, undo=True):
    net, f = copy.deepcopy(NET), FACTORS
    with torch.no_grad():
        if which == "R1":
            net.a.weight.mul_(f[:, None, None, None]), net.a.bias.mul_(f)
            if undo:
                net.na.running_mean.mul_(f)
                net.na.running_var.add_(net.na.eps).mul_(f.square()).sub_(net.na.eps)
        else:
            net.na.weight.mul_(f), net.na.bias.mul_(f)
            if undo:
                net.b.weight.div_(f[:, None, None])
    return net


def first(name, net, **options):
    return graphprune.score(GROUPS, net, name, BATCHES, F.cross_entropy, **options)[0]


def gap(name, net, **options):
    before = first(name, NET, **options)
    return float((first(name, net, **options) - before).abs().max() / before.abs().max())


def test_every_score_stands_in_the_matrix():
    assert set(MATRIX) == set(scores.SCORES)


@pytest.mark.parametrize("which", ["R1", "R2"])
def test_the_function_is_the_same(which):
    assert torch.allclose(rescaled(which)(X), NET(X), rtol=1e-10)
    assert not torch.allclose(rescaled(which, undo=False)(X), NET(X), rtol=1e-2)


@pytest.mark.parametrize("name", MATRIX)
def test_rescaling(name):
    options, *same = MATRIX[name]
    for which, unchanged in zip(("R1", "R2"), same, strict=True):
        found = gap(name, rescaled(which), **options)
        small = 1e-3 if name == "effect" else 1e-6  # it keeps gradients in float32, and greedy refits magnify that
        assert found < small if unchanged else found > 1e-2, f"{name} under {which}: {found:.1e}"


@pytest.mark.parametrize("name", [n for n, (_, *same) in MATRIX.items() if n != "random" and all(same)])
def test_a_rescaling_that_changes_the_function_shows(name):
    """The control: whatever ignores both symmetries still sees one half of them."""
    seen = [gap(name, rescaled(which, undo=False), **MATRIX[name][0]) for which in ("R1", "R2")]
    assert max(seen) > 1e-2


@pytest.mark.parametrize("name", ["l1", "l2", "linf", "filter_norm", "group_norm", "lamp", "fpgm", "redundancy"])
def test_folding_removes_the_first_symmetry(name):
    assert gap(name, rescaled("R1"), fold=True) < 1e-10 < 1e-2 < gap(name, rescaled("R1"))
