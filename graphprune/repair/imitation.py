"""Gradient steps towards the original's outputs on calibration, without labels: what closed forms leave, at the price of minutes.

All floating parameters are trained by Adam (Kingma & Ba 2015) with a warm-up and a cosine to zero; batch norms keep their statistics and dropouts are
off, so that training and use compute the same. Calibration kept out decides: which of :data:`RATES` (after short runs), and after which pass to stop.
Outputs are class logits for "distill" (Hinton, Vinyals & Dean 2015; without labels Kimura et al. 2018), anything for "mimic".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from ..errors import BadCalibration
from ..tracing.probe import batch_inputs
from ..tracing.trees import replace as exchange
from ..tracing.trees import tensors
from .fitting import Repaired

Tensor = torch.Tensor
RATES = (4e-3, 1e-3, 2.5e-4)
PASSES, TRIAL, WARM = 24, 4, 0.1  # over the calibration: of the run that counts, and of those that try a rate; the share with a rising rate
SAMPLES = 32  # of a step at most
HELD = 2**30  # bytes of the original's outputs that are kept; more are computed anew in each pass


def soften(student: Tensor, teacher: Tensor, temperature: float = 4.0, axis: int = -1) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` along ``axis``, mean over all other axes (Hinton et al. 2015).

    >>> float(soften(torch.ones(2, 3), torch.ones(2, 3)))
    0.0
    """
    mine, theirs = (log_softmax(wide(logits) / temperature, dim=axis) for logits in (student, teacher))
    rows = kl_div(mine, theirs, reduction="none", log_target=True).sum(axis)
    return rows.mean() * temperature**2


def imitate(original: nn.Module, small: nn.Module, step: str, fits: Sequence[Any], checks: Sequence[Any], progress: bool = True) -> list[Repaired]:
    """Train ``small`` in place to answer like ``original``; taken back where it does not help on ``checks`` (or on the fits without any).

    ``step``: a name of :data:`DISTANCES`. The gradients of the parameters and their flags are as before.
    """
    lessons, exams = (_Lessons(original, batches, DISTANCES[step]) for batches in (fits, checks or fits))
    learner = _Learner(small)
    try:
        before, start = exams.error(small), learner.state()
        trials = {}
        for rate in RATES:
            trials[rate] = _best(exams, learner, learner.learn(lessons, rate, TRIAL, f"{step}, rate {rate:g}", progress))[0]
            learner.reset(start)
        rate = min(trials, key=trials.__getitem__)
        after, best = _best(exams, learner, learner.learn(lessons, rate, PASSES, step, progress))
        better = after <= before
        learner.reset(best if better else start)
    finally:
        learner.close()
    return [Repaired(step, "outputs of the model", before, after, better)]


def _best(exams: _Lessons, learner: _Learner, passes: Iterable[None]) -> tuple[float, list[Tensor]]:
    """The least error after any of the passes, and the weights that have it: with few inputs the first passes generalise, the later ones learn by heart."""
    best, state = math.inf, learner.state()
    for _ in passes:
        error = exams.error(learner.model)
        if error < best:
            best, state = error, learner.state()
    return best, state


# -- what is compared ------------------------------------------------------------------------------------------------------------


def _logits(outputs: list[Tensor]) -> Tensor:
    found = next((tensor for tensor in outputs if tensor.ndim > 1), None)
    if found is None:
        raise BadCalibration("'distill' compares class logits, and no output of the model has two or more axes; take 'mimic'")
    return found


