"""What is true of each operation, said once: its rule, what it moves, what it multiplies, the sizes that follow."""

from . import assembly, attention, factories, indexing, moves, norms, pointwise, pooling, products, recurrent, reductions, shapes, spectral
from .record import OPERATIONS, Operation, operation, resolve, rule

__all__ = ["OPERATIONS", "Operation", "operation", "resolve", "rule"]

FAMILIES = (assembly, attention, factories, indexing, moves, norms, pointwise, pooling, products, recurrent, reductions, shapes, spectral)
