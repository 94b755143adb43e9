"""Networks of which there are no trained weights at hand: drawn from a seed, wholly or the head alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.trained import load
from ehap_jax.models import eval_apply, init_variables, make_model, train_apply
from ehap_jax.models.layers import BATCH_NORM_MOMENTUM

DRAWN = {
    "resnet56": "weights drawn from a seed, BatchNorm statistics of the images",
    "wrn28-8": "weights drawn from a seed, BatchNorm statistics of the images",
    "resnet20-100": "akamaster's trained ResNet-20 with a head of 100 classes drawn from a seed",
}
SEED = 56


def draw(data: Path, network: str, images: int):
    """One of `DRAWN`, as `benchmarks.trained.load` returns it; the labels stay those of CIFAR-10."""
    _, trained, batch = load(data, "resnet20", images)
    if network == "resnet20-100":
        return eval_apply(make_model("resnet20", 100, shortcut="A")), with_new_head(trained, 100), batch
    module = make_model(network, 10)
    variables = init_variables(module, jax.random.key(SEED), batch[0].shape[1:])
    return eval_apply(module), with_statistics_of(module, variables, batch[0]), batch


def with_statistics_of(module: Any, variables: Any, x: jax.Array) -> Any:
    """Variables whose BatchNorm statistics are those of the batch ``x``, so that no activation explodes.

    A training step moves running statistics a known part of the way to the batch's.
    """
    moved = jax.jit(train_apply(module))(variables, x)[1]["batch_stats"]
    part = 1 - BATCH_NORM_MOMENTUM
    whole = jax.tree.map(lambda old, new: old + (new - old) / part, variables["batch_stats"], moved)
    return {**variables, "batch_stats": whole}


def with_new_head(variables: Any, classes: int) -> Any:
    """Variables with a head of ``classes`` logits, its weights as large as the trained ones."""
    old = np.asarray(variables["params"]["linear"]["kernel"])
    kernel = old.std() * np.random.default_rng(SEED).normal(size=(old.shape[0], classes))
    head = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(classes, jnp.float32)}
    return {**variables, "params": {**variables["params"], "linear": head}}
