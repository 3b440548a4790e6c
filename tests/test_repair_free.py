"""Repairs without data: duplicates merge without loss, the formulas are those of slow references, and the beliefs are those of drawn data."""

import copy

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import BadCalibration
from graphprune.repair.belief import Belief, _through, beliefs, carried
from graphprune.repair.free import merged
from graphprune.tracing.trees import leaf_tensors

F64 = torch.float64


def held(model):
    return {name: tensor.detach() for name, _, _, tensor in leaf_tensors(model)}


def gap(one, two, x):
    with torch.no_grad():
        return float((one(x) - two(x)).square().mean())


def block(norm=True, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, bias=not norm), nn.BatchNorm2d(12) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(12, 5, 3)).double()
    if norm:
        nn.init.normal_(net[1].bias, 0, 0.5)
        nn.init.uniform_(net[1].weight, 0.5, 1.5)
        with torch.no_grad():  # statistics as they are after training on white noise
            for _ in range(50):
                net(torch.randn(16, 3, 9, 9, dtype=F64))
    return net.eval()


def first(groups, model, batches):
    return [torch.arange(g.size, 0, -1.0) for g in groups]


def flat(norm):
    """The convolution's maps flattened into a linear layer, as in AlexNet."""
    net = block(norm)
    return nn.Sequential(*net[:3], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)).double().eval()


@pytest.mark.parametrize("build", [block, flat])
@pytest.mark.parametrize("norm", [True, False])
def test_an_exact_duplicate_is_merged_without_loss(norm, build):
    net = build(norm)
    tensors = [net[0].weight, *([net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var] if norm else [net[0].bias])]
    with torch.no_grad():
        for tensor in tensors:
            tensor[6:] = tensor[:6]
    x = torch.randn(8, 3, 9, 9, dtype=F64)
    cut = graphprune.shrink(net, x[:1], criterion=first)
    free = graphprune.shrink(net, x[:1], criterion=first, repair="data-free")
    assert free[0].out_channels == 6 and gap(net, free, x) < 1e-16 < gap(net, cut, x)
    with torch.no_grad():
        net[0].weight[7].normal_()  # no longer equal
    assert gap(net, graphprune.shrink(net, x[:1], criterion=first, repair="data-free"), x) > 1e-6


def test_one_partner_gives_the_factor_of_neuron_merging():
    """Rows ``w_i = s w_j`` behind batch norms: ``z_i = s γ_i σ_j / (γ_j σ_i) z_j + const``."""
    torch.manual_seed(0)
    s, gamma, beta = 1.7, torch.tensor([0.8, 1.3], dtype=F64), torch.tensor([0.4, -0.2], dtype=F64)
    x = torch.randn(4000, 5, dtype=F64)
    y = torch.stack([x @ (w := torch.randn(5, dtype=F64)), s * (x @ w) + 3], 1)
    mean, sigma = y.mean(0), y.var(0).sqrt()
    z = (y - mean) / sigma * gamma + beta
    factor = s * gamma[1] * sigma[0] / (gamma[0] * sigma[1])
    const = gamma[1] / sigma[1] * (s * (mean[0] - sigma[0] * beta[0] / gamma[0]) + 3 - mean[1]) + beta[1]
    assert torch.allclose(z[:, 1], factor * z[:, 0] + const)
    found = merged(Belief(beta, torch.cov(z.T), 1), torch.tensor([0]), torch.tensor([1]))
    assert torch.allclose(found[0, 0], factor) and torch.allclose(beta[1] - found[0, 0] * beta[0], const)


@pytest.mark.parametrize("function", [torch.relu, nn.functional.gelu, torch.tanh, lambda z: z.clamp(0, 6), lambda z: z * z])
def test_covariances_behind_a_function_are_those_of_drawn_values(function):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, dtype=F64, generator=generator)
    mean, cov = torch.tensor([0.3, -0.5, 0.0, 1.0], dtype=F64), root @ root.T / 3
    found = _through(Belief(mean, cov, 1), function)
    drawn = function(mean + torch.randn(400_000, 4, dtype=F64, generator=generator) @ torch.linalg.cholesky(cov).T)
    assert torch.allclose(found.mean, drawn.mean(0), atol=0.02)
    assert torch.allclose(found.cov, torch.cov(drawn.T), atol=0.02 * float(found.cov.abs().max()))
    independent = _through(Belief(mean, torch.diag(cov.diagonal()), 1), function)
    assert not torch.allclose(independent.cov, torch.cov(drawn.T), atol=0.02 * float(found.cov.abs().max()))


