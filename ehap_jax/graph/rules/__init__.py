"""One rule per primitive, by family. Importing this package registers them all."""

from ehap_jax.graph.rules import contraction, control, elementwise, indexing, reduction, shape

__all__ = ["contraction", "control", "elementwise", "indexing", "reduction", "shape"]
