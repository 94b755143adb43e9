"""What counts as an affine tail, in which spellings, and that folding it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ehap_jax import _compat, trace_graph
from ehap_jax.graph.interpret import evaluate
from ehap_jax.graph.trace import Constant
from ehap_jax.quant.fold import find_sites, fold
from tests.quant.networks import batch_norm, conv

C = 3
KEYS = jax.random.split(jax.random.key(0), 6)
VARIABLES = {
    "kernel": jax.random.normal(KEYS[0], (3, 3, 2, C)),
    "bn": {
        "gamma": jnp.array([0.7, -1.3, 0.2]),
        "beta": jax.random.normal(KEYS[1], (C,)),
        "mean": jax.random.normal(KEYS[2], (C,)),
        "var": jax.random.uniform(KEYS[3], (C,), minval=0.3, maxval=2.0),
    },
}
X = jax.random.normal(KEYS[4], (2, 5, 5, 2))


def textbook(z, p):
    return batch_norm(z, p)


def by_division(z, p):
    v = {k: jnp.broadcast_to(a[None, None, None], z.shape) for k, a in p.items()}
    return (z - v["mean"]) / jnp.sqrt(v["var"] + 1e-5) * v["gamma"] + v["beta"]


def precomputed(z, p):
    scale = p["gamma"] / jnp.sqrt(p["var"] + 1e-5)
    shift = p["beta"] - p["mean"] * scale
    return shift[None, None, None] + scale[None, None, None] * z


def from_the_other_side(z, p):
    """beta − (mean − z)·s, with a negation."""
    scale = (p["gamma"] / jnp.sqrt(p["var"] + 1e-5))[None, None, None]
    return p["beta"][None, None, None] - (-(z - p["mean"][None, None, None])) * -scale * -1.0


def channels_first(z, p):
    v = {k: a[None, :, None, None] for k, a in p.items()}
    z = jnp.transpose(z, (0, 3, 1, 2))
    z = (z - v["mean"]) * lax.rsqrt(v["var"] + 1e-5) * v["gamma"] + v["beta"]
    return jnp.transpose(z, (0, 2, 3, 1))


def pixels_flattened(z, p):
    flat = z.reshape(-1, C)
    return (flat * (p["gamma"] * lax.rsqrt(p["var"] + 1e-5))[None]).reshape(z.shape) + (
        p["beta"] - p["gamma"] * lax.rsqrt(p["var"] + 1e-5) * p["mean"]
    )[None, None, None]


def frozen_by_jit(z, p):
    return jax.jit(batch_norm)(z, p)


SPELLINGS = [textbook, by_division, precomputed, from_the_other_side, channels_first, pixels_flattened, frozen_by_jit]


def site_of(apply, variables=VARIABLES, x=X):
    (site,) = find_sites(trace_graph(apply)(variables, x)).by_node.values()
    return site


def folded_numbers(apply, variables=VARIABLES, x=X):
    """(scale, offset) with the vectors read from a plain evaluation of the graph."""
    graph = trace_graph(apply)(variables, x)
    (site,) = find_sites(graph).by_node.values()
    args = jax.tree.leaves((variables, x))
    env = dict(zip(graph.body.inputs, args, strict=True)) | graph.body.constants

    def handle(node, inputs):
        outputs = _compat.bind(node.primitive, inputs, node.params)
        env.update(zip(node.outputs, outputs, strict=True))
        return outputs

    evaluate(graph.body, args, handle)
    return fold(site, lambda v: v.value if isinstance(v, Constant) else env[v], jnp.float32)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_batch_norm_is_found_in_any_spelling(spelling):
    """The folded numbers are BatchNorm's, and conv(x, w·scale) + offset is the network, negative γ included."""

    def apply(v, x):
        return jax.nn.relu(spelling(conv(x, v["kernel"]), v["bn"]))

    scale, offset = folded_numbers(apply)
    bn = VARIABLES["bn"]
    want = bn["gamma"] / jnp.sqrt(bn["var"] + 1e-5)
    np.testing.assert_allclose(scale, want, rtol=1e-5)
    np.testing.assert_allclose(offset, bn["beta"] - want * bn["mean"], rtol=1e-4, atol=1e-5)
    folded = jax.nn.relu(conv(X, VARIABLES["kernel"] * scale[None, None, None]) + offset[None, None, None])
    np.testing.assert_allclose(folded, apply(VARIABLES, X), atol=2e-5)


def test_what_varies_over_pixels_or_depends_on_the_data_is_no_tail():
    def positional(v, x):
        return conv(x, v["kernel"]) + v["where"]

    def gated(v, x):
        z = conv(x, v["kernel"])
        return z * x.mean()

    def used_twice(v, x):
        z = conv(x, v["kernel"])
        return z * 2.0 + jnp.abs(z)

    where = {**VARIABLES, "where": jnp.ones((2, 5, 5, C))}
    assert site_of(positional, where).tail == ()
    assert site_of(gated).tail == ()
    assert site_of(used_twice).tail == ()


def test_dividing_by_the_layer_is_no_tail():
    assert site_of(lambda v, x: 2.0 / conv(x, v["kernel"])).tail == ()


def test_a_vector_along_a_batch_axis_of_equal_size_is_no_tail():
    """A bias over the rows of a square result is not a bias over its columns."""
    variables = {"kernel": jnp.ones((4, 4)), "bias": jnp.arange(4.0)}
    assert site_of(lambda v, x: x @ v["kernel"] + v["bias"][:, None], variables, jnp.ones((4, 4))).tail == ()
    assert len(site_of(lambda v, x: x @ v["kernel"] + v["bias"][None], variables, jnp.ones((4, 4))).tail) == 1


@pytest.mark.parametrize("equation", ["bi,io->bo", "oi,bi->bo", "bi,io->ob"])
def test_dense_layers_on_either_side_of_the_dot(equation):
    kernel_first = equation.startswith("o")
    kernel = jax.random.normal(KEYS[0], (5, 4) if kernel_first else (4, 5))
    bias = jnp.arange(5.0)

    def apply(v, x):
        args = (v["kernel"], x) if kernel_first else (x, v["kernel"])
        return jnp.einsum(equation, *args) + (v["bias"][:, None] if equation.endswith("ob") else v["bias"][None])

    variables = {"kernel": kernel, "bias": bias}
    site = site_of(apply, variables, jnp.ones((3, 4)))
    _, offset = folded_numbers(apply, variables, jnp.ones((3, 4)))
    assert site.channels == 5 and site.path == "kernel"
    np.testing.assert_array_equal(offset, bias)


def test_a_layer_with_one_output_has_no_channel_axis():
    site = site_of(lambda v, x: x @ v["kernel"] + 1.5, {"kernel": jnp.ones(4)}, jnp.ones((3, 4)))
    assert (site.kernel_axis, site.out_axis, site.channels, len(site.tail)) == (None, None, 1, 1)