def test_a_weight_carries_the_covariance():
    torch.manual_seed(0)
    weight, root = torch.randn(3, 4, 1, dtype=F64), torch.randn(4, 4, dtype=F64)
    belief = Belief(torch.randn(4, dtype=F64), root @ root.T, 1)
    mean, cov = carried(weight, belief)
    assert torch.allclose(mean, weight[:, :, 0] @ belief.mean) and torch.allclose(cov, weight[:, :, 0] @ belief.cov @ weight[:, :, 0].T)
    wide = torch.zeros(4, 4, 2, dtype=F64)
    kernels = torch.randn(4, 1, 2, dtype=F64)
    wide[torch.arange(4), torch.arange(4)] = kernels[:, 0]
    for one, two in zip(carried(kernels, belief, depthwise=True), carried(wide, belief), strict=True):
        assert torch.allclose(one, two)


class Gated(nn.Module):
    """A stream, a norm over it, and a gated pair of layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        return self.head(x + self.down(nn.functional.silu(self.gate(y)) * self.up(y)))


def test_what_is_believed_of_a_gated_layer_is_near_what_passes():
    torch.manual_seed(0)
    net = Gated().double().eval()
    graph = graphprune.trace(net, torch.zeros(1, 6, dtype=F64))
    node = next(n for n in graph.nodes if n.func._schema.name == "aten::mul" and n.outs[0].shape == (1, 24))
    found = beliefs(graph, held(net))[id(node.outs[0])]
    x = torch.randn(20_000, 6, dtype=F64)
    with torch.no_grad():
        y = net.norm(net.embed(x))
        z = nn.functional.silu(net.gate(y)) * net.up(y)
    right, wrong = (float(torch.corrcoef(torch.stack([found.cov.diagonal().roll(k), z.var(0)]))[0, 1]) for k in (0, 1))
    assert right > 0.5 > wrong


@pytest.mark.parametrize("build, shape", [(block, (32, 3, 9, 9)), (Gated, (256, 6))])
def test_without_data_is_better_than_nothing_and_measured_where_there_is_data(build, shape):
    torch.manual_seed(1)
    net, x = build().double().eval(), torch.randn(*shape, dtype=F64)
    before = copy.deepcopy(net.state_dict())
    cut = graphprune.shrink(net, x[:1], 0.4)
    free = graphprune.shrink(net, x[:1], 0.4, repair="data-free")
    judged = graphprune.shrink(net, x[:1], 0.4, repair="data-free", calibration=list(x.split(len(x) // 4)))
    assert gap(net, free, x) < gap(net, cut, x)
    assert gap(net, judged, x) < gap(net, cut, x)
    for model in (free, judged):
        done = [r for r in model.graphprune_repairs if r.step == "data-free"]
        assert done and all(r.after <= r.before for r in done if r.kept)
    assert all(torch.equal(a, before[n]) for n, a in net.state_dict().items())


def test_norms_over_a_cut_stream_keep_their_size():
    """Removed channels without energy: ``x / rms_D = √(D/D′) x / rms_D′``, exactly."""
    torch.manual_seed(0)
    net = Gated().double().eval()
    with torch.no_grad():
        for layer in (net.embed, net.down):
            for tensor in (layer.weight, layer.bias):
                tensor[10:] = 0
                tensor[:10] -= tensor[:10].mean(0)
    x = torch.randn(64, 6, dtype=F64)
    ratios = {"embed": 6 / 16}
    one, plan = graphprune.shrink(net, x[:1], 0.0, criterion=first, ratios=ratios, repair=["rescale"], return_plan=True)
    assert len(plan.cuts["norm.weight"][0]) == 10
    assert torch.allclose(one.norm.weight, net.norm.weight[:10] * (16 / 10) ** 0.5)
    cut = graphprune.shrink(net, x[:1], 0.0, criterion=first, ratios=ratios)
    assert gap(net, one, x) < 1e-8 < 1e-4 < gap(net, cut, x)


def test_repair_alone_needs_the_graph_when_there_is_no_data():
    net = block()
    small, plan = graphprune.shrink(net, torch.zeros(1, 3, 9, 9, dtype=F64), return_plan=True)
    with pytest.raises(BadCalibration, match="graph="):
        graphprune.repair(small, net, plan, steps="data-free")
    graph = graphprune.trace(net, torch.zeros(1, 3, 9, 9, dtype=F64))
    assert graphprune.repair(small, net, plan, steps="data-free", graph=graph).graphprune_repairs
