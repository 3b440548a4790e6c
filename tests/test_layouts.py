"""Memory formats: where entries lie is no shape, and what only says so changes nothing of what may go."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.cutting.zeroed import walk


class Pooled(nn.Module):
    """A picture's features, pooled to one place, normalised and read; ``order`` is the memory format that the code asks for on the way."""

    def __init__(self, order=None, volumes=False):
        super().__init__()
        self.order, self.pool = order, F.adaptive_avg_pool3d if volumes else F.adaptive_avg_pool2d
        self.conv, self.norm, self.head = (nn.Conv3d if volumes else nn.Conv2d)(3, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.conv(x)
        y = y if self.order is None else y.contiguous(memory_format=self.order)
        return self.head(self.norm(self.pool(y, 1).flatten(1)) * (2 if self.training else 1))


@pytest.mark.parametrize("where", ["code", "weights", "input", "volumes", "nowhere"])
def test_a_memory_format_is_no_shape(where):
    """torch says the format of a pooled picture by other steps along its axes of one entry; every entry is where it was."""
    torch.manual_seed(0)
    order = torch.channels_last_3d if where == "volumes" else torch.channels_last
    net = Pooled(order if where in ("code", "volumes") else None, where == "volumes").double().eval()
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64) if where == "volumes" else torch.randn(2, 3, 4, 4, dtype=torch.float64)
    if where == "weights":
        net = net.to(memory_format=order)
    if where == "input":
        x = x.contiguous(memory_format=order)
    small, plan = graphprune.shrink(net, x, return_plan=True)
    assert small.conv.weight.shape[0] == small.norm.normalized_shape[0] == 4
    graph = graphprune.trace(net, x)
    asked = dataclasses.replace(graph.asked, others=())
    with torch.no_grad():
        (replayed,) = graphprune.zeroed(net, plan)(x)
        ((_, walked),) = walk(net, plan, asked)
        torch.testing.assert_close(small(x), replayed)
        torch.testing.assert_close(small(x), walked)
        assert not torch.allclose(net(x), walked)


class Restrided(nn.Module):
    """Code that puts other steps along axes of several entries: these are then other entries, or torch's own are, where there is but one."""

    def __init__(self, moves):
        super().__init__()
        self.moves, self.conv, self.head = moves, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x).clone()
        return self.head(y.t().as_strided_((4, 4), (4, 1)) if self.moves else y.as_strided_((4, 4), (4, 1)))


@pytest.mark.parametrize("moves", [True, False])
def test_other_steps_along_axes_of_several_entries_are_not_passed_over(moves):
    """The control: literal sizes hold the axis in any case, and the cut would be seen to be another function."""
    net, x = Restrided(moves).double().eval(), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(graphprune.errors.NothingToPrune):
        graphprune.shrink(net, x)
