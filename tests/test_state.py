"""What a run leaves behind: a graph with fields, torch as it was, and nothing in memory that the model itself does not hold."""

import dataclasses
import gc
import os
import queue
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import graphprune
from graphprune.tracing.sizes import Size, Uses

X = torch.randn(2, 8)


class Block(nn.Module):
    """Two layers, and whatever is done between them."""

    def __init__(self, between=lambda module, h: h):
        super().__init__()
        self.up, self.down, self.width = nn.Linear(8, 16), nn.Linear(16, 4), 16
        self.__dict__["between"] = between

    def forward(self, x):
        return self.down(self.between(self, self.up(x).relu()))


def test_a_graph_is_its_fields():
    graph = graphprune.trace(Block(lambda m, h: h.view(-1, m.width) * float(h.sum() > -1e9)), X)
    twin = dataclasses.replace(graph)
    names = {field.name for field in dataclasses.fields(graph)}
    assert set(graph.__dict__) <= names and graph.real and twin.parameters == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert graphprune.cost(graphprune.couple(twin)) == graphprune.cost(graphprune.couple(graph))


def test_sizes_note_their_uses_where_they_belong():
    one, two = Uses(), Uses()
    first, second = Size(4, ("attr", ("", "a")), one), Size(4, ("attr", ("", "b")), two)
    assert first * 2 == 8 and float(second) == 4.0
    assert [len(uses.outcomes) for uses in (one, two)] == [1, 0] and two.floats == [("attr", ("", "b"))] and not one.floats


class Listening(torch.Tensor):
    """A tensor of a user's own class that hears of every call made with it."""

    calls: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("function", [nn.functional.softmax, nn.functional.layer_norm, nn.functional.gelu, torch.einsum])
def test_a_watch_leaves_the_overrides_of_others_alone(function):
    more = {nn.functional.softmax: (-1,), nn.functional.layer_norm: ((8,),), torch.einsum: ()}.get(function, ())
    given = ("ij -> ji", X.as_subclass(Listening)) if function is torch.einsum else (X.as_subclass(Listening), *more)
    net = Block()
    small, plan = graphprune.shrink(net, X, return_plan=True)
    checks = {name: vars(nn.functional)[name] for name in vars(nn.functional) if name.startswith("has_torch_function")}

    def heard():
        Listening.calls.clear()
        function(*given)
        return list(Listening.calls)

    plain = heard()
    with graphprune.Distillation(net, small, plan, X, features=1.0) as distill:
        distill(X, small(X))
        assert heard() == plain and function in plain
        assert all(vars(nn.functional)[name] is check for name, check in checks.items())


class Remembering(Block):
    def __init__(self, between):
        super().__init__(between)
        self.memory = nn.LSTM(4, 4)

    def forward(self, x):
        return self.memory(super().forward(x))[0]


@pytest.mark.parametrize("kind", [Block, Remembering])
def test_what_torch_is_while_a_model_runs(kind):
    def between(module, h):
        during.put((nn.Module.__call__, nn.functional.has_torch_function_unary, torch.backends.mha.get_fastpath_enabled(), gc.isenabled()))
        during.put(
            (
                torch.backends.mkldnn.enabled,
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
                torch.backends.cudnn.enabled,
            )
        )
        return h * float(h.sum() > -1e9)

    during = queue.SimpleQueue()  # a list would be as it was after the runs
    between(None, X)
    graphprune.shrink(kind(between), X)
    during = [during.get() for _ in range(during.qsize())]
    assert len(during) >= 6 and all(state == during[i % 2] for i, state in enumerate(during))


def test_attention_and_recurrent_layers_are_still_seen_inside():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.heads, self.memory, self.end = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 12), nn.Linear(12, 3)

        def forward(self, x):
            x = self.norm(x) if float(x.sum()) > -1e9 else x
            mask = torch.ones(len(x[0]), len(x[0]), dtype=torch.bool).tril()
            h = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            return self.end(self.memory(self.heads(h, h, h)[0])[0])

    graph = graphprune.trace(Both().eval(), torch.randn(2, 5, 8))
    names = {str(node.func) for node in graph.nodes}
    assert graph.real and not any("flash" in name or "mkldnn" in name or "lstm" in name for name in names)
    assert graphprune.shrink(Both().eval(), torch.randn(2, 5, 8)).memory.hidden_size == 6


@pytest.mark.parametrize("step", [lambda h: h.relu() + 1, lambda h: h.clone().mul_(2).view(-1).view_as(h), lambda h: torch.cat([h[:, :4], h[:, 4:]], 1)])
def test_a_run_with_values_keeps_no_activation(step):
    alive = queue.SimpleQueue()

    def between(module, h):
        if float(h.sum()) > -1e9:
            for _ in range(20):
                h = step(h)
        if not h.is_meta:
            gc.collect()
            alive.put(sum(type(o) in (torch.Tensor, nn.Parameter) and not o.is_meta and o.shape == h.shape for o in gc.get_objects()))
        return h

    net = Block(between)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net(X)
        graph = graphprune.trace(net, X)
    assert graph.real and -alive.get() + alive.get() <= 1
    assert graphprune.profile(net, X).memory <= 4096  # storages whose addresses are given away again are not one


