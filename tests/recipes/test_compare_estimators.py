"""The estimators recipe at a tiny size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.graph import trace_graph
from ehap_jax.pruning import Scores, allocate, magnitude_scores, mask_variables, shrink, shrink_variables
from recipes import compare_estimators, pretrain

PHASE = ["--finetune.epochs", "1", "--finetune.batch-size", "256"]


@pytest.mark.slow
def test_compares_stops_and_resumes(tmp_path):
    dense = tmp_path / "dense"
    small = ["--data", "digits", "--widths", "4", "4", "8", "--phase.epochs", "1", "--phase.batch-size", "256"]
    assert pretrain.command(["digits", *small, "--phase.warmup", "0", "--output", str(dense)]) == 0
    given = ["short", str(dense), "--data", "digits", "--probes", "1", "2", "--rms-probes", "2", "--examples", "16"]
    given += ["--keeps", "0.5", "--seeds", "2", *PHASE, "--output", str(tmp_path / "run")]
    assert compare_estimators.command([*given, "--max-minutes", "0.001"]) == 3
    first = json.loads((tmp_path / "run" / "estimators.json").read_text())
    assert 0 < first["cells_done"] < first["cells"] == 12
    assert compare_estimators.command([*given, "--resume"]) == 0
    result = json.loads((tmp_path / "run" / "estimators.json").read_text())
    assert result["cells_done"] == 12 and result["rows"][: len(first["rows"])] == first["rows"]
    by_name = {entry["estimator"]: entry for entry in result["statistics"]}
    assert list(by_name) == ["random", "magnitude", "1 probe", "2 probes", "rms of 2", "exact"]
    exact = by_name["exact"]
    assert exact["predicted_increase"]["std"] == 0 and exact["accuracy_pruned"]["std"] == 0
    assert by_name["random"]["predicted_increase"]["std"] > 0
    assert all(entry["predicted_increase"]["mean"] > 0 for entry in by_name.values())
    assert (tmp_path / "run" / "estimators.png").stat().st_size > 10_000
    text = (tmp_path / "run" / "estimators.txt").read_text()
    assert "UNFINISHED" not in text and "rms of 2" in text


@pytest.mark.slow
def test_masked_is_shrunk_in_value_and_training():
    """The network with a mask against the one without the channels: logits, and the step of gradient descent."""
    rng = np.random.default_rng(0)
    sizes = {"a": (3, 6), "b": (6, 5), "c": (5, 2)}
    variables = {"params": {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}}
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)

    def apply(v, x):
        p = v["params"]
        return jax.nn.softplus(jax.nn.softplus(x @ p["a"]) @ p["b"]) @ p["c"]

    graph = trace_graph(apply)(variables, x)
    plan = allocate(graph, magnitude_scores(graph, variables), params=0.4, coupling="union")
    mask = mask_variables(jax.tree.map(jnp.ones_like, variables), plan)
    small, run = shrink_variables(variables, plan), compare_estimators.masked(apply)

    def slope(apply, variables):
        def loss(params):
            return (apply({**variables, "params": params}, x) ** 2).sum()

        return jax.value_and_grad(loss)(variables["params"])

    value, gradient = slope(run, {**variables, "mask": mask})
    expected, expected_gradient = slope(shrink(apply, plan), small)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    cut = shrink_variables({"params": gradient}, plan)["params"]
    for name, found in cut.items():
        assert found.size < gradient[name].size
        np.testing.assert_allclose(found, expected_gradient[name], rtol=1e-4, atol=1e-5)
        # Nothing else moves.
        np.testing.assert_allclose(jnp.abs(found).sum(), jnp.abs(gradient[name]).sum(), rtol=1e-5)


def test_prediction_is_half_the_sum_of_what_goes():
    values = {"a/kernel": np.array([1.0, 2.0, 4.0]), "b/kernel": np.array([8.0, 16.0])}
    scores = Scores(values, values, "hessian")
    plan = type("Plan", (), {"keep": {"a/kernel": (0, 2)}})()
    assert compare_estimators.predicted_increase(scores, plan) == 1.0


def test_errors(capsys, tmp_path):
    out = ["--output", str(tmp_path / "x")]
    assert compare_estimators.command(["short", "none", "--keeps", "1.5", *out]) == 2
    assert "--keeps" in capsys.readouterr().err
    assert compare_estimators.command(["short", "none", "--probes", "0", *out]) == 2
    assert "--probes" in capsys.readouterr().err
