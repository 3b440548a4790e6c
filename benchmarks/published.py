"""Published one-shot methods for LLaMA-like language models, written from their papers, all under one count of parameters: what ``quality.py`` compares with.

- :func:`magnitude`: L2 norm of the coupled weights of a unit (Fang et al. 2023), the same ratio in every layer;
- :func:`wanda_sp`: ``Σ_o |W_oc| ‖X_c‖`` over the weight behind (Sun et al. 2024; An et al. 2024), the same ratio in every layer;
- :func:`flap`: ``Var(X_c) ‖W_c‖²``, standardised in every layer, one threshold over heads and hidden units weighed by parameters, and the means of what
  went as a bias (An et al. 2024); the biases are counted;
- :func:`block_influence`: the layers that turn the stream least go (Men et al. 2024);
- :func:`rotated`: the stream in its principal components, the last of which go (Ashkboos et al. 2024), with a rotation in every skip connection, which is
  counted, and an embedding apart from the head; or with one rotation everywhere, which needs neither.

Units are key-value heads with their queries, and hidden units of the feed-forward layers. One of each always stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import parameters
from torch import nn

Tensor = torch.Tensor
Kept = list[tuple[Tensor, Tensor]]  # for every layer the key-value heads and the hidden units that stay


class Sums:
    """Count, sum and sum of squares of rows, added up batch by batch; with ``products`` also of their outer products."""

    def __init__(self, products: bool = False) -> None:
        self.count, self.total, self.squares, self.outer = 0, torch.zeros(()), torch.zeros(()), torch.zeros(()) if products else None

    def add(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).double()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)
        if self.outer is not None:
            self.outer = self.outer + (rows.float().T @ rows.float()).double()

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp(min=0)


@dataclass(frozen=True)
class Seen:
    """What calibration text shows of every layer: inputs of the attention's output projection and of the down projection, the stream before each norm
    (after scaling to unit size), and how much a layer turns the stream."""

    heads: list[Sums]
    hidden: list[Sums]
    streams: list[Sums]
    influence: list[float]


@torch.no_grad()
def seen(model: nn.Module, batches: Iterable[dict]) -> Seen:
    """One pass over the batches."""
    layers = list(model.model.layers)
    heads, hidden = ([Sums() for _ in layers] for _ in range(2))
    streams = [Sums(products=True) for _ in range(2 * len(layers) + 1)]
    turned, count = [0.0] * len(layers), 0
    hooks = []
    unit = lambda x: x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)  # noqa: E731

    def turn(at: int) -> Any:
        def hook(_: nn.Module, args: tuple, out: Any) -> None:
            after = out[0] if isinstance(out, tuple) else out
            turned[at] += float((1 - torch.cosine_similarity(args[0], after, dim=-1)).mean())

        return hook

    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)] + [model.model.norm]
    for at, layer in enumerate(layers):
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, at=at: heads[at].add(args[0])))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, at=at: hidden[at].add(args[0])))
        hooks.append(layer.register_forward_hook(turn(at)))
    for at, norm in enumerate(norms):
        hooks.append(norm.register_forward_pre_hook(lambda _, args, at=at: streams[at].add(unit(args[0]))))
    for batch in batches:
        model.model(**batch)
        count += 1
    for hook in hooks:
        hook.remove()
    return Seen(heads, hidden, streams, [value / count for value in turned])


# -- widths ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA-like model: what a key-value head (with its queries) and a hidden unit weigh."""

    layers: int
    heads: int
    hidden: int
    head: int
    unit: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        config = model.config
        size, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        width = config.hidden_size
        return cls(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size, 2 * (shared + 1) * size * width, 3 * width)


def narrowed(model: nn.Module, kept: Kept, biases: Sequence[tuple[Tensor, Tensor]] | None = None) -> nn.Module:
    """A copy with the key-value heads and hidden units that stay, and what is added behind them."""
    small = copy.deepcopy(model)
    config = model.config
    size, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for at, (layer, (heads, hidden)) in enumerate(zip(small.model.layers, kept, strict=True)):
        attention, mlp = layer.self_attn, layer.mlp
        keys = (heads[:, None] * size + torch.arange(size)).flatten()
        queries = (heads[:, None] * size * shared + torch.arange(size * shared)).flatten()
        for linear, index, dim in (
            (attention.q_proj, queries, 0),
            (attention.k_proj, keys, 0),
            (attention.v_proj, keys, 0),
            (attention.o_proj, queries, 1),
            (mlp.gate_proj, hidden, 0),
            (mlp.up_proj, hidden, 0),
            (mlp.down_proj, hidden, 1),
        ):
            linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, index).clone())
            linear.out_features, linear.in_features = linear.weight.shape
        for linear, bias in zip((attention.o_proj, mlp.down_proj), biases[at] if biases else (), strict=False):
            linear.bias = nn.Parameter(bias.to(linear.weight))
    return small


