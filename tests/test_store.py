"""A saved model comes back bit-equal in a new process."""

import subprocess
import sys

import torch
from networks import Attention, Flat, Recurrent
from torch import nn

import graphprune

AGAIN = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_store import net
import graphprune
small = graphprune.load(sys.argv[1], base=net(seed=1))
torch.save(small(torch.ones(1, 2, 4, 4, dtype=torch.float64)), sys.argv[1] + "/out.pt")
"""


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 1), Attention(8, 4), Recurrent(8, 4), nn.BatchNorm2d(8), Flat(8)).double().eval()


def test_save_and_load(tmp_path):
    small = graphprune.shrink(net(0), torch.ones(1, 2, 4, 4, dtype=torch.float64), 0.5)
    graphprune.save(small, tmp_path)
    folder = str(__file__).rpartition("/")[0]
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path), folder], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), small(torch.ones(1, 2, 4, 4, dtype=torch.float64)))
