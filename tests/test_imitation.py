"""Gradient steps towards the original: they are plain Adam, leave everything but the weights as it was, and count only where they help."""

import copy
import importlib
import math

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import BadCalibration
from graphprune.repair.imitation import DISTANCES, _Learner, _Lessons, _pieces, imitate, soften

F64 = torch.float64
package, module, closed = (importlib.import_module(f"graphprune.repair{name}") for name in ("", ".imitation", ".closed"))


def net(seed=0, dtype=F64):
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)
    found = nn.Sequential(*layers).to(dtype)
    found[1].running_mean.normal_(0, 0.3)
    found[1].running_var.uniform_(0.5, 2)
    found[6].weight.data *= 4
    return found.eval()


def images(count=6, size=40, seed=1, dtype=F64):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 6, 6, dtype=F64, generator=draw).to(dtype) for _ in range(count)]


def divergence(small, original, data):
    with torch.no_grad():
        return float(torch.stack([soften(small(x).double(), original(x).double(), 1.0) for x in data]).mean())


def squares(small, original, data):
    with torch.no_grad():
        return float(sum((small(x) - original(x)).square().sum() for x in data) / sum(original(x).square().sum() for x in data))


def cut(original, ratio=0.5, **options):
    example = torch.zeros(1, 2, 6, 6, dtype=next(original.parameters()).dtype)
    return graphprune.shrink(original, example, ratio, return_plan=True, **options)


@pytest.mark.parametrize(("step", "far"), [("distill", divergence), ("mimic", squares)])
def test_inputs_never_seen_are_answered_more_like_the_original(step, far):
    """More than closed forms do, where a network is deep and each layer knows only its own target."""
    torch.manual_seed(0)
    original = nn.Sequential(*(part for i in range(4) for part in (nn.Linear(32 if i else 8, 32), nn.Tanh())), nn.Linear(32, 5)).double().eval()
    for part in original[::2]:
        part.weight.data *= 3
    draw = torch.Generator().manual_seed(1)
    data, fresh = ([torch.randn(64, 8, dtype=F64, generator=draw) for _ in range(count)] for count in (16, 4))
    small, plan = graphprune.shrink(original, data[0][:1], 0.5, return_plan=True)
    closed, both, alone = (graphprune.repair(small, original, plan, data, steps, progress=False) for steps in ("auto", ("auto", step), step))
    assert far(both, original, fresh) < 0.8 * far(closed, original, fresh) < far(small, original, fresh)
    assert far(alone, original, fresh) < far(small, original, fresh)
    done = both.graphprune_repairs[-1]
    assert done.step == step and done.kept and done.after < done.before
    assert str(done) in both.graphprune_plan.lines
    # control: learning from the cut model itself is no news
    same = graphprune.repair(closed, closed, plan, data, step, graph=graphprune.trace(original, data[0][:1]), progress=False)
    assert far(same, original, fresh) > 0.95 * far(closed, original, fresh)


