"""The check: it runs copies, needs an example that says something, follows the model's own code where values decide, and knows training mode."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import BadInput, NotEqual

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers of 16, and ``middle`` between them."""

    def __init__(self, middle, bias=True, **held):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 4, bias=bias)
        self.__dict__["middle"] = middle
        for name, item in held.items():
            self.register_buffer(name, item) if isinstance(item, torch.Tensor) else setattr(self, name, item)
        self.double()

    def forward(self, x):
        return self.down(self.middle(self, self.up(x).relu()))


def averaging(net, h):
    net.calls += 1
    net.mean.mul_(0.9).add_(h.sum(), alpha=0.1)
    return h - net.mean


def remembering(net, h):
    net.last = h.detach().sum()
    return h


def counting(net, h):
    net.seen.append(len(h))
    return h


def clipping(net, h):
    net.down.weight.data = net.down.weight.data.clamp(-0.05, 0.05)
    return h


@pytest.mark.parametrize("middle", [averaging, remembering, counting, clipping])
def test_the_model_that_is_returned_has_not_been_run(middle):
    def state(net):
        plain = {name: item for name, item in vars(net).items() if isinstance(item, int | list | torch.Tensor)}
        return plain, {name: tensor.clone() for name, tensor in net.state_dict().items()}

    net = Net(middle, calls=0, mean=torch.zeros(()), seen=[])
    before = state(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked, plain = graphprune.shrink(net, X, 0.5), graphprune.shrink(net, X, 0.5, verify=False)
    for one, two in ((state(net), before), (state(checked), state(plain))):
        assert one[0] == two[0] and all(torch.equal(one[1][name], two[1][name]) for name in one[1])


@pytest.mark.parametrize("example", [torch.zeros(3, 8), torch.ones(3, 8), torch.full((3, 8), -2.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_example_without_values_is_no_excuse(example, bias):
    net = Net(lambda m, h: h * m.up.weight.untyped_storage().nbytes(), bias=bias)  # no axis of it explains this
    with pytest.raises((NotEqual, graphprune.errors.NothingToPrune)):
        graphprune.shrink(net, example.double(), 0.5)
    graphprune.shrink(Net(lambda m, h: h.tanh(), bias=bias), example.double(), 0.5)  # control


def test_outputs_that_are_always_constant_are_said_to_be():
    class Dead(Net):
        def forward(self, x):
            return super().forward(x) * 0

    with pytest.warns(UserWarning, match="constant"):
        graphprune.shrink(Dead(lambda m, h: h), X, 0.5)


@pytest.mark.parametrize(
    ("first", "example"),
    [(lambda m, x: x.sub_(1).div_(2), X.clone()), (lambda m, x: x.clamp_(min=0), X.clone()), (lambda m, x: x.copy_(x.flip(0)), X.clone())],
)
@pytest.mark.parametrize("verify", [True, False])
def test_inputs_are_left_as_they_were(first, example, verify):
    class Writing(Net):
        def forward(self, x):
            return super().forward(first(self, x))

    before = example.clone()
    small, plan = graphprune.shrink(Writing(lambda m, h: h), example, 0.5, verify=verify, return_plan=True)
    assert torch.equal(example, before) and small.up.out_features == 8


@pytest.mark.parametrize("verify", [True, False])
def test_whole_numbers_too(verify):
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a = nn.Embedding(20, 16), nn.Linear(16, 4)

        def forward(self, ids):
            ids += 1
            return self.a(self.e(ids))

    ids = torch.tensor([[1, 2, 3]])
    assert graphprune.shrink(Ids(), {"ids": ids}, 0.5, verify=verify).a.in_features == 8 and ids.tolist() == [[1, 2, 3]]


TRAINING = {
    "flip": (lambda m, h: h.flip(1) if m.training else h, 16),
    "factor": (lambda m, h: h * h.shape[1] if m.training else h, 16),
    "view": (lambda m, h: h.view(-1, 4, 4).transpose(1, 2).flatten(1) if m.training else h, 16),
    "permutation": (lambda m, h: h[:, m.order] if m.training else h, 8),
    "another layer": (lambda m, h: h + m.extra(h) if m.training else h, 8),
}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("helper", [False, True])
def test_what_only_training_does_holds(name, helper):
    middle, _ = TRAINING[name]
    net = Net((lambda m, h: middle(m, h)) if helper else middle, order=torch.randperm(16, generator=torch.Generator().manual_seed(1)), extra=nn.Linear(16, 16))
    try:
        small, plan = graphprune.shrink(net.train(), X, 0.5, return_plan=True)
    except graphprune.errors.NothingToPrune:
        assert name in ("factor", "view", "flip")
        return
    assert small.training
    reference = graphprune.cutting.zeroed._masked(net, plan).train()
    assert torch.allclose(small(X), reference(X), atol=1e-9)


class Branching(nn.Module):
    def __init__(self, deep=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.b, self.c = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.register_buffer("order", torch.randperm(16))
        self.double()

    def forward(self, x):
        h = self.n(self.a(x))[:, self.order]
        return self.b(h) if h.sum() > -1e9 else self.c(h)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_of_positions_are_not_zeroed(seed):
    net = Branching()
    torch.manual_seed(seed)
    net.order.copy_(torch.randperm(16))
    small, plan = graphprune.shrink(net, X, 0.5, score="random", return_plan=True)
    assert torch.allclose(small(X), graphprune.zeroed(net, plan)(X)[0]) and small.n.normalized_shape == (8,)


class Speaking(nn.Module):
    """Lengths that depend on values behind a norm."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(1)
        self.e, self.n, self.d, self.o, self.how = nn.Embedding(20, 32), nn.LayerNorm(32), nn.Linear(32, 1), nn.Linear(32, 8), how

    def forward(self, ids):
        h = self.n(self.e(ids))[0]
        return self.o(self.how(h, (torch.sigmoid(self.d(h)).squeeze(-1) * 6).round().long().clamp(min=1)))


LENGTHS = {
    "repeat": lambda h, times: torch.repeat_interleave(h, times, 0),
    "pieces": lambda h, times: torch.cat([h[i : i + 1].expand(int(n), -1) for i, n in enumerate(times)]),
    "cut off": lambda h, times: h[: int(times.sum()) % len(h) + 1],
    "chosen": lambda h, times: h[times > 2],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_that_depend_on_values_are_those_of_the_survivors(name):
    net, ids = Speaking(LENGTHS[name]).eval(), torch.randint(0, 20, (1, 9), generator=torch.Generator().manual_seed(0))
    small, plan = graphprune.shrink(net, ids, 0.5, return_plan=True)
    assert small.n.normalized_shape == (16,)
    assert torch.allclose(small(ids), graphprune.zeroed(net, plan)(ids)[0], atol=1e-5)


RANDOM = {
    "seeded": lambda m, h: (torch.manual_seed(3), h + torch.randn(3, 1, dtype=h.dtype))[1],
    "generator": lambda m, h: h + torch.randn(3, 1, generator=torch.Generator().manual_seed(5), dtype=h.dtype),
    "device": lambda m, h: h if h.device.type == "cpu" else h.flip(1),
    "on the processor": lambda m, h: h if h.is_cpu else h.flip(1),
}


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_and_devices_that_the_code_asks_for(name):
    small, plan = graphprune.shrink(Net(RANDOM[name]), X, 0.5, return_plan=True)
    assert small.up.out_features == 8
    assert torch.allclose(small(X), graphprune.zeroed(Net(RANDOM[name]), plan)(X)[0])


def test_a_refusal_names_the_output_and_what_made_it_and_no_way_around():
    runs = itertools.count(1)
    net = Net(lambda m, h: h * next(runs))
    with pytest.raises(NotEqual, match=r"made by addmm in down, test_check.py:\d+\) differs") as caught:
        graphprune.shrink(net, X, 0.5)
    assert "verify" not in str(caught.value)


def test_only_a_model_that_does_not_run_is_said_not_to_run():
    with pytest.raises(BadInput, match="does not run on the example"):
        graphprune.shrink(Net(lambda m, h: h @ h), X, 0.5)

    def odd(m, h):
        if type(m.width) is not int:
            raise TypeError("no such number")
        return h

    with pytest.raises(graphprune.errors.BadModel, match=r"the model runs on the example, but .* \(test_check.py:\d+\).*no such number"):
        graphprune.shrink(Net(odd, width=16), X, 0.5)


def test_further_examples_hold_too():
    def middle(m, h):
        return h if len(h) < 5 else h.flip(1)

    net, long = Net(middle), torch.randn(6, 8, dtype=torch.float64)
    one, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    two, both = graphprune.shrink(net, X, 0.5, examples=[long], return_plan=True)
    wanted = graphprune.cutting.zeroed._masked(net, both)
    assert torch.allclose(two(long), wanted(long)) and torch.allclose(two(X), wanted(X))
    wrong = graphprune.cutting.zeroed._masked(net, plan)
    assert not torch.allclose(one(long), wrong(long))  # control


def test_another_method_as_an_example():
    class Methods(Net):
        def features(self, x):
            return self.up(x).relu()

    net = Methods(lambda m, h: h)
    assert graphprune.shrink(net, X, 0.5).up.out_features == 8
    with pytest.raises(graphprune.errors.NothingToPrune, match="an output of the model keeps its size"):
        graphprune.shrink(net, X, 0.5, examples=[lambda model: model.features(X)])


class Ids(nn.Module):
    """Scores and what is chosen by them; ``wrong`` plants a fault that no number with a fraction shows."""

    def __init__(self, choose, beside=False, wrong=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 6)
        self.__dict__["choose"], self.beside, self.wrong = choose, beside, wrong

    def forward(self, x):
        h = self.up(x).relu()
        y = self.down(h)
        # The memory behind a weight is read where nothing sees it: one half of it is gone after the cut.
        chosen = self.choose(-y if self.wrong and self.up.weight.untyped_storage().nbytes() < 16 * 8 * self.up.weight.element_size() else y)
        return (y, chosen) if self.beside else chosen


CHOICES = {
    "argmax": lambda y: y.argmax(-1),
    "mask": lambda y: y > y.mean(-1, keepdim=True),
    "order": lambda y: y.argsort(-1),
    "topk": lambda y: y.topk(2).indices,
    "bytes": lambda y: (y.sigmoid() * 255).round().to(torch.uint8),
    "a plain number": lambda y: int((y > 0).sum()),
    "truth": lambda y: [bool(more) for more in y.flatten()[:8] > 0],
    "in a dictionary": lambda y: {"ids": y.argmin(-1)},
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHOICES)
def test_whole_numbers_are_compared(name, dtype, beside):
    x = torch.randn(64, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    small = graphprune.shrink(Ids(CHOICES[name], beside).to(dtype), x, 0.5)
    assert small.up.out_features == 8
    wrong = Ids(CHOICES[name], beside, wrong=True).to(dtype)
    try:
        assert graphprune.shrink(wrong, x, 0.5).up.out_features == 16
    except (NotEqual, graphprune.errors.NothingToPrune):
        pass


TIED = {
    "equal rows": lambda m, h: m.down(h)[:, [0, 0, 1, 1]].argmax(-1),
    "equal but for rounding": lambda m, h: torch.cat([m.down(h), F.linear(h.flip(1), m.down.weight.flip(1), m.down.bias)], 1).argmax(-1),
    "at the edge": lambda m, h: m.down(h) >= F.linear(h.flip(1), m.down.weight.flip(1), m.down.bias) - 1e-7 * m.down(h).abs(),
    "sorted": lambda m, h: (m.down(h) * 1e-4 + 1).argsort(-1),
}


@pytest.mark.parametrize("name", TIED)
def test_ties_that_rounding_breaks_are_no_fault(name):
    class Tied(Net):
        def forward(self, x):
            return TIED[name](self, self.up(x).relu())

    net = Tied(None).float()
    graphprune.shrink(net, torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)), 0.5)


class Amplifying(nn.Module):
    """Convolutions, and between them what makes differences nine times larger, again and again: rounding, too."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(8))
        self.norm = norm

    def forward(self, x):
        for conv in self.convs[:-1]:
            x = self.norm(conv(x))
        return self.convs[-1](x)


def by_batch(h):
    return nn.functional.batch_norm((20 * h).sin(), None, None, training=True, eps=1e-12)


def by_spread(h):
    h = (20 * h).sin()
    return (h - h.mean((2, 3), keepdim=True)) / (h.var((2, 3), keepdim=True) + 1e-12).sqrt()


def by_instance(h):
    return nn.functional.instance_norm((20 * h).sin(), eps=1e-12)


def by_angle(h):
    return 9 * (20 * h).sin()


@pytest.mark.parametrize("norm", [by_batch, by_spread, by_instance, by_angle])
def test_rounding_that_a_model_makes_large_is_no_fault(norm):
    x = torch.randn(2, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    net = Amplifying(norm)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    found, wanted = small(x), graphprune.cutting.zeroed._masked(net, plan)(x)
    assert (found - wanted).abs().max() > 1e-3 * wanted.abs().max()  # control: in single precision the two are far apart
    assert small.convs[0].out_channels == 32


@pytest.mark.parametrize("norm", [by_batch, by_spread, by_instance, by_angle])
def test_a_fault_is_found_beneath_rounding(norm):
    """A channel of another place in the cut model: as large as the rounding, and there in double precision, too."""
    x = torch.randn(2, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    net = Amplifying(norm)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    graph = graphprune.trace(net, x)
    graphprune.cutting.verify.check(graph, net, small, plan)
    small.convs[-1].weight.data[:, [0, 1]] = small.convs[-1].weight.data[:, [1, 0]]
    with pytest.raises(NotEqual):
        graphprune.cutting.verify.check(graph, net, small, plan)
