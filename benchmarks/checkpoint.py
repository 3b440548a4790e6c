"""Checkpoints that are shrunk file by file: seconds, peak memory, kills; and plans for large shapes without weights.

    python benchmarks/checkpoint.py --folder /tmp --gigabytes 6.4 --write docs/checkpoints.md
    python benchmarks/checkpoint.py --shapes

Seconds are CPU seconds of the process with one thread, imports and all; memory is the peak of its resident set. The files are removed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT
from zoo_support import declare_operators

FILES, HIDDEN, INNER, VOCABULARY = 24, 3072, 8192, 32000
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * 1024 + 3 * HIDDEN * INNER + 2 * HIDDEN
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES = {
    "8B": ("LlamaForCausalLM", {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                "num_attention_heads": 32, "num_key_value_heads": 8}),
    "70B": ("LlamaForCausalLM", {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                                 "num_attention_heads": 64, "num_key_value_heads": 8}),
    "235B-A22B": ("Qwen3MoeForCausalLM", {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
                                          "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
                                          "num_experts_per_tok": 8, "moe_intermediate_size": 1536}),
    "671B": ("DeepseekV3ForCausalLM", {}),
}  # fmt: skip

# Where torchvision's own operators cannot be loaded, transformers needs them declared.
DECLARED = "from zoo_support import declare_operators\ndeclare_operators()\n"
SHRINK = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
from graphprune import checkpoint
started = time.monotonic()
plan = checkpoint.shrink(sys.argv[1], sys.argv[2], ratio=0.25, what=sys.argv[3].split(","))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024, "wall": time.monotonic() - started, "cuts": len(plan.cuts)}))
"""
PLAN = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch, transformers
import graphprune
kind, numbers = json.loads(sys.argv[1])
kind = getattr(transformers, kind)
config = kind.config_class(**numbers)
with torch.device("meta"):
    model = kind._from_config(config, dtype=torch.bfloat16).eval()
before = resource.getrusage(resource.RUSAGE_SELF)
draw = lambda groups, model, batches: graphprune.scores.random(groups, model, seed=0)
plan = graphprune.plan(model, {"input_ids": torch.arange(3, 19)[None], "use_cache": False}, 0.25, score=draw, widths=graphprune.Widths(uniform=True))
text = plan.to_json()
used = resource.getrusage(resource.RUSAGE_SELF)
seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"cpu": seconds, "peak": used.ru_maxrss * 1024, "json": len(text), "groups": len(plan.outline.widths),
                  "params": sum(p.numel() for p in model.parameters())}))
