"""z-scores of exact traces, on a network small enough to try every probe by hand."""

import json
import sys

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks import zscores
from benchmarks.trained import flat, mean_loss
from ehap_jax.curvature import gauss_newton_trace
from ehap_jax.curvature.probes import rademacher

GROUPS, EACH = 3, 8


def run(monkeypatch, out, *more):
    line = ["zscores", "--data", "none", "--out", str(out), "--networks", "resnet20"]
    monkeypatch.setattr(sys, "argv", [*line, "--probes", str(GROUPS * EACH), "--groups", str(GROUPS), *more])
    return zscores.main()


@pytest.mark.slow
def test_they_are_those_of_all_probes_and_a_stopped_run_goes_on(two_layers, monkeypatch, tmp_path):
    apply, params, batch = two_layers
    monkeypatch.setattr(zscores, "load", lambda *_: two_layers)
    out = tmp_path / "found.json"
    assert run(monkeypatch, out, "--max-minutes", "1e-4") == 3
    assert not out.exists() and len(list(tmp_path.glob("*.npz"))) == 1
    assert run(monkeypatch, out) == 0
    found = json.loads(out.read_text())["resnet20"]

    flat_params, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda p: mean_loss(apply)(unravel(p), batch)))(flat_params)

    def products(v):
        v, _ = ravel_pytree(v)
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), unravel(v * (hessian @ v)))

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
