"""One recorded operation by itself, on the runtime that is asked for: :func:`lone`.

Eager operations are called as recorded (also for ``compile``, which uses the same kernels for products). Other runtimes
get products as one-node ONNX files; what surrounds products there is fused into them or cheap, so only operations that
stay on their own (norms with statistics, softmax, pooling) are counted, at their eager price.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .cost import operation
from .runtimes import onnx_call, openvino_call
from .trace import Node

FUSED = frozenset("native_batch_norm relu relu_ hardtanh hardtanh_ add add_ mul mul_ silu silu_ sigmoid clamp clamp_ clone hardswish hardswish_".split())


def lone(node: Node, args: tuple, kwargs: dict, runtime: str, threads: int) -> Callable[[], Any] | None:
    """A function that makes the call once; None where the runtime fuses it away."""
    if runtime in ("eager", "compile"):
        return (lambda: node.func(*args, **kwargs)) if runtime == "eager" or operation(node) not in FUSED else None
    name = operation(node)
    if name in FUSED:
        return None
    if name == "convolution":
        file, given = _convolution(args)
    elif name in ("mm", "bmm", "addmm", "baddbmm"):
        file, given = _product(args[-2], args[-1], weight=name in ("mm", "addmm"))
    else:
        return lambda: node.func(*args, **kwargs)
    return onnx_call(file, given, threads) if runtime == "onnxruntime" else openvino_call(file, given, threads)


def _convolution(args: tuple) -> tuple[bytes, tuple[torch.Tensor, ...]]:
    x, weight, bias, stride, padding, dilation, transposed, extra, groups = args
    facts = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups, "kernel_shape": list(weight.shape[2:])}
    facts |= {"output_padding": extra} if transposed else {}
    weights = [weight] if bias is None else [weight, bias]
    return _file("ConvTranspose" if transposed else "Conv", (x,), weights, facts), (x,)


def _product(left: torch.Tensor, right: torch.Tensor, weight: bool) -> tuple[bytes, tuple[torch.Tensor, ...]]:
    given = (left,) if weight else (left, right)
    return _file("MatMul", given, [right] if weight else [], {}), given


def _file(kind: str, given: tuple[torch.Tensor, ...], weights: list[torch.Tensor], facts: dict) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, list(tensor.shape)) for i, tensor in enumerate(given)]
    held = [numpy_helper.from_array(w.detach().cpu().float().contiguous().numpy(), f"w{i}") for i, w in enumerate(weights)]
    facts = {key: [int(v) for v in value] if isinstance(value, list | tuple) else int(value) for key, value in facts.items()}
    node = helper.make_node(kind, [i.name for i in inputs] + [w.name for w in held], ["y"], **facts)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], kind, inputs, [output], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
