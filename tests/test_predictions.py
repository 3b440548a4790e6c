"""Models that predict entries of a vocabulary: they are told from others, and what counts are probabilities, not scores of entries that never come."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.coupling.vocabulary import predicted
from graphprune.repair.predictions import drawn, information

WORDS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.hidden = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, words):
        return torch.tanh(self.hidden(self.table(words))) @ self.table.weight.T


class Named(Tied):
    def forward(self, words):
        states = self.hidden(self.table(words))
        return {"states": states, "logits": nn.functional.linear(states, self.table.weight)}


class Typed(nn.Module):
    """Beside its words it looks up a type and the position of each, as encoders of text do."""

    def __init__(self, classes):
        super().__init__()
        self.words, self.types, self.places, self.head = nn.Embedding(11, 6), nn.Embedding(3, 6), nn.Embedding(5, 6), nn.Linear(6, classes)

    def forward(self, words):
        types = torch.zeros_like(words)
        return self.head(torch.tanh(self.words(words) + self.types(types) + self.places(torch.arange(words.shape[1]))))


def apart(entries=11):
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, entries))


@pytest.mark.parametrize(
    ("model", "entries"),
    [
        (Tied(), 11),
        (Named(), 11),
        (apart(), 11),
        (apart(7), None),  # classes of its own
        (nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8)), None),
        (Typed(classes=3), None),  # as many classes as there are types: rows of another table
        (Typed(classes=5), None),  # … or positions
        (Typed(classes=11), 11),
    ],
)
def test_a_vocabulary_is_the_table_in_which_inputs_are_looked_up(model, entries):
    assert predicted(graphprune.trace(model, WORDS)) == entries


def test_without_a_table_there_is_no_vocabulary():
    assert predicted(graphprune.trace(nn.Linear(11, 11), torch.randn(2, 11))) is None


@given(st.integers(2, 6), st.integers(0, 2**16))
def test_drawn_gradients_have_the_fisher_information_as_second_moment(entries, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(entries, generator=generator, dtype=torch.float64)
    probabilities = scores.softmax(0)
    rows = drawn(scores.expand(40000, entries), generator)
    fisher = torch.diag(probabilities) - torch.outer(probabilities, probabilities)
    assert torch.allclose(rows.T @ rows / len(rows), fisher, atol=0.02)
    assert torch.allclose(rows.sum(1), torch.zeros(len(rows), dtype=rows.dtype), atol=1e-5)
    wrong = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    assert not torch.allclose(wrong.T @ wrong / len(wrong), fisher, atol=0.02)


@given(st.integers(0, 2**16), st.floats(-5, 5))
def test_lost_information_is_none_for_the_same_probabilities_and_all_for_their_mean(seed, shift):
    scores = torch.randn(3, 20, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    mean = scores.flatten(0, 1).softmax(-1).mean(0).log().expand_as(scores)
    assert information([(scores, scores + shift)]) == pytest.approx(0.0, abs=1e-5)
    assert information([(scores[:1], mean[:1]), (scores[1:], mean[1:])]) == pytest.approx(1.0, abs=1e-4)
    assert 0 < information([(scores, scores / 2)]) < 1
    assert information([(scores, -scores)]) > 1


def cost_of_the_last_unit(entries):
    """What ``effect`` says of a unit that alone makes the scores of entry 0, which has no chance, against the mean of the others."""
    torch.manual_seed(0)
    net = apart(entries).double()
    with torch.no_grad():
        net[3].weight[:, -1] = 0.0
        net[3].weight[0] = 0.0
        net[3].weight[0, -1] = 4.0
        net[3].bias[0] = -40.0
    words = torch.randint(0, 11, (64, 5))
    groups = graphprune.couple(graphprune.trace(net, words[:1]))
    scores = graphprune.score(groups, net, "effect", list(words.split(8)), progress=False)
    (hidden,) = (each for group, each in zip(groups, scores, strict=True) if group.size == 8)
    return float(hidden[-1] / hidden[:-1].mean())


def test_what_only_moves_entries_without_a_chance_costs_nothing():
    assert cost_of_the_last_unit(11) < 1e-6
    assert cost_of_the_last_unit(7) > 0.1  # classes of its own: nothing says that they are probabilities
