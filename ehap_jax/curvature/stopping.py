"""When to stop probing, and how to divide a budget between probes and mini-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ehap_jax.curvature.agreement import common_lowest, scores_and_errors
from ehap_jax.curvature.estimate import TraceEstimate

__all__ = ["VarianceParts", "expected_misplaced", "split_variance", "stable_decision"]

PyTree = Any


def expected_misplaced(scores: np.ndarray, sems: np.ndarray, count: int, pruned: int) -> float:
    """The expected number of channels that lie on the wrong side of the pruning threshold.

    Those that are among the ``pruned`` lowest by score and not in truth, and as many the other way round. Scores are
    spread out by their noise, so the truth is not looked for around every score: it is drawn from the posterior that
    `expected_agreement` has, and so is the threshold.

    Args:
      scores: ``(channels,)``, the lowest are pruned.
      sems: ``(channels,)``, their standard errors; 0 is a channel known exactly.
      count: the number of probes.
      pruned: how many channels are pruned, more than none and fewer than all.

    Returns:
      A number of channels.

    Raises:
      ValueError: ``pruned`` out of range; arrays of different shapes; fewer than two probes.

    >>> expected_misplaced(np.array([0.0, 2.0, 9.0]), np.array([0.1, 0.1, 1.0]), count=50, pruned=1)
    0.0
    """
    scores, sems = np.asarray(scores, np.float64), np.asarray(sems, np.float64)
    if scores.shape != sems.shape or scores.ndim != 1:
        raise ValueError(f"scores and sems must be vectors of one length; got {scores.shape} and {sems.shape}")
    if not 0 < pruned < scores.size:
        raise ValueError(f"pruned must be between 1 and {scores.size - 1}; got {pruned}")
    return 2 * (pruned - common_lowest(scores, sems, count, pruned))


def stable_decision(params: PyTree, *, prune: float, tolerance: float = 0.01) -> Callable[[TraceEstimate], bool]:
    """A rule for ``channel_trace(..., until=)``: stop when which channels to prune has settled.

    Channels are scored as ``Tr(H_cc) / p_c * ||w_c||^2`` (HAP eq. 8) and ranked over all probed leaves together.
    The rule is true once `expected_misplaced` is at most ``tolerance`` times the number of channels. Traces may
    be imprecise far from the threshold, where it does not matter; near it probes are many (on a small trained network
    a tolerance of 0.1 was not met by 200, ``python -m benchmarks.stopping``). Unlike a running mean that has happened
    to settle, the rule knows how wrong it may still be.

    Args:
      params: the parameters the trace is of.
      prune: the fraction of channels that will be pruned, between 0 and 1.
      tolerance: the accepted fraction of misplaced channels.

    Returns:
      The rule; it is false while there are fewer than two probes or two channels.

    Raises:
      ValueError: ``prune`` or ``tolerance`` not between 0 and 1.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.curvature import channel_trace
    >>> p = {"kernel": jnp.array([[1.0, 2.0], [1.0, 2.0]])}
    >>> trace = channel_trace(
    ...     lambda p, x: ((x @ p["kernel"]) ** 2).sum(1).mean(), p, jnp.eye(2),
    ...     key=jax.random.key(0), num_probes=500, until=stable_decision(p, prune=0.5),
    ... )
    >>> trace.count
    16
    """
    for name, value in (("prune", prune), ("tolerance", tolerance)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is a fraction between 0 and 1; got {value}")

    def settled(estimate: TraceEstimate) -> bool:
        score, sem = scores_and_errors(estimate, params)
        if score.size < 2 or not np.isfinite(sem).all():
            return False
        pruned = min(max(round(prune * score.size), 1), score.size - 1)
        return expected_misplaced(score, sem, estimate.count, pruned) <= tolerance * score.size

    return settled


class VarianceParts(NamedTuple):
    """Where the uncertainty of a total trace comes from.

    Attributes:
      probe: variance over probes, of one probe on one mini-batch.
      batch: variance over mini-batches, of the exact trace of one mini-batch. An estimate: it is 0 where the
        mini-batches differ less than their probes explain.
    """

    probe: float
    batch: float

    def variance(self, batches: int, probes: int) -> float:
        """The variance of the mean over ``batches`` mini-batches with ``probes`` probes each."""
        return (self.batch + self.probe / probes) / batches

    def best_probes(self, batch_cost: float) -> int:
        """Probes per mini-batch that give the least variance for a budget.

        Args:
          batch_cost: what a new mini-batch costs (loading, transfer), in units of one probe's time. Where it costs
            nothing, one probe per mini-batch is best; the rule is ``sqrt(batch_cost * probe / batch)``.

        Returns:
          A number of probes, at least 1.

        Raises:
          ValueError: ``batch_cost`` is negative.

        >>> VarianceParts(probe=100.0, batch=4.0).best_probes(batch_cost=9.0)
        15
        """
        if batch_cost < 0:
            raise ValueError(f"batch_cost must not be negative; got {batch_cost}")
        if self.probe == 0 or batch_cost == 0:
            return 1
        return max(1, round(min(math.sqrt(batch_cost * self.probe / max(self.batch, 1e-30)), 1e9)))


def split_variance(estimates: Sequence[TraceEstimate]) -> VarianceParts:
    """Split the variance of ``total()`` into probes and mini-batches (one-way random-effects analysis of variance).

    Args:
      estimates: of two or more mini-batches of one size, each with its own key and the same number of probes,
        two or more.

    Returns:
      The `VarianceParts`: the variance of one probe, and what mini-batches differ beyond it, which is not negative.

    Raises:
      ValueError: fewer than two estimates, or unequal or too few probes.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.curvature import channel_trace
    >>> loss = lambda p, x: 0.5 * ((x @ p["w"]) ** 2).sum(1).mean()
    >>> batches, keys = jnp.array([[[1.0]], [[3.0]]]), jax.random.split(jax.random.key(0))
    >>> traces = [
    ...     channel_trace(loss, {"w": jnp.ones((1, 1))}, x, key=k, num_probes=2)
    ...     for x, k in zip(batches, keys, strict=True)
    ... ]
    >>> split_variance(traces)
    VarianceParts(probe=0.0, batch=32.0)
    """
    counts = {estimate.count for estimate in estimates}
    if len(estimates) < 2 or len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            "give at least two estimates with the same number of probes, two or more; "
            f"got {len(estimates)} with {sorted(counts)}"
        )
    n = counts.pop()
    within = float(np.mean([estimate.total_sem() ** 2 * n for estimate in estimates]))
    between = float(np.var([estimate.total() for estimate in estimates], ddof=1))
    return VarianceParts(probe=within, batch=max(0.0, between - within / n))
