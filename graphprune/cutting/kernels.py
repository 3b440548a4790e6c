"""Convolutions with fewer taps: the same computation as the masked original, with the masked taps gone.

:func:`narrow` keeps whole rows and columns of a kernel: a smaller stock convolution, whose padding says where the kernel
now sits. :func:`thin` keeps any (channel, tap) pairs, the same for every filter: the pairs are gathered and multiplied,
an im2col product with fewer columns (Lebedev & Lempitsky, "Fast ConvNets using group-wise brain damage", 2016).

>>> conv = nn.Conv2d(2, 2, 3, padding=1)
>>> narrow(conv, ((1,), (0, 1, 2)))
>>> conv.kernel_size, conv.padding
((1, 3), (0, 1))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BadPlan
from .parts import Part, narrowed, unpack

Pads = tuple[tuple[int, int], ...]
Conv = nn.modules.conv._ConvNd
CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Shifted(Conv):
    """A convolution whose padding differs before and after: ``pads`` holds both per axis; a negative one crops."""

    pads: Pads

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        input = F.pad(input, [n for pair in reversed(self.pads) for n in pair])
        return CONVOLVE[weight.ndim](input, weight, bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pads={self.pads}"


class Shifted1d(Shifted, nn.Conv1d):
    pass


class Shifted2d(Shifted, nn.Conv2d):
    pass


class Shifted3d(Shifted, nn.Conv3d):
    pass


SHIFTED = {nn.Conv1d: Shifted1d, nn.Conv2d: Shifted2d, nn.Conv3d: Shifted3d}


def plain(module: nn.Module) -> bool:
    """Is this one of torch's own convolutions (or one of ours), whose forward is known?"""
    return type(module) in (*SHIFTED, *SHIFTED.values())


def pads_of(conv: Conv) -> Pads:
    """Zeros before and after along each axis of the input (of what ``padding_mode`` has padded, if it is another)."""
    if isinstance(conv, Shifted):
        return conv.pads
    if conv.padding_mode != "zeros":
        return ((0, 0),) * len(conv.kernel_size)
    flat = conv._reversed_padding_repeated_twice
    return tuple((flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2))


def steps(kept: Sequence[int]) -> int | None:
    """The distance between kept taps when it is the same everywhere, else None: only then a convolution has them.

    >>> steps((0, 2)), steps((1,)), steps((0, 1, 3))
    (2, 1, None)
    """
    gaps = {b - a for a, b in zip(kept, kept[1:], strict=False)}
    return gaps.pop() if len(gaps) == 1 else None if gaps else 1


def narrow(conv: Conv, kept: Sequence[Sequence[int]]) -> None:
    """Change a convolution, in place, to the kernel of the kept taps along each axis; its weight is cut already, or here."""
    pads, dilation = [], []
    for taps, size, old, (before, after) in zip(kept, conv.kernel_size, conv.dilation, pads_of(conv), strict=True):
        pads.append((before - taps[0] * old, after - (size - 1 - taps[-1]) * old))
        step = steps(taps)
        if step is None:
            raise BadPlan(f"the taps {tuple(taps)} of a kernel are not evenly spaced: no convolution has them")
        dilation.append(old * step)
    if tuple(conv.weight.shape[2:]) == tuple(conv.kernel_size):
        weight: torch.Tensor = conv.weight.detach()
        for axis, taps in enumerate(kept, start=2):
            weight = weight.index_select(axis, torch.tensor(taps, device=weight.device))
        last = weight.ndim == 4 and conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
        weight = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        _put(conv.weight, weight)
    conv.kernel_size, conv.dilation = tuple(len(taps) for taps in kept), tuple(dilation)
    if type(conv) in SHIFTED and conv.padding_mode == "zeros" and all(a == b >= 0 for a, b in pads):
        conv.padding = tuple(before for before, _ in pads)
        conv._reversed_padding_repeated_twice = [n for pair in reversed(pads) for n in pair]
        return
    conv.pads = tuple(pads)  # pyright: ignore[reportArgumentType]
    # The object stays: hooks, names and whoever else holds this module go on; only its forward is another.
    conv.__class__ = SHIFTED.get(type(conv), type(conv))


