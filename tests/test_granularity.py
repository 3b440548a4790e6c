"""Finer granularities: exact counts, the same function, training and saving with masks, and clear refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Attention, Flat, networks
from torch import nn
from torch.nn.utils import parametrizations

import graphprune
from graphprune.cutting import masks
from graphprune.cutting.masks import Mask
from graphprune.cutting.parts import Part
from graphprune.errors import BadLoss, BadModel, BadPlan, BadRatio, BadScore, NeedsBatches, NothingToPrune, UnknownName
from graphprune.granularity import positions
from graphprune.granularity.ranking import lowest
from graphprune.granularity.spec import NAMES, parse
from graphprune.granularity.weights import weights

X = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2])
MASKED = ["weight", "kernel", "vector", "vector:column", "1:2"]


def net(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 4, 2, 2), nn.Flatten(), nn.Linear(256, 3)).double().eval()


def units(name, keep, granularity):
    """The reference: which units of a weight stay, one by one."""
    found = {}
    for place in torch.cartesian_prod(*[torch.arange(n) for n in keep.shape]).tolist():
        key = {"kernel": place[:2], "vector": place[:-1], "vector:column": [*place[:-2], place[-1]]}.get(granularity, place)
        found.setdefault(tuple(key), set()).add(bool(keep[tuple(place)]))
    assert all(len(values) == 1 for values in found.values()), f"a unit of {name} is split"
    return [values.pop() for values in found.values()]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "vector", "vector:column"])
def test_counts_are_exact_and_the_function_is_the_masked_one(granularity, ratio):
    model = net()
    small, plan = graphprune.shrink(model, X, ratio, granularity=granularity, return_plan=True)
    linear = granularity == "weight"
    for name, keep in plan.masks(model).items():
        if name in ("0.weight", "3.weight", "5.weight") or (linear and name == "7.weight"):
            stay = units(name, keep, granularity)
            assert len(stay) - sum(stay) == int(ratio * len(stay) + 0.49999999)
        else:
            assert keep.all()
    (zero,) = graphprune.zeroed(model, plan)(X)
    assert torch.equal(small(X), zero)
    if ratio:
        assert (small(X) - model(X)).abs().max() > 1e-6  # the control
        assert ("will not run the model faster" in plan.explain()) and "gone), masked" in plan.explain()


def test_magnitude_by_hand():
    model = net()
    keep = graphprune.shrink(model, X, 0.3, granularity="weight", return_plan=True)[1].masks(model)["7.weight"]
    weight = model[7].weight.detach().abs()
    assert weight[~keep].max() < weight[keep].min()
    keep = graphprune.shrink(model, X, 0.3, granularity="kernel", return_plan=True, criterion="l1")[1].masks(model)["3.weight"]
    norms = model[3].weight.detach().abs().sum((2, 3))
    assert norms[~keep[..., 0, 0]].max() < norms[keep[..., 0, 0]].min()


def test_ties_are_broken_by_position_and_counted_exactly():
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    plan = graphprune.shrink(model, X, 0.5, granularity="weight", return_plan=True)[1]
    keep = plan.masks(model)["7.weight"].ravel()
    assert keep[:384].all() and not keep[384:].any()
    assert lowest(torch.zeros(7), 3).tolist() == [False] * 4 + [True] * 3


def test_global_ranks_all_layers_together_and_empties_none():
    model = net()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    plan = graphprune.shrink(model, X, 0.6, granularity="weight", scope="global", return_plan=True)[1]
    masks = plan.masks(model)
    total = sum(masks[n].numel() for n in ("0.weight", "3.weight", "5.weight", "7.weight"))
    gone = sum(int((~m).sum()) for m in masks.values())
    assert gone == int(0.6 * total + 0.49999999)
    assert int(masks["3.weight"].sum()) == 1


def test_thresholds():
    model = net()
    keep = graphprune.shrink(model, X, granularity="weight:0.05", return_plan=True)[1].masks(model)["7.weight"]
    assert torch.equal(keep, model[7].weight.detach().abs() >= 0.05)
    with pytest.raises(BadRatio, match="would empty"):
        graphprune.shrink(model, X, granularity="weight:100")


@pytest.mark.parametrize(("granularity", "n", "m"), [("1:2", 1, 2), ("2:4", 2, 4), ("1:4", 1, 4)])
def test_n_of_m_along_the_summed_axis(granularity, n, m):
    model = net()
    small, plan = graphprune.shrink(model, X, granularity=granularity, return_plan=True)
    masks = plan.masks(model)
    for name, axis in (("3.weight", 1), ("5.weight", 0), ("7.weight", 1)):
        lead = masks[name].movedim(axis, -1).unflatten(-1, (-1, m))
        assert (lead.sum(-1) == n).all()
        sizes = model.get_parameter(name).detach().abs().movedim(axis, -1).unflatten(-1, (-1, m))
        assert (sizes.masked_fill(lead, -1).amax(-1) <= sizes.masked_fill(~lead, 9).amin(-1)).all()
    if m == 4:
        assert masks["0.weight"].all() and "which 4 does not divide" in plan.explain()
    assert torch.equal(small(X), graphprune.zeroed(model, plan)(X)[0])


@pytest.mark.parametrize("granularity", [*MASKED, "group"])
@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_pruning_again_to_the_same_ratio_changes_nothing(granularity, criterion):
    once = graphprune.shrink(net(), X, 0.5, granularity=granularity, criterion=criterion)
    twice = graphprune.shrink(once, X, 0.5, granularity=granularity, criterion=criterion)
    more = graphprune.shrink(once, X, 0.8, granularity=granularity.replace("1:2", "weight"), criterion=criterion)
    first, again, after = (graphprune.masked(model) for model in (once, twice, more))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(once(X), twice(X))
    assert all(bool((after[name] <= first[name]).all()) for name in first if name in after)
    assert sum(int(m.sum()) for m in after.values()) < sum(int(m.sum()) for m in first.values())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(["weight", "kernel", "1:2", "group", "group:box"]), st.sampled_from([0.2, 0.5]), st.sampled_from(["layer", "global"]))
def test_drawn_networks_keep_their_function(model, granularity, ratio, scope):
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    try:
        small, plan = graphprune.shrink(model, x, ratio, granularity=granularity, scope=scope, return_plan=True, verify=False)
    except (NothingToPrune, BadRatio):
        return
    (zero,) = graphprune.zeroed(model, plan)(x)
    assert (small(x) - zero).abs().max() <= 1e-9 * zero.abs().max().clamp(min=1e-9)
    assert type(small) is type(model)


def test_pruned_entries_stay_zero_through_training():
    model = net()
    small = graphprune.shrink(model, X, 0.7, granularity="weight")
    masks = graphprune.masked(small)
    assert list(masks) == ["0.weight", "3.weight", "5.weight", "7.weight"]
    optimizer = torch.optim.AdamW(small.train().parameters(), 0.01, weight_decay=0.1)
    before = {name: small.get_submodule(name[0]).weight.detach().clone() for name in masks}
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(small(X), Y).backward()
        for name, keep in masks.items():
            grad = small.get_parameter(f"{name[0]}.parametrizations.weight.original").grad
            assert not grad[~keep].any() and grad[keep].any()
        optimizer.step()
    for name, keep in masks.items():
        weight = small.get_submodule(name[0]).weight.detach()
        assert not weight[~keep].any() and (weight[keep] != before[name][keep]).any()


def test_the_users_model_is_untouched():
    model = net().train()
    model[0].weight.requires_grad_(False)
    model[7].weight.grad = torch.ones_like(model[7].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    for granularity in (*MASKED, "group", "group:box"):
        small = graphprune.shrink(model, X, 0.5, granularity=granularity, criterion="taylor", batches=[(X, Y)], loss=nn.functional.cross_entropy)
        assert small.training
    assert model.training and not model[0].weight.requires_grad and model[7].weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model[7].weight.grad == 1).all() and model[0].weight.grad is None
    assert torch.equal(state, torch.get_rng_state())
    assert not hasattr(model[0], "parametrizations")


def test_inplace_masks_the_same_parameter():
    model = net()
    weight = model[0].weight
    assert graphprune.shrink(model, X, 0.5, granularity="weight", inplace=True) is model
    assert model[0].parametrizations.weight.original is weight and isinstance(model[0].parametrizations.weight[0], Mask)


def test_keep_and_ratios():
    model = net()
    plan = graphprune.shrink(model, X, 0.5, granularity="weight", keep="0", ratios={"3": 0.75}, return_plan=True)[1]
    masks = plan.masks(model)
    assert masks["0.weight"].all() and int((~masks["3.weight"]).sum()) == 216 and int((~masks["7.weight"]).sum()) == 384
    assert "0.weight: kept on request" in plan.explain()


def test_save_and_load_small_on_disk(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    x = torch.randn(2, 512)
    small = graphprune.shrink(model, x, 0.9, granularity="weight")
    with torch.no_grad():
        small[0].parametrizations.weight.original.mul_(2)
    graphprune.save(small, tmp_path)
    entries = 512 * 512 + 5120
    assert (tmp_path / "model.safetensors").stat().st_size < 0.1 * entries * 4 + entries / 8 + 4096
    assert (tmp_path / "plan.json").stat().st_size < 4096
    base = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    again = graphprune.load(tmp_path, base)
    assert torch.equal(again(x), small(x)) and graphprune.masked(again).keys() == graphprune.masked(small).keys()
    assert not graphprune.masked(base)
    plan = small.__dict__["graphprune_plan"]
    assert graphprune.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(BadPlan):
        graphprune.load(tmp_path, nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)))
    state = small.state_dict()
    other = graphprune.apply(base, plan)
    other.load_state_dict(state)
    assert torch.equal(other(x), small(x))


def test_bake_makes_zeros_permanent(tmp_path):
    model = net()
    small = graphprune.shrink(model, X, 0.5, granularity="kernel")
    baked = graphprune.bake(small)
    assert list(baked.state_dict()) == list(model.state_dict()) and type(baked[0]) is nn.Conv2d
    assert torch.equal(baked(X), small(X)) and graphprune.masked(small)
    assert float((baked[0].weight == 0).double().mean()) == 0.5
    graphprune.save(baked, tmp_path)
    assert torch.equal(graphprune.load(tmp_path, net(3))(X), small(X))
    wide = graphprune.expand(small)
    assert wide.keys() == model.state_dict().keys() and torch.equal(wide["0.weight"], baked[0].weight)
    with pytest.raises(BadModel, match="nothing to bake"):
        graphprune.bake(baked)
    twin = copy.deepcopy(small)
    graphprune.bake(twin, inplace=True)
    assert twin(X).equal(small(X)) and graphprune.masked(small) and not graphprune.masked(twin)


def test_channels_of_a_masked_model_can_be_cut():
    small = graphprune.shrink(net(), X, 0.5, granularity="weight")
    cut = graphprune.shrink(small, X, 0.5)
    assert cut[0].weight.shape[0] == 4 and graphprune.masked(cut)["0.weight"].shape[0] == 4


def test_semi_structured_needs_its_hardware():
    small = graphprune.shrink(nn.Sequential(nn.Linear(32, 32)), torch.randn(1, 32), granularity="2:4")
    with pytest.raises(BadModel, match="CUDA"):
        graphprune.semi_structured(small)
    with pytest.raises(BadModel, match="no linear weight"):
        graphprune.semi_structured(graphprune.shrink(nn.Sequential(nn.Linear(32, 32)), torch.randn(1, 32), 0.2, granularity="weight"))


def test_semi_structured_hands_over_exactly_the_masked_weights(monkeypatch):
    """Without the hardware: what torch would be given, and that a refusal of torch's leaves the model as it was."""
    given = []

    def compress(weight):
        assert ((weight.reshape(len(weight), -1, 4) != 0).sum(-1) <= 2).all()
        if weight.shape[1] < 16:
            raise RuntimeError("too small")
        given.append(weight.clone())
        return weight

    monkeypatch.setattr(masks, "check_device", lambda device: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", compress)
    x = torch.randn(1, 32)
    small = graphprune.shrink(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6)), x, granularity="2:4")
    with pytest.raises(BadModel, match=r"half\(\)"):
        graphprune.semi_structured(small)
    small = small.half()
    fast = graphprune.semi_structured(small)
    assert len(given) == 2 and torch.equal(given[0], small[0].weight) and torch.equal(fast(x.half()), small(x.half()))
    assert graphprune.masked(small) and not graphprune.masked(fast)
    odd = graphprune.shrink(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 6)), x, granularity="2:4").half()
    with pytest.raises(BadModel, match=r"cannot compress 1.weight of shape \(6, 8\)"):
        graphprune.semi_structured(odd, inplace=True)
    assert len(graphprune.masked(odd)) == 2


