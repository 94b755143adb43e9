"""Channel groups against hand-drawn truth on small networks."""

import jax
import jax.numpy as jnp
import pytest

from ehap_jax.graph import UnknownPrimitiveError, channel_groups, channel_structure, trace_graph

CONV = ("NHWC", "HWIO", "NHWC")


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(x, w, groups=1, stride=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=CONV, feature_group_count=groups
    )


def norm(x, scale, bias):
    return x * scale[None, None, None] + bias[None, None, None]


def groups_of(apply, variables, *args, coupling="group"):
    """{frozenset of (path, axis, indices)} of every group."""
    graph = trace_graph(apply)(variables, *args)
    return {
        frozenset((path, axis, idx) for (path, axis), idx in group.slices.items())
        for group in channel_groups(graph, coupling=coupling)
    }


def drawn(count, *members):
    """The truth of ``count`` groups: member (path, axis, offset or function of the channel)."""
    result = set()
    for c in range(count):
        entries = set()
        for path, axis, *where in members:
            at = where[0](c) if where else (c,)
            entries.add((path, axis, at))
        result.add(frozenset(entries))
    return result


IMAGE = struct(2, 4, 4, 3)


def test_conv_norm_conv():
    variables = {"c1": struct(3, 3, 3, 5), "s": struct(5), "b": struct(5), "c2": struct(3, 3, 5, 2)}

    def apply(v, x):
        return conv(jax.nn.relu(norm(conv(x, v["c1"]), v["s"], v["b"])), v["c2"])

    assert groups_of(apply, variables, IMAGE) == drawn(5, ("c1", 3), ("s", 0), ("b", 0), ("c2", 2))


def test_flatten_into_dense_takes_every_pixel_of_the_channel():
    variables = {"c": struct(3, 3, 3, 5), "d": struct(4 * 4 * 5, 7)}

    def apply(v, x):
        return conv(x, v["c"]).reshape(2, -1) @ v["d"]

    truth = drawn(5, ("c", 3), ("d", 0, lambda c: tuple(range(c, 80, 5))))
    assert groups_of(apply, variables, IMAGE) == truth


RESIDUAL = {
    "stem": struct(1, 1, 3, 4),
    "a1": struct(1, 1, 4, 3),
    "a2": struct(1, 1, 3, 4),
    "head": struct(4, 2),
}


def residual(v, x):
    x = conv(x, v["stem"])
    x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, v["a1"])), v["a2"]))
    return x.mean((1, 2)) @ v["head"]


def test_residual_stream_under_group_coupling():
    inner = drawn(3, ("a1", 3), ("a2", 2))
    stream = drawn(4, ("stem", 3), ("a1", 2), ("a2", 3), ("head", 0))
    assert groups_of(residual, RESIDUAL, IMAGE) == inner | stream


def test_residual_stream_under_union_coupling():
    inner = drawn(3, ("a1", 3), ("a2", 2))
    stem, branch = drawn(4, ("stem", 3), ("a1", 2)), drawn(4, ("a2", 3))
    assert groups_of(residual, RESIDUAL, IMAGE, coupling="union") == inner | stem | branch


def test_union_stream_keeps_what_any_writer_keeps():
    structure = channel_structure(trace_graph(residual)(RESIDUAL, IMAGE), "union")
    slices = structure.kept_slices(structure.alive({"stem": [0, 3], "a2": [2, 3]}))
    assert {p: {a: i.tolist() for a, i in s.items()} for p, s in slices.items()} == {
        "stem": {3: [0, 3]},
        "a1": {2: [0, 3]},
        "a2": {3: [2, 3]},
        "head": {0: [0, 2, 3]},
    }


def test_parameter_free_shortcut_pads_with_free_channels():
    """Option A: channel c of the narrow stream is channel c + 1 of the wide one, whose others have one writer."""
    variables = {"stem": struct(1, 1, 3, 4), "wide": struct(1, 1, 4, 6), "head": struct(6, 2)}

    def apply(v, x):
        x = conv(x, v["stem"])
        short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1)))
        return (short + conv(x, v["wide"], stride=2)).sum((1, 2)) @ v["head"]

    both = drawn(
        4,
        ("stem", 3),
        ("wide", 2),
        ("wide", 3, lambda c: (c + 1,)),
        ("head", 0, lambda c: (c + 1,)),
    )
    alone = {frozenset({("wide", 3, (i,)), ("head", 0, (i,))}) for i in (0, 5)}
    assert groups_of(apply, variables, IMAGE) == both | alone
    union = groups_of(apply, variables, IMAGE, coupling="union")
    stem = drawn(4, ("stem", 3), ("wide", 2))
    middle = {frozenset({("wide", 3, (i,))}) for i in (1, 2, 3, 4)}
    assert union == stem | middle | alone


def test_depthwise_ties_input_and_output():
    variables = {"expand": struct(1, 1, 3, 6), "depth": struct(3, 3, 1, 6), "project": struct(1, 1, 6, 2)}

    def apply(v, x):
        h = conv(jax.nn.relu(conv(x, v["expand"])), v["depth"], groups=6)
        return conv(jax.nn.relu(h), v["project"])

    assert groups_of(apply, variables, IMAGE) == drawn(6, ("expand", 3), ("depth", 3), ("project", 2))


