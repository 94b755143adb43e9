"""Trained networks on the images they were trained on, and rankings of their channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax.curvature.probes import is_kernel

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
"""Files of github.com/akamaster's pytorch_resnet_cifar10."""

CHUNK = 16
"""Images that go through the network together: more fall out of the caches of a CPU."""


def load(data: Path, network: str, images: int):
    """The network in eval mode, its variables, and the first images of the training set with their labels."""
    from interop import from_torch
    from interop.parity import normalise

    apply, variables, info = from_torch(str(data / "akamaster" / WEIGHTS[network]))
    with np.load(data / "cifar10_lossless_subset.npz") as file:
        x, y = file["x_train"][:images], file["y_train"][:images]
    return apply, variables, (jnp.asarray(normalise(x, info)), jnp.asarray(y, jnp.int32))


def mean_loss(apply):
    """``loss(variables, (images, labels))``, the mean cross-entropy with its softmax in float32 or more."""

    def loss(variables, batch):
        x, y = batch
        logits = apply(variables, x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
        return -chosen.mean()

    return loss


def flat(tree: Any, variables: Any) -> np.ndarray:
    """The channels of all kernels one after another."""
    named = dict((path_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree))
    paths = [
        path_name(p) for p, leaf in jax.tree_util.tree_leaves_with_path(variables) if is_kernel(path_name(p), leaf)
    ]
    return np.concatenate([np.asarray(named[path], np.float64) for path in paths])


def hap_scores(trace: np.ndarray, variables: Any) -> np.ndarray:
    """Tr(H_cc) / p_c * |w_c|^2 (HAP eq. 8)."""
    kernels = [leaf for p, leaf in jax.tree_util.tree_leaves_with_path(variables) if is_kernel(path_name(p), leaf)]
    weights = [np.mean(np.asarray(k, np.float64) ** 2, axis=tuple(range(k.ndim - 1))) for k in kernels]
    return trace * np.concatenate(weights)


def spearman(found: np.ndarray, exact: np.ndarray) -> float:
    """Rank correlation; equal values rank by their place."""

    def ranks(x):
        order = np.empty(len(x))
        order[np.argsort(x, kind="stable")] = np.arange(len(x))
        return order

    return float(np.corrcoef(ranks(found), ranks(exact))[0, 1])


def lowest_sets(found: np.ndarray, exact: np.ndarray, fraction: float) -> tuple[set[int], set[int]]:
    """The channels that each of the two would prune."""
    first, second = (set(np.argsort(x, kind="stable")[: int(fraction * len(x))].tolist()) for x in (found, exact))
    return first, second


def quality(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Spearman's rank correlation and the overlap (intersection over union) of the lowest 30 %."""
    ours, theirs = lowest_sets(found, exact, 0.3)
    return {"spearman": spearman(found, exact), "overlap_30": len(ours & theirs) / len(ours | theirs)}
