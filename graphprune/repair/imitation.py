"""Gradient steps towards the original's outputs on calibration, without labels: what closed forms leave, at the price of minutes.

The parameters are trained by Adam (Kingma & Ba 2015) with a warm-up and a cosine to zero; batch norms keep their statistics and dropouts are
off, so that training and use compute the same. Calibration kept out decides: which of :data:`RATES` (after short runs), and after which pass to stop.
Outputs are class logits for "distill" (Hinton, Vinyals & Dean 2015; without labels Kimura et al. 2018), anything for "mimic".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from ..errors import BadCalibration, GraphpruneError
from ..tracing.fused import spelled_out
from ..tracing.probe import batch_inputs
from ..tracing.trees import replace as exchange
from ..tracing.trees import tensors
from .calibration import samples
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
    ours, theirs = (log_softmax(wide(logits) / temperature, dim=axis) for logits in (student, teacher))
    rows = kl_div(ours, theirs, reduction="none", log_target=True).sum(axis)
    return rows.mean() * temperature**2


def imitate(original: nn.Module, small: nn.Module, step: str, fits: Sequence[Any], checks: Sequence[Any], progress: bool = True) -> list[Repaired]:
    """Train ``small`` in place to answer like ``original``; taken back where it does not help on ``checks`` (or on the fits without any).

    ``step``: a name of :data:`DISTANCES`. Parameters that are frozen beside others that are not stay as they are. Gradients and flags are as before.
    The error after is the least of those after each pass, so a little better than on inputs that decided nothing.
    """
    learner = None
    try:
        with _plain(small):
            lessons = _Lessons(original, fits, DISTANCES[step])
            exams = _Lessons(original, checks or fits, DISTANCES[step], lessons.spreads)
            before = exams.error(small)
            if not math.isfinite(before):
                raise BadCalibration(f"{step!r} compares values that are not finite; look at the batches, and at outputs that are infinite on purpose")
            learner = _Learner(small)
            start, trials = learner.state(), {}
            for rate in RATES:
                trials[rate] = _best(exams, learner, learner.learn(lessons, rate, TRIAL, f"{step}, rate {rate:g}", progress))[0]
                learner.reset(start)
            rate = min(trials, key=trials.__getitem__)
            after, best = _best(exams, learner, learner.learn(lessons, rate, PASSES, step, progress))
            better = after <= before
            learner.reset(best if better else start)
    except GraphpruneError:
        raise
    except Exception as error:
        raise BadCalibration(f"{step!r} cannot train the model on this calibration: {type(error).__name__}: {error}") from error
    finally:
        if learner is not None:
            learner.close()
    return [Repaired(step, "outputs of the model", before, after, better)]


def teachable(original: nn.Module, step: str, sample: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Raises :class:`~graphprune.errors.BadCalibration` where the model's outputs are nothing that the step could compare."""
    answers = _answers(original, sample)
    if not answers:
        raise BadCalibration("the model returns no floating tensor to learn from")
    DISTANCES[step](answers, answers, [1.0] * len(answers))


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Autocast keeps no copies of weights, which are about to change."""
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        with spelled_out(model):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _best(exams: _Lessons, learner: _Learner, passes: Iterable[None]) -> tuple[float, list[Tensor]]:
    """The least error after any of the passes, and the weights that have it: with few inputs the first passes generalise, the later ones learn by heart."""
    best, state = math.inf, learner.state()
    for _ in passes:
        error = exams.error(learner.model)
        if error < best:
            best, state = error, learner.state()
    return best, state


# -- what is compared ------------------------------------------------------------------------------------------------------------


def _distilled(ours: list[Tensor], theirs: list[Tensor], _: list[float]) -> Tensor:
    """KL divergence of the first output; classes are the last of two or three axes, and the second of more, as ``cross_entropy`` has them for images."""
    logits = next(((one, two, 1 if two.ndim > 3 else -1) for one, two in zip(ours, theirs, strict=True) if two.ndim > 1), None)
    if logits is None or logits[1].shape[logits[2]] < 2:
        raise BadCalibration("'distill' compares the probabilities of classes, and the model has no output with an axis of two or more; take 'mimic'")
    return soften(logits[0], logits[1], 1.0, logits[2])


def _mimicked(ours: list[Tensor], theirs: list[Tensor], spreads: list[float]) -> Tensor:
    """Squared distance of every output that varies over its variance, mean over these outputs."""
    losses = [(wide(one) - wide(two)).square().mean() / spread for one, two, spread in zip(ours, theirs, spreads, strict=True) if spread > 0]
    if not losses:
        raise BadCalibration("'mimic' has nothing to learn from: no output of the model varies over the calibration")
    return torch.stack(losses).mean()


Distance = Callable[[list[Tensor], list[Tensor], list[float]], Tensor]
DISTANCES: dict[str, Distance] = {"distill": _distilled, "mimic": _mimicked}


def wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _answers(model: nn.Module, piece: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    return [tensor for tensor in tensors(model(*piece[0], **piece[1]), torch.Tensor) if tensor.is_floating_point()]


class _Lessons:
    """Inputs in pieces of a few samples, the original's outputs for them, and how much each output varies (given, or over these pieces)."""

    def __init__(self, original: nn.Module, batches: Sequence[Any], distance: Distance, spreads: list[float] | None = None) -> None:
        self.original, self.distance = original, distance
        whole = [exchange(batch_inputs(batch), _usable) for batch in batches]
        parted = _parted(original, whole[0])
        self.pieces = [piece for inputs in whole for piece in (_pieces(inputs) if parted else [inputs])]
        first = self._taught(0)
        if not first:
            raise BadCalibration("the model returns no floating tensor to learn from")
        room = sum(t.numel() * t.element_size() for t in first) * len(self.pieces) <= HELD
        self.kept = [first, *(self._taught(at) for at in range(1, len(self.pieces)))] if room else None
        self.spreads = spreads or self._spreads()

    def _taught(self, at: int) -> list[Tensor]:
        with torch.no_grad():
            return [tensor.clone() for tensor in _answers(self.original, self.pieces[at])]  # a model may return what it writes into again

    def theirs(self, at: int) -> list[Tensor]:
        return self.kept[at] if self.kept else self._taught(at)

    def _spreads(self) -> list[float]:
        """The variance of every output over all pieces; zero of a number alone, such as a loss, and of what is the same everywhere."""
        sums: list[list[float]] = []
        for at in range(len(self.pieces)):
            for index, tensor in enumerate(self.theirs(at)):
                sums += [[0.0, 0.0, 0.0]] if index == len(sums) else []
                if tensor.ndim:
                    values = tensor.double()
                    for place, amount in enumerate((values.numel(), float(values.sum()), float(values.square().sum()))):
                        sums[index][place] += amount
        moments = [(square / count, (total / count) ** 2) if count else (0.0, 0.0) for count, total, square in sums]
        return [square - mean if square - mean > 1e-9 * square else 0.0 for square, mean in moments]

    def loss(self, small: nn.Module, at: int) -> Tensor:
        ours, theirs = _answers(small, self.pieces[at]), self.theirs(at)
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise BadCalibration(
                f"outputs of the original have shapes {[tuple(t.shape) for t in theirs]}, of the cut model {[tuple(t.shape) for t in ours]}: "
                "there is nothing to compare one by one (a plan that narrows outputs, or a number of outputs that depends on their values)"
            )
        return self.distance(ours, theirs, self.spreads)

    def error(self, small: nn.Module) -> float:
        """Mean over the pieces; infinite where it is not a number."""
        with torch.no_grad():
            error = sum(float(self.loss(small, at)) for at in range(len(self.pieces))) / len(self.pieces)
        return error if math.isfinite(error) else math.inf


