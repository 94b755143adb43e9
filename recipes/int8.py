"""Quantisation-aware training as a stage of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ehap_jax import INT8, Quantized, fake_quant
from ehap_jax.quant import QState, check_calibrated, quantized_bytes
from recipes.lab import Lab, Phase, train, training_batch


class Int8Network(NamedTuple):
    """A fake-quantised network.

    apply: ``apply(variables, x) -> logits`` with fixed ranges. variables: {"variables": float weights, "ranges": the
    ranges of the activations}. bytes: of its stored integers. quantized: the functions behind it.
    """

    apply: Callable
    variables: dict[str, Any]
    bytes: int
    quantized: Quantized


def calibrate(lab: Lab, quantized: Quantized, variables: dict[str, Any], images: int, batch_size: int = 128) -> QState:
    """Ranges of the activations from the first training images, in batches."""
    x, _ = training_batch(lab.dataset, images)
    observe = jax.jit(partial(quantized.apply, update=True))
    ranges = quantized.init(variables, x[:1])
    for start in range(0, images, batch_size):
        _, ranges = observe(variables, ranges, x[start : start + batch_size])
    check_calibrated(ranges)
    return ranges


def int8_network(lab: Lab, quantized: Quantized, variables: dict[str, Any], ranges: QState) -> Int8Network:
    """A fake-quantised network with fixed ranges."""

    def frozen(both, x):
        return quantized.apply(both["variables"], both["ranges"], x, update=False)[0]

    size = quantized_bytes(quantized.function, variables, jnp.zeros((1, *lab.dataset.image_shape)))
    return Int8Network(frozen, {"variables": variables, "ranges": ranges}, size, quantized)


def train_int8(
    lab: Lab,
    seed: int,
    apply: Callable,
    variables: dict[str, Any],
    phase: Phase,
    stage: str = "int8",
    *,
    calibrated: QState | None = None,
    observed: float = 1.0,
) -> Int8Network:
    """Quantisation-aware training with BatchNorm folded.

    Ranges start from `calibrated`, or from the first batch; the batches of the first `observed` share of the training
    move them, then they are frozen.
    """
    quantized = fake_quant(apply, rules=INT8)
    example = jnp.zeros((1, *lab.dataset.image_shape))
    ranges = quantized.init(variables, example) if calibrated is None else calibrated
    seen = 0 if calibrated is None else max(int(state.count) for state in calibrated.values())
    last = seen + round(observed * phase.epochs * (len(lab.dataset.x_train) // phase.batch_size))

    def trainable(everything, x):
        state = {name: value for name, value in everything.items() if name != "ranges"}
        ranges = {name: old._replace(frozen=old.count >= last) for name, old in everything["ranges"].items()}
        logits, now = quantized.apply(state, ranges, x, update=True)
        return logits, {"ranges": now}

    found = train(lab, stage, seed, trainable, {**variables, "ranges": ranges}, phase)
    check_calibrated(found["ranges"])
    weights = {name: value for name, value in found.items() if name != "ranges"}
    return int8_network(lab, quantized, weights, found["ranges"])
