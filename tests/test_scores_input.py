"""What scores are given, and what they leave alone: bad input, the user's model and random state, memory, progress, seeds."""

import copy
import gc
import itertools
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scores import BATCHES, GROUPS, NET, X, Y
from torch import nn

import graphprune
from graphprune import errors, scores
from graphprune.coupling.groups import couple
from graphprune.scores import data
from graphprune.tracing.trace import trace

NAMES = list(scores.SCORES)
WITH_DATA = [name for name in NAMES if scores.SCORES[name].needs != "nothing"]
WITH_LOSS = [name for name in NAMES if scores.SCORES[name].needs == "loss"]
TWICE = ["entropy", "grasp"]
OTHERWISE = {"bn_scale": {"otherwise": "l2"}, "synaptic": {"otherwise": "l2"}}


def found(name, net=NET, batches=BATCHES, loss=F.cross_entropy, **options):
    return graphprune.score(GROUPS, net, name, batches, loss, **{**OTHERWISE.get(name, {}), **options})


@pytest.mark.parametrize("name", WITH_DATA)
def test_no_data(name):
    with pytest.raises(errors.NeedsBatches, match=f"'{name}' needs .*data.*give batches="):
        found(name, batches=None)
    with pytest.raises(errors.NeedsBatches, match="at least one batch; the iterable is empty"):
        found(name, batches=[])
    with pytest.raises(errors.NeedsBatches, match="iterable of batches"):
        found(name, batches=X)
    used = iter(BATCHES)
    list(used)
    with pytest.raises(errors.NeedsBatches, match="more than once" if name in TWICE else "at least one batch; the iterator is used up"):
        found(name, batches=used)


@pytest.mark.parametrize("name", WITH_LOSS)
def test_bad_losses(name):
    for loss, text in [
        (lambda output, labels: labels.double().mean(), "does not depend on the model"),
        (lambda output, labels: output.detach().mean(), "does not depend on the model"),
        (lambda output, labels: F.cross_entropy(output, labels, reduction="none").repeat(2), "must be one number, it has shape"),
        (lambda output, labels: output.sum() * torch.inf, "the loss is -?(inf|nan)"),
        (lambda output, labels: 1.0, "must be one number, it has type float"),
        (None, "needs a loss; give loss="),
        ("cross_entropy", "loss is 'cross_entropy'; give a function"),
    ]:
        with pytest.raises(errors.BadLoss, match=text):
            found(name, loss=loss)


def test_a_weight_that_is_not_finite_is_named():
    net = copy.deepcopy(NET)
    with torch.no_grad():
        net.b.weight[2, 0, 0, 0] = torch.nan
    with pytest.raises(
        errors.BadScore, match=r"'l2' is not finite for 1 of 6 units of group 0 \(a\..*\), first unit 0; these tensors are not finite: b.weight"
    ):
        graphprune.score(GROUPS, net, "l2")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", WITH_DATA)
def test_data_that_are_not_finite(name, value):
    """One pixel of the second batch; the message sends the reader to the data (a loss is checked before that)."""
    second = X[3:].clone()
    second[0, 0, 0, 0] = value
    with pytest.raises((errors.BadScore, errors.BadLoss), match="look at the (data|batch)"):
        found(name, batches=[BATCHES[0], (second, Y[3:])])


def test_custom_scores_of_the_wrong_form():
    before = {n: t.clone() for n, t in NET.state_dict().items()}
    for function, text in [
        (lambda groups, model, batches: [torch.zeros(2) for _ in groups], r"group 0 \(.*\) must be a tensor of shape \(6,\).*got \(2,\)"),
        (lambda groups, model, batches: [torch.zeros(g.size, 1) for g in groups], r"got \(6, 1\)"),
        (lambda groups, model, batches: [torch.zeros(g.size) for g in groups][:-1], "a list of 3 tensors, one for each group; got 2"),
        (lambda groups, model, batches: torch.zeros(3), "got a Tensor"),
        (lambda groups, model, batches: [[0.0] * g.size for g in groups], "got list"),
        (lambda groups, model, batches: [torch.full((g.size,), -torch.inf) for g in groups], "not finite for 6 of 6 units of group 0"),
    ]:
        with pytest.raises(errors.BadScore, match=text):
            graphprune.score(GROUPS, NET, function)
        with pytest.raises(errors.BadScore):
            graphprune.shrink(NET, X[:1], 0.5, criterion=function)
    assert all(torch.equal(t, before[n]) for n, t in NET.state_dict().items())
    fine = lambda groups, model, batches: [torch.arange(float(g.size)) for g in groups]  # noqa: E731
    assert graphprune.shrink(NET, X[:1], 0.5, criterion=fine).a.out_channels == 3


