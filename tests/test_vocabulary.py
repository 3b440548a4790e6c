"""Tokens as units: rows of the table and of the head together, by use, with ids that follow; a cut model gives the tokens that stay what the original does."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from families import build, result, written
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.cutting.tokens import FILE, Tokens
from graphprune.errors import BadFile, BadInput, BadOption, BadPlan, BadRatio, NeedsBatches, NothingToPrune

SIZE = 23


class Language(nn.Module):
    """A table, a gated layer in a stream, a head: of its own, or the table again."""

    def __init__(self, tied=False, bias=True, size=SIZE):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(size, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head, self.vocab_size = nn.LayerNorm(8), nn.Linear(8, size, bias=bias), size
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


class Config:
    def __init__(self, **facts):
        self.__dict__.update(facts)

    def to_dict(self):
        return copy.deepcopy(self.__dict__)


class Pooled(nn.Module):
    """Takes the place of the end token, as encoders of texts do, and passes over padding; both are named by a configuration."""

    def __init__(self, end=19, pad=3):
        super().__init__()
        self.config = Config(eos_token_id=end, pad_token_id=pad, forced_ids=[7], suppress_tokens=[11, end])
        self.table, self.mix, self.out = nn.Embedding(SIZE, 8, padding_idx=pad), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids):
        x = self.mix(self.table(ids)) * (ids != self.config.pad_token_id).unsqueeze(-1)
        at = (ids == self.config.eos_token_id).int().argmax(-1)
        return self.out(x.cumsum(1)[torch.arange(len(ids)), at])


def ids(*shape, size=SIZE, seed=0):
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(seed))


def apart(model, small, words, tokens):
    """How far logits of the tokens that stay are apart, for texts made of them."""
    with torch.no_grad():
        wanted, got = model(words), small(tokens.to_new(words))
        wanted = wanted[0] if isinstance(wanted, list) else wanted
    return float((got - (wanted[..., list(tokens.kept)] if wanted.shape != got.shape else wanted)).abs().max())


@settings(max_examples=15, deadline=None)
@given(tied=st.booleans(), bias=st.booleans(), chosen=st.sets(st.integers(0, SIZE - 1), min_size=2, max_size=SIZE - 1))
def test_tokens_that_stay_keep_their_logits(tied, bias, chosen):
    model = Language(tied, bias).double()
    small, plan = graphprune.shrink(model, ids(2, 5), what={"vocabulary": chosen}, return_plan=True)
    tokens = graphprune.tokens(small)
    assert tokens.kept == tuple(sorted(chosen)) and small.table.num_embeddings == small.head.out_features == small.vocab_size == len(chosen)
    assert (small.head.weight is small.table.weight) == tied
    words = torch.tensor(sorted(chosen)).repeat(2, 1)
    assert apart(model, small, words, tokens) < 1e-12
    assert apart(graphprune.zeroed(model, plan), small, words, tokens) < 1e-12
    with torch.no_grad():
        assert (small(tokens.to_new(words).flip(1)) - model(words)[..., list(tokens.kept)]).abs().max() > 1e-3  # the control


@pytest.mark.parametrize("share, stay", [(0.5, 12), ("30%", 16), (9, 9)])
def test_what_is_used_most_stays(share, stay):
    texts = [torch.tensor([[token] * token for token in (4,)]), torch.tensor([[20, 20, 20, 17, 17, 5]])]
    small = graphprune.shrink(Language(), ids(2, 5), what={"vocabulary": graphprune.Vocabulary(share, texts, special=[22])})
    kept = graphprune.tokens(small).kept
    assert len(kept) == stay and {4, 20, 17, 5, 22} <= {*kept}
    assert {*kept} - {4, 20, 17, 5, 22} == {*[token for token in range(SIZE) if token not in (4, 20, 17, 5, 22)][: stay - 5]}  # then the lowest


def test_texts_of_a_score_or_a_repair_do_as_well():
    texts = [ids(4, 6, size=9, seed=seed) for seed in range(3)]
    for options in ({"score": graphprune.scores.wanda_sp.on(texts)}, {"repair": texts}):
        small = graphprune.shrink(Language(), ids(2, 5), what={"mlp": 0.25, "vocabulary": 9}, **options)
        assert graphprune.tokens(small).kept == tuple(range(9)) and small.up.out_features == 12


class Tied(nn.Module):
    """One table for both ends."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down = nn.Embedding(SIZE, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, SIZE, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words):
        x = self.table(words)
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("make, what", [(Language, {"mlp": 0.5}), (Tied, {"mlp": 0.5}), (Tied, {"mlp": 0.5, "hidden": 0.25})])
def test_a_repair_afterwards_takes_ids_of_the_original(make, what):
    """It is the repair of the cut itself, which is made before tokens go; texts hold tokens that went as well."""
    texts = [ids(8, 6, seed=seed) for seed in range(4)]
    what = what | {"vocabulary": graphprune.Vocabulary(9, texts)}
    model = make().eval()
    at_once = graphprune.shrink(model, texts[0], what=what, repair=graphprune.Repair(texts, progress=False))
    small, plan = graphprune.shrink(model, texts[0], what=what, return_plan=True)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    better = graphprune.repair(small, model, plan, texts, progress=False)
    assert {*graphprune.tokens(better).kept} == {*graphprune.tokens(at_once).kept}
    for (name, one), other in zip(better.named_parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in better.state_dict().items())  # the control: it did something
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


