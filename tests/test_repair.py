"""Repairs equal slow references, never touch the original, and are no worse on calibration kept out of them."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.errors import BadCalibration, UnknownName
from graphprune.repair.fitting import Setting
from graphprune.repair.moments import moments
from graphprune.repair.pairs import mixes, pairs
from graphprune.repair.rows import outputs, read
from graphprune.repair.sequential import repair_weights
from graphprune.repair.sites import Site, norms, scales, sites
from graphprune.repair.solve import least_squares, means, residual, variances
from graphprune.repair.statistics import reestimate

F64 = torch.float64


class Residual(nn.Module):
    def __init__(self, width=12, bias=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, width, 3, stride=1, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.head(torch.relu(x).mean((2, 3)))


def trained(seed=0, **options):
    torch.manual_seed(seed)
    net = Residual(**options).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return net.eval()


def batches(count=4, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, dtype=F64, generator=generator) for _ in range(count)]


def distance(one, two, data):
    with torch.no_grad():
        return float(sum((one(x) - two(x)).square().sum() for x in data))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_least_squares_equals_the_stacked_system(inputs, outputs, blocks, intercept, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(blocks, 40, inputs, dtype=F64) + 3, torch.randn(blocks, 40, outputs, dtype=F64) - 2
    prior, ridge = torch.randn(blocks, outputs, inputs, dtype=F64), 1e-2
    data = moments(x[:, :7], y[:, :7]) + moments(x[:, 7:], y[:, 7:])
    weight, bias = least_squares(data, ridge, prior, intercept)
    for b in range(blocks):
        mean = x[b].mean(0) if intercept else torch.zeros(inputs, dtype=F64)
        gram = (x[b] - mean).T @ (x[b] - mean)
        root = (ridge * gram.diagonal().mean()).sqrt()
        ones = torch.ones(40, 1, dtype=F64) if intercept else torch.zeros(40, 0, dtype=F64)
        left = torch.cat([torch.cat([x[b], ones], 1), torch.cat([root * torch.eye(inputs, dtype=F64), torch.zeros(inputs, ones.shape[1], dtype=F64)], 1)])
        slow = torch.linalg.lstsq(left, torch.cat([y[b], root * prior[b].T])).solution
        assert torch.allclose(weight[b].T, slow[:inputs], atol=1e-8)
        assert torch.allclose(bias[b], slow[inputs:].sum(0) if intercept else torch.zeros(outputs, dtype=F64), atol=1e-8)
        direct = (y[b] - x[b] @ weight[b].T - bias[b]).square().mean(0)
        assert torch.allclose(residual(data, weight, bias)[b], direct, atol=1e-8)
        assert float(residual(data, weight + 0.1, bias)[b].sum()) > float(direct.sum()) or ridge > 0


def test_removing_and_refitting_is_the_surgeon_update():
    """The restricted fit equals ``W − W_S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S`` and its loss ``tr(W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ)``."""
    torch.manual_seed(0)
    x = torch.randn(1, 300, 9, dtype=F64) @ torch.randn(9, 9, dtype=F64)
    full = torch.randn(5, 9, dtype=F64)
    y = x @ full.T
    gone, stay = [2, 3, 7], [0, 1, 4, 5, 6, 8]
    data = moments(x, y)
    inverse = torch.linalg.inv(data.xx[0] / 300)
    ratio = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    slow = full - full[:, gone] @ ratio
    loss = torch.trace(full[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], full[:, gone].T))
    part = moments(x[:, :, stay], y)
    weight, bias = least_squares(part, 0.0)
    assert torch.allclose(weight[0], slow[:, stay], atol=1e-8)
    assert torch.allclose(residual(part, weight, bias).sum(), loss, atol=1e-8)
    assert not torch.allclose(weight[0], full[:, stay], atol=1e-3)


def test_means_and_variances_are_those_of_the_target():
    torch.manual_seed(0)
    x, y = torch.randn(2, 50, 3, dtype=F64), torch.randn(2, 50, 2, dtype=F64) * 3 + 1
    data = moments(x, y)
    weight, bias = variances(data, torch.randn(2, 2, 3, dtype=F64))
    found = x @ weight.transpose(1, 2) + bias[:, None]
    assert torch.allclose(found.mean(1), y.mean(1), atol=1e-10) and torch.allclose(found.var(1), y.var(1), atol=1e-10)
    assert torch.allclose((x @ weight.transpose(1, 2)).mean(1) + means(data, weight), y.mean(1), atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("stride, padding, dilation", [((1, 1), (1, 1), (1, 1)), ((2, 1), (0, 2), (1, 2))])
def test_rows_times_weight_is_the_convolution(groups, stride, padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, (3, 2), stride, padding, dilation, groups, bias=False).double()
    x = torch.randn(4, 6, 9, 8, dtype=F64)
    site = Site(0, "w", None, None, None, False, (list(stride), list(padding), list(dilation)), None, None)
    rows = read(site, x, (3, 2), None, groups)
    found = rows @ conv.weight.detach().flatten(1).reshape(groups, 12 // groups, -1).transpose(1, 2)
    wanted = conv(x).flatten(2).transpose(1, 2).reshape(-1, 12).reshape(-1, groups, 12 // groups).transpose(0, 1)
    assert torch.allclose(found, wanted, atol=1e-10)


@pytest.mark.parametrize(
    "stride, padding, dilation, more", [((1, 1), (1, 1), (1, 1), (0, 0)), ((2, 3), (0, 1), (1, 2), (1, 0)), ((2, 2), (1, 1), (1, 1), (1, 1))]
)
def test_rows_times_weight_is_the_transposed_convolution(stride, padding, dilation, more):
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(6, 5, (3, 2), stride, padding, more, bias=False, dilation=dilation).double()
    x = torch.randn(4, 6, 5, 4, dtype=F64)
    site = Site(0, "w", None, None, None, False, (list(stride), list(padding), list(dilation)), None, None, more=list(more))
    wanted = conv(x)
    assert outputs(site, tuple(x.shape), (3, 2)) == list(wanted.shape[2:])
    rows = read(site, x, (3, 2), None)
    assert torch.allclose(rows[0] @ site.by_output(conv.weight.detach()).flatten(1).T, wanted.flatten(2).transpose(1, 2).reshape(-1, 5), atol=1e-10)
    some = torch.tensor([0, 3, 7])
    assert torch.equal(read(site, x, (3, 2), some)[0], rows[0].reshape(4, -1, rows.shape[2])[:, some].flatten(0, 1))


class Upscaler(nn.Module):
    """Super resolution: what a transposed convolution alone reads."""

    def __init__(self, stride=2):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 3, stride + 2, stride, 1)

    def forward(self, x):
        return self.up(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_what_a_transposed_convolution_reads_is_scored_and_repaired(stride):
    torch.manual_seed(0)
    net, data, other = Upscaler(stride).double().eval(), batches(), batches(seed=5)
    small, plan = graphprune.shrink(net, data[0][:1], criterion="effect", batches=data, scope="global", macs=0.6, return_plan=True)
    better = graphprune.repair(small, net, plan, data, "least-squares")
    assert any(one.where == "up.weight" and one.kept and one.after < 0.9 * one.before for one in better.graphprune_repairs)
    assert distance(better, net, other) < 0.6 * distance(small, net, other)


def test_batch_norm_statistics_are_the_two_pass_ones():
    net, data = trained(), batches()
    graph = graphprune.trace(net, data[0][:1])
    found = copy.deepcopy(net)
    assert reestimate(found, graph, data) == len(norms(graph)) == 2
    x = torch.relu(net.stem(torch.cat(data)))
    for conv, norm, new in ((net.conv1, net.bn1, found.bn1), (net.conv2, net.bn2, found.bn2)):
        y = conv(x)
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))
        assert torch.allclose(new.running_mean, mean, atol=1e-8) and torch.allclose(new.running_var, var, atol=1e-8)
        assert not torch.allclose(new.running_mean, norm.running_mean, atol=1e-2)
        x = torch.relu((y - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None] * norm.weight[:, None, None] + norm.bias[:, None, None])
    again = copy.deepcopy(net)
    reestimate(again, graph, data, waiting=0.0)
    assert torch.equal(again.bn2.running_var, found.bn2.running_var)


@pytest.mark.parametrize("bias", [False, True])
def test_duplicated_channels_are_lossless(bias):
    """Half of the channels repeat the other half; whichever goes, the fit gives its weight to its twin."""
    net = trained(bias=bias)
    with torch.no_grad():
        for tensor in (net.conv1.weight, net.bn1.weight, net.bn1.bias, net.bn1.running_mean, net.bn1.running_var, *([net.conv1.bias] if bias else [])):
            tensor[6:] = tensor[:6]
    keep_first = lambda groups, model, batches: [torch.arange(g.size, 0, -1.0) for g in groups]  # noqa: E731
    small, plan = graphprune.shrink(net, batches()[0][:1], criterion=keep_first, keep=["stem", "head", "bn2"], return_plan=True)
    assert small.conv1.out_channels == 6
    better = graphprune.repair(small, net, plan, batches())
    fresh = batches(seed=5)
    assert distance(better, net, fresh) < 1e-6 * distance(small, net, fresh)


def test_the_order_of_runs_does_not_matter_and_nothing_else_changes():
    net, data = trained(), batches()
    net.train()
    before = copy.deepcopy(net.state_dict())
    small, plan = graphprune.shrink(net, data[0][:1], return_plan=True, keep=["stem", "bn2"])
    one, two, three = (copy.deepcopy(small).eval() for _ in range(3))
    graph = graphprune.trace(net, data[0][:1])
    random = torch.get_rng_state()
    net.eval()
    ways = ((one, 1.0), (two, 0.0), (three, 0.9))  # all runs wait, none, those behind the largest activations
    reports = [repair_weights(net, m, graph, plan, data[:3], data[3:], Setting(("least-squares",), waiting=w), False) for m, w in ways]
    assert reports[0] == reports[1] == reports[2]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*(m.state_dict().values() for m in (one, two, three)), strict=True))
    net.train()
    cut = copy.deepcopy(small.state_dict())
    better = graphprune.repair(small, net, plan, data)
    assert all(torch.equal(a, before[n]) for n, a in net.state_dict().items()) and all(torch.equal(a, cut[n]) for n, a in small.state_dict().items())
    assert net.training and better.training == small.training and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters()) and not net._forward_hooks and not net._forward_pre_hooks


def test_a_repair_helps_and_no_step_is_worse_where_it_was_not_fitted():
    net, data, fresh = trained(), batches(6), batches(seed=9)
    small, plan = graphprune.shrink(net, data[0][:1], return_plan=True, keep=["stem", "bn2"])
    cut = distance(small, net, fresh)
    for steps in ("auto", ["bias"], ["variance"], ["bias", "least-squares"], ["bn"]):
        better = graphprune.repair(small, net, plan, data, steps)
        done = [r for r in better.graphprune_repairs if r.step != "left"]
        assert done and all(r.after <= r.before for r in done if r.kept)
        if steps == "auto":
            assert distance(better, net, fresh) < 0.5 * cut
    assert str(done[0]) in better.graphprune_plan.explain()


def test_fits_on_the_repaired_prefix_beat_fits_on_the_originals():
    """Two layers cut: the second fit has to see what the first one left."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    data, fresh = [torch.randn(64, 6, dtype=F64) for _ in range(4)], [torch.randn(256, 6, dtype=F64)]
    small, plan = graphprune.shrink(net, data[0][:1], return_plan=True)
    better = graphprune.repair(small, net, plan, data)
    alone = copy.deepcopy(small)
    x = y = torch.cat(data)
    kept = {name: torch.tensor(plan.cuts[name][1]) for name in ("2.weight", "4.weight")}
    with torch.no_grad():
        for layer in (0, 2, 4):
            y = net[layer](x)
            if layer:
                rows = plan.cuts.get(f"{layer}.weight", {}).get(0)
                target = y if rows is None else y[:, torch.tensor(rows)]
                weight, bias = least_squares(moments(x[None, :, kept[f"{layer}.weight"]], target[None]))
                alone[layer].weight.copy_(weight[0])
                alone[layer].bias.copy_(bias[0])
            x = torch.tanh(y)
    assert distance(better, net, fresh) < distance(alone, net, fresh) < distance(small, net, fresh)


