"""What is true of each operation, said once: its rule, what it moves, what it multiplies, the sizes that follow."""

from . import (
    assembly,
    attention,
    factories,
    gates,
    gradients,
    indexing,
    losses,
    matrices,
    moves,
    norms,
    pointwise,
    pooling,
    positions,
    products,
    quantising,
    recurrent,
    reductions,
    shapes,
    spectral,
)
from .record import OPERATIONS, Operation, operation, resolve, rule

__all__ = ["FAMILIES", "OPERATIONS", "Operation", "operation", "resolve", "rule"]

# Where operations are described; importing a family is what makes them known.
FAMILIES = (assembly, attention, factories, gates, gradients, indexing, losses, matrices, moves, norms)
FAMILIES += (pointwise, pooling, positions, products, quantising, recurrent, reductions, shapes, spectral)