def test_the_steps_are_those_of_adam():
    """Against the plainest loop: a warm-up, a cosine, the order of a generator, one batch a step."""
    original, data, rate, passes = net(), images(3, 32), 1e-3, 4
    small, _ = cut(original)
    mine, plain = copy.deepcopy(small), copy.deepcopy(small)
    assert len(list(_Learner(mine).learn(_Lessons(original, data, DISTANCES["mimic"]), rate, passes, "", False))) == passes
    optimizer, draw, step = torch.optim.Adam(plain.parameters(), 1.0), torch.Generator().manual_seed(0), 0
    spread = original(torch.cat(data)).var(correction=0).detach()
    for _ in range(passes):
        for at in torch.randperm(3, generator=draw).tolist():
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / (0.1 * 12)) * 0.5 * (1 + math.cos(math.pi * step / 12))
            wanted = original(data[at]).detach()
            loss = ((plain(data[at]) - wanted) ** 2).mean() / spread
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    for one, two, old in zip(mine.parameters(), plain.parameters(), small.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(one, old, rtol=1e-9, atol=1e-12)


def test_nothing_but_the_weights_is_changed():
    original = net()
    small, plan = cut(original)
    small[0].weight.requires_grad_(False)
    small[6].bias.grad = torch.ones_like(small[6].bias)
    small.train(), original.train()
    before = [copy.deepcopy(model.state_dict()) for model in (original, small)]
    better = graphprune.repair(small, original, plan, images(), "distill", progress=False)
    for model, old in zip((original, small), before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
        assert all(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in original.parameters())
    assert [p.requires_grad for p in better.parameters()] == [p.requires_grad for p in small.parameters()]
    assert torch.equal(small[6].bias.grad, torch.ones(5, dtype=F64)) and better[0].weight.grad is None
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in better.state_dict().items() if "running" in name or "num_" in name)
    assert torch.equal(better[0].weight, small[0].weight) and not torch.equal(better[6].weight, small[6].weight)  # frozen, and not
    assert all(part.training for part in better.modules())
    small.requires_grad_(False)  # a model for inference, of which all is frozen
    better = graphprune.repair(small, original, plan, images(), "distill", progress=False)
    assert not torch.equal(better[0].weight, small[0].weight) and not any(p.requires_grad for p in better.parameters())


def test_it_is_taken_back_where_it_does_not_help(monkeypatch):
    """What is learned on inputs of one kind makes answers to others worse: bit for bit as it was, then."""
    original = net()
    small, plan = cut(original)
    small = graphprune.repair(small, original, plan, images(), progress=False)
    before = [parameter.clone() for parameter in small.parameters()]
    few = [5 + images(1, 4)[0]]
    for exams, rate, kept in ((images(2, seed=3), 0.1, False), (few, 1e-3, True)):
        monkeypatch.setattr(module, "RATES", (rate,))
        learner = copy.deepcopy(small)
        (done,) = imitate(original, learner, "mimic", few, exams, progress=False)
        assert done.kept == kept == (done.after <= done.before)
        assert str(done).endswith("(not kept)") != kept
        assert all(torch.equal(one, two) for one, two in zip(learner.parameters(), before, strict=True)) != kept


def test_what_judges_it_was_seen_by_no_fit(monkeypatch):
    """Other inputs kept out leave the fits before it as they are; without it they change them, for all is fitted once more."""
    original, data = net(), images(4)
    small, plan = cut(original)
    other = [*data[:3], images(1, seed=5)[0]]
    monkeypatch.setattr(package, "imitate", lambda *_: [])
    measured = []
    monkeypatch.setattr(closed, "reestimate", lambda model, graph, batches, waiting: measured.append(len(batches)))
    for steps, same in ((("bias", "bn", "mimic"), True), (("bias", "bn"), False)):
        one, two = (graphprune.repair(small, original, plan, batches, steps, progress=False) for batches in (data, other))
        assert [r.kept for r in (*one.graphprune_repairs, *two.graphprune_repairs) if r.step == "bias"] == [True] * 2
        assert not torch.equal(one[6].bias, small[6].bias)
        assert torch.equal(one[6].bias, two[6].bias) == same
    assert measured == [3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_through_float32(dtype):
    original = net(dtype=dtype)
    small, plan = cut(original)
    data = images(dtype=dtype)
    better = graphprune.repair(small, original, plan, data, "mimic", progress=False)
    assert {p.dtype for p in better.parameters()} == {dtype}
    done = better.graphprune_repairs[-1]
    assert done.kept and done.after < 0.5 * done.before
    # control: a step of this size is lost in half precision itself
    one = torch.ones(1, dtype=dtype)
    assert torch.equal(one + 1e-4, one)


def test_masked_weights_stay_zero():
    original = net()
    sparse, plan = cut(original, granularity="weight")
    better = graphprune.repair(sparse, original, plan, images(), ("auto", "mimic"), progress=False)
    assert better.graphprune_repairs[-1].kept
    for name in ("0", "6"):
        gone = sparse.get_submodule(name).weight == 0
        assert gone.any() and bool((better.get_submodule(name).weight[gone] == 0).all())
        assert not torch.equal(better.get_submodule(name).weight, sparse.get_submodule(name).weight)


def test_answers_that_take_too_much_room_are_computed_anew(monkeypatch):
    original = net()
    small, plan = cut(original)
    kept = graphprune.repair(small, original, plan, images(2), "distill", progress=False)
    monkeypatch.setattr(module, "HELD", 0)
    anew = graphprune.repair(small, original, plan, images(2), "distill", progress=False)
    assert all(torch.equal(one, two) for one, two in zip(kept.parameters(), anew.parameters(), strict=True))


def test_batches_are_parted_where_their_tensors_share_a_length():
    x, mask = torch.arange(70.0)[:, None], torch.ones(70)
    parts = _pieces(((x,), {"mask": mask, "scale": torch.tensor(2.0), "flag": True}))
    assert [len(args[0]) for args, _ in parts] == [len(more["mask"]) for _, more in parts] == [24, 24, 22]
    assert torch.equal(torch.cat([args[0] for args, _ in parts]), x) and all(more["flag"] and more["scale"] == 2 for _, more in parts)
    assert len(_pieces(((x, torch.ones(3)), {}))) == 1


def test_classes_lie_where_cross_entropy_has_them():
    draw = torch.Generator().manual_seed(0)
    for shape, axis in (((4, 6), 1), ((4, 3, 6), 2), ((4, 6, 3, 5), 1)):
        mine, theirs = (torch.randn(shape, dtype=F64, generator=draw) for _ in range(2))
        p, q = theirs.softmax(axis), mine.softmax(axis)
        wanted = (p * (p.log() - q.log())).sum(axis).mean()
        assert torch.allclose(DISTANCES["distill"]([mine], [theirs], []), wanted)
    with pytest.raises(BadCalibration, match="take 'mimic'"):
        DISTANCES["distill"]([torch.ones(3)], [torch.ones(3)], [])


class Silent(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner, self.head, self.how = nn.Linear(4, 8), nn.Linear(8, 3), how

    def forward(self, x):
        y = self.head(torch.relu(self.inner(x)))
        return {"detached": lambda: y.detach(), "whole": lambda: y.argmax(1), "some": lambda: y[y[:, 0] > 0]}[self.how]()


@pytest.mark.parametrize(("how", "says"), [("detached", "no gradient"), ("whole", "no floating tensor"), ("some", "nothing to compare")])
def test_what_cannot_be_learned_is_said(how, says):
    torch.manual_seed(0)
    original = Silent("detached").eval()
    small, plan = graphprune.shrink(original, torch.zeros(1, 4), return_plan=True)
    original.how = small.how = how
    small.head.bias.data += 0.3
    with pytest.raises(BadCalibration, match=says):
        imitate(original, small, "mimic", [torch.randn(40, 4) for _ in range(2)], [], progress=False)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in small.parameters())


def test_in_one_call_and_in_place():
    original = net()
    want, _ = cut(original, calibration=images(), repair=("auto", "distill"))
    assert any(line.startswith("repair distill: outputs of the model") for line in want.graphprune_plan.lines)
    cut(original, calibration=images(), repair=("auto", "distill"), inplace=True)
    assert all(torch.equal(one, two) for one, two in zip(original.parameters(), want.parameters(), strict=True))
    with pytest.raises(BadCalibration, match="needs calibration"):
        cut(net(), repair=("auto", "distill"))


def mlp(outputs=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs)).eval()


def rows(count=8, size=32, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 6, generator=draw) for _ in range(count)]