def test_save_and_load_keep_what_was_repaired(tmp_path):
    net, data = trained(), batches()
    small = graphprune.shrink(net, data[0][:1], calibration=data, keep=["stem", "bn2"])
    assert any(line.startswith("repair least-squares") for line in small.graphprune_plan.lines)
    back = graphprune.load(graphprune.save(small, tmp_path / "m"), trained(seed=4))
    assert distance(back.eval(), small.eval(), data) == 0
    place = copy.deepcopy(net)
    assert graphprune.shrink(place, data[0][:1], calibration=data, keep=["stem", "bn2"], inplace=True) is place
    assert distance(place, small, data) == 0


def test_one_batch_is_parted_and_labels_are_ignored():
    net, data = trained(), torch.cat(batches())
    small, plan = graphprune.shrink(net, data[:1], return_plan=True, keep=["stem", "bn2"])
    better = graphprune.repair(small, net, plan, [(data, torch.zeros(len(data)))])
    assert distance(better, net, [data]) < distance(small, net, [data])


def test_shared_and_computed_weights_are_left_with_a_reason():
    torch.manual_seed(0)
    twice = nn.Linear(8, 8)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), twice, nn.ReLU(), twice, nn.Linear(8, 2))
    places, left = sites(graphprune.trace(net, torch.zeros(1, 4)))
    assert [site.weight for site in places] == ["0.weight", "5.weight"] and left == {"2.weight": "used more than once"}


