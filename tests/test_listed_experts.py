"""Experts that are modules of a list, called one by one: cut as the original computes that never chooses what is gone, or whole, with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.cutting.passthrough import PassingOver
from graphprune.errors import BadRatio, NothingToPrune
from graphprune.tracing.trace import trace

WIDTH, INNER, EXPERTS = 8, 16, 6


class Listed(nn.Module):
    """A layer in, a mixture beside the stream, a layer out; how the experts of the list are called is what differs below."""

    def __init__(self, chosen: int = 2) -> None:
        super().__init__()
        torch.manual_seed(chosen)
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS))
        self.chosen, self.num_experts = chosen, EXPERTS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.mixed(x))

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.router(x).softmax(-1).topk(self.chosen)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers of the list are compared with what was chosen."""
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(at == number)
            out.index_add_(0, rows, self.weighted(expert(x[rows]), share[rows, place, None], number))
        return out

    def weighted(self, y: torch.Tensor, share: torch.Tensor, number: int) -> torch.Tensor:
        return y * share


class Hit(Listed):
    """A table of which expert each token goes to; only those that are hit are called, by a number in a tensor."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(at, num_classes=self.num_experts).permute(2, 1, 0)
        for number in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            place, rows = torch.where(mask[number].squeeze(0))
            out.index_add_(0, rows, self.experts[number](x[None, rows].reshape(-1, x.shape[-1])) * share[rows, place, None])
        return out


class Ranged(Listed):
    """The list is counted by an attribute, and experts without tokens are passed over."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            rows, place = torch.where(at == number)
            if rows.numel():
                out[rows] = out[rows] + self.experts[number](x[rows]) * share[rows, place, None]
        return out


class Slots(Listed):
    """Place after place of what was chosen."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        for place in range(self.chosen):
            for number, expert in enumerate(self.experts):
                mask = at[:, place] == number
                if mask.any():
                    out[mask] += share[mask, place, None] * expert(x[mask])
        return out


class Dense(Listed):
    """Every expert works on every token, and gates are zero for those that were not chosen."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        gates = torch.zeros(len(x), len(self.experts)).scatter(1, at, share)
        return sum(gates[:, number : number + 1] * expert(x) for number, expert in enumerate(self.experts))


class Unbound(Listed):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        gates = torch.zeros_like(self.router(x)).scatter_(-1, at, share)
        return torch.stack([gate.unsqueeze(-1) * expert(x) for gate, expert in zip(gates.unbind(-1), self.experts, strict=True)]).sum(0)


class Masked(Listed):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = torch.where(at == number, share, 0.0).sum(-1, keepdim=True)
            out = torch.where((at == number).any(-1, keepdim=True), out + weight * expert(x), out)
        return out


class Pairs(Listed):
    """Two lists of the same length, and a layer that all tokens share; scores of their own choose."""

    def __init__(self, chosen: int = 2) -> None:
        super().__init__(chosen)
        del self.experts
        self.up, self.down = nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(EXPERTS)), nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(EXPERTS))
        self.shared, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("correction", torch.randn(EXPERTS) / 50)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).sigmoid()
        at = (scores + self.correction).topk(self.chosen)[1]
        share, normed = scores.gather(1, at), self.norm(x)
        out = self.shared(x)
        for number in range(len(self.up)):
            rows, place = torch.where(at == number)
            out = out.index_add(0, rows, self.down[number](self.up[number](normed[rows]).relu()) * share[rows, place, None])
        return out


