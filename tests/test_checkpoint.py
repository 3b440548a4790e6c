"""A checkpoint that is shrunk file by file holds the bits that shrinking in memory and saving gives; killed or not, there is a whole result or none."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphprune
from graphprune import checkpoint
from graphprune.adapters.pretrained import Names
from graphprune.checkpoint import layout, resident, stored, writing
from graphprune.checkpoint.shards import Shards
from graphprune.errors import BadFile, BadModel, BadOption
from graphprune.scores import reconstruct

UNIFORM = graphprune.Widths(uniform=True)
SHARD = "40KB"
LONG = pytest.mark.skipif("GRAPHPRUNE_CHECKPOINTS" not in os.environ, reason="minutes: set GRAPHPRUNE_CHECKPOINTS")


def long(*values):
    return pytest.param(*values, marks=LONG)


def tensors(folder):
    return {name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(left, right):
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left)


def written(name, folder, tied=False, dtype=torch.bfloat16, layers=2):
    """A family's folder, and the model that comes back from it."""
    model, inputs = families.build(name, layers)
    model = model.to(dtype)
    model.config.dtype = dtype
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder / "first")
    model = type(model).from_pretrained(folder / "first")  # with the types that the library gives some tensors
    shutil.rmtree(folder / "first")
    model.save_pretrained(folder, max_shard_size=SHARD)
    (folder / "tokenizer.json").write_text("{}")
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return type(model).from_pretrained(folder).eval(), inputs


def both(name, folder, ratio=0.5, tied=False, layers=2, **options):
    """The tensors of the same request, in memory and from the files."""
    folder.mkdir(exist_ok=True)
    model, inputs = written(name, folder / "whole", tied, layers=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = graphprune.shrink(model, inputs, ratio, widths=None if options.get("what") == "layers" else UNIFORM, **options)
    small.save_pretrained(folder / "memory")
    checkpoint.shrink(folder / "whole", folder / "files", inputs, ratio, **options)
    return tensors(folder / "memory"), tensors(folder / "files"), small, inputs


@pytest.mark.parametrize("name", [*map(long, ("llama", "qwen3", "phi3", "bert", "opt")), "gpt2", "vit", "t5"])
def test_the_bits_of_shrinking_in_memory(name, tmp_path):
    memory, files, small, inputs = both(name, tmp_path)
    assert same(memory, files)
    again = type(small).from_pretrained(tmp_path / "files").eval()
    assert torch.equal(families.result(again, inputs), families.result(small, inputs))
    assert (tmp_path / "files" / "tokenizer.json").read_text() == "{}"
    other = dict(files)
    other[min(other)] = other[min(other)] + 1  # the comparison can fail
    assert not same(memory, other)


def test_tied_embeddings_are_written_once(tmp_path):
    memory, files, small, _ = both("llama", tmp_path, tied=True)
    assert same(memory, files) and "lm_head.weight" not in files
    assert type(small).from_pretrained(tmp_path / "files").lm_head.weight.shape == small.lm_head.weight.shape


@pytest.mark.parametrize(
    ("name", "whole"),
    [("mixtral", 0), ("qwen3_moe", 2**28), *(long(*each) for each in (("mixtral", 2**28), ("qwen3_moe", 0), ("deepseek_v3", 2**28), ("deepseek_v3", 0)))],
)
def test_experts_by_the_names_of_their_files(name, whole, tmp_path, monkeypatch):
    """Files hold experts one by one, modules hold them in one stack: converted in one go, and tensor by tensor."""
    monkeypatch.setattr(layout, "WHOLE", whole)
    monkeypatch.setattr(stored, "WHOLE", whole)
    memory, files, *_ = both(name, tmp_path)
    assert same(memory, files) and any(".experts.0." in key for key in files)


@pytest.mark.parametrize("what", ["layers", "mlp", ("mlp", "layers")])
def test_kinds_of_unit(what, tmp_path):
    memory, files, small, _ = both("llama", tmp_path, 0.34, layers=3, what=what)
    assert same(memory, files)
    config = json.loads((tmp_path / "files" / "config.json").read_text())
    assert config["num_hidden_layers"] == (2 if "layers" in what else 3)


@pytest.mark.parametrize("score", [*map(long, ("l1", "linf", "filter_norm", "group_norm")), "lamp"])
def test_scores_are_those_of_memory(score, tmp_path):
    memory, files, *_ = both("llama", tmp_path, score=score)
    assert same(memory, files)


@pytest.mark.parametrize("score", ["l1", "linf", "filter_norm", "group_norm", "lamp"])
def test_scores_of_any_model_are_those_of_memory(score, tmp_path):
    memory, files = plainly(tmp_path, score)
    assert same(memory, files)


def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(5)))


