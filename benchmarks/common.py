"""What several benchmarks need: the checkout on the path, counts by torch's own counter, rows that survive a stop, and what made a table.

Importing it puts the checkout and ``tests/`` first on the path, so that a benchmark measures the code beside it, installed or not.
"""

from __future__ import annotations

import contextlib
import copy
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of one call by torch's own counter, which knows nothing of graphprune; without oneDNN, whose recurrent layers it passes over."""
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def reestimated(model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch)) -> nn.Module:
    """A copy with batch-norm statistics from the batches, the usual way: cumulative averages in training mode."""
    model = copy.deepcopy(model)
    for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    return model.eval()


def torch_pruned(model: nn.Module, x: torch.Tensor, ratio: float, ignored: list[nn.Module], **options: Any) -> nn.Module:
    """Torch-Pruning's documented recipe, in place: L2 norms of groups, and the heads of fused query-key-value projections named, then set to what is left."""
    import torch_pruning as tp

    heads = {module.qkv: module.num_heads for module in model.modules() if hasattr(module, "qkv") and hasattr(module, "num_heads")}
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(model, x, importance=importance, pruning_ratio=ratio, ignored_layers=ignored, num_heads=heads, **options)
    pruner.step()
    for module in model.modules():
        if getattr(module, "qkv", None) in heads:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
    return model


class Rows:
    """Results, a line of JSON each, appended as they are made; what a stop cut off in the middle is left out when they are read again."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path else None
        self.rows: list[dict] = list(self._read())

    def _read(self) -> Iterator[dict]:
        for line in self.path.read_text().splitlines() if self.path and self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    def by(self, key: str) -> dict[Any, dict]:
        """The last row of every value of a column, without that column and the commit."""
        return {row[key]: {name: value for name, value in row.items() if name not in (key, "commit")} for row in self.rows if key in row}

    @property
    def commits(self) -> str:
        """The commits that made the rows, with how many rows each where there are several."""
        counts = Counter(row.get("commit", "not recorded") for row in self.rows)
        return ", ".join(f"{name} ({count} rows)" if len(counts) > 1 else name for name, count in counts.most_common())

    def add(self, row: dict, shown: bool = True) -> dict:
        row = {"commit": commit(), **row}
        self.rows.append(row)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if shown:
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
        return row


@cache
def commit() -> str:
    """The commit of the checkout, with a "+" when the package differs from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "graphprune") else "")


def made_by(command: str, *packages: str, rows: Rows | None = None) -> str:
    """The line under the title of a generated page: the command, the commit (of every row, where rows carry theirs), the machine and the versions."""
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return f"Made by `{command}` at commit {rows.commits if rows else commit()}; {processor()}; {', '.join(versions)}."


def processor() -> str:
    """The processor's name and its instruction sets that decide how fast torch is."""
    names, flags = [], ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            names += [value.strip()] if key.strip() == "model name" else []
            flags = value if key.strip() == "flags" else flags
    vectors = ["AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""]
    return ", ".join([names[0] if names else platform.machine(), *filter(None, vectors)])
