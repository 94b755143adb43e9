"""The index of layers, drawn by hand."""

import jax
import jax.numpy as jnp
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.graph.layers import KernelAxes, layers_in, network_layers
from ehap_jax.graph.trace import REMAT


def found(apply, variables, *args):
    return network_layers(trace_graph(apply)(variables, *args))


def described(layers):
    return [(layer.node.name, layer.path, layer.direct, *layer.axes) for layer in layers.found]


def test_axes_of_convolutions_and_products():
    w = {
        "conv": jnp.ones((5, 2, 3, 3)),
        "heads": jnp.ones((5, 2, 3)),
        "stack": jnp.ones((2, 3, 4)),
        "left": jnp.ones((6, 4)),
    }

    def apply(w, x):
        h = jax.lax.conv(x, w["conv"], (1, 1), "SAME").mean((2, 3))
        h = jnp.einsum("bi,ihf->bhf", h, w["heads"])
        h = jnp.einsum("bhf,hfg->bhg", h, w["stack"]).sum(1)
        return jnp.einsum("oi,bi->ob", w["left"], h)

    layers = found(apply, w, jnp.ones((1, 2, 4, 4)))
    assert described(layers) == [
        ("conv_general_dilated", "conv", True, (0,), (1,), (2, 3), ()),
        ("dot_general", "heads", True, (1, 2), (0,), (), ()),
        ("dot_general", "stack", True, (2,), (1,), (), (0,)),
        ("dot_general", "left", True, (0,), (1,), (), ()),
    ]
    conv, heads, stack, left = layers.found
    assert left.kernel == 0
    assert conv.output_axis(0) == 1
    for layer, axes in ((heads, (1, 2)), (stack, (0, 2)), (left, (0,))):
        for axis in axes:
            assert layer.node.outputs[0].shape[layer.output_axis(axis)] == layer.kernel_shape[axis]
    assert conv.input_axes == (1,)
    assert [layer.node.inputs[1 - layer.kernel].shape[layer.input_axes[0]] for layer in (heads, stack, left)] == [
        5,
        3,
        4,
    ]


def test_kernels_are_followed_into_calls_and_through_what_makes_them():
    w = {"a": jnp.ones((4, 4)), "mask": jnp.ones(4), "b": jnp.ones((4, 4)), "stacked": jnp.ones((3, 4, 4))}

    @jax.custom_vjp
    def inside(w, x):
        return x @ w

    inside.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))

    def apply(w, x):
        x = x @ (w["a"] * w["mask"][None])
        x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w["b"], x)
        x = inside(w["b"], x)
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w["stacked"])
        return jnp.einsum("bi,bi->b", x, x)  # no kernel

    layers = found(apply, w, jnp.ones((2, 4)))
    assert [(layer.path, layer.direct) for layer in layers.found] == [
        ("a", False),
        ("b", True),
        ("b", False),
        ("stacked", False),
    ]
    assert layers.found[0].reads == {"a", "mask"}
    assert [len(layer.calls) for layer in layers.found] == [0, 1, 1, 1]
    _, checkpointed, custom, scanned = (layer.calls for layer in layers.found)
    assert checkpointed[0].name in REMAT
    assert (custom[0].name, scanned[0].name) == ("custom_vjp_call", "scan")
    readers = {path: [node.name for node, _ in found] for path, found in layers.readers.items()}
    assert readers["b"] == ["dot_general", "custom_vjp_call"]
    assert readers["a"] == ["mul"]
    assert not layers.returned


@pytest.mark.parametrize("depends", [False, True])
def test_what_a_loop_carries_is_a_kernel_if_it_never_depends_on_the_input(depends):
    def apply(w, x):
        def step(carry, _):
            h, kernel = carry
            h = h @ kernel
            return (h, kernel + h.sum() if depends else kernel * 2), None

        return jax.lax.scan(step, (x, w["a"]), None, length=2)[0][0]

    layers = found(apply, {"a": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert [layer.path for layer in layers.found] == ([] if depends else ["a"])


def test_a_part_of_the_variables():
    """What is asked for are the kernels; the others do not depend on the input, and are none."""
    w = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    graph = trace_graph(lambda w, x: x @ (w["a"] + w["b"]) @ w["b"])(w, jnp.ones((2, 4)))
    layers = layers_in(graph.body, {"a": graph.leaves["a"]}, (graph.leaves["b"],))
    assert [(layer.path, layer.reads) for layer in layers.found] == [("a", {"a"})]
    assert layers.found[0].axes == KernelAxes((1,), (0,))


def test_a_variable_that_is_returned():
    layers = found(lambda w, x: (x @ w["a"], w["a"]), {"a": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert layers.returned == {"a"}
