"""How much a control variate helps, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ehap_jax.curvature.channel_trace import channel_trace
from ehap_jax.curvature.heads import softmax_cross_entropy

__all__ = ["variance_reduction"]

PyTree = Any


def variance_reduction(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    model: Callable[[PyTree, PyTree], jax.Array],
    head: Callable = softmax_cross_entropy,
    key: jax.Array,
    num_probes: int,
    **options: Any,
) -> dict[str, float]:
    """By which factor the Gauss-Newton control variate lowers the variance of one probe, per layer.

    The sample variances of `channel_trace` by ``method="hutchinson"`` and ``method="control_variate"``, each summed
    over the channels of a layer, from the same probes; infinite where nothing is left to estimate. Below 1 where the
    blocks of H - G between layers disturb a layer more than its own block of H did (``b`` below); ``method="auto"``
    probes the layers that are not proven alone.

    Args:
      loss, params, batch, key: as for `channel_trace`.
      model, head: as for ``channel_trace(method="control_variate")``; they compute the same loss.
      num_probes: at least 2; a handful tells whether it is worth its while.
      options: of `channel_trace`.

    Returns:
      ``{path: variance without / variance with}``.

    Raises:
      ValueError: fewer than two probes; what `channel_trace` raises.

    >>> import jax.numpy as jnp
    >>> model = lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"]
    >>> loss = lambda p, b: (jax.nn.logsumexp(model(p, b[0]), 1) - model(p, b[0])[:, 0]).mean()
    >>> p = {"a": jnp.eye(3), "b": jnp.ones((3, 2)).at[0, 0].set(3.0)}
    >>> batch = (jnp.eye(3), jnp.zeros(3, jnp.int32))
    >>> found = variance_reduction(loss, p, batch, model=model, key=jax.random.key(0), num_probes=8)
    >>> found["a"] > 1, found["b"] < 1
    (True, True)
    """
    if num_probes < 2:
        raise ValueError(f"a variance needs at least 2 probes; got num_probes={num_probes}")
    plain, controlled = (
        channel_trace(
            loss, params, batch, model=model, head=head, method=method, key=key, num_probes=num_probes, **options
        )
        for method in ("hutchinson", "control_variate")
    )
    before, after = (jax.device_get(found.state.moments.squares["channel"]) for found in (plain, controlled))
    sums = {path: (float(np.sum(before[path])), float(np.sum(after[path]))) for path in before}
    return {path: a / b if b > 0 else float("inf") for path, (a, b) in sums.items()}