def _usable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor  # which no gradient may pass


def _pieces(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A batch in equal parts of at most :data:`SAMPLES`, where its tensors share a first length; otherwise as it is."""
    count = samples(inputs) or 1
    size = math.ceil(count / math.ceil(count / SAMPLES))
    return [exchange(inputs, partial(_part, at, size)) for at in range(0, count, size)] if count > SAMPLES else [inputs]


def _part(at: int, size: int, tensor: Tensor) -> Tensor:
    return tensor[at : at + size] if tensor.ndim else tensor


def _parted(original: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether a model says the same of the parts of a batch as of the whole: the first axis may be another than that of the samples."""
    pieces = _pieces(inputs)
    if len(pieces) == 1:
        return True
    try:
        with torch.no_grad():
            whole, parts = _answers(original, inputs), [_answers(original, piece) for piece in pieces]
            pairs = [(one, torch.cat(many)) for one, many in zip(whole, zip(*parts, strict=True), strict=True) if one.ndim]
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False
    return all(one.shape == two.shape and _near(wide(one), wide(two)) for one, two in pairs)


def _near(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).square().mean() <= 1e-3 * (one - one.mean()).square().mean() + 1e-12)


# -- who learns ------------------------------------------------------------------------------------------------------------------


class _Learner:
    """The floating parameters of a model; those of half precision learn through copies in float32, in which small steps are not lost."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        self.own = [parameter for parameter in floating if parameter.requires_grad] or floating  # of a model without gradients all learn
        self.scale = 1024.0 if any(parameter.dtype == torch.float16 for parameter in self.own) else 1.0  # small gradients vanish in float16
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
        with tqdm(total=total, desc=name, delay=5, leave=False, disable=None if progress else True) as bar:
            for done in range(passes):
                for number, at in enumerate(torch.randperm(count, generator=draw).tolist(), done * count):
                    optimizer.param_groups[0]["lr"] = rate * min(1.0, (number + 1) / (WARM * total)) * (1 + math.cos(math.pi * number / total)) / 2
                    if not self.step(optimizer, lessons, at):
                        return
                    bar.update()
                yield

    def step(self, optimizer: torch.optim.Optimizer, lessons: _Lessons, at: int) -> bool:
        """One step on one piece; whether the loss is finite. Nothing is changed where that or a gradient is not."""
        with torch.enable_grad():
            loss = lessons.loss(self.model, at) * self.scale
        if not loss.requires_grad:
            raise BadCalibration("the model's outputs carry no gradient (it runs under no_grad, or returns detached or rounded values): nothing can be learned")
        if not bool(torch.isfinite(loss)):
            return False
        loss.backward()
        for parameter, tensor in zip(self.own, self.wide, strict=True):
            grad, parameter.grad = parameter.grad, None
            tensor.grad = None if grad is None else (grad.to_dense() if grad.is_sparse else grad).to(tensor.dtype) / self.scale
        if not all(bool(torch.isfinite(tensor.grad).all()) for tensor in self.wide if tensor.grad is not None):
            return True
        optimizer.step()
        with torch.no_grad():
            self.write()
        return True
