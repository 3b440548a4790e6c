"""Before and after: which models can be cut at all, and whether the cut one computes what the zeroed original computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace as replace_fields
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import BadModel, NotEqual, UnknownName, no_module, warn
from ..tracing.copies import duplicate
from ..tracing.dice import RUNNING, same_dice
from ..tracing.fused import gathered
from ..tracing.graph import Graph
from ..tracing.node import line
from ..tracing.outputs import Item, items, selected
from ..tracing.refused import fails, raised_at
from ..tracing.shadow import evaluating
from ..tracing.surroundings import apart, undisturbed_surroundings
from ..tracing.trees import check_scope, inner_modules, leaf_tensors, modules_of, replace, tensors
from .apply import apply
from .plan import Plan
from .sampled import MOST, Parted, Sampled, smaller
from .zeroed import Masks, answer, outcome, reading

SUSPECT, LASTING = 1e-5, 1e-3  # from here on a difference in float32 is looked at in float64, where rounding leaves less than this share of it
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-3}  # largest relative difference; of shorter numbers 5e-2
TIES = {torch.float64: 0.0, torch.float32: 1e-3}  # the share of whole numbers that rounding may change where float64 cannot tell; of shorter numbers 0.2


class Compared(NamedTuple):
    """What comparing two results says."""

    gap: float  # the largest relative difference of numbers with a fraction
    tells: bool  # whether any output says something
    counted: str = ""  # the first output of whole numbers (chosen positions, masks) that differs, and how much of it
    share: float = 0.0  # the largest share of the entries of such an output that differ


def check(graph: Graph, model: nn.Module, small: nn.Module, plan: Plan, tolerance: float | None = None) -> float:
    """The largest relative difference between the cut model and the zeroed original; raises NotEqual when too large.

    A copy of ``small`` runs, on copies of the example, so that both are as they were. Where the example has no values of its own (zeros, constants), a
    second one is drawn; further examples that the graph was made of, and training mode where it does something else, are checked as well.
    Whole numbers have to be equal; where scores next to each other may have changed places by rounding, float64 tells.
    """
    with RUNNING:  # it sets torch's random numbers and kernels
        return _check(graph, model, small, plan, tolerance)


def _check(graph: Graph, model: nn.Module, small: nn.Module, plan: Plan, tolerance: float | None) -> float:
    if any(tensor.is_meta for *_, tensor in leaf_tensors(small)):
        warn("the model lies on the meta device and has no values, so that nothing is checked against the zeroed original; do that where the weights are")
        return 0.0
    graph, worst, void = reading(graph, model, plan), 0.0, True
    sampled = Sampled(graph, model, small, plan)
    for example in (graph.example, *graph.asked.others):
        for inputs, drawn in _inputs(example):
            said = _said(sampled, inputs, tolerance) if example is graph.example else None
            said = said or _compared(graph, model, small, plan, inputs, tolerance, drawn)
            _settle(said, graph, model, plan, inputs)
            worst, void = max(worst, said.gap), void and not said.tells
    if void:
        warn("on the example every output is constant, so that comparing the cut model with the zeroed original says nothing; give an example with values")
    if graph.trained:
        said = _said(sampled, graph.example, tolerance, training=True) or _check_training(graph, model, small, plan, tolerance)
        _settle(said, graph, model, plan, graph.example, training=True)
    return worst


def _inputs(example: Any) -> Iterator[tuple[Any, bool]]:
    """The example, and a second one where a floating input of it is constant: then most weights meet nothing but that."""
    yield example, False
    if callable(example):
        return
    constant = [t for t in tensors(example, torch.Tensor) if t.is_floating_point() and t.numel() > 1 and bool((t == t.flatten()[0]).all())]
    if constant:
        random = torch.Generator().manual_seed(0)
        draw = lambda t: t + torch.randn(t.shape, generator=random).to(t) if any(t is one for one in constant) else t  # noqa: E731
        yield tuple(replace(part, draw) for part in example), True


def _said(sampled: Sampled, example: Any, tolerance: float | None, training: bool = False) -> Compared | None:
    """The difference on a part of the example, or on all of it, and whether any output says something; None where only slower ways can tell.

    These are taken, too, wherever the two seem to differ (:mod:`graphprune.cutting.sampled`).
    """
    if not sampled.possible(training):
        return None
    part = smaller(example)
    for sample in (example,) if sampled.graph.real or part is example else (part, example):
        said = _on_sample(sampled, sample, tolerance, training, sample is example)
        if said is not None:
            return said
    return None


def _on_sample(sampled: Sampled, sample: Any, tolerance: float | None, training: bool, whole: bool) -> Compared | None:
    """The same on one sample, which may be the ``whole`` example; None where it says nothing."""
    if training and tolerance is None and sampled.normalises:
        said = _compared_long(sampled, sample, training)
        if said is not None and said.gap <= LASTING * SUSPECT and not said.counted and (said.tells or whole):
            return said
    graph = sampled.graph
    try:
        with undisturbed_surroundings(sampled.model, sampled.small):
            found, wanted = (_mattering(items(result), graph) for result in sampled.results(sample, training))
        wanted = _narrowed(wanted, graph, sampled.masks)
        said = _gap(graph, found, wanted, tolerance or math.inf)
    except (Parted, Exception):  # whatever it is, the slower ways meet it again and say it
        return None
    if not found or not (said.tells or whole):
        return None
    if said.gap <= SUSPECT or tolerance is not None:
        return said
    lasts = _lasts(sampled, sample, training, said.gap)
    if lasts:
        raise NotEqual(f"the outputs differ from those of the zeroed original by {said.gap:.1e} (relative), in float64 as in float32: more than rounding")
    # Statistics over a few numbers make much of rounding; where float64 has not been asked, the limits decide.
    return said if lasts is False or _within(graph, found, wanted) else None


def _within(graph: Graph, found: list[Item], wanted: list[Item]) -> bool:
    try:
        _gap(graph, found, wanted, None)
    except NotEqual:
        return False
    return True


def _lasts(sampled: Sampled, sample: Any, training: bool, gap: float) -> bool | None:
    """Whether a difference is no rounding error: in float64, too, it is there. None where nobody knows: the code itself goes back to shorter numbers."""
    said = _compared_long(sampled, sample, training)
    return None if said is None else said.gap > LASTING * gap


def _compared_long(sampled: Sampled, sample: Any, training: bool) -> Compared | None:
    """The difference in float64; None where the code does not run so, or where nothing is returned that could differ."""
    if not sampled.fits:
        return None
    try:
        with undisturbed_surroundings(sampled.model, sampled.small):
            found, wanted = (_mattering(items(result), sampled.graph) for result in sampled.results(sample, training, long=True))
        wanted = _narrowed(wanted, sampled.graph, sampled.masks)
        return _gap(sampled.graph, found, wanted, math.inf) if found else None
    except (Parted, Exception):  # it does not run in float64
        return None


def _compared(graph: Graph, model: nn.Module, small: nn.Module, plan: Plan, example: Any, tolerance: float | None, drawn: bool) -> Compared:
    """The difference on one example, and whether any output says something."""
    try:
        with torch.no_grad(), same_dice(away=True), undisturbed_surroundings(small):
            found = _run(_evaluated(small), example, graph)
    except Exception as error:
        fails(model, example)
        if drawn:
            return Compared(0.0, False)
        raise NotEqual(_failed(error)) from error
    wanted = _narrowed(_wanted(graph, model, plan, example), graph, plan)
    if not found and not wanted:
        raise NotEqual("the model returns no tensor and no number on the example, so that nothing can be compared; return what matters")
    return _gap(graph, found, wanted, tolerance)


def _wanted(graph: Graph, model: nn.Module, plan: Plan, example: Any) -> list[Item]:
    """What the zeroed original returns for an example, of the outputs that matter."""
    with torch.no_grad(), same_dice(away=True):
        if callable(example):
            return _mattering(answer(model, plan, replace_fields(graph.asked, example=example, outputs=None, others=())), graph)
        return outcome(model, plan, graph, *example)


def _settle(said: Compared, graph: Graph, model: nn.Module, plan: Plan, example: Any, training: bool = False) -> None:
    """Raises NotEqual where whole numbers differ, and not because scores that are equal but for rounding have changed places."""
    if not said.counted:
        return
    again = _unrounded(graph, model, plan, example, training)
    if again is None:
        dtypes = {tensor.dtype for *_, tensor in leaf_tensors(model) if tensor.is_floating_point()}
        wrong = said.share > max((TIES.get(dtype, 0.2) for dtype in dtypes), default=0.0)
    else:
        wrong = bool(again.counted)
    if wrong:
        raise NotEqual(f"{said.counted}{' (in training mode)' if training else ''}")


def _unrounded(graph: Graph, model: nn.Module, plan: Plan, example: Any, training: bool) -> Compared | None:
    """The comparison in float64, of a model each of whose weights is moved by a millionth: no two scores of it are equal by chance.

    None where the model is too large for that, or does not run so.
    """
    kept = [tensor for *_, tensor in leaf_tensors(model)]
    if sum(tensor.numel() for tensor in kept) > MOST or any(tensor.is_meta for tensor in kept):
        return None
    dice = torch.Generator().manual_seed(0)
    try:
        other = duplicate(model, {id(tensor): _moved(tensor, dice) for tensor in kept}).train(training)
        small = apply(other, plan).train(training)
        if not callable(example):
            example = tuple(replace(part, _long) for part in example)
        with torch.no_grad(), same_dice(away=True), undisturbed_surroundings(model):
            found = _run(_copy(small).train(training), example, graph)
        if callable(example):
            wanted = _wanted(graph, other, plan, example)
        else:
            with torch.no_grad(), same_dice(away=True):
                wanted = outcome(other, plan, replace_fields(graph.asked, others=()), *example, training=training)
        return _gap(graph, found, _narrowed(wanted, graph, plan), math.inf)
    except Exception:  # code that cannot run in float64 says nothing more than it did
        return None


def _moved(tensor: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    data = _long(tensor.detach())
    if not isinstance(tensor, nn.Parameter):
        return data.clone()
    if data.is_floating_point():
        data = data * (1 + 1e-6 * torch.randn(data.shape, generator=dice, dtype=data.dtype).to(data.device))
    return nn.Parameter(data.clone(), tensor.requires_grad)


def _long(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _run(model: nn.Module, example: Any, graph: Graph) -> list[Item]:
    """What a model returns for copies of the inputs, of the outputs that matter."""
    if callable(example):
        result = apart(example, model)
    else:
        args, kwargs = (replace(part, lambda tensor: tensor.detach().clone()) for part in example)
        result = apart(model, *args, **kwargs)
    return _mattering(items(result), graph)


def _mattering(found: list[Item], graph: Graph) -> list[Item]:
    """The outputs that matter; all of them where an example returns something else than the first."""
    found = [item for item in found if item[0].partition(".")[0] not in graph.state]
    try:
        return selected(found, graph.asked.outputs)
    except UnknownName:
        return found


def _narrowed(wanted: list[Item], graph: Graph, plan: Plan | Masks) -> list[Item]:
    """What the zeroed original returns, its states without the removed entries: these follow what is cut."""
    if not graph.states:
        return wanted
    masks = plan if isinstance(plan, Masks) else Masks(graph, plan)
    kept = {path: masks.kept(value) for path, value in zip(graph.paths, graph.outputs, strict=True) if path.partition(".")[0] in graph.states}
    narrowed: list[Item] = []
    for path, item in wanted:
        for dim, positions in kept.get(path, {}).items() if isinstance(item, torch.Tensor) else ():
            item = item.index_select(dim, positions.to(item.device))
        narrowed.append((path, item))
    return narrowed


def _copy(model: nn.Module) -> nn.Module:
    """A copy that may be run: everything in it is its own."""
    return gathered(duplicate(model, {id(tensor): _own(tensor) for *_, tensor in leaf_tensors(model)}))


def _evaluated(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode; of a model that is in it, with all that it holds."""
    copied = _copy(model)
    return evaluating(copied) if any(module.training for _, module in modules_of(copied)) else copied


