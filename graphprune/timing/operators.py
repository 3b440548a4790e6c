"""Recorded operations by themselves, on the runtime that is asked for: :func:`lone` one call, :func:`together` many at once.

Eager operations are called as recorded (also for ``compile``, which uses the same kernels for products). ONNX Runtime and
OpenVINO get products as the nodes of one file, side by side, and their own profilers say what each took: one session
instead of hundreds, and no price for the call, nor for reordering memory at its ends, which a whole model pays only once.
What surrounds products there is fused into them or cheap, so only operations that stay on their own (norms with
statistics, softmax, pooling) are counted besides, at their eager price.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..catalogue import entry
from ..tracing.node import Node
from .runtimes import openvino_request

RUNS = 8
AROUND = frozenset("Parameter Result Constant Const Reorder Input Output".split())


class Item(NamedTuple):
    """A node of an ONNX file: its kind, what it is given, the weights it holds, and its attributes."""

    kind: str
    given: tuple[torch.Tensor, ...]
    weights: list[torch.Tensor]
    facts: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * 4 for tensor in (*self.given, *self.weights))


def lone(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], runtime: str) -> Callable[[], Any] | None:
    """A function that makes the call once; None where the runtime fuses it away."""
    if entry("runtime", runtime).facts["fuses"] and node.op.fused:
        return None
    return lambda: node.func(*args, **kwargs)


def item(node: Node, args: tuple[Any, ...]) -> Item | None:
    """The call as a node of an ONNX file, if it is a product."""
    call = node.op.onnx(*args) if node.op.onnx is not None else None
    return Item(*call) if call is not None else None


def together(items: Sequence[Item], runtime: str, threads: int) -> list[float]:
    """Seconds of each, by the runtime's own profiler: the smallest of several runs (what disturbs only adds)."""
    file, feed = _file(items)
    runs = PROFILERS[runtime](file, feed, threads, len(items))
    return [min(runs.get(index, [0.0])) for index in range(len(items))]


def _onnxruntime(file: bytes, feed: dict[str, Any], threads: int, count: int) -> dict[int, list[float]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.enable_profiling = 3, threads, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[int, list[float]] = {}
    for event in events:
        # A convolution in blocked layout is named by its output, any other node by itself; reorders have other names.
        name = re.fullmatch(r"y(\d+)(_nchwc)?_kernel_time", event.get("name", ""))
        if name:
            times.setdefault(int(name[1]), []).append(max(event["dur"], 0.5) * 1e-6)
    return times


def _openvino(file: bytes, feed: dict[str, Any], threads: int, count: int) -> dict[int, list[float]]:
    import openvino

    request = openvino_request(openvino.Core().read_model(file, b""), threads, PERF_COUNT=True)
    means: dict[int, list[float]] = {}
    for _ in range(RUNS):
        request.infer(feed)
        nodes = [each for each in request.get_profiling_info() if each.node_type not in AROUND]
        # Nodes keep the name of their output, except where OpenVINO makes new ones of its own: those follow in order.
        names = [re.match(r"y(\d+)(/|$)", each.node_name) for each in nodes]
        unnamed = iter(sorted(set(range(count)) - {int(name[1]) for name in names if name}))
        for each, name in zip(nodes, names, strict=True):
            index = int(name[1]) if name else next(unnamed, None)
            if index is not None:
                means.setdefault(index, []).append(each.real_time.total_seconds())
    # What is reported is the mean over all runs so far.
    single = {index: [now * (i + 1) - (mean[i - 1] * i if i else 0) for i, now in enumerate(mean)] for index, mean in means.items()}
    return {index: [max(each, 5e-7) for each in values] for index, values in single.items()}


def _file(items: Sequence[Item]) -> tuple[bytes, dict[str, Any]]:
    from onnx import TensorProto, helper, numpy_helper

    feed, inputs, constants, nodes, outputs = {}, [], [], [], []
    for index, (kind, operands, weights, facts) in enumerate(items):
        names = [f"x{index}_{i}" for i in range(len(operands))] + [f"w{index}_{i}" for i in range(len(weights))]
        for name, tensor in zip(names, operands, strict=False):
            feed[name] = tensor.detach().cpu().float().contiguous().numpy()
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(tensor.shape)))
        constants += [
            numpy_helper.from_array(w.detach().cpu().float().contiguous().numpy(), name) for name, w in zip(names[len(operands) :], weights, strict=True)
        ]
        facts = {key: [int(v) for v in value] if isinstance(value, list | tuple) else int(value) for key, value in facts.items()}
        nodes.append(helper.make_node(kind, names, [f"y{index}"], name=f"y{index}", **facts))  # pyright: ignore[reportArgumentType]
        outputs.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "operations", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString(), feed


# Runtimes whose own profiler says what each product of a file takes; any other is priced by eager calls.
PROFILERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
