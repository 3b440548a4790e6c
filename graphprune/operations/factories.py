"""Tensors made out of nothing but sizes: uniform along every axis, so that they can be cut wherever they meet what is cut."""

from __future__ import annotations

from typing import Any

from .assembly import free
from .labels import Fields, Labels
from .record import assemble, describe


@assemble("zeros", "ones", "full", "empty", "rand", "randn", factory=True)
@assemble("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", makes=True)
@assemble("empty_permuted", "empty_strided")
def factory(labels: Labels, reason: int, outs: list[Any], *args, **kwargs) -> list[Fields]:
    return [free(labels, outs[0], range(len(outs[0])))]


describe("empty", "new_empty", unmade=True)
describe("zeros", "new_zeros", "zeros_like", filled=0)
describe("ones", "new_ones", "ones_like", filled=1)
describe("full", "new_full", "full_like", filled="fill_value")
describe("scalar_tensor", filled="s")
describe("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", shape_only=True)
describe("empty", "new_empty", "empty_like", "new_empty_strided", "empty_permuted", "empty_strided", unset=True)