@pytest.mark.parametrize(
    "calibration, says",
    [
        ([], "empty"),
        (None, "iterable"),
        ([torch.full((8, 4), float("nan"), dtype=F64)], "batch 0"),
        ([torch.zeros(8, 4, dtype=F64)], "same input everywhere at 2.weight"),
        ([torch.randn(8, 5, dtype=F64)], "does not fit"),
    ],
)
def test_bad_calibration_says_what_and_where(calibration, says):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    small, plan = graphprune.shrink(net, torch.randn(1, 4, dtype=F64), return_plan=True)
    with pytest.raises(BadCalibration, match=says):
        graphprune.repair(small, net, plan, calibration)


def test_what_is_not_finite_inside_is_found():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    nn.init.constant_(net[0].weight, 1.0)
    small, plan = graphprune.shrink(net, torch.randn(1, 4, dtype=F64), return_plan=True)
    with pytest.raises(BadCalibration, match="not finite at 0.weight"):
        graphprune.repair(small, net, plan, [torch.linspace(1.0, 1.7, 8, dtype=F64)[:, None].expand(8, 4) * 1e308])


def test_few_rows_warn_and_unknown_steps_are_named():
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    small, plan = graphprune.shrink(net, torch.randn(1, 4, dtype=F64), return_plan=True)
    with pytest.warns(UserWarning, match="2.weight: 12 calibration rows for 20 inputs") as told:
        better = graphprune.repair(small, net, plan, [torch.randn(16, 4, dtype=F64)])
        graphprune.shrink(net, torch.randn(1, 4, dtype=F64), repair=[torch.randn(16, 4, dtype=F64)])
    assert [warning.filename for warning in told] == [__file__] * 2  # at the line that called, however deep it was found
    assert all(bool(torch.isfinite(p).all()) for p in better.parameters())
    with pytest.raises(UnknownName, match="least-squares"):
        graphprune.repair(small, net, plan, [torch.randn(16, 4)], ["magic"])
    with pytest.raises(BadCalibration, match="needs calibration"):
        graphprune.shrink(net, torch.randn(1, 4, dtype=F64), repair=["bn"])


