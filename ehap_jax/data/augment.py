"""What happens to a batch of uint8 images inside jit: random crop and flip, then normalisation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Augmentation(NamedTuple):
    """Random crop after zero padding of `crop_padding` pixels on each side, and a horizontal flip half the time."""

    crop_padding: int = 0
    flip: bool = False


def augment(key: jax.Array, images: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Images of the same shape and dtype, each shifted and flipped on its own.

    Args:
        key: PRNG key; the result is a function of it.
        images: (N, H, W, C), any dtype. Padding is zero, which is black before normalisation.
        augmentation: how far and whether; `Augmentation()` changes nothing.

    Example:
        >>> augment(jax.random.key(0), jnp.ones((2, 8, 8, 1), jnp.uint8), Augmentation(crop_padding=1)).shape
        (2, 8, 8, 1)
    """
    crop_key, flip_key = jax.random.split(key)
    if augmentation.crop_padding:
        images = random_crop(crop_key, images, augmentation.crop_padding)
    if augmentation.flip:
        flipped = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1, :], images)
    return images


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Each image (N, H, W, C) shifted by up to `padding` pixels along both axes, uniformly, with zeros moved in."""
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (count, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], jnp.zeros((), offset.dtype))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`(images / 255 - mean) / std` in float32, per channel: uint8 (N, H, W, C) -> float32 (N, H, W, C)."""
    shape = (1,) * (images.ndim - 1) + (len(mean),)
    scale = jnp.asarray([1 / (255 * s) for s in std], jnp.float32).reshape(shape)
    offset = jnp.asarray([-m / s for m, s in zip(mean, std, strict=True)], jnp.float32).reshape(shape)
    return images.astype(jnp.float32) * scale + offset
