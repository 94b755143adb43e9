"""Quantisation-aware training as a stage of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from ehap_jax import INT8, fake_quant
from ehap_jax.quant import check_calibrated, quantized_bytes
from recipes.lab import Lab, Phase, train


class Int8Network(NamedTuple):
    """A fake-quantised network. apply: ``apply(variables, x) -> logits`` with fixed ranges, where `variables` is

    {"variables": float weights, "ranges": the ranges of the activations}; bytes: of its stored integers."""

    apply: Callable
    variables: dict[str, Any]
    bytes: int


def train_int8(
    lab: Lab, seed: int, apply: Callable, variables: dict[str, Any], phase: Phase, stage: str = "int8"
) -> Int8Network:
    """Quantisation-aware training with BatchNorm folded; the first batch sets the ranges, the others move them."""
    quantized = fake_quant(apply, rules=INT8)
    example = jnp.zeros((1, *lab.dataset.image_shape))
    ranges = quantized.init(variables, example)

    def trainable(everything, x):
        state = {name: value for name, value in everything.items() if name != "ranges"}
        logits, now = quantized.apply(state, everything["ranges"], x, update=True)
        return logits, {"ranges": now}

    def frozen(both, x):
        return quantized.apply(both["variables"], both["ranges"], x, update=False)[0]

    found = train(lab, stage, seed, trainable, {**variables, "ranges": ranges}, phase)
    check_calibrated(found["ranges"])
    weights = {name: value for name, value in found.items() if name != "ranges"}
    both = {"variables": weights, "ranges": found["ranges"]}
    return Int8Network(frozen, both, quantized_bytes(apply, weights, example))
