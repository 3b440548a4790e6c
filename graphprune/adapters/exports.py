"""A model as a file for another runtime, through that runtime's own exporter: :data:`EXPORTS` by name, :data:`ENDINGS` by how the file is called.

>>> call = Call(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),), {}, dynamic=True)
>>> call.program().module()(torch.zeros(5, 3)).shape
torch.Size([5, 2])
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tracing.trees import replace, tensors


@dataclass(frozen=True)
class Call:
    """A model and what it is called with; ``dynamic`` leaves the number of samples open: the first axis of every input that is as long as the first one's."""

    model: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    dynamic: bool = False

    def program(self) -> torch.export.ExportedProgram:
        """Of ``torch.export``; an open axis is shown with two samples, because a length of one is taken for a constant."""
        if not self.dynamic:
            return torch.export.export(self.model, self.args, self.kwargs)
        samples = next((len(leaf) for leaf in tensors((self.args, self.kwargs), torch.Tensor) if leaf.ndim), 0)

        def open_here(leaf: Any) -> bool:
            return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == samples

        def grown(leaf: torch.Tensor) -> torch.Tensor:
            return torch.cat([leaf, leaf]) if samples == 1 and open_here(leaf) else leaf

        axis = {0: torch.export.Dim("batch")}
        named = inspect.signature(self.model.forward).bind(*self.args, **self.kwargs).arguments
        shapes = {name: _told(value, lambda leaf: axis if open_here(leaf) else None) for name, value in named.items()}
        return torch.export.export(self.model, replace(self.args, grown), replace(self.kwargs, grown), dynamic_shapes=shapes)


def _told(tree: Any, tell: Callable[[Any], Any]) -> Any:
    """A nest of the same form that says something about every leaf."""
    if isinstance(tree, Mapping):
        return {key: _told(item, tell) for key, item in tree.items()}
    return type(tree)([_told(item, tell) for item in tree]) if type(tree) in (list, tuple) else tell(tree)


def _onnx(call: Call, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(call.program(), dynamo=True, verbose=False)
    assert program is not None  # with dynamo it returns one
    file.write_bytes(program.model_proto.SerializeToString())


def _program(call: Call, file: Path) -> None:
    with file.open("wb") as stream:
        torch.export.save(call.program(), stream)  # type: ignore[arg-type]  # a stream will do


def _torchscript(call: Call, file: Path) -> None:
    with torch.no_grad(), file.open("wb") as stream:  # the name of a file would be written into it
        torch.jit.save(torch.jit.trace(call.model, call.args or None, example_kwarg_inputs=call.kwargs or None), stream)


def _executorch(call: Call, file: Path) -> None:
    """With XNNPACK where it takes an operation, portable kernels elsewhere."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad():
        file.write_bytes(to_edge_transform_and_lower(call.program(), partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


ENDINGS = {".onnx": "onnx", ".pt2": "program", ".ts": "torchscript", ".pte": "executorch"}
EXPORTS: dict[str, Callable[[Call, Path], None]] = {"onnx": _onnx, "program": _program, "torchscript": _torchscript, "executorch": _executorch}
FIXED = {"torchscript", "executorch"}  # their files are made for the lengths of the example