def test_threads_leave_torch_and_each_other_alone():
    wanted = [graphprune.shrink(Block(), X, return_plan=True, criterion="random")[1].cuts for _ in range(1)][0].keys()
    call, failures, stop = nn.Module.__call__, [], threading.Event()
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def cut():
        for _ in range(4):
            try:
                if graphprune.shrink(Block(lambda m, h: h.view(-1, m.width) / m.width**0.5), X, return_plan=True, ratio=0.3)[1].cuts.keys() - wanted:
                    failures.append("another plan")
            except graphprune.errors.NothingToPrune:
                pass
            except Exception as error:
                failures.append(error)

    def run():
        while not stop.is_set():
            try:
                net(X)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=cut) for _ in range(4)]
    user = threading.Thread(target=run)
    user.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    user.join()
    assert not failures and nn.Module.__call__ is call


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.MultiheadAttention])
def test_checks_in_several_threads_leave_kernels_and_dice_alone(kind):
    """A check sets torch's kernels and its random numbers for the whole process, and puts them back: one at a time."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop = (kind(8, 2) if kind is nn.MultiheadAttention else kind(8, 8)), nn.Dropout()
            self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.c(self.drop(self.b(self.a(x, x, x)[0] if kind is nn.MultiheadAttention else self.a(x)[0])))

    def state():
        return torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.get_rng_state().tolist()

    torch.manual_seed(3)
    before, failures, x = state(), [], torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))

    def cut(net):
        try:
            for _ in range(3):
                graphprune.shrink(net, x, 0.5)
        except Exception as error:
            failures.append(error)

    nets = [Sequences().eval() for _ in range(4)]
    torch.manual_seed(3)
    threads = [threading.Thread(target=cut, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and state() == before


def test_the_collector_stays_on_in_the_users_functions():
    seen = []

    def loss(model, batch):
        seen.append(gc.isenabled())
        return model(batch).square().mean()

    graphprune.shrink(Block(), X, criterion="taylor", batches=[X], loss=loss)
    graphprune.shrink(Block(), X, criterion=lambda groups, model, batches: [seen.append(gc.isenabled()) or torch.rand(g.size) for g in groups])
    assert len(seen) >= 2 and all(seen)


def test_a_cut_model_says_its_plan():
    small, plan = graphprune.shrink(Block(), X, return_plan=True)
    assert graphprune.plan_of(small).cuts == plan.cuts and graphprune.plan_of(Block()) is None


@pytest.mark.parametrize("score", ["l2", "l1", "fpgm"])
def test_a_model_without_values_is_not_cut_by_scores_that_do_not_exist(score):
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).to("meta")
    with pytest.warns(UserWarning, match="no values for the score"):
        _, plan = graphprune.shrink(net, X.to("meta"), 0.5, score=score, verify=False, return_plan=True)
    assert plan.cuts["0.weight"][0] not in (list(range(16)), list(range(16, 32))) and len(plan.cuts["0.weight"][0]) == 16


def test_a_path_that_the_example_does_not_take_is_named():
    _, plan = graphprune.shrink(Block(lambda m, h: h if h.sum() > -1e9 else h.flip(1)), X, 0.5, return_plan=True)
    assert any("test_state.py" in note and "looks at a value" in note for note in plan.notes)


def test_plain_attributes_that_are_cut_stand_in_the_masks():
    net = Block(lambda m, h: h * m.scale)
    net.scale = torch.rand(16) + 1
    _, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    assert plan.masks(net)["scale"].tolist() == plan.masks(net)["up.bias"].tolist() and int(plan.masks(net)["scale"].sum()) == 8


CACHE: dict = {}


class Shared:
    table = None

    def __deepcopy__(self, memo):
        return self


def filled(kind):
    shared = Shared()

    def between(module, h):
        if kind == "global":
            return h * CACHE.setdefault("k", h.new_ones(1))
        holder = Shared if kind == "class" else shared
        if holder.table is None:
            holder.table = h.new_ones(1) * 2
        return h * holder.table

    return between


@pytest.mark.parametrize("kind", ["global", "class", "closure"])
def test_caches_outside_of_the_model_are_as_they_were(kind):
    net = Block(filled(kind))
    small = graphprune.shrink(net, X, 0.5)
    assert not CACHE and Shared.table is None
    assert net(X).shape == small(X).shape == (2, 4)
    CACHE.clear()
    Shared.table = None


@pytest.mark.parametrize("kind", ["forward", "before", "everywhere", "method"])
def test_hooks_of_the_user_notice_nothing(kind):
    seen, net = [], Block()
    holder = type("Holder", (), {"hook": lambda self, *_: seen.append(1), "__module__": __name__})()
    hook = {
        "forward": lambda: net.up.register_forward_hook(lambda *_: seen.append(1)),
        "before": lambda: net.register_forward_pre_hook(lambda *_: seen.append(1)),
        "everywhere": lambda: nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1)),
        "method": lambda: net.register_forward_hook(holder.hook),
    }[kind]()
    try:
        graphprune.shrink(net, X, 0.5)
        assert not seen
        net(X)
        assert seen
    finally:
        hook.remove()


class Slotted(nn.Module):
    """What it needs lies outside of its ``__dict__``."""

    __slots__ = ("__own", "shift", "times", "unset")

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)
        self.times, self.shift, self.__own = 2, torch.arange(4.0), [3]

    def forward(self, x):
        return self.down(self.up(x).relu() * self.times) + self.shift * self.__own[0]


class SlottedToo(Slotted):
    __slots__ = "more"

    def __init__(self):
        super().__init__()
        self.more = {"gain": 0.5}

    def forward(self, x):
        return super().forward(x) * self.more["gain"]


class SlottedWidth(Slotted):
    """A width in a slot, which no cut can change: left whole."""

    def __init__(self):
        super().__init__()
        self.times = 16

    def forward(self, x):
        return self.down(self.up(x).view(-1, self.times))


@pytest.mark.parametrize("kind", [Slotted, SlottedToo])
def test_slots_of_modules_are_copied(kind):
    net = kind().eval()
    small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
    (zero,) = graphprune.zeroed(net, plan)(X)
    assert small.up.out_features == 8 and torch.allclose(small(X), zero, atol=1e-6) and not torch.allclose(small(X), net(X), atol=1e-3)
    assert small._Slotted__own is not net._Slotted__own and small.shift is not net.shift and not hasattr(small, "unset")


def test_a_width_in_a_slot_stays():
    with pytest.raises(graphprune.errors.NothingToPrune, match="view"):
        graphprune.shrink(SlottedWidth().eval(), X, 0.5)


@pytest.mark.parametrize("depth", [150, 200, 220])
def test_modules_in_modules(depth):
    inner = nn.Linear(16, 16)
    for _ in range(depth):
        inner = nn.Sequential(inner)
    net, limit = nn.Sequential(nn.Linear(8, 16), inner, nn.Linear(16, 4)), sys.getrecursionlimit()
    net(X)
    small = graphprune.shrink(net, X, 0.5)
    assert small[0].out_features == 8 and small(X).shape == (2, 4) and sys.getrecursionlimit() == limit


class Registry:
    """An object of the user's, with something in it that cannot be copied, and something that can."""

    def __init__(self):
        self.lock, self.gain, self.table = threading.RLock(), 2, torch.ones(16)


