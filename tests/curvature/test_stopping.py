"""Stopping rules: the decision rule against simulation and exact traces, beside the running-mean rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ehap_jax.curvature import (
    Policy,
    VarianceParts,
    channel_trace,
    expected_misplaced,
    split_variance,
    stable_decision,
)
from ehap_jax.curvature.probes import rademacher


def squares(p, batch):
    """A quadratic form in every output channel; channel c has its own curvature ``gain[c]``."""
    y = batch @ p["kernel"]
    return 0.5 * (y**2 * p["gain"][None, :]).sum(1).mean()


def squares_problem(channels=30, seed=0):
    rng = np.random.default_rng(seed)
    batch = rng.normal(size=(16, 8))
    gain = np.linspace(0.5, 4.0, channels)
    params = {"kernel": jnp.ones((8, channels)), "gain": jnp.asarray(gain, jnp.float32)}
    return params, jnp.asarray(batch, jnp.float32), gain * np.trace(batch.T @ batch) / 16


@pytest.mark.parametrize("count", [30, 100, 300])
@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_expected_misplaced_is_what_noise_misplaces(spread, count):
    """True scores, then noisy ones: noise spreads scores out, so they look better separated than they are."""
    rng, channels, pruned = np.random.default_rng(count), 600, 300
    excess = []
    for _ in range(12):
        truth = np.exp(spread * rng.normal(size=channels))
        sems = 6 * truth / np.sqrt(count) * np.sqrt(rng.chisquare(count - 1, channels) / (count - 1))
        scores = truth + 6 * truth / np.sqrt(count) * rng.normal(size=channels)
        low = [set(np.argsort(x)[:pruned].tolist()) for x in (truth, scores)]
        excess.append(expected_misplaced(scores, sems, count, pruned) - len(low[0] ^ low[1]))
    # Chance, by what it varies, and 2 % of all channels for a prior that is fitted to the same scores.
    assert abs(np.mean(excess)) < 0.02 * channels + 3 * stats.sem(excess)


def test_expected_misplaced_of_channels_known_exactly():
    assert expected_misplaced(np.array([0.0, 0.0, 1.0]), np.zeros(3), 9, 1) == 0
    assert expected_misplaced(np.array([0.0, 0.0, 1.0, 5.0]), np.array([0.0, 0.0, 0.1, 0.1]), 99, 1) == 0
    # Of scores that are all noise half are misplaced: hypergeometric, with a standard deviation of 2 * 5 / sqrt(32).
    assert abs(expected_misplaced(np.zeros(400), np.ones(400), 9, 200) - 200) < 3 * 10 / np.sqrt(32)


@pytest.mark.slow
def test_the_decision_rule_keeps_its_promise(loop_on_device):
    """Over 40 keys, the channels really misplaced average at most the tolerance (with a binomial margin)."""
    params, batch, exact = squares_problem()
    tolerance, pruned, wrong, counts = 0.05, 15, [], []
    for key in jax.random.split(jax.random.key(0), 40):
        found = channel_trace(
            squares,
            params,
            batch,
            key=key,
            num_probes=2000,
            probes_per_step=16,
            select=lambda path, leaf: path == "kernel",
            until=stable_decision(params, prune=0.5, tolerance=tolerance),
        )
        chosen = set(np.argsort(np.asarray(found.mean["kernel"]))[:pruned].tolist())
        wrong.append(len(chosen - set(np.argsort(exact)[:pruned].tolist())) * 2 / 30)
        counts.append(found.count)
    assert np.mean(wrong) <= tolerance + stats.norm.isf(1e-3) * np.std(wrong) / np.sqrt(40)
    assert max(counts) < 2000 and min(counts) >= 16
    loose = stable_decision(params, prune=0.5, tolerance=0.2)
    assert loose(found) and not stable_decision(params, prune=0.5, tolerance=1e-6)(found)


@pytest.mark.slow
def test_a_running_mean_stops_by_luck(loop_on_device):
    """PyHessian stops when one probe moves the running mean by less than a tolerance. On the same probes its error
    at that moment is many times the tolerance it claims; rtol's is what it says."""
    params, batch, exact = squares_problem(channels=3)
    tolerance, running, ours = 2e-2, [], []
    options = dict(select=lambda path, leaf: path == "kernel")
    gram = np.asarray(batch).T @ np.asarray(batch) / len(batch)

    @jax.jit
    def probes(key):
        return jax.vmap(lambda i: rademacher(jax.random.fold_in(key, i), params)["kernel"])(jnp.arange(99))

    for key in jax.random.split(jax.random.key(1), 12):
        v = probes(key)
        means = np.cumsum(np.einsum("nic,ij,njc,c->n", v, gram, v, params["gain"])) / np.arange(1, 100)
        estimate = channel_trace(squares, params, batch, key=key, num_probes=99, **options)
        assert estimate.total() == pytest.approx(means[-1], rel=1e-5)
        settled = np.abs(np.diff(means)) < tolerance * np.abs(means[1:])
        stop = 1 + int(np.argmax(settled)) if settled.any() else -1
        running.append(abs(means[stop] / exact.sum() - 1))
        ours.append(
            channel_trace(squares, params, batch, key=key, num_probes=9999, rtol=tolerance, **options).total()
            / exact.sum()
            - 1
        )
    assert np.sqrt(np.mean(np.square(running))) > 3 * tolerance
    assert np.sqrt(np.mean(np.square(ours))) < 2 * tolerance


