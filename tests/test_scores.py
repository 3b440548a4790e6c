"""Every score equals a slow, readable reference written from its formula, on a small network whose groups are known by hand."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune import scores


class Toy(nn.Module):
    """Three groups: 6 channels read by a convolution, 5 channels of 4 pixels read by a linear layer, 7 features."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.nb = nn.Conv2d(6, 5, 2, stride=2, bias=False), nn.BatchNorm2d(5)
        self.c, self.d = nn.Linear(20, 7), nn.Linear(7, 4)

    def forward(self, x):
        return self.steps(x)[-1]

    def steps(self, x, gates=(1.0, 1.0, 1.0)):
        """What the three groups' consumers read, and the output."""
        x = F.relu(self.na(self.a(x))) * gates[0]
        y = F.relu(self.nb(self.b(x))) * gates[1]
        z = F.relu(self.c(y.flatten(1))) * gates[2]
        return x, y, z, self.d(z)


def spread(net):
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.5)
    return net.double().eval()


torch.manual_seed(3)
NET = spread(Toy())
X, Y = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
BATCHES = [(X[:3], Y[:3]), (X[3:], Y[3:])]
GROUPS = graphprune.couple(graphprune.trace(NET, X[:1]))
SIZES = [6, 5, 7]
# (tensor, axis, role) of every group; the linear layer reads 4 positions of each of the 5 channels.
MEMBERS = [
    [("a.weight", 0, "made"), ("a.bias", 0, "made"), ("na.weight", 0, "norm"), ("na.bias", 0, "norm"), ("b.weight", 1, "read")],
    [("b.weight", 0, "made"), ("nb.weight", 0, "norm"), ("nb.bias", 0, "norm"), ("c.weight", 1, "read")],
    [("c.weight", 0, "made"), ("c.bias", 0, "made"), ("d.weight", 1, "read")],
]


def found(name, net=NET, **options):
    return graphprune.score(GROUPS, net, name, BATCHES, F.cross_entropy, **options)


def take(values, name, axis, unit):
    rows = values[name].detach().movedim(axis, 0)
    return (rows[4 * unit : 4 * unit + 4] if (name, axis) == ("c.weight", 1) else rows[unit : unit + 1]).flatten()


def slices(values, group, unit, roles=("made", "norm", "read")):
    return [take(values, name, axis, unit) for name, axis, role in MEMBERS[group] if role in roles]


def each(function):
    return [
        torch.tensor([float(torch.as_tensor(function(g, u), dtype=torch.float64).detach()) for u in range(SIZES[g])], dtype=torch.float64) for g in range(3)
    ]


def weights(net=NET):
    return dict(net.named_parameters())


def equal(mine, reference, tolerance=1e-10):
    assert len(mine) == len(reference) == 3
    for left, right in zip(mine, reference, strict=True):
        assert left.dtype == torch.float64 and left.shape == right.shape
        assert float((left - right).abs().max() / right.abs().max().clamp(min=1e-12)) < tolerance


# ------------------------------------------------------------------ norms


def l1():
    return each(lambda g, u: sum(s.abs().sum() for s in slices(weights(), g, u)))


def l2():
    return each(lambda g, u: math.sqrt(sum(s.square().sum() for s in slices(weights(), g, u))))


def linf():
    return each(lambda g, u: max(s.abs().max() for s in slices(weights(), g, u)))


def filter_norm():
    return each(lambda g, u: math.sqrt(sum(s.square().sum() for s in slices(weights(), g, u, ("made",)))))


def group_norm():
    raw = each(lambda g, u: np.mean([float(s.square().sum()) for s in slices(weights(), g, u)]))
    return [r / r.mean() for r in raw]


def lamp():
    squares = [s.square() for s in l2()]
    return each(lambda g, u: squares[g][u] / sum(s for s in squares[g] if s >= squares[g][u]))


def fpgm():
    def row(g, u):
        return torch.cat(slices(weights(), g, u, ("made",)))

    def matrix(g, u):  # biases are vectors: the filters alone are compared
        return take(weights(), MEMBERS[g][0][0], 0, u)

    return each(lambda g, u: sum((matrix(g, u) - matrix(g, v)).norm() for v in range(SIZES[g])))


