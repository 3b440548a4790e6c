"""What a new user types first and graphprune calls otherwise: every wrong word is answered with the right one."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune import errors, spelling
from graphprune.granularity import spec
from graphprune.scores import SCORES, registry
from graphprune.wording import nearest


def net():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


X = torch.zeros(1, 4)
OPTIONS = set(inspect.signature(graphprune.shrink).parameters)


@pytest.mark.parametrize("word", sorted(spelling.ELSEWHERE))
def test_a_word_of_other_tools_is_answered_with_ours(word):
    """The answer speaks of an option of shrink or of something public, and the word is no option itself."""
    assert word not in OPTIONS and word not in spelling.OLD
    with pytest.raises(errors.UnknownOption) as caught:
        graphprune.shrink(net(), X, **{word: 0.5})
    text = str(caught.value)
    assert text.startswith(f"shrink has no option {word!r}; write ")
    options = set(re.findall(r"(\w+)=", text.partition("write")[2])) & OPTIONS
    public = [name for name in re.findall(r"graphprune\.(\w+)", text) if hasattr(graphprune, name)]
    assert options or public or "model.to" in text or "example_input" in text or "manual_seed" in text


@pytest.mark.parametrize(("word", "answer"), [("ration", "ratio="), ("score_", "score="), ("Scope", "scope="), ("speed_ups", "speedup="), ("size_mb", "size=")])
def test_a_slip_is_answered_with_the_nearest_option(word, answer):
    for function in (graphprune.shrink, graphprune.plan):
        with pytest.raises(errors.UnknownOption, match=f"{function.__name__} has no option {word!r}; the nearest .*{answer}"):
            function(net(), X, **{word: 0.5})


def test_a_word_like_nothing_is_answered_with_all_options():
    with pytest.raises(TypeError, match="there are ratio=, params="):  # as Python's own error for it
        graphprune.shrink(net(), X, qqq=1)


@pytest.mark.parametrize("name", ["repair", "verify", "inplace", "return_plan"])
def test_a_plan_has_no_options_of_the_cut(name):
    with pytest.raises(errors.UnknownOption, match="cuts nothing"):
        graphprune.plan(net(), X, **{name: True})


@pytest.mark.parametrize(
    ("wrong", "right"), [("L1", "l1"), ("Taylor", "taylor"), ("taylr", "taylor"), ("bn_scal", "bn_scale"), *((w, r[0]) for w, r in registry.ELSEWHERE.items())]
)
def test_scores_by_other_names(wrong, right):
    with pytest.raises(errors.UnknownName, match=rf"the nearest (is|are) ([\w, ]*, )?{right}\b"):
        graphprune.shrink(net(), X, 0.5, score=wrong)


def test_what_is_offered_instead_is_there():
    assert {name for offered in registry.ELSEWHERE.values() for name in offered} <= set(SCORES)
    assert not set(registry.ELSEWHERE) & set(SCORES)
    kinds = graphprune.available()["granularity"]
    assert set(spec.ELSEWHERE.values()) <= set(kinds) and not set(spec.ELSEWHERE) & set(kinds)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("filters", "channel"), ("Neurons", "channel"), ("unstructured", "weight"), ("num_heads", "heads"), ("ffn", "mlp"), ("chanel", "channel")],
)
def test_kinds_by_other_names(wrong, right):
    with pytest.raises(errors.UnknownName, match=f"the nearest is '{right}'"):
        graphprune.shrink(net(), X, 0.5, what=wrong)


@pytest.mark.parametrize(("wrong", "right"), [("onnx", "onnxruntime"), ("openvin", "openvino"), ("Eager", "eager"), ("compiled", "compile")])
def test_runtimes_by_other_names(wrong, right):
    for ask in (graphprune.Runtime, lambda name: graphprune.measure(net(), X, runtime=name), lambda name: graphprune.shrink(net(), X, speedup=2, on=name)):
        with pytest.raises(errors.BadMeasure, match=f"the nearest is '{right}'"):
            ask(wrong)


def test_on_takes_the_name_alone():
    asked = [graphprune.plan(net(), X, macs=0.5, on=on) for on in (graphprune.Runtime(objective="time", threads=1),)]
    assert asked
    with pytest.raises(errors.BadOption, match="would have no effect"):
        graphprune.shrink(net(), X, 0.5, on="eager")
    with pytest.raises(errors.BadOption, match="give graphprune.Runtime"):
        graphprune.shrink(net(), X, speedup=2, on=3)


@pytest.mark.parametrize("name", sorted(name for name, score in SCORES.items() if score.needs_now() != "nothing"))
def test_a_score_without_data_says_how_to_give_it_some(name):
    loss = ", loss" if SCORES[name].needs_now() == "loss" else ""
    with pytest.raises(errors.NeedsBatches, match=re.escape(f"graphprune.scores.{name}.on(batches{loss})")):
        graphprune.shrink(net(), X, 0.5, score=name)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ((1, 4), r"looks like a shape; give a tensor: torch.randn\(1, 4\)"),
        ([1, 4], r"looks like a shape; give a tensor: torch.randn\(1, 4\)"),
        (torch.Size([2, 4]), r"looks like a shape; give a tensor: torch.randn\(2, 4\)"),
        (np.zeros((1, 4), dtype="float32"), "a numpy.ndarray; give a tensor"),
        ({"input": np.zeros((1, 4))}, "a numpy.ndarray; give a tensor"),
        ([torch.zeros(1, 4)], "a list, which is one argument"),
    ],
)
def test_examples_that_are_none(example, said):
    for function in (graphprune.trace, graphprune.profile, lambda *given: graphprune.shrink(*given, 0.5)):
        with pytest.raises(errors.BadInput, match=said):
            function(net(), example)
    with pytest.raises(errors.BadInput) as caught:  # a plain mistake is not explained away
        graphprune.shrink(net(), torch.zeros(1, 5), 0.5)
    assert "looks like" not in str(caught.value) and "give a tensor" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [([net()], "a list"), (nn.Linear, r"the class Linear; give an instance of it: Linear\(...\)"), ({}, "a dict"), (None, "a NoneType"), (X, "a Tensor")],
)
def test_models_that_are_none(model, said):
    calls = (
        lambda: graphprune.shrink(model, X, 0.5),
        lambda: graphprune.plan(model, X, 0.5),
        lambda: graphprune.trace(model, X),
        lambda: graphprune.profile(model, X),
        lambda: graphprune.measure(model, X, seconds=0.1),
        *([lambda: graphprune.measure(net(), X, model, seconds=0.1)] if model is not None else []),
    )
    for call in calls:
        with pytest.raises(errors.BadModel, match=said):
            call()


def test_a_folder_without_its_class_asks_for_it(tmp_path):
    graphprune.save(graphprune.shrink(net(), X, 0.5), tmp_path / "small")
    for wrong in ((), (None,), (nn.Sequential,), ("Net",)):
        with pytest.raises(errors.BadModel, match=r"graphprune.load\(folder, base=Net\(\)\)"):
            graphprune.load(tmp_path / "small", *wrong)
    assert graphprune.load(tmp_path / "small", net())[0].out_features == 8


@pytest.mark.parametrize(
    ("batches", "said"), [(X, r"write repair=\[batch\]"), ({"x": X}, r"write repair=\[batch\]"), (True, "it is a bool"), (3, "it is a int")]
)
def test_a_repair_from_no_batches(batches, said):
    with pytest.raises(errors.BadCalibration, match=said):
        graphprune.shrink(net(), X, 0.5, repair=batches)


def test_a_plan_is_compared_with_the_model_it_made():
    model = net()
    plan = graphprune.plan(model, X, 0.5)
    small, other = graphprune.apply(model, plan), graphprune.shrink(model, X, 0.25)
    assert not len(plan.compare(small)) and len(plan.compare(other))
    assert str(plan.compare(other)) == str(plan.compare(graphprune.plan_of(other)))
    for wrong in (model, None, {}, "plan.json"):
        with pytest.raises(errors.BadPlan, match="give a plan, or a model that shrink returned"):
            plan.compare(wrong)


def test_what_a_plan_made_carries_it_and_can_be_saved(tmp_path):
    for inplace in (False, True):
        model = net()
        first = graphprune.plan(model, X, 0.5)
        small = graphprune.apply(model, first, inplace=inplace)
        assert graphprune.plan_of(small) == first
        twice = graphprune.apply(small, graphprune.plan(small, X, 0.5))
        for cut in (small, twice):
            graphprune.save(cut, tmp_path / "cut")
            assert torch.equal(graphprune.load(tmp_path / "cut", net())(X), cut(X))
        assert graphprune.expand(twice)["0.weight"].shape == (16, 4)
        assert (model is small) is inplace and (graphprune.plan_of(model) is None) is not inplace


def test_a_name_that_a_plan_does_not_have():
    plan = graphprune.plan(net(), X, 0.5)
    for wrong in ("1", "3", "conv"):  # two activations, and nothing
        with pytest.raises(errors.UnknownName, match="no tensor of this plan, and no module that has one"):
            plan.kept(wrong)
    with pytest.raises(errors.UnknownName, match=r"the nearest are .*2.weight"):
        plan.kept("2.weigth")


class Right(nn.Module):
    """A weight at the right of its input, as in ``x @ w`` and ``addmm``."""

    def __init__(self, added: bool):
        super().__init__()
        self.enter, self.weight, self.bias, self.leave = nn.Linear(4, 8), nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6)), nn.Linear(6, 2)
        self.added = added

    def forward(self, x):
        x = self.enter(x)
        return self.leave((torch.addmm(self.bias, x, self.weight) if self.added else x @ self.weight + self.bias).relu())


@pytest.mark.parametrize(
    ("model", "shape", "where"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 2, 1)), (1, 3, 4, 4), ["0", "1"]),
        (nn.Sequential(nn.Conv1d(3, 8, 1), nn.ConvTranspose1d(8, 6, 2), nn.ConvTranspose1d(6, 2, 1)), (1, 3, 4), ["0", "1"]),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)), (1, 3, 4, 4), ["{0,1}"]),  # depthwise: passes each channel on
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)), (1, 4), ["0", "1"]),
        (Right(False), (1, 4), ["enter", "the model"]),
        (Right(True), (1, 4), ["enter", "the model"]),
    ],
)
def test_a_group_is_named_after_what_makes_it_and_not_after_what_reads_it(model, shape, where):
    plan = graphprune.plan(model, torch.randn(shape), 0.5)
    assert [row["where"] for row in plan.table()] == where


def test_the_size_of_a_small_model_is_no_zero():
    assert str(graphprune.profile(net(), X)) == "234 params, 208 MACs (416 FLOPs), 936 bytes, peak activations 144 bytes"
    assert str(graphprune.Cost(1, 1, 2**30, 3 * 2**20)).endswith("1024 MiB, peak activations 3.0 MiB")


def test_the_nearest_names():
    assert nearest("Eager", ["compile", "eager"]) == ["eager"]
    assert nearest("lin", ["linear", "conv"]) == ["linear"]
    assert nearest("linear_layer", ["linear", "conv"]) == ["linear"]
    assert nearest("zzz", ["linear", "conv"]) == [] == nearest("l", [])