def test_scores_of_entries_against_slow_references():
    model = net()
    loss = nn.functional.cross_entropy
    batches = [(X, Y), (X[:1] * 2, Y[:1])]
    twin = copy.deepcopy(model)
    (2 * loss(twin(X), Y) / 3 + loss(twin(X[:1] * 2), Y[:1]) / 3).backward()
    product = (twin[3].weight * twin[3].weight.grad).detach()
    for granularity, scores in (("weight", product.abs()), ("kernel", product.sum((2, 3)).abs())):
        plan = graphprune.shrink(model, X, 0.4, granularity=granularity, criterion="taylor", batches=batches, loss=loss, return_plan=True)[1]
        keep = plan.masks(model)["3.weight"]
        keep = keep if granularity == "weight" else keep[..., 0, 0]
        assert scores[keep].min() > scores[~keep].max()
    with torch.no_grad():
        model[1].weight.copy_(torch.rand(8) + 0.1)
    gamma = model[1].weight.detach().abs()
    by_hand = torch.stack([torch.stack([gamma[c] * model[3].weight[o, c].detach().norm() for c in range(4)]) for o in range(8)])
    keep = graphprune.shrink(model, X, 0.5, granularity="kernel", criterion="synaptic", return_plan=True)[1].masks(model)["3.weight"][..., 0, 0]
    ungrouped = nn.Sequential(model[0], model[1], model[2], nn.Conv2d(8, 4, 3)).double().eval()
    strength = gamma * ungrouped[3].weight.detach().flatten(2).norm(dim=2)
    plan = graphprune.shrink(ungrouped, X, 0.5, granularity="kernel", criterion="synaptic", return_plan=True)[1]
    found = plan.masks(ungrouped)["3.weight"][..., 0, 0]
    assert strength[found].min() > strength[~found].max() and by_hand.shape == keep.shape
    squares = ungrouped[3].weight.detach().ravel().square()
    lamp = torch.stack([s / squares[squares >= s].sum() for s in squares])
    plan = graphprune.shrink(ungrouped, X, 0.5, granularity="weight", criterion="lamp", return_plan=True)[1]
    assert torch.equal(plan.masks(ungrouped)["3.weight"].ravel(), ~lowest(lamp, len(lamp) // 2))


def test_custom_scores_per_entry_or_per_unit():
    model = net()
    entry = graphprune.shrink(model, X, 0.5, granularity="kernel", criterion=lambda w: w.square(), return_plan=True)[1]
    unit = graphprune.shrink(model, X, 0.5, granularity="kernel", criterion=lambda w: w.flatten(2).square().sum(2) if w.ndim > 2 else w, return_plan=True)[1]
    norm = graphprune.shrink(model, X, 0.5, granularity="kernel", return_plan=True)[1]
    assert entry.parts == unit.parts == norm.parts
    opposite = graphprune.shrink(model, X, 0.5, granularity="kernel", criterion=lambda w: -w.square(), return_plan=True)[1]
    assert opposite.parts != norm.parts


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_bad_input():
    model = net()
    shrink = graphprune.shrink
    with pytest.raises(UnknownName, match="nearest is 'kernel'"):
        shrink(model, X, granularity="kernal")
    for wrong in ("4:2", "0:4", "2:2"):
        with pytest.raises(BadRatio, match="no n:m"):
            shrink(model, X, granularity=wrong)
    for wrong in ("vector:diagonal", "n:m", 3, "weight:", "head:2"):
        with pytest.raises(UnknownName):
            shrink(model, X, granularity=wrong)
    with pytest.raises(BadRatio, match="would empty 0.weight"):
        shrink(model, X, 0.999, granularity="kernel")
    with pytest.raises(NothingToPrune, match="7 does not divide"):
        shrink(model, X, granularity="3:7")
    with pytest.raises(NothingToPrune, match="is tied to"):
        shrink(Tied(), torch.tensor([[1]]), granularity="weight")
    with pytest.raises(NothingToPrune, match="already parametrised"):
        shrink(parametrizations.weight_norm(nn.Linear(4, 4)), torch.randn(1, 4), granularity="weight")
    with pytest.raises(NothingToPrune, match="recurrent"):
        shrink(nn.LSTM(4, 4), torch.randn(2, 1, 4), granularity="weight")
    with pytest.raises(NothingToPrune):
        shrink(nn.Sequential(nn.ReLU()), torch.randn(1, 4), granularity="weight")
    with pytest.raises(NothingToPrune, match="attention heads"):
        shrink(model, X, granularity="head")
    with pytest.raises(UnknownName, match="no score named"):
        shrink(model, X, granularity="weight", criterion="magnitud")
    with pytest.raises(NeedsBatches):
        shrink(model, X, granularity="weight", criterion="taylor")
    with pytest.raises(BadScore, match="shape"):
        shrink(model, X, granularity="weight", criterion=lambda w: w.sum())
    with pytest.raises(BadScore, match="not finite"):
        shrink(model, X, granularity="weight", criterion=lambda w: w * float("nan"))
    assert all(type(module).__module__.startswith("torch.nn") for module in model)


def test_heads_are_read_from_the_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), Attention(8, 4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), Flat(8)).double().eval()
    x = X[:, :, :4, :4]
    small, plan = graphprune.shrink(model, x, 0.5, granularity="head", return_plan=True)
    assert small[1].heads == 2 and small[1].dim == 4 and small[1].qkv.out_features == 24
    assert small[0].out_channels == 8 and small[2].out_channels == 8
    assert (small(x) - graphprune.zeroed(model, plan)(x)[0]).abs().max() < 1e-12
    wide = graphprune.shrink(model, x, 0.5)
    assert wide[2].out_channels == 4  # the control: channels go when they may