@pytest.mark.parametrize("depth", [2, 5, 12])
def test_little_calibration_is_one_warning_however_many_layers(depth):
    net = nn.Sequential(nn.Linear(4, 40), *(each for _ in range(depth) for each in (nn.ReLU(), nn.Linear(40, 40))), nn.ReLU(), nn.Linear(40, 3)).double()
    for call in (
        lambda: graphprune.shrink(net, torch.randn(1, 4, dtype=F64), repair=graphprune.Repair([torch.randn(16, 4, dtype=F64)], "least-squares")),
        lambda: graphprune.repair(*_cut(net), [torch.randn(16, 4, dtype=F64)]),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        texts = [str(warning.message) for warning in caught if "calibration rows" in str(warning.message)]
        assert len(texts) == 1 and f"and {depth} more weights" in texts[0]
    with warnings.catch_warnings(record=True) as caught:  # the control: enough of it
        warnings.simplefilter("always")
        graphprune.shrink(net, torch.randn(1, 4, dtype=F64), repair=graphprune.Repair([torch.randn(256, 4, dtype=F64)], "least-squares"))
    assert not [warning for warning in caught if "calibration rows" in str(warning.message)]


def _cut(net):
    small, plan = graphprune.shrink(net, torch.randn(1, 4, dtype=F64), return_plan=True)
    return small, net, plan


def test_of_two_equal_channels_one_costs_nothing_at_the_output():
    net = trained()
    with torch.no_grad():
        for tensor in (net.conv1.weight, net.bn1.weight, net.bn1.bias, net.bn1.running_mean, net.bn1.running_var):
            tensor[7] = tensor[2]
    groups = graphprune.couple(graphprune.trace(net, batches()[0][:1]), tuple((name, None) for name in ("stem.weight", "bn2.weight")))
    (scores,) = (s for g, s in zip(groups, graphprune.score(groups, net, "effect", batches(), progress=False), strict=True) if g.size == 12)
    first, last = sorted(scores[[2, 7]].tolist())
    assert first < 1e-2 * last
    with torch.no_grad():
        net.conv1.weight[7].normal_(0, 0.2)  # no longer equal: now both cost something
    (scores,) = (s for g, s in zip(groups, graphprune.score(groups, net, "effect", batches(), progress=False), strict=True) if g.size == 12)
    assert float(scores[[2, 7]].min()) > 1e2 * first
    assert all(p.grad is None for p in net.parameters())


def test_effect_in_several_passes_is_effect_in_one(monkeypatch):
    module = importlib.import_module("graphprune.repair.effect")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    data = [torch.randn(64, 6, dtype=F64) for _ in range(4)]
    groups = graphprune.couple(graphprune.trace(net, data[0][:1]))
    whole = graphprune.score(groups, net, "effect", data, progress=False)
    passes, observe = [], module._observe
    monkeypatch.setattr(module, "MEMORY", 1)
    monkeypatch.setattr(module, "_observe", lambda *args: passes.append(1) or observe(*args))
    parts = graphprune.score(groups, net, "effect", data, progress=False)
    assert len(passes) == len(groups) == 2
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_effect_equals_refits_of_every_candidate():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(64, 4, dtype=F64)
    groups = graphprune.couple(graphprune.trace(net, x[:1]))
    (found,) = graphprune.score(groups, net, "effect", [x], progress=False, per="unit")
    torch.manual_seed(0)
    project = torch.randn(64, 3, dtype=F64, generator=torch.Generator().manual_seed(int(torch.randint(2**31, ()))))
    project -= project.mean(1, keepdim=True)
    with torch.no_grad():
        weight, hidden = net[2].weight.detach(), net[1](net[0](x))
    cov = torch.cov(hidden.T, correction=0)
    cov = cov + 1e-4 * cov.diagonal().mean() * torch.eye(6, dtype=F64)

    def loss(stay):
        """The least ``tr(B (W − W') H (W − W')ᵀ)`` when only some columns of W' are not zero."""
        rest = cov - cov[:, stay] @ torch.linalg.solve(cov[stay][:, stay], cov[stay]) if stay else cov
        return float((project.T @ project / 64 @ weight @ rest @ weight.T).trace())

    stay, before, slow = list(range(6)), 0.0, torch.zeros(6, dtype=F64)
    floor = 0.0
    while stay:
        gone = min(stay, key=lambda c: loss([s for s in stay if s != c]))
        stay.remove(gone)
        floor = max(floor, loss(stay) - before)
        slow[gone], before = floor, loss(stay)
    assert torch.allclose(found, slow, rtol=1e-6, atol=1e-12)
    assert not torch.allclose(found, slow.roll(1), rtol=1e-2)


class Attention(nn.Module):
    """One head over a few positions, its keys nearly of half the rank."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(*shape) for shape in ((12, 16), (12, 16), (12, 16), (16, 12)))

    def forward(self, x):
        logits = self.q(x) @ self.k(x).transpose(1, 2) * 0.25
        return self.o(logits.softmax(-1) @ self.v(x))


def attention():
    torch.manual_seed(0)
    net = Attention().double().eval()
    with torch.no_grad():
        net.q.weight *= 4
        net.k.weight *= 3
        net.k.weight[8:] = net.k.weight[:8] + 0.1 * torch.randn(8, 12)
    return net, [torch.randn(16, 10, 12, dtype=F64) for _ in range(8)]


def test_a_query_says_with_the_kept_keys_what_it_said_with_all():
    net, data = attention()
    small, plan = graphprune.shrink(net, data[0][:1], keep=["v", "o"], return_plan=True)
    assert plan.cuts.keys() == {"q.weight", "q.bias", "k.weight", "k.bias"}
    graph = graphprune.trace(net, data[0][:1])
    places = sites(graph)[0]
    assert [(query.weight, key.weight) for query, key, _, _ in pairs(graph, places)] == [("q.weight", "k.weight")]
    mix = mixes(net, graph, plan, places, data, ridge=0.0)["q.weight"]
    with torch.no_grad():
        queries, keys = (layer(torch.cat(data)).flatten(0, 1) for layer in (net.q, net.k))
    kept = torch.tensor(plan.cuts["k.weight"][0])
    slow = torch.linalg.lstsq(keys[:, kept] - keys[:, kept].mean(0), keys - keys.mean(0)).solution  # (kept, all)
    assert torch.allclose(mix, slow.T, atol=1e-8)
    logits = lambda q, k: (q @ k.T) - (q @ k.T).mean(1, keepdim=True)  # noqa: E731
    wanted = logits(queries[:200], keys[:200])
    gaps = [float((wanted - logits(q, keys[:200, kept])).square().mean()) for q in (queries[:200] @ mix, queries[:200, kept])]
    assert gaps[0] < 0.5 * gaps[1]
    better, fresh = graphprune.repair(small, net, plan, data[:6]), data[6:]
    assert distance(better, net, fresh) < 0.6 * distance(small, net, fresh)
    assert not [r for r in better.graphprune_repairs if r.step == "left"]


class Heads(nn.Module):
    """Four heads of four channels, of which two say nearly nothing."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_heads_that_are_gone_ask_nothing():
    torch.manual_seed(0)
    net, data = Heads().double().eval(), [torch.randn(8, 6, 16, dtype=F64) for _ in range(4)]
    with torch.no_grad():
        net.o.weight[:, 8:] *= 0.1
    small, plan = graphprune.shrink(net, data[0][:1], 0.5, granularity="head", return_plan=True)
    assert all(len(plan.cuts[f"{name}.weight"][0]) == 8 for name in "qkv")
    better = graphprune.repair(small, net, plan, data)
    fresh = [torch.randn(8, 6, 16, dtype=F64)]
    assert distance(better, net, fresh) < 0.8 * distance(small, net, fresh)


def test_a_rewritten_module_is_repaired():
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(256, 32), nn.Linear(32, 5)

        def forward(self, x):
            x = nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), 4)
            return self.two(torch.relu(self.one(x.view(-1, 16 * 4 * 4))))

    torch.manual_seed(0)
    net, data, fresh = Literal().double().eval(), batches(6, 64), batches(2, 64, seed=5)
    small, plan = graphprune.shrink(net, data[0][:1], 0.4, return_plan=True)
    assert isinstance(small, Literal) and "conv.weight" in plan.cuts
    better = graphprune.repair(small, net, plan, data)
    assert isinstance(better, Literal)
    assert distance(better, net, fresh) < 0.5 * distance(small, net, fresh)