def redundancy():
    reference = []
    for g in range(3):
        rows = {u: take(weights(), MEMBERS[g][0][0], 0, u) for u in range(SIZES[g])}
        out, floor = torch.zeros(SIZES[g], dtype=torch.float64), -math.inf
        while len(rows) > 1:
            likeness, left, right = max((abs(F.cosine_similarity(rows[i], rows[j], dim=0)), i, j) for i, j in itertools.combinations(rows, 2))
            gone = left if rows[left].norm() < rows[right].norm() else right
            floor = max(floor, 1 - float(likeness))
            out[gone] = floor
            del rows[gone]
        out[next(iter(rows))] = 1.0
        reference.append(out)
    return reference


def bn_scale():
    own = l2()
    return each(lambda g, u: own[2][u] if g == 2 else weights()[("na", "nb")[g] + ".weight"].detach()[u].abs())


def synaptic():
    own = l2()

    def strength(g, u):
        if g == 2:
            return own[2][u]
        kernels = NET.b.weight.detach()[:, u] if g == 0 else NET.c.weight.detach()[:, 4 * u : 4 * u + 4].reshape(-1, 1)
        return weights()[("na", "nb")[g] + ".weight"].detach()[u].abs() * sum(kernel.norm() for kernel in kernels)

    return each(strength)


def product():
    fused = [nn.utils.fuse_conv_bn_eval(NET.a, NET.na), nn.utils.fuse_conv_bn_eval(NET.b, NET.nb), NET.c]
    readers = [fused[1].weight, NET.c.weight.reshape(7, 5, 4), NET.d.weight]
    return each(lambda g, u: ((fused[g].weight[u].square().sum() + fused[g].bias[u] ** 2).sqrt() * readers[g][:, u].norm()).detach())


def ensemble():
    members = [l2(), fpgm(), redundancy()]
    return each(lambda g, u: np.mean([sum(float(v < m[g][u]) for v in m[g]) / (SIZES[g] - 1) for m in members]))


# ------------------------------------------------------------------ gradients


def gradient(x, y):
    grads = torch.autograd.grad(F.cross_entropy(NET(x), y), list(NET.parameters()))
    return dict(zip(weights(), grads, strict=True))


def joint(grads, g, u, roles=("made", "norm", "read")):
    return sum(a @ b for a, b in zip(slices(grads, g, u, roles), slices(weights(), g, u, roles), strict=True))


def taylor():
    grads = [gradient(*batch) for batch in BATCHES]
    return each(lambda g, u: np.mean([float(joint(grad, g, u)) ** 2 for grad in grads]))


def snip():
    grads = gradient(X, Y)
    return each(lambda g, u: abs(joint(grads, g, u)))


def fisher():
    grads = [gradient(X[i : i + 1], Y[i : i + 1]) for i in range(5)]
    elements = lambda grad, g, u: zip(slices(grad, g, u), slices(weights(), g, u), strict=True)  # noqa: E731
    return each(lambda g, u: 0.5 * np.mean([sum(float((a * b).square().sum()) for a, b in elements(grad, g, u)) for grad in grads]))