@pytest.mark.parametrize("end, pad", [(19, 3), (2, 0), (22, 1)])
def test_ids_that_the_configuration_names_stay_and_follow(end, pad):
    model = Pooled(end, pad)
    before = model.config.to_dict()
    words = ids(3, 6)
    words[:, 4] = end
    small = graphprune.shrink(model, words, what={"vocabulary": [4, 6, 12, 18]})
    tokens = graphprune.tokens(small)
    assert {end, pad, 11} <= {*tokens.kept} and model.config.to_dict() == before
    for name in ("eos_token_id", "pad_token_id"):
        assert tokens.to_old(getattr(small.config, name)) == before[name]
    assert tokens.to_old(small.config.suppress_tokens) == [11, end] and tokens.to_old(small.table.padding_idx) == pad
    assert small.config.forced_ids == [7]  # no attribute of this kind
    texts = torch.tensor([[4, pad, end, 6], [12, end, 18, pad], [end, 4, 4, 6]])
    assert apart(model, small, texts, tokens) < 1e-6
    small.config.eos_token_id = tokens.to_new(4)
    assert apart(model, small, texts, tokens) > 1e-3  # the control


class Shifted(Language):
    def forward(self, ids):
        return super().forward((ids + 1) % SIZE)


class Weighed(Language):
    def forward(self, ids):
        return super().forward(ids) * ids.float().mean()


class Started(Language):
    def forward(self, ids):
        return super().forward(ids) + self.table.weight[3].sum()


class Scored(Language):
    def forward(self, ids):
        return super().forward(ids).log_softmax(-1)


class Ordered(Language):
    def forward(self, ids):
        return super().forward(ids) * (ids > 4).unsqueeze(-1)


@pytest.mark.parametrize("kind", [Shifted, Weighed, Started, Scored, Ordered])
def test_code_that_does_more_with_ids_keeps_them_all(kind):
    with pytest.raises(NothingToPrune, match="vocabulary stays whole"):
        graphprune.shrink(kind(), ids(2, 5), what={"vocabulary": [1, 2, 3]})


def test_a_model_without_ids_has_no_vocabulary():
    with pytest.raises(NothingToPrune, match="no whole-number input"):
        graphprune.shrink(nn.Linear(4, 8), torch.zeros(1, 4), what={"vocabulary": 3})


def test_what_is_needed_is_said():
    model, example = Language(), ids(2, 5)
    with pytest.raises(NeedsBatches, match="Vocabulary"):
        graphprune.shrink(model, example, 0.5, what="vocabulary")
    with pytest.raises(BadRatio, match="from 0 to 22"):
        graphprune.shrink(model, example, what={"vocabulary": [1, 23]})
    with pytest.raises(BadRatio, match="stay in any case"):
        graphprune.shrink(Pooled(), example, what={"vocabulary": 2})
    with pytest.raises(NeedsBatches, match="another tokenizer"):
        graphprune.shrink(model, example, what={"vocabulary": graphprune.Vocabulary(0.5, [torch.tensor([[99]])])})
    with pytest.raises(NeedsBatches, match="no token ids"):
        graphprune.shrink(model, example, what={"vocabulary": graphprune.Vocabulary(0.5, [torch.zeros(2, 3)])})
    with pytest.raises(BadOption, match="goes with 'vocabulary'"):
        graphprune.shrink(model, example, what={"mlp": graphprune.Vocabulary(0.5)})
    with pytest.raises(BadOption):
        graphprune.Vocabulary(special=["pad"])
    small, plan = graphprune.shrink(model, example, what={"vocabulary": 7}, return_plan=True)
    assert plan.tokens.kept == tuple(range(7)) and any("lowest ids" in note for note in plan.notes)


@pytest.mark.parametrize("kinds", [("vocabulary",), ("mlp", "vocabulary"), ("vocabulary", "hidden", "mlp")])
@pytest.mark.parametrize("tied", [True, False])
def test_under_a_budget_with_others(kinds, tied):
    model, texts = Language(tied), [ids(4, 6, size=15)]
    count = lambda net: sum(parameter.numel() for parameter in net.parameters())  # noqa: E731
    what = {kind: graphprune.Vocabulary(batches=texts) if kind == "vocabulary" else None for kind in kinds}
    small, plan = graphprune.shrink(model, ids(2, 5), what=what, params=0.7, return_plan=True)
    assert 0.62 <= count(small) / count(model) <= 0.7
    tokens = plan.tokens
    assert 0 < len(tokens) < SIZE
    words = torch.tensor([tokens.kept[:6]])
    zeroed = graphprune.zeroed(model, plan)
    assert apart(zeroed, small, words, tokens) < 1e-5
    again = graphprune.apply(model, graphprune.Plan.from_json(plan.to_json()))
    with torch.no_grad():
        assert torch.equal(again(tokens.to_new(words)), small(tokens.to_new(words)))


