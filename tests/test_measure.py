"""Timing: what interleaved medians recover from a synthetic clock, and that the user's state survives."""

import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import BadMeasure
from graphprune.timing.measure import interleave, middle_of

X = torch.randn(4, 8)
NET = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2))


class Clock:
    """A machine that drifts to half its speed while it is watched; every call has a true cost."""

    def __init__(self, seed=0, noise=0.02, drift=1.0):
        self.rng, self.noise, self.drift, self.calls = np.random.default_rng(seed), noise, drift, 0

    def __call__(self, call, repeats):
        self.calls += 1
        return call() * (1 + self.drift * self.calls / 100) * np.exp(self.noise * self.rng.standard_normal())


def test_interleaving_cancels_a_drift_and_a_block_order_does_not():
    rows = interleave([lambda: 2.0, lambda: 1.0], Clock(), seconds=0.05, enough=0.0, least=40)[:40]
    assert abs(middle_of(rows[:, 0] / rows[:, 1])[0] - 2) < 0.05
    clock = Clock()
    first, second = [clock(lambda: 2.0, 1) for _ in range(40)], [clock(lambda: 1.0, 1) for _ in range(40)]
    assert abs(np.median(first) / np.median(second) - 2) > 0.3


class Cache:
    """A machine on which a call is slower, by what the call before it left in the caches, unless it repeats that call."""

    def __init__(self):
        self.last = None

    def model(self, seconds, size):
        def call():
            cold = 0.0 if self.last is call or self.last is None else 0.1 * self.last.size
            self.last = call
            return seconds + cold

        call.size = size
        return call

    def speedup(self, others, **how):
        """Of 1.0 over 0.5 seconds, among models of ``others`` sizes."""
        large, small = self.model(1.0, 1.0), self.model(0.5, 0.5)
        calls = [large, small, *(self.model(0.3, size) for size in others), large]
        rows = interleave(calls, lambda call, repeats: call(), 0.0, 0.0, least=6, **how)
        return middle_of(rows[:, [0, -1]].mean(axis=1) / rows[:, 1])[0]


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("others", [[], [3.0], [0.1, 0.2]])
def test_a_speedup_does_not_depend_on_the_company_it_is_measured_in(others, chained):
    assert Cache().speedup(others, chained=chained) == pytest.approx(2)
    assert abs(Cache().speedup(others, chained=chained, warm=False) - 2) > 0.03  # control: timed right after another model


def test_the_band_holds_the_median_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = middle_of(rng.exponential(size=21))[1]
        hits += low <= np.log(2) <= high
    assert 0.92 < hits / 400 < 0.995


def test_measuring_leaves_the_models_and_torch_alone():
    net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2)).train()
    net[0].eval()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = graphprune.measure(net, X, NET, threads=1, seconds=0.05)
    assert (net.training, net[0].training, net[1].training) == (True, False, True)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert found.band[0] <= found.speedup <= found.band[1] and found.low <= found.seconds <= found.high
    assert "reference against itself" in str(found) and graphprune.measure(NET, X, seconds=0.02).speedup is None


def test_memory_format_goes_to_both_sides_and_not_to_the_users():
    net = nn.Conv2d(3, 8, 3)
    found = graphprune.measure(net, torch.randn(1, 3, 8, 8), net, memory_format=torch.channels_last, seconds=0.02)
    assert found.memory_format == "channels_last"
    assert not net.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_runtimes_compute_the_same(runtime):
    pytest.importorskip(runtime)
    pytest.importorskip("onnx")
    from graphprune.timing.runtimes import prepare

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 3)

        def forward(self, pair, scale):
            return {"sum": self.a(pair[0]) * scale, "first": pair[1] + 1}

    net, given = Nested().eval(), ((X, X + 1),)
    found = prepare(net, given, {"scale": torch.tensor(2.0)}, runtime, 1)()
    wanted = net(*given, torch.tensor(2.0))
    for mine, theirs in zip(list(found.values()) if hasattr(found, "values") else found, wanted.values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(np.array(mine)), theirs.detach(), rtol=1e-4, atol=1e-5)


