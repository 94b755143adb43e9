"""recipes.reproduce and recipes.reproduction: the papers' settings, and the table of their claims."""

import json

import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.training import OutOfTime
from recipes import (
    cells,
    compare_criteria,
    compare_precision,
    ehap,
    pretrain,
    prune,
    reproduce,
    reproduction,
    trace,
)
from tests.recipes.tiny import CELLS, read


@pytest.mark.slow
def test_reproduce_and_the_table_of_claims(dense, tmp_path, monkeypatch):
    given = ["cpu", str(dense), "--data", "digits", "--train-images", "256", "--output", str(tmp_path / "run")]
    given += [
        "--precision.scores.examples",
        "8",
        "--precision.scores.probes",
        "17",
        "--precision.keep",
        "0.5",
        *CELLS[:-2],
    ]
    given[given.index("--cells.criteria") + 1 : given.index("--cells.keeps")] = ["magnitude", "random"]
    # Time for nothing but the first network: what is finished is collected, and the rest is said not to have run.
    assert reproduce.command([*given, "--max-minutes", "1e-6"]) == 3
    assert read(tmp_path / "run" / "reproduction.json") == {}

    def too_late(*_):
        raise OutOfTime("stopped after 1 epoch")

    # Time for the precisions, and for no cell of the criteria: they have a result, and nothing to draw.
    with monkeypatch.context() as patch:
        patch.setattr(cells, "run_cell", too_late)
        assert reproduce.command([*given, "--resume"]) == 3
    assert read(tmp_path / "run" / "reproduction.json")["criteria"]["result"]["cells_done"] == 0
    assert "float16 against float32" in (tmp_path / "run" / "report.html").read_text()
    assert reproduce.command([*given, "--resume"]) == 0
    found = read(tmp_path / "run" / "reproduction.json")
    assert set(found) == {"precision", "criteria"} and found["criteria"]["config"]["dense"] == "run"

    first, second = found["precision"]["result"]["precisions"]
    assert first["rank_correlation"]["mean"] == first["kept_overlap"]["mean"] == 1.0
    assert first["difference"]["mean"] == 0.0 and 0.9 < second["rank_correlation"]["mean"] <= 1.0
    assert second["difference"]["mean"] == second["accuracy"]["mean"] - first["accuracy"]["mean"]

    page = (tmp_path / "run" / "report.html").read_text()
    assert "float16 against float32" in page and "magnitude 0.5" in page and "Seconds per probe" in page

    table = tmp_path / "REPRODUCTION.md"
    assert reproduction.command([str(tmp_path / "run" / "reproduction.json"), "--output", str(table)]) == 0
    text = table.read_text()
    assert "![Accuracy against multiply-accumulates](reproduction.png)" in text
    assert (tmp_path / "reproduction.png").stat().st_size > 10_000
    gap = found["criteria"]["result"]["differences"][0]["difference"]["mean"]
    assert f"magnitude − random {100 * gap:.2f}" in text
    shortened = "ran shortened: 1 of 300 epochs of fine-tuning, 1 of 30 of INT8, 256 training images, 1 of 3 seeds"
    assert f"{shortened}; without hessian |" in text
    assert "17 of 300 probes, 8 of 512 images in the Hessian batch |" in text
    assert first["largest_batch"] == 8 < second["largest_batch"]
    assert f"for 8 images, by the compiler, FP16 takes about {second['largest_batch']} |" in text
    assert "INT8 training keeps the accuracy" in text and "| not run |" in text


def test_goals_are_read_from_runs(swept, tmp_path):
    """From a run directory, and from one file with all of it; the goals without a run are listed."""
    table = tmp_path / "REPRODUCTION.md"
    assert reproduction.command(["--sweeps", str(swept / "sweep.json"), "--output", str(table)]) == 0
    half = 100 * read(swept / "sweep.json")["statistics"][1]["accuracy"]["mean"]
    text = table.read_text()
    assert "Accuracy of resnet8 at fractions of the macs | run, digits, cpu | magnitude: dense: " in text
    assert f"50 %: {half:.2f} % | ran: 1 epochs of fine-tuning, 1 seeds, 256 training images |" in text
    assert "| not run: recipes.sweep resnet56 |" in text and "| not run: recipes.quantize cifar |" in text

    bundle = {name: read(swept / f"{name}.json") for name in ("config", "versions", "sweep")}
    bundle["sweep"]["model"] = "resnet56"
    accuracies = {"float": 0.91, "float_trained": 0.92, "ptq_integer": 0.909, "qat_integer": 0.918}
    stages = [{"stage": name, "accuracy": value, "accuracy_std": None} for name, value in accuracies.items()]
    checks = {"points_from_float_trained_qat_integer": 0.2}
    quantized = {"network": "runs/prune", "data": "tfds:cifar10", "train_images": None, "qat": {"epochs": 20}}
    (tmp_path / "sweep.json").write_text(json.dumps(bundle))
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages, "checks": checks, "seeds": [0, 1, 2]}))
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    (tmp_path / "versions.json").write_text(json.dumps(bundle["versions"]))
    given = ["--sweeps", str(tmp_path / "sweep.json"), "--quantized", str(tmp_path / "summary.json")]
    assert reproduction.command([*given, "--output", str(table)]) == 0
    text = table.read_text()
    assert "| Goal: ResNet-56, 93.46 % at 47 % of the MACs, 93.36 % at 40 % | run, digits, cpu | magnitude" in text
    assert "0.20 points in the mean over seeds, reached: float 91.00 %, trained on 92.00 %" in text
    assert "not run" not in text