def _distilled(mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """KL divergence of the first output; classes are the last of two or three axes, and the second of more, as ``cross_entropy`` has them for images."""
    student, teacher = _logits(mine), _logits(theirs)
    return soften(student, teacher, 1.0, axis=1 if student.ndim > 3 else -1)


def _mimicked(mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Squared distance of every output over its variance in the batch, mean over the outputs."""
    far = [
        (one - two).square().mean() / (two - two.mean()).square().mean().clamp(min=1e-12) for one, two in zip(map(wide, mine), map(wide, theirs), strict=True)
    ]
    return torch.stack(far).mean()


DISTANCES: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {"distill": _distilled, "mimic": _mimicked}


def wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _answers(model: nn.Module, piece: tuple[tuple, dict]) -> list[Tensor]:
    return [tensor for tensor in tensors(model(*piece[0], **piece[1]), torch.Tensor) if tensor.is_floating_point()]


class _Lessons:
    """Inputs in pieces of a few samples, and the original's outputs for them."""

    def __init__(self, original: nn.Module, batches: Sequence[Any], distance: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
        self.original, self.distance = original, distance
        self.pieces = [piece for batch in batches for piece in _pieces(batch_inputs(batch))]
        first = self._taught(0)
        if not first:
            raise BadCalibration("the model returns no floating tensor to learn from")
        room = sum(t.numel() * t.element_size() for t in first) * len(self.pieces) <= HELD
        self.kept = [first, *(self._taught(at) for at in range(1, len(self.pieces)))] if room else None

    def _taught(self, at: int) -> list[Tensor]:
        with torch.no_grad():
            return [tensor.clone() for tensor in _answers(self.original, self.pieces[at])]  # a model may return what it writes into again

    def loss(self, small: nn.Module, at: int) -> Tensor:
        mine, theirs = _answers(small, self.pieces[at]), self.kept[at] if self.kept else self._taught(at)
        if [t.shape for t in mine] != [t.shape for t in theirs]:
            raise BadCalibration(
                f"outputs of the original have shapes {[tuple(t.shape) for t in theirs]}, of the cut model {[tuple(t.shape) for t in mine]}: "
                "there is nothing to compare one by one (a plan that narrows outputs, or a number of outputs that depends on their values)"
            )
        return self.distance(mine, theirs)

    def error(self, small: nn.Module) -> float:
        """Mean over the pieces; infinite where it is not a number."""
        with torch.no_grad():
            found = sum(float(self.loss(small, at)) for at in range(len(self.pieces))) / len(self.pieces)
        return found if math.isfinite(found) else math.inf


def _pieces(inputs: tuple[tuple, dict]) -> list[tuple[tuple, dict]]:
    """A batch in parts of at most :data:`SAMPLES`, where its tensors share a first length; otherwise as it is."""
    sizes = {len(t) for t in tensors(inputs, torch.Tensor) if t.ndim}
    if len(sizes) != 1:
        return [inputs]
    count = sizes.pop()
    return [exchange(inputs, partial(_part, at)) for at in range(0, count, SAMPLES)]


def _part(at: int, tensor: Tensor) -> Tensor:
    return tensor[at : at + SAMPLES] if tensor.ndim else tensor


# -- who learns ------------------------------------------------------------------------------------------------------------------


class _Learner:
    """The floating parameters of a model; those of half precision learn through copies in float32, in which small steps are not lost."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        self.before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self.own]
        for parameter in self.own:
            parameter.requires_grad_(True)
            parameter.grad = None
        self.wide = [wide(parameter.detach()).clone() for parameter in self.own]

    def close(self) -> None:
        for parameter, flag, grad in self.before:
            parameter.requires_grad_(flag)
            parameter.grad = grad

    def state(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.wide]

    @torch.no_grad()
    def reset(self, state: list[Tensor]) -> None:
        for tensor, old in zip(self.wide, state, strict=True):
            tensor.copy_(old)
        self.write()

    def write(self) -> None:
        for parameter, tensor in zip(self.own, self.wide, strict=True):
            parameter.copy_(tensor)

    def learn(self, lessons: _Lessons, rate: float, passes: int, name: str, progress: bool) -> Iterator[None]:
        """Adam from the weights as they are, one pass at a time; ends early where the loss is no longer finite."""
        optimizer, draw = torch.optim.Adam(self.wide, rate), torch.Generator().manual_seed(0)
        count = len(lessons.pieces)
        total = passes * count
        with tqdm(total=total, desc=name, delay=5, leave=False, disable=not progress) as bar:
            for done in range(passes):
                for number, at in enumerate(torch.randperm(count, generator=draw).tolist(), done * count):
                    optimizer.param_groups[0]["lr"] = rate * min(1.0, (number + 1) / (WARM * total)) * (1 + math.cos(math.pi * number / total)) / 2
                    if not self.step(optimizer, lessons, at):
                        return
                    bar.update()
                yield

    def step(self, optimizer: torch.optim.Optimizer, lessons: _Lessons, at: int) -> bool:
        """One step on one piece; whether the loss is finite (where not, nothing is changed)."""
        with torch.enable_grad():
            loss = lessons.loss(self.model, at)
        if not loss.requires_grad:
            raise BadCalibration("the model's outputs carry no gradient (it runs under no_grad, or returns detached or rounded values): nothing can be learned")
        if not bool(torch.isfinite(loss)):
            return False
        loss.backward()
        for parameter, tensor in zip(self.own, self.wide, strict=True):
            tensor.grad = None if parameter.grad is None else parameter.grad.to(tensor.dtype)
            parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            self.write()
        return True