class First(Listed):
    """One expert for each token, by ``max`` or ``argmax``."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        share, at = shares.max(-1)
        return self.each(x, share, at)

    def each(self, x: torch.Tensor, share: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = at == number
            out[mask] = self.weighted(expert(x[mask]), share[mask, None], number)
        return out


class FirstAt(First):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        at = shares.argmax(-1)
        return self.each(x, shares.gather(1, at.unsqueeze(1)).squeeze(1), at)


LAYOUTS = [Listed, Hit, Ranged, Slots, Dense, Unbound, Masked, Pairs, First, FirstAt]


def never_chosen(model: nn.Module, gone: list[int], value: float = -torch.inf) -> nn.Module:
    """The original, whose router says minus infinity (or another number) of some experts."""
    twin = copy.deepcopy(model)
    twin.router.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor(gone), value))
    if isinstance(twin, Pairs):  # a score after a sigmoid is 0 there, and its correction has to be minus infinity as well
        twin.correction[gone] = value
    return twin


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_a_cut_mixture_is_the_original_that_never_chooses_what_is_gone(layout, data) -> None:
    stays = data.draw(st.integers(2, 5))
    model, x = layout().eval(), torch.randn(24, 4)
    small, plan = graphprune.shrink(model, x, what={"experts": stays}, score=graphprune.scores.random.with_(seed=stays), return_plan=True)
    gone = [number for number in range(EXPERTS) if number not in plan.cuts["router.weight"][0]]
    assert small.router.out_features == stays == EXPERTS - len(gone)
    assert all(len(module) == stays for module in small.modules() if isinstance(module, nn.ModuleList))
    other = torch.randn(64, 4)
    assert torch.equal(small(other), never_chosen(model, gone)(other))
    torch.testing.assert_close(graphprune.zeroed(model, plan)(other)[0], small(other))
    wrong = [(number + 1) % EXPERTS for number in gone]
    assert not torch.allclose(small(other), never_chosen(model, wrong)(other))  # the control


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_no_layers(layout) -> None:
    model, x = layout().eval(), torch.randn(24, 4)
    overview = graphprune.widths(model, x)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert overview["experts"] and not [row.where for row in overview["layers"] if row.where.rpartition(".")[0] in lists]


@pytest.mark.parametrize("layout", [Listed, Hit, Dense])
def test_few_tokens_are_enough(layout) -> None:
    """Experts that the example does not reach are reached in further runs, so that what is inside of them is cut with all others."""
    model = layout(chosen=1).eval()
    small = graphprune.shrink(model, torch.randn(2, 4), what={"experts": 4, "expert_mlp": 8, "hidden": 4})
    assert all(expert[0].weight.shape == (8, 4) and expert[2].weight.shape == (4, 8) for expert in small.experts)
    assert small(torch.randn(64, 4)).shape == (64, 3)


def test_what_is_inside_of_experts_is_of_its_own_kind() -> None:
    model, x = Listed().eval(), torch.randn(24, 4)
    overview = graphprune.widths(model, x)
    assert [(row.where, row.size) for row in overview["experts"]] == [("experts", EXPERTS)]
    assert [(row.count, row.size) for row in overview["expert_mlp"]] == [(EXPERTS, INNER)] and not overview["mlp"]
    small, plan = graphprune.shrink(model, x, what={"expert_mlp": 0.5}, return_plan=True)
    assert [expert[0].out_features for expert in small.experts] == [INNER // 2] * EXPERTS
    torch.testing.assert_close(small(x), graphprune.zeroed(model, plan)(x)[0])


class Twice(Listed):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate([*self.experts, self.experts[2]]):
            rows, place = torch.where(at == number % EXPERTS)
            out.index_add_(0, rows, expert(x[rows]) * share[rows, place, None])
        return out


class Same(Listed):
    """One module under two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[4] = self.experts[2]


class Unlike(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[4] = nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, WIDTH))


class Numbered(Listed):
    def weighted(self, y: torch.Tensor, share: torch.Tensor, number: int) -> torch.Tensor:
        return y * share * (number + 1)


class Special(Listed):
    def weighted(self, y: torch.Tensor, share: torch.Tensor, number: int) -> torch.Tensor:
        return (y.relu() if number == 3 else y) * share


class Scaled(Listed):
    """A table beside the experts, which nothing says to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(EXPERTS))

    def weighted(self, y: torch.Tensor, share: torch.Tensor, number: int) -> torch.Tensor:
        return y * share * self.scale[number]


class Always(Listed):
    """An expert leaves something behind, even if it is not chosen."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return super().mixed(x) + self.experts[1][2].bias


class Otherwise(Listed):
    """An expert that is not chosen is missed."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(at == number)
            out = out.index_add(0, rows, expert(x[rows]) * share[rows, place, None]) if len(rows) else out + 1
        return out


class Turned(Listed):
    """What is not chosen works."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        return sum((at != number).all(-1, keepdim=True) * expert(x) for number, expert in enumerate(self.experts)) * share.sum(-1, keepdim=True)


