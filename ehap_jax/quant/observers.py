"""Activation ranges: an exponential moving average of the minimum and maximum of every batch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RangeState(NamedTuple):
    """low, high: float32 (), the range so far. count: int32 (), batches seen. frozen: bool (), True stops updates.

    The flag is data, so freezing never recompiles.
    """

    low: jax.Array
    high: jax.Array
    count: jax.Array
    frozen: jax.Array


def empty_range() -> RangeState:
    """A range that has seen nothing."""
    zero = jnp.zeros((), jnp.float32)
    return RangeState(zero, zero, jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def observe(state: RangeState, x: jax.Array, decay: float) -> RangeState:
    """The range after one more batch: the batch's own at first, then ``decay · old + (1 − decay) · new``."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    first = state.count == 0
    low = jnp.where(first, x.min(), decay * state.low + (1 - decay) * x.min())
    high = jnp.where(first, x.max(), decay * state.high + (1 - decay) * x.max())
    seen = RangeState(low, high, state.count + 1, state.frozen)
    return jax.tree.map(lambda old, new: jnp.where(state.frozen, old, new), state, seen)


def freeze_ranges(qstate: dict[str, RangeState], frozen: bool = True) -> dict[str, RangeState]:
    """``qstate`` with every range fixed (or released again)."""
    return {site: state._replace(frozen=jnp.asarray(frozen)) for site, state in qstate.items()}


def check_calibrated(qstate: dict[str, RangeState]) -> None:
    """Raise ValueError unless every range has seen data, is finite and is not a single point (for use outside jit)."""
    for site, state in jax.device_get(qstate).items():
        if state.count == 0:
            raise ValueError(
                f"{site}: the input of this layer has never been observed; run apply(..., update=True) first."
            )
        if not (np.isfinite(state.low) and np.isfinite(state.high)):
            raise ValueError(
                f"{site}: its input range [{state.low}, {state.high}] is not finite; is there NaN in the data?"
            )
        if state.low == state.high:
            raise ValueError(
                f"{site}: its input is always {state.low}; a constant needs no quantisation. Prune the dead layer before "
                "it, or skip this one with QuantRule(pattern=..., skip=True)."
            )
