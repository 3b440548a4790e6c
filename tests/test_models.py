"""Public architectures, none of which the package knows: cut equals zeroed in float64."""

import pytest
import torch
from zoo_support import declare_operators, randomise

import graphprune

declare_operators()
VISION = ["resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "swin_t", "vit_b_32"]
TIMM = ["convnext_atto", "deit_tiny_patch16_224", "xcit_nano_12_p16_224", "levit_128s", "skresnet18", "poolformer_s12"]


def exact(model, args, kwargs=None):
    small = graphprune.shrink(randomise(model).double(), args, 0.5, example_kwargs=kwargs)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    assert type(small) is type(model)


@pytest.mark.parametrize("name", VISION)
def test_torchvision(name):
    from torchvision import models

    exact(models.get_model(name, weights=None), torch.randn(1, 3, 224, 224, dtype=torch.float64))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    import timm

    exact(timm.create_model(name), torch.randn(1, 3, 224, 224, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_transformers(kind):
    import transformers

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"llama": {"intermediate_size": 64, "num_key_value_heads": 2}, "gpt2": {}, "bert": {"intermediate_size": 64}}[kind]
    config = transformers.CONFIG_MAPPING[kind](**small, **extra)
    auto = transformers.AutoModelForSequenceClassification if kind == "bert" else transformers.AutoModelForCausalLM
    exact(auto.from_config(config), {"input_ids": torch.randint(3, 60, (1, 8))}, {} if kind == "bert" else {"use_cache": False})


def test_nothing_in_the_package_knows_a_model():
    import re
    from pathlib import Path

    for path in Path(graphprune.__file__).parent.rglob("*.py"):
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
        assert not re.search(r"resnet|densenet|swin|llama|convnext|yolo|mobilenet|timm|transformers", code, re.I), path


def test_imports_go_one_way():
    import re
    from pathlib import Path

    order = """
        errors labels sizes notation picks rules moves assemble laws trees symbols copies shapes record runtimes measure unused trace probe groups
        links sums lengths cost fuse catalogue scores select targets operators table align space optimal budget names parts plan rewrite
        masks kernels passthrough undo apply compose repair zeroed latency verify weights heads request entries ranking evidence
        positions blocks depth granularity decide
        shrink sparse store optimizer schedule rounds history checkpoint iterate distill __main__
    """.split()
    root = Path(graphprune.__file__).parent
    for path in root.rglob("*.py"):
        if path == root / "__init__.py":
            continue
        inner = path.parent != root  # a package's files stand where the package does
        mine, dots = (path.parent.name, r"\.\.") if inner else (path.stem, r"\.")
        for name in re.findall(rf"^from {dots}(\w+)(?:\.\w+)? import", path.read_text(), flags=re.M):
            assert order.index(name) < order.index(mine), f"{path} imports {name}"


def test_imports_inside_a_package_go_one_way():
    import re
    from pathlib import Path

    orders = {
        "scores": """order normalise data task registry fold norm similar others seen gates activations maps greedy reconstruct start expansion
        __init__ attempts""".split(),
        "repair": "moments solve sites rows paced pairs effect sequential statistics belief free __init__".split(),
    }
    for package, order in orders.items():
        for path in (Path(graphprune.__file__).parent / package).glob("*.py"):
            for name in re.findall(r"^from \.(\w*) import", path.read_text(), flags=re.M):
                assert order.index(name or "__init__") < order.index(path.stem), f"{path} imports {name}"
