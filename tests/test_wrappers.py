"""What holds a model without being one is told from it, and the error names where the model is."""

import pytest
import torch
from torch import fx, nn

import graphprune
from graphprune.errors import BadInput, BadModel

X = torch.zeros(1, 4)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Pipeline:
    def __init__(self):
        self.name, self.network = "pipeline", net()


class Pair:
    def __init__(self):
        self.encoder, self.decoder = net(), net()


class Tool(nn.Module):
    """Called with a file name, say, and returns results."""

    def __init__(self):
        super().__init__()
        self.model = net()

    def __call__(self, source, **options):
        return [self.model(torch.as_tensor(source))]


class Child(Tool):
    def forward(self, x):
        return self.model(x)


HOLDERS = [
    (Pipeline, r"\.network \(Sequential\)"),
    (Pair, r"several in \.encoder .*, \.decoder"),
    (Tool, r"\.model \(Sequential\): shrink that"),
    (Child, r"\.model"),
]


@pytest.mark.parametrize(("holder", "words"), HOLDERS)
def test_the_inner_module_is_named(holder, words):
    for call in (graphprune.shrink, graphprune.plan):
        with pytest.raises(BadModel, match=words):
            call(holder(), X)


class Task(nn.Module):
    """What trains a network, and leaves ``forward`` to others."""

    def __init__(self):
        super().__init__()
        self.network = net()

    def training_step(self, batch):
        return self.network(batch).sum()


class Passing(Task):
    def forward(self, *args):
        return super().forward(*args)


@pytest.mark.parametrize("holder", [Task, Passing, lambda: nn.ModuleDict({"network": net()})])
def test_the_inner_module_is_named_where_there_is_no_forward(holder):
    for call in (graphprune.shrink, graphprune.plan):
        with pytest.raises(BadInput, match=r"no forward of its own; it holds one in \.network \(Sequential\): shrink that"):
            call(holder(), X)
    with pytest.raises(BadInput) as error:  # control: a model whose own code is not there yet
        graphprune.shrink(nn.Module(), X)
    assert "it holds" not in str(error.value)


def test_what_holds_none_says_so_and_what_is_a_model_passes():
    for empty in (3, "net.pt", {"weight": X}, lambda x: x):
        with pytest.raises(BadModel, match=r"an nn.Module is needed$"):
            graphprune.shrink(empty, X)
    for model in (net(), fx.symbolic_trace(net()), nn.Sequential(net())):
        assert sum(p.numel() for p in graphprune.shrink(model, X).parameters()) < sum(p.numel() for p in model.parameters())


COMPILED = {
    "scripted": lambda: torch.jit.script(nn.Linear(8, 8)),
    "traced": lambda: torch.jit.trace(nn.Linear(8, 8), torch.zeros(1, 8)),
    "traced, of several": lambda: torch.jit.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.zeros(1, 8)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", COMPILED)
def test_a_part_that_torch_compiled_stays_whole(kind):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), COMPILED[kind](), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    small, plan = graphprune.shrink(model, x, 0.5, return_plan=True)
    assert (small[0].out_features, small[3].out_features) == (8, 3)
    kept = plan.cuts["3.weight"][0]
    with torch.no_grad():
        hidden = model[:5](x)
        assert torch.allclose(small(x), hidden[:, kept] @ model[5].weight[:, kept].T + model[5].bias, atol=1e-6)
