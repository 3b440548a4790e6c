"""Laws of the scores: identities and conservation, signs, branches, twins, ties."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scores import BATCHES, GROUPS, MEMBERS, NET, SIZES, X, Y
from torch import nn

import graphprune
from graphprune import errors
from graphprune.scores import greedy, maps

DATA = "apoz activation wanda_sp flap snip fisher taylor_gate mask_fisher group_fisher grasp obs thinet lasso leverage chip hrank entropy".split()


@pytest.mark.parametrize("name", DATA)
def test_batches_may_be_of_any_size(name):
    whole = graphprune.score(GROUPS, NET, name, [(X, Y)], F.cross_entropy)
    single = graphprune.score(GROUPS, NET, name, [(X[i : i + 1], Y[i : i + 1]) for i in range(5)], F.cross_entropy)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(whole, single, strict=True))


def test_taylor_identity():
    one = [(X[:1], Y[:1])]
    weight = graphprune.score(GROUPS, NET, "taylor", one, F.cross_entropy, over="consumes")
    gate = graphprune.score(GROUPS, NET, "taylor_gate", one, F.cross_entropy)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-20) for a, b in zip(weight, gate, strict=True))


def test_taylor_identity_of_the_batch_norm():
    """``γ ∂γ + β ∂β`` equals ``Σ a ∂a`` behind a ReLU; what the producer's own weights see is another number."""
    one = [(X[:1], Y[:1])]
    norm = graphprune.score(GROUPS, NET, "taylor", one, F.cross_entropy, over="passes")
    gate = graphprune.score(GROUPS, NET, "taylor_gate", one, F.cross_entropy)
    made = graphprune.score(GROUPS, NET, "taylor", one, F.cross_entropy, over="produces")
    for group in (0, 1):  # the third has no batch norm
        assert torch.allclose(norm[group], gate[group], rtol=1e-9, atol=1e-20)
        assert not torch.allclose(made[group], gate[group], rtol=1e-2, atol=1e-20)


def plain(*sizes, bias=True, seed=0):
    """Linear layers with ReLUs between, in float64, and their groups."""
    torch.manual_seed(seed)
    layers = [m for a, b in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(a, b, bias=bias), nn.ReLU())][:-1]
    net = nn.Sequential(*layers).double()
    return net, graphprune.couple(graphprune.trace(net, torch.zeros(1, sizes[0]).double()))


@pytest.mark.parametrize("bias", [False, True])
def test_synaptic_flow_is_conserved(bias):
    """What flows into a hidden unit (its bias included) flows out of it; a norm knows no such law."""
    net, groups = plain(5, 7, 6, 3, bias=bias)
    into, out = (graphprune.score(groups, net, "synflow", rounds=1, over=over) for over in ("produces", "consumes"))
    assert all(torch.allclose(a, b, rtol=1e-12) and float(a.min()) > 0 for a, b in zip(into, out, strict=True))
    assert not any(torch.allclose(a, b.roll(1), rtol=1e-2) for a, b in zip(into, out, strict=True))
    into, out = (graphprune.score(groups, net, "l1", over=over) for over in ("produces", "consumes"))
    assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(into, out, strict=True))


def test_synaptic_flow_keeps_every_layer_alive_where_the_weights_do_not():
    """After its rounds one unit of each layer is left, however small a layer's weights are; a global norm empties that layer."""
    net, groups = plain(6, 20, 20, 3)
    with torch.no_grad():
        net[2].weight.mul_(1e-3), net[2].bias.mul_(1e-3), net[4].weight.mul_(1e-3)

    def left(name, **options):
        found = graphprune.score(groups, net, name, **options)
        best = torch.cat(found).sort(descending=True).values[8]
        return [int((each >= best).sum()) for each in found]

    assert min(left("synflow", rounds=30, keep=0.1)) > 0
    assert min(left("filter_norm")) == 0


def test_both_estimates_are_the_diagonal_of_the_hessian():
    """A network of ReLUs is piecewise linear in each weight: with many probes either estimate comes to the exact diagonal."""
    net, groups = plain(3, 5, 4)
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    flat, sizes = torch.cat([p.detach().flatten() for p in net.parameters()]), [p.numel() for p in net.parameters()]

    def loss(vector):
        parts = {n: v.reshape(p.shape) for (n, p), v in zip(net.named_parameters(), vector.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, parts, (x,)), y)

    pieces = (torch.autograd.functional.hessian(loss, flat).diagonal() * flat.square() / 2).split(sizes)
    made, shift, read = (piece.reshape(p.shape) for piece, p in zip(pieces[:3], list(net.parameters())[:3], strict=True))
    exact = made.sum(1) + shift + read.sum(0)
    for curvature, probes in (("labels", 700), ("signs", 700)):
        mine = graphprune.score(groups, net, "obd", [(x, y)], F.cross_entropy, probes=probes, curvature=curvature)[0]
        assert float((mine - exact).abs().max()) < 0.2 * float(exact.max()) < float((mine.roll(1) - exact).abs().max())
    assert all(float(s.min()) >= 0 for s in graphprune.score(GROUPS, NET, "obd", [(X, Y)], F.cross_entropy))
    with pytest.raises(errors.BadLoss, match="curvature='signs'"):
        graphprune.score(*_tuple_output(), "obd", [(x, y)], lambda output, labels: F.cross_entropy(output[0], labels))


