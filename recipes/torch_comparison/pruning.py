"""The pruned network in JAX and in PyTorch: by the same plan, and ranked and pruned by each framework alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ehap_jax.pruning import Scores, mask_variables, shrink_variables
from interop.forms import RESNET
from interop.parity import torch_logits
from interop.to_torch import to_torch
from recipes.torch_comparison.job import Job


def pruned_accuracies(job: Job, criteria: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Test accuracy after pruning in both frameworks, and how far their logits differ."""
    from interop.torch_models import load

    rows = []
    forward = jax.jit(job.nets.apply)
    with job.progress.stage("pruned accuracy", len(criteria) * len(job.config.ratios)) as advance:
        for ratio in job.config.ratios:
            for criterion, scores in criteria.items():
                plan = job.plan(scores, ratio)
                ours = np.asarray(forward(mask_variables(job.nets.variables, plan), job.test))
                module = load(to_torch(shrink_variables(job.nets.variables, plan), plan))
                theirs = torch_logits(module, job.test)
                rows.append(
                    {
                        "kept_channels": ratio,
                        "criterion": criterion,
                        **job.accuracies(ours, theirs),
                        "logits_max_abs": float(np.abs(ours - theirs).max()),
                    }
                )
                advance()
    return rows


def compare_method(job: Job, jax_scores: Scores, torch_scores: Scores) -> list[dict[str, Any]]:
    """Ranking and pruning in each framework by its own scores, where `interop.reference.union` has them; else nothing.

    PyTorch starts from the full network and its scores, and knows nothing of JAX's graph, plan or weights.
    """
    nets, config = job.nets, job.config
    if config.coupling != "union" or nets.info.form is not RESNET:
        return []
    import torch

    from interop.reference.union import prune_union

    names = {path: nets.info.form.key_at(path).removesuffix(".weight") for path in torch_scores.values}
    names = {path: name for path, name in names.items() if name != "linear"}
    own = {name: torch.from_numpy(torch_scores.values[path]) for path, name in names.items()}
    forward, rows = jax.jit(nets.apply), []
    with job.progress.stage("pruned by each framework", len(config.ratios)) as advance:
        for ratio in config.ratios:
            plan = job.plan(jax_scores, ratio)
            ours = np.asarray(forward(mask_variables(nets.variables, plan), job.test))
            kept = torch_kept(own, ratio)
            theirs = torch_logits(prune_union(nets.module, kept), job.test)
            rows.append(
                {
                    "kept_channels": ratio,
                    "channels_that_differ": sum(
                        len(np.setxor1d(plan.keep.get(path, np.arange(len(own[name]))), kept[name].numpy()))
                        for path, name in names.items()
                    ),
                    "logits_max_abs": float(np.abs(ours - theirs).max()),
                    **job.accuracies(ours, theirs),
                }
            )
            advance()
    return rows


def torch_kept(scores: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """What PyTorch keeps, at most this part of all: what layers at their limit keep beyond it, others give up.

    Scores of exactly zero are of dead channels, which go before those estimated to be negative, as in `allocate`.
    """
    from interop.reference.union import kept_channels

    scores = {name: values.masked_fill(values == 0, -np.inf) for name, values in scores.items()}
    total = sum(len(values) for values in scores.values())
    most = int(ratio * total + 1e-9)
    for asked in range(most, 0, -1):
        kept = kept_channels(scores, asked / total)
        if sum(map(len, kept.values())) <= most:
            return kept
    raise ValueError(f"PyTorch cannot keep as few as {ratio:g} of the channels: every layer keeps some")
