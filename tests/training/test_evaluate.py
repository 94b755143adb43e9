"""Evaluation counts every example once, whatever the batch, and compiles once."""

import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.training import make_evaluate

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (23, 2, 2, 1), np.uint8)
LABELS = GENERATOR.integers(0, 3, 23).astype(np.int32)
VARIABLES = {"params": {"kernel": jnp.asarray(GENERATOR.normal(size=(4, 3)), jnp.float32)}}


def linear(variables, x):
    return x.reshape(x.shape[0], -1) @ variables["params"]["kernel"]


def prepare(images):
    return images.astype(jnp.float32) / 255


def oracle(images, labels):
    logits = images.reshape(-1, 4) / 255 @ np.asarray(VARIABLES["params"]["kernel"], np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return (logits.argmax(1) == labels).mean(), losses.mean()


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
def test_accuracy_and_loss_do_not_depend_on_the_batch(batch_size):
    result = make_evaluate(linear, prepare, batch_size=batch_size)(VARIABLES, IMAGES, LABELS)
    accuracy, loss = oracle(IMAGES, LABELS)
    assert result.accuracy == accuracy and result.count == 23
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)


def test_splits_of_any_size_share_one_compilation():
    traced = []

    def counted(images):
        traced.append(images.shape)
        return prepare(images)

    evaluate = make_evaluate(linear, counted, batch_size=8)
    for count in (23, 16, 3):
        result = evaluate(VARIABLES, jnp.asarray(IMAGES[:count]), LABELS[:count])
        assert result.accuracy == oracle(IMAGES[:count], LABELS[:count])[0]
    assert traced == [(8, 2, 2, 1)]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make_evaluate(linear, prepare, batch_size=0)
    evaluate = make_evaluate(linear, prepare)
    with pytest.raises(ValueError, match="got 0 and 0"):
        evaluate(VARIABLES, IMAGES[:0], LABELS[:0])
    with pytest.raises(ValueError, match="got 23 and 22"):
        evaluate(VARIABLES, IMAGES, LABELS[1:])
