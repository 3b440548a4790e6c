"""Whether what the original exports to, the cut model exports to as well: architectures x targets, each architecture in a process of its own.

    python benchmarks/exports.py --json exports.jsonl --out docs/exports.md            # everything; run again to go on after a stop
    python benchmarks/exports.py --only timm/ --targets program,onnx
    python benchmarks/exports.py --json exports.jsonl --out docs/exports.md --table    # the table from the rows there are, nothing exported

Weights are as the library draws them (all random where the outputs would be zero), the ratio is 0.5, the batch size is left open wherever the original
allows it. What was exported is written to a file, read again, run on the example and on another batch size, and compared with the PyTorch model it was
made from. A regression is a target that the original reaches and the cut model does not (or reaches with its batch size fixed only).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import resource
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Rows, made_by
from torch import nn
from zoo import grow, measure
from zoo_models import build
from zoo_support import declare_operators, randomise

import graphprune
from graphprune.timing.files import Flat
from graphprune.tracing.trees import tensors

NAMES = """torchvision/resnet18 timm/vit_tiny_patch16_224 transformers/text/bert transformers/causal/llama timm/convnext_atto smp/Unet transformers/causal/gpt2
torchvision/squeezenet1_1 transformers/seq2seq/t5 timm/starnet_s1 diffusers/unet2d transformers/text/distilbert ultralytics/yolov8n
transformers/causal/qwen2 torchvision/mnasnet0_5 transformers/image/vit timm/edgenext_xx_small transformers/text/roberta transformers/causal/opt
smp/FPN timm/lcnet_050 torchvision/shufflenet_v2_x0_5 transformers/causal/gpt_neox diffusers/vae transformers/text/albert timm/mixer_s16_224
transformers/causal/phi torchvision/mobilenet_v2 transformers/text/electra timm/efficientvit_b0 transformers/causal/mistral
segmentation/lraspp_mobilenet_v3_large transformers/image/dinov2 timm/tinynet_e transformers/causal/gemma transformers/text/mpnet smp/Linknet
timm/deit3_small_patch16_224 transformers/causal/bloom torchvision/mobilenet_v3_small transformers/seq2seq/bart timm/regnetx_002
transformers/causal/qwen3 transformers/text/squeezebert diffusers/dit timm/poolformer_s12 transformers/causal/falcon torchvision/regnet_y_400mf
transformers/causal/stablelm timm/swin_tiny_patch4_window7_224 transformers/text/modernbert torchvision/resnet50 transformers/causal/olmo
timm/davit_tiny transformers/causal/gptj timm/mobilenetv2_050 smp/DeepLabV3Plus transformers/text/convbert timm/pvt_v2_b0 transformers/causal/mpt
torchvision/regnet_x_400mf timm/inception_next_tiny transformers/causal/codegen ultralytics/yolo11n transformers/text/deberta-v2 timm/mambaout_femto
transformers/causal/starcoder2 timm/hiera_tiny_224 transformers/text/fnet torchvision/googlenet timm/caformer_s18 transformers/causal/gemma2
timm/mobilenetv3_small_050 transformers/image/beit timm/mobilevit_xxs transformers/causal/granite torchvision/swin_t timm/repvit_m0_9 video/r3d_18
transformers/image/swin torchvision/densenet121 timm/ghostnet_100 torchvision/efficientnet_b0 timm/levit_128s torchvision/convnext_tiny
timm/fastvit_t8 timm/resmlp_12_224 timm/dla34 timm/hgnetv2_b0""".split()
# Depths of timm's models: what is exported depends on the kinds of operations, not on their number.
SHORT = ({"depths": (1, 1, 1, 1)}, {"layers": (1, 1, 1, 1)}, {"depth": 2}, {"depths": (1, 1, 1)}, {"depth": (1, 1, 1, 1)})
CLOSE = 1e-3  # the largest difference of outputs, as a share of the largest output; quantised models are only run
SHORTEST = 2  # samples of the example; the other batch has one more


class Exported(NamedTuple):
    """Something written to a file and read again: its bytes, and the outputs for a list of inputs."""

    size: int
    run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class Subject:
    """A model (the original or the cut one) on its way to the targets; what several of them need is made once."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict, folder: Path) -> None:
        self.model, self.folder = Flat(model, args, kwargs).eval(), folder
        self.inputs = tuple(tensors((args, kwargs), torch.Tensor))
        self.batched = [x.ndim > 0 and len(x) == SHORTEST for x in self.inputs]
        self.dynamic = True
        self._program: Any = None
        self._onnx: Path | None = None

    def other(self) -> tuple[torch.Tensor, ...]:
        """The inputs with one sample more."""
        return tuple(torch.cat([x, x[:1]]) if batched else x for x, batched in zip(self.inputs, self.batched, strict=True))

    def program(self) -> torch.export.ExportedProgram:
        """With an open batch size where that works."""
        if self._program is None:
            batch = torch.export.Dim("batch", min=1, max=64)
            shapes = (tuple({0: batch} if batched else {} for batched in self.batched),)
            try:
                self._program = torch.export.export(self.model, self.inputs, dynamic_shapes=shapes)
            except Exception:
                self._program, self.dynamic = torch.export.export(self.model, self.inputs), False
        return self._program

    def onnx(self) -> Path:
        if self._onnx is None:
            program = torch.onnx.export(self.program(), dynamo=True, verbose=False)
            assert program is not None  # with dynamo it returns one
            file = self.folder / "model.onnx"
            program.save(str(file))
            self._onnx = file
        return self._onnx


