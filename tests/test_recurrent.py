"""Recurrent layers: what is cut, counted, scored and repaired, with sequences of one length and of several."""

import copy

import pytest
import torch
from judge import emptied
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import graphprune
from graphprune.errors import BadScore

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
X = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Stacked(nn.Module):
    """Two recurrent layers of a width each."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = kind(8, 12, batch_first=True, **options), kind(12 * (2 if options.get("bidirectional") else 1), 10, batch_first=True)
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        return self.out(self.b(self.a(x)[0])[0][:, -1])


class Packed(nn.Module):
    """Features, sequences of several lengths, two directions, and a layer behind."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.feed, self.a = nn.Linear(8, 16), kind(16, 12, batch_first=True, bidirectional=True)
        self.b, self.out = kind(24, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x, lengths):
        x = pack_padded_sequence(torch.relu(self.feed(x)), lengths, batch_first=True, enforce_sorted=False)
        x, lengths = pad_packed_sequence(self.a(x)[0], batch_first=True)
        x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(pad_packed_sequence(self.b(x)[0], batch_first=True)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}])
def test_the_cut_is_exact(kind, options):
    net = Stacked(kind, **options).double().eval()
    small, plan = graphprune.shrink(net, X[:1], 0.5, return_plan=True)
    assert (small.a.hidden_size, small.b.hidden_size) == (6, 5)
    assert (small(X[:, :4]) - graphprune.zeroed(net, plan)(X[:, :4])[0]).abs().max() < 1e-12 < (small(X) - net(X)).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}])
def test_on_another_device_the_run_needs_no_values(kind, options):
    """There a run with values would see one kernel and nothing of what it does."""
    device = pytest.importorskip("pretended", exc_type=ImportError).DEVICE
    net = Stacked(kind, **options).double().eval()
    plans = []
    for where in ("cpu", device):
        graph = graphprune.trace(copy.deepcopy(net).to(where), X[:1].to(where))
        assert graph.real == (where == "cpu")
        groups = graphprune.couple(graph)
        plans.append([(group.size, sorted(group.places)) for group in groups])
    assert plans[0] == plans[1]