def repaired(original, data, steps, example=None, **options):
    small, plan = graphprune.shrink(original, data[0][:1] if example is None else example, 0.5, return_plan=True)
    return graphprune.repair(small, original, plan, data, steps, progress=False, **options)


def test_the_closed_forms_count_where_the_steps_do_not(monkeypatch):
    """Then they see all inputs, as without the steps: bit for bit."""
    original, data = mlp(), rows()
    monkeypatch.setattr(module, "RATES", (10.0,))
    both, closed = (repaired(original, data, steps) for steps in (("auto", "mimic"), "auto"))
    assert not both.graphprune_repairs[-1].kept and len(both.graphprune_repairs) == len(closed.graphprune_repairs) + 1
    assert all(torch.equal(one, two) for one, two in zip(both.parameters(), closed.parameters(), strict=True))
    monkeypatch.undo()
    kept = repaired(original, data, ("auto", "mimic"))
    assert kept.graphprune_repairs[-1].kept and not torch.equal(kept[4].weight, closed[4].weight)


def test_the_best_pass_counts(monkeypatch):
    """With few inputs the first passes help and the later ones learn by heart."""
    original, small = mlp(), mlp(seed=1)
    few, exams = rows(1, 8), rows(4, seed=2)
    lessons, exam = _Lessons(original, few, DISTANCES["mimic"]), _Lessons(original, exams, DISTANCES["mimic"])
    learner, errors, states = _Learner(small), [], []
    for _ in learner.learn(lessons, 0.03, 200, "", False):
        errors.append(exam.error(small))
        states.append(learner.state())
    least = min(range(200), key=errors.__getitem__)
    assert least < 199 and errors[-1] > errors[least]
    monkeypatch.setattr(module, "RATES", (0.03,))
    monkeypatch.setattr(module, "PASSES", 200)
    again = mlp(seed=1)
    exam = _Lessons(original, exams, DISTANCES["mimic"], lessons.spreads)
    (done,) = imitate(original, again, "mimic", few, exams, progress=False)
    assert done.kept and all(torch.equal(one, two) for one, two in zip(again.parameters(), states[least], strict=True))
    assert done.after == exam.error(again)


@pytest.mark.parametrize("where", ["around", "nowhere"])
def test_autocast_around_the_call_does_not_hold_old_weights(where):
    original, data = mlp(), rows(16)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        done = repaired(original, data, "mimic").graphprune_repairs[-1]
        assert torch.is_autocast_cache_enabled()
    assert done.kept and done.after < 0.5 * done.before


