"""Which module is running: :func:`following` keeps a stack of paths while the modules of a throw-away copy run.

Only that copy is touched: its modules get a ``forward`` of their own for the time, or, where they have hooks whose work is theirs too, hooks around these.

>>> net, stack = nn.Sequential(nn.Linear(2, 2)), []
>>> with following([("", net), ("0", net[0])], stack):
...     _ = net[0].register_forward_hook(lambda *_: print(stack))
...     _ = net(torch.zeros(1, 2))
['']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["following", "torch"]
Entered = Callable[[str, Any, Any], None]  # the path of a module, and the arguments that it is called with


def _nobody(path: str, args: Any, kwargs: Any) -> None:
    """Who is told nothing."""


@contextmanager
def following(modules: list[tuple[str, nn.Module]], stack: list[str], entered: Entered = _nobody) -> Iterator[None]:
    """Keep ``stack`` at the paths of the modules that are running, the outermost first; ``entered`` is told what each is called with."""
    hooks, before = [], []
    for path, module in modules:
        attributes = module.__dict__
        if attributes.get("_forward_pre_hooks") or attributes.get("_forward_hooks"):
            hooks.append(module.register_forward_pre_hook(_push(stack, path, entered), prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(_pop(stack), always_call=True))
        else:
            before.append((attributes, attributes.get("forward")))
            attributes["forward"] = MethodType(_noted(stack, path, module.forward, entered), module)
    try:
        yield
    finally:
        for attributes, forward in before:
            if forward is None:
                del attributes["forward"]
            else:
                attributes["forward"] = forward
        for hook in hooks:
            hook.remove()


def _noted(stack: list[str], path: str, forward: Callable[..., Any], entered: Entered) -> Callable[..., Any]:
    def noted(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stack.append(path)
        try:
            entered(path, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            stack.pop()

    noted.__wrapped__ = getattr(forward, "__func__", forward)  # its signature is the module's own
    noted.followed = lambda other: _noted(stack, path, other, entered)
    return noted


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward for a while, followed as its own is."""
    own = module.__dict__
    before = own.get("forward")
    followed = getattr(before, "followed", None)
    own["forward"] = forward if followed is None else MethodType(followed(forward), module)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _push(stack: list[str], path: str, entered: Entered) -> Callable[..., None]:
    def push(_: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(path)
        entered(path, args, kwargs)

    return push


def _pop(stack: list[str]) -> Callable[..., None]:
    def pop(*_: Any) -> None:  # what a hook returns would take the place of the result
        if stack:
            stack.pop()

    return pop
