"""Experts: what a router chooses from goes with its slice of every stack; what is cut computes what the original does with those logits at minus infinity."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.errors import BadRatio, NothingToPrune

WIDTH, INNER = 8, 8  # the product in groups wants rows of a multiple of 16 bytes


class Mixture(nn.Module):
    """A layer in, a mixture beside the stream, a layer out; how tokens find their experts is what differs below."""

    def __init__(self, experts: int = 8, chosen: int = 2) -> None:
        super().__init__()
        torch.manual_seed(experts)
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, INNER))
        self.down = nn.Parameter(torch.randn(experts, INNER, WIDTH))
        self.experts, self.chosen = experts, chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.mixed(x))

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.router(x).softmax(-1).topk(self.chosen)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        inner = torch.einsum("ti,tkio->tko", x, self.up[at]).relu()
        return (share.unsqueeze(-1) * torch.einsum("tko,tkoi->tki", inner, self.down[at])).sum(1)


class Normalised(Mixture):
    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share, at = torch.topk(self.router(x), self.chosen)
        return share.softmax(-1), at


class Corrected(Mixture):
    """Scores of their own choose (with a correction that is no weight of the sum), and others weigh."""

    def __init__(self, experts: int = 8, chosen: int = 2) -> None:
        super().__init__(experts, chosen)
        self.register_buffer("correction", torch.randn(experts) / 50)

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.router(x).sigmoid()
        at = (scores + self.correction).topk(self.chosen)[1]
        share = scores.gather(1, at)
        return share / share.sum(-1, keepdim=True), at


class Sorted(Mixture):
    """Tokens in the order of their experts, one product for all of them, by how many each expert has."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        flat = at.reshape(-1)
        order = flat.argsort(stable=True)
        counts = self.counted(flat)
        ends = counts.cumsum(0).int()
        rows = x[order // self.chosen]
        inner = torch._grouped_mm(rows, self.up, offs=ends).relu()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        out = torch._grouped_mm(inner, self.down, offs=ends)[back]
        return (out.view(len(x), self.chosen, -1) * share.unsqueeze(-1)).sum(1)

    def counted(self, flat: torch.Tensor) -> torch.Tensor:
        return torch.bincount(flat, minlength=self.experts)


class Histogram(Sorted):
    def counted(self, flat: torch.Tensor) -> torch.Tensor:
        return torch.histc(flat.float(), bins=self.experts, min=0, max=self.experts - 1).long()


class Biased(Mixture):
    def __init__(self, experts: int = 8, chosen: int = 2) -> None:
        super().__init__(experts, chosen)
        self.bias, self.shared = nn.Parameter(torch.randn(experts, INNER)), nn.Linear(WIDTH, WIDTH)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        inner = (torch.einsum("ti,tkio->tko", x, self.up[at]) + self.bias[at]).relu()
        return self.shared(x) + (share.unsqueeze(-1) * torch.einsum("tko,tkoi->tki", inner, self.down[at])).sum(1)


class Largest(Mixture):
    """One expert for each token, by ``max``."""

    def __init__(self, experts: int = 8, chosen: int = 1) -> None:
        super().__init__(experts, 1)

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.router(x).softmax(-1).max(-1, keepdim=True)


class Argmax(Largest):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        at = shares.argmax(-1)
        inner = torch.einsum("ti,tio->to", x, self.up[at]).relu()
        return shares.gather(1, at.unsqueeze(1)) * torch.einsum("to,toi->ti", inner, self.down[at])


class OneHot(Largest):
    """A table says who is chosen; every expert works on the tokens that are his, and on zeros."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        table = self.table(shares.argmax(-1)).to(x.dtype)
        inner = torch.bmm(torch.einsum("te,ti->eti", table, x), self.up).relu()
        return torch.einsum("te,eti->ti", table, torch.bmm(inner, self.down)) * (shares * table).sum(-1, keepdim=True)

    def table(self, at: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(at, self.experts)


class CountedTo(OneHot):
    def table(self, at: torch.Tensor) -> torch.Tensor:
        return at.unsqueeze(-1) == torch.arange(self.router.out_features)[None]


class Several(OneHot):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        shares, at = self.router(x).softmax(-1).topk(2)
        table = (self.table(at) * shares.unsqueeze(-1)).sum(1)
        return self.weighed(table / table.sum(-1, keepdim=True), x)

    def weighed(self, table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        inner = torch.bmm(x.expand(self.experts, -1, -1), self.up).relu()
        return torch.einsum("te,eti->ti", table, torch.bmm(inner, self.down))


class Shares(Several):
    """A table of shares, zero for those that are not chosen."""

    def __init__(self, experts: int = 8, chosen: int = 2) -> None:
        Mixture.__init__(self, experts, chosen)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        table = torch.zeros(len(x), self.experts).scatter(1, at, share)
        return self.weighed(table, x)


LAYOUTS = [Mixture, Normalised, Corrected, Sorted, Histogram, Biased, Largest, Argmax, OneHot, CountedTo, Several, Shares]


def never_chosen(model: nn.Module, gone: list[int], value: float = -torch.inf) -> nn.Module:
    """The original, whose router says minus infinity (or another number) of some experts."""
    twin = copy.deepcopy(model)

    def hook(module: nn.Module, args: tuple, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(gone), value)

    twin.router.register_forward_hook(hook)
    if isinstance(twin, Corrected):  # a score after a sigmoid is 0 there, and its correction has to be minus infinity as well
        twin.correction[gone] = value
    return twin


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_cut_mixture_is_the_original_that_never_chooses_what_is_gone(layout, data) -> None:
    stays = data.draw(st.integers(2, 6))
    model, x = layout(), torch.randn(16, 4)
    small, plan = graphprune.shrink(model, x, what={"experts": stays}, score=graphprune.scores.random.with_(seed=stays), return_plan=True)
    kept = plan.cuts["router.weight"][0]
    assert len(kept) == stays and plan.cuts["up"][0] == plan.cuts["down"][0] == kept
    assert small.up.shape == (stays, WIDTH, INNER) and small.router.out_features == stays
    gone = [expert for expert in range(8) if expert not in kept]
    other = torch.randn(64, 4)
    torch.testing.assert_close(small(other), never_chosen(model, gone)(other), rtol=1e-4, atol=1e-5)
    wrong = [(expert + 1) % 8 for expert in gone]
    assert not torch.allclose(small(other), never_chosen(model, wrong)(other))


def test_a_logit_of_zero_is_another_model() -> None:
    """The control: zeroing a router's row does not remove an expert."""
    model, x = Mixture(), torch.randn(64, 4)
    small, plan = graphprune.shrink(model, x, what={"experts": 4}, return_plan=True)
    gone = [expert for expert in range(8) if expert not in plan.cuts["up"][0]]
    assert not torch.allclose(small(x), never_chosen(model, gone, 0.0)(x))
    (oracle,) = graphprune.zeroed(model, plan)(x)
    torch.testing.assert_close(small(x), oracle)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_and_what_is_inside_of_them_go_together(layout) -> None:
    model, x = layout(), torch.randn(16, 4)
    small = graphprune.shrink(model, x, what={"experts": 4, "expert_mlp": 4, "hidden": 4})
    assert small.up.shape == (4, 4, 4) and small.down.shape == (4, 4, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_without_values_takes_the_same_experts(layout) -> None:
    model, x = layout(), torch.randn(16, 4)
    _, checked = graphprune.shrink(model, x, what={"experts": 4}, return_plan=True)
    chosen = graphprune.plan(model, x, what={"experts": 4})
    assert chosen.cuts == checked.cuts and len(chosen.cuts["up"][0]) == 4
    assert chosen.cuts != graphprune.plan(model, x, what={"experts": 5}).cuts


@pytest.mark.parametrize("layout", [Mixture, Sorted])
def test_as_many_stay_as_are_chosen(layout) -> None:
    model, x = layout(chosen=3), torch.randn(16, 4)
    assert graphprune.shrink(model, x, 0.9).router.out_features == 3
    assert graphprune.shrink(model, x, params=0.6, what="experts").router.out_features >= 3
    with pytest.raises(BadRatio, match="chooses 3"):
        graphprune.shrink(model, x, what={"experts": 2})


class Winners(nn.Module):
    """The largest of the hidden units go on: nobody's weights are addressed, and zero may well be among the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, at = self.up(x).topk(3)
        return self.down(torch.zeros(len(x), 8, dtype=x.dtype).scatter(1, at, values))


class Parity(Mixture):
    """What is done with the numbers of experts depends on the numbers themselves."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        share, at = self.routed(x)
        return super().mixed(x) * (at % 2).sum(-1, keepdim=True)


class Table(Mixture):
    """The positions address something that nobody may cut as well."""

    def forward(self, x: torch.Tensor, prices: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.head(self.mixed(y)) * prices[self.routed(y)[1]].sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("model", "inputs"), [(Winners(), (torch.randn(5, 4),)), (Parity(), (torch.randn(5, 4),)), (Table(), (torch.randn(5, 4), torch.randn(8)))]
)
def test_what_is_not_understood_stays_whole(model, inputs) -> None:
    with pytest.raises(NothingToPrune):
        graphprune.shrink(model, inputs, what="experts")
    overview = graphprune.widths(model, inputs)
    assert not overview["experts"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_public_mixtures_come_back_from_their_configuration(family, tmp_path) -> None:
    pytest.importorskip("transformers")
    from families import build, result

    model, inputs = build(family)
    small = graphprune.shrink(model, inputs, 0.3, what="experts", widths=graphprune.Widths(uniform=True))
    assert graphprune.plan_of(small) is not None and small.num_parameters() < model.num_parameters()
    small.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(result(back, inputs), result(small, inputs))
    assert not torch.allclose(result(back, inputs), result(model, inputs))


class Pooled(nn.Module):
    """The largest over channels weighs all of them; nobody asks where it is."""

    def __init__(self, largest) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.out, self.largest = nn.Linear(4, 8), nn.Linear(8, 3), largest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inside(x)
        return self.out(y * self.largest(y).sigmoid())


def test_a_maximum_of_which_nobody_reads_the_position_chooses_nothing() -> None:
    x, also = torch.randn(5, 4), graphprune.Widths(also=("statistics",))
    with_position, without = Pooled(lambda y: y.max(-1, keepdim=True)[0]), Pooled(lambda y: y.amax(-1, keepdim=True))
    cuts = [graphprune.plan(model, x, 0.5, widths=also).cuts for model in (with_position, without)]
    assert cuts[0] == cuts[1] and cuts[0]["inside.weight"]
    assert not graphprune.widths(with_position, x)["experts"]
    for model in (with_position, without):
        with pytest.raises(NothingToPrune, match="statistic"):
            graphprune.plan(model, x, 0.5)
    read = Pooled(lambda y: y.max(-1, keepdim=True)[1] + 1.0)  # the control: what is done with it is not understood
    with pytest.raises(NothingToPrune, match="positions are used by add"):
        graphprune.plan(read, x, 0.5, widths=also)


def test_a_book_of_codes_has_units_of_its_own() -> None:
    """The nearest code of a book: codes that are gone are never the nearest."""

    class Book(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.book, self.decoder = nn.Linear(4, 8), nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.book[torch.cdist(self.encoder(x), self.book).argmin(-1)])

    model, x = Book(), torch.randn(32, 4)
    small, plan = graphprune.shrink(model, x, what={"experts": 10}, return_plan=True)
    kept = list(plan.cuts["book"][0])
    other = torch.randn(64, 4)
    distances = torch.cdist(model.encoder(other), model.book[kept])
    torch.testing.assert_close(small(other), model.decoder(model.book[kept][distances.argmin(-1)]))
    assert not torch.allclose(small(other), model(other))  # the control


class Between(nn.Module):
    """A router, stacked experts, weights of a table's experts, and an MLP; ``between`` says how they work."""

    def __init__(self, between) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.bank = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 4, 3))
        self.up, self.down = nn.Parameter(torch.randn(6, 4, 8)), nn.Parameter(torch.randn(6, 8, 3))
        self.gate, self.inside, self.outside, self.between = nn.Linear(6, 3), nn.Linear(4, 10), nn.Linear(10, 4), between

    def forward(self, x):
        return self.between(self, x)

    def one(self, x, at):
        return torch.einsum("ti,tio->to", x, self.bank[at])

    def every(self, x, table):
        return torch.einsum("te,eto->to", table, torch.einsum("ti,eih->eth", x, self.up).relu() @ self.down)


def returned(self, x):
    at = self.router(x).argmax(-1)
    return self.one(x, at), at


def least_beside(self, x):
    logits = self.router(x)
    return self.one(x, logits.topk(1)[1][:, 0]) + logits.min(-1)[0][:, None]


def softmax_of_a_table(self, x):
    logits = self.router(x)
    shares, at = logits.topk(2)
    return self.every(x, torch.zeros_like(logits).scatter(1, at, shares).softmax(-1))


@pytest.mark.parametrize("between", [returned, least_beside, softmax_of_a_table])
def test_what_follows_all_experts_holds_them(between) -> None:
    """Numbers of experts that are returned, the least of all logits, a softmax in which those that are not chosen have a share."""
    with pytest.raises(NothingToPrune):
        graphprune.plan(Between(between).eval(), torch.randn(40, 4), what="experts")


def test_hidden_units_beside_a_mixture_are_cut_alone() -> None:
    def between(self, x):
        x = x + self.outside(self.inside(x).relu())
        logits = self.router(x)
        return self.one(x, logits.argmax(-1)) + self.gate(logits.relu())

    model, x = Between(between).eval(), torch.randn(40, 4)
    assert set(graphprune.plan(model, x, 0.5, what="mlp").cuts) == {"inside.weight", "inside.bias", "outside.weight"}
    assert "bank" in graphprune.plan(model, x, 0.5, what="experts").cuts  # the control


@pytest.mark.parametrize("table", ["one hot", "random"])
def test_experts_that_all_work_keep_their_number_unless_they_are_named(table) -> None:
    def between(self, x):
        logits = self.router(x)
        if table == "random":
            return self.every(x, torch.nn.functional.gumbel_softmax(logits, hard=True))
        return self.every(x, torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(x.dtype))

    model, x = Between(between).eval(), torch.randn(40, 4)
    _, plan = graphprune.shrink(model, x, 0.5, return_plan=True)
    assert {name: set(axes) for name, axes in plan.cuts.items()} == {"up": {2}, "down": {1}}
    if table == "one hot":
        assert 0 in graphprune.plan(model, x, 0.5, what="experts").cuts["up"]


def test_numbers_that_are_counted_to_beside_comparisons_with_one_number() -> None:
    """No positions are chosen: what is counted to is a position, and a comparison with a single value nothing special."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            at = torch.arange(x.shape[0])
            first = at[:1].squeeze()
            return self.out(self.inside(x).relu()) * (at == first).unsqueeze(-1)

    small = graphprune.shrink(Counted(), torch.randn(5, 4), 0.5)
    assert small.inside.out_features == 4


class Dense(nn.Module):
    """All experts run, in products that einsum puts into the columns of one; a table weighs them."""

    def __init__(self, fill, dim=8, experts=6, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.router, self.head = nn.Linear(dim, dim), nn.Linear(dim, experts), nn.Linear(dim, 3)
        self.up, self.down, self.fill = nn.Parameter(torch.randn(experts, dim, width) / 3), nn.Parameter(torch.randn(experts, width, dim) / 3), fill

    def forward(self, x):
        x = self.stem(x)
        scores = self.router(x)
        best, at = scores.topk(2)
        if self.fill:
            gates = torch.full_like(scores, self.fill).scatter(-1, at, best).softmax(-1)
        else:
            gates = torch.zeros_like(scores).scatter(-1, at, best.softmax(-1))
        inner = torch.einsum("td,edh->teh", x, self.up).relu()
        return self.head(torch.einsum("ted,te->td", torch.einsum("teh,ehd->ted", inner, self.down), gates))


@pytest.mark.parametrize("fill", [0.0, -torch.inf, -1e9])
def test_experts_in_the_columns_of_one_product_go_where_they_are_named(fill) -> None:
    net, x = Dense(fill).double().eval(), torch.randn(7, 8, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, what={"experts": 0.5}, return_plan=True)
    assert small.router.out_features == 3 and small.up.shape == (3, 8, 12)
    assert (small(x) - graphprune.zeroed(net, plan)(x)[0]).abs().max() < 1e-12
    gone = sorted(set(range(6)) - set(plan.cuts["router.weight"][0]))
    assert (small(x) - never_chosen(net, gone)(x)).abs().max() < 1e-12 < (small(x) - never_chosen(net, gone, 0.0)(x)).abs().max()
    inner = graphprune.shrink(net, x, 0.5)
    assert inner.router.out_features == 6 and inner.up.shape == (6, 4, 6)


def test_a_table_that_is_low_but_not_that_low_holds_its_experts() -> None:
    net, x = Dense(-5.0).double().eval(), torch.randn(7, 8, dtype=torch.float64)
    with pytest.raises(NothingToPrune, match="a softmax over it"):
        graphprune.shrink(net, x, what={"experts": 0.5})


class Bounded(nn.Module):
    """Scores that are not minus infinity any more where the router says so, before a softmax over all of them; or counts beside the result."""

    def __init__(self, kind, experts=6):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.head, self.kind = nn.Linear(6, experts), nn.Linear(6, 3), kind
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))

    def forward(self, x):
        scores = self.router(x)
        scores = {"twice": scores.softmax(-1), "tanh": scores.tanh(), "sigmoid": scores.sigmoid()}.get(self.kind, scores / 2 + 1)
        shares = scores.softmax(-1)
        best, at = shares.topk(2, -1)
        gate = torch.zeros_like(shares).scatter(-1, at, best)
        out = sum(expert(x) * gate[:, index, None] for index, expert in enumerate(self.experts))
        return (self.head(out), torch.bincount(at.flatten(), minlength=len(self.experts)).double().std()) if self.kind == "counted" else self.head(out)


@pytest.mark.parametrize("kind", ["twice", "tanh", "sigmoid", "counted"])
def test_a_softmax_over_what_is_not_minus_infinity_holds_the_experts(kind) -> None:
    with pytest.raises(NothingToPrune, match="a softmax over it" if kind != "counted" else "statistic"):
        graphprune.shrink(Bounded(kind).double().eval(), torch.randn(9, 6, dtype=torch.float64), what={"experts": 0.5})


def test_a_softmax_over_scores_that_still_are_lets_the_experts_go() -> None:
    net, x = Bounded("scaled").double().eval(), torch.randn(9, 6, dtype=torch.float64)
    small, plan = graphprune.shrink(net, x, what={"experts": 0.5}, return_plan=True)
    gone = sorted(set(range(6)) - set(plan.cuts["router.weight"][0]))
    assert len(small.experts) == 3 and (small(x) - never_chosen(net, gone)(x)).abs().max() < 1e-12