class Branch(nn.Module):
    """Control flow on values, which torch.export refuses and a trace decides once."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a = kind, nn.Linear(8, 3)

    def forward(self, x):
        turned = {"sum": lambda: x.sum() > 1e9, "item": lambda: x[0, 0].item() > 1e9, "any": lambda: bool((x != x).any())}[self.kind]()
        return self.a(-x) if turned else self.a(x)


def opset(file):
    import onnx

    return onnx.load_from_string(file).opset_import[0].version


@pytest.mark.parametrize("kind", ["sum", "item", "any"])
def test_onnx_is_written_by_the_new_exporter_and_by_the_old_one_with_a_word(kind, monkeypatch):
    pytest.importorskip("onnxscript")
    from graphprune.timing.runtimes import prepare, to_onnx

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opset(to_onnx(NET, (X,), {})) >= 18
    net = Branch(kind).eval()
    with pytest.warns(UserWarning, match="older exporter.*cannot be used"):
        assert opset(to_onnx(net, (X,), {})) == 17
    pytest.importorskip("onnxruntime")
    with pytest.warns(UserWarning, match="older exporter"):
        outputs = prepare(net, (X,), {}, "onnxruntime", 1)()
    torch.testing.assert_close(torch.as_tensor(outputs[0]), net(X).detach(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="onnxscript is not installed"):
        to_onnx(NET, (X,), {})


class Shaped(nn.Module):
    """Sizes in the code, which torch.export writes into the file as numbers."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.count, self.up, self.down = kind, 4, nn.Linear(8, 24), nn.Linear(24, 3)
        self.conv, self.deep, self.norm = nn.Conv2d(2, 12, 3, padding=1), nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12)
        self.after = nn.Conv2d(12, 6, 1)

    def forward(self, x):
        return getattr(self, self.kind)(x)

    def flattened(self, x):
        return self.down(self.up(x).relu().reshape(len(x), 2, -1).transpose(1, 2).flatten(1))

    def heads(self, x):
        h = self.up(x).reshape(len(x), self.count, -1)
        return self.down((h.softmax(-1) * h).reshape(len(x), -1))

    def depthwise(self, x):
        return self.after(self.norm(self.deep(self.conv(x.reshape(-1, 2, 2, 2).repeat(1, 1, 2, 2)))).relu())

    def grouped(self, x):
        return self.after(torch.nn.functional.pad(self.conv(x.reshape(-1, 2, 2, 2)), (1, 1)).relu()).flatten(1)

    def pixels(self, x):
        h = self.conv(x.reshape(-1, 2, 2, 2)).relu()
        return self.after(h.view(h.shape[0], h.shape[1], 4).view(h.shape[0], -1, 2, 2))

    def split(self, x):  # the sizes of the halves stay numbers: such a model is exported anew
        a, b = self.up(x).split(self.up.out_features // 2, 1)
        return self.down(torch.cat([a.relu(), b.sigmoid()], 1))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["flattened", "heads", "depthwise", "grouped", "pixels", "split"])
def test_a_cut_model_runs_in_the_file_of_the_original_or_in_its_own(kind, runtime):
    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    from graphprune.timing.runtimes import prepare

    torch.manual_seed(0)
    net = Shaped(kind).eval()
    small = graphprune.shrink(net, X, 0.5)
    assert graphprune.profile(small, X).params < graphprune.profile(net, X).params
    first = prepare(net, (X,), {}, runtime, 1)
    call, alone = (prepare(small, (X,), {}, runtime, 1, before) for before in (first, None))
    assert (call.draft is first.draft) == (kind != "split")
    outputs, own = ([np.array(array) for array in (found.values() if hasattr(found, "values") else found)] for found in (call(), alone()))
    np.testing.assert_allclose(outputs[0], small(X).detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs[0], own[0])


def test_a_file_made_again_is_the_one_that_would_be_exported():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from graphprune.timing.files import drafted

    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.Sigmoid(), nn.Linear(16, 3)).eval()
    small = graphprune.shrink(net, X, 0.5)
    again, own = (onnx.load_from_string(file) for file in (next(drafted(net, (X,), {}).refilled(small, (X,), {})), drafted(small, (X,), {}).file))
    assert list(again.graph.node) == list(own.graph.node)
    weights = [{item.name: onnx.numpy_helper.to_array(item) for item in file.graph.initializer} for file in (again, own)]
    assert weights[0].keys() == weights[1].keys() and all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not list(drafted(net, (X,), {}).refilled(nn.Sequential(nn.Linear(8, 3)), (X,), {}))  # control: another model has other weights


def test_a_file_that_computes_something_else_is_not_run():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from graphprune.timing.runtimes import prepare

    class Scaled(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by, self.a = by, nn.Linear(8, 3)

        def forward(self, x):
            return self.a(x) * self.by

    first = prepare(Scaled(2.0).eval(), (X,), {}, "onnxruntime", 1)
    assert prepare(Scaled(2.0).eval(), (X,), {}, "onnxruntime", 1, first).draft is first.draft
    assert prepare(Scaled(3.0).eval(), (X,), {}, "onnxruntime", 1, first).draft is not first.draft


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_of_a_session_do_not_wait_on_the_cores_of_the_next_one(threads):
    onnxruntime = pytest.importorskip("onnxruntime")
    from graphprune.timing.runtimes import prepare, to_onnx

    wide, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval(), torch.randn(256, 512)

    def idle(call):
        """Processor seconds in the pauses between calls."""
        call()
        seconds = []
        for _ in range(9):
            call()
            start = time.process_time()
            time.sleep(0.02)
            seconds.append(time.process_time() - start)
        return float(np.median(seconds))

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(to_onnx(wide, (x,), {}), options, providers=["CPUExecutionProvider"])
    assert idle(prepare(wide, (x,), {}, "onnxruntime", threads)) < 1e-3
    assert idle(lambda: session.run(None, {"x0": x.numpy()})) > 1e-3  # control: as ONNX Runtime is by itself


def test_bad_measures_say_what_to_do():
    with pytest.raises(BadMeasure, match="eager, compile"):
        graphprune.measure(NET, X, runtime="tensorrt")
    with pytest.raises(BadMeasure, match="whole number"):
        graphprune.measure(NET, X, threads=0)
    with pytest.raises(BadMeasure, match="larger batch"):
        interleave([lambda: 0.0, lambda: 0.0], lambda call, repeats: call(), 0.01, 0.01)