def test_grouped_convolution_goes_group_by_group():
    variables = {"in": struct(1, 1, 3, 6), "mid": struct(3, 3, 2, 9), "out": struct(1, 1, 9, 2)}

    def apply(v, x):
        return conv(conv(conv(x, v["in"]), v["mid"], groups=3), v["out"])

    pairs, triples = (lambda g: (2 * g, 2 * g + 1)), (lambda g: (3 * g, 3 * g + 1, 3 * g + 2))
    truth = drawn(3, ("in", 3, pairs), ("mid", 3, triples), ("out", 2, triples))
    assert groups_of(apply, variables, IMAGE) == truth


def test_concatenation_offsets():
    variables = {"a": struct(1, 1, 3, 2), "b": struct(1, 1, 3, 3), "head": struct(5, 4)}

    def apply(v, x):
        h = jnp.concatenate([conv(x, v["a"]), conv(x, v["b"])], axis=-1)
        return jax.nn.relu(h).sum((1, 2)) @ v["head"]

    first = drawn(2, ("a", 3), ("head", 0))
    second = drawn(3, ("b", 3), ("head", 0, lambda c: (c + 2,)))
    assert groups_of(apply, variables, IMAGE) == first | second


def test_squeeze_and_excite_gate_joins_its_channels():
    variables = {
        "conv": struct(1, 1, 3, 4),
        "down": struct(4, 2),
        "up": struct(2, 4),
        "head": struct(4, 3),
    }

    def apply(v, x):
        h = jax.nn.relu(conv(x, v["conv"]))
        gate = jax.nn.sigmoid(jax.nn.relu(h.mean((1, 2)) @ v["down"]) @ v["up"])
        return (h * gate[:, None, None, :]).sum((1, 2)) @ v["head"]

    truth = drawn(4, ("conv", 3), ("down", 0), ("up", 1), ("head", 0)) | drawn(2, ("down", 1), ("up", 0))
    assert groups_of(apply, variables, IMAGE) == truth
    assert groups_of(apply, variables, IMAGE, coupling="union") == truth


def test_heads_go_whole():
    variables = {"q": struct(4, 6), "k": struct(4, 6), "v": struct(4, 6), "o": struct(6, 4)}

    def apply(w, x):
        q, k, v = ((x @ w[n]).reshape(2, 5, 3, 2) for n in "qkv")
        p = jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k), axis=-1)
        return jnp.einsum("bhij,bjhd->bihd", p, v).reshape(2, 5, 6) @ w["o"]

    pair = lambda h: (2 * h, 2 * h + 1)  # noqa: E731
    truth = drawn(3, ("q", 1, pair), ("k", 1, pair), ("v", 1, pair), ("o", 0, pair))
    assert groups_of(apply, variables, struct(2, 5, 4)) == truth


def test_shared_kernel_ties_both_of_its_uses():
    variables = {"in": struct(3, 4), "shared": struct(4, 4), "out": struct(4, 2)}

    def apply(w, x):
        h = jax.nn.relu(x @ w["in"])
        return jax.nn.relu(jax.nn.relu(h @ w["shared"]) @ w["shared"]) @ w["out"]

    truth = drawn(4, ("in", 1), ("shared", 0), ("shared", 1), ("out", 0))
    assert groups_of(apply, variables, struct(2, 3)) == truth


def test_tied_autoencoder_uses_the_axis_that_can_shrink():
    """A kernel applied as W and as W transposed produces along both axes; the outer one is the network's output."""
    graph = trace_graph(lambda w, x: jax.nn.relu(x @ w["tied"]) @ w["tied"].T)({"tied": struct(3, 4)}, struct(2, 3))
    assert channel_structure(graph).kernel_axes == {"tied": 1}
    assert [dict(g.producers) for g in channel_groups(graph)] == [{"tied": (c,)} for c in range(4)]


def test_scaled_kernel_is_the_producer_not_its_gain():
    """Weight normalisation: leaves of lower rank come first by path and still are not the kernel."""
    variables = {"gain": struct(4), "kernel": struct(3, 4), "out": struct(4, 2)}

    def apply(w, x):
        return jax.nn.relu(x @ (w["gain"][None] * w["kernel"])) @ w["out"]

    graph = trace_graph(apply)(variables, struct(2, 3))
    assert dict(channel_groups(graph)[0].producers) == {"kernel": (0,)}


