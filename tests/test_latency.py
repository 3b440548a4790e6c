"""A time that is asked for is met on a synthetic clock; nonsense and noise are refused; alignment is read off a staircase."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from clocks import X, net, own_cache  # noqa: F401 (a fixture)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.budget.choose import fit
from graphprune.budget.descent import Fresh, descend
from graphprune.budget.optimal import complete, losses_of
from graphprune.budget.problem import Problem
from graphprune.budget.space import space
from graphprune.cost import costs
from graphprune.coupling.lengths import Prefixes
from graphprune.errors import BadMeasure, BadTarget
from graphprune.select import best as first
from graphprune.select import orders_of
from graphprune.timing import latency
from graphprune.timing.align import SLACK, alignments, staircase
from graphprune.timing.operators import item, together
from graphprune.timing.table import Table, times
from graphprune.tracing.trees import replace

REAL = Table._time


def clock(model):
    """A machine with a constant overhead, which no table of operations knows."""
    return 1e-4 + 1e-9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scope", ["layer", "optimal"])
def test_the_asked_time_is_met_by_the_clock_that_counts(scope):
    model = net()
    small, plan = graphprune.shrink(model, X, speedup=1.5, measure=clock, scope=scope, threads=1, multiple_of=1, return_plan=True)
    assert clock(model) / clock(small) == pytest.approx(1.5, rel=0.02)
    assert "asked 1.5x faster" in plan.notes[-1] and "measured" in plan.notes[-1]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, [m.training for m in model.modules()]


def test_on_a_gpu_the_refusal_says_that_starting_operations_takes_time(monkeypatch):
    def on_a_gpu(watch, *args, **kwargs):
        before(watch, *args, **kwargs)
        watch.device = torch.device("cuda")

    assert "larger batch" not in refused(BadTarget, "most that can be reached", speedup=50, measure=clock)
    before = latency.Stopwatch.__init__
    monkeypatch.setattr(latency.Stopwatch, "__init__", on_a_gpu)
    assert "larger batch" in refused(BadTarget, "most that can be reached", speedup=50, measure=clock)


def refused(error, match, model=None, **asked):
    """The error comes, says so, and the model is as it was."""
    model = model or net().train()
    before, modes = state(model)
    with pytest.raises(error, match=match) as found:
        graphprune.shrink(model, X, threads=1, **asked)
    after, still = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before) and modes == still
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    return str(found.value)


def test_what_cannot_be_reached_is_said_with_what_can_and_what_blocks_it():
    text = refused(BadTarget, "most that can be reached", speedup=50, measure=clock)
    reached = float(re.search(r"\(([\d.]+)x faster", text)[1])
    assert 1 < reached < 50 and "an output of the model keeps its size" in text and "an input of the model" not in text
    small = graphprune.shrink(net(), X, speedup=reached * 0.97, measure=clock, threads=1)  # what is named can be had
    assert clock(net()) / clock(small) == pytest.approx(reached * 0.97, rel=0.02)
    held = refused(BadTarget, "kept on request", speedup=50, measure=clock, keep="0")
    assert float(re.search(r"\(([\d.]+)x faster", held)[1]) < reached


@pytest.mark.parametrize("value", [None, -1.0, 0.0, float("nan"), float("inf"), "fast", [1]])
def test_nonsense_of_a_measure_is_refused(value):
    refused(BadMeasure, "seconds of one call", latency=0.5, measure=lambda m: value)


def test_noise_is_refused_with_its_band():
    rng = np.random.default_rng(0)
    text = refused(BadMeasure, "scatters", latency=0.5, measure=lambda m: float(rng.lognormal(0, 3)))
    assert re.search(r"between [\d.]+ and [\d.]+ \(\d+ rounds; a band of \d+ %", text)


def test_a_measure_that_fails_says_so():
    def broken(model):
        raise OSError("the board does not answer")

    refused(BadMeasure, "the board does not answer", latency=0.5, measure=broken)


NAN = float("nan")


@pytest.mark.parametrize(
    "asked",
    [{"latency": v} for v in (2.0, 0, -1, NAN, "12", "-3 ms", True, [1])]
    + [{"speedup": v} for v in (0.5, NAN, -2, float("inf"), "2x", True)]
    + [{"speedup": 2, "latency": 0.5}, {"measure": clock}, {"measure": 3, "speedup": 2}, {"speedup": 2, "params": -1}, {"speedup": 2, "runtime": "abacus"}]
    + [{"speedup": 2, "multiple_of": 0}, {"speedup": 2, "multiple_of": "best"}],
)
def test_wrong_and_contradictory_targets_are_refused(asked):
    refused((BadTarget, BadMeasure), "speedup|latency|measure|params|runtime|multiple_of", **asked)


def test_a_time_and_a_size_hold_together():
    model = net()
    small = graphprune.shrink(model, X, speedup=1.3, params=0.4, measure=clock, threads=1)
    assert sum(p.numel() for p in small.parameters()) <= 0.4 * sum(p.numel() for p in model.parameters())
    assert clock(model) / clock(small) >= 1.3 * 0.98


def test_a_warm_search_times_no_operation(monkeypatch):
    first, plan = graphprune.shrink(net(), X, speedup=1.5, measure=clock, threads=1, return_plan=True)

    def cold(*_):
        raise AssertionError("timed again")

    monkeypatch.setattr(Table, "_time", cold)
    calls = []
    again = graphprune.shrink(net(), X, speedup=1.5, measure=lambda m: calls.append(m) or clock(m), threads=1)
    assert [p.shape for p in first.parameters()] == [p.shape for p in again.parameters()]
    assert len({id(m) for m in calls}) == 2  # the original and one candidate: the stored correction is right at once
    with pytest.raises(AssertionError, match="timed again"):  # control: another model is not in the table
        graphprune.shrink(nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 8)), X, speedup=1.2, measure=clock, threads=1)


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
def test_every_runtime_runs_what_it_is_asked_to_time(runtime, monkeypatch):
    pytest.importorskip("torch" if runtime == "eager" else runtime)
    pytest.importorskip("torch" if runtime == "eager" else "onnx")
    import graphprune.timing.latency as latency
    import graphprune.timing.table as table

    # Profilers count such small products in whole microseconds: what they say is tested below.
    monkeypatch.setattr(table, "together", lambda items, *_: [1e-7 + 1e-9 * each.bytes for each in items])
    real, seen = latency.prepare, []

    def prepared(model, args, kwargs, asked, threads, first=None):
        call = real(model, args, kwargs, asked, threads)
        call()
        seen.append(asked)
        return lambda: clock(model)

    monkeypatch.setattr(latency, "prepare", prepared)
    monkeypatch.setattr(latency, "clock_for", lambda *_: ("synthetic", lambda call, repeats: call()))
    model = net()
    small, plan = graphprune.shrink(model, X, speedup=1.5, runtime=runtime, threads=1, multiple_of=1, return_plan=True)
    assert clock(model) / clock(small) == pytest.approx(1.5, rel=0.03)
    assert set(seen) == {runtime} and f"; {runtime}, 1 thread" in plan.notes[-1]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_products_are_timed_by_the_runtimes_own_profiler(runtime):
    pytest.importorskip(runtime)
    pytest.importorskip("onnx")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 64, 3), nn.ConvTranspose2d(64, 8, 2, stride=2), nn.Linear(8, 5)

        def forward(self, x):
            x = self.b(self.a(x).relu()).mean((2, 3))
            return self.c(x) @ self.c.weight

    graph = graphprune.trace(Net(), torch.randn(2, 3, 16, 16))
    items = [found for node in graph.nodes if (found := item(node, tuple(filled(node.args))))]
    assert [each.kind for each in items] == ["Conv", "ConvTranspose", "MatMul", "MatMul"]
    assert all(0 < seconds < 1 for seconds in together(items, runtime, 1))


def filled(args):
    return [replace(arg, lambda value: torch.ones(value.shape)) for arg in args]


def test_one_operation_that_a_session_refuses_does_not_take_the_others_along(monkeypatch):
    import graphprune.timing.table as table

    def picky(items, runtime, threads):
        if any(each == "bad" for each in items):
            raise RuntimeError("refused")
        return [1.0] * len(items)

    monkeypatch.setattr(table, "together", picky)
    found = Table(torch.device("cpu"), "onnxruntime", 1)
    found._run({"a": "good", "b": "bad", "c": "good", "d": "good"})
    assert {k: found.known[k] for k in "abcd"} == {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}


def test_a_runtime_that_is_not_installed_leaves_no_timings_behind(monkeypatch):
    import graphprune.timing.table as table

    def absent(*_):
        raise ImportError("no such module")

    monkeypatch.setattr(table, "together", absent)
    refused(BadMeasure, "pip install openvino", macs=0.5, objective="time", runtime="openvino")
    assert not any("addmm" in key for key in Table(torch.device("cpu"), "openvino", 1).known)


SYNTHETIC = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def timed(*widths, step, seed=0):
    """Groups of a chain of layers, scores, and costs with a clock that knows steps and noise of its own."""
    rng = np.random.default_rng(seed)
    noise: dict = {}

    def seconds(table, node, shapes):
        area = math.prod(-(-size // step) * step for shape in shapes[-2:] for size in shape)
        return noise.setdefault((id(node), str(shapes)), 1e-6 + 1e-9 * area * rng.uniform(0.7, 1.3))

    model = nn.Sequential(*(m for a, b in itertools.pairwise((4, *widths)) for m in (nn.Linear(a, b), nn.ReLU())), nn.Linear(widths[-1], 3))
    groups = graphprune.couple(graphprune.trace(model, torch.randn(2, 4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Table, "_time", seconds)
        known = costs(groups, {"time": times(groups.graph, Table(torch.device("cpu")))})
    return groups, [torch.rand(g.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05 for g in groups], known


@SYNTHETIC
@given(st.lists(st.integers(3, 6), min_size=2, max_size=3), st.sampled_from([1, 2, 3]), st.floats(0.4, 0.95), st.integers(0, 99))
def test_small_instances_equal_brute_force(widths, step, share, seed):
    groups, scores, known = timed(*widths, step=step, seed=seed)
    whole = [torch.arange(g.size) for g in groups]
    limit = share * float(known.parts["time"](known.lengths.of(whole)[None])[0])
    best = math.inf
    for counts in itertools.product(*(range(1, g.size + 1) for g in groups)):
        kept = first(orders_of(scores), counts)
        if float(known.parts["time"](known.lengths.of(kept)[None])[0]) <= limit:
            best = min(best, lost(scores, kept))
    if best == math.inf:
        return
    assert lost(scores, fit(groups, scores, {"time": limit}, known, scope="optimal")) == pytest.approx(best, rel=1e-6)
    assert lost(scores, fit(groups, scores, {"time": limit}, known, scope="layer")) >= best * (1 - 1e-6)


def lost(scores, kept):
    return sum(float((s.sum() - s[k].sum()) / s[k].sum()) for s, k in zip(scores, kept, strict=True))


@SYNTHETIC
@given(st.integers(0, 99), st.floats(0.4, 0.9))
def test_no_width_is_slower_than_the_next_larger_one_and_none_could_be_wider_for_free(seed, share):
    groups, scores, known = timed(64, 96, 80, step=16, seed=seed)
    full = known.at(np.array([[g.size for g in groups]], dtype=float), ["time"])["time"][0]
    kept = fit(groups, scores, {"time": share * full}, known, scope="optimal")
    chosen = np.array([len(stay) for stay in kept], dtype=float)
    now = known.at(chosen[None], ["time"])["time"][0]
    for index, group in enumerate(groups):
        wider = np.repeat(chosen[None], group.size, axis=0)
        wider[:, index] = np.arange(1, group.size + 1)
        taken = known.at(wider, ["time"])["time"]
        assert (np.diff(taken) >= -1e-15).all()
        assert chosen[index] == group.size or taken[int(chosen[index])] > now * (1 + 1e-12)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.3]), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_learnt_alignment_never_offers_a_width_slower_than_the_next(seed, noise, step):
    rng, known = np.random.default_rng(seed), {}

    def seconds(width):
        return known.setdefault(width, float(-(-width // step) * step * (1 + noise * rng.random())))

    found = staircase(seconds, 64)
    if found < 32:
        offered = range(64, 96, found)
        assert all(seconds(width) <= seconds(width + found) * (1 + SLACK) for width in offered)
    if noise == 0.0 and step >= 8:  # smaller steps are within what counts as equal
        assert found == step


def test_auto_alignment_really_times_this_device_once(monkeypatch):
    monkeypatch.setattr(Table, "_time", REAL)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 1))
    x = torch.randn(1, 3, 8, 8)
    groups = graphprune.couple(graphprune.trace(model, x))
    table = Table(torch.device("cpu"))
    first = alignments(groups, table)
    assert table.fresh > 5 and set(first) == {0, 1} and all(step in (1, 2, 4, 8, 16) for step in first.values())
    again = Table(torch.device("cpu"))  # read from the disk
    assert alignments(groups, again) == first and again.fresh == 0
    small = graphprune.shrink(model, x, 0.4, multiple_of="auto", threads=torch.get_num_threads())
    assert [small[i].out_channels % first[0] for i in (0, 2)] == [0, 0]


def test_alignment_is_read_off_a_staircase():
    assert staircase(lambda width: -(-width // 16), 64) == 16
    assert staircase(lambda width: -(-width // 8), 64) == 8
    assert staircase(lambda width: width, 64) == 1
    assert staircase(lambda width: width * (1.3 if width % 32 else 1.0), 64) == 32  # slower than the next wider one


def spent(scores, known, limit, weight, kept):
    """Share of the MACs that is used, and what is to be small: score lost and time, weighed."""
    lengths = known.lengths.of(kept)[None]
    seconds = float(known.parts["time"](lengths)[0])
    return float(known.parts["macs"](lengths)[0]) / limit, (1 - weight) * math.log(lost(scores, kept) + 1e-12) + weight * math.log(seconds)


@SYNTHETIC
@given(st.lists(st.integers(3, 6), min_size=2, max_size=3), st.sampled_from([1, 2]), st.floats(0.4, 0.95), st.sampled_from([0.5, 1.0]), st.integers(0, 99))
def test_fast_widths_equal_brute_force(widths, step, share, weight, seed):
    groups, scores, known = timed(*widths, step=step, seed=seed)
    limit = share * known.full.macs
    every = [spent(scores, known, limit, weight, first(orders_of(scores), counts)) for counts in itertools.product(*(range(1, g.size + 1) for g in groups))]
    most = max((used for used, _ in every if used <= 1), default=None)
    if most is None:
        return
    best = min(small for used, small in every if min(0.99, most) <= used <= 1)
    found = spent(scores, known, limit, weight, fit(groups, scores, {"macs": limit, "time": math.inf}, known, scope="optimal", time=weight))
    assert min(0.99, most) <= found[0] <= 1 + 1e-12 and found[1] == pytest.approx(best, rel=1e-9)


def test_step_by_step_is_nearly_as_fast_as_the_best_that_use_as_much():
    slower = []
    for seed in range(12):
        groups, scores, known = timed(10, 12, 14, step=1, seed=seed)
        allowed, limits = space(groups), {"macs": 0.5 * known.full.macs, "time": math.inf}
        problem = Problem(losses_of(groups, scores, allowed), limits, known, allowed, Prefixes(known.lengths, orders_of(scores)), 1.0)
        steps = descend(problem)
        used = float(problem.shares(steps[None])[0].max())
        fast, fastest = problem.seconds(np.stack([steps, complete(problem)]))
        assert used <= 1
        slower.append(fast / fastest)
    assert np.median(slower) < 1.05 and max(slower) < 1.25


class Every(Fresh):
    """All prices anew after every step."""

    def take(self, choice):
        super().take(choice)
        self.fill()


def test_prices_of_speed_are_looked_up_again_where_they_can_have_changed():
    for weight, seed in ((0.5, 0), (1.0, 1), (0.3, 2)):
        groups, scores, known = timed(10, 12, 14, 9, 11, step=2, seed=seed)
        allowed, limits = space(groups), {"macs": 0.4 * known.full.macs, "time": math.inf}
        problem = Problem(losses_of(groups, scores, allowed), limits, known, allowed, Prefixes(known.lengths, orders_of(scores)), weight)
        paths = []
        for kind in (Fresh, Every):
            search, steps = kind(problem), []
            while not search.done():
                steps.append(search.next())
                search.take(steps[-1])
            paths.append(steps)
        assert paths[0] == paths[1] and len(paths[0]) > 5


def test_more_weight_on_time_is_faster_at_the_same_macs(monkeypatch):
    """Additions on the stream between layers take time and no MACs: fast widths keep the MACs inside the blocks."""

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(48, 64) for _ in range(3))
            self.down = nn.ModuleList(nn.Linear(64, 48) for _ in range(3))
            self.first, self.last = nn.Linear(16, 48), nn.Linear(48, 4)

        def forward(self, x):
            x = self.first(x)
            for up, down in zip(self.up, self.down, strict=True):
                x = x + down(up(x).relu())
            return self.last(x)

    monkeypatch.setattr(Table, "_time", lambda table, node, shapes: 1e-6 * max(math.prod(shape) for shape in shapes) * (20 if "add." in str(node.func) else 1))
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(64, 16)
    full, found = graphprune.profile(model, x).macs, []
    for objective in ("score", 0.5, "time"):
        small = graphprune.shrink(model, x, macs=0.5, objective=objective, scope="optimal", multiple_of=1, threads=1)
        graph = graphprune.trace(small, x)
        groups = graphprune.couple(graph)
        known = costs(groups, {"time": times(graph, Table(torch.device("cpu")))})
        assert 0.97 * 0.5 * full <= graphprune.profile(small, x).macs <= 0.5 * full
        found.append(float(known.at(np.array([[g.size for g in groups]], dtype=float), ["time"])["time"][0]))
    assert found[2] <= found[1] < found[0] and found[2] < 0.9 * found[0]


@pytest.mark.parametrize(
    "asked",
    [{"objective": v, "macs": 0.5} for v in ("fast", None, NAN, -0.1, 2, True, [1])]
    + [{"objective": "time"}, {"objective": "time", "speedup": 2}, {"objective": 0.5, "ratio": 0.5}]
    + [{"objective": "time", "macs": 0.5, "scope": "layer"}, {"objective": "time", "params": 0.5, "granularity": "weight"}],
)
def test_objectives_that_make_no_sense_are_refused(asked):
    refused(BadTarget, "objective", **asked)


def test_an_operation_is_timed_with_its_inputs_at_hand_and_its_weights_gone(monkeypatch):
    """On a machine whose cache holds what was touched since the last sweep."""
    import graphprune.timing.table as table

    monkeypatch.setattr(Table, "_time", REAL)
    cached, seen = set(), []

    class Cache(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            given = [a for a in args if isinstance(a, torch.Tensor)]
            if any(a.numel() == table.SWEEP for a in given):
                cached.clear()
            elif func is torch.ops.aten.addmm.default:
                seen.append([a.shape in cached for a in given])
            cached.update(a.shape for a in given)
            return func(*args, **(kwargs or {}))

    graph = graphprune.trace(nn.Linear(7, 5), torch.zeros(3, 7))
    (node,) = [node for node in graph.nodes if "addmm" in str(node.func)]
    with Cache():
        assert Table(torch.device("cpu")).seconds(node, [(5,), (3, 7), (7, 5)]) > 0
    assert len(seen) >= 4 and all(row == [False, True, False] for row in seen[2:])  # bias, input, weight; the first two calls warm up
    assert seen[1] == [True, True, True]  # control: without a sweep all is there