def test_ids_are_mapped_both_ways():
    tokens = Tokens((2, 3, 7, 11), 12)
    assert tokens.to_new(7) == 2 and tokens.to_old(2) == 7 and len(tokens) == 4
    assert tokens.to_new([[2], [11, 3]]) == [[0], [3, 1]] and tokens.to_new(torch.tensor([[3, -100]])).tolist() == [[1, -100]]
    assert tokens.to_new([1, 2], gone=3) == [3, 0] and tokens.to_old(tokens.to_new(torch.tensor([11, 2]))).tolist() == [11, 2]
    assert tokens.to_new(torch.tensor([7], dtype=torch.int32)).dtype is torch.int32
    for way, ids_of, facts in (("to_new", [5], {}), ("to_new", [12], {}), ("to_old", [4], {}), ("to_new", [1.5], {}), ("to_new", 2, {"gone": 9})):
        with pytest.raises(BadInput):
            getattr(tokens, way)(ids_of, **facts)
    assert Tokens.from_dict(json.loads(json.dumps(tokens.to_dict()))) == tokens
    for damage in ({"kept": [3, 2]}, {"kept": [12]}, {"kept": []}, {"size": "12"}, {"slots": [["a"]]}):
        with pytest.raises((ValueError, KeyError, TypeError)):
            Tokens.from_dict(tokens.to_dict() | damage)


def test_the_map_lies_beside_the_weights(tmp_path):
    model = Language()
    small = graphprune.shrink(model, ids(2, 5), what={"vocabulary": [0, 4, 8, 9, 21]})
    graphprune.save(small, tmp_path)
    assert graphprune.tokens(tmp_path).kept == graphprune.tokens(tmp_path / FILE).kept == (0, 4, 8, 9, 21)
    back = graphprune.load(tmp_path, Language())
    assert graphprune.tokens(back).kept == (0, 4, 8, 9, 21)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(BadFile):
        graphprune.tokens(tmp_path)
    with pytest.raises(BadFile):
        graphprune.tokens(tmp_path / "nowhere")
    for source in (model, SimpleNamespace()):
        with pytest.raises(BadPlan):
            graphprune.tokens(source)


def test_twice_cut_counts_from_the_original():
    model = Language()
    first = graphprune.shrink(model, ids(2, 5), what={"vocabulary": [1, 4, 8, 9, 21]})
    second = graphprune.shrink(first, torch.tensor([[0, 1, 2]]), what={"vocabulary": [0, 3, 4]})
    tokens = graphprune.tokens(second)
    assert tokens.kept == (1, 9, 21) and tokens.size == SIZE
    assert apart(model, second, torch.tensor([[9, 1, 21, 9]]), tokens) < 1e-6


def test_in_place_leaves_what_others_hold():
    model = Pooled()
    config = model.config
    words = ids(3, 6)
    words[:, 2] = 19
    other = graphprune.shrink(copy.deepcopy(model), words, what={"vocabulary": [4, 6]})
    same = graphprune.shrink(model, words, what={"vocabulary": [4, 6]}, inplace=True)
    assert same is model and config.eos_token_id == 19 and model.config.eos_token_id == other.config.eos_token_id != 19
    assert torch.equal(same.table.weight, other.table.weight)


def test_widths_lists_tokens():
    row = graphprune.widths(Language(), ids(2, 5))["vocabulary"][0]
    assert (row.size, row.params) == (SIZE, 17.0) and "vocabulary" in str(graphprune.widths(Language(), ids(2, 5)))
    assert not graphprune.widths(Shifted(), ids(2, 5))["vocabulary"]


@pytest.mark.parametrize("name", ["llama", "roberta", "t5"])
def test_transformers_load_it_again(name, tmp_path):
    model, inputs = build(name)
    texts = [inputs, {key: value.flip(0) for key, value in inputs.items()}]
    what = {"vocabulary": graphprune.Vocabulary(40, texts), "mlp": 0.5}
    small = graphprune.shrink(model, inputs, what=what, widths=graphprune.Widths(uniform=True))
    tokens = graphprune.tokens(small)
    assert small.config.vocab_size == len(tokens) == 40 and {0, 1, 2} <= {*tokens.kept}
    cut = {key: tokens.to_new(value) for key, value in inputs.items()}  # all of them are used
    logits = result(small, cut)
    zeroed = graphprune.zeroed(model, graphprune.plan_of(small))
    wanted = zeroed(**inputs)[0]
    assert torch.allclose(logits, wanted if wanted.shape == logits.shape else wanted[..., list(tokens.kept)], atol=1e-5)
    small.save_pretrained(tmp_path)
    assert graphprune.tokens(tmp_path).kept == tokens.kept
    back = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(result(back, cut), logits)
    first = written(small, cut)
    assert first is None or torch.equal(written(back, cut), first)
    model.save_pretrained(tmp_path)
    whole = graphprune.shrink(model, inputs, what={"mlp": 0.5}, widths=graphprune.Widths(uniform=True))
    whole.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()  # it would be true no more