def _program(subject: Subject) -> Exported:
    file = io.BytesIO()
    torch.export.save(subject.program(), file)
    size = file.getbuffer().nbytes
    file.seek(0)
    again = torch.export.load(file).module()
    return Exported(size, lambda inputs: list(again(*inputs)))


def session_of(file: Path) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return lambda inputs: [torch.from_numpy(np.asarray(y)) for y in session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})]


def _onnx(subject: Subject) -> Exported:
    file = subject.onnx()
    return Exported(file.stat().st_size, session_of(file))


def _int8(subject: Subject) -> Exported:
    """Static quantisation of ONNX Runtime, calibrated on the example."""
    from onnxruntime import quantization

    file, target = subject.onnx(), subject.folder / "int8.onnx"

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            import onnx

            names = [item.name for item in onnx.load(file, load_external_data=False).graph.input]
            self.feeds = iter([dict(zip(names, (x.numpy() for x in subject.inputs), strict=True))])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quantization.quantize_static(str(file), str(target), Reader(), per_channel=True)
    return Exported(target.stat().st_size, session_of(target))


def _openvino(subject: Subject) -> Exported:
    import openvino

    model = openvino.convert_model(str(subject.onnx()))
    file = subject.folder / "model.xml"
    openvino.save_model(model, str(file), compress_to_fp16=False)
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    size = file.stat().st_size + file.with_suffix(".bin").stat().st_size

    def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = compiled([x.numpy() for x in inputs])
        return [torch.from_numpy(np.array(found[port])) for port in compiled.outputs]

    return Exported(size, run)


def _trace(subject: Subject) -> Exported:
    file = subject.folder / "model.ts"
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(subject.model, subject.inputs, check_trace=False), str(file))
    again = torch.jit.load(str(file))
    return Exported(file.stat().st_size, lambda inputs: list(again(*inputs)))


