"""A model as an ONNX file, and the files of models cut from it, which are the same file with other weights.

Translating a model takes seconds, most of them spent on its operations, none of which a cut changes. A :class:`Draft` keeps the translation
as it was before it was optimised; :meth:`Draft.refilled` puts the weights of a cut model into it and optimises that, which gives the file that
exporting the cut model would give. Where the code holds a width as a number the file is a wrong one: whoever runs it compares the outputs
(:func:`agrees`) and has the model exported anew.
"""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..tracing.trees import replace, tensors

CLOSE = 1e-3  # the largest difference of outputs in single precision, as a share of the largest output


class Flat(nn.Module):
    """A model as a function from its input tensors to its output tensors, whatever nests hold them."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.args, self.kwargs = model, args, kwargs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        remaining = iter(inputs)
        args = replace(self.args, lambda _: next(remaining))
        kwargs = replace(self.kwargs, lambda _: next(remaining))
        return tuple(tensors(self.model(*args, **kwargs), torch.Tensor))


@dataclass(frozen=True, eq=False)
class Draft:
    """A model's ONNX ``file``, and what files of models cut from it are made of: the translation without weights, and the shapes of ``weights``."""

    file: bytes
    program: Any = None
    translation: Any = None
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def refilled(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[bytes]:
        """The file with the weights of a model cut from the one that it was made of, for each way to read the sizes in it; none where weights are missing."""
        state = _state(Flat(model, args, kwargs))
        if self.program is None or not all(name in state for name in self.weights):
            return
        import onnx_ir

        for place in (-1, -2):
            translation = onnx_ir.serde.deserialize_model(self.translation)
            if not _follow(translation, place) and place != -1:
                return
            for value in _between(translation):
                value.shape = None  # those of the original; they follow from the weights
            for name in self.weights:
                value, tensor = translation.graph.initializers[name], onnx_ir.tensor(state[name].numpy(), name=name)
                value.const_value = tensor
                value.shape = onnx_ir.Shape(tuple(state[name].shape))
            _regroup(translation, self.weights)
            self.program.model = translation
            self.program.optimize()
            yield self.program.model_proto.SerializeToString()


def _regroup(translation: Any, before: Mapping[str, tuple[int, ...]]) -> None:
    """Convolutions lose groups where a group is as large as before and the weight holds fewer of them."""
    import onnx_ir

    for node in translation.graph:
        name = node.inputs[1].name if node.op_type in ("Conv", "ConvTranspose") else ""
        groups = node.attributes["group"].as_int() if name in before else 1
        if groups > 1:
            shape = node.inputs[1].shape
            if shape[1] == before[name][1]:
                node.attributes["group"] = onnx_ir.AttrInt64("group", groups * shape[0] // before[name][0])


def _follow(translation: Any, place: int) -> bool:
    """Let reshapes follow what they are given instead of holding its sizes as numbers; whether one of them could be read in several ways.

    Sizes at the front that are those of what is given are copied; of the others, without those that end both, the one at ``place`` is what remains.
    """
    import onnx_ir

    several = False
    for node in translation.graph:
        if node.op_type != "Reshape" or node.inputs[0].shape is None or node.inputs[1].producer() is None:
            continue
        sizes, shape = _sizes(node.inputs[1]), list(node.inputs[0].shape)
        if not sizes or 0 in sizes or not all(isinstance(size, int) for size in shape):
            continue
        rest = math.prod(shape) // abs(math.prod(sizes))  # of what is given, for a size of -1
        sizes = [rest if size == -1 else size for size in sizes]
        front = next((at for at, pair in enumerate(zip(shape, sizes, strict=False)) if pair[0] != pair[1]), min(len(shape), len(sizes)))
        ends = zip(reversed(shape[front:]), reversed(sizes[front:]), strict=False)
        back = next((at for at, pair in enumerate(ends) if pair[0] != pair[1]), min(len(shape), len(sizes)) - front)
        between = list(range(front, len(sizes) - back)) or list(range(front, len(sizes)))[-1:]
        large = [at for at in between if sizes[at] != 1] or between
        several = several or len(large) > 1
        ways = [0 if at < front else size for at, size in enumerate(sizes)]
        if large:
            ways[large[max(place, -len(large))]] = -1
        constant = onnx_ir.node("Constant", [], {"value_ints": ways})
        node.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes["allowzero"] = onnx_ir.AttrInt64("allowzero", 0)
    return several


def _sizes(value: Any) -> list[int] | None:
    """The whole numbers that are joined into a shape; None where one is computed."""
    node = value.producer()
    parts = [part.producer() for part in node.inputs] if node.op_type == "Concat" else [node]
    if any(part is None or part.op_type != "Constant" or "value_ints" not in part.attributes for part in parts):
        return None
    return [size for part in parts for size in part.attributes["value_ints"].as_ints()]


def drafted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draft:
    """The model as an ONNX file; inputs are named x0, x1 … in the order of the given tensors.

    Written by torch's exporter over ``torch.export``, which needs onnxscript; by the older one, with a warning, where it is not installed or fails.
    """
    inputs = tuple(tensors((args, kwargs), torch.Tensor))
    flat, names = Flat(model, args, kwargs).eval(), [f"x{index}" for index in range(len(inputs))]
    reason = "onnxscript is not installed" if importlib.util.find_spec("onnxscript") is None else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not reason:
            try:
                program = torch.onnx.export(flat, inputs, input_names=names, dynamo=True, verbose=False, optimize=False)
                return _draft(program, _state(flat))
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        file = io.BytesIO()
        torch.onnx.export(flat, inputs, file, input_names=names, opset_version=17, dynamo=False)  # pyright: ignore[reportArgumentType]
    warnings.warn(f"ONNX: written by torch's older exporter, since the one over torch.export cannot be used ({reason})", stacklevel=3)
    return Draft(file.getvalue())


def _draft(program: Any, state: dict[str, torch.Tensor]) -> Draft:
    translation = program.model_proto
    shapes = {item.name: tuple(item.dims) for item in translation.graph.initializer}
    weights = {name: shape for name, shape in shapes.items() if name in state and shape == state[name].shape}
    for item in translation.graph.initializer:
        if item.name in weights:
            item.ClearField("raw_data")
            item.dims[:] = [0]
    program.optimize()
    return Draft(program.model_proto.SerializeToString(), program, translation, weights)


def _state(flat: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by all of their names."""
    kinds = (flat.named_parameters(remove_duplicate=False), flat.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().cpu().contiguous() for kind in kinds for name, tensor in kind}


def _between(translation: Any) -> Iterator[Any]:
    """What the calls of a translation return, in its functions, too."""
    for part in (translation.graph, *translation.functions.values()):
        for node in part.all_nodes():
            yield from node.outputs


def agrees(outputs: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a runtime's outputs are those of the model in PyTorch."""
    with torch.no_grad():
        wanted = [tensor.cpu().numpy() for tensor in tensors(model(*args, **kwargs), torch.Tensor)]
    arrays = [np.asarray(array) for array in (outputs.values() if hasattr(outputs, "values") else outputs)]
    if len(arrays) != len(wanted) or any(a.shape != b.shape for a, b in zip(arrays, wanted, strict=True)):
        return False
    apart = (float(np.abs(a.astype(np.float64) - b).max()) <= CLOSE * float(np.abs(b).max()) for a, b in zip(arrays, wanted, strict=True) if b.size)
    return all(apart)