def test_the_summed_axis_does_not_depend_on_how_a_weight_is_stored():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return (x @ self.w) @ self.v

    model = Other()
    found, _ = weights(graphprune.trace(model, torch.randn(3, 8)), model)
    assert [(w.name, w.inputs) for w in found] == [("w", 0), ("v", 0)]
    small = graphprune.shrink(model, torch.randn(3, 8), granularity="2:4")
    assert (graphprune.masked(small)["w"].reshape(2, 4, 4).sum(1) == 2).all()


def test_every_granularity_has_a_name_and_a_line():
    listed = graphprune.catalogue.available()["granularity"]
    assert set(listed) == {*NAMES, "hidden", "heads", "mlp", "layers", "experts", "expert_mlp", "head_dim", "query_heads", "vocabulary"}
    assert all(parse(name.replace("n:m", "2:4")) for name in listed)


@pytest.mark.parametrize("first", ["channel", *MASKED, "group", "group:box"])
@pytest.mark.parametrize("second", ["channel", "weight", "group:box"])
def test_rounds_of_any_kinds_compose_to_one_plan(first, second, tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "times", lambda *_: (2.0, 1.0))
    model = net()
    once = graphprune.shrink(model, X, 0.5, granularity=first)
    twice, plan = graphprune.shrink(once, X, 0.7, granularity=second, return_plan=True)
    whole = twice.__dict__["graphprune_plan"]
    again = graphprune.apply(model, graphprune.Plan.from_json(whole.to_json()))
    assert torch.equal(again(X), twice(X))
    (zero,) = graphprune.zeroed(model, whole)(X)
    assert (twice(X) - zero).abs().max() < 1e-12 < (twice(X) - once(X)).abs().max()
    graphprune.save(twice, tmp_path)
    assert torch.equal(graphprune.load(tmp_path, net(5))(X), twice(X))
    wide, masks = graphprune.expand(twice), whole.masks(model)
    assert wide.keys() == masks.keys()
    assert all(torch.equal(wide[name], tensor * masks[name]) for name, tensor in model.state_dict().items() if tensor.is_floating_point())
    assert plan.parts or second == "channel"


