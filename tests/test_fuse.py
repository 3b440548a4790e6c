"""Folding batch norms is exact, folds only what nothing else reads, and leaves the user's model alone."""

import copy

import pytest
import torch
from torch import nn
from zoo_support import declare_operators, randomise

import graphprune
from graphprune.errors import NotEqual

declare_operators()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class Pairs(nn.Module):
    """One of each kind, called through attributes whose order in the tree says nothing."""

    def __init__(self, bias, groups, affine=True):
        super().__init__()
        self.n4, self.n3, self.n2, self.n1 = (
            kind(n, affine=affine) for kind, n in ((nn.BatchNorm1d, 6), (nn.BatchNorm2d, 8), (nn.BatchNorm2d, 12), (nn.BatchNorm2d, 8))
        )
        self.a = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=bias)
        self.b = nn.ConvTranspose2d(8, 12, 3, stride=2, groups=groups, bias=bias)
        self.c = nn.Conv2d(12, 8, 1, groups=groups, bias=bias)
        self.d = nn.Linear(8, 6, bias=bias)

    def forward(self, x):
        x = self.n2(self.b(self.n1(self.a(x)).relu())).relu()
        x = self.n3(self.c(x)).relu_()
        return self.n4(self.d(x.mean((2, 3))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
def test_every_kind_of_pair_is_folded_and_equal(bias, groups, affine):
    torch.manual_seed(0)
    net, x = randomise(Pairs(bias, groups, affine)).double().train(), torch.randn(3, 4, 9, 9, dtype=torch.float64)
    net.eval()
    wanted = net(x)
    net.train()
    before = copy.deepcopy(net.state_dict())
    fused = graphprune.fuse(net, x)
    torch.testing.assert_close(fused(x), wanted, rtol=1e-10, atol=1e-12)
    assert not norms(fused) and type(fused) is Pairs and not any(m.training for m in fused.modules())
    assert len(norms(net)) == 4 and all(m.training for m in net.modules())  # the user's is as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    with torch.no_grad():  # control: another norm, another function
        net.n3.running_mean += 0.5
    assert not torch.allclose(net.eval()(x), fused(x), rtol=1e-3)


class Shared(nn.Module):
    """Norms that may not go: their input is read twice, is changed in place, leaves the model, or their layer runs twice."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))

    def forward(self, x):
        a = self.convs[0](x)
        x = self.norms[0](a) + a
        x = self.norms[1](self.convs[1](x).relu_())
        x = self.norms[3](self.convs[2](self.norms[2](self.convs[2](x))))
        b = self.convs[3](x)
        return self.norms[4](b), b, self.norms[5](x)


def test_only_what_nothing_else_reads_is_folded():
    torch.manual_seed(0)
    net, x = randomise(Shared()).double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    fused = graphprune.fuse(net, x)
    assert len(norms(fused)) == 6
    for mine, theirs in zip(fused(x), net(x), strict=True):
        torch.testing.assert_close(mine, theirs)


class NormAct(nn.BatchNorm2d):
    """A norm with something behind it in the same module."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps))


def test_a_norm_within_a_larger_module_goes_alone():
    torch.manual_seed(0)
    net, x = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), NormAct(5), nn.Conv2d(5, 2, 1))).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    fused = graphprune.fuse(net, x)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-10, atol=1e-12)
    assert not norms(fused) and not torch.allclose(fused[0](x), net[0](x))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_public_models_keep_no_norm_and_can_be_shrunk(name):
    from torchvision import models

    torch.manual_seed(0)
    net, x = randomise(models.get_model(name, weights=None)).double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    fused = graphprune.fuse(net, x)
    assert norms(net) and not norms(fused)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-7, atol=1e-9)
    assert graphprune.profile(graphprune.shrink(fused, x, 0.3), x).macs < graphprune.profile(fused, x).macs


def test_densely_connected_norms_stay_where_their_input_is_shared():
    from torchvision import models

    net, x = randomise(models.densenet121(weights=None)).double().eval(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    fused = graphprune.fuse(net, x)
    assert 0 < len(norms(fused)) < len(norms(net))
    torch.testing.assert_close(fused(x), net(x), rtol=1e-7, atol=1e-9)


def test_code_that_reads_a_norm_is_refused_and_nothing_changes():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.n(self.a(x)) * float(self.n.eps)

    net = Reads().eval()
    with pytest.raises(NotEqual, match="does not run"):
        graphprune.fuse(net, torch.randn(1, 3, 4, 4))
    assert isinstance(net.n, nn.BatchNorm2d)
