"""More than one process, on PyTorch's own engine: the only file that knows ``torch.distributed``.

Where a process group has been made (``torchrun``, ``init_process_group``), every rank calls graphprune with its own share of the data. What the ranks
know is brought together, so all of them decide the same; a rank that fails tells the others, which then fail with its reason instead of waiting for it.
Without a process group nothing here does anything.

>>> size(), gathered("x"), first([1])
(1, ['x'], [1])
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .errors import RankFailed
from .tracing.trees import replace

Tensor = torch.Tensor
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
         "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
         "_forward_hooks_always_called")  # fmt: skip
ENGINE = "torch.distributed"
NOTES = ("__composable_api", "_fsdp", "_is_fsdp")  # what the engine writes into modules
# Whether this call of graphprune brings together what the ranks know.
_JOINED: ContextVar[bool] = ContextVar("joined", default=False)


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def joined() -> bool:
    """Whether what the ranks know is brought together now."""
    return _JOINED.get()


@contextmanager
def together(wanted: bool = True) -> Iterator[None]:
    """While active, ranks work together (where there are several, and it is ``wanted``); an error on one of them is an error on all.

    Raises :class:`~graphprune.errors.RankFailed` on those that did not fail themselves.
    """
    if size() == 1 or not wanted or joined():
        yield
        return
    token = _JOINED.set(True)
    try:
        yield
        _met(None, None)
    except RankFailed:
        raise
    except BaseException as error:
        try:
            _met(f"{type(error).__name__}: {error}", None)
        except RankFailed:
            pass  # what went wrong here is told better by the error itself
        raise
    finally:
        _JOINED.reset(token)


def gathered(item: Any) -> list[Any]:
    """What every rank has, in their order."""
    return _met(None, item) if joined() else [item]


def first(item: Any) -> Any:
    """What the first rank has."""
    return gathered(item if not joined() or dist.get_rank() == 0 else None)[0]


def shared(batches: Iterable) -> list[Any]:
    """The batches of all ranks, one of each in turn, so that what comes first does not all come from the first."""
    every = gathered([_home(batch) for batch in batches] if joined() else list(batches))
    longest = max(map(len, every), default=0)
    return [mine[at] for at in range(longest) for mine in every if at < len(mine)]


def summed(tensors: list[Tensor]) -> list[Tensor]:
    """The sums over all ranks; every rank gives tensors of the same shapes and types."""
    if not joined():
        return tensors
    shapes = gathered([tuple(tensor.shape) for tensor in tensors])
    if any(each != shapes[0] for each in shapes):
        raise RankFailed("the ranks add up tensors of different shapes: do all have the same model, and call the same?")
    away = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    totals = [tensor.to(away, copy=True) for tensor in tensors]
    for total in totals:
        _safely(lambda total=total: dist.all_reduce(total))
    return [total.to(tensor.device) for total, tensor in zip(totals, tensors, strict=True)]


def alike(model: nn.Module) -> None:
    """Raises :class:`~graphprune.errors.RankFailed` where the ranks do not have the same model, with the same weights."""
    told = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()) if joined() else ():
        told.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {0.0 if tensor.is_meta else float(tensor.detach().double().sum())}".encode())
    every = gathered(told.hexdigest())
    if any(each != every[0] for each in every):
        rank = next(rank for rank, each in enumerate(every) if each != every[0])
        raise RankFailed(f"rank {rank} has other weights than rank 0: load the same ones everywhere")


def whole(model: nn.Module) -> nn.Module:
    """The model with its tensors in one piece, where they are spread over ranks (FSDP2, tensor parallel); any other as it is.

    What is made is a plain model on every rank; the ranks call this together.
    """
    parts = _parts(model)
    memo: dict[int, Any] = {}
    for tensor in parts:
        full = tensor.full_tensor().detach()
        memo[id(tensor)] = nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full
    return _plain(model, memo) if parts else model


def spread(model: nn.Module) -> bool:
    """Whether tensors of a model lie on several ranks in parts."""
    return bool(_parts(model))


def _parts(model: nn.Module) -> list[Any]:
    """The tensors that lie on several ranks in parts (DTensor)."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    every = (tensor for module in model.modules() for held in (module._parameters, module._buffers) for tensor in held.values())
    return [tensor for tensor in every if tensor is not None and hasattr(tensor, "full_tensor")]


def _plain(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The same tree of modules, of the classes they had before the engine wrapped them, without its hooks."""
    for module in model.modules():
        twin = memo[id(module)] = object.__new__(_class(module))
        twin.__dict__.update({name: value for name, value in module.__dict__.items() if not name.startswith(NOTES)})
    for module in model.modules():
        state = memo[id(module)].__dict__
        state["_modules"] = {name: child if child is None else memo[id(child)] for name, child in module._modules.items()}
        for name in ("_parameters", "_buffers"):
            state[name] = {key: tensor if tensor is None else memo.get(id(tensor), tensor) for key, tensor in getattr(module, name).items()}
        for name in HOOKS:
            held = module.__dict__.get(name)
            if held:
                foreign = {key for hooks in (getattr(module, other, None) for other in HOOKS) if hooks for key, hook in hooks.items() if _of_engine(hook)}
                state[name] = OrderedDict((key, hook) for key, hook in held.items() if key not in foreign)
    return memo[id(model)]


def _class(module: nn.Module) -> type:
    """The class that a module had before it was wrapped (the wrapper is a class of its own, made of the engine's and the module's)."""
    kind = type(module)
    return next((base for base in kind.__mro__[1:] if not base.__module__.startswith(ENGINE) and not _wrapper(base)), kind) if _wrapper(kind) else kind


def _wrapper(kind: type) -> bool:
    return any(base.__module__.startswith(ENGINE) for base in kind.__bases__)


def _of_engine(hook: Any) -> bool:
    inner = getattr(hook, "__wrapped__", hook)
    owner = getattr(inner, "__self__", None)
    return (getattr(inner, "__module__", "") or "").startswith(ENGINE) or type(owner).__module__.startswith(ENGINE)


def _home(item: Any) -> Any:
    """A nest with its tensors where every rank can take them from."""
    return replace(item, lambda tensor: tensor.detach().cpu())


def _met(error: str | None, item: Any) -> list[Any]:
    """All ranks say whether they are well, and give what they have."""
    every: list[Any] = [None] * size()
    _safely(lambda: dist.all_gather_object(every, (error, item)))
    failed = [(rank, text) for rank, (text, _) in enumerate(every) if text is not None]
    if failed:
        raise RankFailed(f"rank {failed[0][0]} of {size()} failed, so all end: {failed[0][1]}")
    return [mine for _, mine in every]


def _safely(call: Any) -> None:
    try:
        call()
    except RuntimeError as error:  # a process is gone
        raise RankFailed(f"a rank cannot be reached, so all end: {str(error).splitlines()[0]}") from error