def test_bad_data_for_scores_of_entries():
    model, loss = net(), nn.functional.cross_entropy
    for granularity in ("weight", "2:4", "group:box"):
        ask = {"granularity": granularity, "criterion": "taylor", "inplace": True}
        with pytest.raises(NeedsBatches, match="needs data"):
            graphprune.shrink(model, X, **ask)
        with pytest.raises(NeedsBatches, match="at least one batch"):
            graphprune.shrink(model, X, batches=iter(()), loss=loss, **ask)
        with pytest.raises(BadLoss, match="does not depend"):
            graphprune.shrink(model, X, batches=[(X, Y)], loss=lambda out, y: torch.zeros((), requires_grad=True), **ask)
        with pytest.raises(BadLoss, match="the loss is inf"):
            graphprune.shrink(model, X, batches=[(X, Y)], loss=lambda out, y: loss(out, y) * float("inf"), **ask)
        with pytest.raises(BadScore, match="0.weight are not finite|3.weight are not finite"):
            graphprune.shrink(model, X, granularity=granularity, criterion=lambda w: w * float("inf"), inplace=True)

        def meddle(weight):
            return weight.zero_() + 1

        graphprune.shrink(model, X, granularity=granularity, criterion=meddle)
    assert not graphprune.masked(model) and all(p.grad is None and bool(p.any()) for name, p in model.named_parameters() if "weight" in name)


