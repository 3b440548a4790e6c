"""What is locked on purpose: derivatives that a model takes of itself, and numbers that leave torch."""

from __future__ import annotations

from .record import describe

describe("_adaptive_avg_pool2d_backward", "avg_pool2d_backward", "convolution_backward", "embedding_dense_backward", "max_pool2d_with_indices_backward",
         "native_group_norm_backward", "native_layer_norm_backward", why="a gradient taken inside of the model")  # fmt: skip
describe("_local_scalar_dense", why="a number that leaves torch")
describe("_local_scalar_dense", "is_nonzero", "equal", looks=True)
describe("arange", enumerates=True)
describe("arange", "randperm", "scalar_tensor", why="numbers of its own, for so many positions")
