"""What a ranking by estimated traces is worth, told from the estimate alone.

Noise spreads scores out, so adding more noise to them and comparing would flatter them. The true scores are modelled
as ``theta_c = u_c * sd_c``, sd_c the standard deviation of one probe at channel c and u_c drawn from one distribution
for all channels, which is fitted to the estimates by maximum likelihood without assuming its form (Kiefer and Wolfowitz
1956, Ann. Math. Statist. 27(4)); it may be negative, as traces of a Hessian may. Draws from the posterior of theta are
then ranked against the estimates. The relative noise of a probe varies little between channels, which is what makes one
distribution of u enough.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax.curvature.estimate import TraceEstimate

__all__ = ["Agreement", "agreement_of_scores", "common_lowest", "expected_agreement", "scores_and_errors"]

PyTree = Any

GRID = 100
"""Positive values of u, spaced geometrically; their negatives and 0 are the others."""

FITTING_STEPS = 300
"""Of expectation maximisation; the likelihood is convex in the weights of the grid, and this brings it close."""

FITTED = 1000
"""To about so many estimates the distribution is fitted: if there are more, to every n-th in order of size."""

DRAWS = 32


class Agreement(NamedTuple):
    """How an estimated ranking agrees with the ranking by true traces, as far as standard errors tell.

    Attributes:
      rank_correlation: Spearman's.
      overlap: of the sets that are pruned: intersection over union.
      pruned: the number of channels in each of them.
    """

    rank_correlation: float
    overlap: float
    pruned: int


def expected_agreement(estimate: TraceEstimate, params: PyTree, *, prune: float = 0.5) -> Agreement:
    """The expected rank correlation of HAP scores with their limit of infinitely many probes, and the overlap.

    Scores are ``Tr(H_cc) / p_c * ||w_c||^2`` (HAP eq. 8), ranked over all probed leaves together. On trained
    ResNet-20 and ResNet-32 both numbers are within 0.13 of the truth after 10 probes and within 0.05 from 100 on, and
    mostly too high (``python -m benchmarks.exact_trace``; docs/exact_traces.md has the table).

    Args:
      estimate: of `channel_trace`, with at least two probes, or an exact one.
      params: the parameters it is of.
      prune: the fraction of channels that would be pruned, between 0 and 1.

    Returns:
      An `Agreement`; of an exact trace, a perfect one.

    Raises:
      ValueError: fewer than two probes; ``prune`` not between 0 and 1.

    >>> import jax.numpy as jnp
    >>> from ehap_jax.curvature import channel_trace
    >>> p = {"kernel": jnp.array([[1.0, 2.0], [1.0, 2.0]])}
    >>> trace = channel_trace(
    ...     lambda p, x: ((x @ p["kernel"]) ** 2).sum(1).mean(), p, jnp.eye(2), key=jax.random.key(0), num_probes=4
    ... )
    >>> expected_agreement(trace, p)
    Agreement(rank_correlation=1.0, overlap=1.0, pruned=1)
    """
    scores, sems = scores_and_errors(estimate, params)
    return agreement_of_scores(scores, sems, estimate.count, prune=prune)


def agreement_of_scores(scores: np.ndarray, sems: np.ndarray, count: int, *, prune: float) -> Agreement:
    """`expected_agreement` of any scores with known standard errors.

    Args:
      scores, sems: ``(channels,)``; a standard error of 0 is a score known exactly.
      count: the number of probes; with few, the standard errors themselves are uncertain (Student's t).
      prune: the fraction with the lowest scores.

    Returns:
      An `Agreement`.

    Raises:
      ValueError: fewer than two probes; ``prune`` not between 0 and 1.

    >>> agreement_of_scores(np.array([1.0, 2.0, 30.0]), np.array([0.0, 0.0, 0.1]), 50, prune=0.4)
    Agreement(rank_correlation=1.0, overlap=1.0, pruned=1)
    """
    from scipy.stats import rankdata  # importing it takes longer than importing all of ehap_jax

    if not 0 < prune < 1:
        raise ValueError(f"prune is a fraction between 0 and 1; got {prune}")
    truths = _drawn_truths(scores, sems, count)
    pruned = min(max(round(prune * scores.size), 1), scores.size - 1)
    if not sems.any():
        return Agreement(1.0, 1.0, pruned)
    ranks = rankdata(scores)
    correlations = [np.corrcoef(rankdata(truth), ranks)[0, 1] for truth in truths]
    common = _common(truths, scores, sems, pruned)
    return Agreement(float(np.mean(correlations)), float(np.mean(common / (2 * pruned - common))), pruned)


def common_lowest(scores: np.ndarray, sems: np.ndarray, count: int, pruned: int) -> float:
    """The expected number of channels that are among the ``pruned`` lowest both by scores and in truth.

    Arguments and errors as for `agreement_of_scores`.
    """
    return float(np.mean(_common(_drawn_truths(scores, sems, count), scores, sems, pruned)))


def _drawn_truths(scores: np.ndarray, sems: np.ndarray, count: int) -> np.ndarray:
    """(`DRAWS`, channels) true scores, drawn from their posterior."""
    if not np.isfinite(sems).all():
        raise ValueError(f"standard errors need at least two probes; there are {count}")
    truths, noisy = np.tile(scores, (DRAWS, 1)), sems > 0
    if noisy.any():
        posterior, grid = _posterior(scores[noisy] / sems[noisy], count)
        cumulative, rng = posterior.cumsum(1), np.random.default_rng(0)
        for truth in truths:
            drawn = (cumulative < rng.uniform(size=(len(cumulative), 1))).sum(1)
            truth[noisy] = grid[np.minimum(drawn, grid.size - 1)] * sems[noisy]
    return truths


def _common(truths: np.ndarray, scores: np.ndarray, sems: np.ndarray, pruned: int) -> np.ndarray:
    """(draws,): how many of the ``pruned`` lowest scores are among the lowest of each row of ``truths``."""
    rng, chosen = np.random.default_rng(1), np.zeros(scores.size, bool)
    chosen[np.argsort(scores, kind="stable")[:pruned]] = True
    found = []
    for truth in truths:
        # Draws of exactly zero are ties, of which none is likelier to come first; known scores keep their order.
        ties = rng.uniform(size=truth.size)
        ties[sems == 0] = np.sort(ties[sems == 0])
        found.append(chosen[np.lexsort((ties, truth))[:pruned]].sum())
    return np.array(found)


def scores_and_errors(estimate: TraceEstimate, params: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """HAP scores of all channels of all probed leaves, one after another, and their standard errors, in float64."""
    weights, means, errors = (
        {path_name(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, estimate.mean, estimate.sem)
    )
    factors = {}
    for path, axes in estimate.axes.items():
        w = weights[path]
        factors[path] = (w**2).mean(tuple(a for a in range(w.ndim) if a not in axes))
    scores, sems = ([(part[path] * factors[path]).ravel() for path in means] for part in (means, errors))
    return np.concatenate(scores), np.concatenate(sems)


def _posterior(z: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(channels, grid) probabilities of the true score in units of its standard error, and the grid."""
    positive = np.geomspace(1e-3, 1.2 * max(np.abs(z).max(), 1.0), GRID)
    grid = np.concatenate([-positive[::-1], [0.0], positive])
    likelihood = _likelihood(np.sort(z)[:: 1 + z.size // FITTED], grid, count)
    prior = np.gradient(grid) / np.gradient(grid).sum()  # at first all values are equally likely
    for _ in range(FITTING_STEPS):
        prior *= (1 / (likelihood @ prior)) @ likelihood / len(likelihood)
    posterior = _likelihood(z, grid, count) * prior
    return posterior / posterior.sum(1, keepdims=True), grid


def _likelihood(z: np.ndarray, grid: np.ndarray, count: int) -> np.ndarray:
    """(z, grid), each row up to a factor: Student's t, for the standard errors come from the same probes."""
    likelihood = (1 + (z[:, None] - grid[None, :]) ** 2 / (count - 1)) ** (-count / 2)
    return likelihood / likelihood.max(1, keepdims=True)
