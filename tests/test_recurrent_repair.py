"""Recurrent layers are repaired: what remains of the state says what was removed, over the whole sequence."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.repair import sequential
from graphprune.repair.closed import distance
from graphprune.repair.recurrent import Cell, unrolled

KINDS = {
    "lstm": ("LSTM", {"num_layers": 2, "batch_first": True}),
    "both ways": ("LSTM", {"bidirectional": True, "batch_first": True}),
    "projected": ("LSTM", {"proj_size": 6}),
    "gru": ("GRU", {"num_layers": 2}),
    "gru both ways": ("GRU", {"bidirectional": True}),
    "no bias": ("GRU", {"bias": False, "batch_first": True}),
    "tanh": ("RNN", {"batch_first": True}),
    "relu": ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
}
CLEAR = {"lstm", "both ways", "gru", "tanh"}  # where the output's weight alone leaves much


class Recurrent(nn.Module):
    def __init__(self, kind, twin=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.cells = getattr(nn, kind)(5, 16, **options)
        self.out = nn.Linear((options.get("proj_size") or 16) * (2 if options.get("bidirectional") else 1), 3)
        with torch.no_grad():
            for name, parameter in self.cells.named_parameters():
                parameter.mul_(2)
                if twin:  # the second half of the units are the first half once more
                    rows = parameter.unflatten(0, (-1, 16)) if name.startswith(("weight_ih", "bias", "weight_hh")) else parameter
                    rows[:, 8:] = rows[:, :8]

    def forward(self, x):
        return self.out(self.cells(x)[0])


def walks(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 16, 5, generator=generator).cumsum(1).mul(0.4).tanh() for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_unrolled_is_that_of_torch(kind):
    name, options = KINDS[kind]
    module = getattr(nn, name)(5, 16, **{**options, "num_layers": 1}).double().eval()
    x = walks(1, 0)[0].double()
    wanted = module(x if module.batch_first else x.transpose(0, 1))[0]
    wanted = wanted if module.batch_first else wanted.transpose(0, 1)
    size = module.proj_size or 16
    first = [torch.zeros(16, size, dtype=torch.float64), torch.zeros(16, 16, dtype=torch.float64)][: 2 if name == "LSTM" else 1]
    ends = ("", "_reverse") if module.bidirectional else ("",)
    with torch.no_grad():
        found = torch.cat([unrolled(Cell(module, 0, end), x, first) for end in ends], 2)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_the_states_that_stay_say_more_than_the_output_alone_could(kind, monkeypatch):
    name, options = KINDS[kind]
    model, data, test = Recurrent(name, **options).eval(), walks(8, 1), walks(3, 2)
    small = graphprune.shrink(model, data[0], 0.5)
    better = graphprune.repair(small, model, None, data, progress=False)
    assert any("cells.weight_ih_l0, and what the state is read with" in line for line in better.graphprune_plan.lines)
    monkeypatch.setattr(sequential, "recurrences", lambda *_: [])  # control: the repair as it was, of the output's weight alone
    alone = graphprune.repair(small, model, None, data, progress=False)
    with torch.no_grad():
        errors = [distance(model, each, test) for each in (better, alone, small)]
    assert errors[0] < 1.05 * errors[1] < errors[2]
    assert kind not in CLEAR or errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_unit_that_another_one_repeats_is_not_missed(kind):
    """Of two equal units one goes: the gates of those that stay can say all that it said."""
    model, data, test = Recurrent(kind, twin=True, batch_first=True).double().eval(), [x.double() for x in walks(8, 1)], [x.double() for x in walks(2, 2)]
    score = lambda groups, *_: [torch.arange(float(g.units.max() + 1), 0, -1) for g in groups]  # noqa: E731
    small = graphprune.shrink(model, data[0], 0.5, score=score)
    better = graphprune.repair(small, model, None, data, progress=False)
    with torch.no_grad():
        assert distance(model, better, test) < 1e-3 < distance(model, small, test)  # the ridge remains


def test_packed_sequences_and_shared_layers_are_left_with_the_reason():
    class Twice(Recurrent):
        def forward(self, x):
            return self.out(self.cells(x)[0] + self.cells(x.flip(1))[0])

    model, data = Twice("GRU", batch_first=True).eval(), walks(4, 1)
    better = graphprune.repair(graphprune.shrink(model, data[0], 0.5), model, None, data, progress=False)
    assert any("cells.weight_ih_l0: inside a recurrent layer" in line for line in better.graphprune_plan.lines)
