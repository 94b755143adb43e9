"""One rule per primitive, by family. Importing this package registers them all."""

from ehap_jax.graph.rules import collective, contraction, control, elementwise, indexing, reduction, shape

__all__ = ["collective", "contraction", "control", "elementwise", "indexing", "reduction", "shape"]
