"""Bad input gives an error that says what, where and what now, and leaves the model as it was."""

import copy
import itertools
import random
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graphprune
from graphprune import errors
from graphprune.coupling.groups import couple
from graphprune.tracing.trace import trace

NET = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
X = torch.zeros(1, 4)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 2, "half", True])
def test_ratio(ratio):
    with pytest.raises(errors.BadRatio, match="share of units"):
        graphprune.shrink(NET, X, ratio)


def test_wrong_example():
    with pytest.raises(errors.BadInput, match="Call model"):
        graphprune.shrink(NET, torch.zeros(1, 5))


def test_unknown_names_say_the_nearest():
    net = nn.ModuleDict({"backbone": nn.Linear(4, 8)})
    with pytest.raises(errors.UnknownName, match="backbone"):
        graphprune.shrink(net, X, keep=["backbon"])
    with pytest.raises(errors.UnknownName, match="l1"):
        graphprune.shrink(NET, X, criterion="l3")
    with pytest.raises(errors.UnknownName):
        graphprune.shrink(NET, X, ratios={"nothing.*": 0.2})


def test_nothing_to_prune_says_why():
    with pytest.raises(errors.NothingToPrune, match="output of the model"):
        graphprune.shrink(nn.Linear(4, 8), X)


def test_wrapped_scripted_compiled_and_mixed():
    wrong = [torch.jit.trace(NET, X), nn.DataParallel(NET), torch.compile(NET), "net"]
    mixed = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, device="meta"))
    for model in [*wrong, mixed]:
        with pytest.raises(errors.BadModel):
            graphprune.shrink(model, X)


def test_a_wrong_plan_is_refused():
    _, plan = graphprune.shrink(NET, X, return_plan=True)
    with pytest.raises(errors.BadPlan):
        graphprune.apply(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), plan)
    with pytest.raises(errors.BadPlan):
        graphprune.Plan.from_json("{}")


def test_a_difference_that_no_axis_explains_is_an_error():
    runs = itertools.count(1)

    class Sly(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x)) * next(runs)

    net = Sly()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(errors.NotEqual):
        graphprune.shrink(net, torch.ones(1, 4), criterion="random")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_keep_and_overrides():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert graphprune.shrink(net, X, 0.5, keep=["0"])[0].out_features == 8
    assert graphprune.shrink(net, X, 0.5, ratios={"2": 0.75})[2].out_features == 2
    assert graphprune.shrink(net, X, 0.6, multiple_of=4)[0].out_features == 4
    assert graphprune.shrink(net, X, 0.9, min_units=3)[0].out_features == 3
    with pytest.raises(errors.NothingToPrune):
        graphprune.shrink(net, X, keep=nn.Linear)


