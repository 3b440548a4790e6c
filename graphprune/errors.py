# pyright: strict, reportPrivateUsage=false
"""Every error graphprune raises: what is wrong, where, and what to do now; and its warnings.

All derive from :class:`GraphpruneError`, so one ``except`` is enough.

>>> issubclass(BadRatio, GraphpruneError) and issubclass(BadRatio, ValueError)
True
"""

import sys
import warnings


class GraphpruneError(Exception):
    """Base of all errors of this package."""


class BadRatio(GraphpruneError, ValueError):
    """A ratio (or another number that selects) is outside its range: ``shrink(m, x, ratio=1.0)``; use 0 <= ratio < 1."""


class BadTarget(BadRatio):
    """A target cannot be met or makes no sense: ``shrink(m, x, params=-1)``; the message says the smallest reachable value."""


class BadAmount(BadTarget):
    """A text says no amount: ``shrink(m, x, macs="0.5x")``; the message says how one is written."""


class BadOption(GraphpruneError, ValueError):
    """An argument makes no sense, contradicts another, or would have no effect: ``shrink(m, x, verify="no")``; the message says what to write."""


class UnknownOption(BadOption, TypeError):
    """An argument that the function does not have: ``shrink(m, x, pruning_ratio=0.5)``; the message says which one does it here."""


class BadMeasure(GraphpruneError, ValueError):
    """Times cannot be taken: the runtime is missing, or ``measure=`` returns nonsense or scatters too much."""


class BadInput(GraphpruneError, ValueError):
    """The example input does not fit the model, or the model raised on it; the original error is the cause."""


class BadModel(GraphpruneError, TypeError):
    """The model cannot be pruned as it stands: scripted, quantised, compiled, wrapped, or on several devices."""


class UnknownName(GraphpruneError, KeyError):
    """A name in ``keep=`` or an override fits nothing in the model; the message says the nearest names."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NothingToPrune(GraphpruneError):
    """No axis of the model can be removed; the message says what holds the largest ones."""


class NotEqual(GraphpruneError):
    """The self-check failed: the cut model does not compute what the zeroed original computes. Nothing is returned."""


class BadPlan(GraphpruneError, ValueError):
    """A plan does not belong to this model, or its file is damaged."""


class BadFile(BadPlan, OSError):
    """A saved folder is not there, cannot be written, is damaged, or holds other tensors than the model has: ``load("empty/", base)``."""

    @classmethod
    def of(cls, cause: OSError, text: str) -> "BadFile":
        """The error for what the system said, with its number (a full disk is ``errno.ENOSPC``)."""
        error = cls(text)
        error.errno = cause.errno
        return error


class BadConfig(GraphpruneError, ValueError):
    """No configuration of the model's class describes what is left of it: ``small.save_pretrained(folder)`` would write what does not load again."""


class BadOptimizer(GraphpruneError, ValueError):
    """An optimizer does not belong to the model, or holds state that no plan can cut: ``refresh_optimizer(other, plan, small)``."""


class BadLoop(GraphpruneError, ValueError):
    """``iterate`` cannot go on: ``train`` or ``evaluate`` fails, a floor nothing can reach, a checkpoint of another run."""


class BadRule(GraphpruneError, ValueError):
    """A rule's text does not fit its operation."""


class NeedsBatches(GraphpruneError, ValueError):
    """A score needs data and got none, or fewer than one batch: ``score(groups, model, "apoz", batches=loader)``."""


class BadLoss(GraphpruneError, ValueError):
    """The loss is missing, is not one number, is not finite, or does not depend on the model's parameters."""


class BadScore(GraphpruneError, ValueError):
    """A score has the wrong shape or is not finite, or a group lacks what the score measures; the message says where."""


class BadCalibration(GraphpruneError, ValueError):
    """Calibration batches do not fit the model, are too few, constant or not finite: the message says where in the model it shows."""


class RankFailed(GraphpruneError, RuntimeError):
    """Another process of a distributed run failed, or is gone: the message says which and why; nothing was written."""


class NeedsValues(GraphpruneError):
    """Internal: control flow asked for a value that a run without values cannot give; trace with real values."""


class LessThanAsked(UserWarning):
    """Nothing, or far less, was cut than was asked for; the message says why. ``warnings.simplefilter("ignore", graphprune.errors.LessThanAsked)``."""


def no_module(model: object, what: str = "the model") -> str:
    """What is wrong with something that is no module where one is needed.

    >>> no_module(3), no_module(int)
    ('the model is a int; an nn.Module is needed', 'the model is the class int; give an instance of it: int(...)')
    """
    if isinstance(model, type):
        return f"{what} is the class {model.__name__}; give an instance of it: {model.__name__}(...)"
    return f"{what} is a {type(model).__name__}; an nn.Module is needed"


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the caller's own line, however deep inside the package it is found."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("graphprune", "torch", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
