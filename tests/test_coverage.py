"""What could not be cut once, each with its smallest network: cut equals zeroed, and the sizes are what they should be."""

import copy
import sys

import pytest
import test_hazards as hazards
import torch
import torch.nn.functional as F
from judge import emptied, gap
from test_hazards import PARTLY
from torch import nn

import graphprune
from graphprune import errors

X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def drawn(net):
    torch.manual_seed(0)
    net = net.double().eval()
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return net


def shrunk(net, x, ratio=0.5, **options):
    """The cut model and its plan, after comparing it with the zeroed original on other inputs (and with other units zeroed, which must differ)."""
    net = drawn(net)
    small, plan = graphprune.shrink(net, x, ratio, return_plan=True, **options)
    other = torch.randn(x.shape, dtype=x.dtype) if x.is_floating_point() else x.flip(0)
    with torch.no_grad():
        (mine, *_), (theirs, *_) = [small(other)], graphprune.zeroed(net, plan)(other)
        assert float((mine - theirs).abs().max()) < 1e-9 * float(theirs.abs().max())
        assert float((mine - net(other)).abs().max()) > 1e-6
    return small, plan


class Grouped(nn.Module):
    """Heads of keys and values, each expanded for the queries of its group; rotary tables over positions in the head."""

    def __init__(self, heads, groups, size=4):
        super().__init__()
        self.size, self.copies = size, heads // groups
        self.q, self.o = nn.Linear(8, heads * size), nn.Linear(heads * size, 8)
        self.k, self.v = nn.Linear(8, groups * size), nn.Linear(8, groups * size)
        self.register_buffer("table", torch.rand(size // 2).double())

    def turned(self, x):
        angle = torch.outer(torch.arange(x.shape[2]).double(), self.table)
        angle = torch.cat([angle, angle], -1)
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def repeated(self, x):
        batch, groups, length, size = x.shape
        return x[:, :, None].expand(batch, groups, self.copies, length, size).reshape(batch, groups * self.copies, length, size)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.repeated(self.turned(k)), self.repeated(v))
        return self.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (8, 4), (6, 2)])
def test_heads_of_keys_and_values_go_with_their_queries(heads, groups):
    small, _ = shrunk(Grouped(heads, groups), X)
    assert (small.q.out_features, small.k.out_features, small.v.out_features) == (2 * heads, 2 * groups, 2 * groups)
    assert small.o.in_features == 2 * heads and small.copies == heads // groups