def test_a_full_run_is_not_called_shortened():
    assert reproduction.shortened(epochs=300, seeds=3, images=None) == "ran"
    less = reproduction.shortened(epochs=300, seeds=3, images=None, probes=30, examples=64)
    assert less == "ran shortened: 30 of 300 probes, 64 of 512 images in the Hessian batch"


@pytest.mark.parametrize(
    ("criteria", "scores", "missing", "state"),
    [
        (["hessian", "random"], {"estimator": "probes"}, [], "ran"),
        (["hessian"], {"estimator": "probes", "probes": 9}, [], "ran shortened: 9 of 300 probes"),
        (
            ["hessian"],
            {"examples": 16},
            [],
            "ran shortened: 16 of 512 images in the Hessian batch; exact traces where proven, not 300 probes",
        ),
        (["hessian"], {"estimator": "exact"}, ["random"], "ran; exact traces, not 300 probes; without random"),
        (["magnitude"], {"examples": 16}, ["hessian"], "ran; without hessian"),
    ],
)
def test_the_state_says_how_traces_were_taken(criteria, scores, missing, state):
    scores = {"estimator": "auto", "examples": 512, "probes": 300} | scores
    cells = {"criteria": criteria, "prune": {"scores": scores}, "finetune": {"epochs": 300}, "int8": {"epochs": 30}}
    part = {"config": {"cells": cells, "train_images": None}, "result": {"train_images": 45_000}}
    assert reproduction.short_criteria(part, 3, missing) == state


def test_memory_on_a_gpu_is_read_from_what_was_compiled_for_it(tmp_path):
    """Both precisions of a network, on a linearised gradient; anything else is left out."""
    sizes = [("a", "float32", "linearize", 4), ("a", "float16", "linearize", 1), ("a", "float32", "jvp", 2)]
    sizes += [("b", "float16", "linearize", 1), ("c", "float32", "linearize", 1)]
    rows = [
        {"network": network, "batch": 128, "precision": precision, "product": product, "bytes": size * 2**30}
        for network, precision, product, size in sizes
    ]
    found, page = tmp_path / "gpu_memory.json", tmp_path / "claims.md"
    found.write_text(json.dumps({"device": "a GPU", "rows": rows}))
    assert reproduction.command(["--compiled", str(found), "--output", str(page)]) == 0
    lines = [line for line in page.read_text().splitlines() if "GPU memory" in line]
    assert len(lines) == 1 and "a, a GPU" in lines[0]
    assert "4.00 GB in FP32, 1.00 GB in FP16, by the compiler: -75 %" in lines[0] and "not run" in lines[0]


def test_a_table_of_nothing_is_an_error(tmp_path, capsys):
    assert reproduction.command(["--output", str(tmp_path / "table.md")]) == 2
    assert "at least one" in capsys.readouterr().err and not (tmp_path / "table.md").exists()


def settings(recipe, variant):
    return recipe.VARIANTS[variant][1]


PAPER = {"resnet32": 0.230, "resnet56": 0.191, "wrn28-8": 0.240}
"""EHAP's networks, and the fraction of their channels that it keeps."""


@pytest.mark.parametrize("network", PAPER)
def test_configurations_called_the_papers_have_its_numbers(network):
    """arXiv 2306.07030: training, probes, fine-tuning, INT8 training."""
    whole, reproduced = settings(ehap, network), settings(reproduce, network)
    cells = [settings(compare_criteria, "paper").cells, reproduced.cells]
    pruned = [settings(prune, network), whole]
    for dense in (settings(pretrain, network).phase, whole.pretrain, reproduced.pretrain.phase):
        assert (dense.epochs, dense.learning_rate, dense.weight_decay, dense.batch_size) == (300, 0.05, 1e-3, 128)
    assert settings(pretrain, network).model == whole.model == reproduced.pretrain.model
    for tuned in (c.finetune for c in (*pruned, *cells, settings(compare_precision, "paper"))):
        assert (tuned.epochs, tuned.learning_rate, tuned.weight_decay, tuned.batch_size) == (300, 0.0512, 5e-4, 128)
    for int8_training in (whole.int8, *(c.int8 for c in cells)):
        assert (int8_training.epochs, int8_training.learning_rate, int8_training.batch_size) == (30, 1e-4, 128)
    for scores in (*(c.prune.scores for c in (*pruned, *cells)), settings(trace, "paper").scores):
        assert (scores.probes, scores.examples) == (300, 512)
    assert all(c.prune.scores.estimator == "probes" for c in (*pruned, *cells))
    for target in (*(c.prune for c in pruned), reproduced.precision):
        assert (target.budget, target.keep, target.coupling) == ("channels", PAPER[network], "union")
    assert whole.prune.scores.compute == "float16"