def _put(weight: torch.Tensor, data: torch.Tensor) -> None:
    """The parameter stays the same object, so whoever holds it (an optimizer) holds the smaller one."""
    weight.grad = None
    weight.data = data


class Thin(nn.Module):
    """A 2-d convolution as gather and matrix product over the (channel, tap) pairs that stay.

    ``weight`` is (filters, pairs), tap by tap; ``taps`` lists (row, column), and the buffer ``channels<i>`` the channels read at the i-th,
    where they are not all.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    taps: tuple[tuple[int, int], ...]
    pads: Pads
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        lone = input.ndim == 3
        x = self.padded(input[None] if lone else input)
        high, wide = ((n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], self.dilation, self.kernel_size, self.stride, strict=True))
        parts = []
        for at, (row, column) in enumerate(self.taps):
            index = self._buffers.get(f"channels{at}")
            top, left = row * self.dilation[0], column * self.dilation[1]
            seen = x[:, :, top : top + (high - 1) * self.stride[0] + 1 : self.stride[0], left : left + (wide - 1) * self.stride[1] + 1 : self.stride[1]]
            parts.append(seen if index is None else seen.index_select(1, index))
        columns = torch.cat(parts, 1).flatten(2)
        out = torch.matmul(self.weight, columns)
        out = out if self.bias is None else out + self.bias[:, None]
        out = out.unflatten(2, (high, wide))
        return out[0] if lone else out

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        flat = [n for pair in reversed(self.pads) for n in pair]
        return F.pad(x, flat) if any(flat) else x

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} filters of {self.weight.shape[1]} columns, kernel_size={self.kernel_size}, stride={self.stride}"


def columns_of(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The (filters, pairs) of a kernel (filters, channels, height, width), tap by tap."""
    return weight.permute(0, 2, 3, 1)[:, columns.permute(1, 2, 0).to(weight.device)]


def thin(conv: Conv, columns: torch.Tensor) -> None:
    """Change a 2-d convolution (groups=1), in place, to the product over ``columns``: boolean, (channels, height, width)."""
    order = columns.permute(1, 2, 0)  # tap by tap
    taps = order.any(-1).nonzero().tolist()
    flat = columns_of(conv.weight.detach(), columns)
    vars(conv).update(pads=pads_of(conv), taps=tuple(map(tuple, taps)))
    _put(conv.weight, flat.contiguous())
    for at, (row, column) in enumerate(taps):
        if not order[row, column].all():
            conv.register_buffer(f"channels{at}", order[row, column].nonzero().ravel().to(flat.device), persistent=False)
    conv.__class__ = Thin  # pyright: ignore[reportAttributeAccessIssue]


def check_kernel(model: nn.Module, part: Part, shape: tuple[int, ...]) -> None:
    """Is there a convolution for a plan's ``kernel`` or ``columns`` part?"""
    path = part.name.rpartition(".")[0]
    try:
        conv = model.get_submodule(path)
    except AttributeError as error:
        raise BadPlan(f"the plan changes the kernel of {path}, which this model does not have") from error
    if not isinstance(conv, Conv) or not plain(conv) or tuple(conv.weight.shape) != tuple(shape):
        raise BadPlan(f"the plan needs a convolution {path} with a weight of shape {tuple(shape)}; this model's is {type(conv).__name__}")
    if part.kind == "columns" and (len(shape) != 4 or conv.groups != 1):
        raise BadPlan(f"the plan keeps columns of {path}, which is no 2-d convolution with one group")


def apply_kernel(model: nn.Module, part: Part, shape: tuple[int, ...], cuts: Mapping[int, Sequence[int]]) -> None:
    """Do what a plan's ``kernel`` or ``columns`` part says, to a convolution whose weight of ``shape`` is cut already."""
    conv = model.get_submodule(part.name.rpartition(".")[0])
    assert isinstance(conv, Conv)  # the check has seen it
    if part.kind == "kernel":
        narrow(conv, part.data)
    else:
        thin(conv, narrowed(unpack(part.data, shape[1:]), {axis - 1: kept for axis, kept in cuts.items() if axis}))
