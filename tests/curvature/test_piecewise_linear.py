"""Every verdict on a minimal network, confirmed by the exact float64 Hessian block: H - G is zero, or is not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from ehap_jax._compat import Primitive, enable_x64
from ehap_jax.curvature.piecewise_linear import _ONE_TO_ONE, _PIECEWISE, _STEPS, piecewise_linear_kernels
from ehap_jax.graph import trace_graph

relu = jax.nn.relu


@jax.custom_jvp
def straight_through(h):
    return jnp.round(h)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))


@jax.custom_jvp
def smooth_rule(h):
    return jnp.maximum(h, 0)


smooth_rule.defjvp(lambda primals, tangents: (smooth_rule(*primals), jax.nn.sigmoid(primals[0]) * tangents[0]))


@jax.custom_jvp
def calls_itself(h):
    return jnp.tanh(h)


calls_itself.defjvp(lambda p, t: (calls_itself(*p), (1 - calls_itself(*p) * calls_itself(*p)) * t[0]))


@jax.custom_jvp
def relu_by_itself(h):
    return jnp.maximum(h, 0)


relu_by_itself.defjvp(lambda p, t: (relu_by_itself(*p), (relu_by_itself(*p) > 0).astype(t[0].dtype) * t[0]))


@jax.custom_jvp
def smooth_by_itself(h):
    return jnp.maximum(h, 0)


smooth_by_itself.defjvp(lambda p, t: (smooth_by_itself(*p), smooth_by_itself(*p) * t[0]))


@jax.custom_jvp
def positive(h):
    return h > 0


positive.defjvp(lambda p, t: (positive(*p), np.zeros(p[0].shape, jax.dtypes.float0)))


def backward_rule(slope):
    """relu with ``slope(h)`` times the cotangent as its derivative."""

    @jax.custom_vjp
    def activation(h):
        return jnp.maximum(h, 0)

    activation.defvjp(lambda h: (jnp.maximum(h, 0), h), lambda h, cotangent: (slope(h) * cotangent,))
    return activation


def max_pool_transposed(h):
    """Elements of an array go to the places of the larger ones in windows of two of another, as max-pool's gradient."""
    source, other = h[:, :2], jnp.roll(h, 1, 1)
    return jax.vjp(lambda h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "VALID"), other)[1](
        source
    )[0]


def steps(h):
    whether = [h <= 0.3, h != h[:, :1], h == h[:, 1:2], jnp.isfinite(h), (h.argmin(1) == 0)[:, None]]
    return h * sum((flag.astype(h.dtype) for flag in whether), jnp.ceil(h))


def pool(h, initial, reduce):
    return jax.lax.reduce_window(h, initial, reduce, (1, 2), (1, 1), "SAME")


def layer(activation):
    """x a, the activation, then b."""
    return lambda p, x: activation(x @ p["a"]) @ p["b"]


def complex_pairs(activation):
    """The activation of h_i + i h_(i+1), and its real part, or as it is where it is real."""

    def network(h):
        imaginary = 1j * jnp.roll(h, 1, 1).astype(complex)
        return jnp.real(activation(h.astype(complex) + imaginary)).astype(h.dtype)

    return layer(network)


def looped(p, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["a"]), None), x, None, length=2)[0] @ p["b"]


def with_dead_code(p, x):
    h = x @ p["a"]
    jnp.tanh(h)
    return relu(h) @ p["b"]


