"""The score of every channel as PyTorch computes it, and how far two rankings of the channels agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ehap_jax.pruning import Scores
from interop.parity import Arrays, Pair
from recipes.ranking import kept_overlap, spearman
from recipes.torch_comparison.job import Job


def torch_scores(nets: Pair, traces: Arrays, norms: Mapping[str, np.ndarray]) -> Scores:
    """The reference's own scores, computed by PyTorch from its traces, under JAX's paths."""
    import torch

    from interop.reference.trace import ReferenceTrace

    reference = ReferenceTrace(
        {name: torch.from_numpy(np.asarray(value))[None] for name, value in traces.items()}, torch.ones(1)
    )
    found = reference.sensitivity(nets.module)
    path_of = nets.info.form.path_of
    return Scores({path_of(name): value.double().numpy() for name, value in found.items()}, norms, "hessian")


def agreement(job: Job, found: Scores, expected: Scores) -> dict[str, Any]:
    """Rank correlation and the overlap of the kept channels at every ratio."""
    plans = {ratio: (job.plan(found, ratio), job.plan(expected, ratio)) for ratio in job.config.ratios}
    return {
        "spearman": spearman(found, expected),
        "kept_overlap": {f"{ratio:g}": kept_overlap(*both) for ratio, both in plans.items()},
    }