def plainly(folder, score):
    """The same as :func:`both`, of five blocks of a class that no library knows."""
    whole, x = stack().eval(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    (folder / "in").mkdir(parents=True)
    save_file(whole.state_dict(), folder / "in" / "weights.safetensors")
    checkpoint.shrink(folder / "in", folder / "out", x, 0.5, model=stack().to("meta"), score=score)
    return dict(graphprune.shrink(whole, x, 0.5, score=score).state_dict()), tensors(folder / "out")


@pytest.fixture
def most(monkeypatch):
    """How many blocks had their weights in memory at once.

    Counted where weights are read: a list that a hook of the model can name is put back after each of its runs.
    """
    monkeypatch.setattr(reconstruct, "MEMORY", 0)
    found, real = [0], resident._Weights.read

    def counted(self, path, module):
        real(self, path, module)
        found[0] = max(found[0], len(self.held))

    monkeypatch.setattr(resident._Weights, "read", counted)
    return found


@pytest.fixture(scope="module")
def by_size(tmp_path_factory):
    """What the size of the weights alone leaves of a family."""

    @functools.cache
    def made(name):
        return both(name, tmp_path_factory.mktemp(name), what="mlp")[0]

    return made


@pytest.mark.parametrize(
    ("name", "score"),
    [("llama", "flap"), ("qwen3_moe", "obs")]
    + [long("llama", score) for score in ("wanda_sp", "obs", "leverage")]
    + [long("qwen3_moe", score) for score in ("wanda_sp", "flap", "leverage")],
)
def test_calibrated_scores_block_by_block(name, score, tmp_path, most, by_size):
    """The same units as with the model in memory, whose weights are never all there."""
    data = [families.ids(3, 8), families.ids(2, 12).flip(1)]
    memory, files, *_ = both(name, tmp_path, what="mlp", score=graphprune.scores.on(score, [{"input_ids": ids} for ids in data]))
    assert same(memory, files) and 0 < most[0] <= resident.BLOCKS + 1
    assert not same(memory, by_size(name))


@pytest.mark.parametrize("score", ["wanda_sp", "flap", "obs", "leverage"])
def test_calibrated_scores_of_any_model_block_by_block(score, tmp_path, most):
    data = [3 * torch.randn(16, 6, generator=torch.Generator().manual_seed(at)).abs() for at in range(2, 4)]
    memory, files = plainly(tmp_path / score, graphprune.scores.on(score, data))
    assert same(memory, files) and 0 < most[0] <= resident.BLOCKS + 1
    assert not same(memory, plainly(tmp_path / "l2", "l2")[0])


def test_scores_that_need_more_than_a_weight_are_refused(tmp_path):
    _, inputs = written("llama", tmp_path / "whole")
    with pytest.raises(BadOption, match="wanda_sp"):
        checkpoint.shrink(tmp_path / "whole", tmp_path / "out", inputs, score="wanda_sp")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def test_any_model_with_the_names_of_its_files(tmp_path):
    whole, x = net().eval(), torch.randn(2, 3, 8, 8)
    (tmp_path / "in").mkdir()
    save_file(whole.state_dict(), tmp_path / "in" / "weights.safetensors")
    checkpoint.shrink(tmp_path / "in", tmp_path / "out", x, 0.5, model=net().to("meta"))
    small = graphprune.shrink(whole, x, 0.5)
    assert same({k: v for k, v in small.state_dict().items()}, tensors(tmp_path / "out"))


def test_a_config_that_cannot_say_it_is_refused_before_anything_is_written(tmp_path):
    """The scale of the embedding is the root of the width: with the width cut, the class builds another function."""
    model, inputs = written("gemma3", tmp_path / "whole")
    plan = checkpoint.shrink(tmp_path / "whole", tmp_path / "out", inputs, 0.5)
    assert 1 not in plan.cuts.get("model.embed_tokens.weight", {})
    small = graphprune.shrink(model, inputs, 0.5, widths=UNIFORM)
    again = type(small).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(families.result(again, inputs), families.result(small, inputs))


RUN = """
import os, sys, signal, pathlib, warnings
warnings.simplefilter("ignore")
import graphprune
import torch
from torch import nn
from graphprune import checkpoint
from graphprune.checkpoint import layout
sys.path.insert(0, {tests!r})
from test_checkpoint import net
layout.PIECE = 64
count, stop = [0], 0
real = os.replace, os.rename, os.fsync, os.mkdir, os.unlink
def counted(function):
    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.replace, os.rename, os.fsync, os.mkdir, os.unlink = map(counted, real)
for line in sys.stdin:  # a process for each, which has imported everything
    out, stop = line.rsplit(" ", 1)
    stop, child = int(stop), os.fork()
    if not child:
        try:
            checkpoint.shrink(sys.argv[1], out, torch.zeros(2, 3, 8, 8), 0.5, model=net().to("meta"))
        except graphprune.GraphpruneError:
            os._exit(1)
        pathlib.Path(out + ".steps").write_text(str(count[0]))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def shards_of_net(folder):
    folder.mkdir()
    state = {k: v.contiguous() for k, v in net().state_dict().items()}
    names = sorted(state)
    places = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return state


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path):
    """Ended by the system before each step that the disk sees: there is no folder, or the whole one; the next call completes it."""
    shards_of_net(tmp_path / "in")
    script = RUN.format(tests=str(Path(__file__).parent))

    command = [sys.executable, "-c", script, str(tmp_path / "in")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def run(out, stop):
            server.stdin.write(f"{out} {stop}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        assert run(tmp_path / "once", 0) == 0
        wanted, counted = bytes_of(tmp_path / "once"), tmp_path / "once.steps"
        steps = int(counted.read_text())
        counted.unlink()
        assert len(wanted) == 5 and not list(tmp_path.glob("once.*"))
        for stop in range(1, steps + 1, max(1, steps // 6)):
            out = tmp_path / f"killed{stop}"
            assert run(out, stop) == -signal.SIGKILL
            complete = out.exists()
            assert not complete or bytes_of(out) == wanted
            assert run(out, 0) == 0 or complete  # which then is in the way
            assert bytes_of(out) == wanted and not out.with_name(out.name + ".partial").exists()


def cut(folder, out, **options):
    return checkpoint.shrink(folder, out, torch.zeros(2, 3, 8, 8), 0.5, model=net().to("meta"), **options)


def test_what_is_damaged_says_so(tmp_path):
    shards_of_net(tmp_path / "in")
    index = tmp_path / "in" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())

    def broken(name, match, change):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "in", folder)
        change(folder)
        with pytest.raises(BadFile, match=match):
            cut(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    first = listed["weight_map"]["0.weight"]
    broken("missing", "cannot be read", lambda folder: (folder / first).unlink())
    broken("torn", "damaged", lambda folder: (folder / first).write_bytes((folder / first).read_bytes()[:-10]))
    broken("header", "damaged", lambda folder: (folder / first).write_bytes(b"\xff" * 64))
    other = {**listed, "weight_map": {**listed["weight_map"], "0.weight": listed["weight_map"]["0.bias"]}}
    broken("wrong", "index", lambda folder: (folder / index.name).write_text(json.dumps(other)))
    more = {**listed, "weight_map": {**listed["weight_map"], "9.weight": first}}
    broken("more", "9.weight", lambda folder: (folder / index.name).write_text(json.dumps(more)))
    broken("text", "no index", lambda folder: (folder / index.name).write_text("[]"))
    broken("outside", "beside", lambda folder: (folder / index.name).write_text(json.dumps({"weight_map": {"0.weight": "../x.safetensors"}})))
    broken("renamed", "disagree", lambda folder: _renamed(folder))
    assert cut(tmp_path / "in", tmp_path / "out")  # as it is, it goes


def _renamed(folder):
    state = {f"x.{name}": tensor for name, tensor in net().state_dict().items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(state, folder / "model.safetensors")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    shards_of_net(tmp_path / "in")
    real, files = writing.sync, []

    def full(path):
        files.append(path)
        if len(files) == 2:
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(writing, "sync", full)
    with pytest.raises(BadFile, match="No space left") as error:
        cut(tmp_path / "in", tmp_path / "out")
    assert error.value.errno == 28 and not (tmp_path / "out").exists()
    monkeypatch.setattr(writing, "sync", real)
    cut(tmp_path / "in", tmp_path / "out")
    cut(tmp_path / "in", tmp_path / "again")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    shards_of_net(tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(BadFile, match="GB free"):
        cut(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_way_stays(tmp_path):
    shards_of_net(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    with pytest.raises(BadFile, match="there already"):
        cut(tmp_path / "in", tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").write_text("1")
    with pytest.raises(BadFile, match="in the way"):
        cut(tmp_path / "in", tmp_path / "new")
    assert (tmp_path / "out" / "mine").read_text() == (tmp_path / "new.partial" / "mine").read_text() == "1"


def test_another_request_begins_anew(tmp_path, monkeypatch):
    """What was begun with other files, or other options, is not gone on with."""
    shards_of_net(tmp_path / "in")
    monkeypatch.setattr(writing, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(BadFile):
        cut(tmp_path / "in", tmp_path / "out", keep=["0"])
    monkeypatch.undo()
    plan = cut(tmp_path / "in", tmp_path / "out")
    assert len(plan.kept("0")) == 4 and tensors(tmp_path / "out")["0.weight"].shape[0] == 4


def test_code_in_the_folder_is_not_run(tmp_path):
    folder = tmp_path / "in"
    _, inputs = written("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "architectures": ["M"], "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(BadModel, match="trust_remote_code"):
        checkpoint.shrink(folder, tmp_path / "out", inputs)
    assert not (tmp_path / "ran").exists()


def test_config_and_weights_that_disagree(tmp_path):
    folder = tmp_path / "in"
    _, inputs = written("llama", folder, layers=3)
    config = json.loads((folder / "config.json").read_text())
    for key, value in {"intermediate_size": 48, "num_hidden_layers": 4, "tie_word_embeddings": None}.items():
        (folder / "config.json").write_text(json.dumps({**config, key: value} if value else {**config, "num_hidden_layers": 2}))
        with pytest.raises(BadFile, match="disagree"):
            checkpoint.shrink(folder, tmp_path / "out", inputs)


def test_quantised_weights_are_refused(tmp_path):
    folder = tmp_path / "in"
    _, inputs = written("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BadModel, match="fp8"):
        checkpoint.shrink(folder, tmp_path / "out", inputs)


def test_only_rows_of_a_tensor_are_in_memory(tmp_path):
    """What is read at a time does not grow with the tensors."""
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"0.weight": torch.randn(64, 32), "0.bias": torch.randn(64), "2.weight": torch.randn(8, 64), "2.bias": torch.randn(8)}, folder / "a.safetensors")
    model = nn.Sequential(nn.Linear(32, 64, device="meta"), nn.ReLU(), nn.Linear(64, 8, device="meta"))
    shards = Shards.of(folder)
    values = stored.FromFiles.of(shards, Names(model, shards.shapes))
    assert type(values.pieces["0.weight"]) is stored.Slices and values.pieces["0.weight"][2:4].shape == (2, 32)
    assert torch.equal(values["0.weight"], load_file(folder / "a.safetensors")["0.weight"])


def test_it_is_done_only_once(tmp_path):
    shards_of_net(tmp_path / "in")
    cut(tmp_path / "in", tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(BadFile, match="there already"):
        cut(tmp_path / "in", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before


@pytest.mark.parametrize("what", [{"vocabulary": 40}, {"vocabulary": [5, 7, 50, 60, 90], "mlp": 0.5}, {"vocabulary": None, "hidden": 0.5}])
def test_a_smaller_vocabulary_is_that_of_the_model_in_memory(what, tmp_path):
    pytest.importorskip("transformers")
    from families import build

    model, inputs = build("llama")
    model.save_pretrained(tmp_path / "whole")
    if what["vocabulary"] is None:
        what = what | {"vocabulary": graphprune.Vocabulary(0.5, batches=[inputs])}
    plan = checkpoint.shrink(tmp_path / "whole", tmp_path / "small", what=what)
    small = graphprune.shrink(model, inputs, what=what, widths=graphprune.Widths(uniform=True))
    back = type(model).from_pretrained(tmp_path / "small").eval()
    assert graphprune.tokens(tmp_path / "small").kept == plan.tokens.kept == graphprune.tokens(small).kept
    assert back.config.vocab_size == len(plan.tokens.kept) and back.config.eos_token_id == plan.tokens.to_new(2)
    assert back.generation_config.eos_token_id == back.config.eos_token_id
    state = small.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in back.state_dict().items())
