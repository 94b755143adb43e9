"""Shrunk networks elsewhere: StableHLO and back, Orbax checkpoints."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import export

from ehap_jax.graph import trace_graph
from ehap_jax.pruning import PruningPlan, shrink, shrink_variables
from tests.pruning.invariant import jit
from tests.pruning.networks import apply, images, variables

KEEP = {"stem": [0, 2, 5], "a1": [1, 3, 4]}


@pytest.fixture(scope="module", params=["union", "implants"])
def shrunk(request):
    """(function, variables, its logits), once with gathers of a union, once with split kernels."""
    graph = trace_graph(apply)(variables(), images())
    if request.param == "union":
        plan = PruningPlan.from_keep(graph, {**KEEP, "a2": [0, 1, 3]}, coupling="union")
    else:
        plan = PruningPlan.from_keep(graph, {**KEEP, "a2": [0, 2, 5]}, implants={"a1": [1], "stem": [2]})
    small = shrink_variables(variables(), plan)
    return shrink(apply, plan), small, jit(shrink(apply, plan))(small, images())


@pytest.mark.slow
def test_stablehlo_round_trip(shrunk):
    """Serialised, and called after loading without any Python of this library."""
    function, small, logits = shrunk
    exported = export.export(jax.jit(function))(small, images())
    assert "stablehlo.convolution" in exported.mlir_module()
    loaded = export.deserialize(exported.serialize())
    assert loaded.in_tree == exported.in_tree
    np.testing.assert_allclose(loaded.call(small, images()), logits, rtol=1e-5, atol=1e-5)
    batch = jax.ShapeDtypeStruct(export.symbolic_shape("n, 4, 4, 3"), images().dtype)
    with pytest.raises(ValueError, match=r"symbolic shape \(n, 4, 4, 3\).*once per batch size"):
        export.export(jax.jit(function))(small, batch)


@pytest.mark.slow
def test_stablehlo_keeps_derivatives(shrunk):
    function, small, _ = shrunk
    exported = export.export(jax.jit(function))(small, images())
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    found, wanted = (
        jit(jax.grad(lambda v, x, call=call: call(v, x).sum()))(small, images()) for call in (loaded.call, function)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_orbax_round_trip(shrunk, tmp_path):
    function, small, logits = shrunk
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "small", small)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small)
        restored = checkpointer.restore(tmp_path / "small", shapes)
    jax.tree.map(np.testing.assert_array_equal, restored, small)
    np.testing.assert_array_equal(jit(function)(restored, images()), logits)