def _executorch(subject: Subject) -> Exported:
    """XNNPACK, with the batch size of the example."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    with torch.no_grad():
        program = torch.export.export(subject.model, subject.inputs)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    file = subject.folder / "model.pte"
    file.write_bytes(lowered.buffer)
    loaded = Runtime.get().load_program(file)  # its methods read from it
    method = loaded.load_method("forward")
    assert method is not None
    return Exported(file.stat().st_size, lambda inputs, keep=loaded: [y.clone() for y in method.execute([x.contiguous() for x in inputs])])


def _compile(subject: Subject) -> Exported:
    compiled = torch.compile(subject.model, dynamic=False)
    return Exported(0, lambda inputs: list(compiled(*inputs)))


TARGETS: dict[str, tuple[str, Callable[[Subject], Exported], bool]] = {  # its title, how, and whether the batch size can stay open
    "program": ("torch.export", _program, True),
    "onnx": ("ONNX Runtime", _onnx, True),
    "openvino": ("OpenVINO", _openvino, True),
    "trace": ("TorchScript", _trace, True),
    "executorch": ("ExecuTorch", _executorch, False),
    "int8": ("int8", _int8, True),
    "compile": ("torch.compile", _compile, False),
}


def gap(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest output."""
    if len(outputs) != len(wanted) or any(a.shape != b.shape for a, b in zip(outputs, wanted, strict=True)):
        raise ValueError(f"shapes {[tuple(a.shape) for a in outputs]} instead of {[tuple(b.shape) for b in wanted]}")
    pairs = [(a.detach().double(), b.double()) for a, b in zip(outputs, wanted, strict=True) if b.numel()]
    worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
    return worst if worst == worst else float("inf")


def exported(subject: Subject, target: str) -> dict[str, Any]:
    """One row: whether the target is reached, the largest difference, bytes, seconds of the export and of a call."""
    _, make, batches = TARGETS[target]
    row: dict[str, Any] = {"passes": False}
    start = time.process_time()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            made = make(subject)
            row |= {"size": made.size, "export_seconds": time.process_time() - start}
            with torch.no_grad():
                row["gap"] = gap(made.run(subject.inputs), subject.model(*subject.inputs))
                if batches:
                    row["batch"] = _batch(subject, made, row)
                row["seconds"] = _seconds(lambda: made.run(subject.inputs))
        row["passes"] = target == "int8" or row["gap"] <= CLOSE
        if not row["passes"]:
            row["why"] = f"outputs differ by {row['gap']:.1e}"
    except Exception as error:
        text = str(error).strip() or traceback.format_exc(limit=-1)
        row["why"] = f"{type(error).__name__}: {text.splitlines()[0]}"[:200]
    return row


def _batch(subject: Subject, made: Exported, row: dict[str, Any]) -> bool:
    """Whether another batch size gives the same outputs."""
    inputs = subject.other()
    try:
        outputs = made.run(inputs)
    except Exception:
        return False
    row["gap"] = max(row["gap"], gap(outputs, subject.model(*inputs)))
    return True


def _seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of a call, over as many of them as the clock can tell apart."""
    calls, start = 0, time.process_time()
    while time.process_time() - start < 0.1:
        call()
        calls += 1
    return (time.process_time() - start) / calls


def shortened(name: str) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """The model with one block in every stage, where its factory takes that, and an example."""
    if name.startswith("timm/"):
        import timm

        for depth in SHORT:
            with contextlib.suppress(Exception):  # a factory that does not know the option
                model = timm.create_model(name.removeprefix("timm/"), **depth)
                return model, (torch.randn(1, *model.default_cfg["input_size"]),), {}
    return build(name)


def _speaks(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether some output is neither zero nor one number throughout."""
    with torch.no_grad():
        outputs = tensors(model(*args, **kwargs), torch.Tensor)
    return any(bool((y != y.flatten()[0]).any()) for y in outputs if y.numel())


