"""Shrunk networks: the same function with the pruned channels physically gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import numpy as np

from ehap_jax import _compat
from ehap_jax._paths import path_name
from ehap_jax.graph.channels import ChannelStructure, channel_structure, derivative_structure
from ehap_jax.graph.interpret import RULES, evaluate, evaluate_call
from ehap_jax.graph.rules.shape import take
from ehap_jax.graph.trace import Body, Node, trace_graph
from ehap_jax.pruning.implant import POINTWISE, Layout, Split, as_split, implant_layouts, map_shrunk, run_split
from ehap_jax.pruning.plan import PruningPlan, check_fits


def shrink_variables(variables, plan: PruningPlan):
    """The kept slices of ``variables``: what the function made by :func:`shrink` takes.

    Where the plan has implants, the kernel becomes ``{"spatial": ..., "pointwise": ...}``: the channels with all their
    taps, and the 1×1 kernels of the implants, at the centre taps they have in ``variables`` (see ``zero_implants``).

    Raises KeyError or ValueError (path and both shapes) where the plan is for another network.
    """
    check_fits(variables, plan.shapes, "plan")

    def cut(path, leaf):
        name = path_name(path)
        slices = plan.slices.get(name, {})
        kept = take(leaf, [slices.get(axis) for axis in range(np.ndim(leaf))])
        return plan.layout(name).split(kept) if name in plan.implants else kept

    return jax.tree_util.tree_map_with_path(cut, variables)


def shrink(apply: Callable, plan: PruningPlan, *, on_unknown: Literal["error", "freeze"] = "error") -> Callable:
    """``apply`` with the pruned channels gone: same signature, for ``shrink_variables(variables, plan)``.

    The jaxpr of ``apply`` at full size is evaluated with the kept indices known; parameters that carry sizes are
    recomputed, custom derivative rules and checkpoints stay; a convolution with implants becomes two, one of them 1×1.
    Under jit this costs tracing time only. The invariant is
    ``apply(mask_variables(v, plan), x) == shrink(apply, plan)(shrink_variables(v, plan), x)``.

    Works for any ``apply(variables, *args)`` whose variables the plan describes, so also for the training-mode function
    that returns new running statistics.

    Raises KeyError or ValueError where the variables are not those the plan leaves (path and both shapes), ValueError
    where the plan does not follow from the structure of ``apply``.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
    >>> w, x = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}, jnp.ones((1, 3))
    >>> plan = PruningPlan.from_keep(trace_graph(apply)(w, x), {"in": [0, 2]})
    >>> shrink(apply, plan)(shrink_variables(w, plan), x)
    Array([[6., 6.]], dtype=float32)
    """
    shrunk_shapes = plan.shrunk_shapes()

    def full_size(path: str, leaf) -> jax.ShapeDtypeStruct:
        dtype = leaf[POINTWISE].dtype if path in plan.implants else leaf.dtype
        return jax.ShapeDtypeStruct(plan.shapes[path], dtype)

    def shrunk(variables, *args):
        check_fits(variables, shrunk_shapes, "plan's shrunk network")
        full = map_shrunk(full_size, variables, plan.implants)
        graph = trace_graph(apply, on_unknown=on_unknown)(full, *args)
        structure = channel_structure(graph, plan.coupling)
        alive = structure.alive(plan.keep)
        _check_slices(plan, structure.kept_slices(alive))
        whole = map_shrunk(
            lambda path, leaf: as_split(leaf) if path in plan.implants else leaf, variables, plan.implants
        )
        leaves = jax.tree.leaves((whole, *args), is_leaf=lambda node: isinstance(node, Split))
        outputs = _run(graph.body, leaves, structure, alive, implant_layouts(graph, plan))
        return jax.tree.unflatten(graph.output_tree, outputs)

    return shrunk


def _check_slices(plan: PruningPlan, slices) -> None:
    """The plan must cut what this function ties together, no more and no less."""
    for path in sorted({*plan.slices, *slices}):
        theirs, own = plan.slices.get(path, {}), slices.get(path, {})
        if theirs.keys() != own.keys() or any(not np.array_equal(kept, own[axis]) for axis, kept in theirs.items()):
            raise ValueError(
                f"the plan cuts axes {sorted(theirs)} of {path}, but its kept channels imply axes {sorted(own)} (or "
                "other indices of them) in this function; the plan was made for another network."
            )


def _run(
    body: Body, args: Sequence, structure: ChannelStructure, alive: np.ndarray, layouts: Mapping[Node, Layout]
) -> list:
    def handle(node: Node, inputs: list) -> list | None:
        if node.body is not None:
            return evaluate_call(
                node, inputs, lambda inner, a: _run(inner, a, structure, alive, layouts), run_derivative
            )
        split = run_split(node, inputs, layouts)
        if split is not None:
            return split
        rule = RULES.get(node.name)
        if rule is None or rule.resize is None:
            outputs = _compat.bind(node.primitive, inputs, node.params)
        else:
            kept_inputs = [structure.kept(operand, alive) for operand in node.inputs]
            kept_outputs = [structure.kept(operand, alive) for operand in node.outputs]
            whole = all(k is None for kept in (*kept_inputs, *kept_outputs) for k in kept)
            outputs = None if whole else rule.resize(node, inputs, kept_inputs, kept_outputs)
        return outputs

    def run_derivative(node: Node, derivative_args: Sequence) -> list:
        inner, inner_alive = derivative_structure(structure, node, alive)
        return _run(node.derivative, derivative_args, inner, inner_alive, layouts)

    constants = {value: take(array, structure.kept(value, alive)) for value, array in body.constants.items()}
    return evaluate(body, args, handle, constants)
