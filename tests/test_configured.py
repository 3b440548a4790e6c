"""What a model with a configuration gets where nobody says how its widths have to be: what the configuration can say, as far as that does what is asked."""

import pytest
import torch
from families import build, result

import graphprune
from graphprune.errors import BadConfig, BadTarget

FREE = graphprune.Widths(uniform=False)
REFUSES = "note: its configuration cannot say these widths"


def cut(model, inputs, *args, **options):
    return graphprune.shrink(model, inputs, *args, return_plan=True, **options)


def comes_back(small, inputs, folder):
    small.save_pretrained(folder)
    return torch.equal(result(type(small).from_pretrained(folder).eval(), inputs), result(small, inputs))


def slots(plan):
    return {(name, axis) for name, axes in plan.cuts.items() for axis in axes}


@pytest.mark.parametrize("name", ["gemma3", "electra", "distilbert", "gptj"])
def test_a_ratio_alone_leaves_a_model_that_loads(name, tmp_path):
    model, inputs = build(name)
    small, plan = cut(model, inputs, 0.5)
    assert comes_back(small, inputs, tmp_path / "default")
    free, freely = cut(model, inputs, 0.5, widths=FREE)  # the control: widths that no configuration says
    if slots(freely) != slots(plan):
        assert any("stay whole so that save_pretrained writes a model that loads" in note for note in plan.notes)
        with pytest.raises(BadConfig):
            free.save_pretrained(tmp_path / "free")
    assert slots(plan) <= slots(freely)


def test_a_ratio_of_which_a_configuration_allows_hardly_anything_is_cut_freely(tmp_path, monkeypatch):
    model, inputs = build("dinov2")  # no run reads its mask token, which stays whole and holds the width of the stream
    least, kept = cut(model, inputs, 0.5)
    assert comes_back(least, inputs, tmp_path) and not any(note.startswith(REFUSES) for note in kept.notes)
    monkeypatch.setattr("graphprune.formats.expressed.WORTH", 0.9)
    small, plan = cut(model, inputs, 0.5)
    assert plan.cuts == cut(model, inputs, 0.5, widths=FREE)[1].cuts and any(note.startswith(REFUSES) for note in plan.notes)
    assert 1.2 * small.num_parameters() < least.num_parameters()


def test_an_entry_that_is_taken_for_its_shape_alone_holds_nothing(tmp_path):
    """``embeds[:, :, -1]`` says how long the text is, in evaluation and in training."""
    model, inputs = build("bart")
    small, plan = cut(model, inputs, 0.5)
    assert small.config.d_model == 16 and model.num_parameters() > 3.2 * small.num_parameters() and comes_back(small, inputs, tmp_path)
    assert not any(note.startswith(REFUSES) for note in plan.notes)


def test_what_the_configuration_says_anyway_is_left_as_it_is():
    model, inputs = build("llama")
    (small, plan), (_, freely) = cut(model, inputs, 0.5), cut(model, inputs, 0.5, widths=FREE)
    assert plan == freely and small.config.hidden_size == 16


def test_a_budget_is_met_with_widths_that_load(tmp_path):
    model, inputs = build("gemma3")
    small, plan = cut(model, inputs, params=0.8)
    assert small.num_parameters() <= 0.8 * model.num_parameters() and comes_back(small, inputs, tmp_path)
    assert not any(note.startswith(REFUSES) for note in plan.notes)


@pytest.mark.parametrize("name, options", [
    ("gpt2", {"ratio": 0.5, "what": "heads"}),  # a number of heads that the width of the stream has to be a multiple of
    ("bert", {"ratio": 0.5, "what": ("heads", "mlp")}),
    ("gpt2", {"what": {"heads": 0.5, "mlp": 0.25}}),
], ids=str)  # fmt: skip
def test_what_is_named_goes_and_the_plan_says_that_it_cannot_be_written(name, options, tmp_path):
    model, inputs = build(name)
    small, plan = cut(model, inputs, **options)
    assert slots(plan) == slots(cut(model, inputs, **options, widths=FREE)[1])
    assert any(note.startswith(REFUSES) for note in plan.notes)
    with pytest.raises(BadConfig):
        small.save_pretrained(tmp_path / "hugging")
    graphprune.save(small, tmp_path)
    assert torch.equal(result(graphprune.load(tmp_path, build(name)[0]).eval(), inputs), result(small, inputs))


@pytest.mark.parametrize("options", [
    {"ratio": 0.5, "scope": "global"}, {"ratio": 0, "widths": graphprune.Widths(ratios={"*layers.0.mlp*": 0.5})},
    {"widths": {"model.layers.1.mlp.gate_proj": 16}}, {"params": 0.6, "scope": "allocated"},
], ids=str)  # fmt: skip
def test_widths_that_differ_are_kept_where_they_are_asked_for(options):
    model, inputs = build("llama")
    small, plan = cut(model, inputs, score=graphprune.scores.random.with_(seed=0), **options)
    assert len({layer.mlp.gate_proj.out_features for layer in small.model.layers}) > 1
    assert not any("so that save_pretrained writes" in note for note in plan.notes)


def test_a_target_that_no_configuration_reaches_is_met_all_the_same():
    model, inputs = build("gemma3")
    with pytest.raises(BadTarget):
        cut(model, inputs, params=0.19, widths=graphprune.Widths(uniform=True))
    small, plan = cut(model, inputs, params=0.19)
    assert small.num_parameters() <= 0.19 * model.num_parameters() and any(note.startswith(REFUSES) for note in plan.notes)