def hessian(x, y):
    flat = torch.cat([p.detach().flatten() for p in NET.parameters()])
    sizes = [p.numel() for p in NET.parameters()]

    def loss(vector):
        parts = {n: v.reshape(p.shape) for (n, p), v in zip(weights().items(), vector.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(NET, parts, (x,)), y)

    return torch.autograd.functional.hessian(loss, flat)


def named(vector):
    return {n: v.reshape(p.shape) for (n, p), v in zip(weights().items(), vector.split([p.numel() for p in NET.parameters()]), strict=True)}


def grasp():
    flow = hessian(X, Y) @ torch.cat([g.flatten() for g in gradient(X, Y).values()])
    return each(lambda g, u: joint(named(flow), g, u))


def curved(diagonal):
    elements = lambda g, u: zip(slices(diagonal, g, u), slices(weights(), g, u), strict=True)  # noqa: E731
    return each(lambda g, u: 0.5 * sum(float((h * w.square()).sum()) for h, w in elements(g, u)))


def obd():
    """At the labels that the same generator draws."""
    draws, total = torch.Generator().manual_seed(0), {n: 0 for n in weights()}
    for x, _ in BATCHES:
        labels = torch.multinomial(NET(x).detach().softmax(1), 1, generator=draws).ravel()
        mean = {n: sum(gradient(x[i : i + 1], labels[i : i + 1])[n] for i in range(len(x))) / len(x) for n in total}
        total = {n: total[n] + len(x) * mean[n] ** 2 / 2 for n in total}
    return curved(total)


def obd_signs():
    signs, total = torch.Generator().manual_seed(0), 0
    for x, y in BATCHES:
        vector = torch.cat([(torch.randint(0, 2, p.shape, generator=signs) * 2.0 - 1).flatten().double() for p in NET.parameters()])
        total = total + vector * (hessian(x, y) @ vector) / 2
    return curved(named(total))


def flow(values, gone=None):
    """R of the positive network, with one slice of one parameter set to zero."""
    held = {n: v.detach().abs().clone() for n, v in values.items()}
    if gone:
        name, axis, unit = gone
        rows = held[name].movedim(axis, 0)
        rows[4 * unit : 4 * unit + 4 if (name, axis) == ("c.weight", 1) else unit + 1] = 0
        if (name, axis) != ("c.weight", 1):
            rows[unit] = 0
    scale = lambda n: held[f"{n}.weight"].reshape(1, -1, 1, 1)  # noqa: E731
    shift = lambda n: held[f"{n}.bias"].reshape(1, -1, 1, 1)  # noqa: E731
    x = F.conv2d(torch.ones_like(X[:1]), held["a.weight"], held["a.bias"], padding=1) * scale("na") + shift("na")
    x = F.conv2d(x, held["b.weight"], stride=2) * scale("nb") + shift("nb")
    return float(F.linear(F.linear(x.flatten(1), held["c.weight"], held["c.bias"]), held["d.weight"], held["d.bias"]).sum())


def synflow():  # R is linear in every slice, so θ ∂R/∂θ is what is lost without it
    whole = flow(weights())
    return each(lambda g, u: sum(whole - flow(weights(), (n, a, u)) for n, a, _ in MEMBERS[g]))


def gate(i):
    """∂L_n/∂m for one sample: gates that really stand in the network."""
    gates = [torch.ones(1, 6, 1, 1).double(), torch.ones(1, 5, 1, 1).double(), torch.ones(1, 7).double()]
    gates = [g.requires_grad_() for g in gates]
    grads = torch.autograd.grad(F.cross_entropy(NET.steps(X[i : i + 1], gates)[-1], Y[i : i + 1]), gates)
    return [g.flatten() for g in grads]


GATES = [gate(i) for i in range(5)]


def taylor_gate():
    return each(lambda g, u: np.mean([float(grads[g][u]) ** 2 for grads in GATES]))


def mask_fisher():
    return each(lambda g, u: 0.5 * sum(float(grads[g][u]) ** 2 for grads in GATES))


def group_fisher():
    # Entries a unit frees in the example of one image: maps of convolution, norm, relu and gate, twice; linear, relu, gate.
    freed = [4 * 16, 4 * 4, 3]
    return each(lambda g, u: sum(float(grads[g][u]) ** 2 for grads in GATES) / freed[g])


# ------------------------------------------------------------------ activations

ACTS = [a.detach() for a in NET.steps(X)[:3]]


def act(g, u):
    return ACTS[g][:, u].reshape(5, -1)


def readers(g, u):
    held = NET.c.weight[:, 4 * u : 4 * u + 4] if g == 1 else (NET.b.weight[:, u] if g == 0 else NET.d.weight[:, u : u + 1])
    return held.detach()


def apoz():
    return each(lambda g, u: 1 - float((act(g, u) == 0).double().mean()))


def activation():
    return each(lambda g, u: act(g, u).abs().mean())


def wanda_sp():
    def strength(g, u):
        if g == 1:  # the linear layer reads each pixel by its own weights
            return math.sqrt(sum(act(1, u)[:, p].square().mean() * readers(1, u)[:, p].square().sum() for p in range(4)))
        return math.sqrt(act(g, u).square().mean()) * readers(g, u).norm()

    return each(strength)


def flap():
    def raw(g, u):
        if g == 1:  # four channels of the linear layer belong to each unit: standardised one by one, then averaged
            return [float(act(1, u)[:, p].var(correction=0) * readers(1, u)[:, p].square().sum()) for p in range(4)]
        return [float(act(g, u).var(correction=0) * readers(g, u).square().sum())]

    every = [torch.tensor([raw(g, u) for u in range(group.size)], dtype=torch.float64) for g, group in enumerate(GROUPS)]
    return [((r - r.mean()) / r.std(correction=0)).mean(1) for r in every]


def entropy():
    def bits(g, u):
        counts, _ = np.histogram(act(g, u).mean(1).numpy(), bins=32)
        share = counts[counts > 0] / 5
        return -(share * np.log(share)).sum()

    return each(bits)


def hrank():
    return each(lambda g, u: np.mean([np.linalg.matrix_rank(m.reshape(int(m.numel() ** 0.5), -1).numpy()) for m in act(g, u)]))


def chip():
    def lost(g, u):
        total = 0.0
        for sample in ACTS[g]:
            matrix = sample.reshape(SIZES[g], -1)
            without = matrix.clone()
            without[u] = 0
            total += float(torch.linalg.matrix_norm(matrix, "nuc") - torch.linalg.matrix_norm(without, "nuc"))
        return total / 5

    return each(lost)


# ------------------------------------------------------------------ reconstruction


def columns(g):
    """(units, columns, samples) and the matching weights (units, columns, outputs); kernel taps count as outputs."""
    if g == 1:
        return ACTS[1].reshape(5, 5, 4).permute(1, 2, 0), NET.c.weight.detach().reshape(7, 5, 4).permute(1, 2, 0)
    x = ACTS[g].movedim(1, 0).flatten(1)[:, None]
    weight = NET.b.weight if g == 0 else NET.d.weight
    return x, weight.detach().movedim(1, 0).flatten(1)[:, None]


def contributions(g):
    x, w = columns(g)
    return torch.einsum("upn,upo->uno", x, w).flatten(1) / math.sqrt(x.shape[2])


def greedy(size, cost):
    """Remove one by one what costs least now; scores are the costs, never falling."""
    gone, out, floor = [], torch.zeros(size, dtype=torch.float64), -math.inf
    while len(gone) < size:
        value, unit = min((cost(gone, u), u) for u in range(size) if u not in gone)
        floor = max(floor, value)
        out[unit] = floor
        gone.append(unit)
    return out


def thinet():
    def one(g):
        y = contributions(g)
        return greedy(SIZES[g], lambda gone, u: float(y[[*gone, u]].sum(0).square().sum()))

    return [one(g) for g in range(3)]


def obs():
    def one(g):
        x, w = columns(g)
        units, each_, n = x.shape
        flat, weight = x.reshape(units * each_, n), w.reshape(units * each_, -1)
        hessian_ = flat @ flat.T / n
        hessian_ = hessian_ + 1e-2 * hessian_.diagonal().mean() * torch.eye(len(flat), dtype=torch.float64)

        def error(gone):  # the best refit of what is left, by normal equations
            keep = [u * each_ + p for u in range(units) if u not in gone for p in range(each_)]
            best = torch.zeros_like(weight)
            if keep:
                best[keep] = torch.linalg.solve(hessian_[keep][:, keep], hessian_[keep] @ weight)
            rest = weight - best
            return float((rest * (hessian_ @ rest)).sum())

        return greedy(units, lambda gone, u: error([*gone, u]) - error(gone))

    return [one(g) for g in range(3)]


def lasso():
    linear_model = pytest.importorskip("sklearn.linear_model")
    reference = []
    for g in range(3):
        y = contributions(g).numpy()
        levels, _, path = linear_model.lars_path_gram(y @ y.sum(0), y @ y.T, n_samples=1, method="lasso")
        first = [np.flatnonzero(row)[0] if row.any() else len(levels) for row in path]
        reference.append(torch.tensor([levels[max(at - 1, 0)] for at in first], dtype=torch.float64))
    return reference


def leverage():
    def one(g):
        x, _ = columns(g)
        _, values, right = np.linalg.svd(x.reshape(-1, x.shape[2]).T.numpy(), full_matrices=False)
        share = np.cumsum(values**2) / (values**2).sum()
        count = int((share < 0.95).sum()) + 1
        return torch.from_numpy((right[:count] ** 2).sum(0)).reshape(SIZES[g], -1).sum(1)

    return [one(g) for g in range(3)]


def pivoted_qr():
    def one(g):
        x, _ = columns(g)
        left = x.reshape(SIZES[g], -1).clone() / math.sqrt(x.shape[2])
        out, rest = torch.zeros(SIZES[g], dtype=torch.float64), list(range(SIZES[g]))
        while rest:
            unit = max(rest, key=lambda u: float(left[u].norm()))
            out[unit] = left[unit].square().sum()
            direction = left[unit] / left[unit].norm().clamp(min=1e-300)
            left -= torch.outer(left @ direction, direction)
            rest.remove(unit)
        return out

    return [one(g) for g in range(3)]


REFERENCES = [l1, l2, linf, filter_norm, group_norm, lamp, fpgm, redundancy, bn_scale, synaptic, product, ensemble, taylor, snip, fisher, grasp, obd]
REFERENCES += [synflow, taylor_gate, mask_fisher, group_fisher, apoz, activation, wanda_sp, flap, entropy, hrank, chip, thinet, obs, lasso]
REFERENCES += [leverage, pivoted_qr]
OPTIONS = {"bn_scale": {"otherwise": "l2"}, "synaptic": {"otherwise": "l2"}, "synflow": {"rounds": 1}}


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda f: f.__name__)
def test_equals_the_reference(reference):
    mine = found(reference.__name__, **OPTIONS.get(reference.__name__, {}))
    expected = reference()
    equal(mine, expected)
    with pytest.raises(AssertionError):  # the control: another unit's score is not this one's
        equal([m.roll(1) for m in mine], expected)