def _own(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.detach().clone()
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _gap(graph: Graph, found: list[Item], wanted: list[Item], tolerance: float | None) -> Compared:
    """The difference between two results, output by output; raises NotEqual where one is larger than ``tolerance``, or of another shape."""
    if len(found) != len(wanted):
        raise NotEqual(f"the cut model returns {len(found)} tensors and numbers, the zeroed original {len(wanted)}")
    outputs = [_apart(_what(graph, at, path), mine, theirs, tolerance) for at, ((path, mine), (_, theirs)) in enumerate(zip(found, wanted, strict=True))]
    return Compared(
        max((one.gap for one in outputs), default=0.0),
        any(one.tells for one in outputs),
        next((one.counted for one in outputs if one.counted), ""),
        max((one.share for one in outputs), default=0.0),
    )


def _apart(what: str, mine: Any, theirs: Any, tolerance: float | None) -> Compared:
    """The difference between two outputs, tensors or numbers; ``what`` names them."""
    mine, theirs = (item if isinstance(item, torch.Tensor) else torch.as_tensor(item) for item in (mine, theirs))
    if mine.shape != theirs.shape:
        axes = [axis for axis, (a, b) in enumerate(zip(mine.shape, theirs.shape, strict=False)) if a != b]
        raise NotEqual(f"{what} has shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}{f' (axis {axes[0]})' if axes else ''}")
    mine, theirs = (item.to_dense() if item.layout is not torch.strided else item for item in (mine, theirs))
    if not mine.numel() or mine.is_nested:
        return Compared(0.0, False)
    if not mine.is_floating_point() and not mine.is_complex():
        others = int((mine != theirs).sum())
        counted = f"{what} differs from that of the zeroed original in {others} of {mine.numel()} entries, which are whole numbers" if others else ""
        return Compared(0.0, _tells(theirs), counted, others / mine.numel())
    finite = torch.isfinite(theirs)
    if not torch.equal(torch.isfinite(mine), finite):
        raise NotEqual(f"{what} is not finite in the same places as that of the zeroed original")
    apart, size = (mine - theirs)[finite].abs(), theirs[finite].abs()
    if not len(apart):
        return Compared(0.0, False)
    gap = float(apart.max()) / (float(size.max()) or 1.0)
    if not gap <= (tolerance or LIMITS.get(mine.dtype, 5e-2)):
        where = torch.where(finite, (mine - theirs).abs(), 0).flatten().argmax()
        at = tuple(int(i) for i in torch.unravel_index(where, mine.shape))
        raise NotEqual(f"{what} differs from the zeroed original by {gap:.1e} (relative to its largest entry; most at {at})")
    return Compared(gap, _tells(theirs))


def _tells(result: torch.Tensor) -> bool:
    """Whether an output says something: it has different entries, or one that is not zero."""
    return bool((result != result.flatten()[0]).any()) or result.numel() == 1 and bool(result.any())


def _what(graph: Graph, index: int, path: str) -> str:
    """An output in words: its path, and the call that made it."""
    name = f"the output {path!r}" if path else "the output"
    value = graph.outputs[index] if index < len(graph.outputs) and graph.paths[index] == path else None
    if value is None or value.node < 0 or value.node >= len(graph.nodes):
        return name
    node = graph.nodes[value.node]
    made = ", ".join(part for part in (node.module, node.line) if part)
    return f"{name} (made by {node.op.short}{f' in {made}' if made else ''})"


def _check_training(graph: Graph, model: nn.Module, small: nn.Module, plan: Plan, tolerance: float | None) -> Compared:
    """In training mode the cut model has to run where the original does, and to compute the same where nothing is random."""
    try:
        with torch.no_grad(), same_dice(away=True), undisturbed_surroundings(small):
            found = _run(_copy(small).train(), graph.example, graph)
    except Exception as error:
        fails(model, graph.example, training=True)
        raise NotEqual(f"{_failed(error)} (in training mode)") from error
    if graph.random_in_training:
        return Compared(0.0, False)
    with torch.no_grad(), same_dice(away=True):
        wanted = outcome(model, plan, graph, *graph.example, training=True)
    try:
        return _gap(graph, found, _narrowed(wanted, graph, plan), tolerance)
    except NotEqual as error:
        raise NotEqual(f"{error} (in training mode)") from None


def _failed(error: Exception) -> str:
    at = raised_at(error)
    return f"the cut model does not run on the example{f' ({line(at)})' if at else ''}: {type(error).__name__}: {error}"


def check_model(model: Any) -> None:
    """Refuse what cannot be cut, and say what to give instead."""
    check_scope()
    if isinstance(model, torch.jit.ScriptModule):
        raise BadModel("the model is scripted (torch.jit); shrink the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise BadModel(no_module(model) + ("" if isinstance(model, type) else inner_modules(model)))
    call = getattr(type(model).__call__, "__module__", "") or ""
    if type(model).__call__ is not nn.Module.__call__ and not call.startswith("torch.") and inner_modules(model):
        raise BadModel(f"the model is a {type(model).__name__}, which is called in its own way (it has a __call__ of its own){inner_modules(model)}")
    if hasattr(model, "_orig_mod"):
        raise BadModel("the model is compiled; shrink model._orig_mod and compile the result")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise BadModel("the model is wrapped for parallel training; shrink model.module and wrap the result")
    devices = set()
    for name, module in modules_of(model):
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is not None:
                    devices.add(tensor.device)
        if _quantised(type(module)):
            raise BadModel(f"{name or 'the model'} is quantised; shrink the floating-point model and quantise the result")
    if len(devices) > 1:
        raise BadModel(f"the model lies on several devices ({', '.join(sorted(map(str, devices)))}); move it to one")


def _quantised(kind: type) -> bool:
    return kind.__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized"))