def test_damaged_plans_change_nothing(tmp_path):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, plan = graphprune.shrink(model, X, 0.5, granularity="weight", return_plan=True)
    for wrong in (Part("mask", "3.weight", b"12"), Part("mask", "9.weight", b""), Part("skip", "1.2", (0, (), False)), Part("magic", "0.weight", None)):
        with pytest.raises(BadPlan):
            graphprune.apply(model, replace(plan, parts=(*plan.parts, wrong)), inplace=True)
    with pytest.raises(BadPlan):
        graphprune.Plan.from_json('{"cuts": {}, "shapes": {}, "edits": [], "notes": [], "lines": [], "parts": [["mask"]]}')
    other = nn.Sequential(*[nn.Conv2d(2, 8, 3) for _ in range(8)])
    with pytest.raises(BadPlan):
        graphprune.apply(other, plan, inplace=True)
    graphprune.save(small, tmp_path)
    (tmp_path / "plan.json").write_text((tmp_path / "plan.json").read_text().replace('"0.weight"', '"1.weight"'))
    with pytest.raises(BadPlan):
        graphprune.load(tmp_path, model)
    assert not graphprune.masked(model) and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a CUDA device with 2:4 kernels")
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_semi_structured_computes_what_the_masks_do():
    x = torch.randn(64, 128).cuda().half()
    small = graphprune.shrink(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)), x.float().cpu(), granularity="2:4").cuda().half()
    fast = graphprune.semi_structured(small)
    assert isinstance(fast[0].weight.data, torch.sparse.SparseSemiStructuredTensor)
    assert (fast(x) - small(x)).abs().max() < 2e-2 < small(x).abs().max()


