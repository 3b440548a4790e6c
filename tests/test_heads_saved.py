"""Heads that go from public families, whatever their attention: they come back by from_pretrained, or it is said at once what to ask for instead."""

import subprocess
import sys

import pytest
import torch
from families import build, result, written

import graphprune
from graphprune.errors import BadConfig, NothingToPrune

UNIFORM = graphprune.Widths(uniform=True)
# What is asked for, and what is left of it in the configuration.
SAID = [
    ("gemma", {"heads": 3}, {"num_attention_heads": 3, "num_key_value_heads": 1}),
    ("gemma", {"query_heads": 6}, {"num_attention_heads": 6, "num_key_value_heads": 1}),
    ("deepseek_v2", {"heads": 4}, {"num_attention_heads": 4, "v_head_dim": 6}),
    ("deepseek_v3", {"heads": 3}, {"num_attention_heads": 3}),
    ("falcon", {"heads": 0.5, "hidden": 0.5}, {"num_attention_heads": 4, "hidden_size": 16}),
    ("falcon_grouped", {"heads": 0.5, "hidden": 0.5}, {"num_attention_heads": 4, "num_kv_heads": 1, "hidden_size": 16}),
    ("gpt_bigcode", {"heads": 0.25, "hidden": 0.25}, {"n_head": 6, "n_embd": 24}),
]


@pytest.mark.parametrize("name, what, numbers", SAID, ids=[f"{name}-{'-'.join(what)}" for name, what, _ in SAID])
def test_heads_come_back(name, what, numbers, tmp_path):
    model, inputs = build(name, layers=2)
    small, plan = graphprune.shrink(model, inputs, what=what, widths=UNIFORM, return_plan=True)
    assert {key: getattr(small.config, key) for key in numbers} == numbers
    torch.testing.assert_close(result(small, inputs), graphprune.zeroed(model, plan)(**inputs)[0], atol=1e-5, rtol=1e-4)
    small.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(result(back, inputs), result(small, inputs)) and not torch.allclose(result(model, inputs), result(small, inputs))
    words = written(small, inputs)
    assert torch.equal(words, written(back, inputs)) and torch.equal(words, written(back, inputs, cache=False))


def test_in_a_new_process(tmp_path):
    model, inputs = build("deepseek_v2", layers=2)
    small = graphprune.shrink(model, inputs, what={"heads": 4}, widths=UNIFORM)
    small.save_pretrained(tmp_path)
    torch.save((inputs["input_ids"], result(small, inputs)), tmp_path / "wanted.pt")
    code = f"""
import torch
from zoo_support import declare_operators
declare_operators()
from transformers import AutoModelForCausalLM
ids, wanted = torch.load({str(tmp_path / "wanted.pt")!r})
with torch.no_grad():
    print(float((AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()(input_ids=ids).logits - wanted).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=__file__.rpartition("/")[0], check=True)
    assert float(done.stdout.split()[-1]) == 0.0


@pytest.mark.parametrize("name", ["gpt2", "falcon", "bert"])
def test_what_goes_only_together_is_said_at_once(name, tmp_path):
    model, inputs = build(name, layers=2)
    with pytest.raises(NothingToPrune, match=r"heads together with hidden.*uniform=False") as caught:
        graphprune.shrink(model, inputs, what="heads", widths=UNIFORM)
    assert 'what=("heads", "hidden")' in str(caught.value)
    small = graphprune.shrink(model, inputs, 0.5, what=("heads", "hidden"), widths=UNIFORM)  # the control: what is advised works
    small.save_pretrained(tmp_path)
    assert torch.equal(result(type(model).from_pretrained(tmp_path).eval(), inputs), result(small, inputs))


def test_without_uniform_widths_the_plan_says_it(tmp_path):
    model, inputs = build("gpt2", layers=2)
    small, plan = graphprune.shrink(model, inputs, what={"heads": 4}, return_plan=True)
    assert any("save_pretrained refuses" in note and "heads together with hidden" in note for note in plan.notes)
    assert plan.notes == graphprune.plan_of(small).notes
    with pytest.raises(BadConfig, match="heads together with hidden"):
        small.save_pretrained(tmp_path)
    graphprune.save(small, tmp_path)
    assert torch.equal(result(graphprune.load(tmp_path, model), inputs), result(small, inputs))
    _, plan = graphprune.shrink(model, inputs, what={"mlp": 64}, return_plan=True)
    assert not any("save_pretrained" in note for note in plan.notes)


def test_heads_that_a_table_numbers_stay_with_the_place_in_the_code():
    model, inputs = build("bloom", layers=2)
    with pytest.raises(NothingToPrune, match=r"heads: they stay whole: .*modeling_bloom.py:\d+"):
        graphprune.shrink(model, inputs, what="heads")
