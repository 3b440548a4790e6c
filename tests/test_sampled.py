"""The check on a small sample: it says the same as the one on the example, sees planted faults, and leaves everything as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.cutting.plan import Plan
from graphprune.cutting.sampled import Parted, Sampled, _Zeroed, shared, smaller
from graphprune.cutting.verify import check
from graphprune.cutting.zeroed import without
from graphprune.errors import NotEqual


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.deep, self.head = nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.deep(F.relu(self.norm(self.stem(x)))))
        return self.head(F.dropout(x, 0.0, self.training).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


def pictures():
    return Pictures(), torch.randn(3, 3, 128, 160)


def tokens():
    return Tokens(), torch.randint(0, 20, (2, 140))


def rows():
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(5, 6)


def cut(build):
    torch.manual_seed(0)
    model, x = build()
    model.eval()
    graph = graphprune.trace(model, x)
    plan = graphprune.plan(model, x, ratio=0.5)
    return graph, model, graphprune.apply(model, plan), plan


class Convolutions(nn.Module):
    """Of one group and of several, with a bias and without, transposed, in one dimension and in three, and one whose weight another one shares."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.apart = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, bias=False), nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.back, self.last = nn.ConvTranspose1d(8, 6, 2, 2), nn.Conv1d(6, 3, 1)
        self.deep, self.shared = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, (1, 3, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.apart(self.second(self.second(self.first(x)).relu())).sigmoid()
        return self.last(self.back(y)), self.shared(self.deep(x[:, None, None].expand(-1, 1, 3, -1, -1)).relu())


def convolutions():
    return Convolutions(), torch.randn(3, 4, 32)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_among_survivors_is_the_one_with_zeros(bias):
    """Along rows, columns, or both, wherever a bias goes with the rows; the control: a bias that stays has entries of its own there."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(6, 8, 3, bias=bias), nn.Conv2d(8, 4, 1, bias=bias)).eval(), torch.randn(2, 6, 9, 9)
    graph, shapes = graphprune.trace(model, x), {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    rows, columns, names = [0, 2, 7], [1, 3, 4], ["0.bias"] * bias
    for cuts in ({"0.weight": {0: rows}, "1.weight": {1: rows}}, {"0.weight": {0: rows, 1: columns}, "1.weight": {1: rows}}, {"0.weight": {1: columns}}):
        for goes in (True, False):
            plan = Plan(cuts | {name: {0: rows} for name in names if goes and 0 in cuts["0.weight"]}, shapes)
            sampled = Sampled(graph, model, model, plan)
            names_of = shared(model, plan)
            made = _Zeroed(graph.nodes, names_of[1], names_of[2], sampled.masks, plan)
            twin = next(module for module in names_of[0].modules() if isinstance(module, nn.Conv2d))
            found = made.convolved((x, twin.weight, twin.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1))
            other = None if twin.bias is None else without(model[0].bias.detach(), plan, "0.bias")
            wanted = F.conv2d(x, without(model[0].weight.detach(), plan, "0.weight"), other)
            stays = bias and not goes and 0 in cuts["0.weight"]
            assert (found is None) == stays
            if found is not None:
                torch.testing.assert_close(found, wanted)
            if stays:
                assert float(wanted[:, 1].detach().abs().max()) > 0


@pytest.mark.parametrize("build", [pictures, tokens, rows, convolutions])
def test_both_make_the_recorded_calls_on_less(build):
    graph, model, small, plan = cut(build)
    sample = smaller(graph.example)
    assert sum(t.numel() for t in sample[0]) < sum(t.numel() for t in graph.example[0])
    sampled = Sampled(graph, model, small, plan)
    for part in (sample, graph.example):
        assert sampled.possible()
        found, wanted = sampled.results(part)
        torch.testing.assert_close(found, wanted)
    expected = graphprune.zeroed(model, plan)(*graph.example[0])
    wanted = list(wanted) if isinstance(wanted, tuple) else [wanted]
    torch.testing.assert_close(wanted, list(expected))
    with torch.no_grad():
        whole = model(*graph.example[0])
        assert not torch.allclose(wanted[0], whole[0] if isinstance(whole, tuple) else whole)  # the control: zeroing did something


def test_training_mode_follows_its_own_calls():
    graph, model, small, plan = cut(pictures)
    assert graph.trained and len(graph.training) >= len(graph.nodes)
    found, wanted = Sampled(graph, model, small, plan).results(smaller(graph.example), training=True)
    torch.testing.assert_close(found, wanted)
    assert not model.training and int(model.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("build", [pictures, tokens, rows])
@pytest.mark.parametrize("fault", ["bias", "swap", "scale", "order"])
def test_planted_faults_are_seen(build, fault):
    graph, model, small, plan = cut(build)
    assert check(graph, model, small, plan) < 1e-5
    layer = [module for module in small.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-2]
    with torch.no_grad():
        if fault == "bias":
            layer.bias[1] += 0.5
        elif fault == "swap":
            layer.weight[0], layer.bias[0] = layer.weight[1].clone(), layer.bias[1].clone()
        elif fault == "scale":
            layer.weight *= 1.5
        else:
            layer.weight.copy_(layer.weight.roll(1, 1))
    with pytest.raises(NotEqual):
        check(graph, model, small, plan)


@pytest.mark.parametrize("build", [pictures, tokens, rows])
def test_small_faults_are_told_from_rounding(build):
    graph, model, small, plan = cut(build)
    layer = [module for module in small.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    before = layer.bias.detach().clone()
    for size, seen in ((5e-5, True), (1e-12, False)):
        with torch.no_grad():
            layer.bias.copy_(before)
            layer.bias[0] += size
        if seen:
            with pytest.raises(NotEqual, match="more than rounding"):
                check(graph, model, small, plan)
        else:
            check(graph, model, small, plan)


class Rounds(nn.Module):
    """Enlarges rounding errors."""

    def __init__(self, short: bool) -> None:
        super().__init__()
        self.short, self.first, self.second, self.third = short, nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = self.third(x)
        return torch.sin(20000 * (x.float() if self.short else x))


@pytest.mark.parametrize("short", [False, True])
def test_rounding_is_no_fault(short):
    graph, model, small, plan = cut(lambda: (Rounds(short), torch.randn(32, 64)))
    assert check(graph, model, small, plan) > 1e-5  # as large as a fault would be


class ByWidth(nn.Module):
    """Another layer for small pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.large, self.small, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.large(x).relu() if x.shape[-1] > 100 else self.small(x)
        return self.head(x.mean((2, 3)))


class ByLength(ByWidth):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.large(self.stem(x))
        for _ in range(x.shape[-1] // 40):
            x = x.relu()
        return self.head(x.mean((2, 3)))


class Fixed(ByWidth):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.large(self.stem(x)).flatten(2)
        return self.head(x.narrow(2, 0, 124 * 124).mean(2))


@pytest.mark.parametrize("kind", [ByWidth, ByLength, Fixed])
def test_another_path_on_the_sample_says_nothing(kind):
    graph, model, small, plan = cut(lambda: (kind(), torch.randn(1, 3, 128, 128)))
    with pytest.raises((Parted, RuntimeError)):
        Sampled(graph, model, small, plan).results(smaller(graph.example))
    assert check(graph, model, small, plan) < 1e-5
    with torch.no_grad():
        small.large.bias[0] += 1.0
    with pytest.raises(NotEqual):
        check(graph, model, small, plan)


class Grid(nn.Module):
    """Pools to a grid of 4 x 4, which each have weights of their own: maps of 2 x 2 would hide which is which."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(6 * 16, 5)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 5, 4, 2), nn.ReLU(), nn.MaxPool2d(4, 4), nn.MaxPool2d(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        pools = {"mean": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d, "nearest": F.interpolate}
        return self.head(pools[self.way](x, (4, 4)).flatten(1))


@pytest.mark.parametrize("way", ["mean", "max", "nearest"])
def test_positions_are_told_apart(way):
    graph, model, small, plan = cut(lambda: (Grid(way), torch.randn(1, 3, 160, 160)))
    assert check(graph, model, small, plan) < 1e-5
    with pytest.raises(Parted, match="stretches"):
        Sampled(graph, model, small, plan).results(smaller(graph.example))
    with torch.no_grad():
        small.head.weight[:, :16] = small.head.weight[:, :16].flip(1)
    with pytest.raises(NotEqual):
        check(graph, model, small, plan)


class Writes(nn.Module):
    """Its forward writes into its own weights, in the way of ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second = how, nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if self.how == "in place":
                self.first.weight.mul_(0.5)
            elif self.how == "data":
                self.first.bias.data.add_(1.0)
            elif self.how == "new data":
                self.first.bias.data = self.first.bias * 2
            elif self.how == "numpy":
                self.second.bias.detach().numpy()[0] = 5.0
            elif self.how == "view":
                self.second.weight[0].zero_()
            else:
                self.seen += 1
        return self.second(self.first(x).relu() + self.seen)


@pytest.mark.parametrize("how", ["in place", "data", "new data", "view", "numpy", "buffer"])
def test_nothing_is_written_into_the_users_model(how):
    torch.manual_seed(0)
    model, x = Writes(how).eval(), torch.randn(2, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = graphprune.shrink(model, x, ratio=0.5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(small.second.weight, before["second.weight"][:, graphprune.plan_of(small).kept("first")])


def test_the_sample_is_a_part_of_the_example():
    image, ids, mask = torch.randn(8, 3, 224, 299), torch.randint(0, 9, (8, 512)), torch.ones(8, 1, 512, 512)
    (image_part, ids_part), named = smaller(((image, ids), {"mask": mask}))
    assert torch.equal(image_part, image[:2, :, :64, :75]) and torch.equal(ids_part, ids[:2, :64])
    assert named["mask"].shape == (2, 1, 64, 64)
    few = ((torch.randn(2, 3, 32, 32),), {})
    assert smaller(few) is few


@given(st.data())
def test_what_is_removed_is_zero(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    cuts = {axis: sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1)))) for axis in sorted(axes)}
    tensor = torch.randn(shape)
    if len(shape) == 4 and data.draw(st.booleans()):
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    plan = Plan({"w": cuts}, {"w": shape})
    assert torch.equal(without(tensor, plan, "w"), tensor.masked_fill(~plan.mask("w", shape), 0))