class State(nn.Module):
    """A branch asks for what was written into a tensor made beforehand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.a(x)
        state = torch.zeros(*x.shape[:2], 12, dtype=x.dtype)
        state += h
        y = self.b(h)
        return self.out(y.relu() if (state[:, 1:] * 2).abs().sum() > 0 else y.tanh())


def test_what_was_written_without_values_is_not_read():
    net = State().double().eval()
    small, plan = graphprune.shrink(net, X[:1], 0.5, return_plan=True, verify=False)
    assert graphprune.trace(net, X[:1]).real
    assert (small(X) - graphprune.zeroed(net, plan)(X)[0]).abs().max() < 1e-12 < (small(X) - net(X)).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_before_packed_sequences_is_cut_too(kind):
    net, lengths = Packed(kind).double().eval(), torch.tensor([3, 6, 1, 5])
    small, plan = graphprune.shrink(net, (X, lengths), 0.5, return_plan=True)
    assert (small.feed.out_features, small.a.hidden_size, small.b.hidden_size) == (8, 6, 5)
    other = (X.flip(0), torch.tensor([6, 2, 2, 4]))
    assert (small(*other) - graphprune.zeroed(net, plan)(*other)[0]).abs().max() < 1e-12 < (small(*other) - net(*other)).abs().max()


def test_a_packed_sequence_is_one_argument():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.out = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, packed):
            return self.out(self.a(packed)[0].data)

    net, packed = Net().double().eval(), pack_sequence([X[0, :5], X[1, :3]])
    small = graphprune.shrink(net, packed, 0.5, criterion="taylor", batches=[(packed, torch.zeros(8).long())], loss=F.cross_entropy)
    assert small.a.hidden_size == 8


@pytest.mark.parametrize("kind", KINDS)
def test_the_history_counts_what_profile_counts(kind):
    net = Stacked(kind)
    x = X.float()
    done = graphprune.iterate(net, x, {"macs": 0.5}, steps=1, train=lambda model, round: None, evaluate=lambda model: 1.0, progress=False)
    assert [row.macs for row in done.history] == [graphprune.profile(model, x).macs for model in (net, done.model)]


def test_advice_of_a_refused_score_can_be_followed():
    net, batches = Stacked(nn.GRU).double().eval(), [X]
    with pytest.raises(BadScore, match=r"graphprune\.scores\.bn_scale\.with_\(otherwise='l2'\)"):
        graphprune.shrink(net, X[:1], 0.5, criterion="bn_scale", batches=batches)
    assert graphprune.shrink(net, X[:1], 0.5, criterion=graphprune.scores.effect.with_(otherwise="l2"), batches=batches).a.hidden_size == 6
    with pytest.raises(AttributeError, match="no attribute 'affect'"):
        _ = graphprune.scores.affect


@pytest.mark.parametrize("kind", KINDS)
def test_effect_counts_what_recurrent_gates_read(kind):
    """A unit whose columns in every gate and reader are zero is the cheapest; one that only gates read is not."""
    net = Stacked(kind).double().eval()
    groups = graphprune.couple(graphprune.trace(net, X[:1]))
    with torch.no_grad():
        for group in groups:
            for name, axis in group.places:
                if axis == 1 and name.partition(".")[2]:  # columns
                    tensor = dict(net.named_parameters())[name]
                    tensor[:, torch.from_numpy(group.places[name, axis]) == 2] = 0
    scores = graphprune.score(groups, net, "effect", [X, X.flip(0)], progress=False)
    for group, found in zip(groups, scores, strict=True):
        assert found.argmin() == 2 and (found[torch.arange(group.size) != 2] > 0).all()
        assert found[2] < 1e-6 * found.median()


def test_a_group_without_readers_is_scored_by_its_weights_and_said_so():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.dead = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(4, 6)

        def forward(self, x):
            self.dead(x)
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    net, x = Dead().double(), torch.randn(32, 4, dtype=torch.float64)
    groups = graphprune.couple(graphprune.trace(net, x[:1]))
    if len(groups) > 1:
        with pytest.warns(UserWarning, match="norms of their weights"):
            scores = graphprune.score(groups, net, "effect", [x], progress=False)
        assert all((found >= 0).all() and found.sum() > 0 for found in scores)


def test_weights_inside_recurrent_layers_are_repaired():
    net = Stacked(nn.LSTM).double().eval()
    small = graphprune.shrink(net, X[:1], 0.5, calibration=[X, X + 1, X - 1, 2 * X])
    lines = [str(line) for line in small.graphprune_repairs]
    assert all(any(name in line and "->" in line for line in lines) for name in ("out.weight", "a.weight_ih_l0, and what", "b.weight_ih_l0, and what"))


class Once(nn.Module):
    """A recurrent layer, or a cell, that the example runs for a single step."""

    def __init__(self, inner, read):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.__dict__["read"] = inner, read
        width = getattr(inner, "proj_size", 0) or inner.hidden_size * (2 if getattr(inner, "bidirectional", False) else 1)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        return self.out(self.read(self.inner, x))


def last_state(layer, x):
    state = layer(x)[1]
    return (state[0] if isinstance(state, tuple) else state)[-1]


def own_state(layer, x):
    zeros = torch.zeros(layer.num_layers, x.shape[1], layer.hidden_size, dtype=x.dtype)
    return layer(x, (zeros, zeros) if isinstance(layer, nn.LSTM) else zeros)[0]


def cell_state(cell, x):
    state = cell(x[0])
    return state[0] if isinstance(state, tuple) else state


ONCE = {f"{kind.__name__} {options}": (kind, options, lambda layer, x: layer(x)[0]) for kind in KINDS for options in ({}, {"num_layers": 2})}
ONCE |= {f"{kind.__name__} both ways": (kind, {"bidirectional": True}, lambda layer, x: layer(x)[0]) for kind in KINDS}
ONCE |= {f"{kind.__name__} state": (kind, {"num_layers": 2}, last_state) for kind in KINDS}
ONCE |= {f"{kind.__name__} own state": (kind, {}, own_state) for kind in KINDS}
ONCE |= {f"{kind.__name__} unbatched": (kind, {}, lambda layer, x: layer(x[:, 0])[0]) for kind in KINDS}
ONCE |= {f"{kind.__name__} packed": (kind, {}, lambda layer, x: layer(pack_sequence(list(x.unbind(1))))[0].data) for kind in KINDS}
ONCE |= {kind.__name__: (kind, {}, cell_state) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)}
ONCE["projected"] = nn.LSTM, {"proj_size": 4}, lambda layer, x: layer(x)[0]


@pytest.mark.parametrize("kind, options, read", ONCE.values(), ids=ONCE)
def test_one_step_shows_what_many_do(kind, options, read):
    net = Once(kind(8, 12, **options), read).double().eval()
    small, plan = graphprune.shrink(net, X[:1], 0.5, return_plan=True)
    assert small.inner.hidden_size == 6
    for x in (X[:1], X):  # one step, and as many as there are
        zero = graphprune.zeroed(net, plan)(x)[0] if len(x) == 1 else emptied(net, plan)(x)
        assert (small(x) - zero).abs().max() < 1e-12 < (small(x) - net(x)).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_given_keeps_its_width(kind):
    """The caller makes it, and would have to know."""
    net = Once(kind(8, 12), lambda layer, given: layer(*given)[0]).double().eval()
    state = torch.randn(1, 6, 12, dtype=torch.float64)
    graph = graphprune.trace(net, ((X[:1], (state, state) if kind is nn.LSTM else state),))
    assert all(not name.startswith("inner") for group in graphprune.couple(graph) for name, _ in group.places)
