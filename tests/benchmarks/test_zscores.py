"""z-scores of exact traces, on a network small enough to try every probe by hand."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import zscores
from benchmarks.trained import flat, mean_loss
from ehap_jax.curvature import gauss_newton_trace, probe_channel_products
from ehap_jax.curvature.probes import rademacher

GROUPS, EACH = 3, 8


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """Tiny networks take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def as_a_user_has_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def tiny():
    """Two dense layers, 12 examples."""
    rng = np.random.default_rng(4)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in {"a": (5, 8), "b": (8, 3)}.items()
    }
    batch = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32), jnp.asarray(rng.integers(0, 3, 12), jnp.int32)

    def apply(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    return apply, params, batch


def run(monkeypatch, out, *more):
    line = ["zscores", "--data", "none", "--out", str(out), "--networks", "resnet20"]
    monkeypatch.setattr(sys, "argv", [*line, "--probes", str(GROUPS * EACH), "--groups", str(GROUPS), *more])
    return zscores.main()


def test_they_are_those_of_all_probes_and_a_stopped_run_goes_on(tiny, monkeypatch, tmp_path):
    apply, params, batch = tiny
    monkeypatch.setattr(zscores, "load", lambda *_: tiny)
    out = tmp_path / "found.json"
    assert run(monkeypatch, out, "--max-minutes", "1e-4") == 3
    assert not out.exists() and len(list(tmp_path.glob("*.npz"))) == 1
    assert run(monkeypatch, out) == 0
    found = json.loads(out.read_text())["resnet20"]

    def products(v):
        return probe_channel_products(mean_loss(apply), params, v, batch)

    keys = [jax.random.fold_in(jax.random.key(2025), group) for group in range(GROUPS)]
    rows = [flat(products(rademacher(jax.random.fold_in(k, i), params)), params) for k in keys for i in range(EACH)]
    truth = flat(gauss_newton_trace(apply, params, batch).mean, params)
    alive = np.std(rows, axis=0) > 0
    z = (np.mean(rows, axis=0) - truth)[alive] / (np.std(rows, axis=0, ddof=1)[alive] / len(rows) ** 0.5)
    assert found["probes"] == len(rows) and found["channels"] == alive.sum() == 11
    assert found["z_mean"] == pytest.approx(z.mean(), abs=1e-3)
    assert found["z_std"] == pytest.approx(z.std(ddof=1), rel=1e-3)
    assert found["within"] == (abs(z.mean()) <= 0.1 and abs(z.std(ddof=1) - 1) <= 0.1)
    sums = np.sum(rows, axis=1)
    assert found["total"]["sem"] == pytest.approx(sums.std(ddof=1) / len(rows) ** 0.5, rel=1e-3)
    # The mean of z is the mean over probes of one number each, whose standard error follows from groups of them.
    sem = np.std(rows, axis=0, ddof=1)[alive] / len(rows) ** 0.5
    of_groups = ((np.array(rows)[:, alive] - truth[alive]) / sem).mean(axis=1).reshape(GROUPS, EACH).mean(axis=1)
    assert found["z_mean_standard_error"] == pytest.approx(of_groups.std(ddof=1) / GROUPS**0.5, rel=1e-3)


def test_groups_that_cannot_be_are_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "found.json", "--groups", "5")
    assert "divide --probes" in capsys.readouterr().err