@pytest.mark.slow
def test_variance_is_split_into_its_parts():
    """Totals with a known batch variance of 4 and a known probe variance: Rademacher, 2 * off-diagonal squares."""
    A = np.array([[2.0, 1.0], [1.0, 2.0]])
    probe_variance = 4 * A[0, 1] ** 2

    def loss(p, batch):
        w = p["kernel"][:, 0]
        return 0.5 * (w @ jnp.asarray(A, jnp.float32) @ w) + 0.25 * batch.mean() * (w**2).sum()

    rng = np.random.default_rng(0)
    shifts = 2 * 2 * rng.normal(size=60)
    estimates = [
        channel_trace(loss, {"kernel": jnp.ones((2, 1))}, jnp.full((1,), s, jnp.float32), key=key, num_probes=20)
        for s, key in zip(shifts, jax.random.split(jax.random.key(0), 60), strict=True)
    ]
    parts = split_variance(estimates)
    low, high = stats.chi2.interval(0.999, 59)
    batch_variance = np.var(shifts, ddof=1)
    assert parts.probe == pytest.approx(probe_variance, rel=0.15)
    assert low / 59 * batch_variance < parts.batch + parts.probe / 20 < high / 59 * (batch_variance + 1)
    assert parts.variance(10, 5) == pytest.approx((parts.batch + parts.probe / 5) / 10)


def test_a_budget_is_spent_where_the_variance_is_least():
    parts = VarianceParts(probe=100.0, batch=4.0)
    cost, budget = 9.0, 6000.0
    best = min(range(1, 100), key=lambda n: parts.variance(1, n) * (cost + n) / budget)
    assert parts.best_probes(cost) == best == 15
    assert parts.best_probes(0.0) == 1
    assert VarianceParts(0.0, 1.0).best_probes(5.0) == 1


def test_errors():
    params, batch, _ = squares_problem()
    for options in (dict(prune=0.0), dict(prune=1.5), dict(prune=0.5, tolerance=0.0)):
        with pytest.raises(ValueError, match="fraction between 0 and 1"):
            stable_decision(params, **options)
    with pytest.raises(ValueError, match="between 1 and 2"):
        expected_misplaced(np.zeros(3), np.zeros(3), 2, 3)
    with pytest.raises(ValueError, match="one length"):
        expected_misplaced(np.zeros(3), np.zeros(2), 2, 1)
    one = channel_trace(squares, params, batch, key=jax.random.key(0), num_probes=2, policy=Policy())
    with pytest.raises(ValueError, match="at least two estimates"):
        split_variance([one])
    with pytest.raises(ValueError, match="must not be negative"):
        VarianceParts(1.0, 1.0).best_probes(-1.0)
