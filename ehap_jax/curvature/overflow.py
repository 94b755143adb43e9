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

__all__ = ["loss_overflows", "where_not_finite"]


def loss_overflows(loss: Callable, problem: Problem, mesh: Mesh | None) -> bool:
    """Whether the loss itself is not finite in the policy's dtype; ``problem`` is divided over the mesh."""
    return bool(_forward(loss, problem, mesh)[-1])


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
    bad = _forward(loss, problem, mesh)
    if bad.any():
        where = [*(", ".join(map(repr, sorted(paths))) for _, paths in uses), "the loss, after the last of them"]
        return (
            f"activations overflow in {layout.policy.compute}, which no scale can help: the first layer whose output "
            f"is not finite is {where[int(np.argmax(bad))]}"
        )
    used = [path for _, paths in uses for path in sorted(paths)]
    concerned = [path for path, bad in zip(layout.paths, failed, strict=True) if bad]
    first = min(concerned, key=lambda path: used.index(path) if path in used else len(used))
    return f"activations are finite, and the first layer concerned is {first!r}"


def _forward(loss: Callable, problem: Problem, mesh: Mesh | None) -> np.ndarray:
    """`_overflows` over all chunks."""
    layout, leaves, chunks, _ = problem
    return np.any([jax.device_get(_overflows(loss, layout, mesh, leaves, chunk)) for chunk in chunks], axis=0)


@partial(jax.jit, static_argnames=("loss", "layout", "mesh"))
def _overflows(loss, layout: Layout, mesh, leaves, examples) -> jax.Array:
    """Whether the output of every use of a kernel, in order, and the loss are not finite: ``(uses + 1,)``."""

    def here(leaves, examples):
        taps = taps_of(loss, layout, leaves, examples)
        nodes, found = {id(node) for node, _ in taps.uses}, []

        def look(node: Node, inputs: list):
            if id(node) not in nodes:
                return None
            outputs = _compat.bind(node.primitive, inputs, node.params)
            found.append(_not_finite(outputs))
            return outputs

        found.append(_not_finite(evaluate(taps.body, [*leaves, *jax.tree.leaves(examples)], look)))
        return sum_over_data(mesh, jnp.array(found, bool).astype(jnp.int32))

    return on_devices(mesh, here, (SAME, EXAMPLES), SAME)(leaves, examples) > 0


def _not_finite(arrays: list[jax.Array]) -> jax.Array:
    return ~jnp.array([jnp.isfinite(x).all() for x in arrays]).all()
