"""Recurrent layers fitted to what the original's gates say: inputs, states and projections of LSTM, GRU and plain cells.

The gates of a step are ``W x_t + U h_{t-1} + b``. Their targets are the original's, over the whole sequence; x comes from the repaired cut model and h
first from the original (teacher forcing), then from the cut layer itself as it was fitted before, so that it also learns to correct the states that it
really has (Ross, Gordon and Bagnell 2011). A fit is judged, on sequences kept out, by the states that the layer then runs through.

>>> cell = Cell(nn.GRU(3, 4).eval(), 0, "")
>>> x = torch.randn(2, 5, 3)
>>> states = unrolled(cell, x, (torch.zeros(2, 4),))
>>> torch.allclose(states, nn.GRU.forward(cell.module, x.transpose(0, 1))[0].transpose(0, 1), atol=1e-6)
True
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import nn

from ..cutting.plan import Plan
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.recurrent import RECURRENT
from .fitting import Repaired
from .moments import Moments, moments
from .solve import least_squares, residual

Tensor = torch.Tensor
RIDGES, ROUNDS = (1e-4, 1e-2, 1.0), 2  # of each round's fits; rounds on the layer's own states
STATES = {"LSTM": 2}  # first states, where they are more than one
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


@dataclass(frozen=True)
class Recurrence:
    """One call of a recurrent module: its name, and the values of its input and its first states."""

    step: int
    module: str
    x: Value
    states: tuple[Value, ...]


@dataclass(frozen=True)
class Fed:
    """What a call is given, of a batch in one model: inputs (batch, time, features) and the first states (layers and directions, batch, units)."""

    x: Tensor
    states: tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """One layer of a recurrent module in one direction (``end``: "" or "_reverse")."""

    module: nn.RNNBase
    layer: int
    end: str

    def weight(self, name: str) -> Tensor | None:
        """A parameter ("weight_ih", "bias_hh", "weight_hr" …), or None where the layer has none."""
        tensor = getattr(self.module, f"{name}_l{self.layer}{self.end}", None)
        return None if tensor is None else tensor.detach()

    def __getitem__(self, name: str) -> Tensor:
        """A parameter that the layer has."""
        tensor = self.weight(name)
        assert tensor is not None
        return tensor

    @property
    def index(self) -> int:
        """Its place among the first states."""
        return self.layer * (2 if self.module.bidirectional else 1) + (self.end != "")


def recurrences(graph: Graph, original: nn.Module, small: nn.Module) -> list[Recurrence]:
    """The calls whose weights are all those of one recurrent module, called once, on sequences that are not packed."""
    places: list[Recurrence] = []
    wholes, smalls = dict(original.named_modules()), dict(small.named_modules())
    for at, step in enumerate(graph.steps):
        values = [value for value in step.args if value is not None]
        leaves = [value.leaf for value in values if value.leaf in graph.leaves]
        name = _module(leaves)
        if step.name not in RECURRENT or name is None or not values or len(values[0].shape) != 3:
            continue
        wide, tight = wholes.get(name), smalls.get(name)
        if not isinstance(wide, nn.RNNBase) or not isinstance(tight, nn.RNNBase):
            continue
        states = tuple(values[1 : 1 + STATES.get(wide.mode, 1)])
        complete = {f"{name}.{leaf}".lstrip(".") for leaf in wide._flat_weights_names} == set(leaves)
        if complete and all(len(state.shape) == 3 and state.leaf not in graph.leaves for state in states):
            places.append(Recurrence(at, name, values[0], states))
    calls = Counter(place.module for place in places)
    return [place for place in places if calls[place.module] == 1]


def _module(leaves: Sequence[str]) -> str | None:
    """The one module that some parameters belong to."""
    names = {leaf.rpartition(".")[0] for leaf in leaves if not leaf.startswith("<")}
    return names.pop() if len(names) == 1 else None


def unrolled(cell: Cell, x: Tensor, first: Sequence[Tensor]) -> Tensor:
    """The layer's states (batch, time, units) of x (batch, time, features)."""
    weights = [tensor for name in WEIGHTS if (tensor := cell.weight(name)) is not None]
    call = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}[cell.module.mode]
    states: Any = [state[None].contiguous() for state in first]
    out = call(x.flip(1) if cell.end else x, states if len(states) > 1 else states[0], weights, cell.module.bias, 1, 0.0, False, False, True)[0]
    return out.flip(1) if cell.end else out


