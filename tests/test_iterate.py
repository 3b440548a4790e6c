"""The loop: what is left after each round, the floor, errors, and that an interrupted run ends with the same model, bit for bit."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Flat, Residual
from torch import nn

import graphprune
from graphprune import errors
from graphprune.loop.history import History, Row
from graphprune.loop.schedule import SCHEDULES, share
from graphprune.timing.table import Table

X = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Dropout(0.2), Residual(16, 12), Flat(16))


def fit(model, round, optimizer=None):
    """Two steps that use every source of randomness."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()
    for _ in range(2):
        picked = torch.randperm(16)[: 8 + random.randrange(4)]
        loss = nn.functional.cross_entropy(model(X[picked] + 0.1 * float(np.random.rand())), Y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def loss(model):
    """Minus the loss; leaves the model in eval mode."""
    with torch.no_grad():
        return -float(nn.functional.cross_entropy(model.eval()(X), Y))


def run(folder=None, train=fit, evaluate=loss, target=0.5, seed=0, **options):
    net = network()
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    asked = {"steps": 3, "schedule": "cubic", "progress": False, **options}
    return graphprune.iterate(net, X[:1], target, train=train, evaluate=evaluate, checkpoint=folder, **asked)


def bits(model):
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_rise_to_the_target(schedule):
    for final in (0.0, 0.3, 0.9):
        shares = [share(final, number, 7, schedule) for number in range(8)]
        assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == final
    with pytest.raises(errors.BadRatio, match="cubic"):
        share(0.5, 1, 2, "cosine")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"multiple_of": 4}, {"ratios": {"0": 0.75}}, {"keep": ["4"], "min_units": 5}])
def test_many_rounds_leave_as_much_as_one_cut(schedule, options):
    once = graphprune.shrink(network(), X[:1], 0.5, **options)
    done = run(train=lambda model, round: None, steps=5, schedule=schedule, **options)
    assert [p.shape for p in done.model.parameters()] == [p.shape for p in once.parameters()]
    sizes = [row.params for row in done.history.rows]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 6


