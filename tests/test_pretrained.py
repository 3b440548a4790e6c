"""A cut model of a public family comes back through its own save_pretrained and from_pretrained, equal to the last bit, or says at once why it cannot."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import CAUSAL, FAMILIES, build, ids, result, written
from torch import nn

import graphprune
from graphprune.errors import BadConfig
from graphprune.formats.building import built_once
from graphprune.formats.closing import closed
from graphprune.formats.config import compare, search

UNIFORM, FREE = graphprune.Widths(uniform=True), graphprune.Widths(uniform=False)
# What a ratio of one half leaves in the configuration, as uniform widths.
WIDTHS = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},  # the root of hidden_size is a factor
    "gpt2": {"n_embd": 16, "n_head": 4, "n_layer": 3},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 4, "word_embed_proj_dim": 16},
    "phi3": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},  # whole heads go: those that stay fill hidden_size
    "qwen3_moe": {"hidden_size": 16, "moe_intermediate_size": 12, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mixtral": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4},
    "bert": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4},
    "vit": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4},
    "deit": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4},
    "t5": {"d_model": 32, "d_ff": 32, "num_heads": 4, "d_kv": 4},
}
DEPTH = {"llama": "num_hidden_layers", "gpt2": "n_layer", "qwen3_moe": "num_hidden_layers", "gemma3": "num_hidden_layers", "bert": "num_hidden_layers"}


def again(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def same(small, back, inputs):
    assert torch.equal(result(small, inputs), result(back, inputs))
    words = written(small, inputs)
    assert words is None or torch.equal(words, written(back, inputs))


@pytest.mark.parametrize("name", WIDTHS)
def test_uniform_widths_come_back(name, tmp_path):
    model, inputs = build(name)
    small = graphprune.shrink(model, inputs, 0.5, widths=UNIFORM)
    back = again(small, tmp_path)
    same(small, back, inputs)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: back.config.to_dict()[key] for key in WIDTHS[name]} == WIDTHS[name]
    assert all(config.get(key, value) == value for key, value in WIDTHS[name].items())
    assert {key: small.config.to_dict()[key] for key in WIDTHS[name]} == WIDTHS[name]  # the model says so as well
    assert type(small) is type(model) and model.config.to_dict() == build(name)[0].config.to_dict()


@pytest.mark.parametrize("name", DEPTH)
def test_blocks_that_are_gone_are_closed_up(name, tmp_path):
    model, inputs = build(name)
    small = graphprune.shrink(model, inputs, 0.5, what="block")
    kept = sum(type(layer).__name__ != "Passthrough" for layer in next(m for m in small.modules() if isinstance(m, nn.ModuleList)))
    back = again(small, tmp_path)
    same(small, back, inputs)
    config = back.config.to_dict()
    assert 0 < kept == config[DEPTH[name]] < 3 and len(config.get("layer_types") or range(kept)) == kept
    for module in back.modules():
        assert getattr(module, "layer_idx", 0) is None or getattr(module, "layer_idx", 0) < kept


def test_depth_and_then_widths_and_a_new_process(tmp_path):
    model, inputs = build("llama")
    small = graphprune.shrink(model, inputs, 0.4, what="block")
    small = graphprune.shrink(small, inputs, 0.5, widths=UNIFORM)
    small.save_pretrained(tmp_path / "model")
    torch.save(result(small, inputs), tmp_path / "result.pt")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from families import *; import transformers\n"
        f"back = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}).eval()\n"
        f"assert torch.equal(result(back, {{'input_ids': ids()}}), torch.load({str(tmp_path / 'result.pt')!r}))\n"
        "assert 'graphprune' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name, options", [
    ("llama", {"scope": "global"}),  # another width in every layer
    ("gemma3", {"widths": FREE}),  # a factor
    ("gpt_neox", {"what": "head"}),
    ("bert", {"what": "layer"}),  # half a block
], ids=str)  # fmt: skip
def test_what_no_configuration_says_is_refused_at_once(name, options, tmp_path):
    model, inputs = build(name)
    small = graphprune.shrink(model, inputs, 0.5, score=graphprune.scores.random.with_(seed=0) if "what" not in options else "l2", **options)
    before = small.config.to_dict()
    with pytest.raises(BadConfig, match=r"uniform=True.*graphprune.save"):
        small.save_pretrained(tmp_path / "hugging")
    assert not (tmp_path / "hugging").exists() and before == model.config.to_dict()
    graphprune.save(small, tmp_path)
    assert torch.equal(result(graphprune.load(tmp_path, build(name)[0]).eval(), inputs), result(small, inputs))


def test_the_guard_goes_where_the_model_goes(tmp_path):
    model, inputs = build("gemma3")
    small = graphprune.shrink(model, inputs, 0.5, widths=FREE)
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), graphprune.shrink(small, inputs, 0.25, widths=FREE)):
        assert copied.__dict__["save_pretrained"].model is copied
        with pytest.raises(BadConfig):
            copied.save_pretrained(tmp_path)
    assert "save_pretrained" not in model.__dict__ and "save_pretrained" not in type(small).__dict__
    model.save_pretrained(tmp_path)  # the original's own


@pytest.mark.parametrize("options", [{"widths": UNIFORM}, {"what": "block"}], ids=["widths", "blocks"])
def test_what_graphprune_saved_can_be_saved_by_its_class(options, tmp_path):
    model, inputs = build("llama")
    small = graphprune.shrink(model, inputs, 0.5, **options)
    graphprune.save(small, tmp_path / "plan")
    loaded = graphprune.load(tmp_path / "plan", build("llama")[0]).eval()
    assert loaded.config.to_dict() == small.config.to_dict()
    same(small, again(loaded, tmp_path / "hugging"), inputs)
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    del plan["sha256"]
    nowhere, strange = ({"changes": [[path, 3]], "fewer": [], "reason": ""} for path in (["nowhere", "inner"], [[]]))
    for broken in ({"changes": 3}, nowhere, [], strange):
        (tmp_path / "plan" / "plan.json").write_text(json.dumps(plan | {"configuration": broken}))
        with pytest.raises(graphprune.errors.BadPlan):
            graphprune.load(tmp_path / "plan", build("llama")[0])


def test_a_plan_alone_is_guarded(tmp_path):
    model, inputs = build("llama")
    for options in ({"what": "block"}, {}):
        chosen = graphprune.plan(model, inputs, 0.5, **options)
        with pytest.raises(BadConfig, match="a plan alone"):
            graphprune.apply(model, chosen).save_pretrained(tmp_path)


def test_changed_by_other_hands(tmp_path):
    model, inputs = build("llama")
    small = graphprune.shrink(model, inputs, 0.5)
    small.lm_head = nn.Linear(16, 5)
    with pytest.raises(BadConfig, match="lm_head.weight axis 0 has 5"):
        small.save_pretrained(tmp_path)


def test_masks_have_to_be_baked(tmp_path):
    model, inputs = build("llama")
    small = graphprune.shrink(model, inputs, 0.5, what="weight")
    with pytest.raises(BadConfig, match="bake"):
        small.save_pretrained(tmp_path)
    baked = graphprune.bake(small)
    same(baked, again(baked, tmp_path), inputs)


def test_cut_in_place_the_users_configuration_stays_theirs(tmp_path):
    model, inputs = build("llama")
    config = model.config
    before = config.to_dict()
    small = graphprune.shrink(model, inputs, 0.5, inplace=True)
    assert small is model and config.to_dict() == before and model.config is not config and model.config.hidden_size == 16
    assert model.model.config is model.config and model.model.layers[0].self_attn.config is model.config
    same(small, again(small, tmp_path), inputs)


def test_models_without_a_configuration_are_left_alone():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert "save_pretrained" not in graphprune.shrink(net, torch.zeros(1, 4)).__dict__


@pytest.mark.parametrize("name", ["mistral", "qwen2", "cohere", "olmo2"])
def test_heads_alone(name, tmp_path):
    assert name in CAUSAL and name in FAMILIES
    model, inputs = build(name)
    small = graphprune.shrink(model, inputs, 0.5, what="head", widths=UNIFORM)
    back = again(small, tmp_path)
    same(small, back, inputs)
    assert (back.config.num_attention_heads, back.config.num_key_value_heads, back.config.hidden_size) == (4, 2, 32)
    assert torch.equal(ids(), inputs["input_ids"])


class Toy(nn.Module):
    """Built from a nest of numbers; its heads have to divide its width."""

    def __init__(self, tree):
        super().__init__()
        if tree["width"] % tree["heads"]:
            raise ValueError("heads")
        self.size, self.heads = tree["width"] // tree["heads"], tree["heads"]
        layers = [nn.Linear(tree["width"], wide, device="meta") for wide in tree["inner"]["widths"]]
        self.layers = nn.ModuleList(layers)


TREE = {"width": 24, "heads": 6, "inner": {"widths": (8, 16, 24)}, "layers": 3, "other": 24}


@pytest.mark.parametrize("want", [{"width": 12}, {"width": 8, "heads": 4}, {"inner": {"widths": (8, 12, 24)}}, {"width": 16, "inner": {"widths": (4, 8, 12)}}])
def test_the_search_finds_numbers_by_what_they_build(want):
    used = [("", "size"), ("", "heads")]
    wanted = TREE | want
    if wanted["width"] % wanted["heads"]:
        wanted["heads"] = wanted["width"] // 4
    solution = search(Toy, Toy(wanted), TREE, used=used)
    assert solution.gap.size == (False, 0) and tuple(solution.tree["inner"]["widths"]) == wanted["inner"]["widths"]
    assert (solution.tree["width"], solution.tree["heads"]) == (wanted["width"], wanted["heads"]) and solution.tree["other"] == 24
    assert not compare(Toy, Toy(wanted), TREE).loads


class Counting:
    """Builds, and counts how often."""

    def __init__(self, kind):
        self.kind, self.count = kind, 0

    def __call__(self, tree):
        self.count += 1
        return self.kind(tree)


class Wide(nn.Module):
    """Many layers, each as wide as a number of its own says, and numbers that say nothing."""

    def __init__(self, tree):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8 * tree["step"], wide, device="meta") for wide in tree["widths"]])
        self.twice = nn.Linear(tree["rank"] * tree["step"], 4, device="meta")


@pytest.mark.parametrize("layers, idle", [(4, 2), (10, 12), (20, 0)])
def test_the_search_builds_about_once_for_every_number(layers, idle):
    tree = {"step": 6, "rank": 5, "widths": [48] * layers} | {f"idle{i}": 48 for i in range(idle)}
    want = tree | {"rank": 2, "widths": [48 - 2 * i for i in range(layers)]}
    build = Counting(Wide)
    solution = search(build, Wide(want), tree)
    assert solution.gap.size == (False, 0) and list(solution.tree["widths"]) == want["widths"] and solution.tree["rank"] == 2
    numbers = layers + 2 + idle
    assert build.count < 4 * numbers + 2 * layers < numbers * layers + 60  # the control: every number with every width is far more
    with built_once():
        first, second = Counting(Wide), Counting(Wide)
        again = [search(each, Wide(want), tree).changes for each in (first, second)]
    assert again == [solution.changes] * 2 and second.count == 0 < first.count <= build.count


def test_a_number_that_mends_more_than_it_upsets_is_no_better_than_one_that_upsets_nothing():
    class Mixture(nn.Module):
        def __init__(self, tree):
            super().__init__()
            self.experts = nn.ParameterList([nn.Parameter(torch.empty(4, tree["inner"], device="meta")) for _ in range(2)])
            self.shared = nn.ModuleList([nn.Linear(4, tree["inner"] * tree["shared"], device="meta") for _ in range(3)])
            self.rank = nn.Linear(tree["rank"], 4, device="meta")

    tree = {"inner": 16, "shared": 2, "rank": 16}
    solution = search(Mixture, Mixture(tree | {"shared": 1, "rank": 8}), tree)
    assert solution.gap.loads and solution.changes == {("shared",): 1, ("rank",): 8}
    assert search(Mixture, Mixture(tree | {"inner": 8}), tree).changes == {("inner",): 8}


def test_control_what_no_number_builds_stays_wrong():
    target = Toy(TREE)
    target.layers[0] = nn.Linear(20, 8, device="meta")
    gap = search(Toy, target, TREE).gap
    assert gap.axes == {("layers.0.weight", 1): (24, 20)} and not gap.loads


def test_closing_counts_anew_and_leaves_the_model_alone():
    class Block(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number, self.width, self.inner = number, 4, nn.Linear(4, 4)
            self.inner.number = number

        def forward(self, x):
            return x + self.inner(x)

    net = nn.Sequential(*(Block(i) for i in range(5)))
    small = graphprune.shrink(net, torch.randn(2, 4), 0.4, what="block")
    twin, lists = closed(small)
    kept = lists[""][1]
    assert [block.number for block in twin] == [block.inner.number for block in twin] == list(range(len(kept)))
    assert [block.width for block in twin] == [4] * len(kept) and twin[0].inner.weight is small[kept[0]].inner.weight
    assert [block.number for block in small if hasattr(block, "inner") and block.inner is not None] == list(kept)
    assert closed(net) == (net, {})


@pytest.mark.parametrize("share, shared", [(0.5, 1), (0.25, 2), (0.75, 2)])
def test_the_shared_expert_of_a_mixture_is_as_wide_as_so_many_of_the_others(share, shared, tmp_path):
    FAMILIES["shared"] = (FAMILIES["deepseek_v3"][0], FAMILIES["deepseek_v3"][1] | {"n_shared_experts": 2})
    model, inputs = build("shared", layers=2)
    small = graphprune.shrink(model, inputs, share, what="mlp", widths=UNIFORM)
    assert (small.config.n_shared_experts, small.config.moe_intermediate_size) == (shared, 16) and small.config.intermediate_size == 64 * (1 - share)
    same(small, again(small, tmp_path), inputs)


def test_a_width_that_the_configuration_leaves_open_is_written_into_it(tmp_path):
    model, inputs = build("gpt2")
    assert model.config.n_inner is None  # four times the stream
    small = graphprune.shrink(model, inputs, 0.25, what="mlp")
    assert small.config.n_inner == 3 * model.config.n_embd and small.config.n_embd == model.config.n_embd
    same(small, again(small, tmp_path), inputs)
