"""One run of a model, as a graph: :func:`run` records its throw-away copy on every example, and in training mode where that matters.

What is recorded then settles which entries stay: those of the outputs, of picked positions, of tensors that no run reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..operations.labels import Labels, Reason
from ..operations.notation import Value
from ..wording import pattern
from .choices import mattering, settled
from .examples import Examples
from .features import marks
from .filled import LeftBehind
from .functions import Functions
from .graph import Graph, Rerun
from .members import LISTED, members
from .node import Node
from .outputs import OUTPUT, Item, handed_back, items, selected
from .paths import following
from .picks import settle
from .record import META, Recorder
from .shadow import shadow
from .sizes import Size
from .states import stated, states_of, unstated
from .statistics import hold_statistics
from .surroundings import undisturbed_surroundings
from .symbols import channels_of_bare_norms, plant
from .trees import is_parameter, leaf_tensors, modules_of
from .unused import forget, hold, more_run, reads_mode, train_run, unread
from .updates import hold_ranks


def run(
    model: nn.Module,
    asked: Examples,
    real: bool,
    amend: Any = None,
    results: list[Item] | None = None,
    training: bool = False,
    behind: LeftBehind | None = None,
) -> Graph:
    """One run, as a graph. ``amend`` is called with every call and its results with values; ``results`` receives what the model returned, ``behind`` what
    the run may leave behind."""
    twin, leaves = shadow(model, real)
    if training:
        twin.train()
    parameters = frozenset([name for tensor, name in leaves if is_parameter(tensor)])
    labels = Labels(apart=asked.apart)
    recorder = Recorder(labels, {id(tensor): name for tensor, name in leaves}, [], real)
    recorder.amend, recorder.caller = amend, _recorded.__code__
    modules = modules_of(twin)
    kernels = set(_kernels(modules))
    for tensor, name in leaves:
        recorder.leaf(tensor, name, 2 if id(tensor) in kernels else tensor.ndim)
    symbols = recorder.symbols = plant(modules, recorder.values, model, recorder.uses)
    try:
        runs = _recorded(recorder, model, twin, modules, asked, parameters, results)
    finally:
        if behind is not None:
            behind.note(recorder)
        recorder.release()
    calls = [*runs.calls, *channels_of_bare_norms(recorder.nodes, symbols)]
    forget(recorder, runs.outputs)
    numbered = settle(labels, recorder.picks, recorder.nodes + recorder.extra, recorder.leaves)
    idle = unread(recorder, recorder.nodes + recorder.extra)
    hold(recorder, idle)
    every = [recorder.nodes, *recorder.further]
    choices = mattering(labels, recorder.choices, recorder.leaves.values(), [*runs.outputs, *runs.others])
    mixtures = members(choices, every, [*runs.outputs, *runs.others], recorder.constants, labels.partition().parent, model) if choices else []
    choices, of_choice = settled(labels, choices, {id(choice): LISTED for each in mixtures for choice in each.choices})
    hold_statistics(labels, recorder.nodes + recorder.extra, of_choice, [*runs.outputs, *runs.others])
    hold_ranks(labels, recorder.nodes + recorder.extra, [value for name, value in recorder.leaves.items() if name in parameters])
    reason = labels.reason(Reason(OUTPUT))
    sizes = stated(model, symbols)
    tops = [path.partition(".")[0] for path, item in runs.chosen if isinstance(item, torch.Tensor)]
    for name, value in [*zip(tops, runs.outputs, strict=True), *(("", value) for value in runs.others)]:
        for entries in unstated(value, sizes) if name in runs.states else value.fields:
            labels.lock(entries, reason)
    uses = recorder.uses
    paths = [path for path, item in runs.chosen if isinstance(item, torch.Tensor)]
    learnt = parameters if parameters.intersection(recorder.leaves) else frozenset(recorder.leaves)
    return Graph(
        nodes=recorder.nodes,
        steps=runs.steps,
        leaves=recorder.leaves,
        labels=labels,
        inputs=runs.inputs,
        outputs=runs.outputs,
        calls=calls,
        floats=uses.floats,
        equals=uses.equals,
        outcomes=uses.outcomes,
        doubts=uses.doubts,
        symbols=symbols,
        example=asked.example,
        constants=recorder.constants,
        filled=recorder.filled,
        real=real,
        parameters=parameters,
        unread=idle,
        picks=numbered,
        choices=choices,
        mixtures=mixtures,
        marks=marks(recorder.nodes + recorder.extra, runs.all_steps, recorder.leaves, learnt).with_made(labels.copied).with_crossed(labels),
        paths=paths,
        given=recorder.given,
        numbers=len(runs.chosen) > len(paths),
        asked=asked,
        state=runs.state,
        states=runs.states,
        looked=list(dict.fromkeys(recorder.looked)),
        trained=runs.trained and not recorder.stopped,
        training=runs.training,
        reruns=runs.reruns,
        random_in_training=any(node.op.draws for node in (*recorder.nodes, *recorder.extra)),
    )


TURNS = 16  # so many further runs show how experts are called that single numbers are compared with


@dataclass
class _Runs:
    """What the runs of one trace leave beside what their recorder holds."""

    inputs: list[Value]
    chosen: list[Item]  # what counts of what the first run returned
    outputs: list[Value]
    state: frozenset[str]  # the paths of results that are the model's own state, handed back
    states: frozenset[str]  # parts of the result whose width follows what is cut
    steps: list[Any]  # the functions that the first run called
    all_steps: list[Any]  # those of the others too
    calls: list[Any]
    others: list[Value]  # what further examples, and the run in training mode, returned
    trained: bool  # whether there was a run in training mode
    training: list[Node]
    reruns: list[Rerun]


def _recorded(
    recorder: Recorder,
    model: nn.Module,
    twin: nn.Module,
    modules: list[tuple[str, nn.Module]],
    asked: Examples,
    parameters: frozenset[str],
    results: list[Item] | None,
) -> _Runs:
    """Run the twin of a model on every example, and in training mode where that matters, with the recorder watching."""
    home = {tensor.device for *_, tensor in leaf_tensors(model)}
    swap = lambda t: t.detach().clone() if recorder.real or not t.is_floating_point() else t.detach().to(META)  # noqa: E731
    first, *more = asked.called(twin, swap)
    inputs, call = entered(recorder, first[0]), first[1]
    calls: list[Any] = []
    with ExitStack() as scopes:
        scopes.callback(recorder.uses.forgotten)
        away = any(device.type not in ("cpu", "meta") for device in home)  # what is on the meta device is taken for what it is with values, on the processor
        functions = Functions(recorder, calls, away, not away)
        for scope in (torch.no_grad(), undisturbed_surroundings(model), following(modules, recorder.stack, recorder.entered), recorder, functions):
            scopes.enter_context(scope)
        result = call()
        state, states, chosen = _results(recorder, model, result, asked)
        outputs = [recorder.value(item) for _, item in chosen if isinstance(item, torch.Tensor)]
        if results is not None:
            results += [(path, item.clone() if isinstance(item, torch.Tensor) else item) for path, item in chosen]
        steps, others, training = list(functions.steps), [], []
        reruns: list[Rerun] = []
        recorder.amend = None
        for which, (tensors_of, other) in enumerate(more):
            values = entered(recorder, tensors_of)
            made = more_run(recorder, other, asked.outputs, state | states)
            reruns.append(_rerun(recorder, values, made, which))
            others += made
        while recorder.real and _more_turns(recorder):
            recorder.turned += 1
            with _disable_current_modes():
                again, call = next(asked.called(twin, swap))
            entered(recorder, again)
            others += more_run(recorder, call, asked.outputs, state | states)
        recorder.turned = 0
        trained = reads_mode(modules) or bool(parameters.intersection(unread(recorder, recorder.nodes + recorder.extra)))
        if trained:
            twin.train()
            with _disable_current_modes():
                again, call = next(asked.called(twin, swap))
            values = entered(recorder, again)
            made = train_run(recorder, call, asked.outputs, state | states)
            others += made
            if not recorder.stopped:
                training = recorder.further[-1]
                reruns.append(_rerun(recorder, values, made, -1))
    return _Runs(inputs, chosen, outputs, state, states, steps, functions.steps, calls, others, trained, training, reruns)


def _rerun(recorder: Recorder, inputs: list[Value], outputs: list[Value], which: int) -> Rerun:
    """The run that was recorded last."""
    nodes = recorder.further[-1]
    return Rerun(nodes, len(recorder.nodes) + len(recorder.extra) - len(nodes), inputs, outputs, which)


def _more_turns(recorder: Recorder) -> bool:
    """Whether further runs may show more of what is chosen: experts that were not called yet, or not for every place of what was chosen."""
    choices = [each for each in recorder.choices if each.matters]
    sizes = [each.labels.size for each in choices]
    if not sizes or recorder.turned >= max(sizes) - 1:
        return False
    if recorder.turned < TURNS and any(each.compared or each.addressed for each in choices):
        return True
    missed = set(unread(recorder, recorder.nodes + recorder.extra))
    known = {pattern(name) for name in recorder.leaves if name not in missed}
    return any(pattern(name) in known for name in missed)


def _results(recorder: Recorder, model: nn.Module, result: Any, asked: Examples) -> tuple[frozenset[str], frozenset[str], list[Item]]:
    """The paths of the model's own state in what it returned, those of states that follow its configuration, and what counts as an output."""
    state = frozenset() if callable(asked.example) else handed_back(model, result, *asked.example)
    chosen = selected([item for item in items(result) if item[0].partition(".")[0] not in state], asked.outputs)
    recorder.uses.floats.extend([number.expr for _, number in chosen if type(number) is Size])
    if asked.outputs is not None or callable(asked.example):
        return state, frozenset(), chosen
    outputs = [recorder.value(item) for _, item in chosen if isinstance(item, torch.Tensor)]
    return state, states_of(model, result, chosen, outputs, recorder.nodes, asked.example), chosen


def entered(recorder: Recorder, inputs: list[torch.Tensor]) -> list[Value]:
    """The values of the tensors that a model is given; a run with them begins."""
    values, recorder.rest = [], torch.get_rng_state()
    for tensor in inputs:
        value = Value(tuple(tensor.shape), leaf=f"<input {len(values)}>")
        recorder.keep(tensor, value)
        values.append(value)
    return values


def _kernels(modules: list[tuple[str, nn.Module]]) -> Iterator[int]:
    """The ids of the kernels of convolutions: their taps stay, whatever a weight is made of on the way (a norm of the flattened kernel)."""
    for _, module in modules:
        if isinstance(module, nn.modules.conv._ConvNd):
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.ndim == 2 + len(module.kernel_size) and tuple(tensor.shape[2:]) == tuple(module.kernel_size):
                    yield id(tensor)
