"""A short name for the architecture of a network: its variables, and what lives and dies together in them."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from ehap_jax.graph.channels import channel_structure
from ehap_jax.graph.trace import Graph


def architecture_fingerprint(graph: Graph) -> str:
    """16 hexadecimal digits that are the same for every checkpoint, dtype, batch size and mode of an architecture.

    A hash of the paths and shapes of all variables, of which axes are kernels' outputs, and of which indices go
    together under group coupling.

    >>> import jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> w = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> graph = trace_graph(lambda w, x: x @ w["a"] @ w["b"])(w, jnp.ones((1, 3)))
    >>> architecture_fingerprint(graph)
    '654e3610759de63c'
    """
    structure = channel_structure(graph)
    classes, prunable = structure.solution.classes, structure.solution.produced_classes()
    digest = hashlib.sha256()
    shapes = {path: list(value.shape) for path, value in sorted(graph.leaves.items())}
    digest.update(json.dumps([shapes, dict(sorted(structure.kernel_axes.items()))]).encode())
    leaves = sorted(structure.solution.structure.leaves, key=lambda leaf: (leaf.path, leaf.axis))
    found = np.concatenate([classes[leaf.start : leaf.start + leaf.size] for leaf in leaves] or [np.zeros(0, int)])
    found = np.where(np.isin(found, prunable), found, -1)
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    digest.update(first[inverse].astype("<i8").tobytes())  # named by where a class first appears
    return digest.hexdigest()[:16]