def one(name: str, send: Any, limit: float) -> None:
    """All targets of one architecture, for the original and for the cut model."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    name, _, chosen = name.partition(" ")
    row: dict[str, Any] = {"name": name}
    try:
        torch.manual_seed(0)
        model, args, kwargs = shortened(name)
        model.eval()
        if not _speaks(model, args, kwargs):  # its head is zero at first: whatever is exported would be right
            randomise(model)
        size = next(len(x) for x in tensors((args, kwargs), torch.Tensor) if x.ndim)
        args, kwargs = (grow(tree, SHORTEST // size) for tree in (args, kwargs))
        small = graphprune.shrink(model, args, 0.5, example_kwargs=kwargs)
        row["params"] = [sum(p.numel() for p in each.parameters()) for each in (model, small)]
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
            subjects = Subject(model, args, kwargs, Path(folder)), Subject(small, args, kwargs, Path(other))
            for target in chosen.split(","):
                row[target] = [exported(subject, target) for subject in subjects]
    except BaseException as error:
        row["why"] = f"{type(error).__name__}: {error}"[:300]
    finally:
        send.send(row)
        send.close()


def _prepare() -> None:
    """What every process needs, imported and set up once: the libraries, and what the exporter makes at its first call."""
    for library in ("timm", "transformers", "onnxruntime.quantization", "openvino"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), dynamo=True, verbose=False)


def regressed(pair: Sequence[dict[str, Any]]) -> bool:
    original, cut = pair
    return original["passes"] and not cut["passes"] or bool(original.get("batch")) and not cut.get("batch")


def cell(pair: Sequence[dict[str, Any]] | None) -> str:
    if pair is None:
        return ""
    original, cut = pair
    if regressed(pair):
        return "**regression**"
    if not cut["passes"]:
        return "neither"
    fixed = "" if cut.get("batch", True) else ", fixed batch"
    return f"{max(original.get('gap', 0), cut['gap']):.0e}{fixed}" + ("" if original["passes"] else ", the cut one only")


def table(rows: list[dict[str, Any]], targets: Sequence[str]) -> str:
    head = ["model", *(TARGETS[target][0] for target in targets), "ONNX, MB", "ONNX Runtime, CPU ms"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        sizes = times = ""
        if all(part["passes"] for part in row.get("onnx", [])) and "onnx" in row:
            sizes = " → ".join(f"{part['size'] / 1e6:.3g}" for part in row["onnx"])
            times = " → ".join(f"{1e3 * part['seconds']:.3g}" for part in row["onnx"])
        lines.append("| " + " | ".join([row["name"], *(cell(row.get(target)) for target in targets), sizes, times]) + " |")
    return "\n".join(lines)


def reasons(rows: list[dict[str, Any]]) -> str:
    """Why, for every target that is not reached."""
    lines = []
    for row in rows:
        if "why" in row:
            lines.append(f"| {row['name']} | all | cut | {row['why'].replace('|', '/')[:160]} |")
        for target in TARGETS:
            for whose, part in zip(("original", "cut"), row.get(target, ()), strict=False):
                if not part["passes"]:
                    lines.append(f"| {row['name']} | {TARGETS[target][0]} | {whose} | {part.get('why', '').replace('|', '/')[:160]} |")
    return "| model | target | which | why |\n|---|---|---|---|\n" + "\n".join(lines) if lines else "Every target is reached by every model."


def page(rows: list[dict[str, Any]], known: Rows) -> str:
    targets = [target for target in TARGETS if any(target in row for row in rows)]
    pairs = [(row["name"], target, row[target]) for row in rows for target in targets if target in row]
    worse = [f"{name} to {TARGETS[target][0]}" for name, target, pair in pairs if regressed(pair)]
    both = sum(pair[0]["passes"] and pair[1]["passes"] for _, _, pair in pairs)
    only = sum(not pair[0]["passes"] and pair[1]["passes"] for _, _, pair in pairs)
    reached = {target: [row[target][1]["passes"] for row in rows if target in row] for target in targets}
    counts = ", ".join(f"{TARGETS[target][0]} {sum(passes)} of {len(passes)}" for target, passes in reached.items())
    sizes = [row["onnx"][0]["size"] / row["onnx"][1]["size"] for row in rows if "onnx" in row and all(part["passes"] for part in row["onnx"])]
    params = [row["params"][0] / row["params"][1] for row in rows if "onnx" in row and all(part["passes"] for part in row["onnx"])]
    smaller = f" ONNX files are {statistics.median(sizes):.2f} times smaller (median), parameters {statistics.median(params):.2f} times fewer." if sizes else ""
    libraries = ("onnx", "onnxscript", "onnxruntime", "openvino", "executorch")
    made = made_by("python benchmarks/exports.py --json exports.jsonl --out docs/exports.md", *libraries, rows=known)
    refused = [row["name"] for row in rows if "why" in row]
    uncut = f" {len(refused)} more were not cut ({', '.join(refused)}), for the reasons below." if refused else ""
    verdict = f"{len(worse)} regressions{': ' + ', '.join(worse) if worse else ''}"
    exported_rows = len(rows) - len(refused)
    return f"""# Exports: what the original exports to, the cut model exports to