def _tuple_output():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain(3, 5, 4)[0]

        def forward(self, x):
            return (self.net(x),)

    net = Pair()
    return graphprune.couple(graphprune.trace(net, torch.zeros(1, 3).double())), net


def test_grasp_predicts_the_gradient_norm():
    """``‖g‖²`` changes by ``−2 ε s_c`` when all slices of a unit shrink by ε: the sign is right, and no other is."""
    found, step = graphprune.score(GROUPS, NET, "grasp", [(X, Y)], F.cross_entropy), 1e-6

    def norm(net):
        grads = torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.parameters()))
        return float(sum(grad.square().sum() for grad in grads))

    before, moved = norm(NET), []
    for unit in range(SIZES[0]):
        net = copy.deepcopy(NET)
        with torch.no_grad():
            for name, axis, _ in MEMBERS[0]:
                net.get_parameter(name).movedim(axis, 0)[unit] *= 1 - step
        moved.append((norm(net) - before) / step)
    predicted = -2 * found[0]
    scale = float(predicted.abs().max())
    assert float((torch.tensor(moved) - predicted).abs().max()) < 1e-3 * scale < float((torch.tensor(moved) + predicted).abs().max())


def test_opposite_gradients_hide_from_the_batch_only():
    """Two samples that pull in opposite directions: the mean gradient vanishes, the Fisher information does not."""
    net, groups = plain(3, 4, 1, bias=False)
    x = torch.rand(1, 3).double().expand(2, 3).clone()
    batch, loss = [(x, torch.tensor([[1.0], [-1.0]]).double())], lambda output, sign: (output * sign).mean()
    for name in ("taylor", "snip", "grasp"):
        assert float(graphprune.score(groups, net, name, batch, loss)[0].abs().max()) < 1e-15
    for name in ("fisher", "taylor_gate", "mask_fisher", "group_fisher"):
        assert float(graphprune.score(groups, net, name, batch, loss)[0].max()) > 1e-4


class Branches(nn.Module):
    """Two equal activations, coupled by their sum, whose readers add or cancel."""

    def __init__(self, sign):
        super().__init__()
        torch.manual_seed(1)
        self.p, self.q, self.u, self.v, self.s = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2), nn.Linear(5, 2)
        self.q.load_state_dict(self.p.state_dict())
        self.v.load_state_dict({name: sign * tensor for name, tensor in self.u.state_dict().items()})
        nn.init.zeros_(self.s.weight)
        self.double()

    def forward(self, x):
        p, q = self.p(x), self.q(x)
        return self.u(p) + self.v(q) + self.s(p + q)


@pytest.mark.parametrize("per", ["memory", "macs", "none"])
def test_group_fisher_adds_branches_before_it_squares(per):
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    cancel, add = (
        graphprune.score(graphprune.couple(graphprune.trace(net, x[:1])), net, "group_fisher", [(x, y)], F.cross_entropy, per=per)
        for net in (Branches(-1.0), Branches(1.0))
    )
    assert len(cancel) == 1 and float(cancel[0].abs().max()) < 1e-25 and float(add[0].min()) > 1e-8


def test_group_fisher_by_what_a_unit_frees():
    """By operations: what the cost of the example falls by when one channel goes, counted by hand."""
    raw, found = (graphprune.score(GROUPS, NET, "group_fisher", BATCHES, F.cross_entropy, per=per) for per in ("none", "macs"))
    # 4 x 4 pixels of 3 x 9 weights and 2 x 2 pixels read by 5 x 4; those 6 x 4 and 4 inputs of 7 rows; 20 inputs and 4 outputs.
    freed = [16 * 27 + 4 * 5 * 4, 4 * 24 + 4 * 7, 20 + 4]
    assert all(torch.allclose(a / b, c, rtol=1e-12) for a, b, c in zip(raw, freed, found, strict=True))
    with pytest.raises(errors.UnknownName, match="per"):
        graphprune.score(GROUPS, NET, "group_fisher", BATCHES, F.cross_entropy, per="flops")


def doubled():
    """Three channels, each twice, and data; of a pair one channel can express both."""
    net, groups = plain(4, 6, 3)
    with torch.no_grad():
        net[0].weight[3:], net[0].bias[3:] = net[0].weight[:3], net[0].bias[:3].abs_()
    return net, groups, torch.randn(64, 4).double()


