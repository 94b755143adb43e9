"""recipes.compare_criteria and recipes.sweep: cells, stopped and resumed."""

import json

import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.report import read_run
from recipes import compare_criteria, sweep
from recipes.network import load_network
from tests.recipes.tiny import CELLS, phase, read


@pytest.fixture(scope="module")
def stopped(dense, tmp_path_factory):
    """A comparison that was stopped after its first cell."""
    output = tmp_path_factory.mktemp("criteria") / "run"
    given = ["short", str(dense), "--data", "digits", *CELLS, "--output", str(output)]
    assert compare_criteria.command([*given, "--max-minutes", "1e-6"]) == 3
    return given, output


def test_criteria_stop_at_the_limit_and_resume(stopped):
    given, output = stopped
    assert read(output / "comparison.json")["cells_done"] == 1
    assert "UNFINISHED: 2 of 3 cells" in (output / "comparison.txt").read_text()
    first = read(output / "cells" / "dense-1-seed0.json")
    assert compare_criteria.command([*given, "--resume"]) == 0
    found = read(output / "comparison.json")
    assert [row["criterion"] for row in found["rows"]] == ["dense", "hessian", "random"]
    assert found["rows"][0] == first, "a finished cell is not repeated"
    by_name = {entry["criterion"]: entry for entry in found["statistics"]}
    assert by_name["hessian"]["params"] <= 0.5 * by_name["dense"]["params"]
    assert by_name["hessian"]["bytes_int8"]["mean"] < by_name["hessian"]["bytes"]
    assert by_name["random"]["accuracy_int8"] is None
    (gap,) = found["differences"]
    assert gap["difference"]["mean"] == found["rows"][1]["accuracy"] - found["rows"][2]["accuracy"]
    assert (output / "accuracy.png").stat().st_size > 10_000
    stages = {stage["stage"]: stage for stage in read_run(output).stages}
    assert list(stages) == ["dense", "hessian 0.5", "hessian 0.5, INT8", "random 0.5"]
    assert stages["hessian 0.5, INT8"]["bytes"] == by_name["hessian"]["bytes_int8"]["mean"]
    assert "Accuracy against MACs" in (output / "report.html").read_text()


@pytest.mark.slow
def test_cells_that_prune_step_by_step_do_not_share_what_they_trained(dense, tmp_path):
    given = ["short", str(dense), "--data", "digits", "--cells.criteria", "magnitude", "random", "--cells.keeps", "0.4"]
    given += ["--cells.prune.steps", "2", *phase("cells.prune.between"), *phase("cells.finetune")]
    assert sweep.command([*given, "--train-images", "256", "--output", str(tmp_path / "run")]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pruned = ("magnitude-0.4", "random-0.4")
    assert [row["stage"] for row in metrics] == ["dense-1", *(s for c in pruned for s in (f"{c}-step1", c))]
    _, one, other = read(tmp_path / "run" / "sweep.json")["statistics"]
    assert one["params"] != other["params"]


def test_sweep(swept):
    full, half = read(swept / "sweep.json")["statistics"]
    assert half["macs"] <= 0.5 * full["macs"] and (swept / "pareto.png").exists()


def test_a_run_that_holds_no_network_says_so(stopped):
    with pytest.raises(FileNotFoundError, match=r"has no network\.json"):
        load_network(stopped[1])