class Told(nn.Module):
    """Returns more than its answer: a loss where it has labels, and what is the same everywhere."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x, labels=None):
        y = self.inner(x)
        return {"loss": None if labels is None else nn.functional.cross_entropy(y, labels), "logits": y, "same": torch.ones(len(x), 2) + 0 * y[:, :2]}


def test_outputs_that_do_not_vary_have_no_say():
    data = [{"x": x, "labels": torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(0))} for x in rows()]
    original = Told().eval()
    small, plan = graphprune.shrink(original, (), 0.5, example_kwargs=data[0], return_plan=True)
    better = graphprune.repair(small, original, plan, data, "mimic", progress=False)
    plain = repaired(original.inner, rows(), "mimic")
    assert better.graphprune_repairs[-1].kept and 0 < better.graphprune_repairs[-1].before < 10
    assert squares(better.inner, original.inner, rows(seed=5)) < 2 * squares(plain, original.inner, rows(seed=5))


@pytest.mark.parametrize("size", [1, 33])
def test_a_piece_of_one_sample_with_one_output(size):
    done = repaired(mlp(1), rows(264 // size, size), "mimic").graphprune_repairs[-1]
    assert done.kept and done.after < done.before < 10


class Ending(nn.Module):
    def __init__(self, how, outputs=4):
        super().__init__()
        self.inner, self.how = mlp(outputs), how

    def forward(self, x):
        y = self.inner(x)
        return y.masked_fill(torch.tensor([0, 0, 1, 0], dtype=torch.bool), -math.inf) if self.how == "infinite" else y


@pytest.mark.parametrize(("how", "outputs", "says"), [("infinite", 4, "not finite"), ("one", 1, "take 'mimic'")])
def test_what_cannot_be_compared_is_said(how, outputs, says):
    original, data = Ending(how, outputs).eval(), rows()
    small, plan = graphprune.shrink(original, data[0][:1], 0.5, return_plan=True, verify=False)
    with pytest.raises(BadCalibration, match=says):
        graphprune.repair(small, original, plan, data, "distill", progress=False)


def test_a_batch_that_does_not_fit_is_said():
    data = rows()
    data[1] = torch.randn(32, 7)
    with pytest.raises(BadCalibration, match="cannot train"):
        repaired(mlp(), data, "mimic")


class Positions(nn.Module):
    """Time comes first, and every time has its own weights: parts of a batch are not samples."""

    def __init__(self):
        super().__init__()
        self.at, self.one, self.two = nn.Parameter(torch.randn(50, 1, 6)), nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.two(torch.relu(self.one(x + self.at)))


def test_batches_stay_whole_where_the_first_axis_is_not_that_of_the_samples():
    torch.manual_seed(0)
    original, data = Positions().eval(), [torch.randn(50, 8, 6) for _ in range(4)]
    assert repaired(original, data, ("auto", "mimic"), example=data[0]).graphprune_repairs[-1].step == "mimic"
    assert len(_Lessons(original, data, DISTANCES["mimic"]).pieces) == 4
    assert len(_Lessons(mlp(), [torch.cat(rows(2))], DISTANCES["mimic"]).pieces) == 2


def test_inference_tensors_and_sparse_gradients():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(20, 6, sparse=True), mlp()

        def forward(self, x):
            return self.inner(self.table(x))

    torch.manual_seed(0)
    original = Words().eval()
    assert repaired(original, [torch.randint(0, 20, (32,)) for _ in range(8)], "mimic").graphprune_repairs[-1].kept
    with torch.inference_mode():
        data = [x + 0 for x in rows()]
    assert repaired(mlp(), data, "distill").graphprune_repairs[-1].kept


def test_small_gradients_count_in_float16():
    original, data = mlp().half(), [x.half() for x in rows()]
    small, _ = graphprune.shrink(original, data[0][:1], 0.5, return_plan=True)
    learner, lessons = _Learner(small), _Lessons(original, data, DISTANCES["mimic"])
    lessons.spreads = [1e5]  # a loss so small that its gradients in float16 would be zero
    before = learner.state()
    (_,) = learner.learn(lessons, 1e-3, 1, "", False)
    moved = [float((one - two).abs().max()) for one, two in zip(learner.wide, before, strict=True)]
    assert min(moved) > 1e-4
    learner.reset(before)
    learner.scale = 1.0  # control
    (_,) = learner.learn(lessons, 1e-3, 1, "", False)
    assert any(bool((one == two).any()) for one, two in zip(learner.wide, before, strict=True))


def test_what_a_plan_does_not_allow_is_said_of_names_written_out():
    original = net()
    sparse, plan = cut(original, granularity="weight")
    assert graphprune.repair(sparse, original, plan, images(), ("auto", "bn"), progress=False) is not None
    for steps in ("least-squares", ("auto", "least-squares")):
        with pytest.raises(BadCalibration, match="fits weights behind cut channels"):
            graphprune.repair(sparse, original, plan, images(), steps, progress=False)
