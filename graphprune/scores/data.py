"""Batches and the loss, as scores use them: any iterable, one pass at a time, and a model that is left as it was.

>>> net = torch.nn.Linear(3, 2)
>>> data = Data(net, [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))], torch.nn.functional.cross_entropy)
>>> [(samples(batch), data.loss_of(batch).ndim) for batch in data]
[(4, 0)]
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from tqdm import tqdm

from ..errors import BadLoss, BadRatio, GraphpruneError, NeedsBatches
from ..tracing.fused import spelled_out
from ..tracing.probe import batch_inputs
from ..tracing.surroundings import unchanged
from ..tracing.trees import leaf_tensors, replace, tensors

Tensor = torch.Tensor
Item = TypeVar("Item")


@dataclass(frozen=True)
class Data:
    """Batches for one score.

    ``loss`` is a function ``(output, labels)`` for batches ``(inputs, labels)`` (for any other batch it gets the batch
    itself), or a function whose first argument is called ``model``: then ``loss(model, batch)``. Without one, the
    output's own ``loss`` is taken where it has one. ``reduction`` says how the loss joins the samples of a batch.
    """

    model: nn.Module
    batches: Iterable[Any]
    loss: Callable[..., Any] | None = None
    reduction: str = "mean"
    progress: bool = True
    name: str = "score"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise BadRatio(f"reduction is {self.reduction!r}; it says whether the loss is the 'mean' or the 'sum' over the samples of a batch")
        if not isinstance(self.batches, Iterable) or isinstance(self.batches, torch.Tensor | str | Mapping):
            raise NeedsBatches(f"batches is a {type(self.batches).__name__}; give an iterable of batches, such as [x] or a DataLoader")
        if self.loss is not None and not callable(self.loss):
            raise BadLoss(f"loss is {self.loss!r}; give a function (output, labels) or (model, batch)")

    def __iter__(self) -> Iterator[Any]:
        """The batches in order, with a progress bar when they take more than a few seconds."""
        count = 0
        for batch in bar(self.batches, self.name, self.progress):
            count += 1
            # A dict batch of a loss (model, batch) may hold its inputs under any name; only that loss knows how to read it.
            if not self.whole and not samples(batch):
                raise NeedsBatches(f"the score {self.name!r} met a batch without samples (batch {count}); leave it out")
            yield brought(batch, self.model)
        if not count:
            hint = "the iterator is used up" if self.once else "the iterable is empty"
            raise NeedsBatches(f"the score {self.name!r} needs at least one batch; {hint}")

    @property
    def once(self) -> bool:
        """Whether the batches can be read only once."""
        return iter(self.batches) is self.batches

    def twice(self) -> None:
        """Refuse batches that cannot be read again, for a score that passes over them more than once."""
        if self.once:
            raise NeedsBatches(f"the score {self.name!r} passes over the batches more than once; give a list or a DataLoader, not an iterator")

    @property
    def whole(self) -> bool:
        """Whether the loss is a forward function ``(model, batch)``."""
        try:
            return self.loss is not None and next(iter(inspect.signature(self.loss).parameters), "") == "model"
        except ValueError:  # some built-in functions have no signature
            return False

    def run(self, batch: Any) -> Any:
        """One forward pass of the model on a batch; raises NeedsBatches where the batch does not fit the model, BadLoss where a loss (model, batch) fails."""
        if self.loss is not None and self.whole:
            return self._judged(self.model, batch)
        args, kwargs = batch_inputs(batch)
        try:
            return self.model(*args, **kwargs)
        except GraphpruneError:
            raise
        except Exception as error:
            text = f"a batch of the score {self.name!r} does not fit the model: {type(error).__name__}: {str(error)[:500]}"
            raise NeedsBatches(f"{text}{given(tensors((args, kwargs), torch.Tensor))}") from error

    def _judged(self, *values: Any) -> Any:
        try:
            return self.loss(*values) if self.loss is not None else None
        except GraphpruneError:
            raise
        except Exception as error:
            shapes = shown(tensors(values, torch.Tensor))
            raise BadLoss(f"the loss raised {type(error).__name__}: {str(error)[:500]} (it was given {shapes or 'no tensors'})") from error

    def loss_of(self, batch: Any) -> Tensor:
        """The loss of a batch: one finite number that depends on the model, or BadLoss."""
        output = self.run(batch)
        if not self.whole:
            if self.loss is not None:
                labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
                output = self._judged(output, labels)
            elif getattr(output, "loss", None) is not None:
                output = output.loss
            else:
                raise BadLoss(f"the score {self.name!r} needs a loss; give loss=, a function (output, labels) or (model, batch)")
        if not isinstance(output, Tensor) or output.numel() != 1:
            kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
            raise BadLoss(f"the loss must be one number, it has {kind}; take its mean or its sum")
        if not bool(torch.isfinite(output)):
            raise BadLoss(f"the loss is {float(output.detach())}; look at the batch and at the model's output")
        if not output.requires_grad:
            raise BadLoss("the loss does not depend on the model's parameters; was it detached, or computed from the labels alone?")
        return output.reshape(())


def bar(items: Iterable[Item], name: str, progress: bool = True) -> Iterable[Item]:
    """The items, with a progress bar when they take more than a few seconds and a person may be looking (never in files).

    >>> list(bar([1, 2], "score"))
    [1, 2]
    """
    return tqdm(items, desc=name, delay=5, leave=False, disable=None if progress else True)


def shown(batch_tensors: Iterable[Tensor]) -> str:
    """Shapes and types, for messages.

    >>> shown([torch.zeros(2, 3)])
    '(2, 3) float32'
    """
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in batch_tensors)


def given(batch_tensors: Iterable[Tensor]) -> str:
    """What a model was given, and how batches are read, for messages."""
    shapes = shown(batch_tensors)
    form = "of a pair the second is taken for labels, longer tuples and dicts go to forward as they are; several inputs with labels are ((a, b), labels)"
    return f" (it was given {shapes}; {form})" if shapes else ""


def brought(batch: Any, model: nn.Module) -> Any:
    """The batch on the device of the model, where that lies on one and nothing of the batch does: loaders give what lies on the processor.

    >>> brought((torch.zeros(1, 2), torch.zeros(1)), nn.Linear(2, 2))[0].device
    device(type='cpu')
    """
    devices = {tensor.device for *_, tensor in leaf_tensors(model)}
    if len(devices) != 1 or torch.device("meta") in devices or devices & {tensor.device for tensor in tensors(batch, Tensor)}:
        return batch
    return _moved(batch, devices.pop())


def _moved(item: Any, device: torch.device) -> Any:
    """Tensors in any nest; of packed sequences all but the lengths, of mappings (what tokenizers give, say) a copy."""
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, PackedSequence):
        packed: Any = item  # torch declares its ``to`` for dtypes alone
        return packed.to(device)
    if isinstance(item, MutableMapping):
        twin = copy.copy(item)
        for key, value in item.items():
            twin[key] = _moved(value, device)
        return twin
    if isinstance(item, list | tuple):
        parts = [_moved(part, device) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    return replace(item, lambda tensor: tensor.to(device))


def samples(batch: Any) -> int:
    """How many samples a batch holds: the first length of its first input."""
    first = next((t for t in tensors(batch_inputs(batch), torch.Tensor) if t.ndim), None)
    return len(first) if first is not None else 1


def one_by_one(batch: Any) -> Iterator[Any]:
    """The batches of one sample each: every tensor with the batch's first length is split along it."""
    count = samples(batch)
    for index in range(count):
        yield replace(batch, lambda t, i=index: t[i : i + 1] if t.ndim and len(t) == count else t)


