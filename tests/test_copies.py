"""Models that hold what cannot be copied (locks, handles): whatever works on a copy of a model takes them, and the copy shares only that."""

import contextlib
import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graphprune

X = torch.linspace(-1, 1, 24).reshape(6, 4)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 36).reshape(2, 3, 6, 6)


class Counter:
    """Counts under a lock."""

    def __init__(self):
        self.lock, self.calls = threading.Lock(), [0]


def a_lock():
    return threading.Lock()


def a_lock_inside():
    return Counter()


def locks_in_a_container():
    return {"locks": [threading.RLock(), threading.Condition()]}


def a_handle():
    return SimpleNamespace(stream=open(__file__))  # noqa: SIM115


class Layer(nn.Linear):
    """A layer with something beside its weights."""

    def __init__(self, rows, columns, beside):
        super().__init__(rows, columns)
        self.beside = beside


def chain(beside):
    torch.manual_seed(0)
    return nn.Sequential(Layer(4, 8, beside), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def images(beside):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), Layer(128, 2, beside)).eval()


def repaired(net):
    small, plan = graphprune.shrink(net, X, ratio=0.5, return_plan=True)
    return graphprune.repair(small, net, plan, [X, X.flip(0)], progress=False)


def scored(net):
    return graphprune.shrink(net, X, ratio=0.5, score="synflow")


def baked(net):
    return graphprune.bake(graphprune.shrink(net, X, ratio=0.5, granularity="weight"))


def measured(chained):
    net = images(chained[0].beside)
    graphprune.measure(net, IMAGES, seconds=0.02, memory_format=torch.channels_last, progress=False)
    return net


@pytest.fixture(params=[a_lock, a_lock_inside, locks_in_a_container, a_handle], ids=lambda make: make.__name__)
def beside(request):
    thing = request.param()
    yield thing
    with contextlib.suppress(AttributeError):
        thing.stream.close()


@pytest.mark.parametrize("work", [repaired, scored, baked, measured], ids=lambda work: work.__name__)
def test_what_works_on_a_copy_takes_models_that_cannot_be_copied_whole(beside, work):
    net = chain(beside)
    with pytest.raises(TypeError):  # the control: such a model has no deep copy
        copy.deepcopy(net)
    before = [tensor.clone() for tensor in net.parameters()]
    result = work(net)
    assert isinstance(result, nn.Module) and any(isinstance(module, Layer) for module in result.modules())
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), before, strict=True)) and net[0].beside is beside


def test_a_copy_shares_what_cannot_be_copied_and_nothing_else():
    net = chain(Counter())
    small = scored(net)
    assert small[0].beside is not net[0].beside and small[0].beside.lock is net[0].beside.lock
    small[0].beside.calls[0] += 1
    assert net[0].beside.calls == [0]