class Soft(Listed):
    """Gates that are not zero where an expert was not chosen."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).softmax(-1)
        share, _ = scores.topk(self.chosen)
        return sum(scores[:, number : number + 1] * expert(x) for number, expert in enumerate(self.experts)) * share.sum(-1, keepdim=True)


class Backwards(Listed):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        for number in range(EXPERTS):
            rows, place = torch.where(at == number)
            out.index_add_(0, rows, self.experts[-1 - number](x[rows]) * share[rows, place, None])
        return out


class Literal(Listed):
    """The code says how many there are."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out = torch.zeros_like(x)
        for number in range(6):
            rows, place = torch.where(at == number)
            out.index_add_(0, rows, self.experts[number](x[rows]) * share[rows, place, None])
        return out


class Parts(Listed):
    """Experts are given other parts of the input."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        out, given = torch.zeros_like(x), (x, x.flip(0))
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(at == number)
            out.index_add_(0, rows, expert(given[number % 2][rows]) * share[rows, place, None])
        return out


class Counted(Listed):
    """How many tokens each expert has is an output."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        _, at = self.routed(self.stem(x))
        return super().forward(x), [(at == number).sum() for number in range(len(self.experts))]


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Twice, "not what is done|experts"),
        (Same, "experts"),
        (Unlike, "not alike"),
        (Numbered, "not what is done"),
        (Special, "not what is done"),
        (Scaled, "experts"),
        (Always, "read for other experts"),
        (Otherwise, "something else with fewer modules"),
        (Turned, "used by ne"),
        (Soft, "chosen|alone|experts"),
        (Backwards, "place"),
        (Literal, "something else with fewer modules"),
        (Parts, "not what is done"),
        (Counted, "output"),
    ],
)
def test_what_is_not_understood_stays_whole(layout, reason) -> None:
    model, x = layout().eval(), torch.randn(24, 4)
    with pytest.raises(NothingToPrune, match=reason):
        graphprune.shrink(model, x, what={"experts": 3})
    small = graphprune.shrink(model, x, 0.5)  # all else goes as ever
    assert len(small.experts) == EXPERTS and small.router.out_features == EXPERTS


def test_fewer_than_are_chosen_cannot_be_asked_for() -> None:
    model, x = Listed(chosen=3).eval(), torch.randn(24, 4)
    with pytest.raises(BadRatio, match=r"The nearest that work are 3 and 4"):
        graphprune.shrink(model, x, what={"experts": 2})
    assert len(graphprune.shrink(model, x, 0.9, what="experts").experts) == 3
    half = graphprune.shrink(model, x, params=0.7, what="experts")
    assert sum(p.numel() for p in half.parameters()) <= 0.7 * sum(p.numel() for p in model.parameters())


def test_the_list_passes_over_what_is_gone_and_can_be_cut_again(tmp_path) -> None:
    model, x = Ranged().eval(), torch.randn(24, 4)
    once, plan = graphprune.shrink(model, x, what={"experts": 4}, return_plan=True)
    assert type(once.experts) is PassingOver and once.num_experts == 4
    assert [name for name, _ in once.experts.named_children()] == [str(number) for number in range(EXPERTS)]  # names stay
    again = graphprune.shrink(once, x, what={"experts": 2, "expert_mlp": 0.5})
    assert len(again.experts) == again.num_experts == 2
    together = graphprune.plan_of(again)
    torch.testing.assert_close(again(x), graphprune.zeroed(model, together)(x)[0])
    graphprune.save(again, tmp_path)
    assert torch.equal(graphprune.load(tmp_path, base=model)(x), again(x))
    assert graphprune.Plan.from_json(plan.to_json()) == plan


