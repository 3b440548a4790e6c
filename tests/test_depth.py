"""Depth: what goes is really gone, the result is the original with that contribution skipped, and scores are the written ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Attention, Residual
from torch import nn
from zoo_support import declare_operators

import graphprune
from graphprune.cutting.passthrough import Passthrough
from graphprune.cutting.verify import check
from graphprune.errors import BadLoss, BadPlan, BadScore, NeedsBatches, NotEqual, NothingToPrune, UnknownName
from graphprune.granularity.blocks import Modules
from graphprune.granularity.depth import scores_of

declare_operators()
IMAGE = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Basic(nn.Module):
    """Post-activation, in place, the way most image models write it."""

    def __init__(self, c, out=None):
        super().__init__()
        out = out or c
        self.conv1, self.bn1 = nn.Conv2d(c, out, 3, padding=1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)
        self.down = None if out == c else nn.Conv2d(c, out, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_()))
        y += x if self.down is None else self.down(x)
        return y.relu_()


class Pre(nn.Module):
    """A pre-norm transformer block that is called with extra arguments and returns a tuple."""

    def __init__(self, c):
        super().__init__()
        self.kind = "full"
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))

    def forward(self, mask, hidden=None):
        q, k, v = self.qkv(self.norm1(hidden)).chunk(3, -1)
        hidden = hidden + self.out(F.scaled_dot_product_attention(q, k, v) * mask)
        return hidden + self.mlp(self.norm2(hidden)), None


class Stack(nn.Module):
    def __init__(self, c=8, count=4):
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(8, c), nn.ModuleList(Pre(c) for _ in range(count)), nn.Linear(c, 3)

    def forward(self, x):
        hidden = self.stem(x)
        for layer in self.layers:
            assert layer.kind == "full"
            hidden = layer(1.0, hidden=hidden)[0]
        return self.head(hidden)


def images(seed=0):
    torch.manual_seed(seed)
    blocks = [nn.Sequential(Basic(4), Basic(4), Basic(4, 6)), nn.Sequential(Basic(6), Residual(6, 4), Attention(6, 4))]
    model = nn.Sequential(nn.Conv2d(2, 4, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # alive after every relu
            nn.init.uniform_(module.bias, 0.5, 1)
    return model


def stack(seed=0):
    torch.manual_seed(seed)
    return Stack().double().eval()


def skipped(model, name, x, place):
    """The oracle, written again: a hook that returns the input."""
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, k, out: (k["hidden"], None) if place else a[0], with_kwargs=True)
    try:
        return model(x)
    finally:
        handle.remove()


def removed(small):
    return [name for name, module in small.named_modules() if isinstance(module, Passthrough)]


@pytest.mark.parametrize(
    ("model", "x", "names"), [(images(), IMAGE, ["1.0", "1.1", "2.0", "2.1", "2.2"]), (stack(), TOKENS, [f"layers.{i}" for i in range(4)])]
)
def test_each_block_can_go_and_equals_the_skipped_original(model, x, names):
    found = [one.name for one in Modules(graphprune.trace(model, x), model).blocks()]
    assert found == names
    for name in names:
        ratio = 1 / len(names)
        small, plan = graphprune.shrink(model, x, ratio, granularity="block", criterion=lambda n, m, name=name: n != name, return_plan=True)
        assert removed(small) == [name] and plan.parts[0].name == name
        assert (small(x) - skipped(model, name, x, "layers" in name)).abs().max() < 1e-12
        assert (small(x) - model(x)).abs().max() > 1e-6  # the controls: the original, and another block
        other = names[names.index(name) - 1]
        assert (small(x) - skipped(model, other, x, "layers" in name)).abs().max() > 1e-6
        gone = {key for key in model.state_dict() if key.startswith(name + ".")}
        assert gone and list(small.state_dict()) == [key for key in model.state_dict() if key not in gone]
        assert type(small) is type(model)


def test_branches_go_with_what_only_they_needed():
    model = stack()
    found = [one.name for one in Modules(graphprune.trace(model, TOKENS), model).layers()]
    assert found == [f"layers.{i}.{part}" for i in range(4) for part in ("out", "mlp")] or found == [f"layers.{i}.mlp" for i in range(4)]
    small = graphprune.shrink(model, TOKENS, 0.25, granularity="layer", criterion=lambda n, m: 0 if n == "layers.2.mlp" else 1, ratios={"layers.0": 0.0})
    assert "layers.2.mlp" in removed(small) and "layers.2.norm2" in removed(small)
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, out: torch.zeros_like(out)) for n in removed(small) if n.endswith(("mlp", "out"))]
    wanted = model(TOKENS)
    for handle in handles:
        handle.remove()
    assert (small(TOKENS) - wanted).abs().max() < 1e-12 < (small(TOKENS) - model(TOKENS)).abs().max()


def test_branches_of_convolutions_and_hidden_layers():
    model = images()
    found = {one.name: [part.name for part in one.skips] for one in Modules(graphprune.trace(model, IMAGE), model).layers()}
    assert found["1.0.bn2"] == ["1.0.bn2", "1.0.conv1", "1.0.bn1", "1.0.conv2"]
    assert not any(name.startswith("1.2") for name in found)  # its first convolution changes the width: weights would be left over
    small = graphprune.shrink(model, IMAGE, 0.5, granularity="layer")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    small = graphprune.shrink(mlp, x, 0.5, granularity="layer", criterion=lambda n, m: int(n))
    assert removed(small) == ["2"] and list(small.state_dict())[2] == "4.weight"
    assert torch.allclose(small(x), mlp[3:](mlp[:2](x)))


def test_a_model_without_residuals_loses_elements_of_its_chain():
    part = lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())  # noqa: E731
    model = nn.Sequential(nn.Conv2d(2, 4, 1), part(), part(), part(), nn.Flatten(), nn.Linear(144, 2)).double()
    assert len(removed(graphprune.shrink(model, IMAGE, 2 / 3, granularity="block"))) == 2


def test_parallel_elements_are_no_chain():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

        def forward(self, x):
            return torch.stack([expert(x) for expert in self.experts])

    with pytest.raises(NothingToPrune, match="no block"):
        graphprune.shrink(Parallel().double(), TOKENS, granularity="block")


@pytest.mark.parametrize("criterion", ["influence", "taylor", "reconstruction"])
def test_a_block_that_does_nothing_goes_first(criterion):
    model = stack()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("layers.2") and name.split(".")[2] in ("out", "mlp"):
                parameter.mul_(1e-4)
    batches, loss = [(TOKENS, torch.zeros(2, 5, 3, dtype=torch.float64))], F.mse_loss
    small = graphprune.shrink(model, TOKENS, 0.25, granularity="block", criterion=criterion, batches=batches, loss=loss)
    assert removed(small) == ["layers.2"]
    assert (small(TOKENS) - model(TOKENS)).abs().max() < 1e-2


def test_scores_against_slow_references():
    model, x = stack(), TOKENS
    graph = graphprune.trace(model, x)
    pool = Modules(graph, model).blocks()
    seen = []
    handles = [layer.register_forward_hook(lambda m, a, k, out: seen.append((k["hidden"], out[0])), with_kwargs=True) for layer in model.layers]
    batches = [(x, torch.ones(2, 5, 3, dtype=torch.float64)), (2 * x[:1], torch.zeros(1, 5, 3, dtype=torch.float64))]
    cosines, slopes = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for inputs, target in batches:
        seen.clear()
        loss = F.mse_loss(model(inputs), target)
        grads = torch.autograd.grad(loss, [after for _, after in seen])
        for i, ((before, after), grad) in enumerate(zip(seen, grads, strict=True)):
            tokens = [1 - torch.dot(b, a) / (b.norm() * a.norm()) for b, a in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)]
            cosines[i] += sum(tokens) / len(tokens) / 2
            slopes[i] += (grad * (after - before)).sum() / 2
    for handle in handles:
        handle.remove()
    assert torch.allclose(torch.tensor(scores_of(graph, model, pool, "influence", batches), dtype=torch.float64), cosines, atol=1e-10)
    found = scores_of(graph, model, pool, "taylor", batches, F.mse_loss)
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), slopes.abs(), atol=1e-10)
    assert all(p.grad is None for p in model.parameters())


def test_greedy_reconstruction_is_the_best_step_each_time():
    model, x = stack(3), TOKENS
    small = graphprune.shrink(model, x, 0.5, granularity="block", criterion="reconstruction", batches=[x, x * 2])
    wanted = [model(x).detach(), model(x * 2).detach()]

    def error(names):
        handles = [model.get_submodule(n).register_forward_hook(lambda m, a, k, out: (k["hidden"], None), with_kwargs=True) for n in names]
        found = sum(float((model(b) - w).detach().square().sum() / w.square().sum()) for b, w in zip([x, x * 2], wanted, strict=True))
        for handle in handles:
            handle.remove()
        return found

    names = [f"layers.{i}" for i in range(4)]
    first = min(names, key=lambda n: error([n]))
    second = min((n for n in names if n != first), key=lambda n: error([first, n]))
    assert removed(small) == sorted([first, second])


def test_keep_ratios_training_saving(tmp_path):
    model = stack().train()
    small, plan = graphprune.shrink(model, TOKENS, 0.5, granularity="block", keep="layers.0", return_plan=True)
    assert "layers.0: stays, kept on request" in plan.explain() and "layers.0" not in removed(small)
    assert len(removed(small)) == 1 and small.training  # half of the three that may go, rounded down as everywhere
    small(TOKENS).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    graphprune.save(small, tmp_path)
    assert torch.equal(graphprune.load(tmp_path, stack(9))(TOKENS), small(TOKENS))
    assert graphprune.Plan.from_json(plan.to_json()) == plan
    assert graphprune.shrink(model, TOKENS, 0.25, granularity="block", inplace=True) is model and len(removed(model)) == 1


def test_bad_input():
    shrink = graphprune.shrink
    with pytest.raises(UnknownName, match="no score named"):
        shrink(stack(), TOKENS, granularity="block", criterion="fpgm")
    with pytest.raises(NeedsBatches, match="influence"):
        shrink(stack(), TOKENS, granularity="block", criterion="influence")
    with pytest.raises(NothingToPrune):
        shrink(nn.Linear(4, 4), torch.randn(1, 4), granularity="block")
    with pytest.raises(BadScore):
        shrink(stack(), TOKENS, granularity="block", criterion=lambda n, m: float("nan"))
    with pytest.raises(NothingToPrune, match="4 are kept"):
        shrink(stack(), TOKENS, granularity="block", keep="layers")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_public_language_models(kind):
    import transformers

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"bos_token_id": 1, "eos_token_id": 2}
    extra = {"llama": {"intermediate_size": 64, "num_key_value_heads": 2}, "gpt2": {}, "bert": {"intermediate_size": 64}}[kind]
    config = transformers.CONFIG_MAPPING[kind](**small, **extra)
    auto = transformers.AutoModelForSequenceClassification if kind == "bert" else transformers.AutoModelForCausalLM
    model, x = auto.from_config(config).double().eval(), {"input_ids": torch.randint(3, 60, (1, 8))}
    for granularity in ("block", "layer"):
        cut = graphprune.shrink(model, x, 0.5, granularity=granularity, example_kwargs={} if kind == "bert" else {"use_cache": False})
        count = [sum(p.numel() for p in m.parameters()) for m in (cut, model)]
        assert count[0] < count[1] and type(cut) is type(model)


@pytest.mark.parametrize(("name", "size"), [("deit_tiny_patch16_224", 224), ("resnet18", 64), ("mobilenetv3_small_100", 64), ("convnext_atto", 64)])
def test_public_image_models(name, size):
    import timm

    model, x = timm.create_model(name).eval(), torch.randn(1, 3, size, size)
    for granularity in ("block",) if "mobile" in name else ("block", "layer"):  # no branch of that one is a module of its own
        small = graphprune.shrink(model, x, 0.5, granularity=granularity)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_fused_encoder_layer_still_runs():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.h = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4, enable_nested_tensor=False), nn.Linear(8, 2)

        def forward(self, x):
            return self.h(self.e(x))

    model = Encoder().double().eval()
    for granularity in ("block", "layer"):
        small = graphprune.shrink(model, TOKENS, 0.5, granularity=granularity)
        with torch.no_grad():
            assert torch.isfinite(small(TOKENS)).all()
        assert len(removed(small)) >= 2


def test_bad_data_for_whole_blocks():
    shrink, ones = graphprune.shrink, torch.ones(2, 5, 3, dtype=torch.float64)
    model = stack()
    for criterion in ("influence", "reconstruction", "taylor"):
        with pytest.raises(NeedsBatches, match="at least one batch"):
            shrink(model, TOKENS, granularity="block", criterion=criterion, batches=[], loss=F.mse_loss, inplace=True)
    with pytest.raises(BadLoss, match="does not depend"):
        shrink(model, TOKENS, granularity="block", criterion="taylor", batches=[(TOKENS, ones)], loss=lambda out, y: y.sum(), inplace=True)
    with pytest.raises(BadScore, match="one number"):
        shrink(model, TOKENS, granularity="block", criterion=lambda name, module: torch.ones(3), inplace=True)
    assert not removed(model) and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_greedy_reconstruction_does_not_mind_the_order_of_the_batches():
    batches = [TOKENS * scale for scale in (1.0, 2.0, 3.0)]

    class Shuffled:
        turn = 0

        def __iter__(self):
            self.turn += 1
            return iter(batches[self.turn % 3 :] + batches[: self.turn % 3])

    first = graphprune.shrink(stack(3), TOKENS, 0.5, granularity="block", criterion="reconstruction", batches=batches)
    second = graphprune.shrink(stack(3), TOKENS, 0.5, granularity="block", criterion="reconstruction", batches=Shuffled())
    assert removed(first) == removed(second)


def test_a_ratio_that_removes_nothing_says_so():
    one = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"ratio 0.5 removes nothing: the only layer that can go is 2, and the last one always stays") as told:
        assert not removed(graphprune.shrink(one, torch.zeros(1, 4), 0.5, granularity="layer"))
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=r"4 blocks can go \(layers.0, layers.1, layers.2, …\), a ratio above 0.125 removes one"):
        assert not removed(graphprune.shrink(stack(), TOKENS, 0.12, granularity="block"))
    assert len(removed(graphprune.shrink(stack(), TOKENS, 0.126, granularity="block"))) == 1  # warnings are errors: none here, and none for ratio 0
    assert not removed(graphprune.shrink(stack(), TOKENS, 0.0, granularity="block"))


def test_removed_modules_cannot_be_expanded():
    model = stack()
    small = graphprune.shrink(model, TOKENS, 0.25, granularity="block")
    with pytest.raises(BadPlan, match=r"removed layers.\d, and no weights stand for a module that is gone; expand\(..., partial=True\)"):
        graphprune.expand(small)
    rest, gone = graphprune.expand(small, partial=True), removed(small)[0]
    assert set(model.state_dict()) - set(rest) == {name for name in model.state_dict() if name.startswith(f"{gone}.")}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in rest.items())


@pytest.mark.parametrize("what", ["layers", ("mlp", "layers")])
@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_examples_that_are_functions_hold_where_blocks_are_gone(what, scale):
    torch.manual_seed(0)
    model = nn.Sequential(*(Wide() for _ in range(4)), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 8)
    small, plan = graphprune.shrink(model, x, 0.5, what=what, examples=[lambda each: each(scale * x[:2])], return_plan=True)
    assert any(part.kind == "skip" for part in plan.parts)
    with pytest.raises(NotEqual):  # control: another model is seen by that example alone
        broken = copy.deepcopy(small)
        broken.register_forward_pre_hook(lambda _, args: (args[0] * (1 if len(args[0]) > 2 else 1.1),))
        check(graphprune.trace(model, x, examples=[lambda each: each(scale * x[:2])]), model, broken, plan)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())