def best_of(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count).indices.sort().values


def by_ratio(model: nn.Module, heads: list[Tensor], hidden: list[Tensor], target: float, cut_heads: bool) -> nn.Module:
    """The same ratio in every layer: heads to the nearest number (or all of them), hidden units as many as the count of parameters leaves."""
    shape = Shape.of(model)
    gone = parameters(model) - target
    ratio = gone / (shape.layers * (shape.heads * shape.head + shape.hidden * shape.unit))
    keep = max(1, round(shape.heads * (1 - ratio))) if cut_heads else shape.heads
    left = shape.layers * shape.hidden * shape.unit - (gone - shape.layers * (shape.heads - keep) * shape.head)
    units = min(int(left // shape.unit), shape.layers * shape.hidden)
    if units < shape.layers:
        raise ValueError("the hidden units alone do not meet the count")
    each, more = divmod(units, shape.layers)
    widths = [each + (at < more) for at in range(shape.layers)]
    return narrowed(model, [(best_of(a, keep), best_of(b, width)) for a, b, width in zip(heads, hidden, widths, strict=True)])


def per_head(scores: Tensor, model: nn.Module) -> Tensor:
    """Scores of the output projection's columns, (key-value heads, columns of one)."""
    return scores.reshape(model.config.num_key_value_heads, -1)


def magnitude(model: nn.Module, _: Seen, target: float) -> Iterator[nn.Module]:
    heads, hidden = [], []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        rows = [per_head(linear.weight.square().sum(1), model).sum(1) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        heads.append(sum(rows) + per_head(attention.o_proj.weight.square().sum(0), model).sum(1))
        hidden.append(mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1) + mlp.down_proj.weight.square().sum(0))
    yield from both_ways(model, heads, hidden, target)


def wanda_sp(model: nn.Module, stats: Seen, target: float) -> Iterator[nn.Module]:
    heads, hidden = [], []
    for layer, before, inside in zip(model.model.layers, stats.heads, stats.hidden, strict=True):
        columns = layer.self_attn.o_proj.weight.abs().sum(0) * before.squares.sqrt()
        heads.append(per_head(columns, model).sum(1))
        hidden.append(layer.mlp.down_proj.weight.abs().sum(0) * inside.squares.sqrt())
    yield from both_ways(model, heads, hidden, target)


def both_ways(model: nn.Module, heads: list[Tensor], hidden: list[Tensor], target: float) -> Iterator[nn.Module]:
    """Heads and hidden units, and hidden units alone: where a layer has few heads, no ratio comes near a share of them."""
    for cut_heads in (True, False):
        try:
            yield by_ratio(model, heads, hidden, target, cut_heads)
        except ValueError:
            continue


def flap(model: nn.Module, stats: Seen, target: float) -> Iterator[nn.Module]:
    shape = Shape.of(model)
    scores, costs = [], []
    for layer, before, inside in zip(model.model.layers, stats.heads, stats.hidden, strict=True):
        columns = standardised(layer.self_attn.o_proj.weight.double().square().sum(0) * before.variance)
        scores += [per_head(columns, model).mean(1), standardised(layer.mlp.down_proj.weight.double().square().sum(0) * inside.variance)]
        costs += [torch.full((shape.heads,), shape.head), torch.full((shape.hidden,), shape.unit)]
    safe = [torch.where(part == part.max(), torch.full_like(part, torch.inf), part) for part in scores]
    every, cost = torch.cat(safe), torch.cat(costs)
    order = every.argsort()
    biases = 2 * shape.layers * model.config.hidden_size
    enough = int((cost[order].cumsum(0) < parameters(model) + biases - target).sum()) + 1
    gone = torch.zeros(len(every), dtype=torch.bool)
    gone[order[:enough]] = True
    parts = gone.split([len(part) for part in scores])
    kept, added = [], []
    for at, layer in enumerate(model.model.layers):
        heads, hidden = parts[2 * at], parts[2 * at + 1]
        columns = heads.repeat_interleave(len(stats.heads[at].mean) // shape.heads)
        kept.append(((~heads).nonzero().ravel(), (~hidden).nonzero().ravel()))
        added.append(
            (
                layer.self_attn.o_proj.weight.double() @ (stats.heads[at].mean * columns),
                layer.mlp.down_proj.weight.double() @ (stats.hidden[at].mean * hidden),
            )
        )
    yield narrowed(model, kept, added)


def standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std()


# -- depth -----------------------------------------------------------------------------------------------------------------------


def block_influence(model: nn.Module, stats: Seen, target: float) -> Iterator[nn.Module]:
    order = torch.tensor(stats.influence).argsort().tolist()
    each = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    count = -int((target - parameters(model)) // each)
    small = copy.deepcopy(model)
    small.model.layers = nn.ModuleList(layer for at, layer in enumerate(small.model.layers) if at not in order[:count])
    for at, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = at
    small.config.num_hidden_layers = len(small.model.layers)
    yield small


# -- the stream ------------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A root-mean-square norm without weight, over as many entries as there were."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().sum(-1, keepdim=True) / self.size + self.eps).rsqrt()


class Turned(nn.Module):
    """A decoder layer with a rotation in both of its skip connections."""

    def __init__(self, layer: nn.Module, first: Tensor | None, second: Tensor | None) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention_type = getattr(layer, "attention_type", "full_attention")
        self.first, self.second = (None if turn is None else nn.Parameter(turn) for turn in (first, second))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out, _ = self.self_attn(self.input_layernorm(x), *args, **kwargs)
        x = out + (x if self.first is None else x @ self.first)
        out = self.mlp(self.post_attention_layernorm(x))
        return out + (x if self.second is None else x @ self.second)


def rotated(model: nn.Module, stats: Seen, target: float) -> Iterator[nn.Module]:
    pooled = sum((each.outer / each.count for each in stats.streams), torch.zeros(()))
    one = torch.linalg.eigh(pooled).eigenvectors.flip(1)
    apart = [torch.linalg.eigh(each.outer).eigenvectors.flip(1) for each in stats.streams]
    for turns, shared in ((apart, False), ([one] * len(apart), True)):
        low, high = 1, model.config.hidden_size
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if parameters(sliced(model, turns, middle, shared)) <= target else (low, middle)
        yield sliced(model, turns, low, shared)


@torch.no_grad()
def sliced(model: nn.Module, turns: list[Tensor], width: int, shared: bool) -> nn.Module:
    """The model in the first ``width`` components of ``turns``, one for every place in the stream; ``shared``: they are all the same."""
    small = copy.deepcopy(model)
    size = model.config.hidden_size
    cut = [turn[:, :width] for turn in turns]

    def reads(linear: nn.Module, norm: Tensor, turn: Tensor) -> None:
        linear.weight = nn.Parameter(((linear.weight.double() * norm) @ turn).float())
        linear.in_features = width

    def writes(linear: nn.Module, turn: Tensor) -> None:
        linear.weight = nn.Parameter((turn.T @ linear.weight.double()).float())
        linear.out_features = width

    for at, layer in enumerate(small.model.layers):
        here, middle, after = cut[2 * at], cut[2 * at + 1], cut[2 * at + 2]
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            reads(linear, layer.input_layernorm.weight.double(), here)
        writes(attention.o_proj, middle)
        for linear in (mlp.gate_proj, mlp.up_proj):
            reads(linear, layer.post_attention_layernorm.weight.double(), middle)
        writes(mlp.down_proj, after)
        layer.input_layernorm, layer.post_attention_layernorm = (Scaled(size, model.config.rms_norm_eps) for _ in range(2))
        skips = (None, None) if shared else ((here.T @ middle).float(), (middle.T @ after).float())
        small.model.layers[at] = Turned(layer, *skips)
    table, scale = model.model.embed_tokens.weight.double(), model.model.norm.weight.double()
    small.model.embed_tokens.weight = nn.Parameter((table @ cut[0]).float())
    small.model.norm = Scaled(size, model.config.rms_norm_eps)
    if shared and model.lm_head.weight is model.model.embed_tokens.weight:  # stays tied; the scale of the last norm, turned, goes between
        small.model.norm = nn.Sequential(small.model.norm, nn.Linear(width, width, bias=False))
        small.model.norm[1].weight = nn.Parameter(((cut[-1].T * scale) @ cut[-1]).float())
        small.lm_head.weight = small.model.embed_tokens.weight
        small.lm_head.in_features = width
    else:
        small.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        reads(small.lm_head, scale, cut[-1])
    return small


METHODS = {
    "magnitude": magnitude,
    "Wanda-sp": wanda_sp,
    "FLAP": flap,
    "block influence": block_influence,
    "SliceGPT": rotated,
}
