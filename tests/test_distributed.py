"""Ranks that each have a share of the data decide what one process with all of it decides; one that fails ends all; models in parts are taken whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graphprune
from graphprune import scores

HERE = str(Path(__file__).parent)
CLOSE = 1e-6

HEAD = """
import json, os, signal, sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[4])
from test_distributed import *
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
model, x, mine = net(), torch.randn(2, 8), share(rank, world)
"""
TAIL = """
dist.destroy_process_group()
"""
# What a call gave, for the test to read.
KEEP = """
def keep(name, small, plan):
    save_file({k: v.contiguous() for k, v in small.state_dict().items()}, f"{folder}/{name}.{rank}.safetensors")
    open(f"{folder}/{name}.{rank}.json", "w").write(plan.to_json())
"""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.Linear(16, 4)).eval()


def share(rank, world, count=8):
    return [torch.randn(12, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)][rank::world]


def started(script, world, folder):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", script]
    return [
        subprocess.Popen([*command, str(rank), str(world), str(folder), HERE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(world)
    ]


def ended(processes):
    return [(process, *process.communicate(timeout=300)) for process in processes]


def run(script, world, folder):
    for process, _, errors in ended(started(HEAD + KEEP + script + TAIL, world, folder)):
        assert process.returncode == 0, errors


def kept(name, world, folder):
    """What every rank got: the same."""
    plans = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(world)]
    states = [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(world)]
    assert all(plan["cuts"] == plans[0]["cuts"] for plan in plans)
    assert all(torch.equal(state[key], states[0][key]) for state in states for key in states[0])
    return plans[0]["cuts"], states[0]


def cuts(plan):
    return json.loads(plan.to_json())["cuts"]


def square(out, batch):
    return out.square().mean()


SCORES = {"wanda_sp": None, "obs": None, "taylor": square}
SHARES = """
for name, loss in SCORES.items():
    keep(name, *graphprune.shrink(model, x, 0.5, score=scores.on(name, mine, loss), repair=mine, return_plan=True))
mine = share(0, 1) if rank == 0 else []
keep("one", *graphprune.shrink(model, x, 0.5, score=scores.on("wanda_sp", mine), return_plan=True))
"""


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_the_data_give_the_units_of_all_of_it(world, tmp_path):
    run(SHARES, world, tmp_path)
    x = torch.randn(2, 8)
    for name, loss in SCORES.items():
        small, plan = graphprune.shrink(net(), x, 0.5, score=scores.on(name, share(0, 1), loss), repair=share(0, 1), return_plan=True)
        found, state = kept(name, world, tmp_path)
        assert found == cuts(plan)
        for key, tensor in small.state_dict().items():
            assert (tensor - state[key]).abs().max() <= CLOSE * max(1.0, float(tensor.abs().max()))
        alone = graphprune.plan(net(), x, 0.5, score=scores.on(name, share(1, 8), loss))
        assert cuts(alone) != found  # a share alone decides otherwise: the comparison can fail
    found, _ = kept("one", world, tmp_path)  # ranks without data take part
    assert found == cuts(graphprune.plan(net(), x, 0.5, score=scores.on("wanda_sp", share(0, 1))))


FAILS = """
import time
def fails(model, mine):
    began = time.monotonic()
    try:
        graphprune.shrink(model, x, 0.5, score=scores.on("wanda_sp", mine))
    except Exception as error:
        return f"{type(error).__name__}: {error} {time.monotonic() - began < 60}"
    return "nothing failed"
broken = net()
broken[0].weight.data += rank
found = [fails(net(), mine if rank == 0 else iter(lambda: 1 / 0, 1)), fails(broken, mine), fails(net() if rank == 0 else net()[:2], mine), fails(net(), mine)]
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
"""


def test_a_rank_that_fails_ends_all(tmp_path):
    run(FAILS, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0].startswith("RankFailed: rank 1 of 2 failed") and "ZeroDivisionError" in first[0] and first[0].endswith("True")
    assert second[0].startswith("ZeroDivisionError")
    for found in (first, second):
        assert all(text.startswith("RankFailed") and "other weights than rank 0" in text for text in found[1:3])
        assert found[3] == "nothing failed"  # and the next call goes as if nothing had been


def test_a_rank_that_is_killed_ends_all(tmp_path):
    began = time.monotonic()
    script = "mine = mine if rank == 0 else iter(lambda: os.kill(os.getpid(), signal.SIGKILL), 1)\ngraphprune.shrink(model, x, 0.5, repair=mine)\n"
    first, second = ended(started(HEAD + script, 2, tmp_path))
    assert first[0].returncode not in (0, None) and second[0].returncode == -signal.SIGKILL
    assert "RankFailed: a rank cannot be reached" in first[2] and time.monotonic() - began < 240


WAYS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
mesh = init_device_mesh("cpu", (world,))
def blocks(model):
    for part in model[1:3]:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh) or model
def split(model):
    for part in model[1:3]:
        parallelize_module(part, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model
ways = {"blocks": blocks, "whole": lambda model: fully_shard(model, mesh=mesh) or model, "split": split, "spread": lambda model: distribute_module(model, mesh)}
for name, way in ways.items():
    spread = way(net())
    small, plan = graphprune.shrink(spread, x, 0.5, return_plan=True)
    assert type(small) is nn.Sequential and [type(part).__name__ for part in small] == ["Linear", "Block", "Block", "Linear"]
    assert not any(hooks for module in small.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))
    small(x)
    keep(name, small, plan)
    try:
        graphprune.shrink(spread, x, 0.5, inplace=True)
    except graphprune.errors.BadModel as error:
        assert "fully_shard" in str(error)
    else:
        raise AssertionError("cut in place")
    name == "spread" or spread(x)  # it is as it was (tensors that are only spread take no plain input)
"""


def test_models_in_parts_are_taken_whole(tmp_path):
    run(WAYS, 2, tmp_path)
    small, plan = graphprune.shrink(net(), torch.randn(2, 8), 0.5, return_plan=True)
    for name in ("blocks", "whole", "split", "spread"):
        found, state = kept(name, 2, tmp_path)
        assert found == cuts(plan)
        assert all(torch.equal(tensor, state[key]) for key, tensor in small.state_dict().items())


def test_one_process_needs_no_group():
    assert not torch.distributed.is_initialized()
    assert graphprune.plan(net(), torch.randn(2, 8), 0.5, score=scores.on("wanda_sp", share(0, 1))).cuts