"""


def made(folder: Path, gigabytes: float) -> int:
    """A checkpoint of a LLaMA-like model in FILES files; its bytes."""
    declare_operators()
    import torch
    import transformers

    from graphprune.checkpoint.writing import write

    layers = max(1, round((gigabytes * 5e8 - 2 * VOCABULARY * HIDDEN) / LAYER))
    numbers = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HIDDEN // 128, "num_key_value_heads": 8}
    facts = {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config = transformers.LlamaConfig(**facts, **numbers, **TOKENS)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    numbers_drawn = torch.randn(2**26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    names, each = list(shapes), -(-len(shapes) // FILES)
    places: dict[str, str] = {}
    for number in range(FILES):
        mine = names[number * each : (number + 1) * each]
        file = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        places |= dict.fromkeys(mine, file)

        def entries(name: str) -> list[torch.Tensor]:
            count, start = torch.Size(shapes[name]).numel(), int(hashlib.sha256(name.encode()).hexdigest()[:6], 16)
            drawn = numbers_drawn[start : start + 2**25]
            return [drawn[: min(len(drawn), count - at)] for at in range(0, count, len(drawn))]

        write(folder / file, {name: ("BF16", shapes[name]) for name in mine}, entries)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(path.stat().st_size for path in folder.iterdir())


def digest(folder: Path) -> str:
    told = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        told.update(path.name.encode())
        with open(path, "rb") as file:
            told.update(hashlib.file_digest(file, "sha256").digest())
    return told.hexdigest()


def child(script: str, *arguments: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", DECLARED + script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def outcome(process: subprocess.Popen) -> dict:
    text, _ = process.communicate()
    assert process.returncode == 0, f"ended with {process.returncode}"
    return json.loads(text.strip().splitlines()[-1])


def killed(folder: Path, out: Path, times: int, wall: float, what: str) -> int:
    """Start, kill after a random time, start again …; how many of the kills met a run that was under way."""
    dice, hits = random.Random(0), 0
    for _ in range(times):
        process = child(SHRINK, str(folder), str(out), what)
        try:
            process.wait(dice.uniform(0.2, 1.0) * wall)
        except subprocess.TimeoutExpired:
            hits += 1
            process.send_signal(signal.SIGKILL)
            process.wait()
        if out.exists():
            shutil.rmtree(out)
    outcome(child(SHRINK, str(folder), str(out), what))
    return hits


def table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def shapes(names: list[str]) -> str:
    rows = [["shape", "parameters", "groups", "plan and JSON, CPU s", "peak of the process, GB", "JSON, MB"]]
    for name in names:
        found = outcome(child(PLAN, json.dumps(SHAPES[name])))
        facts = [f"{found['params'] / 1e9:.1f} B", str(found["groups"]), f"{found['cpu']:.1f}", f"{found['peak'] / 1e9:.2f}", f"{found['json'] / 1e6:.1f}"]
        rows.append([name, *facts])
        print(rows[-1], flush=True)
    return table(rows)


def files(place: str, gigabytes: float, kills: int, what: str) -> str:
    top = Path(tempfile.mkdtemp(dir=place))
    try:
        assert shutil.disk_usage(top).free > 2.2e9 * gigabytes, "too little room"
        size = made(top / "whole", gigabytes)
        found = outcome(child(SHRINK, str(top / "whole"), str(top / "small"), what))
        wanted, left = digest(top / "small") if kills else "", sum(path.stat().st_size for path in (top / "small").iterdir())
        shutil.rmtree(top / "small")
        facts = [f"{size / 1e9:.2f} to {left / 1e9:.2f}", f"{found['cpu']:.1f}", f"{found['peak'] / 1e9:.2f}", f"{found['wall']:.0f}"]
        rows = [["GB in 24 files", "CPU s", "peak of the process, GB", "wall s"], facts]
        print(rows[-1], flush=True)
        text = table(rows)
        if kills:
            hits = killed(top / "whole", top / "small", kills, found["wall"], what)
            same = digest(top / "small") == wanted
            text += f"\n\nKilled {hits} times of {kills} starts and gone on with: {'the same bytes' if same else 'OTHER BYTES'}."
            print(text.splitlines()[-1], flush=True)
        return text
    finally:
        shutil.rmtree(top)


def commit() -> str:
    return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--gigabytes", type=float, default=6.4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--what", default="channel")
    parser.add_argument("--shapes", action="store_true", help="only the plans of large shapes")
    parser.add_argument("--names", nargs="*", default=list(SHAPES))
    parser.add_argument("--write", help="a page whose figures are replaced")
    asked = parser.parse_args()
    parts = {} if asked.shapes else {"files": files(asked.folder, asked.gigabytes, asked.kills, asked.what)}
    if asked.shapes:
        parts["shapes"] = shapes(asked.names)
    used, stamp = resource.getrusage(resource.RUSAGE_CHILDREN), time.strftime("%Y-%m-%d")
    if asked.write:
        page = Path(asked.write)
        text = page.read_text()
        for name, part in parts.items():
            begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            head, rest = text.split(begin)[0], text.split(end)[1]
            text = f"{head}{begin}\n{part}\n\nCommit {commit()}, {stamp}.\n{end}{rest}"
        page.write_text(text)
