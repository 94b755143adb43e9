"""A model with taps at the uses of its kernels, and the proof that its Hessian is the Gauss-Newton matrix there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ehap_jax._traced_once import traced_once
from ehap_jax.curvature.heads import inputs_and_targets
from ehap_jax.curvature.piecewise_linear import piecewise_linear_kernels
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.probes import is_kernel
from ehap_jax.curvature.problem import layout_of
from ehap_jax.curvature.taps import Taps, find_taps
from ehap_jax.graph import Graph, trace_graph

__all__ = ["example_graph", "require_proven", "tapped_model", "unproven_kernels"]

PyTree = Any


def tapped_model(model: Callable, params: PyTree, x: PyTree, paths: tuple[str, ...]) -> Taps:
    """The taps of ``model`` on one example; the same object for the same function and shapes."""
    leaves, structure = jax.tree.flatten((params, x))
    return _taps(model, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), paths)


@traced_once
def _taps(model, structure, described, paths) -> Taps:
    return find_taps(_graph(model, structure, described, "freeze"), paths)


def example_graph(model: Callable, params: PyTree, x: PyTree, on_unknown: Literal["error", "freeze"]) -> Graph:
    """The graph of ``model`` on one example; the same object for the same function and shapes.

    Raises:
      TypeError: the model does not return one floating-point array with the examples on its first axis.
    """
    leaves, structure = jax.tree.flatten((params, x))
    return _graph(model, structure, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves), on_unknown)


@traced_once
def _graph(model, structure, described, on_unknown) -> Graph:
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in described]
    params, x = jax.tree.unflatten(structure, structs)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), x)
    graph = trace_graph(model, on_unknown=on_unknown)(params, one)
    outputs = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in graph.body.outputs]
    _require_logits(jax.tree.unflatten(graph.output_tree, outputs))
    return graph


def require_logits(model: Callable, params: PyTree, batch: PyTree) -> jax.ShapeDtypeStruct:
    """The logits of one example; a TypeError unless they are one array, of floating point, with examples first."""
    x = jax.tree.map(lambda leaf: leaf[:1], jax.tree.map(jnp.asarray, inputs_and_targets(batch)[0]))
    found = jax.eval_shape(model, params, x)
    _require_logits(found)
    return found


def _require_logits(found: PyTree) -> None:
    """Of one example."""
    one = isinstance(found, jax.ShapeDtypeStruct)
    if one and found.shape[:1] == (1,) and jnp.issubdtype(found.dtype, jnp.floating):
        return
    wrapper = 'lambda p, x: model(p, x)["logits"]' if isinstance(found, Mapping) else "lambda p, x: model(p, x)[0]"
    described = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), found)
    raise TypeError(
        "model(params, x) must return one floating-point array, the logits, with the examples on its first axis; "
        f"for one example it returned {described}. A model with more outputs needs a wrapper: {wrapper}"
    )


def unproven_kernels(
    model: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    select: Callable[[str, jax.Array], bool] = is_kernel,
) -> dict[str, str]:
    """The selected kernels for which `gauss_newton_trace` is not proven to be the Hessian's, and why.

    >>> p = {"a": jnp.eye(3), "b": jnp.ones((3, 2))}
    >>> list(unproven_kernels(lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"], p, jnp.ones((1, 3))))
    ['a']
    """
    paths = layout_of(params, policy, select, -1).paths
    params, x = policy.cast(jax.tree.map(jnp.asarray, (params, inputs_and_targets(batch)[0])))
    return unproven(tapped_model(model, params, x, paths))


def unproven(taps: Taps) -> dict[str, str]:
    """Of the kernels of a tapped model."""
    verdicts = piecewise_linear_kernels(taps.graph, taps.paths)
    return {path: why for path, why in verdicts.items() if why is not True}


def require_proven(taps: Taps) -> None:
    """Raise a ValueError with the reasons unless the Hessian is the Gauss-Newton matrix at every kernel."""
    reasons = [f"{path}: {why}" for path, why in unproven(taps).items()]
    if reasons:
        raise ValueError(
            f"at {len(reasons)} of {len(taps.paths)} kernels the Hessian is not proven to be the Gauss-Newton matrix:\n"
            + "\n".join(reasons[:5] + ["…"] * (len(reasons) > 5))
            + '\nEstimate these with channel_trace(method="auto", model=...), leave them out with select=, or ask for '
            'the Gauss-Newton trace itself with on_unproven="gauss_newton"'
        )