def test_two_layers_and_their_names() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Listed().eval(), Hit().eval()])
            for layer in self.layers:
                layer.stem, layer.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    model, x = Deep(), torch.randn(24, 4)
    assert [each.lists for each in trace(model, x).mixtures] == [("layers.0.experts",), ("layers.1.experts",)]
    small, plan = graphprune.shrink(model, x, what={"experts": 3, "layers": None}, ratio=0.0, return_plan=True)
    assert [len(layer.experts) for layer in small.layers] == [3, 3]
    torch.testing.assert_close(small(x), graphprune.zeroed(model, plan)(x)[0])


def test_in_place_what_fails_leaves_the_list() -> None:
    model, x = Literal().eval(), torch.randn(24, 4)
    before = [id(expert) for expert in model.experts]
    with pytest.raises(NothingToPrune):
        graphprune.shrink(model, x, what={"experts": 3}, inplace=True)
    assert type(model.experts) is nn.ModuleList and [id(expert) for expert in model.experts] == before
    good = Ranged().eval()
    assert graphprune.shrink(good, x, what={"experts": 3}, inplace=True) is good and len(good.experts) == 3


def test_a_configuration_says_how_many_there_are(tmp_path) -> None:
    pytest.importorskip("transformers")
    from zoo_support import declare_operators

    declare_operators()
    import transformers

    class Config(transformers.PreTrainedConfig):
        model_type = "listed_experts"

        def __init__(self, experts: int = EXPERTS, inner: int = INNER, width: int = WIDTH, layers: int = 2, **options) -> None:
            super().__init__(**options)
            self.experts, self.inner, self.width, self.layers = experts, inner, width, layers

    class Layer(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.router = nn.Linear(config.width, config.experts, bias=False)
            shapes = ((config.width, config.inner), (config.inner, config.width))
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(*shapes[0]), nn.ReLU(), nn.Linear(*shapes[1])) for _ in range(config.experts))
            self.config = config

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            share, at = self.router(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for number in range(self.config.experts):
                rows, place = torch.where(at == number)
                out.index_add_(0, rows, self.experts[number](x[rows]) * share[rows, place, None])
            return out

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.stem, self.head = nn.Linear(4, config.width), nn.Linear(config.width, 3)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
            self.post_init()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x)

    torch.manual_seed(0)
    model, x = Model(Config()).eval(), torch.randn(24, 4)
    what = {"experts": 4, "expert_mlp": 0.5, "hidden": 0.5}
    small = graphprune.shrink(model, x, what=what, widths=graphprune.Widths(uniform=True))
    assert (small.config.inner, small.config.width) == (INNER // 2, WIDTH // 2)
    small.save_pretrained(tmp_path)
    back = Model.from_pretrained(tmp_path).eval()
    assert back.config.experts == 4 and torch.equal(back(x), small(x))


def test_experts_that_are_to_be_kept_stay() -> None:
    x = torch.randn(24, 4)
    for keep in (["experts.5"], ["experts.0", "experts.3"], [f"experts.{number}" for number in (1, 2, 4, 5)]):
        kept = graphprune.plan(Listed().eval(), x, what={"experts": 4}, keep=keep).cuts["router.weight"][0]
        assert {int(name.rpartition(".")[2]) for name in keep} <= set(kept) and len(kept) == 4
    assert graphprune.plan(Listed().eval(), x, what={"experts": 4}).cuts["router.weight"][0] != [0, 3, 4, 5]  # the control: not all of these by chance
    with pytest.raises(BadRatio, match="keep= names 5"):
        graphprune.plan(Listed().eval(), x, what={"experts": 4}, keep=[f"experts.{number}" for number in range(5)])
    with pytest.raises(NothingToPrune, match="kept on request"):
        graphprune.plan(Listed().eval(), x, what={"experts": 4}, keep=["router"])


@pytest.mark.parametrize("layout", [Listed, Dense])
def test_a_token_visits_as_many_experts_as_before_where_it_is_routed(layout) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = layout().eval(), torch.randn(24, 4)
    small, plan = graphprune.shrink(model, x, what={"experts": 4}, return_plan=True)
    counted = []
    for each in (model, small):
        with FlopCounterMode(display=False) as counter:
            each(x)
        counted.append(counter.get_total_flops() // 2)
    assert plan.outline is not None
    assert plan.outline.after.macs / plan.outline.before.macs == pytest.approx(counted[1] / counted[0], rel=0.03)