class Repeated(Grouped):
    """The number of copies is derived where it is used; nothing else asks for the number of groups."""

    def __init__(self, heads, groups, how):
        super().__init__(heads, groups)
        self.heads, self.groups, self.how = heads, groups, how

    def repeated(self, x):
        copies = self.heads // self.groups
        return x.repeat_interleave(copies, 1) if self.how == "interleaved" else x.repeat(1, copies, 1, 1)

    def forward(self, x):
        shape = (*x.shape[:-1], self.heads, self.size)
        q, (k, v) = self.q(x).view(shape), (layer(x).view(*shape[:-2], -1, self.size) for layer in (self.k, self.v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(self.turned(q), self.repeated(self.turned(k)), self.repeated(v))
        return self.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


@pytest.mark.parametrize("how", ["interleaved", "tiled"])
def test_a_number_of_copies_stays(how):
    small, _ = shrunk(Repeated(8, 4, how), X)
    assert (small.q.out_features, small.k.out_features, small.heads, small.groups) == (16, 8, 4, 2)


@pytest.mark.parametrize("how", ["interleaved", "tiled"])
def test_what_is_copied_for_every_head_follows_the_heads(how):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.a, self.b = 4, nn.Linear(8, 16), nn.Linear(16, 2)
            self.bias = nn.Parameter(torch.ones(1, 1, 1))

        def forward(self, x):
            bias = self.bias.repeat_interleave(self.heads, 1) if how == "interleaved" else self.bias.repeat(1, self.heads, 1)
            return self.b((self.a(x[:, 0]).view(-1, self.heads, 4).softmax(-1) + bias).flatten(1))

    small, _ = shrunk(Biased(), X)
    assert (small.heads, small.a.out_features) == (2, 8)


class PadShortcut(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels // 4, self.channels // 4))


class OptionA(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 4, 1)
        self.short = PadShortcut(32)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.b((self.a(x) + self.short(x)).relu())


def test_padded_shortcuts_are_cut_at_every_ratio_and_more_never_leaves_more():
    image, sizes = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
    for ratio in (0.1, 0.3, 0.4, 0.45, 0.5, 0.6, 0.75, 0.9):
        small, _ = shrunk(OptionA(), image, ratio)
        assert type(small) is OptionA and small.stem.out_channels < 16 and small.a.out_channels < 32
        sizes.append(sum(p.numel() for p in small.parameters()))
    assert sizes == sorted(sizes, reverse=True)


class Experts(nn.Module):
    """Rows sorted by expert, one product for all experts."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 12, 8))
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x.float()).flatten(0, 1)
        ends = torch.tensor([4, 7, 10], dtype=torch.int32)
        return self.head(torch._grouped_mm(torch._grouped_mm(x, self.up, offs=ends).relu(), self.down, offs=ends))


def test_experts_in_one_grouped_product_lose_channels():
    torch.manual_seed(0)
    net = Experts()
    small, plan = graphprune.shrink(net, X.float(), 0.5, return_plan=True)
    assert small.up.shape == (3, 4, 8) and small.down.shape == (3, 8, 4)  # 6 would be no multiple of 16 bytes, which the kernel wants
    (zero,) = graphprune.zeroed(net, plan)(X.float() * 2)
    assert torch.allclose(small(X.float() * 2), zero, atol=1e-5)
    assert not torch.allclose(small(X.float() * 2), net(X.float() * 2), atol=1e-2)


class LooksAtShape(nn.Module):
    def __init__(self, uses):
        super().__init__()
        self.a, self.b, self.uses = nn.Linear(8, 16), nn.Linear(16, 2), uses

    def forward(self, x):
        y = self.a(x)
        last = y[:, :, -1]
        places = torch.arange(last.shape[1], dtype=y.dtype)[:, None]
        return self.b(y.relu() + places) + (last[..., None] if self.uses else 0)


def test_a_position_taken_only_for_its_shape_locks_nothing():
    last_first = lambda groups, model, batches: [torch.arange(group.size, 0, -1).double() for group in groups]  # noqa: E731
    small, plan = shrunk(LooksAtShape(False), X, score=last_first)
    assert small.a.out_features == 8 and 15 not in plan.cuts["a.weight"][0]
    small, plan = shrunk(LooksAtShape(True), X, score=last_first)
    assert small.a.out_features < 16 and 15 in plan.cuts["a.weight"][0]  # the control: where it is used, position -1 stays


class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
        left, right = self.up(x).split(self.config.sizes["half"], -1)
        return x + self.down(left * right)


class Config:
    def __init__(self):
        self.heads, self.width, self.sizes = 4, 8, {"half": 12}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.layers = nn.Sequential(Configured(self.config), Configured(self.config))

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).view(-1, self.config.width))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sizes_in_a_configuration_that_layers_share(scope):
    net = TwoLayers()
    small, _ = shrunk(net, X, scope=scope)
    assert vars(net.config) == {"heads": 4, "width": 8, "sizes": {"half": 12}}
    assert small.config is small.layers[0].config is small.layers[1].config
    if scope == "layer":
        assert vars(small.config) == {"heads": 2, "width": 4, "sizes": {"half": 6}}


class Auxiliary(nn.Module):
    """A head that only training reads; with ``targets`` it cannot run on the example."""

    def __init__(self, targets=False):
        super().__init__()
        self.a, self.b, self.aux, self.targets = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, 6), targets
        self.aux2 = nn.Linear(6, 3)

    def forward(self, x, labels=None):
        y = self.a(x).relu()
        if not self.training:
            return self.b(y)
        if self.targets and labels is None:
            raise ValueError("labels are needed in training")
        return self.b(y), self.aux2(self.aux(y).relu())


def test_heads_that_only_training_reads_are_cut_along():
    net = drawn(Auxiliary())
    state, python = torch.get_rng_state(), torch.initial_seed()
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert torch.equal(state, torch.get_rng_state()) and python == torch.initial_seed()
    assert (small.a.out_features, small.aux.in_features, small.aux.out_features, small.aux2.in_features) == (8, 8, 3, 3)
    zero = copy.deepcopy(net)
    for name, parameter in zero.named_parameters():
        parameter.data = parameter.data * plan.mask(name, parameter.shape)
    for mine, theirs in zip(small.train()(X), zero.train()(X), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(small(X)[1], net.train()(X)[1])  # the control


class Small(nn.Module):
    """A head that only training reads, with a batch norm that wants more than one value."""

    def __init__(self, norm=True):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.norm, self.e = nn.BatchNorm2d(8) if norm else nn.Identity(), nn.Linear(8, 2)

    def forward(self, x):
        y = self.a(x).relu().mean((2, 3), keepdim=True)
        if not self.training:
            return self.b(y.flatten(1))
        return self.b(y.flatten(1)), self.e(self.norm(self.d(self.c(y).relu())).flatten(1))


def test_what_training_would_have_read_where_it_stops_stays_whole():
    one = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(drawn(Small()), one, 0.5, return_plan=True)
    assert (small.a.out_channels, small.c.out_channels, small.d.in_channels) == (4, 3, 3)
    assert small.d.out_channels == 8 and "not known in training" in plan.explain()
    assert small.train()(torch.randn(4, 3, 8, 8, dtype=torch.float64))[1].shape == (4, 2)
    other = graphprune.shrink(drawn(Small(norm=False)), one, 0.5)  # the control: nothing stops there
    assert other.d.out_channels == other.e.in_features == 4


def test_heads_that_cannot_be_reached_stay_whole_with_a_reason():
    small, plan = graphprune.shrink(drawn(Auxiliary(targets=True)), X, 0.5, return_plan=True)
    assert small.a.out_features == 8 and small.aux2.in_features == 6 and small.aux.out_features == 6
    assert "whole: aux2.weight axis 1 (18 entries): not used in the run on the example" in plan.explain(verbose=True)


def test_an_axis_whose_units_all_go_together_says_so():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.a(x)
            return self.c(self.b(y.relu())) + self.c(y + y.roll(1, -1))

    with pytest.raises(errors.NothingToPrune, match="a.weight axis 0: all its positions stay or go together"):
        graphprune.shrink(drawn(Shared()), X, 0.5)


class Picked(nn.Module):
    def __init__(self, order, by_select=True, otherwise=False):
        super().__init__()
        self.register_buffer("order", torch.tensor(order))
        self.a, self.b, self.by_select, self.otherwise = nn.Linear(8, 10), nn.Linear(len(order), 2), by_select, otherwise

    def forward(self, x):
        y = self.a(x).relu()
        z = y.index_select(2, self.order) if self.by_select else y[..., self.order]
        return self.b(z * self.order if self.otherwise else z)


@pytest.mark.parametrize("by_select", [True, False])
@pytest.mark.parametrize("order", [[3, 1, 4, 0, 5, 9, 2, 6, 8, 7], [1, 1, 7, 3, 3, 3, 9], [0, 2, 4, 6, 8]])
def test_buffers_that_pick_are_renumbered(order, by_select):
    small, plan = shrunk(Picked(order, by_select), X, criterion="random")
    assert small.a.out_features < 10 and int(small.order.max()) < small.a.out_features and small.b.in_features == len(small.order)
    assert graphprune.Plan.from_json(plan.to_json()) == plan
    kept = plan.cuts["order"][0]
    assert graphprune.expand(small)["order"][kept].tolist() == [order[i] for i in kept]
    again, second = graphprune.shrink(small, X, 0.5, return_plan=True)
    net = drawn(Picked(order, by_select))
    assert torch.equal(graphprune.apply(net, graphprune.compose(plan, second)).order, again.order)


def test_a_buffer_that_is_also_data_stays():
    with pytest.raises(errors.NothingToPrune, match="numbers positions of this axis"):
        graphprune.shrink(drawn(Picked([3, 1, 4, 0, 5, 9, 2, 6, 8, 7], otherwise=True)), X)


class Stacked(Picked):
    """The buffer is read from within a list."""

    def forward(self, x):
        return super().forward(x) * torch.stack([self.order, self.order]).double().mean()


def test_a_buffer_that_is_also_data_in_a_list_stays():
    with pytest.raises(errors.NothingToPrune, match="numbers positions of this axis"):
        graphprune.shrink(drawn(Stacked([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])), X)


class Cached(nn.Module):
    """A table that evaluation computes once, by the name of the device."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.cache = nn.Linear(8, 12), nn.Linear(12, 2), {}
        self.scale = nn.Parameter(torch.randn(12))

    def forward(self, x):
        if self.training or str(x.device) not in self.cache:
            self.cache[str(x.device)] = self.scale.exp()
        return self.b(self.a(x) * self.cache[str(x.device)])


def test_tables_kept_in_a_dictionary_are_cut_too():
    net = drawn(Cached())
    with torch.no_grad():
        net(X)
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert small.cache["cpu"].shape == (6,) and small.scale.shape == (6,) and net.cache["cpu"].shape == (12,)
    fresh = graphprune.apply(drawn(Cached()), plan)
    assert torch.allclose(fresh(X), small(X))
    wanted = small(X)
    assert graphprune.apply(net, plan, inplace=True) is net and torch.equal(net(X), wanted)


def test_a_failure_in_place_leaves_the_model_as_it_was(monkeypatch):
    net = drawn(TwoLayers())
    net(X).sum().backward()
    before = copy.deepcopy(net)
    grads = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    objects = dict(net.named_parameters())

    module = sys.modules["graphprune.cutting.apply"]  # the package's own name for it is the function
    real, count = module._edit, []

    def fails(*args):
        real(*args)
        count.append(args)
        if len(count) > 4:
            raise RuntimeError("in the second apply")

    monkeypatch.setattr(module, "_edit", fails)
    with pytest.raises(RuntimeError, match="second apply"):
        graphprune.shrink(net, X, 0.5, inplace=True)
    for name, parameter in net.named_parameters():
        assert parameter is objects[name] and torch.equal(parameter, before.state_dict()[name]) and torch.equal(parameter.grad, grads[name])
    assert vars(net.config) == vars(before.config) and [m.extra_repr() for m in net.modules()] == [m.extra_repr() for m in before.modules()]
    assert torch.equal(net(X), before(X))


@pytest.mark.parametrize("name", sorted(PARTLY | {"Base"}))
def test_a_larger_ratio_never_leaves_more_even_where_sizes_cannot_follow(name):
    net, sizes = hazards.drawn(getattr(hazards, name)), []
    for ratio in (0.1, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9):
        small = graphprune.shrink(net, hazards.X, ratio, rewrite=False, verify=False)
        sizes.append(sum(p.numel() for p in small.parameters()))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]


def test_masks_and_padded_weights_of_a_tied_tensor_under_every_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.a(x).sin() + self.b(x).relu())

    net = Tied().double().eval()
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    masks, wide = plan.masks(net), graphprune.expand(small)
    assert small.a.weight is small.b.weight and int(masks["b.weight"].sum()) == small.b.weight.numel() == 24
    assert all(torch.equal(wide[name], tensor * masks[name]) for name, tensor in net.state_dict().items())


class Listed(nn.Module):
    """Positions picked by lists in the code."""

    def __init__(self):
        super().__init__()
        self.hidden, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(16, 4)

    def forward(self, x):
        y = self.a(self.hidden(x).relu()).view(x.shape[0], 6, 4)
        return self.b(torch.cat([y[:, :2], y[:, [-2]], y[:, [-1]]], 1).flatten(1))


def test_lists_as_indices_keep_their_values_in_the_oracle():
    net, x = Listed().double().eval(), torch.randn(3, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x[:2], 0.5, return_plan=True)
    (zero,) = graphprune.zeroed(net, plan)(x)
    assert torch.allclose(small(x), zero, atol=1e-12) and not torch.allclose(net(x), zero, atol=1e-3)


def test_an_output_that_is_not_finite_where_the_other_is_fails_the_check():
    from graphprune.cutting.verify import check

    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    with torch.no_grad():
        net[2].bias[0] = torch.nan
    with pytest.raises(errors.NotEqual, match="not finite in the same places"):
        check(graphprune.trace(net, x), net, small, plan)


class Shares(nn.Module):
    """Every head divided by its own sum: 0 / 0 for heads that are zeroed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        y = self.a(x).square()[:, :, None].expand(-1, -1, 3)
        return self.b((y / y.sum(-1, keepdim=True)).sum(-1) * x[:, :1])


def test_zeros_divided_by_their_sum_stay_zero_in_the_oracle():
    net, x = Shares().double().eval(), torch.randn(3, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x[:2], 0.5, return_plan=True)
    (zero,) = graphprune.zeroed(net, plan)(x)
    assert small.a.out_features == 4 and torch.allclose(small(x), zero, atol=1e-12)


KEYWORDS = {
    "narrow": lambda net, x: x.narrow(dim=1, start=0, length=net.half),
    "split": lambda net, x: torch.split(x, split_size_or_sections=net.half, dim=1)[1],
    "chunk": lambda net, x: torch.chunk(input=x, chunks=2, dim=1)[0],
    "roll": lambda net, x: torch.roll(input=x, shifts=2, dims=1),
    "pad": lambda net, x: F.pad(input=x, pad=(0, 0, 0, 0, 0, net.half)),
    "unflatten": lambda net, x: x.unflatten(dim=1, sizes=(2, net.half)).sum(1),
    "view": lambda net, x: x.view(size=(len(x), net.width, -1))[..., None],
    "repeat": lambda net, x: x.repeat(repeats=(1, 2, 1, 1)),
    "repeat_interleave": lambda net, x: torch.repeat_interleave(input=x, repeats=2, dim=1),
    "conv": lambda net, x: torch.conv2d(input=x, weight=net.kernel, groups=2),
    "group_norm": lambda net, x: torch.group_norm(input=x, num_groups=4),
    "layer_norm": lambda net, x: torch.layer_norm(input=x.movedim(1, -1), normalized_shape=[net.width]).movedim(-1, 1),
    "channel_shuffle": lambda net, x: F.channel_shuffle(input=x, groups=2),
    "full": lambda net, x: x + torch.full(size=(1, net.width, 1, 1), fill_value=2.0, dtype=x.dtype),
    "new_full": lambda net, x: x * x.new_full(size=(1, net.width, 1, 1), fill_value=2.0),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_sizes_given_by_keyword(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.half = 8, 4
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.LazyConv2d(5, 1)
            self.kernel = nn.Parameter(torch.randn(8, 4, 1, 1))

        def forward(self, x):
            return self.b(KEYWORDS[name](self, self.a(x).tanh()))

    torch.manual_seed(0)
    net, x = Net().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    net(x)
    small, plan = graphprune.shrink(net, x[:1], 0.5, return_plan=True)
    (zero,) = graphprune.zeroed(net, plan)(x)
    assert (small(x) - zero).abs().max() < 1e-10
    assert small.a.out_channels < 8 and (small(x) - net(x)).abs().max() > 1e-3


BLOCKS = {  # numbers of blocks that no attribute holds, on 16 channels
    "group norm": lambda net, x: F.group_norm(x, 4),
    "with a gain": lambda net, x: F.group_norm(x, 2, net.gain),
    "grouped convolution": lambda net, x: F.conv2d(x, net.kernel, groups=4),
    "one channel each way": lambda net, x: F.conv2d(x, net.single, groups=8),
    "both": lambda net, x: F.group_norm(F.conv2d(x, net.kernel, groups=4), 8),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_numbers_of_blocks_in_the_code_leave_every_block_the_same_channels(name, ratio):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 5, 1)
            self.gain, self.kernel = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16, 4, 1, 1))
            self.single = nn.Parameter(torch.randn(16, 2, 1, 1))

        def forward(self, x):
            return self.b(BLOCKS[name](self, self.a(x).tanh()))

    torch.manual_seed(0)
    net, x = Net().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x[:1], ratio, score=graphprune.scores.random, return_plan=True)
    zero = graphprune.zeroed(net, plan)(x)[0] if "norm" in name or name in ("with a gain", "both") else emptied(net, plan)(x)
    assert small.a.out_channels < 16 and gap(small(x), zero) < 1e-8
    assert gap(small(x), net(x)) > 1e-3
