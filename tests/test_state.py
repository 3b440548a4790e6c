"""What a run leaves behind: a graph with fields, torch as it was, and nothing in memory that the model itself does not hold."""

import dataclasses

import torch
from torch import nn

import graphprune
from graphprune.tracing.sizes import Size, Uses

X = torch.randn(2, 8)


class Block(nn.Module):
    """Two layers, and whatever is done between them."""

    def __init__(self, between=lambda module, h: h):
        super().__init__()
        self.up, self.down, self.width = nn.Linear(8, 16), nn.Linear(16, 4), 16
        self.__dict__["between"] = between

    def forward(self, x):
        return self.down(self.between(self, self.up(x).relu()))


def test_a_graph_is_its_fields():
    graph = graphprune.trace(Block(lambda m, h: h.view(-1, m.width) * float(h.sum() > -1e9)), X)
    twin = dataclasses.replace(graph)
    names = {field.name for field in dataclasses.fields(graph)}
    assert set(graph.__dict__) <= names and graph.real and twin.parameters == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert graphprune.cost(graphprune.couple(twin)) == graphprune.cost(graphprune.couple(graph))


def test_sizes_note_their_uses_where_they_belong():
    one, two = Uses(), Uses()
    first, second = Size(4, ("attr", ("", "a")), one), Size(4, ("attr", ("", "b")), two)
    assert first * 2 == 8 and float(second) == 4.0
    assert [len(uses.outcomes) for uses in (one, two)] == [1, 0] and two.floats == [("attr", ("", "b"))] and not one.floats
