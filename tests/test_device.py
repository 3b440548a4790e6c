"""On another device everything is what it is on the processor: plans, scores, repairs, and what a cut model computes. A GPU, or one that is pretended."""

import copy
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch

if torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    DEVICE = pytest.importorskip("pretended", exc_type=ImportError).DEVICE
from networks import Attention, Flat, Grouped, Normed, Recurrent, Residual, Squeeze
from test_scores import BATCHES, NET, spread
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.repair import imitation
from graphprune.scores.data import brought

F64 = torch.float64
GPU = DEVICE.type == "cuda"  # the pretended one has no autocast, no clock and no memory that safetensors could read


@pytest.fixture
def few_passes(monkeypatch):
    """Gradient steps are the same ones in each pass; the pretended device takes a second for a few."""
    if not GPU:
        monkeypatch.setattr(imitation, "PASSES", 6)
        monkeypatch.setattr(imitation, "TRIAL", 1)


def there(value):
    """The same on the device: tensors in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {key: there(held) for key, held in value.items()}
    return type(value)(map(there, value)) if isinstance(value, (tuple, list)) else value


def moved(model):
    return copy.deepcopy(model).to(DEVICE)


@torch.no_grad()
def far(small, original):
    """Mean squared distance of the outputs."""
    like = next(original.parameters())
    x = SHOWN[0].to(like.device, like.dtype)
    return float((small(x) - original(x)).square().mean())


def near(one, two, tolerance=1e-8):
    one, two = one.detach().cpu().double(), two.detach().cpu().double()
    assert one.shape == two.shape and (one - two).abs().max() <= tolerance * max(1.0, float(two.abs().max())), float((one - two).abs().max())


def made(*blocks, seed=0):
    torch.manual_seed(seed)
    return spread(nn.Sequential(*blocks))


NETWORKS = {
    "convolutions": lambda: made(nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), Residual(12, 8), Squeeze(12, 6), Grouped(12, 8), Flat(12)),
    "attention": lambda: made(nn.Conv2d(2, 12, 3, padding=1), Attention(12, 8), Normed(12, 8), Flat(12)),
}
if GPU:  # cells are calls of a device's own, which the pretended one does not have
    NETWORKS["recurrent"] = lambda: made(nn.Conv2d(2, 12, 3, padding=1), Recurrent(12, 8), Flat(12))
X = torch.randn(4, 2, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
SHOWN = [torch.randn(48, 2, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(at)) for at in range(1, 7)]


def zeros(model, plan, x):
    """What the original computes with the removed entries at zero."""
    return graphprune.zeroed(model, plan)(x)[0]


def devices(model):
    return {tensor.device.type for tensor in model.state_dict().values()}


def deep():
    """Blocks of which any can go."""
    return made(nn.Conv2d(2, 8, 3, padding=1), *(Residual(8, 6) for _ in range(4)), Flat(8))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"granularity": "group"}, {"scope": "global", "criterion": "lamp"}, {"ratio": None, "macs": 0.6, "scope": "optimal"}])
def test_the_same_is_cut_and_computed(name, options):
    net = NETWORKS[name]()
    asked = {"ratio": 0.5, "return_plan": True, **options}
    here, plan = graphprune.shrink(net, X[:1], **asked)
    small, mine = graphprune.shrink(moved(net), there(X[:1]), **asked)
    assert (mine.cuts, mine.parts) == (plan.cuts, plan.parts) and (plan.cuts or plan.parts) and devices(small) == {DEVICE.type}
    near(small(there(X)), zeros(moved(net), mine, there(X)))
    near(small(there(X)), here(X), 1e-6)
    assert (small(there(X)) - there(net(X))).abs().max() > 1e-3  # the control: something was cut


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_precision(dtype):
    net = moved(NETWORKS["convolutions"]()).to(dtype)
    small, plan = graphprune.shrink(net, there(X[:1]).to(dtype), 0.5, return_plan=True)
    wanted = zeros(net, plan, there(X).to(dtype))
    near(small(there(X).to(dtype)), wanted, {torch.float16: 3e-2, torch.bfloat16: 2e-1, torch.float32: 2e-2}[dtype])


@pytest.mark.parametrize("name", sorted(graphprune.available()["score"]))
def test_scores_are_equal(name, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.randn(like.shape, dtype=like.dtype).to(like.device))  # the generator of the processor
    if name in ("influence", "reconstruction"):
        asked = {"ratio": 0.5, "granularity": "block", "criterion": name, "return_plan": True}
        here = graphprune.shrink(deep(), X[:1], batches=SHOWN, **asked)[1]
        mine = graphprune.shrink(moved(deep()), there(X[:1]), batches=there(SHOWN), **asked)[1]
        assert mine.parts == here.parts and here.parts
        return
    net, shown = NET, BATCHES
    how = getattr(graphprune.scores, name).with_(otherwise="l2") if name in ("bn_scale", "synaptic") else name
    here = graphprune.score(graphprune.couple(graphprune.trace(net, shown[0][0][:1])), net, how, shown, F.cross_entropy)
    other = moved(net)
    before = torch.cuda.get_rng_state() if GPU else None
    groups = graphprune.couple(graphprune.trace(other, there(shown[0][0][:1])))
    mine = graphprune.score(groups, other, how, there(shown), F.cross_entropy)
    assert before is None or torch.equal(torch.cuda.get_rng_state(), before)
    for one, two in zip(mine, here, strict=True):
        near(torch.as_tensor(one), torch.as_tensor(two), 1e-6)


@pytest.mark.skipif(not GPU, reason="recurrent kernels without a gradient in evaluation mode are a GPU's")
@pytest.mark.parametrize("name", ["taylor", "fisher", "obd", "effect", "taylor_gate"])
def test_scores_with_gradients_of_recurrent_layers(name):
    net = moved(NETWORKS["recurrent"]())
    criterion = getattr(graphprune.scores, name)
    criterion = criterion.with_(otherwise="l2") if name == "effect" else criterion
    batches = [(x, torch.arange(len(x)) % 3) for x in SHOWN]
    assert graphprune.shrink(net, there(X[:1]), 0.5, criterion=criterion, batches=batches, loss=F.cross_entropy)[1].a.hidden_size == 4


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("steps", ["auto", "data-free", "variance", "bias", "bn", "censored", "distill", "mimic", ("auto", "mimic")])
def test_repairs_are_equal(name, steps, few_passes):
    net = NETWORKS[name]()
    small, plan = graphprune.shrink(net, X[:1], 0.5, return_plan=True)
    graph = graphprune.trace(net, X[:1]) if steps == "data-free" else None
    here = graphprune.repair(small, net, plan, SHOWN, steps, graph=graph, progress=False)
    there_net = moved(net)
    graph = graphprune.trace(there_net, there(X[:1])) if steps == "data-free" else None
    mine = graphprune.repair(moved(small), there_net, plan, there(SHOWN), steps, graph=graph, progress=False)
    assert devices(mine) == {DEVICE.type}
    learnt = bool({"distill", "mimic"} & {steps, *steps})  # Adam divides rounding by rounding
    if learnt:
        assert far(mine, moved(net)) <= 1.2 * far(here, net) + 1e-12 and far(mine, moved(net)) <= 1.01 * far(moved(small), moved(net))
    else:
        near(mine(there(X)), here(X), 1e-5)


def test_calibration_is_taken_in_shrink_and_reported(few_passes):
    net = moved(NETWORKS["convolutions"]()).float()
    shown = [there(x).float() for x in SHOWN]
    small = graphprune.shrink(net, shown[0][:1], 0.5, calibration=shown, repair=("auto", "mimic"), criterion="effect", batches=shown)
    plain = graphprune.shrink(net, shown[0][:1], 0.5, criterion="effect", batches=shown)
    assert far(small, net) < far(plain, net)


def test_batches_on_the_processor_are_brought_to_the_model():
    """As loaders hand them over."""
    net, options = moved(NET), {"criterion": "taylor", "loss": F.cross_entropy, "return_plan": True}
    plans = [graphprune.shrink(net, there(BATCHES[0][0][:1]), batches=given, **options)[1].cuts for given in (BATCHES, there(BATCHES))]
    assert plans[0] == plans[1]
    net = moved(NETWORKS["convolutions"]())
    near(*(graphprune.shrink(net, there(X[:1]), 0.5, calibration=given)(there(X)) for given in (SHOWN, there(SHOWN))), 1e-12)
    names = [{"input": x} for x in SHOWN]
    blocks = [graphprune.shrink(moved(deep()), there(X[:1]), 0.5, granularity="block", criterion="influence", batches=given) for given in (names, there(names))]
    near(blocks[0](there(X)), blocks[1](there(X)), 1e-12)


def test_what_its_user_has_placed_stays_there_and_lengths_stay_on_the_processor():
    net, x, lengths = moved(NET), torch.zeros(2, 3), torch.tensor([2, 1])
    placed = {"x": there(x), "lengths": lengths}
    assert brought(placed, net) is placed
    packed = brought([nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)]), "name"], net)
    assert (packed[0].data.device.type, packed[0].batch_sizes.device.type, packed[1]) == (DEVICE.type, "cpu", "name")
    given = OrderedDict(x=x)
    taken = brought((given, lengths), net)
    assert taken[0]["x"].device.type == taken[1].device.type == DEVICE.type and given["x"] is x


@pytest.mark.parametrize("granularity", ["head", "block", "layer", "kernel", "vector", "weight", "2:4"])
def test_granularities(granularity):
    heads = lambda: made(nn.Conv2d(2, 8, 3, padding=1), Attention(8, 8), Flat(8))  # noqa: E731
    chain = lambda: made(nn.Flatten(), *(part for _ in range(4) for part in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 3))  # noqa: E731
    make = {"head": heads, "block": deep, "layer": chain}.get(granularity, NETWORKS["convolutions"])
    here = graphprune.shrink(make(), X[:1], 0.5, granularity=granularity)
    mine = graphprune.shrink(moved(make()), there(X[:1]), 0.5, granularity=granularity)
    near(mine(there(X)), here(X))
    assert devices(mine) == {DEVICE.type}
    if granularity in ("kernel", "vector", "weight", "2:4"):
        near(graphprune.bake(mine)(there(X)), here(X))


def test_store_expand_fuse_and_compose(tmp_path):
    net = moved(NETWORKS["convolutions"]())
    small, plan = graphprune.shrink(net, there(X[:1]), 0.4, return_plan=True)
    if GPU:
        graphprune.save(small, tmp_path)
        again = graphprune.load(tmp_path, base=moved(NETWORKS["convolutions"]()))
        near(again(there(X)), small(there(X)))
    wide = moved(NETWORKS["convolutions"]())
    wide.load_state_dict(graphprune.expand(small), strict=False)
    near(wide(there(X)), zeros(net, plan, there(X)))
    near(graphprune.fuse(small, there(X[:1]))(there(X)), small(there(X)))
    less, more = graphprune.shrink(small, there(X[:1]), 0.4, return_plan=True)
    near(graphprune.apply(net, graphprune.compose(plan, more))(there(X)), less(there(X)))
    masks = plan.masks(net)
    assert all(masks[name].shape == tensor.shape for name, tensor in net.state_dict().items())


def taught(model, steps=3, cast=None):
    """A few steps of Adam, with a scaler where autocast is asked for."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=16.0, enabled=cast is torch.float16)
    for at in range(steps):
        with torch.autocast("cuda", cast) if cast else nullcontext():
            loss = model(there(SHOWN[at]).to(next(model.parameters()).dtype)).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return optimizer


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16] if GPU else [None])
def test_training_goes_on_with_the_optimizer_state(cast):
    net = moved(NETWORKS["convolutions"]()).float().train()
    optimizer = taught(net, cast=cast)
    before = next(iter(optimizer.state.values()))["exp_avg"].clone()
    small, plan = graphprune.shrink(net, there(X[:1]).float(), 0.5, return_plan=True)
    graphprune.refresh_optimizer(optimizer, plan, small, original=net)
    first = next(iter(optimizer.state.values()))["exp_avg"]
    kept = plan.cuts["0.weight"][0]
    assert torch.equal(first, before[list(kept)]) and first.device.type == DEVICE.type
    small.train()(there(X).float()).square().mean().backward()
    optimizer.step()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    graphprune.refresh_ema(averaged, plan)
    assert averaged.module(there(X).float()).shape == small(there(X).float()).shape