class Stream(nn.Module):
    """A stream read by a norm whose reader is shared, so that no weight behind the norm can be fitted."""

    def __init__(self, spelled):
        super().__init__()
        self.spelled = spelled
        self.table, self.layer = nn.Linear(16, 6, bias=False), nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        x = self.layer(x)
        x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.norm.weight if self.spelled else self.norm(x)
        return self.table(x) + 0.1 * self.table(x.square())


@pytest.mark.parametrize("spelled", [False, True])
def test_scales_behind_a_cut_stream_are_the_least_squares_ones(spelled):
    torch.manual_seed(0)
    net, data = Stream(spelled).double().eval(), [torch.randn(32, 6, dtype=F64) for _ in range(4)]
    nn.init.uniform_(net.norm.weight, 0.5, 2)
    small, plan = graphprune.shrink(net, data[0][:1], 0.5, return_plan=True)
    (scale,) = scales(graphprune.trace(net, data[0][:1]))
    assert (scale.weight, scale.bias, scale.norm) == ("norm.weight", None if spelled else "norm.bias", "" if spelled else "layer_norm")
    better = graphprune.repair(small, net, plan, data, spare=0.0)
    kept = torch.tensor(plan.cuts["norm.weight"][0])
    with torch.no_grad():
        x, y = better.layer(torch.cat(data)), net.layer(torch.cat(data))
        if spelled:
            x, y = (t * (t.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for t in (x, y))
        else:
            x, y = nn.functional.layer_norm(x, (8,)), nn.functional.layer_norm(y, (16,))
        y = y[:, kept] * net.norm.weight[kept] + (0 if spelled else net.norm.bias[kept])
    for c in range(8):
        left = torch.stack([x[:, c]] if spelled else [x[:, c], torch.ones(len(x), dtype=F64)], 1)
        slow = torch.linalg.lstsq(left, y[:, c]).solution
        assert torch.allclose(better.norm.weight[c], slow[0], atol=1e-8)
        assert spelled or torch.allclose(better.norm.bias[c], slow[1], atol=1e-8)
    assert not torch.allclose(better.norm.weight, small.norm.weight, atol=1e-3)
    (done,) = (r for r in better.graphprune_repairs if r.step == "scale")
    assert done.kept and done.after < done.before


def test_constant_and_dead_channels_leave_the_fits_finite_and_exact():
    """A constant channel goes to the intercept, whether it was kept or cut."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        net[0].weight[4:] = 0
        net[0].bias[4:6], net[0].bias[6:] = 1.5, -1.0  # constant, and dead
    data, keep_last = [torch.randn(64, 4, dtype=F64) for _ in range(4)], lambda groups, model, batches: [torch.tensor([8.0, 7, 6, 5, 4, 1, 2, 3])]
    small, plan = graphprune.shrink(net, data[0][:1], 0.25, criterion=keep_last, return_plan=True)
    assert plan.cuts["0.weight"][0] == [0, 1, 2, 3, 4, 7]
    for steps in ("auto", "data-free"):
        better = graphprune.repair(small, net, plan, data, steps, graph=graphprune.trace(net, data[0][:1]))
        assert all(bool(torch.isfinite(p).all()) for p in better.parameters())
        assert distance(better, net, data) < 1e-12 < distance(small, net, data)


def test_few_samples_do_not_make_units_look_free():
    """Of 12 samples any of 64 units follows from the others; a score that believed it would cut nearly all of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).double()
    groups = graphprune.couple(graphprune.trace(net, torch.zeros(1, 32, dtype=F64)))
    few, many = (graphprune.score(groups, net, "effect", [torch.randn(n, 32, dtype=F64)], progress=False)[0].sort().values for n in (12, 4000))
    assert float(few[:32].sum() / few.sum()) > 0.3 * float(many[:32].sum() / many.sum())
    blind = sys.modules["graphprune.repair.effect"]
    old, blind.ENOUGH = blind.ENOUGH, 1e9
    try:
        wrong = graphprune.score(groups, net, "effect", [torch.randn(12, 32, dtype=F64)], progress=False)[0].sort().values
    finally:
        blind.ENOUGH = old
    assert float(wrong[:32].sum() / wrong.sum()) < 0.03 * float(many[:32].sum() / many.sum())


