"""Every integer of the INT8 network, as JAX and as PyTorch compute it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from ehap_jax.pruning import Scores, shrink, shrink_variables
from ehap_jax.quant import INT8, fake_quant, to_integer
from interop.parity import torch_images, torch_logits
from recipes.torch_comparison.job import Job


def compare_int8(job: Job, scores: Scores) -> list[dict[str, Any]]:
    """Do both run the same integers? The dense network, and the one that keeps the least."""
    nets, ratio = job.nets, min(job.config.ratios)
    plan = job.plan(scores, ratio)
    networks = {1.0: (nets.apply, nets.variables)}
    networks[ratio] = (shrink(nets.apply, plan), shrink_variables(nets.variables, plan))
    rows = []
    with job.progress.stage("INT8 integers", len(networks)) as advance:
        for kept, (apply, variables) in networks.items():
            row: dict[str, Any] = {"kept_channels": kept}
            try:
                row |= _same_integers(job, apply, variables)
            except NotImplementedError as error:
                row["not_comparable"] = str(error)
            rows.append(row)
            advance()
    return rows


def _same_integers(job: Job, apply: Any, variables: Any) -> dict[str, Any]:
    from interop.torch_integer import IntegerModule

    images = job.test[: job.config.int8_images]
    quantized = fake_quant(apply, rules=INT8)
    observe = jax.jit(partial(quantized.apply, update=True))
    _, ranges = observe(variables, quantized.init(variables, job.train[:1]), job.train)
    integers = to_integer(quantized, variables, ranges, example=images)
    module = IntegerModule(integers, images.shape[1:])
    ours, logits = jax.device_get(jax.jit(lambda network, x: (network.tensors(x), network(x)))(integers, images))
    theirs = {name: value.numpy() for name, value in module.tensors(torch_images(images)).items()}
    logits_torch = torch_logits(module, images)
    return {
        "integers": int(sum(value.size for value in ours.values())),
        "integers_that_differ": int(sum(np.sum(ours[name] != theirs[name]) for name in ours)),
        "logits_that_differ": int(np.sum(logits != logits_torch)),
        **job.accuracies(logits, logits_torch),
    }