PROVEN = {
    "relu": layer(relu),
    "relu6": layer(jax.nn.relu6),
    "leaky relu": layer(jax.nn.leaky_relu),
    "clip": layer(lambda h: jnp.clip(h, -0.5, 0.5)),
    "abs and neg": layer(lambda h: -jnp.abs(h)),
    "product with a step": layer(lambda h: h * (h > 0).astype(h.dtype)),
    "product with a sign": layer(lambda h: h * jnp.sign(h) / (9 + jnp.floor(h))),
    "where": layer(lambda h: jnp.where(h > 0.1, h, 3 * h)),
    "max-pool": layer(lambda h: pool(h, -jnp.inf, jax.lax.max)),
    "average pool": layer(lambda h: pool(h, 0.0, jax.lax.add) / 2),
    "cumsum": layer(lambda h: jnp.cumsum(relu(h), 1)),
    "sort": layer(lambda h: jnp.sort(h, 1)),
    "top_k": layer(lambda h: jnp.pad(jax.lax.top_k(h, 2)[0], ((0, 0), (0, 1)))),
    "gather at argmax": layer(
        lambda h: jnp.concatenate([jnp.take_along_axis(h, h.argmax(1, keepdims=True), 1), h[:, :2]], 1)
    ),
    "reductions": layer(lambda h: h - h.max(1, keepdims=True) + h.mean(1, keepdims=True)),
    "scatter": layer(lambda h: jnp.zeros_like(h).at[:, ::2].set(h[:, ::2]).at[:, 1].add(h[:, 2])),
    "product with stop_gradient": layer(lambda h: h * jax.lax.stop_gradient(jnp.tanh(h))),
    "straight-through rounding": layer(straight_through),
    "checkpoint": layer(jax.checkpoint(relu)),
    "backward rule": layer(backward_rule(lambda h: (h > 0).astype(h.dtype))),
    "rule that calls itself": layer(relu_by_itself),
    "remainder of a division": layer(lambda h: jnp.fmod(h, 0.4) + jnp.fmod(jnp.full_like(h, 2), h + 9)),
    "cumulative extremes": layer(lambda h: jax.lax.cummax(h, 1) - jax.lax.cummin(h, 1) / 2),
    "rev and concatenate": layer(lambda h: jnp.concatenate([h[:, :1], jax.lax.rev(h[:, :2], (1,))], 1)),
    "dynamic slice": layer(
        lambda h: jnp.pad(jax.lax.dynamic_slice(h, (0, h[0].argmax() // 2), (len(h), 2)), ((0, 0), (0, 1)))
    ),
    "dynamic update": layer(lambda h: jax.lax.dynamic_update_slice(relu(h), -h[:, :1], (0, h[0].argmin()))),
    "min-pool": layer(lambda h: pool(h, jnp.inf, jax.lax.min)),
    "select and scatter": layer(max_pool_transposed),
    "scatter extremes": layer(lambda h: h.at[:, 0].max(h[:, 1]).at[:, 1].min(2 * h[:, 2])),
    "extremes": layer(lambda h: jnp.minimum(h, h.min(1, keepdims=True) + 0.5)),
    "reduced precision": layer(lambda h: jax.lax.reduce_precision(h, 11, 52)),
    "clamp by values": layer(lambda h: jax.lax.clamp(-relu(h), jnp.roll(h, 1, 1), relu(h))),
    "barrier": layer(lambda h: jax.lax.optimization_barrier(h)),
    "steps": layer(steps),
    "other shapes": layer(lambda h: jnp.copy(jnp.transpose(jnp.transpose(h).reshape(-1)[None].reshape(3, -1)))),
    "named": layer(lambda h: checkpoint_name(relu(h), "kept")),
    "power of one": layer(lambda h: h**1.0),
    "residual": layer(lambda h: relu(relu(h) + h)),
    "parallel": lambda p, x: (relu(x @ p["a"]) + relu((-2 * x) @ p["a"])) @ p["b"],
    "dead code": with_dead_code,
    "not used": lambda p, x: x @ p["b"] + 0 * p["a"].size,
}
# name: (network, kernels that are not proven, what the reason says)
UNPROVEN = {
    "tanh": (layer(jnp.tanh), "a", "tanh is not known"),
    "gelu": (layer(jax.nn.gelu), "a", "tanh is not known|integer_pow is not known|mul"),
    "silu": (layer(jax.nn.silu), "a", "logistic is not known"),
    "softmax": (lambda p, x: jax.nn.softmax(relu(x @ p["a"]) @ p["b"]), "ab", "exp is not known"),
    "square": (layer(lambda h: jnp.square(h)), "a", "square is not known"),
    "integer power": (layer(lambda h: h**3), "a", "integer_pow is not known"),
    "gate": (layer(lambda h: relu(h) * h.mean(1, keepdims=True)), "a", "used twice in a product: mul"),
    "division": (
        layer(lambda h: h / (1 + jnp.abs(h).sum(1, keepdims=True))),
        "a",
        "div by a value that depends on it",
    ),
    "layer norm": (layer(partial(jax.nn.standardize, axis=1)), "a", "square is not known|used twice|integer_pow"),
    "in sequence": (lambda p, x: relu(relu(x @ p["a"]) @ p["a"]) @ p["b"], "a", "used twice in a product: dot_general"),
    "attention score": (
        lambda p, x: (relu(x @ p["a"]) @ (x @ p["a"]).T) @ x @ p["b"],
        "a",
        "used twice in a product: dot_general",
    ),
    "product of elements": (layer(lambda h: h.prod(1, keepdims=True) + h), "a", "reduce_prod is not known"),
    "smooth derivative rule": (layer(smooth_rule), "a", "derivative rule that is not piecewise constant"),
    "rule that calls itself": (layer(calls_itself), "a", "tanh is not known"),
    "varying rule that calls itself": (layer(smooth_by_itself), "a", "derivative rule that is not piecewise constant"),
    "smooth backward rule": (
        layer(backward_rule(jax.nn.sigmoid)),
        "a",
        "derivative rule that is not piecewise constant",
    ),
    "loop": (looped, "a", "scan is not known"),
    "smooth inside a checkpoint": (layer(jax.checkpoint(jnp.tanh)), "a", "tanh is not known"),
    "complex abs": (complex_pairs(jnp.abs), "a", "of complex values is not known"),
    "hard swish": (layer(jax.nn.hard_swish), "a", "used twice in a product: mul"),
}
# name: (network, what the reason says about "a"), where automatic differentiation sees no remainder
CAUTIOUS = {
    "a choice by a function with its own rule": (
        layer(lambda h: jnp.where(positive(h), h, 3 * h)),
        "select_n chooses by a value that depends on it",
    ),
    "complex sign": (complex_pairs(jnp.sign), "of complex values is not known"),  # its derivative is zero to JAX
    "complex linear": (complex_pairs(lambda z: z + jnp.conj(z)), "of complex values is not known"),
}


def inputs():
    rng = np.random.default_rng(3)
    params = {"a": jnp.asarray(rng.normal(size=(3, 3))), "b": jnp.asarray(rng.normal(size=(3, 3)))}
    return params, jnp.asarray(rng.normal(size=(4, 3)))


def remainder(network):
    """The largest element of H - G per kernel, and of G, of the summed cross-entropy; H and G both dense."""
    with enable_x64():
        params, x = inputs()
        labels = jnp.arange(4, dtype=jnp.int32) % 3

        def loss(logits):
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).sum()

        def both(params, x):
            logits = network(params, x)
            H_out = jax.hessian(loss)(logits)
            found = {}
            for path, w in params.items():

                def of_kernel(w, path=path):
                    return network({**params, path: w}, x)

                J = jax.jacrev(of_kernel)(w)  # backward rules have no forward mode
                H = jax.jacfwd(jax.grad(lambda w, f=of_kernel: loss(f(w))))(w)
                G = jnp.einsum("ncij,ncmd,mdkl->ijkl", J, H_out, J)
                found[path] = (jnp.abs(H - G).max(), jnp.abs(G).max())
            return found

        compiled = jax.jit(both).lower(params, x).compile({"xla_backend_optimization_level": 0})
        return {path: tuple(map(float, pair)) for path, pair in compiled(params, x).items()}


def verdicts(network):
    params, x = inputs()
    return piecewise_linear_kernels(trace_graph(network)(params, x[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROVEN)
def test_proven_where_the_remainder_is_zero(name):
    assert verdicts(PROVEN[name]) == {"a": True, "b": True}
    for path, (rest, gauss_newton) in remainder(PROVEN[name]).items():
        assert rest <= 1e-12 * max(gauss_newton, 1.0), path
        assert gauss_newton > 1e-3 or name == "not used"


# Of meshes, which one device does not have; of derivatives and comparators; and names of other versions of JAX.
NOT_IN_NETWORKS = {"all_gather", "pbroadcast", "psum", "pvary", "sharding_constraint"}
NOT_IN_NETWORKS |= {"add_any", "eq_to", "le_to", "lt_to", "stop_gradient", "copy_p", "expand_dims"}


def test_every_operation_that_is_proven_is_in_a_network():
    params, x = inputs()
    met = {node.name.replace("-", "_") for f in PROVEN.values() for node in trace_graph(f)(params, x[:1]).body.walk()}
    taught = {name.replace("-", "_") for name in _PIECEWISE | _STEPS | _ONE_TO_ONE}
    assert taught - met <= NOT_IN_NETWORKS


@pytest.mark.slow
@pytest.mark.parametrize("name", UNPROVEN)
def test_not_proven_where_the_remainder_is_not_zero(name):
    network, kernels, expected = UNPROVEN[name]
    found = verdicts(network)
    for path, (rest, _) in remainder(network).items():
        if path in kernels:
            assert rest > 1e-4, path
            reason = found[path]
            assert isinstance(reason, str)
            assert any(part in reason for part in expected.split("|")), reason
            assert ".py:" in reason, reason
        else:
            assert found[path] is True, found[path]
            assert rest <= 1e-12


@pytest.mark.parametrize("name", CAUTIOUS)
def test_not_proven_out_of_caution(name):
    network, expected = CAUTIOUS[name]
    found = verdicts(network)
    assert found["b"] is True and expected in str(found["a"])
    assert all(rest <= 1e-12 for rest, _ in remainder(network).values())


def test_an_unknown_primitive_is_not_proven():
    unknown = Primitive("mystery")
    unknown.def_abstract_eval(lambda x: x)

    def network(p, x):
        return unknown.bind(x @ p["a"]) + unknown.bind(x) @ p["b"]

    found = verdicts(network)
    assert found["b"] is True
    assert str(found["a"]).startswith("mystery is not known to be piecewise linear at ")
    assert "test_piecewise_linear.py" in str(found["a"])


def test_bits_of_a_float_are_not_a_step():
    """A detour through integers must not lose that the value depends on the kernel."""

    def network(p, x):
        bits = jax.lax.bitcast_convert_type((x @ p["a"]).astype(jnp.float32), jnp.int32)
        back = jax.lax.bitcast_convert_type(bits | jnp.int32(0), jnp.float32).astype(x.dtype)
        return (back * back) @ p["b"]

    found = verdicts(network)
    assert found["b"] is True
    assert str(found["a"]).startswith("bitcast_convert_type is not known")


def test_only_the_asked_paths():
    params, x = inputs()
    graph = trace_graph(layer(jnp.tanh))(params, x)
    assert piecewise_linear_kernels(graph, ["b"]) == {"b": True}
    with pytest.raises(KeyError, match="no leaf 'c'"):
        piecewise_linear_kernels(graph, ["c"])


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_every_kernel_of_a_residual_network_in_eval_mode_is_proven(shortcut):
    from ehap_jax.models import ResNet, eval_apply, train_apply

    model = ResNet(8, 10, shortcut=shortcut, widths=(2, 4, 8))
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(x.shape)))
    found = piecewise_linear_kernels(trace_graph(eval_apply(model))(variables, x))
    assert len(found) == (8 if shortcut == "A" else 10)
    assert set(found.values()) == {True}
    # In training mode the statistics depend on every kernel before them; the head alone is linear.
    found = piecewise_linear_kernels(trace_graph(lambda v, x: train_apply(model)(v, x)[0])(variables, x))
    assert [path for path, verdict in found.items() if verdict is True] == ["params/linear/kernel"]
