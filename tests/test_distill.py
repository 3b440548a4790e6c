"""Distillation: the formula, and that the student's features are the teacher's surviving ones."""

import math

import pytest
import torch
from networks import Attention, Concat, Flat, Residual
from torch import nn

import graphprune
from graphprune import errors
from graphprune.loop.distill import soften

X = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), Residual(8, 6), Concat(8, 4), Flat(8)).double()


def masked(net, plan):
    wide = graphprune.apply(net, graphprune.Plan({}, {}))
    with torch.no_grad():
        for name, tensor in wide.state_dict().items():
            tensor.mul_(plan.masks(net)[name])
    return wide


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soften_is_hintons_formula(temperature):
    torch.manual_seed(0)
    mine, theirs = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, 2, dtype=torch.float64)
    total = 0.0
    for row in range(3):
        for column in range(2):
            a = [math.exp(float(v) / temperature) for v in mine.detach()[row, :, column]]
            b = [math.exp(float(v) / temperature) for v in theirs[row, :, column]]
            total += sum(q / sum(b) * (math.log(q / sum(b)) - math.log(p / sum(a))) for p, q in zip(a, b, strict=True))
    loss = soften(mine, theirs, temperature, axis=1)
    assert loss.item() == pytest.approx(temperature**2 * total / 6, rel=1e-12)
    loss.backward()
    wanted = temperature * (torch.softmax(mine / temperature, 1) - torch.softmax(theirs / temperature, 1)) / 6
    assert torch.allclose(mine.grad, wanted, rtol=1e-10)
    assert soften(mine, mine, temperature, 1).item() == 0.0


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_cut_model_sees_the_masked_teachers_features(rounds):
    net = network()
    student, plan = graphprune.shrink(net, X, 0.25, return_plan=True)
    if rounds == 2:
        student = graphprune.shrink(student, X, 0.25)
        plan = student.graphprune_plan
    teacher = masked(net, plan)
    with graphprune.Distillation(teacher, student.eval(), plan, X, features=1.0) as distill:
        assert len(distill.points) > 2
        assert distill(MORE, student(MORE)).item() < 1e-12
    # control: the student of another plan
    other, wrong = graphprune.shrink(net, X, 0.5, return_plan=True)
    with graphprune.Distillation(teacher, other.eval(), wrong, X, features=1.0, logits=0.0) as distill:
        assert distill(MORE, other(MORE)).item() > 1e-3


def test_features_by_hand_and_gradients():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    student, plan = graphprune.shrink(teacher, torch.zeros(1, 4).double(), 0.5, return_plan=True)
    with torch.no_grad():
        student[0].weight.add_(0.1)
    x, gaps = torch.randn(7, 4).double(), []
    for upto, name in ((2, "0.weight"), (4, "2.weight")):
        theirs = teacher[:upto](x)[:, plan.cuts[name][0]].detach()
        gaps.append((student[:upto](x) - theirs).square().sum() / theirs.square().sum())
    wanted = 0.5 * sum(gaps) / 2 + 2.0 * soften(student(x), teacher(x).detach(), 3.0)
    with graphprune.Distillation(teacher, student, plan, torch.zeros(1, 4).double(), features=0.5, logits=2.0, temperature=3.0) as distill:
        loss = distill(x, student(x))
    assert torch.allclose(loss, wanted, rtol=1e-12)
    mine, theirs = (torch.autograd.grad(value, list(student.parameters())) for value in (loss, wanted))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(mine, theirs, strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_is_left_as_it_is_and_learning_lowers_the_loss():
    teacher = nn.Sequential(nn.Conv2d(2, 8, 1), Attention(8, 4), nn.Dropout(0.5), Flat(8)).double().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student, plan = graphprune.shrink(teacher, X, 0.5, return_plan=True)
    student[2].eval()
    optimizer, losses = torch.optim.Adam(student.parameters(), 0.01), []
    with graphprune.Distillation(teacher, student, plan, X, features=0.1) as distill:
        for _ in range(20):
            losses.append(distill(MORE, {"logits": student(MORE)}))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_errors():
    net = network()
    student, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    with pytest.raises(errors.BadPlan, match="example input"):
        graphprune.Distillation(net, student, plan, features=1.0)
    with pytest.raises(errors.BadInput, match="inside"):
        graphprune.Distillation(net, student, plan, X, features=1.0)(X, student(X))
    with pytest.raises(errors.BadInput, match="logits"):
        graphprune.Distillation(net, student)(X, {"ids": torch.ones(2, dtype=torch.long)})
    with pytest.raises(errors.BadPlan, match="cuts nothing"):
        graphprune.Distillation(net, net, graphprune.Plan({}, {}), X, features=1.0)


@pytest.fixture
def one_process(tmp_path):
    from torch import distributed

    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no gloo here")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_wrapped_students_give_the_same_loss(one_process, features):
    teacher, x = network().float(), MORE.float()
    student, plan = graphprune.shrink(teacher, X.float(), 0.5, return_plan=True)

    def loss(call):
        student.zero_grad()
        with graphprune.Distillation(teacher, student.eval(), plan, X.float(), features=features) as distill:
            found = distill(x, call(x))
        found.backward()
        return torch.cat([found.detach().reshape(1), *(p.grad.flatten() for p in student.parameters())])

    wanted = loss(student)
    assert torch.allclose(loss(nn.parallel.DistributedDataParallel(student)), wanted, rtol=1e-5, atol=1e-7)
    assert torch.allclose(loss(torch.compile(student, backend="eager")), wanted, rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(student)
    assert low.dtype == torch.float32 and torch.allclose(low[0], wanted[0], rtol=0.05) and not torch.equal(low, wanted)
    other = graphprune.apply(network(1).float(), plan)
    student.load_state_dict(other.state_dict())
    assert not torch.allclose(loss(student), wanted, rtol=0.05)  # control: another student's loss is another one