@pytest.mark.parametrize("kind", ["params", "macs", "size", "memory"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counted_targets_are_counted_on_the_original(kind, schedule):
    net = network()
    full = getattr(graphprune.profile(net, X[:1]), kind)
    lefts = []
    done = run(train=lambda model, round: lefts.append(getattr(graphprune.profile(model, X[:1]), kind)), target={kind: 0.6}, schedule=schedule)
    limits = [full * (1 - share(0.4, number, 3, schedule)) for number in (1, 2, 3)]
    assert all(left <= limit * (1 + 1e-9) for left, limit in zip(lefts, limits, strict=True))
    assert sorted(lefts, reverse=True) == lefts and [row.asked for row in done.history.rows][-1] == pytest.approx(0.4)
    once = getattr(graphprune.profile(graphprune.shrink(net, X[:1], **{kind: 0.6}), X[:1]), kind)
    assert once == pytest.approx(lefts[-1], rel=0.1) and lefts[0] > lefts[-1]  # one step of a width is a few per cent here
    absolute = run(train=lambda *_: None, target={kind: int(0.6 * full)}, schedule=schedule)
    assert getattr(graphprune.profile(absolute.model, X[:1]), kind) == pytest.approx(lefts[-1], rel=0.1)


def clock(model):
    """A machine with a constant overhead, without noise."""
    return 1e-4 + 1e-8 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("target", [{"speedup": 1.5}, {"latency": 1 / 1.5}, {"latency": "time"}])
def test_times_are_measured_against_the_original(target, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Table, "_time", lambda table, node, shapes: 1e-7 + 1e-9 * sum(map(math.prod, shapes)))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    given = {kind: f"{1e3 * clock(net) / 1.5} ms" if value == "time" else value for kind, value in target.items()}
    options = {"measure": clock, "threads": 1, "multiple_of": 1, "steps": 2, "progress": False, "evaluate_cuts": False}
    shares = []

    def train(model, round):
        shares.append(clock(model) / clock(net))

    graphprune.iterate(net, torch.zeros(1, 8), given, train=train, evaluate=lambda model: 1.0, **options)
    assert shares == pytest.approx([1 - (1 - 1 / 1.5) / 2, 1 / 1.5], rel=0.03)


def test_what_cannot_be_reached_is_said_before_any_training():
    calls = []
    for target in ({"params": 2}, {"macs": 1e-6}, {"memory": 10}):
        with pytest.raises(errors.BadTarget, match="smallest reachable"):
            run(train=lambda *_: calls.append(1), evaluate=lambda *_: calls.append(1), target=target)
    assert not calls


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_ranked_together_the_total_is_reached(scope):
    units = lambda model: sum(group.size for group in graphprune.couple(graphprune.trace(model, X[:1])))  # noqa: E731
    net = network()
    assert abs(units(run(train=lambda *_: None, steps=4, scope=scope).model) - units(graphprune.shrink(net, X[:1], 0.5, scope=scope))) <= 1


def never(*_):
    pytest.fail("a finished run calls nothing")


def test_the_result_belongs_to_the_original(tmp_path):
    net, before = network(), bits(network())
    done = run(tmp_path)
    assert bits(net) == before and net.training
    graphprune.save(done.model, tmp_path / "mine")
    assert bits(graphprune.load(tmp_path / "mine", base=net)) == bits(done.model)
    assert [row.round for row in done.history.rows] == [0, 1, 2, 3] and "3 rounds" in done.reason
    again = run(tmp_path, train=never, evaluate=never)  # finished: nothing is called
    assert bits(again.model) == bits(done.model) and again.history == done.history and again.plan == done.plan
    assert bits(run(seed=1).model) != bits(done.model)  # control: the seed matters


def test_the_floor_returns_the_last_good_model(tmp_path):
    options = {"evaluate_cuts": False, "schedule": "linear"}
    values = iter([0.9, 0.88, 0.87, 0.5])
    done = run(tmp_path, evaluate=lambda model: next(values), **options, floor=0.8)
    assert [row.good for row in done.history.rows] == [True, True, True, False] and "0.5" in done.reason
    two = run(evaluate=lambda model: 1.0, **options)
    assert sum(p.numel() for p in done.model.parameters()) == done.history[2].params > sum(p.numel() for p in two.model.parameters())
    assert bits(run(tmp_path, floor=0.8, **options).model) == bits(done.model)
    assert bits(graphprune.load(tmp_path / "round-02-trained", base=network())) == bits(done.model)
    with pytest.raises(errors.BadLoop, match="floor"):
        run(tmp_path, floor=0.1, **options)


class Stop(Exception):
    pass


@pytest.mark.parametrize("carried", [None, "sgd", "adam"])
def test_interrupted_in_every_phase(tmp_path, carried):
    factory = {None: None, "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.01)}[carried]
    options = {"optimizer": factory, "train_first": True}
    whole = run(None, **options)
    calls = 4 + 3 * 3 - 2  # trainings and evaluations of the whole run
    for broken in range(calls):
        counted = iter(range(10**6))

        def step(function, counted=counted, broken=broken):
            def call(*args):
                if next(counted) == broken:
                    torch.rand(1), random.random(), np.random.rand()
                    raise Stop
                return function(*args)

            return call

        folder = tmp_path / str(broken)
        with pytest.raises(errors.BadLoop, match="call iterate again") as caught:
            run(folder, train=step(fit), evaluate=step(loss), **options)
        assert isinstance(caught.value.__cause__, Stop)
        resumed = run(folder, seed=99, **options)  # another seed: the states come from the folder
        assert bits(resumed.model) == bits(whole.model) and resumed.history == whole.history
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["round-03-cut", "round-03-trained"]
        assert not list(folder.rglob("*.p*kl*"))


KILLED = """
import os, pathlib, random, shutil, signal, sys, threading, time
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
import safetensors.torch, torch
torch.set_num_threads(1)
import test_iterate as mine
folder, seed = sys.argv[1], int(sys.argv[3])
draw, kills, left = random.Random(seed), {"call": 0, "write": 0, "time": 0}, [0]

def deadly(function, half=None):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            if half:
                half(*args)
            os._exit(3 if half else 2)  # at once: nothing is flushed or cleaned up
        return function(*args, **kwargs)
    return call

def half_text(path, text, *_):
    with open(path, "w") as file:
        file.write(text[: len(text) // 2])

def half_tensors(tensors, path, *_):
    with open(path, "wb") as file:
        file.write(safetensors.torch.save(tensors)[:100])

while True:
    fatal, delay = draw.randrange(1, 90), draw.uniform(0, 0.1) * (1 + sum(kills.values()))
    timed, child = draw.random() < 0.3, os.fork()
    if child == 0:
        left[0] = -1 if timed else fatal
        os.replace, os.fsync, shutil.rmtree, torch.randperm = map(deadly, (os.replace, os.fsync, shutil.rmtree, torch.randperm))
        pathlib.Path.write_text = deadly(pathlib.Path.write_text, half_text)
        safetensors.torch.save_file = deadly(safetensors.torch.save_file, half_tensors)
        mine.run(folder, optimizer=lambda p: torch.optim.Adam(p, 0.01))
        os._exit(0)
    if timed:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (2, 3):
        print(kills["call"], kills["write"], kills["time"])
        os._exit(os.WEXITSTATUS(status))
    kills["time" if os.WIFSIGNALED(status) else "write" if os.WEXITSTATUS(status) == 3 else "call"] += 1
    assert sum(kills.values()) < 300
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_killed_at_random_points(tmp_path):
    """Between two calls, in the middle of writing a file, and whenever a clock says so."""
    here, total = str(Path(__file__).parent), np.zeros(3, int)
    factory = lambda p: torch.optim.Adam(p, 0.01)  # noqa: E731
    whole = run(None, optimizer=factory)
    for seed in range(2):
        folder = tmp_path / str(seed)
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), here, str(seed)], check=True, capture_output=True, text=True)
        total += np.array([int(count) for count in done.stdout.split()])
        resumed = run(folder, train=never, evaluate=never, optimizer=factory)
        assert bits(resumed.model) == bits(whole.model) and resumed.history == whole.history
    assert (total >= 1).all() and total.sum() >= 10, total


def test_evaluate_raises_or_is_not_a_number(tmp_path):
    values = iter([1.0, 0.9, float("nan")])
    with pytest.raises(errors.BadLoop, match="NaN in round 2.*round-01-trained.*base=model"):
        run(tmp_path / "nan", evaluate=lambda model: next(values), evaluate_cuts=False)
    best = graphprune.load(tmp_path / "nan" / "round-01-trained", base=network())
    assert best[0].out_channels < 16
    trained = []
    done = run(tmp_path / "nan", train=lambda model, round: trained.append(round), evaluate=lambda model: 0.9, evaluate_cuts=False)
    assert trained == [2, 3] and len(done.history) == 4  # what gave NaN is trained again
    with pytest.raises(errors.BadLoop, match="ZeroDivisionError"):
        run(tmp_path / "raises", evaluate=lambda model: 1 / 0)
    with pytest.raises(errors.BadLoop, match="TypeError"):
        run(evaluate=lambda model: None)


def test_bad_arguments(tmp_path):
    with pytest.raises(errors.BadLoop, match="above the original's own"):
        run(tmp_path / "high", floor=0.0)
    assert bits(graphprune.load(tmp_path / "high" / "round-00", base=network())) == bits(network())  # the best so far
    with pytest.raises(errors.BadRatio, match="steps"):
        run(steps=0)
    with pytest.raises(errors.BadRatio, match="schedule"):
        run(schedule="sudden")
    with pytest.raises(errors.BadLoop, match="no option 'criterio'"):
        run(criterio="l1")
    with pytest.raises(errors.BadLoop, match="iterator"):
        run(keep=iter(["0"]))
    with pytest.raises(errors.BadLoop, match="one of ratio"):
        run(target={"ratio": 0.5, "macs": 0.5})
    with pytest.raises(errors.BadTarget, match="macs"):
        run(target={"macs": 2})
    with pytest.raises(errors.BadLoop, match="floor is 'high'"):
        run(floor="high")
    with pytest.raises(errors.BadRatio):
        run(target=1.5)
    run(tmp_path, steps=1)
    with pytest.raises(errors.BadLoop, match="steps = 1"):
        run(tmp_path, steps=2)
    with pytest.raises(errors.NothingToPrune):
        run(keep=["*"])
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(errors.BadLoop, match="another folder"):
        run(tmp_path)


def test_layout_modes_and_frozen_parameters_come_back(tmp_path):
    def train(model, round):
        fit(model, round)
        model[1].eval(), model[0].weight.requires_grad_(False)

    net = network().to(memory_format=torch.channels_last)
    options = {"train": train, "evaluate": lambda model: 1.0, "steps": 2, "progress": False, "checkpoint": tmp_path}
    done = graphprune.iterate(net, X[:1], 0.5, **options)
    again = graphprune.iterate(net, X[:1], 0.5, **options)
    assert [m.training for m in again.model.modules()] == [m.training for m in done.model.modules()]
    assert not again.model[0].weight.requires_grad and again.model[4].out.weight.requires_grad
    assert [p.stride() for p in again.model.parameters()] == [p.stride() for p in done.model.parameters()]


def test_history_as_table_and_plot(tmp_path):
    history = History((Row(0, 0.0, 100, 1000, None, 0.9), Row(1, 0.5, 60, 500, 0.7, 0.88)))
    assert history.markdown().splitlines()[3] == "| 1 | 0.50 | 60 (60%) | 500 (50%) | 0.7000 | 0.8800 |"
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history

    class Axes:
        lines: list = []
        plot = lambda self, x, y, *_, **named: self.lines.append((list(x), list(y), named["label"]))  # noqa: E731
        set_xlabel = set_ylabel = legend = lambda *_: None  # noqa: E731

    assert history.plot(Axes()).lines == [([1.0, 0.5], [0.9, 0.88], "after training"), ([0.5], [0.7], "after the cut")]
    pytest.importorskip("matplotlib")
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000