class Raises(nn.Module):
    """Runs, but not on negative inputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))

    def forward(self, x, flag=False):
        if flag:
            raise RuntimeError("the cake is a lie")
        return self.net(x)


def watched(model):
    """All that a failed call may not change: tensors by object and value, gradients, modes, attributes, random states."""
    modules = dict(model.named_modules())
    return {
        "tensors": {name: (id(t), t.clone(), t.requires_grad, None if t.grad is None else t.grad.clone()) for name, t in model.named_parameters()},
        "buffers": {name: (id(t), t.clone()) for name, t in model.named_buffers()},
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: {k: v for k, v in m.__dict__.items() if isinstance(v, int | str | tuple | float)} for name, m in modules.items()},
        "hooks": {name: list(m._forward_hooks) + list(m._forward_pre_hooks) for name, m in modules.items()},
        "random": torch.get_rng_state(),
    }


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


BAD = {
    "another shape": (errors.BadInput, "Call model", (torch.zeros(1, 5),), {}),
    "another dtype": (errors.BadInput, "Call model", (torch.zeros(1, 4, dtype=torch.float64),), {}),
    "no tensor": (errors.BadInput, "Call model", ("picture.png",), {}),
    "too many": (errors.BadInput, "pass a tuple for positional", ((X, X, X),), {}),
    "an unknown keyword": (errors.BadInput, "a dict for keyword", ({"image": X},), {}),
    "a model that raises": (errors.BadInput, "cake is a lie", (X,), {"example_kwargs": {"flag": True}}),
    "ratio one": (errors.BadRatio, "0 <= ratio < 1", (X, 1.0), {}),
    "ratio below": (errors.BadRatio, "0 <= ratio < 1", (X, -0.5), {}),
    "ratio of a name": (errors.BadRatio, "net.0", (X,), {"ratios": {"net.0": 1.5}}),
    "keep by a wrong name": (errors.UnknownName, "nearest are net.0", (X,), {"keep": ["nett.0"]}),
    "keep by a wrong kind": (errors.UnknownName, "neither a name", (X,), {"keep": [3.5]}),
    "override by a wrong name": (errors.UnknownName, "nearest are net.2", (X,), {"ratios": {"net2.": 0.5}}),
    "nothing left to prune": (errors.NothingToPrune, "kept on request", (X,), {"keep": nn.Linear}),
    "a scope that is none": (errors.BadRatio, "'layer', 'global' or 'isomorphic'", (X,), {"scope": "network"}),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_now_and_changes_nothing(case, inplace):
    kind, text, args, options = BAD[case]
    torch.manual_seed(0)
    model = Raises().train()
    model.net[0].eval().weight.requires_grad_(False)
    model.net[2].register_forward_hook(lambda *_: None)
    model(X).sum().backward()
    before = watched(model)
    with pytest.raises(kind, match=text) as caught:
        graphprune.shrink(model, *args, inplace=inplace, **options)
    assert isinstance(caught.value, errors.GraphpruneError)
    assert same(before, watched(model))


def test_the_comparison_above_sees_changes():
    for change in (lambda m: m.eval(), lambda m: m.net[0].weight.data.add_(1), lambda m: setattr(m.net[0], "in_features", 3), lambda m: torch.rand(1)):
        model = Raises()
        before = watched(model)
        change(model)
        assert not same(before, watched(model))


@pytest.mark.filterwarnings("ignore:.*quant.*")
def test_scripted_quantised_and_compiled_say_what_to_give_instead():
    from torch.ao.nn.quantized import Linear

    quantised = nn.Sequential(nn.Linear(4, 8), nn.Module())
    quantised[1] = Linear(8, 2)
    for model, text in (
        (torch.jit.script(NET), "scripted"),
        (torch.jit.trace(NET, X), "shrink the nn.Module it was made from"),
        (quantised, "1 is quantised; shrink the floating-point model"),
        (torch.compile(NET), "shrink model._orig_mod"),
        (nn.DataParallel(NET), "shrink model.module"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, device="meta")), "several devices .*; move it to one"),
        (lambda x: x, "an nn.Module is needed"),
    ):
        with pytest.raises(errors.BadModel, match=text):
            graphprune.shrink(model, X)


def test_wrapped_for_distributed_training(tmp_path):
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch without distributed training")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        with pytest.raises(errors.BadModel, match="shrink model.module and wrap the result"):
            graphprune.shrink(model, X)
        assert graphprune.shrink(model.module, X)[0].out_features == 4
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("granularity", ["weight", "group:box"])
def test_what_fails_in_place_takes_values_and_classes_back(granularity, monkeypatch):
    def fails(*_):
        raise RuntimeError("too late")

    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(1, 3, 8, 8)
    before, text = net(x), repr(net)
    monkeypatch.setattr(sys.modules["graphprune.shrink"], "note_plan", fails)
    with pytest.raises(RuntimeError, match="too late"):
        graphprune.shrink(net, x, 0.5, granularity=granularity, inplace=True)
    assert torch.equal(net(x), before) and repr(net) == text and [type(m) for m in net] == [nn.Conv2d, nn.ReLU, nn.Conv2d]


def test_random_numbers_of_the_model_are_given_back():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand(2) * random.random()

    states = torch.get_rng_state(), random.getstate()
    assert graphprune.shrink(Noisy(*copy.deepcopy(NET)), X)[0].out_features < NET[0].out_features
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_threads_leave_torch_as_it_was():
    held = nn.Module.__call__, nn.functional.has_torch_function
    inside, enough = [], threading.Event()

    class Slow(nn.Linear):
        def forward(self, x):
            inside.append(nn.Module.__call__)
            enough.wait(0.1 * len(inside))  # the second to come is the last to go
            return super().forward(x)

    threads = [threading.Thread(target=graphprune.trace, args=(nn.Sequential(Slow(4, 2)), X)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (nn.Module.__call__, nn.functional.has_torch_function) == held


def test_a_name_that_resembles_none_says_where_the_names_are():
    with pytest.raises(errors.UnknownName, match="named_modules"):
        graphprune.shrink(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4), keep=["decoder"])


class Table(nn.Module):
    """A constant that is no buffer and stays where it was made; weights that are no parameters."""

    def __init__(self):
        super().__init__()
        self.table = torch.arange(8.0) + 1
        self.register_buffer("way", torch.randn(2, 8))

    def forward(self, x):
        return nn.functional.linear(x * self.table.to(x.device), self.way)


def test_a_constant_on_another_device_is_cut_there():
    net = nn.Sequential(nn.Linear(4, 8), Table()).to("meta")
    assert net[1].table.device.type == "cpu"
    small, plan = graphprune.shrink(net, torch.zeros(1, 4, device="meta"), 0.5, criterion="random", verify=False, return_plan=True)
    assert small[0].weight.is_meta and torch.equal(small[1].table, net[1].table[plan.cuts["1.table"][0]])
    assert not torch.equal(small[1].table, net[1].table[:4]) or plan.cuts["1.table"][0] == [0, 1, 2, 3]


def test_a_score_with_gradients_leaves_weights_that_are_no_parameters_alone():
    net = nn.Sequential(nn.Linear(4, 8), Table())
    small = graphprune.shrink(net, torch.zeros(1, 4), 0.5, criterion="effect", batches=[torch.randn(16, 4) for _ in range(4)])
    assert not net[1].way.requires_grad and not small[1].way.requires_grad and net[0].weight.requires_grad
    net[1].way.numpy()


@pytest.mark.parametrize("kept", [[0, 5], [-1, 1], [0, 3]])
def test_a_damaged_plan_is_refused(kept):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    plan = graphprune.Plan({"0.weight": {0: [0, 1], 1: kept}}, {"0.weight": (4, 3, 3, 3)})
    with pytest.raises(graphprune.errors.BadPlan, match="not there"):
        graphprune.apply(net, plan)
    assert graphprune.apply(net, graphprune.Plan({"0.weight": {0: [0, 1], 1: [0, 2]}}, plan.shapes))[0].weight.shape == (2, 2, 3, 3)


@pytest.mark.parametrize("package, shown", [("torchvision", True), ("graphprune_more", True), ("torch", False)])
def test_reasons_name_the_line_of_the_users_code(package, shown):
    """Also of packages whose names begin as ours or torch's do; what has no file name is passed over."""
    home = Path(torch.__file__).parents[1] if package.startswith("torch") else Path(graphprune.__file__).parents[1]
    code = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)\n"
    code += "    def forward(self, x):\n        return self.b(self.a(x).cumsum(1))\n"
    for file in (str(home / package / "models" / "net.py"), ""):
        space = {"nn": nn}
        exec(compile(code, file, "exec"), space)
        reasons = "\n".join(map(str, couple(trace(space["Net"]().eval(), torch.zeros(1, 4))).locked.values()))
        assert "cumsum" in reasons
        assert ("net.py:6" in reasons) == (shown and bool(file))


def test_code_without_a_name_is_no_reason_to_fail():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    for name in ("mine", None):
        space = {"graphprune": graphprune, "net": net, "x": torch.zeros(1, 4), "__name__": name}
        with pytest.warns(UserWarning, match="removes nothing") if name else nullcontext():  # Python shows none where there is no name
            exec("graphprune.shrink(net, x, 0.1, granularity='layer')", space)


def test_what_a_configuration_shares_with_the_users_model_stays_as_it_was():
    class Registry:
        """One object for all: copying gives the same."""

        def __init__(self):
            self.width = 8

        def __deepcopy__(self, memo):
            return self

    class Net(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.a, self.b = config, nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x).view(-1, self.config.inner.width))

    shared = Registry()
    trace(Net(SimpleNamespace(inner=shared)).eval(), torch.zeros(1, 4))
    assert type(shared.width) is int