class Norms(nn.Module):
    """As classifiers of images are: convolutions with batch norms, a pooling over all positions, a linear head."""

    def __init__(self):
        super().__init__()
        self.a, self.m, self.b, self.n, self.head = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x):
        assert x.shape[-1] == 8, "images of 8 pixels"
        return self.head(self.n(self.b(self.m(self.a(x)).relu())).relu().mean((2, 3)))


def normed():
    torch.manual_seed(0)
    net = Norms()
    for _ in range(20):
        net(torch.randn(32, 1, 8, 8) * (1 + torch.rand(32, 1, 1, 1)))
    return net.eval()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.filterwarnings("ignore:.*calibration")
def test_a_handful_of_samples_does_no_harm(count):
    """Where the part kept out has one row, its error is told in the spread of all rows; where the fit has one, the weight is left, with the reason."""
    net, x = normed(), torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    small = graphprune.shrink(net, x[:1], macs=0.4)
    better = graphprune.repair(small, net, None, [x[:count]], progress=False)
    lines = [str(one) for one in better.graphprune_repairs]
    assert not any("inf" in line or "nan" in line or len(line) > 120 for line in lines)
    assert any("head.weight: one calibration row" in line for line in lines) == (count < 3)
    with torch.no_grad():
        far = [float((model(x) - net(x)).square().mean()) for model in (small, better)]
    assert far[1] < 1.05 * far[0]