def projected(cell: Cell, x: Tensor, before: Tensor, memory: Tensor) -> Tensor:
    """What the projection of an LSTM layer reads (batch, time, units), of x, the states that each step reads, and the first memory (batch, units)."""
    gates = nn.functional.linear(x, cell["weight_ih"], cell.weight("bias_ih")) + nn.functional.linear(before, cell["weight_hh"], cell.weight("bias_hh"))
    i, f, g, o = gates.chunk(4, 2)
    kept, new, found = f.sigmoid(), i.sigmoid() * g.tanh(), torch.empty_like(o)
    times = range(x.shape[1])
    for t in reversed(times) if cell.end else times:
        memory = kept[:, t] * memory + new[:, t]
        found[:, t] = o[:, t].sigmoid() * memory.tanh()
    return found


def fit_recurrence(name: str, wide: nn.RNNBase, tight: nn.RNNBase, plan: Plan, runs: list[tuple[Fed, Fed]], fits: int) -> list[Repaired]:
    """Fit the layers of ``tight`` in place, one after the other; ``runs``: what both models give to the call, batch by batch, the first ``fits`` to fit on."""
    done: list[Repaired] = []
    pairs = [(_timed(wide, one), _timed(tight, two)) for one, two in runs]
    for layer in range(wide.num_layers):
        outs: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in pairs]
        for end in ("", "_reverse") if wide.bidirectional else ("",):
            work = _Layer(name, Cell(wide, layer, end), Cell(tight, layer, end), plan, pairs, fits)
            done += work.fit()
            for (over, under), (one, two) in zip(outs, work.outputs(), strict=True):
                over.append(one)
                under.append(two)
        pairs = [(Fed(torch.cat(over, 2), one.states), Fed(torch.cat(under, 2), two.states)) for (over, under), (one, two) in zip(outs, pairs, strict=True)]
    return done


def _timed(module: nn.RNNBase, run: Fed) -> Fed:
    """Batch first."""
    return Fed(run.x if module.batch_first else run.x.transpose(0, 1), run.states)


