"""Augmentation: every result is a shift or flip of its image, all are reached, and normalisation is the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.data import Augmentation, augment, normalise

IMAGE = np.random.default_rng(0).integers(1, 256, (5, 6, 3), np.uint8)


def candidates(padding, flip):
    padded = np.pad(IMAGE, ((padding, padding), (padding, padding), (0, 0)))
    crops = [padded[i : i + 5, j : j + 6] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
    return crops + ([crop[:, ::-1] for crop in crops] if flip else [])


@pytest.mark.parametrize(("padding", "flip"), [(1, False), (1, True), (2, False), (0, True)])
def test_every_crop_and_flip_is_drawn_uniformly(padding, flip):
    batch = jnp.asarray(np.broadcast_to(IMAGE, (2000, *IMAGE.shape)))
    result = jax.jit(augment, static_argnums=2)(jax.random.key(0), batch, Augmentation(padding, flip))
    assert result.dtype == jnp.uint8 and result.shape == batch.shape
    known = {crop.tobytes(): i for i, crop in enumerate(candidates(padding, flip))}
    drawn = np.bincount(
        [known[np.ascontiguousarray(image).tobytes()] for image in np.asarray(result)], minlength=len(known)
    )
    p = 1 / len(known)
    # Each count is binomial; five standard deviations.
    assert np.abs(drawn - 2000 * p).max() < 5 * np.sqrt(2000 * p * (1 - p))


@pytest.mark.slow
def test_same_key_same_images_and_nothing_to_do_changes_nothing():
    batch = jnp.asarray(np.broadcast_to(IMAGE, (16, *IMAGE.shape)))
    options = Augmentation(2, True)
    first, again = (augment(jax.random.key(3), batch, options) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, augment(jax.random.key(4), batch, options))
    np.testing.assert_array_equal(augment(jax.random.key(3), batch, Augmentation()), batch)


def test_normalise_is_the_formula():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.0)
    got = normalise(jnp.asarray(IMAGE[None]), mean, std)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], (IMAGE / 255 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)
