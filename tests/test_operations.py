"""An operation is one record: nobody else knows operations by name, and what follows from a rule's text is right.

Also what a user's own operations get: their own rule and never that of a namesake, coupling, costs, links, exact cuts and repairs from one line,
and an error with the place in the text where the rule is wrong.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphprune
from graphprune.coupling.links import links
from graphprune.errors import BadRule
from graphprune.operations import OPERATIONS, operation, resolve
from graphprune.operations.contraction import product
from graphprune.operations.notation import Value, at, expr, parse
from graphprune.repair.sites import sites
from graphprune.tracing.trees import tensors

PACKAGE = Path(graphprune.__file__).parent

# Words that are also names of operations: ways to add scores up, options, names of the package's own functions. They may stand anywhere but beside a node.
WORDS = frozenset(
    "sum mean max min all any abs amax prod norm to select expand zeros ones linear index rand std var fill full dot sort where copy repeat fold mode".split()
)
# Names that stand for something else; each with what that is.
ARGUED = {
    "tracing/functions.py": ({"scaled_dot_product_attention"}, "calls of the Python code, not operations"),
    "tracing/features.py": ({"linear"}, "calls of the Python code, not operations"),
    "granularity/spec.py": ({"embedding"}, "what other tools call the axis of the residual stream"),
    "spelling.py": ({"minimum"}, "what other tools call an option"),
    "planning/unread.py": ({"split", "split_with_sizes"}, "calls of the Python code, not operations"),
    "tracing/members.py": (
        set("empty floor_divide gather masked_fill masked_scatter unbind where _index_put_impl index_put index stack sum slice".split()),
        "what a call gives where its entry was not chosen: one analysis alone asks for it, of mixtures in Python loops, and what it does not know stays whole",
    ),
    "tracing/sizes.py": ({"add", "sub", "mul"}, "methods of integers that remember their expression"),
}
KINDS = frozenset(("arithmetic", "statistic", "zero"))  # facts of a record whose values are called like operations
OF_A_NODE = frozenset(("name", "short", "func", "_schema", "op"))


def named_in(path: Path) -> set[tuple[int, str]]:
    """Names of operations that a file compares with, or keeps in a container: (line, name)."""
    names = {name for op in OPERATIONS.values() if op.name.startswith("aten::") for name in (op.name, op.short)}
    found: set[tuple[int, str]] = set()
    tree = ast.parse(path.read_text())
    kinds = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Compare) and _attributes(node) & KINDS for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts, about_a_node = [node.left, *node.comparators], bool(_attributes(node) & OF_A_NODE)
        elif isinstance(node, ast.Set | ast.List | ast.Tuple):
            parts, about_a_node = node.elts, False
        elif isinstance(node, ast.Dict):
            parts, about_a_node = [key for key in node.keys if key], False
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("split", "startswith", "endswith"):
            parts, about_a_node = [node.func.value, *node.args], False
        else:
            continue
        for part in parts:
            for constant in ast.walk(part):
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str) and id(constant) not in kinds:
                    words = [word for word in constant.value.split() if word in names or word.rstrip("_") in names]
                    found |= {(constant.lineno, word) for word in words if about_a_node or word not in WORDS}
    return found


def _attributes(node: ast.AST) -> set[str]:
    return {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


def test_no_file_outside_knows_an_operation_by_name():
    lines = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).as_posix()
        if own.startswith("operations/") or own == "__init__.py":
            continue
        argued = ARGUED.get(own, (set(), ""))[0]
        lines += [f"{own}:{line} {name}" for line, name in sorted(named_in(path)) if name not in argued]
    assert not lines, f"say it in the operation's record (graphprune/operations) and ask the node: {lines}"


def test_the_search_for_names_finds_some(tmp_path):
    file = tmp_path / "tables.py"
    lines = ['A = {"addmm": 1}', 'B = "bmm relu_".split()', 'C = node.func._schema.name == "aten::mm"', 'D = node.op.arithmetic == "mul"', 'E = x == "sum"']
    file.write_text("\n".join(lines))
    assert named_in(file) == {(1, "addmm"), (2, "bmm"), (2, "relu_"), (3, "aten::mm")}
    file.write_text('A = node.name in ("sum", "aten::sum")\n')
    assert {name for _, name in named_in(file)} == {"sum", "aten::sum"}


def test_a_namesake_in_another_namespace_is_another_operation():
    assert operation("aten::gelu").pointwise and not operation("mylib::gelu").pointwise
    assert resolve(torch.ops.aten.add_.Tensor).arithmetic == "add" and resolve(torch.ops.aten.add_.Tensor).pointwise


# ---- multiply-accumulates from the text

NETS = [
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    (nn.Conv2d(6, 6, 3, groups=6, stride=2, padding=1), (2, 6, 7, 8)),
    (nn.Conv1d(1, 5, 3, dilation=2), (2, 1, 9)),
    (nn.Conv3d(2, 1, 2), (1, 2, 4, 5, 3)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), (2, 4, 5, 6)),
    (nn.Linear(5, 1), (3, 5)),
    (nn.Linear(5, 7), (2, 3, 5)),
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    (nn.LSTM(4, 6, 2, bidirectional=True), (5, 2, 4)),
]


@pytest.mark.parametrize("net, shape", NETS, ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else "")
def test_counts_are_those_of_the_flop_counter(net, shape):
    net, x = net.eval(), torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        net(x)
    found = graphprune.profile(net, x).macs
    if isinstance(net, nn.LSTM):  # the counter sees nothing inside: four gates, two layers, two directions, five steps of two samples
        assert found == 2 * 5 * 2 * 4 * 6 * ((4 + 6) + (12 + 6))
    elif isinstance(net, nn.TransformerEncoderLayer):  # nor inside of the fused layer
        assert found == 2 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * (2 * 2 * 5 * 5 * 4)
    else:
        assert found * 2 == counter.get_total_flops()


class Experts(nn.Module):
    """Rows in the order of their experts, as torch multiplies them in mixtures."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 16, 32)), nn.Parameter(torch.randn(2, 32, 16))

    def forward(self, x):
        ends = torch.tensor([3, 8], dtype=torch.int32)
        return torch._grouped_mm(torch._grouped_mm(x, self.up, offs=ends).relu(), self.down, offs=ends)


