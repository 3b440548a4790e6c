"""Questions about a model: what each group and each budget costs, and pictures and reports that show the coupling and do not depend on the day."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from networks import networks
from torch import nn

import graphprune
from graphprune.cutting.outline import module_of
from graphprune.errors import BadFile, BadOption, BadPlan, BadRatio, BadScore, BadTarget, UnknownName
from graphprune.insight.chart import chart

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Stage(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.enter = nn.Conv2d(3, width, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, width, 1)) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def net(blocks=3):
    torch.manual_seed(0)
    return Stage(16, blocks).double().eval()


def closeness(model):
    """How near the outputs are to those of the original: 0 is equal."""

    def evaluate(other):
        with torch.no_grad():
            return -float((other(X) - model(X)).abs().mean())

    return evaluate


def test_exact_sensitivity_is_what_cutting_that_group_alone_gives():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = graphprune.sensitivity(model, X, closeness(model), ratios=(0.25, 0.75), progress=False)
    assert found.original == 0 and len(found.effects) == 2 * 4 and all(effect.evaluated for effect in found.effects)
    for effect in found.effects:
        widths = graphprune.Widths(ratios=lambda groups, e=effect: {g.index: e.ratio for g in groups if g.name == e.group})
        small, plan = graphprune.shrink(model, X, 0.0, widths=widths, return_plan=True)
        assert closeness(model)(small) == pytest.approx(effect.value) and plan.outline.after == (effect.params, effect.macs)
        assert effect.left == len(plan.kept(effect.group)) < effect.units and effect.value < 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.ranked()[0] == min(found.effects, key=lambda effect: effect.value).group


def test_cheap_sensitivity_evaluates_once_a_group_and_agrees_there():
    model, calls = net(), []
    evaluate = closeness(model)
    counted = lambda other: calls.append(0) or evaluate(other)  # noqa: E731
    exact = graphprune.sensitivity(model, X, evaluate, ratios=(0.25, 0.5, 0.75), progress=False)
    cheap = graphprune.sensitivity(model, X, counted, ratios=(0.25, 0.5, 0.75), mode="cheap", progress=False)
    assert len(calls) == 1 + 4 and "~" in str(cheap) and "~" not in str(exact)
    last = {(e.group, e.ratio): e.value for e in exact.effects}
    for effect in cheap.effects:
        if effect.evaluated:
            assert effect.value == last[effect.group, effect.ratio]
        else:
            assert 0 > effect.value > last[effect.group, 0.75]


def test_groups_are_chosen_by_name_pattern_or_module():
    model = net()
    names = lambda **options: {e.group for e in graphprune.sensitivity(model, X, closeness(model), ratios=(0.5,), progress=False, **options).effects}  # noqa: E731
    assert names(groups="enter") == {"enter.weight"} == names(groups=["enter.weight"])
    assert names(groups="blocks.*.0") == {f"blocks.{i}.0.weight" for i in range(3)}
    assert "enter.weight" not in names(keep="enter")
    with pytest.raises(UnknownName, match="nearest are"):
        names(groups="entr.weight")


@pytest.mark.parametrize(
    ("options", "error"),
    [({"mode": "quick"}, BadOption), ({"ratios": ()}, BadOption), ({"ratios": (1.5,)}, BadRatio), ({"ratios": ("half",)}, BadRatio)],
)
def test_sensitivity_refuses(options, error):
    with pytest.raises(error):
        graphprune.sensitivity(net(), X, lambda model: 1.0, progress=False, **options)


@pytest.mark.parametrize("wrong", [lambda model: None, lambda model: float("nan"), lambda model: 1 / 0, lambda: 1.0])
def test_an_evaluation_that_fails_is_named(wrong):
    with pytest.raises(BadScore, match="evaluate"):
        graphprune.sensitivity(net(), X, wrong, progress=False)
    with pytest.raises(BadScore, match="evaluate"):
        graphprune.tradeoff(net(), X, wrong, measure=False, progress=False)


def test_tradeoff_is_what_shrink_gives_and_its_front_is_not_beaten():
    model = net()
    found = graphprune.tradeoff(model, X, closeness(model), shares=("80%", 0.5, 0.001), measure=False, progress=False)
    assert [point.asked for point in found.points] == [1.0, 0.8, 0.5] and len(found.missed) == 1 and "not met" in str(found)
    for point in found.points[1:]:
        small, plan = graphprune.shrink(model, X, macs=point.asked, return_plan=True)
        assert plan == point.plan and closeness(model)(small) == pytest.approx(point.value)
        assert point.macs <= point.asked * found.points[0].macs
    front = found.front()
    for point in found.points:
        assert (point in front) != any(o.value >= point.value and o.macs < point.macs or o.value > point.value and o.macs <= point.macs for o in found.points)
    assert found.to_csv().splitlines()[0].startswith("asked,value,params,macs")


def test_tradeoff_measures_and_repairs():
    model = net()
    rows = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    options = {"shares": (0.5,), "seconds": 0.1, "repair": graphprune.Repair([rows], progress=False), "on": graphprune.Runtime(threads=1)}
    found = graphprune.tradeoff(model, X, closeness(model), progress=False, **options)
    plain = graphprune.tradeoff(model, X, closeness(model), shares=(0.5,), measure=False, progress=False)
    assert found.points[1].value > plain.points[1].value  # the repaired one is closer
    assert found.points[0].seconds > 0 and found.points[1].band[0] <= found.points[1].speedup <= found.points[1].band[1]
    assert plain.points[1].seconds is None and found.front("seconds")


@pytest.mark.parametrize(("options", "error"), [({"by": "time"}, BadOption), ({"shares": (1.5,)}, BadOption), ({"shares": (0.001,)}, BadTarget)])
def test_tradeoff_refuses(options, error):
    with pytest.raises(error):
        graphprune.tradeoff(net(), X, lambda model: 1.0, measure=False, progress=False, **options)


@settings(max_examples=10, deadline=None)
@given(networks())
def test_every_group_is_a_lane_with_its_modules(drawn):
    groups = graphprune.couple(graphprune.trace(drawn, torch.randn(2, 2, 4, 4, dtype=torch.float64)))
    drawing = chart(groups)
    assert sorted(index for lane in drawing.lanes for index in lane.groups) == list(range(len(groups)))
    for lane in drawing.lanes:
        assert [row for row, _ in lane.marks] == sorted({row for row, _ in lane.marks})
        for other in drawing.lanes:
            apart = lane.span[1] < other.span[0] or other.span[1] < lane.span[0]
            assert other is lane or other.column != lane.column or apart
        rows = {path for row, _ in lane.marks for path in drawing.rows[row].paths}
        for index in lane.groups:
            assert {module_of(name) for name, _ in groups[index].places} <= rows


def test_repeated_blocks_are_one_row_with_a_number():
    drawing = chart(graphprune.couple(graphprune.trace(net(40), X)))
    assert len(drawing.rows) < 12 and any(row.times >= 38 for row in drawing.rows)
    assert any(lane.times >= 38 for lane in drawing.lanes) and any("head" in drawing.rows[row].label for lane in drawing.lanes for row, _ in lane.marks)


def whole_report(folder, name="report.html"):
    model = net()
    small, plan = graphprune.shrink(model, X, 0.5, return_plan=True)
    hurt = graphprune.sensitivity(model, X, closeness(model), ratios=(0.5,), progress=False)
    trade = graphprune.tradeoff(model, X, closeness(model), shares=(0.5,), measure=False, progress=False)
    return graphprune.report(model, X, small, folder / name, asked={"ratio": 0.5}, sensitivity=hurt, tradeoff=trade).read_text()


def test_the_report_is_one_file_that_needs_nothing(tmp_path):
    text = whole_report(tmp_path)
    assert text == whole_report(tmp_path, "again.html")  # the same bytes
    assert len(text) < 200_000 and "<script" not in text and not re.findall(r'(?:src|href)="(?!#)', text) and "url(" not in text
    assert {item.name for item in tmp_path.iterdir()} == {"report.html", "again.html"}
    for words in ("ratio=0.5", "% stay", "an output of the model keeps its size", "enter.weight", "Which groups hurt", "What a cut costs", "blocks.0.0"):
        assert words in text, words
    opened = [tag for tag in re.findall(r"<(/?)(section|svg|table|div|figure|g|ul|details)\b", text)]
    for kind in {kind for _, kind in opened}:
        assert sum(1 if not end else -1 for end, tag in opened if tag == kind) == 0, kind


def test_names_cannot_break_out_of_the_report(tmp_path):
    model = nn.ModuleDict({"<b>&\"'": nn.Linear(4, 8), "end": nn.Linear(8, 2)})
    model.forward = lambda x: model["end"](model["<b>&\"'"](x))
    text = graphprune.report(model, torch.zeros(1, 4), file=tmp_path / "r.html", title="<i>").read_text()
    assert "<b>&" not in text.replace("<b>", "", 0).split("<body>")[1].replace("<b>", "<b>") or "<b>&\"'" not in text
    assert "&lt;i&gt;" in text and "<i>" not in text


def test_reports_of_other_models_are_refused_and_leave_no_file(tmp_path):
    plan = graphprune.plan(net(), X)
    with pytest.raises(BadPlan, match="does not have"):
        graphprune.report(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4), plan, tmp_path / "r.html")
    with pytest.raises(BadPlan, match="not the cut model"):
        graphprune.report(graphprune.apply(net(), plan), X, plan, tmp_path / "r.html")
    with pytest.raises(BadPlan, match="carries none"):
        graphprune.report(net(), X, net(), tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="cannot be written"):
        graphprune.report(net(), X, plan, tmp_path / "file" / "r.html")


@pytest.mark.parametrize("what", ["weight", "layer", None])
def test_reports_of_other_kinds_of_plan(tmp_path, what):
    model = net()
    plan = graphprune.plan(model, X, 0.5, what=what) if what else None
    text = graphprune.report(model, X, plan, tmp_path / "r.html").read_text()
    assert ("masked" in text) == (what == "weight") and ("removed" in text) == (what == "layer")


def test_pictures(tmp_path):
    model, plan = net(), graphprune.plan(net(), X)
    first = graphprune.picture(model, X, plan, tmp_path / "a.svg").read_bytes()
    assert first == graphprune.picture(model, X, plan, tmp_path / "b.svg").read_bytes() and b"<style>" in first
    pytest.importorskip("matplotlib")
    assert graphprune.picture(model, X, plan, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    trade = graphprune.tradeoff(model, X, closeness(model), shares=(0.5,), measure=False, progress=False)
    trade.plot(tmp_path / "t.png")
    graphprune.sensitivity(model, X, closeness(model), ratios=(0.5,), progress=False).plot(tmp_path / "s.svg")
    assert Path(tmp_path / "t.png").stat().st_size > 1000 and (tmp_path / "s.svg").read_text().count("<svg") == 1
