"""The estimators recipe at a tiny size."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.pruning import Scores
from recipes import compare_estimators, pretrain

PHASE = ["--finetune.epochs", "1", "--finetune.batch-size", "256"]


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