{made}

{exported_rows} architectures with random weights (timm's with one block in every stage where their factory takes that, transformers' with two layers), cut
at ratio 0.5, and {len(targets)} targets: **{verdict}**, {both} of {len(pairs)} pairs pass for both, {only} for the cut model only.
The cut model passes: {counts}.{smaller}{uncut}

A cell holds the largest difference between what was exported (original or cut) and the PyTorch model it was made from, as a share of the largest
output; 1e-3 is allowed, and int8 (static quantisation of ONNX Runtime, calibrated on the example alone, of random weights) only has to run. The batch
size is open (*fixed batch*: neither model's can be) but for ExecuTorch (XNNPACK) and torch.compile. ONNX comes from the dynamo exporter, OpenVINO reads
that file. *Neither*: the reasons are below. Times are of a call with two samples, CPU time on one thread.

{table(rows, targets)}

## What is not reached

{reasons(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that hold one of these (comma-separated)")
    parser.add_argument("--targets", default=",".join(name for name in TARGETS if name != "compile"), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--most", type=int, default=1000, help="architectures in this run")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further architecture after this long")
    parser.add_argument("--limit", type=float, default=600, help="CPU seconds per architecture")
    parser.add_argument("--json", type=Path, help="append every row here as it comes; targets that are there are not measured again")
    parser.add_argument("--again", default="", help="measure these names again (comma-separated parts of them)")
    parser.add_argument("--out", type=Path, help="write the page (Markdown) here")
    parser.add_argument("--table", action="store_true", help="export nothing")
    options = parser.parse_args()
    declare_operators()
    known, chosen = Rows(options.json), options.targets.split(",")
    again = [part for part in options.again.split(",") if part]
    rows: dict[str, dict[str, Any]] = {}
    for row in known.rows:
        rows[row["name"]] = rows.get(row["name"], {}) | row
    wanted = [name for name in NAMES if any(part in name for part in options.only.split(","))]
    todo = {name: [t for t in chosen if t not in rows.get(name, {}) or any(part in name for part in again)] for name in wanted}
    queue = [f"{name} {','.join(missing)}" for name, missing in todo.items() if missing and "why" not in rows.get(name, {})][: options.most]
    end = time.monotonic() + options.seconds

    def report(row: dict[str, Any]) -> None:
        row["name"] = row["name"].partition(" ")[0]  # of a process that was ended
        known.add(row, shown=False)
        rows[row["name"]] = rows.get(row["name"], {}) | row
        verdicts = [f"{target} {cell(row[target])}" for target in TARGETS if target in row]
        print(row["name"], *verdicts, row.get("why", ""), sep=" | ", flush=True)

    if not options.table:
        _prepare()

        if "executorch" in chosen:
            import executorch.exir  # noqa: F401

        while queue and time.monotonic() < end:
            measure(queue[: options.jobs], options.jobs, options.limit, report, one)
            queue = queue[options.jobs :]
    shown = [rows[name] for name in sorted(rows)]
    text = page(shown, known)
    print(text.split("\n\n")[2])
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
