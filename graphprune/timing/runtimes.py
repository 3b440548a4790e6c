"""Where a model is run: eager PyTorch, torch.compile, ONNX Runtime, OpenVINO, or one of your own; :func:`prepare` returns one call of it.

A runtime is a record of the catalogue: a name, a line, and a function ``(model, args, kwargs, threads)`` that returns a call without arguments.
``graphprune.register("runtime", ...)`` adds one. ONNX Runtime and OpenVINO are optional packages; asking for one that is not installed raises
:class:`~graphprune.errors.BadMeasure` and says what to install.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..catalogue import enter, entry, names, open_to_others
from ..errors import BadMeasure
from ..options import unknown_runtime
from ..tracing.trees import tensors
from .files import Draft, Flat, agrees, drafted

Call = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Filed:
    """A call of a model that was read from a file, and the file's draft, from which those of models cut from it are made."""

    run: Call
    draft: Draft

    def __call__(self) -> Any:
        return self.run()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def prepare(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], runtime: str = "eager", threads: int | None = None, first: Call | None = None
) -> Call:
    """A function that runs the model once on the given inputs, in eval mode and without gradients.

    ``first``: what this returned for the model that the given one was cut from; runtimes that read files have less to do then.

    Raises :class:`~graphprune.errors.BadMeasure` when the runtime is unknown, not installed, or refuses the model.

    >>> prepare(nn.Linear(2, 3).eval(), (torch.zeros(1, 2),), {})().shape
    torch.Size([1, 3])
    """
    if runtime not in names("runtime"):
        raise BadMeasure(unknown_runtime(runtime))
    record = entry("runtime", runtime)
    assert record.function is not None
    more = {"first": first} if record.facts["follows"] else {}
    try:
        return record.function(model, args, kwargs, threads, **more)
    except ImportError as error:
        raise missing(runtime) from error
    except Exception as error:
        if record.facts["plain"]:
            raise
        raise BadMeasure(f"{runtime} does not take this model: {type(error).__name__}: {str(error)[:500]}") from error


@open_to_others("runtime")
def _enter(name: str, line: str, function: Callable[..., Call], *, fuses: bool = True, install: str = "") -> None:
    """``fuses``: pointwise operations cost nothing of their own there; ``install``: the packages it needs, for the error where one is missing."""
    enter("runtime", name, line, function, fuses=fuses, install=install, plain=False, follows=False)


def _eager(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], threads: int | None) -> Call:
    return torch.inference_mode()(lambda: model(*args, **kwargs))


def missing(runtime: str) -> BadMeasure:
    """The error for a runtime that is not installed."""
    return BadMeasure(f"runtime {runtime!r} is not installed: pip install {entry('runtime', runtime).facts['install'] or runtime}")


def _compiled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], threads: int | None) -> Call:
    import torch._dynamo.config as config

    compiled = torch.compile(model, dynamic=False)
    call = torch.inference_mode()(lambda: compiled(*args, **kwargs))
    # Models of one class share their code, and torch.compile falls back to eager after eight variants of a code.
    with config.patch(recompile_limit=1024, accumulated_recompile_limit=4096), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    return call


def to_onnx(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The model as an ONNX file; inputs are named x0, x1 … in the order of the given tensors (:func:`graphprune.timing.files.drafted`)."""
    return drafted(model, args, kwargs).file


def _filed(read: Callable[[bytes], Call], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], first: Call | None) -> Filed:
    """A call of the model's ONNX file: that of ``first`` with the model's weights where it computes what the model does, otherwise a new one."""
    if isinstance(first, Filed):
        for file in first.draft.refilled(model, args, kwargs):
            try:
                call = read(file)
                if agrees(call(), model, args, kwargs):
                    return Filed(call, first.draft)
            except Exception:  # a width that the file holds as a number; where it is something else, the model's own file meets it, too
                continue
    draft = drafted(model, args, kwargs)
    return Filed(read(draft.file), draft)


def _onnxruntime(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], threads: int | None, first: Call | None = None) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Threads that wait for the next call keep their cores busy, and those of the other models that are timed in turn would find none.
    options.add_session_config_entry("session.force_spinning_stop", "1")

    def read(file: bytes) -> Call:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        known = {item.name for item in session.get_inputs()}
        feed = {f"x{index}": tensor.detach().cpu().contiguous().numpy() for index, tensor in enumerate(tensors((args, kwargs), torch.Tensor))}
        feed = {name: array for name, array in feed.items() if name in known}
        return lambda: session.run(None, feed)

    return _filed(read, model, args, kwargs, first)


def openvino_request(model: Any, threads: int | None, **settings: Any) -> Any:
    """A request to run an OpenVINO model on the CPU, in single precision."""
    import openvino

    settings |= {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def _openvino(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], threads: int | None, first: Call | None = None) -> Call:
    import openvino

    inputs = tuple(tensors((args, kwargs), torch.Tensor))

    def call_of(converted: Any, order: list[int]) -> Call:
        request = openvino_request(converted, threads)
        feed = [inputs[index].detach().cpu().contiguous().numpy() for index in order]
        return lambda: request.infer(feed)

    def read(file: bytes) -> Call:
        converted = openvino.Core().read_model(file, b"")
        return call_of(converted, [next(int(name[1:]) for name in port.get_names() if name[1:].isdigit()) for port in converted.inputs])

    try:  # several times quicker than OpenVINO's own reader of PyTorch
        return _filed(read, model, args, kwargs, first)
    except Exception:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(Flat(model, args, kwargs).eval(), example_input=inputs)
        if len(converted.inputs) == len(inputs):
            converted.reshape({port: list(tensor.shape) for port, tensor in zip(converted.inputs, inputs, strict=True)})
        return call_of(converted, list(range(len(inputs))))


enter("runtime", "eager", "PyTorch as it is", _eager, fuses=False, install="torch", plain=True, follows=False)
enter("runtime", "compile", "torch.compile", _compiled, fuses=True, install="torch", plain=True, follows=False)
enter("runtime", "onnxruntime", "ONNX Runtime on the processor", _onnxruntime, fuses=True, install="onnxruntime onnx onnxscript", plain=False, follows=True)
enter("runtime", "openvino", "OpenVINO on the processor", _openvino, fuses=True, install="openvino", plain=False, follows=True)