@pytest.mark.parametrize(
    "calibration, says",
    [
        ([torch.zeros(1, 8, 8)], r"does not fit the model: ValueError: .*it was given \(1, 8, 8\) float32"),
        ([torch.zeros(2, 1, 9, 9)], "does not fit the model: AssertionError: images of 8"),
        ([torch.randn(4, 1, 8, 8), torch.randn(4, 1, 9, 9)], "does not fit the model: AssertionError: images of 8"),
        ([(torch.randn(4, 1, 8, 8), torch.zeros(4), torch.zeros(4))], "longer tuples and dicts go to forward as they are"),
        (torch.zeros(2, 1, 8, 8), r"it is a Tensor: write repair=\[batch\]"),
        ([], "calibration is empty"),
    ],
)
def test_calibration_that_does_not_fit_is_said_before_anything_costs_time(monkeypatch, calibration, says):
    net, x = normed(), torch.zeros(1, 1, 8, 8)
    if len(calibration) < 2 or isinstance(calibration, torch.Tensor):
        monkeypatch.setattr(importlib.import_module("graphprune.shrink"), "decided", lambda *_: pytest.fail("the widths were looked for first"))
    with pytest.raises(BadCalibration, match=says):
        graphprune.shrink(net, x, calibration=calibration)


def test_steps_are_looked_at_before_anything_costs_time(monkeypatch):
    monkeypatch.setattr(importlib.import_module("graphprune.shrink"), "decided", lambda *_: pytest.fail("the widths were looked for first"))
    net, x = normed(), torch.randn(8, 1, 8, 8)
    for steps, says in (("bm", "no repair named 'bm'"), (True, "no name of a repair"), (("none", "bn"), "'none' stands alone")):
        with pytest.raises(UnknownName, match=says):
            graphprune.shrink(net, x[:1], calibration=[x], repair=steps)
    with pytest.raises(BadCalibration, match="take 'mimic'"):
        graphprune.shrink(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1)), x[:1], calibration=[x], repair="distill")


def test_what_a_step_named_by_itself_finds_nothing_to_do_for_is_said():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 4)).eval(), torch.randn(64, 1, 8, 8)
    for steps, idle in (("bn", ["bn"]), (("auto", "censored"), ["censored"]), ("auto", []), ("bias", [])):
        lines = graphprune.shrink(net, x[:1], calibration=[x], repair=steps, return_plan=True)[1].lines
        assert [line for line in lines if "nothing for it to do" in line] == [f"repair {name}: the model has nothing for it to do" for name in idle]
    assert torch.equal(graphprune.shrink(net, x[:1], calibration=[x], repair=None)[3].bias, net[3].bias)
