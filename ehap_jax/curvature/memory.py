"""Which way to compute products, from the memory it needs and the memory there is."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ehap_jax.curvature.problem import Problem
from ehap_jax.curvature.products import linearize

__all__ = ["choose_method", "free_memory", "residual_bytes"]

SHARE_OF_FREE_MEMORY = 0.5
METHODS = ("auto", "linearize", "jvp")


def residual_bytes(loss, problem: Problem) -> tuple[int, int]:
    """Bytes of residuals that linearising keeps: of all chunks together, and of the largest. Nothing is run.

    Identical arrays that the compiler would share are counted apart, so this is an upper bound.
    """
    sizes = {}
    for chunk in problem.chunks:
        shape = tuple(x.shape for x in jax.tree.leaves(chunk))
        if shape not in sizes:
            scale = jnp.ones((), problem.layout.policy.sums)
            linear = jax.eval_shape(
                lambda leaves, c, s: linearize(loss, problem.layout, leaves, c, s).arrays,
                problem.leaves,
                chunk,
                scale,
            )
            sizes[shape] = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(linear))
    total = sum(sizes[tuple(x.shape for x in jax.tree.leaves(chunk))] for chunk in problem.chunks)
    return total, max(sizes.values())


def free_memory(device: Any) -> int:
    """Bytes that are free on an accelerator, or in this machine or container for the CPU."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def choose_method(method: str, memory_budget: int | None, loss, problem: Problem) -> str:
    """``"linearize"`` or ``"jvp"``.

    Linearising is chosen if the residuals of all chunks, and the same again of the largest chunk for what a probe
    writes while it runs, are within ``memory_budget`` bytes; by default half of what is free.

    Raises:
      ValueError: an unknown method, or a budget that is not positive.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget is a positive number of bytes; got {memory_budget}")
    if method != "auto":
        return method
    if memory_budget is None:
        memory_budget = int(SHARE_OF_FREE_MEMORY * free_memory(next(iter(problem.leaves[0].devices()))))
    total, largest = residual_bytes(loss, problem)
    return "linearize" if total + largest <= memory_budget else "jvp"
