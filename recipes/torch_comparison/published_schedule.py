"""What EHAP's released half-precision schedule does to the ranking, beside probes that all weigh the same.

The released code (arXiv 2306.07030) gives probe i the weight 2^(16 - 8i). Both schedules are given the same probes and
compared with a reference: the exact trace, or the mean of many other probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax.curvature import channel_trace, gauss_newton_trace, is_kernel, rademacher
from ehap_jax.pruning import Scores, hessian_scores
from interop.parity import torch_batch
from recipes.torch_comparison.job import Job
from recipes.torch_comparison.scores import agreement, torch_scores

VANISHED_AFTER = 20
"""The published scale of probe i is 2^(16 - 8i), which float32 rounds to 0 from i = 21 on."""


def reference_scores(job: Job) -> tuple[str, Scores]:
    """How the reference was found, and its scores."""
    config, nets = job.config, job.nets
    if config.reference != "probes":
        try:
            with job.progress.stage("exact trace", 1) as advance:
                trace = gauss_newton_trace(nets.apply, nets.variables, job.batch)
                advance()
            return "exact", hessian_scores(job.graph, nets.variables, trace)
        except ValueError:
            if config.reference == "exact":
                raise
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    with job.progress.stage("reference probes", 1) as advance:
        trace = channel_trace(
            nets.loss, nets.variables["params"], job.batch, key=key, num_probes=config.reference_probes
        )
        advance()
    return f"{config.reference_probes} probes", hessian_scores(job.graph, nets.variables, trace)


def fixed_scores(job: Job) -> dict[int, Scores]:
    """Number of probes -> scores, every probe weighing the same: each estimate goes on from the one before."""
    params, state, found = job.nets.variables["params"], None, {}
    counts = sorted(set(job.config.probes))
    with job.progress.stage("fixed schedule", counts[-1]) as advance:
        done = 0
        for count in counts:
            key = jax.random.key(job.config.seed)
            trace = channel_trace(job.nets.loss, params, job.batch, key=key, num_probes=count, state=state)
            state, found[count] = trace.state, hessian_scores(job.graph, job.nets.variables, trace)
            advance(count - done)
            done = count
    return found


def published_scores(job: Job, norms: Mapping[str, np.ndarray]) -> tuple[dict[int, Scores], float]:
    """Number of probes -> scores by the published schedule in PyTorch from the same probes; the first one's weight.

    Later probes than `VANISHED_AFTER` have the scale 0 and are not computed: they add exact zeros.
    """
    from interop.reference.trace import published_trace

    counts = sorted(set(job.config.probes))
    computed = min(counts[-1], VANISHED_AFTER)
    with job.progress.stage("published schedule", computed) as advance:

        def probes():
            for i in range(computed):
                yield same_probe(job, i)
                advance()

        trace = published_trace(job.nets.module, *torch_batch(job.train, job.labels), probes())
    found = {}
    for count in counts:
        means = {name: (p[:count].double().sum(dim=0) / count).numpy() for name, p in trace.products.items()}
        found[count] = torch_scores(job.nets, means, norms)
    return found, float(trace.weights[0] / trace.weights.sum())


def same_probe(job: Job, index: int) -> dict[str, Any]:
    """Probe `index` of `channel_trace` as PyTorch tensors."""
    import torch

    params = jax.tree_util.tree_leaves_with_path(job.nets.variables["params"])
    kernels = {path_name(path): leaf for path, leaf in params if is_kernel(path_name(path), leaf)}
    drawn = rademacher(jax.random.fold_in(jax.random.key(job.config.seed), index), kernels)
    named = job.nets.named(drawn)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in named.items()}


def compare_schedules(
    job: Job, fixed: Mapping[int, Scores], published: Mapping[int, Scores], reference: Scores
) -> list[dict[str, Any]]:
    """Per number of probes: how far either schedule agrees with the reference, and the two with each other."""
    return [
        {
            "probes": count,
            "fixed": agreement(job, scores, reference),
            "published": agreement(job, published[count], reference),
            "same_kept_as_fixed": agreement(job, published[count], scores)["kept_overlap"],
        }
        for count, scores in fixed.items()
    ]
