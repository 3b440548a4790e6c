"""Sizes written as literals in forward: the code is rewritten where that frees an axis, proven, and told."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune

X = torch.randn(2, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.n = nn.BatchNorm2d(16)
        self.c, self.d = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.max_pool2d(F.relu(self.n(self.b(x))), 2)
        x = F.dropout(F.relu(self.c(x.view(-1, 16 * 5 * 5))), 0.5, self.training)
        return self.d(x)


class Parts(nn.Module):
    """Literal parts and a literal slice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(784, 24), nn.Linear(8, 8), nn.Linear(24, 10)

    def forward(self, x):
        p, q, r = torch.split(self.a(x.flatten(1)), 8, dim=1)
        return self.c(torch.cat([self.b(p), q[:, :8] * r.sigmoid(), p[:, 0:8]], 1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 784, 10)
        self.m, self.k = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        y = self.a(x)
        if float(y.detach().sum()) > 1e9:
            y = y * 2
        return self.b(self.k(self.m(y).relu()).view(-1, 8 * 784))


def gap(left, right):
    return float((left - right).detach().abs().max() / right.detach().abs().max())


def random(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model.double().eval()


@pytest.mark.parametrize("kind", [LeNet, Parts])
def test_literals_are_rewritten_and_proven(kind):
    net = random(kind())
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert isinstance(small, kind) and plan.rewrites == ("",) and "rewritten" in plan.explain()
    assert all(sum(p.numel() for p in net.parameters()) > 1.5 * sum(p.numel() for p in m.parameters()) for m in (small,))
    (zero,) = graphprune.zeroed(net, plan)(X)
    assert gap(small(X), zero) < 1e-9
    other = {
        name: {axis: [p for p in range(plan.shapes[name][axis]) if p not in kept] or kept for axis, kept in axes.items()} for name, axes in plan.cuts.items()
    }
    assert other != plan.cuts  # the control: other units of the same number
    wrong = graphprune.Plan({n: {a: sorted(k)[: len(plan.cuts[n][a])] for a, k in axes.items()} for n, axes in other.items()}, plan.shapes)
    assert gap(small(X), graphprune.zeroed(net, wrong)(X)[0]) > 1e-6
    whole, left = graphprune.shrink(net, X, 0.5, return_plan=True, rewrite=False)
    assert type(whole) is kind and "no attribute behind the size" in left.explain()


def test_the_rewritten_model_is_a_whole_one():
    net = random(LeNet())
    before = copy.deepcopy(net)
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert list(small.state_dict()) == list(net.state_dict()) and type(net) is LeNet
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True))
    assert small(torch.cat([X, X, X])).shape == (6, 10)
    small.train()
    assert not torch.equal(small(X), small(X))  # dropout
    small(X).sum().backward()
    mean = small.n.running_mean.clone()
    small.eval()
    assert torch.equal(small(X), small(X)) and torch.equal(mean, small.n.running_mean)
    again = copy.deepcopy(small)
    assert torch.equal(again(X), small(X)) and not again.training
    fresh = graphprune.apply(before, graphprune.Plan.from_json(plan.to_json()))
    assert isinstance(fresh, LeNet) and fresh(X).shape == (2, 10)


def test_only_the_module_with_the_literal_is_rewritten():
    net = random(nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), LeNet()), nn.ReLU()))
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert type(small) is nn.Sequential and type(small[0]) is nn.Sequential and isinstance(small[0][1], LeNet)
    assert plan.rewrites == ("0.1",)
    assert gap(small(X), graphprune.zeroed(net, plan)(X)[0]) < 1e-9


def test_code_that_branches_on_values_is_rewritten_too():
    net = random(Branching())
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert isinstance(small, Branching) and (small.m.out_channels, small.k.out_channels) == (8, 4)
    assert gap(small(X), graphprune.zeroed(net, plan)(X)[0]) < 1e-9


def test_code_without_a_source_leaves_the_axis_whole():
    space = {"nn": nn}
    exec("def forward(self, x): return self.b(self.a(x).view(-1, 2 * 4 * 784))", space)
    kind = type("Made", (Branching,), {"forward": space["forward"]})
    with pytest.raises(graphprune.errors.NothingToPrune):
        graphprune.shrink(random(kind()), X, 0.5)


def halves(x, width):
    return x.view(-1, 8, 784)[:, :, : 28 * 28].flatten(1) if width else x


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.f, self.g = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 784, 24), nn.Linear(24, 10)
        self.__secret = 1.5
        self.calls = 0

    def loss(self, x, y):
        return nn.functional.cross_entropy(self(x), y)


