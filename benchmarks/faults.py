"""How small a fault in a cut model the check still sees: faults are planted in cut models of many kinds, one at a time, and the check is asked.

    python benchmarks/faults.py --rows faults.jsonl --out docs/faults.md

Every model has random weights and statistics, so that nothing is degenerate, and loses half of every width. A fault changes one place, drawn at random;
numbers change by a share of their own size. Seen means that the check raises ``NotEqual``; nothing else may be raised.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import Rows, made_by
from families import build as family
from torch import nn
from zoo_support import declare_operators, randomise

import graphprune
from graphprune.cutting.verify import check
from graphprune.errors import NotEqual

PICTURES = "resnet18 mobilenet_v2 densenet121 efficientnet_b0 squeezenet1_0 shufflenet_v2_x1_0 regnet_x_400mf mnasnet1_0 googlenet convnext_tiny".split()
PATCHES = "vit_tiny_patch16_224 mixer_s16_224 resmlp_12_224 poolformer_s12 dla34".split()
WORDS = "bert gpt2 llama t5 whisper".split()
SHARES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers, self.head = nn.Embedding(50, 32), nn.LSTM(32, 48, 2, batch_first=True), nn.Linear(48, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.table(tokens))[0])


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == "lstm":
        return randomise(Recurrent()), torch.randint(0, 50, (1, 16))
    if name in WORDS:
        return family(name)
    if name in PATCHES:
        import timm

        return randomise(timm.create_model(name)), torch.randn(1, 3, 224, 224)
    from torchvision import models

    extra = {"init_weights": False} if name == "googlenet" else {}
    return randomise(models.get_model(name, weights=None, **extra)), torch.randn(1, 3, 224, 224)


# -- faults: each yields what it can change, as functions that do it ----------------------------------------------------------------

Fault = Callable[[], None]


def tensors(small: nn.Module, least: int, most: int = 9) -> list[torch.Tensor]:
    return [tensor for tensor in small.parameters() if least <= tensor.ndim <= most and tensor.numel() > 1 and tensor.is_floating_point()]


def entry(small: nn.Module, dice: random.Random, share: float, least: int, most: int) -> Iterator[tuple[torch.Tensor, Fault]]:
    """One number is off by a share of itself."""
    tensor = dice.choice(tensors(small, least, most))
    at = dice.randrange(tensor.numel())
    yield tensor, lambda: tensor.view(-1)[at].mul_(1 + share)


def scale(small: nn.Module, dice: random.Random, share: float) -> Iterator[tuple[torch.Tensor, Fault]]:
    """A whole weight is off by a share of itself."""
    tensor = dice.choice(tensors(small, 2))
    yield tensor, lambda: tensor.mul_(1 + share)


def order(small: nn.Module, dice: random.Random, axis: int) -> Iterator[tuple[torch.Tensor, Fault]]:
    """Two positions of one axis of one weight have changed places."""
    tensor = dice.choice([tensor for tensor in tensors(small, 2) if tensor.shape[axis] > 1])
    one, other = dice.sample(range(tensor.shape[axis]), 2)
    index = torch.arange(tensor.shape[axis])
    index[one], index[other] = other, one
    yield tensor, lambda: tensor.copy_(tensor.index_select(axis, index))


def unit(small: nn.Module, dice: random.Random, model: nn.Module, plan: Any) -> Iterator[tuple[torch.Tensor, Fault]]:
    """One tensor has kept another unit than the rest of its group: the entries of one that is gone."""
    whole, named = dict(model.named_parameters()), dict(small.named_parameters())
    places = [(name, axis) for name, axes in plan.cuts.items() if name in named for axis in axes if whole[name].ndim > 1 and axes[axis]]
    name, axis = dice.choice(places)
    gone = sorted({*range(whole[name].shape[axis])} - {*plan.cuts[name][axis]})
    at, other = dice.randrange(len(plan.cuts[name][axis])), dice.choice(gone)
    wrong = {**plan.cuts[name], axis: [other if number == at else kept for number, kept in enumerate(plan.cuts[name][axis])]}
    data = whole[name].detach()
    for along, kept in wrong.items():
        data = data.index_select(along, torch.tensor(kept))
    yield named[name], lambda: named[name].copy_(data)


def padding(small: nn.Module, dice: random.Random) -> Iterator[tuple[torch.Tensor, Fault]]:
    """A kernel reads one pixel beside: padded by one more on one side than on the other."""
    kernels = [tensor for tensor in tensors(small, 4) if tensor.shape[-1] > 1]
    if kernels:
        tensor = dice.choice(kernels)
        yield tensor, lambda: tensor.copy_(tensor.roll(1, -1))


def mask(small: nn.Module, dice: random.Random, model: nn.Module) -> Iterator[tuple[torch.Tensor, Fault]]:
    """One weight is as it was, in spite of its mask (of a plan that masks half of all weights)."""
    masked = [(name, module) for name, module in small.named_modules() if "weight" in getattr(module, "parametrizations", {})]
    name, module = dice.choice(masked)
    maker, whole = module.parametrizations["weight"], model.get_submodule(name).weight
    maker[0].mask.fill_(True)  # by itself no fault: the entries behind it are zero
    yield maker.original, lambda: maker.original.copy_(whole)


KINDS: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "one unit swapped for one that is gone": (lambda s, d, share, m, p: unit(s, d, m, p), (0.0,)),
    "two outputs of a weight in the wrong order": (lambda s, d, share, m, p: order(s, d, 0), (0.0,)),
    "two inputs of a weight in the wrong order": (lambda s, d, share, m, p: order(s, d, 1), (0.0,)),
    "a kernel off by one pixel": (lambda s, d, share, m, p: padding(s, d), (0.0,)),
    "a mask is missing": (lambda s, d, share, m, p: mask(s, d, m), (0.0,)),
    "a weight scaled": (lambda s, d, share, m, p: scale(s, d, share), SHARES),
    "one entry of a bias or norm": (lambda s, d, share, m, p: entry(s, d, share, 1, 1), SHARES),
    "one entry of a weight": (lambda s, d, share, m, p: entry(s, d, share, 2, 9), SHARES),
}


@contextmanager
def planted(tensor: torch.Tensor, fault: Fault) -> Iterator[None]:
    before = tensor.detach().clone()
    try:
        with torch.no_grad():
            fault()
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(before)


def seen(graph: Any, model: nn.Module, small: nn.Module, plan: Any) -> bool:
    try:
        check(graph, model, small, plan)
    except NotEqual:
        return True
    return False


def measure(name: str, repeats: int, rows: Rows) -> None:
    model, x = build(name)
    for what in ("channel", "weight"):
        graph = graphprune.trace(model, x)
        plan = graphprune.plan(model, x, 0.5, what=what)
        small = graphprune.apply(model, plan)
        if seen(graph, model, small, plan):
            raise AssertionError(f"{name}: the check complains about a model without a fault")
        for kind, (make, shares) in KINDS.items():
            if (kind == "a mask is missing") != (what == "weight"):
                continue
            for share in shares:
                counts = [0, 0]
                for repeat in range(repeats):
                    dice = random.Random(f"{name} {kind} {share} {repeat}")
                    for tensor, fault in make(small, dice, share, model, plan):
                        with planted(tensor, fault):
                            counts[0] += seen(graph, model, small, plan)
                        counts[1] += 1
                rows.add({"model": name, "kind": kind, "share": share, "seen": counts[0], "of": counts[1]})


def table(rows: list[dict]) -> list[str]:
    lines = ["| fault | " + " | ".join(f"{share:.0e}" for share in SHARES) + " |", "|---|" + "---|" * len(SHARES)]
    for kind, (_, shares) in KINDS.items():
        cells = []
        for share in shares:
            chosen = [row for row in rows if row["kind"] == kind and row["share"] == share]
            count, total = (sum(row[key] for row in chosen) for key in ("seen", "of"))
            cells.append(f"{100 * count / total:.0f} %" if total else "")
        cells += [""] * (len(SHARES) - len(cells))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="a file of rows, which a stopped run continues")
    parser.add_argument("--only", nargs="*", help="models to run")
    parser.add_argument("--repeats", type=int, default=5, help="faults of every kind and size in every model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    declare_operators()
    rows = Rows(options.rows)
    last = list(KINDS)[4]  # the kind that is planted last
    for name in options.only or [*PICTURES, *PATCHES, *WORDS, "lstm"]:
        if not any(row["model"] == name and row["kind"] == last for row in rows.rows):
            rows.rows = [row for row in rows.rows if row["model"] != name]
            measure(name, options.repeats, rows)
    models = list(dict.fromkeys(row["model"] for row in rows.rows))
    print("\n".join(table(rows.rows)))
    if options.out:
        made = made_by(f"python benchmarks/faults.py --out {options.out}", "torchvision", "timm", "transformers", rows=rows)
        total = sum(row["of"] for row in rows.rows)
        text = (
            f"{total} faults in {len(models)} cut models ({', '.join(models)}), float32. The first five kinds have no size and stand in the first column; the "
            "others change a number, or all numbers of a weight, by that share of their size. The check compares outputs, and calls a difference of "
            "0.001 of the largest entry equal (1e-8 in float64)."
        )
        options.out.write_text("\n".join(["# Faults that the check sees", "", made, "", text, "", *table(rows.rows), ""]))


if __name__ == "__main__":
    main()
