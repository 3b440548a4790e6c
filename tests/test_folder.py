"""A saved folder is the old model or the new one, whatever happens to the process; what is damaged, or of another model, is refused with the reason."""

import errno
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import time

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Attention, Flat
from torch import nn

import graphprune
from graphprune.cutting.parts import Part
from graphprune.cutting.plan import Plan
from graphprune.errors import BadFile, BadPlan, GraphpruneError
from graphprune.formats import atomic
from graphprune.formats import folder as folders

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.ones(1, 2, 4, 4)
FILES = ["model.safetensors", "plan.json"]
FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()


def attention(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 1), Attention(8, 4), nn.BatchNorm2d(8), Flat(8)).eval()


def cut(seed=0, **options):
    return graphprune.shrink(net(seed), X, criterion=graphprune.scores.random.with_(seed=seed), **options)


def whole(model):
    """What a folder should give back: every tensor in its original place."""
    return {name: tensor.clone() for name, tensor in graphprune.expand(model).items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two folders of files to damage: plain cuts with edits, and masks."""
    plain, masked = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("masked")
    graphprune.save(graphprune.shrink(attention(), IMAGE), plain)
    graphprune.save(graphprune.shrink(net(), X, granularity="weight"), masked)
    return {"plain": (plain, attention, IMAGE), "masked": (masked, net, X)}


def damaged(saved, folder, edit, believed=False):
    """Load a copy of a saved folder after ``edit(folder)``: what it computes is what was saved, or it is refused, and in no time.

    Where the edit leaves a plan that is another, well-formed one, which is ``believed``, the model may compute something else, or nothing.
    """
    source, make, x = saved
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    edit(folder)
    base, start = make(1), time.process_time()
    try:
        again = graphprune.load(folder, base)
    except GraphpruneError as error:
        assert str(error)
        again = None
    assert time.process_time() - start < 5
    assert same(dict(base.state_dict()), dict(make(1).state_dict()))
    return again is None or believed or torch.equal(again(x), graphprune.load(source, make(2))(x))


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["plain", "masked"]), st.sampled_from(FILES), st.sampled_from(["flip", "cut", "twice", "insert"]), st.data())
def test_damaged_bytes(saved, tmp_path_factory, which, name, kind, data):
    path = saved[which][0] / name
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        raw = raw[:at] if kind == "cut" else raw + raw[at:]
    assert damaged(saved[which], tmp_path_factory.getbasetemp() / "bytes", lambda folder: (folder / name).write_bytes(raw))


def paths(tree, path=()):
    """The places of a nest that have a value."""
    for key, item in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from list(paths(item, (*path, key)))[:40]


STRANGE = st.sampled_from([None, True, -1, 1.5, 10**400, "", "x", [], {}, [[]], {"0": [0]}, [0, 0], ["mask", "0.weight", None], 2**63, "\ud800", [[["a"]]]])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["plain", "masked"]), st.booleans(), st.booleans(), st.data())
def test_damaged_plans(saved, tmp_path_factory, which, keep_checksum, delete, data):
    """A key goes, or a value becomes another one; where the checksum is missing too, the plan itself has to be looked at."""
    plan = json.loads((saved[which][0] / "plan.json").read_text())
    if not keep_checksum:
        del plan["sha256"]
    *path, key = data.draw(st.sampled_from(sorted(paths(plan), key=str)))
    holder = plan
    for step in path:
        holder = holder[step]
    if delete:
        del holder[key]
    else:
        holder[key] = data.draw(STRANGE)
    folder = tmp_path_factory.getbasetemp() / "plans"
    assert damaged(saved[which], folder, lambda folder: (folder / "plan.json").write_text(json.dumps(plan)), believed=not keep_checksum)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["gone", "added", "renamed", "dtype", "shape", "values"]), st.data())
def test_other_tensors_are_refused(saved, tmp_path_factory, kind, data):
    source, make, _ = saved["plain"]
    folder = tmp_path_factory.getbasetemp() / "tensors"
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    if kind == "added":
        tensors |= {name: tensor, "more": torch.zeros(1)}
    elif kind == "renamed":
        tensors["other." + name] = tensor
    elif kind == "dtype":
        tensors[name] = tensor.to(data.draw(st.sampled_from([d for d in (torch.int8, torch.float16, torch.float64, torch.bool) if d != tensor.dtype])))
    elif kind == "shape":
        tensors[name] = tensor.reshape(1, *tensor.shape)
    elif kind == "values":
        tensors[name] = tensor + 1
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadFile):
        graphprune.load(folder, make(1))


def test_control_the_same_tensors_and_plan_written_by_others_load(saved, tmp_path):
    source, make, x = saved["plain"]
    safetensors.torch.save_file(safetensors.torch.load_file(source / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps(json.loads((source / "plan.json").read_text()), indent=1, sort_keys=True))
    assert torch.equal(graphprune.load(tmp_path, make(1))(x), graphprune.load(source, make(2))(x))
    plan = json.loads((tmp_path / "plan.json").read_text())
    for key in ("sha256", "weights", "loose"):  # as earlier versions wrote it
        del plan[key]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert torch.equal(graphprune.load(tmp_path, make(1))(x), graphprune.load(source, make(2))(x))


class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.up, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.down = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.down(self.b(self.a(self.up(x)).relu()).relu())


@pytest.mark.parametrize("tie", [True, False])
def test_ties_are_the_same_on_both_sides(tmp_path, tie):
    small = graphprune.shrink(Tied(tie), X, 0.5)
    graphprune.save(small, tmp_path)
    assert torch.equal(graphprune.load(tmp_path, Tied(tie))(X), small(X))
    with pytest.raises(BadPlan):
        graphprune.load(tmp_path, Tied(not tie))


def test_ties_that_are_not_cut(tmp_path):
    small = graphprune.shrink(Tied(True), X, 0.5, keep=["a", "b"])
    graphprune.save(small, tmp_path / "tied")
    graphprune.save(graphprune.shrink(Tied(False), X, 0.5, keep=["a", "b"]), tmp_path / "apart")
    with pytest.raises(BadFile, match="b.weight"):
        graphprune.load(tmp_path / "tied", Tied(False))
    with pytest.raises(BadFile, match="one tensor of this base"):
        graphprune.load(tmp_path / "apart", Tied(True))


def test_the_dtype_of_the_base_is_that_of_the_file(tmp_path):
    small = cut().to(torch.bfloat16)
    graphprune.save(small, tmp_path)
    with pytest.raises(BadFile, match=r"saved as BF16.*base.to\(dtype\)"):
        graphprune.load(tmp_path, net(1))
    assert torch.equal(graphprune.load(tmp_path, net(1).to(torch.bfloat16))(X.bfloat16()), small(X.bfloat16()))
    with pytest.raises(BadPlan, match="meta"):
        graphprune.load(tmp_path, net(1).to("meta"))


EDITS = [["0"], ["nope", "x", 1], ["0", "forward", 5], ["0", "_parameters", 5], ["", "training", 1], ["", "training", "abc"], ["1", "n_heads", "x", 3],
         ["0", "in_channels", True], ["0", "in_channels", -1], ["0", "in_channels", 2.0], ["0", "weight", 3], ["0", "__class__", 3]]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_an_edit_changes_whole_numbers_that_exist_and_nothing_else(edit):
    text = json.dumps(Plan({}, {}, edits=(edit,)).to_dict())
    with pytest.raises(BadPlan):
        graphprune.apply(attention(), Plan.from_json(text))
    base = attention()
    before = {key: value for key, value in vars(base[0]).items() if key[0] != "_"}
    with pytest.raises(BadPlan):
        graphprune.apply(base, Plan.from_json(text), inplace=True)
    assert {key: value for key, value in vars(base[0]).items() if key[0] != "_"} == before
    good = Plan.from_json(json.dumps(Plan({}, {}, edits=(("0", "in_channels", 2),)).to_dict()))
    assert graphprune.apply(attention(), good)[0].in_channels == 2


PARTS = [Part("mask", "0.weight", b"1"), Part("mask", "1.running_mean", b"12"), Part("kernel", "0.weight", ((0,),)), Part("columns", "0.weight", b"1"),
         Part("skip", "1", None), Part("skip", "", (0, (), False)), Part("skip", "1", (0, ("tuple", 10**9, 0), False)), Part("skip", "1", (-1, (), False)),
         Part("skip", "1.2.3", (0, (), False)), Part("magic", "1", None), Part("skip", "1", (0, ((((),),),), False))]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.kind} {part.name}")
def test_a_part_has_the_data_of_its_kind(part):
    with pytest.raises(BadPlan):
        graphprune.apply(net(), Plan.from_json(Plan({}, {"0.weight": (16, 8), "1.running_mean": (16,)}, parts=(part,)).to_json()))


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan"), 2**1024])
@pytest.mark.parametrize("place", [4, 5])
def test_a_number_that_no_float_holds(saved, place, number):
    plan = json.loads((saved["plain"][0] / "plan.json").read_text())
    del plan["sha256"]
    assert Plan.from_json(json.dumps(plan)).outline.widths  # control
    plan["outline"]["widths"][0][place] = number
    with pytest.raises(BadPlan):
        Plan.from_json(json.dumps(plan))


TEXTS = ["[" * 200000, '{"a":' * 100000, "\x00", "1", "[]", "null", '{"version": 1}', '{"version": 1e999}', b"\xff\xfe", b""]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_plan(text):
    with pytest.raises(BadPlan):
        Plan.from_json(text)


@pytest.mark.parametrize("version", [999, 0, 2, "1", None, True, 1.0])
def test_other_versions_are_refused(version):
    with pytest.raises(BadPlan, match="version"):
        Plan.from_json(json.dumps(Plan({}, {}).to_dict() | {"version": version}))
    assert Plan.from_json(Plan({}, {}).to_json()) == Plan({}, {})


def test_what_never_ends_is_not_read(saved, tmp_path):
    source = saved["plain"][0]
    for name in FILES:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(BadFile, match="no ordinary file"):
            graphprune.load(folder, attention())
        (folder / name).unlink()
        with open(folder / name, "wb") as file:
            file.truncate(2**40)  # with nothing in it
        with pytest.raises(BadFile):
            graphprune.load(folder, attention())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(BadFile, match="cannot be written"):
            graphprune.save(cut(), folder)
        with pytest.raises(BadFile, match="cannot be read"):
            graphprune.load(folder, net())
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(BadFile, match="plan.json is a folder"):
        graphprune.save(cut(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "plan.json"] and (tmp_path / "file").read_text() == "mine"


def test_links_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in FILES:
        (tmp_path / "folder" / name).symlink_to(tmp_path / "mine.txt")
    graphprune.save(cut(), tmp_path / "folder")
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (tmp_path / "folder" / "plan.json").is_symlink()
    assert same(whole(graphprune.load(tmp_path / "folder", net(1))), whole(cut()))
    (tmp_path / "link").symlink_to(tmp_path / "folder")  # a folder may have another name
    graphprune.save(cut(1), tmp_path / "link")
    assert same(whole(graphprune.load(tmp_path / "folder", net(1))), whole(cut(1)))


def faulty(fault, at):
    """Let the ``at``-th step that writes fail: before it is done, or half-way through a file."""
    left = [at]

    def step(function, half=None):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    half(*args)
                fault()
            return function(*args, **kwargs)

        return call

    def text(path, data, *_):
        with open(path, "w") as file:
            file.write(data[: len(data) // 2])

    def tensors(data, path, *_):
        with open(path, "wb") as file:
            file.write(safetensors.torch.save(data)[:200])

    patch = pytest.MonkeyPatch()
    for name in ("replace", "rename", "fsync", "mkdir", "rmdir", "listdir"):
        patch.setattr(os, name, step(getattr(os, name)))
    patch.setattr(pathlib.Path, "write_text", step(pathlib.Path.write_text, text))
    patch.setattr(safetensors.torch, "save_file", step(safetensors.torch.save_file, tensors))
    return patch, left


def outcome(folder, models):
    """Which of the models a folder holds, entry by entry."""
    again = whole(graphprune.load(folder, net(9)))
    return next(index for index, model in enumerate(models) if same(again, whole(model)))


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_every_step(tmp_path):
    models, results = (cut(0), cut(1)), []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        graphprune.save(models[0], folder)
        patch, left = faulty(full_disk, at)
        try:
            graphprune.save(models[1], folder)
            failed = False
        except BadFile as error:
            failed = True
            assert error.errno == errno.ENOSPC and isinstance(error, OSError)
        finally:
            patch.undo()
        results.append(outcome(folder, models))
        assert failed or results[-1] == 1
        graphprune.save(models[0], folder)
        assert outcome(folder, models) == 0 and sorted(path.name for path in folder.iterdir()) == FILES
        if left[0] > 0:
            break
    assert not failed and at > 12 and results[1:] == sorted(results[1:]) and set(results) == {0, 1}, results  # the first makes the folder, which is there


@FORK
def test_killed_at_every_step(tmp_path):
    models, results = (cut(0), cut(1)), []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        graphprune.save(models[0], folder)
        child = os.fork()
        if child == 0:
            faulty(lambda: os.kill(os.getpid(), signal.SIGKILL), at)
            graphprune.save(models[1], folder)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        results.append(outcome(folder, models))
        graphprune.save(models[0], folder)
        assert outcome(folder, models) == 0 and sorted(path.name for path in folder.iterdir()) == FILES
        if not killed:
            break
    assert not killed and at > 12 and results == sorted(results) and results[-1] == 1, results


@FORK
def test_several_writers_and_a_reader(tmp_path):
    models = [cut(seed) for seed in range(3)]
    graphprune.save(models[0], tmp_path)
    children = []
    for model in models:
        child = os.fork()
        if child == 0:
            try:
                for _ in range(25):
                    graphprune.save(model, tmp_path)
                    time.sleep(random.Random(os.getpid()).random() * 0.01)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    seen, codes = set(), {}
    while len(codes) < len(children):
        seen.add(outcome(tmp_path, models))
        for child in children:
            done, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            codes |= {done: status} if done else {}
    assert set(codes.values()) == {0} and len(seen) > 1
    assert outcome(tmp_path, models) in range(3) and sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_control_files_of_two_saves_are_seen(tmp_path):
    """Equal shapes, other positions: what was loaded without a word, and put the weights in wrong places."""
    graphprune.save(cut(0), tmp_path / "a")
    graphprune.save(cut(1), tmp_path / "b")
    shutil.copy(tmp_path / "a" / "plan.json", tmp_path / "b" / "plan.json")
    with pytest.raises(BadFile, match="not those that were saved with its plan"):
        graphprune.load(tmp_path / "b", net())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("others", [0, 3])
def test_a_file_that_is_moved_while_it_is_opened_is_read_where_it_is(tmp_path, monkeypatch, name, others):
    """A writer was killed before it moved its files; the next one moves them between the look at one and its opening, and may write some of its own."""
    folder, seeds = tmp_path / "folder", iter(range(2, 2 + others))
    graphprune.save(cut(0), folder)
    graphprune.save(cut(1), tmp_path / "next")
    os.rename(tmp_path / "next", folder / atomic.READY)
    size = folders.ordinary

    def look(path):
        bytes = size(path)
        if path.name == name:
            atomic._settle(folder)
            for seed in itertools.islice(seeds, 1):
                graphprune.save(cut(seed), folder)
        return bytes

    for module in (folders, atomic):
        monkeypatch.setattr(module, "ordinary", look)
    assert outcome(folder, [cut(seed) for seed in range(2 + others)]) > 0  # one of those that were written, whole
