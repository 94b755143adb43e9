"""What is kept is as little as was promised, and makes the same results again, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.curvature.residuals import keep_little

X = jnp.asarray([[-1.0, -0.0, 0.0, 2.0], [jnp.nan, jnp.inf, -jnp.inf, 1e-45]], jnp.float32)


@jax.custom_jvp
def surrogate(x):
    """ReLU forward, a smooth derivative."""
    return jnp.maximum(x, 0)


surrogate.defjvp(lambda primals, tangents: (surrogate(*primals), tangents[0] * jax.nn.sigmoid(primals[0])))


@jax.custom_jvp
def doubled(x):
    return 2 * jnp.maximum(x, 0)


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * tangents[0]))


def through_a_ref(x):
    """What is read before and after a write is not the same, though it is read alike."""
    ref = jax.new_ref(x)
    before = jnp.tanh(ref[...])
    ref[...] = 3 * before
    return before, jnp.tanh(ref[...])


KEY, OTHER = jax.random.key(7), X[::-1]

CASES = {
    "a mask whose ReLU is kept": (lambda x: (jax.nn.relu(x), x > 0), 1),
    "a mask of a maximum": (lambda x: (jnp.maximum(x, 1.0), x > 1), 1),
    "a mask of another rule's maximum": (lambda x: (surrogate(x), x > 0), 1),
    "a mask of a maximum, the number first": (lambda x: (jnp.maximum(1.0, x), x > 1), 1),
    "a mask of two equal maxima": (lambda x: (jnp.maximum(x, 0), jnp.maximum(x, 0) + 1, jnp.maximum(x, 0), x > 0), 2),
    "a mask of two maxima, one of which is kept": (lambda x: (surrogate(x).sum(), jnp.maximum(x, 0), x > 0), 2),
    "a mask of a maximum of arrays": (lambda x: (jnp.maximum(x, OTHER), x > OTHER), 2),
    "a mask of a maximum of a computed number": (lambda x: (jnp.maximum(x, x[0, 3]), x > x[0, 3]), 2),
    "a mask of a maximum, asked of the number": (lambda x: (jnp.maximum(0.0, x), jnp.greater(0.0, x)), 2),
    "a mask whose ReLU is not kept": (lambda x: (jax.nn.relu(x).sum(), x > 0), 2),
    "a mask at another threshold": (lambda x: (jax.nn.relu(x), x > 1), 2),
    "a mask of something else's rule": (lambda x: (doubled(x), x > 0), 2),
    "the other side": (lambda x: (jax.nn.relu(x), x < 0), 2),
    "zeros": (lambda x: (jnp.zeros_like(x), jnp.full_like(x, 3), x), 1),
    "zeros of other types": (lambda x: (jnp.zeros_like(x), jnp.zeros(x.shape, jnp.int32), -jnp.zeros_like(x), x), 2),
    "through a ref": (through_a_ref, 2),
    "a key from outside": (lambda x: (jax.random.bernoulli(KEY, 0.5, x.shape), x), 2),
    "a mask twice": (lambda x: (x > 0, jnp.greater(x, 0)), 1),
    "a value twice": (lambda x: (jnp.tanh(x * 2), {"again": jnp.tanh(x * 2)}), 1),
    "not a value twice": (lambda x: (jnp.sum(x, 0), jnp.sum(x, 1), x * 2, x * 3), 4),
    "two results of one operation": (lambda x: jax.lax.top_k(x, 2), 2),
    "inside jit": (jax.jit(lambda x: (jax.nn.relu(x), jax.jit(lambda x: x > 0)(x))), 1),
    "an argument and a number": (lambda x: (x, 1.5, x), 2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("jit", [False, True])
def test_results_are_made_again(name, jit):
    function, count = CASES[name]
    seen = []

    def there_and_back(x):
        kept = keep_little(function, x)
        seen.append(kept.arrays)
        return kept.results()

    found = (jax.jit(there_and_back) if jit else there_and_back)(X)
    truth = function(X)
    assert len(seen[0]) == count
    assert jax.tree.structure(found) == jax.tree.structure(truth)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (np.signbit(ours) == np.signbit(theirs)).all()
        assert jnp.asarray(ours).dtype == jnp.asarray(theirs).dtype


def test_a_number_of_weak_type_stays_one():
    def function(x):
        return x * jnp.ones(2, jnp.float16)

    (found,) = jax.tree.leaves(keep_little(function, jnp.asarray(2.0)).results())
    assert found.dtype == function(jnp.asarray(2.0)).dtype


@pytest.mark.slow
def test_a_relu_network_keeps_what_its_layers_read_and_their_cotangents():
    """No zeros and no masks, but for the last layer, whose output no kernel reads."""
    keys = jax.random.split(jax.random.key(0), 4)
    kernels = [jax.random.normal(key, (6, 6)) for key in keys]
    x = jax.random.normal(jax.random.key(1), (5, 6))

    def gradient(kernels):
        def loss(taps):
            h = x
            for kernel, tap in zip(kernels, taps, strict=True):
                h = jax.nn.relu(h @ kernel + tap)
            return (h.sum(1) ** 2).mean()

        return jax.grad(loss)([jnp.zeros((5, 6))] * 4)

    kept = keep_little(lambda kernels: jax.linearize(gradient, kernels), kernels)
    wide = sorted(str(array.dtype) for array in kept.arrays if array.shape == (5, 6))
    assert wide == ["bool", *["float32"] * 8]  # x, three inputs, four cotangents
    _, plain = jax.linearize(gradient, kernels)
    plain_sizes = [leaf.shape for leaf in jax.tree.leaves(plain)].count((5, 6))
    assert plain_sizes > 2 * len(wide) - 4
    direction = [jnp.ones((6, 6))] * 4
    _, pushforward = kept.results()
    for ours, theirs in zip(pushforward(direction), plain(direction), strict=True):
        np.testing.assert_array_equal(ours, theirs)
