"""Are logits, gradient, Hessian-vector product and channel traces the same numbers in JAX and in PyTorch?"""

from __future__ import annotations

from typing import Any

import numpy as np

from ehap_jax.pruning import Scores, hessian_scores
from interop.parity import gradient_pair, hessian_vector_pair, logits_pair, relative, trace_pair
from recipes.torch_comparison.job import Job
from recipes.torch_comparison.scores import torch_scores


def compare_identity(job: Job) -> tuple[dict[str, Any], dict[str, Scores]]:
    """Are they the same numbers? Also the scores of both from the same probes."""
    nets, seed = job.nets, job.config.seed
    with job.progress.stage("same numbers", 1) as advance:
        ours, theirs = logits_pair(nets, job.test)
        seeds = [seed + i for i in range(job.config.same_probes)]
        traces = trace_pair(nets, job.train, job.labels, seeds)
        identity = {
            "logits_max_abs": float(np.abs(ours - theirs).max()),
            "predictions_that_differ": int(np.sum(ours.argmax(axis=1) != theirs.argmax(axis=1))),
            "gradient_relative": relative(*gradient_pair(nets, job.train, job.labels)),
            "hessian_vector_relative": relative(*hessian_vector_pair(nets, job.train, job.labels, seed)),
            "trace_relative": relative(*traces),
            **job.accuracies(ours, theirs),
        }
        advance()
    path_of = nets.info.form.path_of
    by_path = {path_of(name): value for name, value in traces[0].items() if name in traces[1]}
    scores = hessian_scores(job.graph, nets.variables, by_path)
    return identity, {"JAX": scores, "PyTorch": torch_scores(nets, traces[1], scores.norms)}
