"""Activation ranges: what every batch says about them, averaged over batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.quant.numerics import activation_grid, dequantise, quantise
from ehap_jax.quant.rules import QuantRule, skipping


class RangeState(NamedTuple):
    """low, high: float32 (), the range so far. count: int32 (), batches seen. frozen: bool (), True stops updates.

    The flag is data, so freezing never recompiles.
    """

    low: jax.Array
    high: jax.Array
    count: jax.Array
    frozen: jax.Array


QState = dict[str, RangeState]


def empty_range() -> RangeState:
    """A range that has seen nothing."""
    return RangeState(
        jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    )


def observe(state: RangeState, x: jax.Array, rule: QuantRule, *, bits: int | None = None) -> RangeState:
    """The range after one more batch: the batch's own at first, then ``decay · old + (1 − decay) · new``.

    A batch's own range is, by ``rule.observer``: its minimum and maximum ("ema", "learned"); its quantiles at
    ``100 − percentile`` and ``percentile`` percent ("percentile"); the fraction of [minimum, maximum] that rounds the
    batch with the smallest mean squared error, of 40 ("mse"). "learned" ranges take the first batch's and are then left
    to the optimiser. ``bits`` (default ``rule.activation_bits``) matters to "mse" alone. Where ``rule.activations`` is
    "unsigned", negative numbers count as the 0 that they are rounded to.

    Raises ValueError for an empty batch.
    """
    if x.size == 0:
        raise ValueError(f"a calibration batch of shape {x.shape} is empty; pass at least one example.")
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    low, high = _batch_range(x, rule, rule.activation_bits if bits is None else bits)
    first = state.count == 0
    keep = jnp.where(first, 0.0, 1.0 if rule.observer == "learned" else rule.decay).astype(jnp.float32)
    # Where nothing is kept the old value must not matter, not even as NaN · 0.
    seen = RangeState(
        jnp.where(first, low, keep * state.low + (1 - keep) * low),
        jnp.where(first, high, keep * state.high + (1 - keep) * high),
        state.count + 1,
        state.frozen,
    )
    return jax.tree.map(lambda old, new: jnp.where(state.frozen, old, new), state, seen)


def _batch_range(x: jax.Array, rule: QuantRule, bits: int) -> tuple[jax.Array, jax.Array]:
    if rule.activations == "unsigned":
        x = jnp.maximum(x, jnp.zeros_like(x))
    low, high = x.min(), x.max()
    if rule.observer == "percentile":
        share = jnp.asarray([100 - rule.percentile, rule.percentile], jnp.float32) / 100
        found = jnp.quantile(x.reshape(-1), share)
        return found[0], found[1]
    if rule.observer == "mse":

        def error(fraction):
            grid = activation_grid(rule.activations, fraction * low, fraction * high, bits=bits)
            return jnp.mean((dequantise(quantise(x, grid), grid) - x) ** 2)

        fractions = jnp.arange(1, 41, dtype=jnp.float32) / 40
        best = fractions[jnp.argmin(jax.lax.map(error, fractions))]
        return best * low, best * high
    return low, high


def freeze_ranges(qstate: QState, frozen: bool = True) -> QState:
    """``qstate`` with every range fixed (or released again)."""
    return {site: state._replace(frozen=jnp.asarray(frozen)) for site, state in qstate.items()}


def range_parameters(qstate: QState) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{site: (low, high)}: the differentiable part of ``qstate``, for training ranges with ``observer="learned"``."""
    return {site: (state.low, state.high) for site, state in qstate.items()}


def with_range_parameters(qstate: QState, ranges: Mapping[str, tuple[jax.Array, jax.Array]]) -> QState:
    """``qstate`` with the given (low, high), as :func:`range_parameters` returned them."""
    if ranges.keys() != qstate.keys():
        raise KeyError(f"these ranges are of another network: {sorted(ranges.keys() ^ qstate.keys())[:3]} differ.")
    return {site: state._replace(low=ranges[site][0], high=ranges[site][1]) for site, state in qstate.items()}


def check_calibrated(qstate: QState) -> None:
    """Raise ValueError unless every range has seen data, is finite and is not a single point (for use outside jit)."""
    for site, state in jax.device_get(qstate).items():
        if state.count == 0:
            raise ValueError(
                f"{site}: its range has never seen data; run apply(..., update=True) on some batches first."
            )
        if not (np.isfinite(state.low) and np.isfinite(state.high)):
            raise ValueError(f"{site}: its range [{state.low}, {state.high}] is not finite; is there NaN in the data?")
        if state.low > state.high:
            raise ValueError(f"{site}: its range [{state.low}, {state.high}] is upside down; was it trained too fast?")
        if state.low == state.high:
            rule = skipping(site.split(":")[0].split("#")[0])
            raise ValueError(
                f"{site}: its values are always {state.low}, or never positive where the rule asks for unsigned ones. "
                f"Prune the dead layer before it, let the grid be signed, or leave this layer out with {rule}."
            )
