"""Sequences: packed into one axis for recurrent layers, which torch itself takes apart into products."""

from __future__ import annotations

from typing import Any

from .labels import Fields, Labels
from .notation import Value
from .record import assemble


@assemble("_pack_padded_sequence")
def pack(labels: Labels, reason: int, outs: list[Any], x: Value, lengths: Value, batch_first: bool = False) -> list[Fields]:
    """Sequences of several lengths one behind the other: time and batch become one axis, features stay what they are."""
    fields = []
    for field in x.fields:
        if max(field.shape[:2]) > 1:
            labels.lock(field, reason)
        else:
            fields.append(field.reshape(1, *field.shape[2:]))
    return [tuple(fields), ()]