class Calling(Base):
    """A literal in another method, which uses super() and a private name."""

    def forward(self, x):
        return self.g(self.flat(self.c(x)).relu())

    def flat(self, h):
        super().train(self.training)
        return self.f(h.view(-1, 8 * 784))


class Helping(Base):
    """A literal in a function beside the class."""

    def forward(self, x):
        return self.g(self.f(halves(self.c(x), 3)).relu())


class Private(Base):
    def __init__(self):
        super().__init__()
        self.__scale = 1.5

    def forward(self, x):
        h = self.c(x) * self.__scale
        if self.training:
            h = nn.functional.dropout(h, 0.5)
        return self.g(self.f(h.view(-1, 6272)).relu())


def closing(scale):
    class Closing(Base):
        def forward(self, x, *, more=2):
            return self.g(self.f((self.c(x) * scale).view(-1, 6272)).relu()) * more

    return Closing


@pytest.mark.parametrize("kind", [Calling, Helping, Private, closing(0.5)])
def test_the_class_is_kept_whole(kind):
    net = random(kind())
    heard = []
    net.register_forward_hook(lambda *_: heard.append(1))
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert isinstance(small, kind) and type(small).__name__ == kind.__name__ and small.c.out_channels == 4 and plan.rewrites == ("",)
    assert gap(small(X), graphprune.zeroed(net, plan)(X)[0]) < 1e-9
    count = len(heard)
    small.loss(X, torch.tensor([1, 2])).backward()
    assert len(heard) == count + 1 and small.c.weight.grad is not None
    assert torch.equal(copy.deepcopy(small)(X), small(X)) and type(copy.deepcopy(small)) is type(small)
    small.train()
    assert torch.equal(small(X), small(X)) == (kind is not Private)
    again, second = graphprune.shrink(small.eval(), X, 0.5, return_plan=True)
    assert again.c.out_channels == 2 and type(again) is type(small) and type(net) is kind
    whole = graphprune.apply(net, again.graphprune_plan)
    assert gap(whole(X), again(X)) < 1e-9


@pytest.mark.parametrize("kind", [Calling, Helping, Private])
def test_it_travels_as_a_whole(kind, tmp_path):
    small = graphprune.shrink(random(kind()), X, 0.5)
    torch.save(small, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    assert isinstance(again, kind) and torch.equal(again(X), small(X))
    graphprune.save(small, tmp_path / "folder")
    assert torch.equal(graphprune.load(tmp_path / "folder", kind().double()).eval()(X), small(X))
    assert gap(torch.export.export(small, (X,)).module()(X), small(X)) < 1e-9


def test_in_place_too():
    net = random(Private())
    small = graphprune.shrink(net, X, 0.5, inplace=True)
    assert small is net and isinstance(net, Private) and net.c.out_channels == 4 and net(X).shape == (2, 10)


def test_what_the_rewritten_source_says():
    net = random(LeNet())
    small = graphprune.shrink(net, X, 0.5)
    import inspect

    assert "self.size_1" in inspect.getsource(type(small).forward) and "self.size_1" not in inspect.getsource(LeNet.forward)


class Base(nn.Module):
    def forward(self, x):
        return x.sin()

    @staticmethod
    def wide(x):
        return x.cos()


class NamesItsParent(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(784, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(super(NamesItsParent, self).forward(self.a(x.flatten(1)).relu()).view(-1, 16))  # noqa: UP008


class NamesItself(NamesItsParent):
    def forward(self, x):
        return self.b(NamesItself.wide(self.a(x.flatten(1)).relu()).view(-1, 16))


class Mangled(NamesItsParent):
    def forward(self, x):
        return self.b(self.__turned(self.a(x.flatten(1)).relu()))

    def __turned(self, x):
        return x.view(len(x), 16) if isinstance(self, Mangled) else x


def turned(x):
    raise AssertionError("a namesake, which nobody calls")


class Namesake(NamesItsParent):
    """What it holds has the name of a function beside the class."""

    def forward(self, x):
        return self.b(self.turned(self.a(x.flatten(1)).relu()).view(-1, 16))

    def turned(self, x):
        return x.view(-1, 4, 4).flatten(1).view(-1, 16)


@pytest.mark.parametrize("kind", [NamesItsParent, NamesItself, Mangled, Namesake])
def test_code_that_names_its_class_is_rewritten(kind):
    net = random(kind().double().eval())
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert small.a.out_features == 8 and isinstance(small, kind) and plan.rewrites
    assert gap(small(X), graphprune.zeroed(net, plan)(X)[0]) < 1e-9 < gap(small(X), net(X))
