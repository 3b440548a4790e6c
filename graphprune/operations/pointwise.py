"""Operations that work entry by entry: torch marks most of them itself; here are the others, and what else is true of some.

>>> operation("aten::relu").flat()
(0.0, inf)
"""

from __future__ import annotations

import math

from .record import describe, operation

__all__ = ["operation"]

# Overloads of these lack torch's mark.
describe(*"copy where masked_fill lerp addcmul addcdiv clamp hardswish hardsigmoid hardtanh relu6 silu gelu leaky_relu elu".split(), pointwise=True)
describe("masked_fill", "masked_fill_", puts=True)
describe("copy", "copy_", overwrites=True)
describe(*"selu celu softplus mish prelu _prelu_kernel rsub nan_to_num bitwise_not logical_not erf log_sigmoid_forward".split(), pointwise=True)

describe("where", chooses=True)
describe(*"rrelu_with_noise complex polar floor_divide poisson normal binomial _standard_gamma".split(), pointwise=True)
describe("fake_quantize_per_tensor_affine_cachemask", pointwise=True)

for _name in ("add", "sub", "mul", "div"):
    describe(_name, arithmetic=_name)
describe("relu", "hardtanh", "add", "mul", "silu", "sigmoid", "clamp", "hardswish", fused=True)


def _bounds(low: float | None = None, high: float | None = None) -> tuple[float, float]:
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


# Between which two values an activation is not constant, from the arguments behind the input.
describe("relu", flat=lambda: (0.0, math.inf))
describe("relu6", flat=lambda: (0.0, 6.0))
describe("hardswish", flat=lambda: (-3.0, math.inf))
describe("hardsigmoid", flat=lambda: (-3.0, 3.0))
describe("hardtanh", flat=lambda low=-1.0, high=1.0: _bounds(low, high))
describe("clamp", flat=_bounds)
describe("clamp_min", flat=_bounds)
describe("clamp_max", flat=lambda high: _bounds(None, high))

describe(*"mul div add sub neg pow sqrt rsqrt reciprocal abs clamp clamp_min exp".split(), planned=True)

# What they make of zeros.
describe(*"add sub maximum minimum".split(), zero="all")
describe(*"div pow prelu _prelu_kernel leaky_relu elu celu".split(), zero="first")
describe(*"mul relu relu6 gelu silu tanh selu mish hardswish hardtanh abs neg sqrt sin erf expm1 log1p sign nan_to_num".split(), zero="one")
describe("rsqrt", "reciprocal", inverts=True)