@contextmanager
def undisturbed(model: nn.Module, seed: int | None = 0) -> Iterator[None]:
    """Eval mode and a seed (if given) while a score runs the model; modes, buffers, ``requires_grad`` and random states are put back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(tensor, tensor.requires_grad) for *_, tensor in leaf_tensors(model) if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex())]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    try:
        with spelled_out(model), torch.random.fork_rng(devices=devices), unchanged(model):
            if seed is not None:
                torch.manual_seed(seed)
                model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


def gradients(data: Data, parameters: Mapping[str, Tensor], create_graph: bool = False) -> Iterator[tuple[dict[str, Tensor], int]]:
    """For every batch, the gradient of its mean loss by name, and its number of samples; ``.grad`` is never touched."""
    for batch in data:
        yield gradient(data, parameters, batch, create_graph), samples(batch)


def gradient(data: Data, parameters: Mapping[str, Tensor], batch: Any, create_graph: bool = False) -> dict[str, Tensor]:
    """The gradient of a batch's mean loss with respect to every parameter (zero where the loss does not reach it)."""
    with torch.inference_mode(False), torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        loss = data.loss_of(batch)
        loss = loss / samples(batch) if data.reduction == "sum" else loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, create_graph=create_graph)
    if all(grad is None for grad in gradients):
        raise BadLoss("the loss does not depend on any parameter that could be cut")
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
