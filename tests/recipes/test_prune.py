"""recipes.prune: at once, step by step, and the directory it leaves."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.pruning import PruningPlan
from ehap_jax.training import RunDirectory
from recipes import model_directory, prune
from recipes.network import load_network
from tests.recipes.tiny import phase, read


def test_prune_writes_a_smaller_network_that_loads(dense, pruned):
    plan = PruningPlan.load(pruned / "plan.json")
    assert plan.coupling == "group" and plan.provenance["criterion"].startswith("removal")
    assert plan.provenance["per"] == "params"
    stages = {stage["stage"]: stage for stage in read(pruned / "summary.json")["stages"]}
    assert stages["finetuned"]["params"] <= 0.5 * stages["dense"]["params"]
    assert stages["dense"]["accuracy"] == read(dense / "summary.json")["stages"][0]["accuracy"]
    network = load_network(pruned)
    assert sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"])) == stages["finetuned"]["params"]
    assert np.isfinite(network.apply(network.variables, np.zeros((2, 8, 8, 1), np.float32))).all()


@pytest.mark.slow
def test_pruning_step_by_step_meets_the_budget(dense, tmp_path):
    given = ["short", str(dense), "--data", "digits", "--train-images", "512", "--prune.criterion", "random"]
    given += ["--prune.steps", "2", "--prune.keep", "0.4", "--prune.budget", "macs", "--prune.coupling", "group"]
    given += [*phase("finetune"), *phase("prune.between"), "--finetune.distill", "0.9", "--finetune.average", "0.9"]
    given += ["--finetune.label-smoothing", "0.1", "--finetune.compute", "bfloat16"]
    assert prune.command([*given, "--output", str(tmp_path / "run")]) == 0
    stages = {stage["stage"]: stage for stage in read(tmp_path / "run" / "summary.json")["stages"]}
    assert stages["pruned"]["macs"] <= 0.4 * stages["dense"]["macs"]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in metrics] == ["step1", "finetuned"]


def test_what_a_kill_left_of_a_model_directory_goes(pruned, tmp_path):
    pytest.importorskip("safetensors", reason="model directories need safetensors: pip install 'ehap-jax[torch]'")
    run = RunDirectory.create(tmp_path / "run", {})
    for name in ("model", ".model.killed"):
        run.file(f"{name}/weights").write_text("half")
    lab = SimpleNamespace(progress=SimpleNamespace(note=pytest.fail), run=run)
    assert model_directory.write_model_directory(lab, 0, load_network(pruned), {}) == run.path / "model"
    assert not (run.path / ".model.killed").exists() and not (run.path / "model" / "weights").exists()


def test_no_model_directory_without_its_packages(pruned, tmp_path, monkeypatch):
    notes = []
    progress = SimpleNamespace(note=notes.append)
    lab = SimpleNamespace(progress=progress, run=RunDirectory.create(tmp_path / "run"))
    monkeypatch.setattr(model_directory, "find_spec", lambda name: None if name == "safetensors" else name)
    assert model_directory.write_model_directory(lab, 0, load_network(pruned), {}) is None
    assert "no model/ without safetensors" in notes[0] and not (tmp_path / "run" / "model").exists()
