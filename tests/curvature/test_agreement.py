"""The expected agreement against the agreement there is, where the truth is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.curvature import agreement_of_scores, channel_trace, expected_agreement, gauss_newton_trace

CHANNELS, REPETITIONS, PRUNE = 600, 12, 0.3


def realised(scores, truth):
    def ranks(x):
        return np.argsort(np.argsort(x))

    pruned = round(PRUNE * truth.size)
    a, b = (set(np.argsort(x)[:pruned].tolist()) for x in (scores, truth))
    return np.corrcoef(ranks(scores), ranks(truth))[0, 1], len(a & b) / len(a | b)


def require_calibrated(make, count):
    """``make(rng)`` draws true scores and the standard deviations of one probe."""
    rng = np.random.default_rng(count)
    truth, deviation = make(rng)
    expected, found = [], []
    for _ in range(REPETITIONS):
        scores = truth + deviation / np.sqrt(count) * rng.normal(size=CHANNELS)
        sems = deviation / np.sqrt(count) * np.sqrt(rng.chisquare(count - 1, CHANNELS) / (count - 1))
        agreement = agreement_of_scores(scores, sems, count, prune=PRUNE)
        expected.append(agreement[:2])
        found.append(realised(scores, truth))
    # The spread of what is realised is chance; what remains is the model of relative noise, allowed 0.06 of bias.
    chance = 3 * np.std(found, axis=0, ddof=1) / np.sqrt(REPETITIONS)
    assert (np.abs(np.mean(expected, 0) - np.mean(found, 0)) < 0.06 + chance).all()


@pytest.mark.slow
@pytest.mark.parametrize("relative_spread", [0.0, 0.4])
@pytest.mark.parametrize("count", [5, 30, 300, 3000])
def test_calibrated_for_traces_spread_over_decades(count, relative_spread):
    """Probes that are off by six times the trace, give or take, as on a trained ResNet."""

    def make(rng):
        truth = np.exp(1.5 * rng.normal(size=CHANNELS))
        return truth, 6 * truth * np.exp(relative_spread * rng.normal(size=CHANNELS))

    require_calibrated(make, count)


@pytest.mark.parametrize("count", [30, 100, 1000])
@pytest.mark.parametrize("negative", [0.1, 0.5])
def test_calibrated_for_traces_of_both_signs(count, negative):
    """As of smooth networks: a Hessian's block may have a negative trace."""

    def make(rng):
        size = np.exp(1.5 * rng.normal(size=CHANNELS))
        return np.where(rng.uniform(size=CHANNELS) < negative, -size, size), 6 * size

    require_calibrated(make, count)


def test_more_probes_agree_better():
    rng = np.random.default_rng(0)
    truth = np.exp(rng.normal(size=CHANNELS))
    noise = 6 * truth * rng.normal(size=CHANNELS)
    found = [
        agreement_of_scores(truth + noise / n**0.5, 6 * truth / n**0.5, n, prune=PRUNE) for n in (3, 30, 300, 3000)
    ]
    assert all(a.rank_correlation < b.rank_correlation and a.overlap < b.overlap for a, b in itertools.pairwise(found))


@pytest.mark.slow
def test_of_an_estimate_and_of_an_exact_trace():
    rng = np.random.default_rng(1)
    p = {name: jnp.asarray(rng.normal(size=(24, 24)), jnp.float32) for name in ("first", "second")}
    batch = jnp.asarray(rng.normal(size=(40, 24)), jnp.float32), jnp.asarray(rng.integers(0, 24, 40), jnp.int32)

    def model(p, x):
        return jax.nn.relu(x @ p["first"]) @ p["second"]

    def loss(p, batch):
        logits = model(p, batch[0])
        return (jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, batch[1][:, None], 1)[:, 0]).mean()

    exact = gauss_newton_trace(model, p, batch)
    assert expected_agreement(exact, p, prune=PRUNE)[:2] == (1.0, 1.0)
    estimate = channel_trace(loss, p, batch, key=jax.random.key(1), num_probes=50)
    truth, scores = (
        np.concatenate([np.asarray(t.mean[n], np.float64) * (np.asarray(p[n], np.float64) ** 2).mean(0) for n in p])
        for t in (exact, estimate)
    )
    found = realised(scores, truth)
    expected = expected_agreement(estimate, p, prune=PRUNE)
    # One realisation with 48 channels: Fisher's transform gives the correlation a standard error of 1/sqrt(45).
    assert abs(np.arctanh(expected.rank_correlation) - np.arctanh(found[0])) < 3 / np.sqrt(45) + 0.1
    with pytest.raises(ValueError, match="two probes"):
        expected_agreement(channel_trace(loss, p, batch, key=jax.random.key(1), num_probes=1), p)
    with pytest.raises(ValueError, match="prune"):
        expected_agreement(estimate, p, prune=1.0)
