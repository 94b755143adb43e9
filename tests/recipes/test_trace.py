"""recipes.trace, and the traces of all recipes: exact, by probes, or both."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.curvature import gauss_newton_trace
from ehap_jax.data import load_dataset
from ehap_jax.graph import trace_graph
from ehap_jax.report import read_run
from ehap_jax.training import Deadline, Progress, RunDirectory
from recipes import criteria, trace
from recipes.lab import Lab, training_batch
from tests.recipes.tiny import read


def test_trace_of_a_pruned_network(pruned, tmp_path):
    given = ["short", str(pruned), "--data", "digits", "--scores.examples", "8", "--scores.probes", "17"]
    assert trace.command([*given, "--computes", "float32", "--output", str(tmp_path / "run")]) == 0
    rows = read(tmp_path / "run" / "trace.json")["traces"]
    expected = rows["float32"]["expected_agreement"]
    assert (
        0 < expected["overlap"] < 1
        and -1 < expected["rank_correlation"] < 1
        and "expected_agreement" not in rows["exact"]
    )
    assert set(rows) == {"float32", "exact"} and rows["float32"]["seconds_per_probe"] > 0
    assert read_run(tmp_path / "run").summary["costs"] == {
        "seconds per probe": {"float32": rows["float32"]["seconds_per_probe"]},
        "megabytes at the peak of a probe": {"float32": rows["float32"]["probe_bytes"] / 1e6},
    }
    # The exact trace of the same images is within the estimate's own error (5 standard errors).
    assert abs(rows["float32"]["total"] - rows["exact"]["total"]) < 5 * rows["float32"]["total_sem"]
    with np.load(tmp_path / "run" / "scores.npz") as scores:
        np.testing.assert_array_equal(scores["convergence|probes"], [16, 17])


@pytest.mark.slow
def test_probes_are_for_what_is_not_proven(tmp_path):
    """One smooth activation: the kernel before it needs probes, the one behind it does not."""
    rng = np.random.default_rng(0)
    sizes = {"before": (64, 5), "behind": (5, 10)}
    variables = {"params": {name: jax.numpy.asarray(rng.normal(size=s), np.float32) for name, s in sizes.items()}}

    def apply(v, x):
        return jax.numpy.tanh(x.reshape(len(x), -1) @ v["params"]["before"]) @ v["params"]["behind"]

    graph = trace_graph(apply)(variables, np.zeros((1, 8, 8, 1), np.float32))
    settings = criteria.ScoreConfig(examples=16, probes=20)
    with Progress() as progress:
        lab = Lab(load_dataset("digits"), RunDirectory.create(tmp_path / "run"), progress, Deadline())
        found = criteria.hessian_trace(lab, 0, graph, apply, variables, settings)
    assert found.methods() == {"params/before": "control_variate", "params/behind": "exact"}
    batch = training_batch(lab.dataset, 16, 0)
    exact = gauss_newton_trace(apply, variables, batch, select=lambda path, _: path == "params/behind")
    np.testing.assert_allclose(found.mean["params"]["behind"], exact.mean["params"]["behind"], rtol=1e-5)
    assert np.all(found.sem["params"]["behind"] == 0) and np.all(found.sem["params"]["before"] > 0)


def test_the_load_of_the_machine_is_that_of_the_probes(tmp_path, monkeypatch):
    """Not that of whatever ran between them and the end of the recipe; a trace that is taken up keeps it."""
    lab = SimpleNamespace(run=RunDirectory.create(tmp_path / "run"))

    def point(count):
        return SimpleNamespace(count=count, total=lambda: 1.0, total_sem=lambda: 0.5)

    monkeypatch.setattr(criteria.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(criteria.os, "getloadavg", lambda: (7.0, 0.0, 0.0))
    course = criteria.Course(lab, 0, "trace_float32")
    course.add(point(1))
    assert course.seconds_per_probe is course.load_average is course.machine_shared is None
    course.add(point(3))
    monkeypatch.setattr(criteria.os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    again = criteria.Course(lab, 0, "trace_float32")
    again.add(point(3))
    assert again.load_average == 7.0 and again.machine_shared
    assert again.seconds_per_probe == course.seconds_per_probe > 0