class Shared(nn.Module):
    """Query heads that share keys and values, which are copied by expand and reshape, as language models write it."""

    def __init__(self, heads=6, shared=3, dim=4):
        super().__init__()
        self.heads, self.shared, self.dim = heads, shared, dim
        self.q, self.kv, self.o = nn.Linear(8, heads * dim), nn.Linear(8, 2 * shared * dim), nn.Linear(heads * dim, 8)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, self.dim).transpose(1, 2)
        k, v = (self.copies(part) for part in self.kv(x).chunk(2, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).reshape(b, n, -1))

    def copies(self, x):
        b, n, _ = x.shape
        x = x.view(b, n, -1, self.dim).transpose(1, 2)
        return x[:, :, None].expand(b, x.shape[1], self.heads // self.shared, n, self.dim).reshape(b, -1, n, self.dim)


def test_heads_that_share_keys_go_together():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Shared(), nn.Linear(8, 8)).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(model, x, 1 / 3, granularity="head", return_plan=True)
    assert (small[1].q.out_features, small[1].kv.out_features, small[1].o.in_features, small[0].out_features) == (16, 16, 16, 8)
    kept = plan.cuts["1.q.weight"][0]
    assert [i // 8 for i in kept[::8]] == [i // 4 for i in plan.cuts["1.kv.weight"][0][:8:4]]  # the two query heads of each key that stays
    (zero,) = graphprune.zeroed(model, plan)(x)
    assert (small(x) - zero).abs().max() < 1e-12 < (small(x) - model(x)).abs().max()
    assert small(torch.randn(1, 7, 8, dtype=torch.float64)).shape == (1, 7, 8)


@pytest.mark.parametrize("granularity", ["block", "group", "weight", "2:4"])
def test_options_of_a_score_are_not_dropped_in_silence(granularity):
    with pytest.raises(BadScore, match="takes no options of a score"):
        graphprune.shrink(net(), X, 0.5, granularity=granularity, criterion=graphprune.scores.l2.with_(reduce="mean"))


def test_a_kernel_over_one_axis_has_boxes_too():
    model = nn.Sequential(nn.Conv1d(2, 4, 5, padding=2), nn.ReLU(), nn.Conv1d(4, 3, 3)).double().eval()
    x = torch.randn(2, 2, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(model, x, 0.5, granularity="group:box", return_plan=True)
    assert torch.allclose(small(x), graphprune.zeroed(model, plan)(x)[0]) and small[0].weight.shape[2] < 5
