"""Where a computation leaves the range of its precision: which layer to look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax import _compat
from ehap_jax.curvature.devices import EXAMPLES, SAME, on_devices, sum_over_data
from ehap_jax.curvature.problem import Layout, Problem
from ehap_jax.curvature.products import taps_of
from ehap_jax.graph import Node, evaluate

__all__ = ["where_not_finite"]


def where_not_finite(loss: Callable, problem: Problem, mesh: Mesh | None, failed: np.ndarray) -> str:
    """The first layer to look at, in the order of the network, in words.

    What is not finite on the way forward spreads to every gradient, so the activations are looked at first. Only where
    they are finite does it mean anything which products are not.

    Args:
      loss: as the user wrote it. problem: divided over the mesh.
      failed: ``(leaves,)``, whose gradients or products are not finite.
    """
    layout, leaves, chunks, _ = problem
    uses = taps_of(loss, layout, leaves, chunks[0]).uses
    bad = np.any([jax.device_get(_overflows(loss, layout, mesh, leaves, chunk)) for chunk in chunks], axis=0)
    if bad.any():
        _, paths = uses[int(np.argmax(bad))]
        return (
            f"activations overflow in {layout.policy.compute}, which no scale can help: the first layer whose output "
            f"is not finite is {', '.join(map(repr, sorted(paths)))}"
        )
    used = [path for _, paths in uses for path in sorted(paths)]
    concerned = [path for path, bad in zip(layout.paths, failed, strict=True) if bad]
    first = min(concerned, key=lambda path: used.index(path) if path in used else len(used))
    return f"activations are finite, and the first layer concerned is {first!r}"


@partial(jax.jit, static_argnames=("loss", "layout", "mesh"))
def _overflows(loss, layout: Layout, mesh, leaves, examples) -> jax.Array:
    """Of every use of a kernel, in order, whether its output is not finite for one of the examples: ``(uses,)``."""

    def here(leaves, examples):
        taps = taps_of(loss, layout, leaves, examples)
        nodes, found = {id(node) for node, _ in taps.uses}, []

        def look(node: Node, inputs: list):
            if id(node) not in nodes:
                return None
            outputs = _compat.bind(node.primitive, inputs, node.params)
            found.append(~jnp.array([jnp.isfinite(x).all() for x in outputs]).all())
            return outputs

        evaluate(taps.body, [*leaves, *jax.tree.leaves(examples)], look)
        return sum_over_data(mesh, jnp.array(found, bool).astype(jnp.int32))

    return on_devices(mesh, here, (SAME, EXAMPLES), SAME)(leaves, examples) > 0