def test_learning_from_the_original():
    net = moved(NETWORKS["convolutions"]()).float()
    small, plan = graphprune.shrink(net, there(X[:1]).float(), 0.5, return_plan=True)
    small.train()
    with (
        graphprune.Distillation(net, small, plan, there(X[:1]).float(), features=0.1) as distill,
        torch.autocast("cuda", torch.bfloat16) if GPU else nullcontext(),
    ):
        images = there(X).float()
        loss = distill(images, small(images))
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in small.parameters())


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.skipif(not GPU, reason="what cannot be stored cannot be resumed")
def test_the_loop_is_resumed_bit_for_bit(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4)).to(DEVICE)

    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def fit(model, round):
        optimizer = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
        for _ in range(3):
            noise = torch.randn(32, 8, device=DEVICE)  # the generator of the device
            (model(x + 0.1 * noise) - x[:, :4]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def run(folder, stop=None):
        calls = []

        def train(model, round):
            fit(model, round)
            calls.append(round)
            if len(calls) == stop:
                raise Killed

        torch.manual_seed(5)
        evaluate = torch.no_grad()(lambda model: -float((model.eval()(x) - x[:, :4]).square().mean()))
        return graphprune.iterate(network(), x[:1], 0.5, train=train, evaluate=evaluate, steps=3, checkpoint=folder, progress=False).model

    whole = run(tmp_path / "whole")
    for stop in (1, 2, 3):
        with pytest.raises(Killed):
            run(tmp_path / f"stopped-{stop}", stop)
        torch.manual_seed(99)
        again = run(tmp_path / f"stopped-{stop}")
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert devices(whole) == {DEVICE.type}


@pytest.mark.skipif(not GPU, reason="a clock of its own has only a GPU")
def test_an_asked_time_is_met(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    layers = [part for at in range(4) for part in (nn.Conv2d(256 if at else 3, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU())]
    net, x = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)).to(DEVICE).eval(), torch.zeros(32, 3, 56, 56, device=DEVICE)
    small, plan = graphprune.shrink(net, x, speedup=2.0, return_plan=True)
    found = graphprune.measure(small, x, net, seconds=2)
    assert 1.8 < found.speedup < 2.3, (str(found), plan.notes[-1])
    assert found.clock == "device"


def test_a_model_and_an_example_on_two_devices_are_told_apart():
    net = moved(NETWORKS["convolutions"]())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        small = graphprune.shrink(net, X[:1], 0.5)
    except graphprune.GraphpruneError as error:
        assert DEVICE.type in str(error) and "cpu" in str(error)
    else:
        near(small(there(X)), graphprune.shrink(NETWORKS["convolutions"](), X[:1], 0.5)(X))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
