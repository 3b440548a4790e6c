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
        if path.parent.name == "adapters":  # which ask the libraries by name, and which only the command line imports
            continue
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
        assert not re.search(r"resnet|densenet|swin|llama|convnext|yolo|mobilenet|timm|transformers", code, re.I), path


ORDER = {
    "": """errors version wording catalogue options quantities tables operations arrays tracing distributed coupling cost scores select names cutting budget
        timing repair granularity planning ranks automatic gradual formats deciding spelling shrink insight loop adapters checkpoint commands command
        __main__""",
    "operations": """labels notation contraction record assembly attention factories gates gradients indexing losses matrices moves norms pointwise
        pooling positions products quantising recurrent reductions spectral shapes laws""",
    "tracing": """sizes trees picks choices needs symbols bodies paths fused copies dice foreign holders reachable surroundings node members origin record
        filled recurrent outputs unused updates ways features states statistics summary graph functions shadow examples refused run trace rehearsal probe
        paced""",
    "coupling": "groups links sums lengths vocabulary",
    "scores": """order normalise data task registry fold norm similar others seen stages gates activations maps greedy waiting reconstruct start expansion
        __init__ attempts""",
    "cutting": "tokens parts gains outline schema describe plan vocabulary rewrite masks kernels passthrough undo apply compose expand zeroed sampled verify",
    "formats": "atomic tokens closing building config rebuilt configuring agreement advice huggingface misfit blocks expressed folder applied recipe",
    "budget": "targets space ledger problem bound descent optimal choose",
    "timing": "files runtimes measure fuse operators table align learnt latency",
    "repair": """moments solve censored sites rows pairs unseen predictions effect fitting recurrent sequential statistics belief free calibration closed
        imitation __init__""",
    "granularity": "spec weights heads entries ranking evidence positions liveness blocks remaining depth",
    "planning": "shares proof request limits uniform unread units wanted exact "
    "widths vocabulary selected trial depth entries listed together planner outcome overview",
    "units": "kind hidden experts expert_mlp heads query_heads head_dim mlp layers vocabulary",
    "insight": "study axes sensitivity tradeoff chart svg picture report",
    "adapters": "inputs exports models pretrained",
    "checkpoint": "shards stored resident scoring writing layout partial",
    "commands": "work app",
    "loop": "sparse optimizer schedule rounds history checkpoint iterate distill",
}


def test_imports_go_one_way():
    """Between the files and packages of the top, and inside every package; each file has its place."""
    import re
    from pathlib import Path

    root = Path(graphprune.__file__).parent
    for path in root.rglob("*.py"):
        package = "" if path.parent == root else path.parent.name
        dots = "." * len(path.relative_to(root).parts)
        if path.name == "__init__.py" and package in ("", *(p for p in ORDER if "__init__" not in ORDER[p])):
            continue
        top, inner = ORDER[""].split(), ORDER[package].split()
        mine = path.relative_to(root).parts[0].removesuffix(".py")
        for name in re.findall(rf"^from {re.escape(dots)}(\w+)(?:\.\w+)? import", path.read_text(), flags=re.M):
            assert top.index(name) < top.index(mine), f"{path} imports {name}"
        for name in re.findall(r"^from \.(\w*) import", path.read_text(), flags=re.M) if package else ():
            assert inner.index(name or "__init__") < inner.index(path.stem), f"{path} imports {name}"
