"""Learning from the original: :class:`Distillation` is a loss to add to one's own.

Outputs are compared by their softened probabilities (Hinton, Vinyals & Dean 2015). Inner features are compared where the
cut groups are read (hints, Romero et al. 2015): the student's channels are the surviving ones of the teacher, so no
regressor has to be learned between the two.

>>> from ..shrink import shrink
>>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
>>> student, plan = shrink(teacher, torch.zeros(1, 4), ratio=0.5, return_plan=True)
>>> x = torch.randn(5, 4)
>>> with Distillation(teacher, student, plan, torch.zeros(1, 4), features=1.0) as distill:
...     loss = distill(x, student(x))
>>> loss.requires_grad, loss.ndim
(True, 0)
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..coupling.groups import couple
from ..coupling.links import links
from ..cutting.plan import Plan, plan_of
from ..cutting.zeroed import Masks
from ..errors import BadInput, BadPlan
from ..operations.notation import Value
from ..repair.imitation import soften, wide
from ..tracing.probe import watch
from ..tracing.trace import trace
from ..tracing.trees import normal_inputs, tensors


class Distillation:
    """A loss between the original and a cut model: ``loss = criterion(outputs, labels) + distill(inputs, outputs)``.

    ``plan`` is relative to ``teacher``; ``example_input`` is what :func:`graphprune.shrink` was given. ``temperature``
    softens the outputs, ``axis`` is that of the classes, ``logits`` weighs this part. ``features`` weighs the relative
    squared error of the inner features (mean over the cut groups, at the last place that reads each); the student has
    to run inside ``with distill:`` then. ``inputs`` is a tensor, a tuple (positional) or a dict (keyword), ``outputs``
    what the student returned for them: a tensor or a nest, whose first floating tensor of two or more axes counts.
    The teacher runs in eval mode without gradients and is left as it is.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        plan: Plan | None = None,
        example_input: Any = None,
        *,
        temperature: float = 4.0,
        logits: float = 1.0,
        features: float = 0.0,
        axis: int = -1,
        example_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.temperature, self.logits, self.features, self.axis = temperature, logits, features, axis
        self.points: dict[int, tuple[Value, dict[int, torch.Tensor]]] = {}
        self.seen: dict[int, torch.Tensor] = {}
        self.active: ExitStack | None = None
        if not features:
            return
        known = plan or plan_of(student)
        if known is None or example_input is None:
            raise BadPlan("features need the plan of the cut, relative to the teacher, and the example input")
        args, kwargs = normal_inputs(example_input, example_kwargs)
        self.graph = trace(teacher, args, kwargs)
        self.points = _points(self.graph, known)

    def __enter__(self) -> Distillation:
        self.active = ExitStack()
        if self.features:
            self.active.enter_context(watch(self.student, self.graph, self._values(), self._see))
        return self

    def __exit__(self, *_: Any) -> None:
        if self.active is not None:
            self.active.close()
        self.active = None
        self.seen.clear()

    def __call__(self, inputs: Any, outputs: Any) -> torch.Tensor:
        """The loss of one batch, a tensor without axes."""
        activations, self.seen = self.seen, {}
        if self.features and not activations:
            raise BadInput("the student's features were not seen: run the student inside `with distill:`, once before each call of the loss")
        answers, theirs = self._teach(inputs)
        total = self.logits * soften(_logits(outputs), _logits(answers), self.temperature, self.axis)
        if not self.features:
            return total
        gaps = [_gap(activations[key], theirs[key], kept) for key, (_, kept) in self.points.items()]
        return total + self.features * torch.stack(gaps).mean()

    def _teach(self, inputs: Any) -> tuple[Any, dict[int, torch.Tensor]]:
        args, kwargs = normal_inputs(inputs, None)
        modes = [(module, module.training) for module in self.teacher.modules()]
        try:
            with ExitStack() as scopes:
                scopes.enter_context(torch.no_grad())
                if self.features:
                    scopes.enter_context(watch(self.teacher, self.graph, self._values(), self._see))
                answers = self.teacher.eval()(*args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode
        theirs, self.seen = self.seen, {}
        return answers, theirs

    def _values(self) -> list[Value]:
        return [value for value, _ in self.points.values()]

    def _see(self, value: Value, tensor: torch.Tensor) -> None:
        self.seen[id(value)] = tensor


def _points(graph: Any, plan: Plan) -> dict[int, tuple[Value, dict[int, torch.Tensor]]]:
    """For every group that is cut, the last activation that is read, and which of its positions survive."""
    masks = Masks(graph, plan)
    points: dict[int, tuple[Value, dict[int, torch.Tensor]]] = {}
    for members in links(couple(graph)):
        read = [link for link in members if link.role == "consumes" and link.value is not None]
        if read:
            value = read[-1].value
            kept = masks.kept(value) if value is not None else {}
            if kept and value is not None:
                points[id(value)] = (value, kept)
    if not points:
        raise BadPlan("the plan cuts nothing whose activation the model's own code holds; use features=0")
    return points


def _logits(outputs: Any) -> torch.Tensor:
    for tensor in tensors(outputs, torch.Tensor):
        if tensor.is_floating_point() and tensor.ndim > 1:
            return tensor
    raise BadInput("no floating tensor of two or more axes among the outputs; pass the logits themselves")


def _gap(student: torch.Tensor, theirs: torch.Tensor, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    """The squared distance to the teacher's surviving channels, relative to their own square."""
    for dim, positions in kept.items():
        theirs = theirs.index_select(dim, positions.to(theirs.device))
    if student.shape != theirs.shape:
        raise BadPlan(f"the student's features have shape {tuple(student.shape)}, the plan leaves {tuple(theirs.shape)} of the teacher's")
    student, theirs = wide(student), wide(theirs)
    return (student - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)