class _Layer:
    """One layer in one direction of both models, and what comes to it."""

    def __init__(self, name: str, wide: Cell, tight: Cell, plan: Plan, pairs: list[tuple[Fed, Fed]], fits: int) -> None:
        self.name, self.wide, self.tight, self.pairs, self.fits = name, wide, tight, pairs, fits
        self.rows, self.kept = (self.positions(plan, leaf, axis) for leaf, axis in (("weight_ih", 0), ("weight_hh", 1)))
        self.start = self.copied()
        self.targets = [self.run(wide, one) for one, _ in pairs]
        states = [self.before(one, target, wide) for (one, _), target in zip(pairs, self.targets, strict=True)]
        self.gates = [(self.said(one.x, "ih"), self.said(state, "hh")) for (one, _), state in zip(pairs[:fits], states[:fits], strict=True)]

    def positions(self, plan: Plan, leaf: str, axis: int) -> Tensor | slice:
        kept = plan.cuts.get(f"{self.name}.{leaf}_l{self.wide.layer}{self.wide.end}".lstrip("."), {}).get(axis)
        return slice(None) if kept is None else torch.tensor(kept)

    @staticmethod
    def run(cell: Cell, given: Fed) -> Tensor:
        return unrolled(cell, given.x, [state[cell.index] for state in given.states])

    def outputs(self) -> list[tuple[Tensor, Tensor]]:
        """What both layers give to the next."""
        return list(zip(self.targets, self.states(), strict=True))

    def states(self) -> list[Tensor]:
        """Of the cut layer as it is."""
        return [self.run(self.tight, two) for _, two in self.pairs]

    def errors(self) -> tuple[float, float]:
        """Of the states as they are against those of the original that stay, and what a weight behind them, fitted too, would miss of all of the original's.

        Both squared, over the variance, on sequences kept out where there are some.
        """
        states = self.states()
        parts = [moments(*(t.flatten(0, 1)[None] for t in (state, target))) for state, target in zip(states, self.targets, strict=True)]
        known, at = reduce(add, parts[: self.fits]), self.fits if self.fits < len(parts) else 0
        checks = reduce(add, parts[at:])
        missed = residual(checks, *least_squares(known, RIDGES[0]))
        apart = [(state - target[..., self.kept]).square().sum(dtype=torch.float64) for state, target in zip(states[at:], self.targets[at:], strict=True)]
        spread = checks.yy[0].clamp(min=torch.finfo(torch.float64).tiny)
        return float(sum(apart) / spread[self.kept].sum()), float(missed.sum() * checks.count / spread.sum())

    def fit(self) -> list[Repaired]:
        """Fits on the original's states, then on those of the best fit so far; the nearest stays, unless what follows can do better with the cut."""
        before, bar = self.errors()
        if before < 1e-8:  # nothing before this layer, and nothing of it, was cut
            return []
        best, kept = before, self.start
        for round in range(1 + ROUNDS):
            self.restore(kept)
            data = self.moments(self.states() if round else [target[..., self.kept] for target in self.targets])
            for ridge in RIDGES:
                self.put(data, ridge)
                error, missed = self.errors()
                if error < best and missed <= bar:
                    best, kept = error, self.copied()
        self.restore(kept)
        place = f"{self.name}.weight_ih_l{self.wide.layer}{self.wide.end}".lstrip(".")
        return [Repaired("least-squares", f"{place}, and what the state is read with", before, best, best < before)]

    def copied(self) -> dict[str, Tensor]:
        tensors = {name: self.tight.weight(name) for name in WEIGHTS}
        return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tight[name].copy_(tensor)

    def moments(self, states: list[Tensor]) -> dict[str, Moments]:
        """Of every fit: [x, h] against the gates; of a GRU's candidate x and h apart, since a gate stands between; and of the projection."""
        found: dict[str, list[Moments]] = {}
        for (_, two), target, (given, own), state in zip(self.pairs, self.targets, self.gates, states, strict=False):  # as far as the gates go
            under = self.before(two, state, self.tight)
            rows: dict[str, tuple[Tensor, Tensor]] = {"gates": (torch.cat([two.x, under], 2), given + own)}
            if self.wide.module.mode == "GRU":
                share = given.shape[2] * 2 // 3
                rows = {
                    "gates": (rows["gates"][0], rows["gates"][1][..., :share]),
                    "input": (two.x, given[..., share:]),
                    "state": (under, own[..., share:]),
                }
            if self.wide.weight("weight_hr") is not None:
                memory = two.states[1][self.tight.index]
                rows["projection"] = (projected(self.tight, two.x, under, memory), target[..., self.kept])
            for name, (x, y) in rows.items():
                found.setdefault(name, []).append(moments(x.flatten(0, 1)[None], y.flatten(0, 1)[None]))
        return {name: reduce(add, parts) for name, parts in found.items()}

    @staticmethod
    def before(given: Fed, states: Tensor, cell: Cell) -> Tensor:
        """The state that each step reads."""
        first = given.states[0][cell.index][:, None]
        return torch.cat([states[:, 1:], first], 1) if cell.end else torch.cat([first, states[:, :-1]], 1)

    def said(self, x: Tensor, name: str) -> Tensor:
        """What the original's input or state says to the gates that are left."""
        return nn.functional.linear(x, self.wide[f"weight_{name}"], self.wide.weight(f"bias_{name}"))[..., self.rows]

    def put(self, data: dict[str, Moments], ridge: float) -> None:
        """Write the fits, with a ridge towards the weights as they were cut, into the layer."""
        cell, start, biased = self.tight, self.start, "bias_ih" in self.start
        gates, inputs = data["gates"].y.shape[1], start["weight_ih"].shape[1]
        for name, fitted in data.items():
            if name == "projection":
                cell["weight_hr"].copy_(least_squares(fitted, ridge, start["weight_hr"][None], False)[0][0])
                continue
            rows = slice(0, gates) if name == "gates" else slice(gates, None)
            both = torch.cat([start["weight_ih"][rows], start["weight_hh"][rows]], 1)
            prior = {"gates": both, "input": both[:, :inputs], "state": both[:, inputs:]}[name]
            weight, bias = least_squares(fitted, ridge, prior[None], biased)
            if name != "state":
                cell["weight_ih"][rows] = weight[0, :, :inputs].to(prior)
            if name != "input":
                cell["weight_hh"][rows] = weight[0, :, -start["weight_hh"].shape[1] :].to(prior)
            if biased:
                cell["bias_hh" if name == "state" else "bias_ih"][rows] = bias[0].to(prior)
                if name == "gates":
                    cell["bias_hh"][rows] = 0