def test_constant_kernels_are_sliced_but_never_decide():
    projection = jnp.ones((3, 4))
    graph = trace_graph(lambda w, x: jax.nn.relu(x @ projection) @ w)(struct(4, 2), struct(2, 3))
    assert channel_groups(graph) == ()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda h: jax.nn.softmax(h, axis=-1),
        lambda h: h / (1e-6 + jnp.std(h, axis=-1, keepdims=True)),
        lambda h: jnp.max(h, axis=-1, keepdims=True) + h,
        lambda h: jnp.cumsum(h, axis=-1),
        lambda h: jnp.sort(h, axis=-1),
        lambda h: jnp.exp(h).sum(-1, keepdims=True),
        lambda h: (h > 0).astype(jnp.float32).prod(-1, keepdims=True),
        lambda h: h[:, jnp.argmax(h, axis=-1)],
    ],
    ids=["softmax", "std", "max", "cumsum", "sort", "exp-sum", "prod", "take"],
)
def test_axes_that_are_read_across_channels_stay(spoil):
    def apply(w, x):
        h = spoil(jax.nn.relu(x @ w["in"]))
        return h.sum(-1)

    assert groups_of(apply, {"in": struct(3, 4)}, struct(2, 3)) == set()


@pytest.mark.parametrize(
    "singular",
    [jnp.log, jax.lax.rsqrt, jax.lax.lgamma, lambda h: 1.0 / h, lambda h: h**-0.5, lambda h: h**-2],
    ids=["log", "rsqrt", "lgamma", "reciprocal", "power", "integer-power"],
)
def test_functions_singular_at_zero_freeze_masked_channels(singular):
    """A masked channel would be infinite there, and 0 · ∞ is not 0."""
    apply = lambda w, x: singular(jax.nn.relu(x @ w["in"])) @ w["out"]  # noqa: E731
    assert groups_of(apply, {"in": struct(3, 4), "out": struct(4, 2)}, struct(2, 3)) == set()


@pytest.mark.parametrize(
    "function, zero",
    [
        (jax.nn.relu, True),
        (jax.nn.relu6, True),
        (jax.nn.gelu, True),
        (jax.nn.silu, True),
        (jax.nn.leaky_relu, True),
        (lambda h: jnp.clip(h, -1.0, 1.0), True),
        (lambda h: h**2, True),
        (lambda h: h**3.0, True),
        (jnp.tanh, True),
        (jax.nn.sigmoid, False),
        (jax.nn.softplus, False),
        (lambda h: jnp.clip(h, 0.5, 1.0), False),
        (lambda h: jnp.isfinite(h).astype(jnp.float32), False),
        (lambda h: jnp.maximum(h, 0.5), False),
        (lambda h: jnp.arctan2(h, -jnp.ones_like(h)), False),
        (lambda h: h**0, False),
    ],
    ids=lambda p: getattr(p, "__name__", str(p)),
)
def test_a_sum_over_channels_needs_terms_that_masking_makes_zero(function, zero):
    assert (function(jnp.zeros(())) == 0) == zero, "the test's own truth"
    apply = lambda w, x: function(x @ w["in"]).sum(-1)  # noqa: E731
    assert len(groups_of(apply, {"in": struct(3, 4)}, struct(2, 3))) == (4 if zero else 0)


def test_layer_norm_of_the_fast_kind_passes_and_of_the_two_pass_kind_freezes():
    """E[x²] - E[x]² sums values that masking makes zero; (x - mean)² does not."""
    variables = {"in": struct(3, 4), "s": struct(4), "out": struct(4, 2)}

    def network(variance):
        def apply(w, x):
            h = x @ w["in"]
            mean = h.mean(-1, keepdims=True)
            return ((h - mean) * jax.lax.rsqrt(variance(h, mean) + 1e-6) * w["s"][None]) @ w["out"]

        return apply

    fast = network(lambda h, mean: (h**2).mean(-1, keepdims=True) - mean**2)
    slow = network(lambda h, mean: ((h - mean) ** 2).mean(-1, keepdims=True))
    assert groups_of(fast, variables, struct(2, 3)) == drawn(4, ("in", 1), ("s", 0), ("out", 0))
    assert groups_of(slow, variables, struct(2, 3)) == set()


def test_broadcast_of_a_size_one_axis_does_not_merge_groups():
    variables = {"a": struct(3, 4), "gate": struct(3, 1), "out": struct(4, 2)}

    def apply(w, x):
        return (jax.nn.relu(x @ w["a"]) * (x @ w["gate"])) @ w["out"]

    assert groups_of(apply, variables, struct(2, 3)) == drawn(4, ("a", 1), ("out", 0))


def test_embedding_features_follow_the_layers_that_write_to_them():
    variables = {"table": struct(10, 4), "w": struct(4, 4), "out": struct(4, 2)}

    def apply(v, ids):
        h = v["table"][ids]
        return (h + h @ v["w"]) @ v["out"]

    truth = drawn(4, ("table", 1), ("w", 0), ("w", 1), ("out", 0))
    assert groups_of(apply, variables, struct(5, dtype=jnp.int32)) == truth


def test_coupling_is_checked():
    graph = trace_graph(residual)(RESIDUAL, IMAGE)
    with pytest.raises(ValueError, match='"group" or "union"'):
        channel_structure(graph, "both")  # pyright: ignore[reportArgumentType]


def test_unknown_primitive_error_is_a_not_implemented_error():
    assert issubclass(UnknownPrimitiveError, NotImplementedError)