def test_counts_that_the_flop_counter_does_not_know():
    pairs = torch.randn(2, 16), torch.randn(2, 16)
    assert graphprune.profile(nn.Bilinear(16, 16, 32), pairs).macs == 2 * 16 * 16 * 32
    assert graphprune.profile(Experts(), torch.randn(8, 16)).macs == 8 * (16 * 32 + 32 * 16)
    left, right = expr("n _t, _t o, _ -> _ n o", Value((4, 6)), Value((6, 8)), Value((3,))), Value((3, 4, 8))
    assert product(left, right).macs == 4 * 6 * 8  # each row belongs to one expert


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_counts_of_every_matrix_product(sizes):
    b, n, i, o = sizes
    real = lambda *shape: torch.randn(*shape)  # noqa: E731
    calls = {
        "mm": (real(n, i), real(i, o)),
        "bmm": (real(b, n, i), real(b, i, o)),
        "addmm": (real(o), real(n, i), real(i, o)),
        "baddbmm": (real(b, n, o), real(b, n, i), real(b, i, o)),
        "addbmm": (real(n, o), real(b, n, i), real(b, i, o)),
        "linear": (real(b, n, i), real(o, i), real(o)),
        "mv": (real(n, i), real(i)),
        "addmv": (real(n), real(n, i), real(i)),
        "dot": (real(i), real(i)),
        "addr": (real(n, o), real(n), real(o)),
    }
    times = {"mm": n * i * o, "addmm": n * i * o, "mv": n * i, "addmv": n * i, "dot": i, "addr": 0}
    for name, args in calls.items():
        values = [Value(tuple(arg.shape)) for arg in args]
        result = getattr(torch.ops.aten, name)(*args)
        op = operation(f"aten::{name}")
        made = op.multiplies(op.rule(*values), values, {}, Value(tuple(result.shape)))
        assert sum(each.macs for each in made) == times.get(name, b * n * i * o), name


