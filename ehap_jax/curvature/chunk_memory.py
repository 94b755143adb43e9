"""How much memory exact traces and removal costs need per example, and so how many examples go together."""

from __future__ import annotations

import math

import jax.numpy as jnp

from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.taps import Taps
from ehap_jax.graph.trace import Body

__all__ = ["bytes_of_passes", "bytes_of_traces", "examples_together"]

DEFAULT_BUDGET = 2**30

CPU_EXAMPLES = 16
"""Beyond this the arrays of a CIFAR ResNet fall out of a CPU's caches."""

COTANGENTS = 5
"""Cotangents of one size that are alive at once between two sites."""

EXTREMES = {"reduce_window_max": 16, "reduce_window_min": 16}
"""The same at a max-pool: XLA expands its gradient to the places of all elements in their windows."""

HEAD_ARRAYS = 4
"""Arrays as large as what the head makes that are alive at once."""


def bytes_of_traces(taps: Taps, columns: int, formed_columns: int, policy: Policy) -> int:
    """What the arrays of one example take when kernels' gradients are squared, by estimate.

    Args:
      columns: cotangents that go backward together.
      formed_columns: columns of the head's root that are formed at once besides.
    """
    item, wide = jnp.dtype(policy.compute).itemsize, jnp.dtype(policy.sums).itemsize
    backward, largest = 0, 0
    for site in taps.sites:
        positions, groups, read, channels = site.sizes
        outputs = columns * positions * groups * channels
        gram = groups * positions * positions + outputs
        inner = gram if site.uses_gram and site.direct else columns * groups * read * channels
        backward += outputs
        largest = max(largest, positions * groups * read * item + inner * wide)
    copies = sum(math.prod(taps.graph.leaves[path].shape) for path in taps.untapped) * (columns + 1)
    return bytes_of_passes(taps.body, columns, formed_columns, policy) + (backward + copies) * item + largest


def bytes_of_passes(body: Body, columns: int, formed_columns: int, policy: Policy) -> int:
    """What one example takes on the way forward through ``body`` and, ``columns`` times, backward."""
    item, wide = jnp.dtype(policy.compute).itemsize, jnp.dtype(policy.sums).itemsize
    forward, passing = 0, 0
    for node in body.walk():
        forward += sum(math.prod(out.shape) for out in node.outputs)
        widest = node.inputs[0] if node.name in EXTREMES else node.outputs[0] if node.outputs else None
        if widest is not None:
            passing = max(passing, EXTREMES.get(node.name, COTANGENTS) * math.prod(widest.shape))
    head = HEAD_ARRAYS * (columns + formed_columns) * math.prod(body.outputs[0].shape)
    return max((forward + columns * passing) * item + head * wide, 1)


def examples_together(each: int, microbatch: int | None, budget: int | None, on_cpu: bool) -> int:
    """``microbatch``, or as many examples of ``each`` so many bytes as the budget allows; fewer on a CPU.

    Raises:
      ValueError: the budget that is given does not allow ``microbatch`` examples, or one.
    """
    least = microbatch or 1
    if budget is not None and each * least > budget:
        raise ValueError(
            f"memory_budget={budget}: {least} {'example needs' if least == 1 else 'examples at a time need'} about "
            f"{each * least} bytes" + (f"; microbatch={int(budget // each)} fits" if budget >= each else "")
        )
    if microbatch is not None:
        return microbatch
    affordable = max(1, int((DEFAULT_BUDGET if budget is None else budget) // each))
    return min(affordable, CPU_EXAMPLES) if on_cpu else affordable
