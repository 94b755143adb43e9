"""Tracing: leaves by path, inlining, calls that keep their meaning, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from ehap_jax._compat import bind
from ehap_jax.graph import UnknownPrimitiveError, channel_groups, channel_structure, evaluate, trace_graph


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_leaves_are_known_by_path_and_nothing_is_computed():
    variables = {"params": {"a": {"kernel": struct(3, 4)}, "b": [struct(4, 2), struct(2)]}}

    def apply(v, x):
        return jax.nn.relu(x @ v["params"]["a"]["kernel"]) @ v["params"]["b"][0] + v["params"]["b"][1][None]

    graph = trace_graph(apply)(variables, struct(5, 3))
    assert list(graph.leaves) == ["params/a/kernel", "params/b/0", "params/b/1"]
    assert [v.shape for v in graph.leaves.values()] == [(3, 4), (4, 2), (2,)]
    assert [v.shape for v in graph.arguments] == [(5, 3)]
    assert graph.parameters == tuple(graph.leaves)


def test_parameters_are_the_params_collection_where_there_is_one():
    graph = trace_graph(lambda v, x: x * v["params"]["w"] + v["stats"]["m"])(
        {"params": {"w": struct(3)}, "stats": {"m": struct(3)}}, struct(3)
    )
    assert graph.parameters == ("params/w",)


def test_nested_jit_is_inlined_and_derivative_rules_stay_calls():
    inner = jax.jit(lambda x, w: jax.jit(jnp.sin)(x) @ w)
    graph = trace_graph(lambda w, x: jax.nn.relu(jax.jit(inner)(x, w)))(struct(3, 4), struct(1, 3))
    names = [node.name for node in graph.body.nodes]
    assert names == ["sin", "dot_general", "custom_jvp_call"]
    assert "max" in [node.name for node in graph.body.walk()]


def test_evaluate_reproduces_the_function():
    constant = jnp.arange(3.0)

    @jax.checkpoint
    def block(x, w):
        return jnp.tanh(x * constant[None]) @ w

    def apply(w, x):
        return {"y": block(x, w), "x": x}

    w, x = jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.ones((2, 3))
    graph = trace_graph(apply)(w, x)
    outs = evaluate(graph.body, [w, x], lambda node, inputs: None)
    found = jax.tree.unflatten(graph.output_tree, outs)
    np.testing.assert_allclose(found["y"], apply(w, x)["y"], rtol=1e-6)
    assert graph.output_paths == ("x", "y")


def unknown(w, x):
    h = x @ w["in"]
    return jax.lax.linalg.cholesky(h)[0] @ w["out"]


UNKNOWN_ARGS = {"in": struct(3, 4), "out": struct(4, 2)}, struct(1, 4, 3)


def test_unknown_primitive_names_itself_its_line_and_the_paths():
    graph = trace_graph(unknown)(*UNKNOWN_ARGS)
    line = unknown.__code__.co_firstlineno + 2
    with pytest.raises(UnknownPrimitiveError) as error:
        channel_groups(graph)
    message = str(error.value)
    assert "'cholesky'" in message
    assert re.search(rf"test_trace\.py:{line}\b", message), message
    assert re.search(r"touching in\b", message), message
    assert 'on_unknown="freeze"' in message


def test_unknown_primitive_can_be_frozen():
    graph = trace_graph(unknown, on_unknown="freeze")(*UNKNOWN_ARGS)
    assert channel_groups(graph) == ()
    reasons = [why for _, why in channel_structure(graph).solution.structure.frozen]
    assert any("cholesky" in why and "test_trace.py" in why for why in reasons)


def test_unknown_primitive_that_no_channel_reaches_is_no_obstacle():
    def apply(w, x):
        return jax.nn.relu(jax.lax.linalg.cholesky(x) @ w["in"]) @ w["out"]

    graph = trace_graph(apply)({"in": struct(3, 4), "out": struct(4, 2)}, struct(3, 3))
    assert len(channel_groups(graph)) == 4


def test_on_unknown_is_checked():
    with pytest.raises(ValueError, match="on_unknown"):
        trace_graph(unknown, on_unknown="guess")  # pyright: ignore[reportArgumentType]


def test_positional_outputs_are_not_taken_for_state():
    """``y`` at position 0 of the output is not the next value of the variable at position 0."""

    def apply(w, x):
        h = jax.nn.relu(x @ w[0])
        return h @ w[1], h

    graph = trace_graph(apply)([struct(4, 4), struct(4, 4)], struct(4, 4))
    assert [graph.state_leaf(p, (4, 4)) for p in graph.output_paths] == [None, None]
    assert channel_groups(graph) == ()


def test_state_is_recognised_by_its_whole_path():
    variables = {"params": {"w": struct(3, 4)}, "batch_stats": {"mean": struct(4)}}

    def apply(v, x):
        h = x @ v["params"]["w"]
        return h.sum(), {"batch_stats": {"mean": h.mean(0)}}

    graph = trace_graph(apply)(variables, struct(2, 3))
    assert graph.state_leaf("1/batch_stats/mean", (4,)) == "batch_stats/mean"
    assert graph.state_leaf("1/batch_stats/mean", (5,)) is None
    assert graph.state_leaf("0", ()) is None
    assert [dict(g.slices) for g in channel_groups(graph)][1] == {("params/w", 1): (1,), ("batch_stats/mean", 0): (1,)}


def permuted_by(make_order):
    def apply(w, x):
        return (x @ w["in"])[:, make_order()] @ w["out"]

    return apply


PERMUTED_ARGS = {"in": struct(3, 4), "out": struct(4, 2)}, struct(2, 3)


def test_effects_do_not_happen_while_tracing():
    called = []

    def order():
        called.append(True)
        return np.array([1, 0, 3, 2], np.int32)

    graph = trace_graph(permuted_by(lambda: io_callback(order, struct(4, dtype=jnp.int32))))(*PERMUTED_ARGS)
    assert channel_groups(graph) == () and "gather" in channel_structure(graph).why_fixed("in")
    assert not called


def test_positions_along_a_named_axis_are_not_known():
    apply = permuted_by(lambda: (jnp.arange(4) + jax.lax.axis_index("batch")) % 4)
    graphs = []
    traced = jax.vmap(lambda x: graphs.append(trace_graph(apply)(PERMUTED_ARGS[0], x)), axis_name="batch")
    jax.eval_shape(traced, struct(5, 2, 3))
    assert channel_groups(graphs[0]) == () and "gather" in channel_structure(graphs[0]).why_fixed("in")


def test_known_indices_are_computed_once(monkeypatch):
    """Every step reads the one before it three times: 3**25 operations where nothing is kept."""
    computed = []

    def counted(*args):
        computed.append(args)
        assert len(computed) < 2000
        return bind(*args)

    def apply(w, x):
        order = jnp.arange(4)
        for _ in range(25):
            order = (order + order + order + 1) % 4
        return jnp.sin((x @ w["in"])[:, order])[:, order] @ w["out"]

    monkeypatch.setattr("ehap_jax._compat.bind", counted)
    graph = trace_graph(apply)(*PERMUTED_ARGS)
    monkeypatch.undo()
    assert 50 <= len(computed) <= len(graph.body.nodes)
    assert len(channel_groups(graph)) == 4


def test_what_jax_does_inside_a_call_is_at_the_line_of_the_call():
    def apply(w, x):
        return jax.checkpoint(jax.nn.silu)(jax.nn.relu(x)) * w

    line = apply.__code__.co_firstlineno + 1
    for node in trace_graph(apply)(struct(3), struct(3)).body.walk():
        assert re.search(rf"test_trace\.py:{line}\b", node.source), node