def test_attention_is_two_products():
    values = [Value(shape) for shape in ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7))]
    op = operation("aten::scaled_dot_product_attention")
    made = op.multiplies(op.rule(*values), values, {}, Value((2, 3, 5, 7)))
    assert [each.macs for each in made] == [2 * 3 * 5 * 6 * 4, 2 * 3 * 5 * 6 * 7]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(0, 3))
def test_counts_follow_a_cut(gone, heads):
    """What costs say of a cut is what the cut model costs, also for products that only the text describes."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.pair, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Bilinear(8, 8, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.c(self.pair(self.a(x), self.b(x)))

    net, x = Net().eval(), torch.randn(2, 6)
    groups = graphprune.couple(graphprune.trace(net, x))
    kept = [torch.arange(group.size)[: max(1, group.size - gone - heads)] for group in groups]
    small = graphprune.shrink(net, x, ratios={name: gone / 8 for name in ("a", "b")} or 0.5) if gone else net
    assert graphprune.cost(graphprune.couple(graphprune.trace(small, x))).macs == graphprune.profile(small, x).macs
    widths = dict(zip([group.name for group in groups], [len(k) for k in kept], strict=True))
    a, b, pair = (next(width for name, width in widths.items() if name.startswith(f"{own}.")) for own in ("a", "b", "pair"))
    assert graphprune.cost(groups, kept).macs == 2 * (6 * a + 6 * b + a * b * pair + pair * 3)


# ---- operations of a user's own


def custom(name, function, fake=None, tags=()):
    own = torch.library.custom_op(name, function, mutates_args=(), tags=tags)
    own.register_fake(fake or (lambda x, *rest: torch.empty_like(x)))
    return own


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).clone()


def _scaled(x: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * x @ weight.T


def _halves(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    parts = x.unflatten(-1, (groups, -1)).transpose(0, 1)
    return torch.bmm(parts, weight.unflatten(0, (groups, -1)).mT).transpose(0, 1).flatten(1)


for _name in ("gelu", "detach", "scramble", "mul"):
    custom(f"ownops::{_name}", _turned)
custom("ownops::scaled", _scaled, lambda x, weight, scale=1.0: x.new_empty(x.shape[0], weight.shape[0]))
custom("ownops::bare", _scaled, lambda x, weight, scale=1.0: x.new_empty(x.shape[0], weight.shape[0]))
custom("ownops::halves", _halves, lambda x, weight, groups: x.new_empty(x.shape[0], weight.shape[0]))
own = torch.ops.ownops


@graphprune.rule(own.scaled)
def _(x, weight, scale=1.0):
    return graphprune.expr("n i, o i -> n o", x, weight)


@graphprune.rule("ownops::halves")
def _(x, weight, groups):
    return graphprune.expr("n (g i), (g o) i -> n (g o)", x, weight, g=groups)


class Between(nn.Module):
    """A call between two layers."""

    def __init__(self, call, *shapes):
        super().__init__()
        self.a, self.call, self.b = nn.Linear(6, 16), call, nn.Linear(shapes[0][0] if shapes and len(shapes[0]) > 1 else 16, 4)
        self.weights = nn.ParameterList(torch.randn(*shape) for shape in shapes)

    def forward(self, x):
        return self.b(self.call(self.a(x).relu(), *self.weights).relu())


def exact(net, x, small, plan):
    for mine, theirs in zip([small(x)], graphprune.zeroed(net, plan)(x), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["gelu", "detach", "scramble", "mul"])
def test_a_namesake_is_locked_and_the_rest_is_cut(name):
    torch.manual_seed(0)
    net, x = nn.Sequential(Between(getattr(own, name)), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval(), torch.randn(5, 6).double()
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    assert small[0].a.out_features == 16 and small[1].out_features == 4
    exact(net, x, small, plan)
    reasons = [str(reason) for reason in graphprune.trace(net, x).labels.reasons if "no rule" in str(reason)]
    assert len(set(reasons)) == 1 and f"@graphprune.rule(torch.ops.ownops.{name})\n" in reasons[0] and f"def {name}(x): return graphprune.expr" in reasons[0]


CUSTOM = {
    "scaled": (Between(own.scaled, (12, 16)), 5 * (6 * 16 + 16 * 12 + 12 * 4)),
    "with a number": (Between(lambda x, w: own.scaled(x, w, 0.5), (12, 16)), 5 * (6 * 16 + 16 * 12 + 12 * 4)),
    "by keyword": (Between(lambda x, w: own.scaled(x, weight=w, scale=2.0), (12, 16)), 5 * (6 * 16 + 16 * 12 + 12 * 4)),
    "through a transpose": (Between(lambda x, w: own.scaled(x, w.t().contiguous().t(), 0.5), (12, 16)), 5 * (6 * 16 + 16 * 12 + 12 * 4)),
    "in groups": (Between(lambda x, w: own.halves(x, w, 4), (12, 4)), 5 * (6 * 16 + 4 * 4 * 3 + 12 * 4)),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_one_line_describes_a_product(name):
    """Costs, links, an exact cut."""
    torch.manual_seed(1)
    net, macs = CUSTOM[name]
    net, x = net.double().eval(), torch.randn(5, 6).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    assert graphprune.profile(net, x).macs == macs
    roles = {(link.role, link.leaf) for group in links(graphprune.couple(graphprune.trace(net, x))) for link in group}
    assert {("produces", "a.weight"), ("produces", "weights.0"), ("consumes", "b.weight")} <= roles
    assert ("consumes", "weights.0") in roles
    groups = 4 if name == "in groups" else 1
    small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
    assert small.a.out_features == 8 and small.weights[0].shape[1] == 8 // groups and small.weights[0].shape[0] < 12
    exact(net, x, small, plan)


def test_a_number_that_the_call_is_told_stays():
    """Nobody would tell the operation of another number of groups, so all groups stay, with less in each."""

    class Net(nn.Module):
        def __init__(self, groups):
            super().__init__()
            self.a, self.weight, self.groups, self.b = nn.Linear(6, 16), nn.Parameter(torch.randn(12, 16 // groups)), groups, nn.Linear(12, 2)

        def forward(self, x):
            return self.b(own.halves(self.a(x).relu(), self.weight, self.groups).relu())

    torch.manual_seed(2)
    for groups in (1, 2, 4):
        net, x = Net(groups).double().eval(), torch.randn(5, 6).double()
        small, plan = graphprune.shrink(net, x, 0.5, return_plan=True)
        assert small.a.out_features == 8 and small.weight.shape[1] == 8 // groups and small.weight.shape[0] < 12 and small.groups == groups
        exact(net, x, small, plan)
        node = next(node for node in graphprune.trace(net, x).nodes if node.name == "ownops::halves")
        assert node.product.groups == groups and node.macs == 5 * 12 * 16 // groups


def test_what_calls_of_torch_are_told_follows():
    """Numbers of groups and repeated shapes, for the oracle and for timings."""
    conv, norm, groups = nn.Conv2d(8, 8, 1, groups=4), nn.LayerNorm(6), nn.GroupNorm(4, 8)
    net, x = nn.Sequential(conv, norm, groups), torch.randn(2, 8, 3, 6)
    nodes = {node.op.short: node for node in graphprune.trace(net, x).nodes}
    told = nodes["convolution"].refitted((x[:, :4], conv.weight[:4], conv.bias[:4], [1, 1], [0, 0], [1, 1], False, [0, 0], 4), {"g": 2})
    assert told[8] == 2
    assert nodes["native_layer_norm"].refitted((x[..., :4], [6], norm.weight[:4], norm.bias[:4], 1e-5), {})[1] == [4]
    told = nodes["native_group_norm"].refitted((x[:1, :4, :2], groups.weight[:4], groups.bias[:4], 2, 8, 18, 4, 1e-5), {"g": 2})
    assert told[3:7] == (1, 4, 12, 2)
    for node in nodes.values():
        assert all(tensor.isfinite().all() for tensor in tensors(node.func(*node.refitted([ones(v) for v in node.args], {})), torch.Tensor))


def ones(arg):
    return torch.ones(arg.shape) if isinstance(arg, Value) else arg


def test_one_line_is_enough_for_repair_and_time():
    torch.manual_seed(4)
    net = Between(own.scaled, (12, 16)).eval()
    batches = [torch.randn(64, 6) for _ in range(6)]
    places, refused = sites(graphprune.trace(net, batches[0]))
    assert [site.weight for site in places] == ["a.weight", "weights.0", "b.weight"] and not refused
    from graphprune.timing.table import Table

    table = Table(torch.device("cpu"))
    node = next(node for node in graphprune.trace(net, batches[0]).nodes if node.name == "ownops::scaled")
    assert table.seconds(node, [(64, 8), (6, 8)]) > 0
    small, plan = graphprune.shrink(net, batches[0], 0.5, return_plan=True)
    repaired = graphprune.shrink(net, batches[0], 0.5, repair=batches)
    gap = lambda model: float((model(batches[1]) - net(batches[1])).detach().square().mean())  # noqa: E731
    assert gap(repaired) < 0.7 * gap(small)
    assert any(done.where == "weights.0" and done.kept for done in repaired.graphprune_repairs)


# ---- wrong rules

WRONG = {
    "not closed": ("n (i, o i -> n o", "not closed", "(i"),
    "not opened": ("n i), o i -> n o", "not opened", "), o"),
    "an ellipsis": ("... i, o i -> ... o", "no name", "... i"),
    "a number": ("n 16, o i -> n o", "number", "16"),
    "twice": ("i i, o i -> n o", "two axes", "i, o"),
    "no arrow": ("n i, o i", "'->'", ""),
    "wrong rank": ("b n i, o i -> b n o", "names 3 axes here, the tensor has shape (5, 16)", "b n i"),
    "missing operand": ("n i, o i, o -> n o", "3 operands", "o ->"),
    "unknown axis": ("n i, o i -> n q", "'q'", "q"),
    "wrong result": ("n i, o i -> n o _", "names 3 axes of a result", "n o _"),
    "two results": ("n i, o i -> n o, n", "describes 2 results", "n"),
    "two lengths": ("n i, i o -> n o", "length 16 elsewhere", "i o"),
    "unknown sizes": ("n (h i), o (h i) -> n o", "all sizes but one", "(h i)"),
    "no factors": ("n (_g i), o (_g i) -> n o", "factors of 5", "(_g i)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_says_where(name):
    text, said, _ = WRONG[name]
    sizes = {"_g": 5} if name == "no factors" else {}

    @graphprune.rule(own.bare)
    def _(x, weight, scale=1.0):
        return graphprune.expr(text, x, weight, **sizes)

    with pytest.raises(BadRule) as caught:
        graphprune.shrink(Between(own.bare, (12, 16)).eval(), torch.randn(5, 6), 0.5)
    message = str(caught.value)
    assert said in message and text in message
    quoted, marker = message.splitlines()[-2:]
    assert quoted == f"  {text}" and marker.strip() == "^" and marker.index("^") <= len(quoted)
    if WRONG[name][2]:
        assert quoted[marker.index("^") :].startswith(WRONG[name][2])


@pytest.mark.parametrize("answer", ["n i, o i -> n o", None, 3])
def test_a_rule_that_returns_something_else(answer):
    graphprune.rule(own.bare)(lambda x, weight, scale=1.0: answer)
    with pytest.raises(BadRule, match=r"(?s)rule of ownops::bare returned .*graphprune\.expr"):
        graphprune.trace(Between(own.bare, (12, 16)).eval(), torch.randn(5, 6))


def test_a_rule_that_fails():
    graphprune.rule(own.bare)(lambda x: graphprune.expr("n i -> n i", x))
    with pytest.raises(BadRule, match="rule of ownops::bare fails"):
        graphprune.trace(Between(own.bare, (12, 16)).eval(), torch.randn(5, 6))


def test_a_rule_that_breaks_its_law_is_found_by_the_check():
    graphprune.rule(own.bare)(lambda x, weight, scale=1.0: graphprune.expr("n i, i o -> n o", x, weight))
    with pytest.raises(graphprune.GraphpruneError):
        graphprune.shrink(Between(own.bare, (16, 16)).eval(), torch.randn(5, 6), 0.5)


@pytest.mark.parametrize("what", [F.relu, 3, "no such name", "aten::surely_not_there", None])
def test_what_is_no_operation(what):
    with pytest.raises(BadRule):
        graphprune.rule(what)
    with pytest.raises(BadRule):
        graphprune.rule()


def test_facts_that_nobody_knows():
    with pytest.raises(BadRule, match="there are"):
        graphprune.rule(own.bare, kernel=3)


def test_a_bare_name_is_atens():
    before = OPERATIONS["aten::renorm"] if "aten::renorm" in OPERATIONS else None
    try:
        graphprune.rule("renorm")(lambda x, p, dim, maxnorm: graphprune.expr("a [b] -> a [b]", x))
        assert operation("aten::renorm").rule is not None and "renorm" not in OPERATIONS
    finally:
        OPERATIONS.pop("aten::renorm")
        if before is not None:
            OPERATIONS["aten::renorm"] = before


CHECKS = [
    ("n (i, i o -> n o", 2), ("... i, i o -> ... o", 2), ("n 4, 4 o -> n o", 2), ("n i, i o -> n o", 1), ("n i, i o, o -> n o", 2), ("n i, o -> n o", 2),
    ("n i, i o -> n q", 2), ("n i, i o -> n", 2), ("n i, i o -> o n", 2), ("n i, o i -> n o", 2), ("n i i, i o -> n o", 2), ("n i; i o -> n o", 2),
]  # fmt: skip


@pytest.mark.parametrize("text, count", CHECKS)
def test_the_checker_refuses(text, count):
    with pytest.raises(BadRule) as caught:
        graphprune.check_rule(torch.mm, text, *(torch.randn(3, 4).double(), torch.randn(4, 5).double())[:count])
    assert text in str(caught.value)


def test_the_checker_accepts_the_right_one():
    graphprune.check_rule(torch.mm, "n i, i o -> n o", torch.randn(3, 4).double(), torch.randn(4, 5).double())


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab_1[]() ,->.4", max_size=24))
def test_any_text_is_read_or_refused_with_its_place(text):
    try:
        lefts, rights = parse(text)
    except BadRule as error:
        *_, quoted, marker = str(error).split("\n")
        assert quoted == f"  {text}" and marker.strip() == "^"
    else:
        assert all(isinstance(axes, tuple) for axes in (*lefts, *rights))
        words = re.sub(r"->|[,()]", " ", text).split()
        assert sum(len(group) for axes in (*lefts, *rights) for group in axes) == len(words)


def test_places():
    assert at("n i -> n", 4, "here").splitlines()[-1].index("^") == 6
