"""Ranks that each have a share of the data decide what one process with all of it decides; one that fails ends all; models in parts are taken whole."""

import json
import os
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
save_file({k: v.contiguous() for k, v in small.state_dict().items()}, f"{folder}/{rank}.safetensors")
open(f"{folder}/{rank}.json", "w").write(plan.to_json())
dist.destroy_process_group()
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
    for process, _, errors in ended(started(HEAD + script + TAIL, world, folder)):
        assert process.returncode == 0, errors
    plans = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    states = [load_file(folder / f"{rank}.safetensors") for rank in range(world)]
    assert all(plan["cuts"] == plans[0]["cuts"] for plan in plans)
    assert all(torch.equal(state[key], states[0][key]) for state in states for key in states[0])
    return plans[0]["cuts"], states[0]


@pytest.mark.parametrize("score", ["wanda_sp", "obs", "taylor"])
def test_shares_of_the_data_give_the_units_of_all_of_it(score, tmp_path):
    loss = "lambda out, batch: out.square().mean()" if score == "taylor" else "None"
    call = f"scores.on({score!r}, {{batches}}, {loss})"
    script = f"small, plan = graphprune.shrink(model, x, 0.5, score={call.format(batches='mine')}, repair=mine, return_plan=True)\n"
    small, plan = graphprune.shrink(net(), torch.randn(2, 8), 0.5, score=eval(call.format(batches="share(0, 1)")), repair=share(0, 1), return_plan=True)
    wanted = json.loads(plan.to_json())["cuts"]
    for world in (2, 4):
        cuts, state = run(script, world, tmp_path / str(world))
        assert cuts == wanted
        for key, tensor in small.state_dict().items():
            assert (tensor - state[key]).abs().max() <= CLOSE * max(1.0, float(tensor.abs().max()))
    alone = graphprune.plan(net(), torch.randn(2, 8), 0.5, score=eval(call.format(batches="share(1, 4)")))
    assert json.loads(alone.to_json())["cuts"] != wanted  # a share alone decides otherwise: the comparison can fail


def test_a_rank_without_data_takes_part(tmp_path):
    script = "mine = share(0, 1) if rank == 0 else []\nsmall, plan = graphprune.shrink(model, x, 0.5, score=scores.on('wanda_sp', mine), return_plan=True)\n"
    cuts, _ = run(script, 2, tmp_path)
    assert cuts == json.loads(graphprune.plan(net(), torch.randn(2, 8), 0.5, score=scores.on("wanda_sp", share(0, 1))).to_json())["cuts"]


FAILS = {
    "raises": ("mine = share(rank, world) if rank == 0 else iter(lambda: 1 / 0, 1)\n", "rank 1 of 2 failed"),
    "other weights": ("model[0].weight.data += rank\n", "other weights than rank 0"),
    "other shapes": ("model = net() if rank == 0 else net()[:2]\n", "other weights than rank 0"),
    "killed": ("mine = share(rank, world) if rank == 0 else iter(lambda: os.kill(os.getpid(), signal.SIGKILL), 1)\n", "cannot be reached"),
}


@pytest.mark.parametrize("kind", FAILS)
def test_a_rank_that_fails_ends_all(kind, tmp_path):
    change, text = FAILS[kind]
    began = time.monotonic()
    processes = started(HEAD + change + "small, plan = graphprune.shrink(model, x, 0.5, score=scores.on('wanda_sp', mine), return_plan=True)\n", 2, tmp_path)
    first, second = ended(processes)
    assert first[0].returncode not in (0, None) and second[0].returncode not in (0, None)
    assert text in first[2] and "RankFailed" in first[2]
    assert time.monotonic() - began < 120 and not list(tmp_path.glob("*.json"))


SPREAD = """
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (world,))
"""
WAYS = {
    "fsdp": "from torch.distributed.fsdp import fully_shard\nfor part in model[1:3]:\n    fully_shard(part, mesh=mesh)\nfully_shard(model, mesh=mesh)\n",
    "fsdp of the whole": "from torch.distributed.fsdp import fully_shard\nfully_shard(model, mesh=mesh)\n",
    "tensor parallel": (
        "from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module\n"
        "for part in model[1:3]:\n    parallelize_module(part, mesh, {'up': ColwiseParallel(), 'down': RowwiseParallel()})\n"
    ),
    "spread tensors": "from torch.distributed.tensor import distribute_module\nmodel = distribute_module(model, mesh)\n",
}


@pytest.mark.parametrize("way", WAYS)
def test_models_in_parts_are_taken_whole(way, tmp_path):
    script = SPREAD + WAYS[way] + "small, plan = graphprune.shrink(model, x, 0.5, return_plan=True)\nassert type(small) is nn.Sequential\n"
    script += "assert not any(hooks for module in small.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))\nsmall(x)\n"
    cuts, state = run(script, 2, tmp_path)
    small, plan = graphprune.shrink(net(), torch.randn(2, 8), 0.5, return_plan=True)
    assert cuts == json.loads(plan.to_json())["cuts"]
    assert all(torch.equal(tensor, state[key]) for key, tensor in small.state_dict().items())


def test_a_model_in_parts_is_not_cut_in_place(tmp_path):
    script = SPREAD + WAYS["fsdp"] + "graphprune.shrink(model, x, 0.5, inplace=True)\n"
    for process, _, errors in ended(started(HEAD + script, 2, tmp_path)):
        assert process.returncode != 0 and "fully_shard" in errors and "BadModel" in errors


def test_one_process_needs_no_group():
    assert not torch.distributed.is_initialized()
    _, plan = graphprune.shrink(net(), torch.randn(2, 8), 0.5, score=scores.on("wanda_sp", share(0, 1)), return_plan=True)
    assert plan.cuts
