"""Whatever takes a random key says at once where it is none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ehap_jax._random_key import random_key
from ehap_jax.curvature import channel_trace, fingerprint, gauss_newton_trace
from ehap_jax.graph import trace_graph
from ehap_jax.pruning import random_scores
from ehap_jax.training import create_train_state

X = jnp.ones((2, 3))
PARAMS = {"w": jnp.ones((3, 2))}


def model(p, x):
    return x @ p["w"]


def loss(p, x):
    return (model(p, x) ** 2).mean()


TAKERS = {
    "channel_trace": lambda key: channel_trace(loss, PARAMS, X, key=key, num_probes=1),
    "fingerprint": lambda key: fingerprint(loss, PARAMS, X, key=key),
    "gauss_newton_trace": lambda key: gauss_newton_trace(model, PARAMS, X, classes=2, key=key),
    "random_scores": lambda key: random_scores(trace_graph(model)(PARAMS, X), key=key),
    "create_train_state": lambda key: create_train_state({"params": PARAMS}, optax.sgd(0.1), key),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_seed_is_no_key(taker):
    with pytest.raises(TypeError, match=r"one random key, such as jax\.random\.key\(7\), not 7"):
        TAKERS[taker](7)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (None, "not None"),
        (jnp.zeros(2), r"not float32\[2\]"),
        (np.zeros((2, 2), np.uint32), r"not uint32\[2, 2\]"),
        (jax.random.split(jax.random.key(0)), r"not key<fry>\[2\]"),
        ("x" * 1000, "not 'x{79}$"),
    ],
)
def test_what_is_no_key(key, found):
    with pytest.raises(TypeError, match=found):
        random_key(key)


def test_keys_of_both_styles_are_taken():
    assert random_key(jax.random.key(3)) == random_key(jax.random.PRNGKey(3)) == jax.random.key(3)
    assert random_key(np.asarray(jax.random.PRNGKey(3))) == jax.random.key(3)