def test_names_and_options_that_are_not_there():
    with pytest.raises(errors.UnknownName, match="nearest (is|are) .*taylor"):
        found("tailor")
    with pytest.raises(errors.UnknownName, match="reduce"):
        found("l2", reduces="sum")
    with pytest.raises(errors.BadScore, match="otherwise"):
        graphprune.score(GROUPS, NET, "bn_scale")
    with pytest.raises(errors.UnknownName, match="criterion is 3"):
        graphprune.score(GROUPS, NET, 3)


def test_no_ratio_empties_a_layer():
    """A ratio of one is refused wherever it is given; just below, one unit of each group stays."""
    before = {n: t.clone() for n, t in NET.state_dict().items()}
    for bad in (1.0, 1.5, -0.1, float("nan"), True, "half", "50"):
        with pytest.raises(errors.BadRatio, match="0 <= ratio < 1|ratio"):
            graphprune.shrink(NET, X[:1], bad)
        with pytest.raises(errors.GraphpruneError):
            graphprune.shrink(NET, X[:1], 0.5, ratios={"a": bad})
    assert all(torch.equal(t, before[n]) for n, t in NET.state_dict().items())
    for scope in ("layer", "global", "isomorphic"):
        small = graphprune.shrink(NET, X[:1], 0.999, scope=scope)
        assert (small.a.out_channels, small.b.out_channels, small.c.out_features) == (1, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_user_changes(name):
    """Gradients, modes, requires_grad, buffers, weights and three random states are as they were."""
    net = copy.deepcopy(NET).train()
    net.nb.eval(), net.a.weight.requires_grad_(False)
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, float(number)) if number % 2 else None
    grads = [p.grad for p in net.parameters()]
    values = [g.clone() if g is not None else None for g in grads]
    held = {n: t.clone() for n, t in net.state_dict().items()}
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found(name, net=net)
    assert [id(p.grad) for p in net.parameters()] == [id(g) for g in grads]
    assert all(g is None or torch.equal(g, v) for g, v in zip(grads, values, strict=True))
    assert all(torch.equal(t, held[n]) for n, t in net.state_dict().items())
    assert (modes, flags) == ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])
    assert torch.equal(states[0], torch.get_rng_state()) and states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_the_user_is_left_alone_after_an_error_too():
    net, state = copy.deepcopy(NET).train(), torch.get_rng_state()
    calls = []

    def loss(output, labels):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the user's own")
        return F.cross_entropy(output, labels)

    for name in WITH_LOSS:
        calls.clear()
        with pytest.raises(errors.BadLoss, match="the user's own"):
            found(name, net=net, loss=loss)
        assert all(m.training for m in net.modules()) and all(p.grad is None and p.requires_grad for p in net.parameters())
        assert torch.equal(state, torch.get_rng_state())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_under_a_seed(name):
    torch.manual_seed(1)
    first = found(name, seed=5)
    torch.manual_seed(2)
    again, other = found(name, seed=5), found(name, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert drawn == (name in ("random", "obd", "effect"))


class Stream:
    """Batches made when asked for, that count how many of the earlier ones are still held, and all tensors that live."""

    def __init__(self, count):
        self.count, self.alive, self.tensors = count, [], []

    def __iter__(self):
        made = []
        gc.collect()
        gc.freeze()  # only what is made from here on is looked at
        for _ in range(self.count):
            gc.collect()
            self.alive.append(sum(ref() is not None for ref in made))
            self.tensors.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
            x = X[:2].clone()
            made.append(weakref.ref(x))
            yield x, Y[:2]
            del x
        gc.unfreeze()


@pytest.mark.parametrize("name", WITH_DATA)
def test_memory_does_not_grow_with_the_batches(name):
    stream = Stream(11)
    found(name, batches=stream)
    assert max(stream.alive) <= 1
    assert stream.tensors[10] <= stream.tensors[6]  # by then every buffer is there


def test_the_memory_test_sees_a_score_that_keeps_its_batches():
    stream = Stream(7)
    kept = list(stream)
    assert max(stream.alive) == 6 and stream.tensors[6] > stream.tensors[3] and len(kept) == 7


@pytest.mark.parametrize("name", [*WITH_DATA, "synflow"])
def test_long_work_shows_a_bar(name, monkeypatch):
    """After five seconds, under the score's name, where a terminal shows it; ``progress=False`` shows none."""
    shown = []

    def bar(items, **options):
        shown.append(options)
        return items

    monkeypatch.setattr(data, "tqdm", bar)
    found(name)
    assert shown and all(o == {"desc": name, "delay": 5, "leave": False, "disable": None} for o in shown)
    shown.clear()
    found(name, progress=False)
    assert shown and all(o["disable"] for o in shown)


def test_any_iterable_of_batches():
    """A generator, a loader, a list of tensors, of dictionaries: the same batches are the same scores."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=3)
    for name in ("apoz", "taylor", "obs"):
        expected = found(name)
        for batches in (loader, iter(loader), (batch for batch in BATCHES)):
            assert all(torch.equal(a, b) for a, b in zip(expected, found(name, batches=batches), strict=True))
    expected = found("apoz")
    for batches in ([x for x, _ in BATCHES], [{"x": x} for x, _ in BATCHES], [((x,), y) for x, y in BATCHES]):
        assert all(torch.equal(a, b) for a, b in zip(expected, found("apoz", batches=batches, loss=None), strict=True))


def test_a_loss_of_the_model_and_the_batch():
    def loss(model, batch):
        return F.cross_entropy(model(batch["image"]), batch["label"])

    batches = [{"image": x, "label": y} for x, y in BATCHES]
    for name in WITH_LOSS:
        options = {"curvature": "signs"} if name == "obd" else {}  # there are no labels to draw
        ours, theirs = found(name, **options), found(name, batches=batches, loss=loss, **options)
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_dropout_is_off():
    """Scores run in eval mode: a network with dropout scores as the one without, though it is in training mode."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)]
    net = nn.Sequential(*layers).double().train()
    groups = graphprune.couple(graphprune.trace(net, torch.zeros(1, 4).double()))
    batch = [(torch.randn(8, 4).double(), torch.zeros(8, dtype=torch.long))]
    mine = graphprune.score(groups, net, "taylor", batch, F.cross_entropy)[0]
    hidden = net[:2](batch[0][0])
    grad = torch.autograd.grad(F.cross_entropy(net[3](hidden), batch[0][1]), net[3].weight)[0]
    weight, bias = (torch.autograd.grad(F.cross_entropy(net[3](net[:2](batch[0][0])), batch[0][1]), p)[0] for p in net[0].parameters())
    joint = (grad * net[3].weight).sum(0) + (weight * net[0].weight).sum(1) + bias * net[0].bias
    assert torch.allclose(mine, joint.square(), rtol=1e-9)
    assert net.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranks_in_half_precision(dtype):
    net, x = copy.deepcopy(NET).to(dtype), X.to(dtype)
    for mine, wide in zip(found("hrank", net, [x], None), found("hrank", copy.deepcopy(net).float(), [x.float()], None), strict=True):
        assert torch.isfinite(mine).all() and (mine - wide).abs().max() <= 3


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_batch_without_samples(name):
    with pytest.raises(errors.NeedsBatches, match="without samples"):
        found(name, batches=[(X[:0], Y[:0])])


def test_a_function_of_ones_own_may_change_modes_and_random_numbers():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()

    def mine(groups, model, batches):
        model.train()
        return [torch.rand(group.size) for group in groups]

    state = torch.get_rng_state()
    assert graphprune.shrink(net, torch.zeros(1, 4), 0.5, criterion=mine)[0].out_features == 4
    assert not net.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "granularity, wrong, wanted",
    [
        ("channel", lambda groups: None, r"takes \(groups\), and is called as \(groups, model, batches\): too many positional"),
        ("block", lambda name: 0, r"takes \(name\), and is called as \(name, module\)"),
        ("weight", lambda weight, more: weight, r"takes \(weight, more\), and is called as \(weight\) .*: missing a required argument: 'more'"),
    ],
)
def test_a_criterion_of_another_signature(granularity, wrong, wanted):
    """It is told what is expected and what it has; a TypeError from inside a function of the right one stays as it is."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 2))
    with pytest.raises(errors.BadScore, match=wanted):
        graphprune.shrink(net, torch.zeros(1, 4), 0.5, granularity=granularity, criterion=wrong)
    with pytest.raises(TypeError, match="unsupported operand") as found:
        graphprune.shrink(net, torch.zeros(1, 4), 0.5, granularity=granularity, criterion=lambda *given: None + 1)
    assert not isinstance(found.value, errors.GraphpruneError)


class Folded(nn.Module):
    """Batch and tokens on one axis, in either order."""

    def __init__(self, outer):
        super().__init__()
        self.outer, self.a, self.b = outer, nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        batch, tokens = x.shape[:2]
        hidden = self.b(self.a((x if self.outer else x.transpose(0, 1)).flatten(0, 1)).relu())
        return (hidden.view(batch, tokens, 3) if self.outer else hidden.view(tokens, batch, 3).transpose(0, 1)).mean(1)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("name", ["taylor_gate", "mask_fisher", "group_fisher", "entropy", "hrank", "chip"])
def test_scores_of_samples_are_those_of_any_batches(name, outer):
    """A last batch of another size, and samples told apart by what they make alone, not by their gradients."""
    for seed in range(3):
        torch.manual_seed(seed)
        net, x, y = Folded(outer).double().eval(), torch.randn(13, 5, 6).double(), torch.randint(3, (13,))
        groups = couple(trace(net, x[:1]))
        cuts = [list(range(14)), [0, 13], [0, 8, 13]]
        batches = [[(x[a:b], y[a:b]) for a, b in itertools.pairwise(cut)] for cut in cuts]
        apart, *others = (graphprune.score(groups, net, name, one, nn.functional.cross_entropy, progress=False)[0] for one in batches)
        assert all(torch.allclose(apart, other, rtol=1e-9, atol=1e-12) for other in others)
        if name in ("entropy", "hrank", "chip"):
            graphprune.score(groups, net, name, [(torch.randn(8, n, 6).double(), y[:8]) for n in (5, 7)], nn.functional.cross_entropy, progress=False)


@pytest.mark.parametrize(
    ("batch", "loss", "error", "match"),
    [
        (torch.zeros(2, 7), None, errors.NeedsBatches, r"'taylor' does not fit the model: RuntimeError.*given \(2, 7\) float32;.*\(\(a, b\), labels\)"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2)), None, errors.NeedsBatches, r"TypeError.*positional arguments.*\(\(a, b\), labels\)"),
        ((torch.zeros(2, 4), torch.zeros(3).long()), F.cross_entropy, errors.BadLoss, r"the loss raised ValueError.*\(2, 3\) float32, \(3,\) int64"),
        ((torch.zeros(2, 4), None), lambda model, batch: model(batch[0]) + "1", errors.BadLoss, "the loss raised TypeError"),
    ],
)
def test_batches_and_losses_that_do_not_fit(batch, loss, error, match):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(error, match=match):
        graphprune.shrink(net, torch.zeros(1, 4), criterion="taylor", batches=[batch], loss=loss or F.cross_entropy)