def test_half_of_doubled_channels_costs_nothing():
    """The greedy search keeps one of each pair and loses nothing; scored without the downdate, a pair goes together and is lost."""
    net, groups, x = doubled()
    found = graphprune.score(groups, net, "obs", [x], damping=1e-9)[0]
    order = found.argsort()
    assert len({int(unit) % 3 for unit in order[:3]}) == 3
    assert float(found[order[2]]) < 1e-5 * float(found[order[3]])
    hidden, weight = net[:2](x).T.detach(), net[2].weight.detach()
    hessian = hidden @ hidden.T / 64
    hessian += 1e-9 * hessian.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    once = (weight.square().sum(0) / torch.linalg.inv(hessian).diagonal()).argsort()
    rest = [int(unit) for unit in once[3:]]
    best = hidden[rest].T @ torch.linalg.lstsq(hidden[rest].T, (weight @ hidden).T).solution
    assert len({int(unit) % 3 for unit in once[:3]}) < 3 and float((best - (weight @ hidden).T).square().mean()) > 1e-3


def descended(form, level):
    """The minimum by coordinate descent, the slow reference."""
    form = form.numpy()
    beta, pull = np.zeros(len(form)), form.sum(1)
    for _ in range(3000):
        before = beta.copy()
        for unit, own in enumerate(form.diagonal()):
            new = np.sign(now := pull[unit] + own * beta[unit]) * max(abs(now) - level, 0.0) / own
            pull, beta[unit] = pull - form[unit] * (new - beta[unit]), new
        if np.abs(beta - before).max() < 1e-13:
            break
    return beta


@pytest.mark.parametrize("seed, leave", [(0, False), (6, True), (7, True)])
def test_lasso_path(seed, leave, monkeypatch):
    """Just above its λ a unit's β is zero, just below it is not; in two of the forms a unit leaves again on the way."""
    torch.manual_seed(seed)
    rows = torch.randn(6, 12).double() + (seed % 4) * torch.randn(6, 2).double() @ torch.randn(2, 12).double()
    left, unsweep = [], greedy.Swept.unsweep
    monkeypatch.setattr(greedy.Swept, "unsweep", lambda self, at: (left.append(at), unsweep(self, at)))
    form = rows @ rows.T
    entries = greedy.lasso_entries(form)
    assert bool(left) == leave
    for unit, level in enumerate(entries.tolist()):
        assert abs(descended(form, level * 1.001)[unit]) < 1e-9 < 1e-6 < abs(descended(form, level * 0.999)[unit])


def test_sweeps_are_inverses():
    torch.manual_seed(0)
    rows = torch.randn(90, 120).double()
    form = rows @ rows.T
    table = greedy.Swept(form)
    for at in range(70):
        assert table.sweep(at)
    for at in (3, 50, 69):
        table.unsweep(at)
    inside = torch.tensor([at for at in range(70) if at not in (3, 50, 69)])
    outside = torch.tensor([at for at in range(90) if at not in inside.tolist()])
    inverse = torch.linalg.inv(form[inside][:, inside])
    columns = torch.stack([table.column(int(at)) for at in outside], 1)
    assert torch.allclose(columns[inside], inverse @ form[inside][:, outside], rtol=1e-8)
    assert torch.allclose(columns[outside], form[outside][:, outside] - form[outside][:, inside] @ inverse @ form[inside][:, outside], rtol=1e-8)
    assert torch.equal(torch.cat([inside, outside]).sort().values, torch.arange(90))
    signs = torch.zeros(90, dtype=torch.float64)
    signs[inside] = 1.0
    assert torch.allclose(-table.times(signs)[inside], inverse.sum(1), rtol=1e-8)


def test_nuclear_norms_in_float32():
    """The Gram matrix of float32 maps gives what the decomposition of the same numbers in float64 gives."""
    for shape in ((6, 40), (40, 6), (12, 12)):
        torch.manual_seed(0)
        rows = torch.randn(shape).relu()
        rows[1] = rows[0]
        exact = maps.without_each_row(rows.double())
        assert torch.allclose(maps.without_each_row(rows), exact, rtol=1e-5, atol=1e-6 * float(exact.max()))
        assert not torch.allclose(maps.without_each_row(rows).roll(1), exact, rtol=1e-2)


@pytest.mark.parametrize("name", ["hrank", "chip"])
def test_bounded_work_takes_fewer_samples(name):
    """A small bound takes the first sample of each batch alone; without a bound all are taken."""
    one = graphprune.score(GROUPS, NET, name, BATCHES, work=1)
    firsts = graphprune.score(GROUPS, NET, name, [x[:1] for x, _ in BATCHES])
    every = graphprune.score(GROUPS, NET, name, BATCHES, work=float("inf"))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(one, firsts, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(every, graphprune.score(GROUPS, NET, name, BATCHES), strict=True))
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(one, every, strict=True))


def test_ties_keep_exact_counts():
    equal = [torch.ones(g.size, dtype=torch.float64) for g in GROUPS]
    for scope, count in {"layer": 5 + 4 + 6, "global": 14, "isomorphic": 5 + 4 + 6}.items():
        assert sum(map(len, graphprune.select(GROUPS, equal, 0.2, scope=scope))) == count