def test_no_score_is_without_reference():  # that of "effect" is in test_repair.py
    assert {f.__name__ for f in REFERENCES} | {"random", "effect"} == set(scores.SCORES)
    assert set(scores.SCORES) | {"influence", "reconstruction"} == set(graphprune.available()["score"])


def test_the_page_lists_every_score_as_it_is():
    """docs/scores.md is made from the registry; make it again (``benchmarks/scores.py --only-table --out``) when a score changes its line."""
    page = (Path(__file__).parents[1] / "docs" / "scores.md").read_text().splitlines()
    words = {"nothing": "no", "inputs": "inputs", "loss": "inputs and a loss"}
    for score in scores.SCORES.values():
        row = f"| `{score.name}` | {score.family} | {score.line} | {score.reference} | {words[score.needs]} | {score.cost} |"
        assert page.count(row) == 1, f"docs/scores.md lacks: {row}"
    rows = [line for line in page[page.index("## Catalogue") : page.index("## Accuracy on a trained network")] if line.startswith("| `")]
    assert len(rows) == len(scores.SCORES)


REDUCE = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "prod": math.prod}


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("name", ["l1", "l2", "linf"])
def test_reductions(name, reduce):
    size = {"l1": lambda s: float(s.abs().sum()), "l2": lambda s: float(s.square().sum()), "linf": lambda s: float(s.abs().max())}[name]
    expected = each(lambda g, u: REDUCE[reduce]([size(s) for s in slices(weights(), g, u)]))
    equal(found(name, reduce=reduce), [e.sqrt() for e in expected] if name == "l2" else expected)