@torch.jit.script
def gate(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def locked(m, h):
    with m.held if not isinstance(m.held, Registry) else m.held.lock:
        return h * (m.held.gain if isinstance(m.held, Registry) else 2)


def written(m, h):
    m.held.write("")
    return h


def signalled(m, h):
    m.held.set()
    return h


HANDLES = {
    "lock": (threading.Lock, locked),
    "lock in an object": (Registry, locked),
    "event": (threading.Event, signalled),
    "local": (threading.local, lambda m, h: h if m.held is not None else h * 2),
    "file": (lambda: open(os.devnull, "w"), written),
    "scripted function": (lambda: gate, lambda m, h: h + 0 * len(str(type(m.held)))),
}


@pytest.mark.parametrize("kind", HANDLES)
def test_what_cannot_be_copied_is_shared(kind):
    make, middle = HANDLES[kind]
    net = Block(middle)
    net.held = make()
    try:
        small, plan = graphprune.shrink(net, X, 0.5, return_plan=True)
        assert small.up.out_features == 8 and (small(X) - graphprune.zeroed(net, plan)(X)[0]).abs().max() < 1e-5
        if kind == "lock in an object":  # the object itself is a copy
            assert small.held is not net.held and small.held.lock is net.held.lock and small.held.table is not net.held.table
    finally:
        getattr(net.held, "close", lambda: None)()


@pytest.mark.parametrize(
    "made", [lambda: (i for i in range(9)), lambda: map(abs, (i for i in range(9))), lambda: zip((i for i in range(3)), "abc", strict=True)]
)
def test_what_a_run_would_use_up_is_said(made):
    net = Block(lambda m, h: h)
    net.held = made()
    with pytest.raises(graphprune.errors.BadModel, match="of which there is no copy"):
        graphprune.shrink(net, X, 0.5)
    assert len(list(net.held)) in (3, 9)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_named(layout):
    def nested(m, h):
        rows = torch.nested.nested_tensor([h[:1], h[1:]], layout=layout)
        return torch.cat([row * 2 for row in rows.unbind()])

    with pytest.raises((graphprune.errors.BadModel, graphprune.errors.NothingToPrune), match="nested"):
        graphprune.shrink(Block(nested), X, 0.5)
