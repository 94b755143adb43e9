"""Accuracy and mean loss over a whole split, the last uneven batch included."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.data.augment import normalise
from ehap_jax.data.dataset import Dataset
from ehap_jax.training.losses import cross_entropy


class Evaluation(NamedTuple):
    """Fraction of right answers in [0, 1], mean loss in nats, and the number of examples."""

    accuracy: float
    loss: float
    count: int


def evaluation_inputs(dataset: Dataset) -> Callable[[jax.Array], jax.Array]:
    """`prepare(uint8 images) -> float32 images`: normalisation with the training split's statistics."""

    def prepare(images: jax.Array) -> jax.Array:
        return normalise(images, dataset.mean, dataset.std)

    return prepare


def make_evaluate(
    apply: Callable[[Any, jax.Array], jax.Array],
    prepare: Callable[[jax.Array], jax.Array],
    *,
    batch_size: int = 256,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> Callable[[Any, Any, Any], Evaluation]:
    """A function `evaluate(variables, images, labels) -> Evaluation` that compiles once for splits of any size.

    The last batch is filled up with images of weight zero; every example counts once, whatever `batch_size`.

    Args:
        apply: `apply(variables, x) -> logits`, pure, each row depending on its image alone.
        prepare: `prepare(uint8 batch) -> float batch`; see `evaluation_inputs`.
        batch_size: images per call of the compiled function.
        loss: per-example loss of (logits, labels).

    Raises:
        ValueError: `batch_size` is below 1; by `evaluate`, the split is empty or its lengths differ.

    Example:
        >>> evaluate = make_evaluate(lambda variables, x: x @ variables, lambda x: x * 1.0, batch_size=2)
        >>> evaluate(jnp.eye(2), np.array([[1, 0], [0, 1], [1, 0]]), np.array([0, 1, 1])).accuracy
        0.6666666666666666
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")

    @jax.jit
    def totals(variables: Any, images: jax.Array, labels: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = apply(variables, prepare(images))
        correct = (jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels) & real
        losses = jnp.where(real, loss(logits, labels), 0.0)
        return jnp.sum(correct, dtype=jnp.int32), jnp.sum(losses)

    def evaluate(variables: Any, images: Any, labels: Any) -> Evaluation:
        images, labels = np.asarray(images), np.asarray(labels)
        count = len(images)
        if not count or len(labels) != count:
            raise ValueError(f"need as many labels as images and at least one, got {count} and {len(labels)}")
        sums = []
        for start in range(0, count, batch_size):
            x, y = images[start : start + batch_size], labels[start : start + batch_size]
            missing = batch_size - len(x)
            real = np.arange(batch_size) < len(x)
            x = np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
            sums.append(totals(variables, x, np.pad(y, (0, missing)), real))
        sums = jax.device_get(sums)
        correct = sum(int(c) for c, _ in sums)
        return Evaluation(correct / count, math.fsum(float(s) for _, s in sums) / count, count)

    return evaluate