@pytest.mark.parametrize("over, roles", [("produces", ("made",)), ("consumes", ("read",)), ("passes", ("norm",))])
def test_roles(over, roles):
    expected = each(lambda g, u: sum(float(s.abs().sum()) for s in slices(weights(), g, u, roles)))
    equal(found("l1", over=over), expected)


def test_normalisers():
    raw = found("l1")
    for how, scale in {"mean": lambda s: s / s.mean(), "max": lambda s: s / s.max(), "l2": lambda s: s / s.norm()}.items():
        equal(found("l1", normalise=how), [scale(s) for s in raw])
    equal(found("l1", normalise="standardise"), [(s - s.mean()) / s.std(correction=0) for s in raw])
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    groups = graphprune.couple(graphprune.trace(net, torch.zeros(1, 4)))
    raw, both = graphprune.score(groups, net, "l1"), graphprune.score(groups, net, "l1", normalise="mean", within="class")
    mean = torch.cat(raw).mean()  # both groups are produced and consumed by linear layers
    assert all(torch.allclose(b, r / mean) for b, r in zip(both, raw, strict=True))


def test_other_forms():
    equal(found("obd", curvature="signs"), obd_signs())
    equal(found("activation", form="signed"), each(lambda g, u: act(g, u).mean()))
    equal(found("activation", form="l2"), each(lambda g, u: act(g, u).norm(dim=1).mean()))
    equal(found("taylor_gate", form="abs"), each(lambda g, u: np.mean([abs(float(grads[g][u])) for grads in GATES])))
    equal(found("group_fisher", per="none"), each(lambda g, u: sum(float(grads[g][u]) ** 2 for grads in GATES)))
    equal(found("filter_norm", power=1), each(lambda g, u: sum(float(s.abs().sum()) for s in slices(weights(), g, u, ("made",)))))
    assert all(torch.equal(a, b) for a, b in zip(found("random", seed=4), found("random", seed=4), strict=True))
    assert not torch.equal(found("random", seed=4)[0], found("random", seed=5)[0])
