"""The quickstart at a tiny size: files, resumption and the errors a user can run into."""

import json
import re

import numpy as np
import pytest

from ehap_jax import PruningPlan, onnx_session
from recipes import quantize
from recipes.command import parse
from recipes.network import load_data, load_network
from recipes.quickstart import command

TINY = [
    "--seeds", "1", "--widths", "4", "4", "8", "--dense.epochs", "2", "--finetune.epochs", "2", "--int8.epochs", "2",
    "--num-probes", "18", "--trace-examples", "16",
    "--dense.batch-size", "256", "--finetune.batch-size", "256", "--int8.batch-size", "256",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "run"
    assert command([*TINY, "--output", str(output)]) == 0
    return output


def test_run_directory(finished):
    summary = json.loads((finished / "summary.json").read_text())
    stages = {stage["stage"]: stage for stage in summary["stages"]}
    assert list(stages) == ["dense", "pruned", "finetuned", "int8"]
    assert all(0 <= stage["accuracy"] <= 1 and stage["accuracy_std"] is None for stage in stages.values())
    assert stages["pruned"]["macs"] <= 0.45 * stages["dense"]["macs"]
    assert stages["int8"]["bytes"] < stages["finetuned"]["bytes"] < stages["dense"]["bytes"]
    assert summary["checks"]["masked_minus_shrunk"] <= 1e-5
    assert summary["checks"]["onnx_minus_integers"] <= 1e-6
    plan = PruningPlan.load(finished / "plan.json")
    assert plan.provenance["cost"]["macs"] == stages["pruned"]["macs"]
    assert plan.provenance["criterion"].startswith("removal") and plan.provenance["per"] == "macs"
    with np.load(finished / "scores.npz", allow_pickle=False) as scores:
        assert {name.partition("|")[0] for name in scores.files} == {
            "float32", "bfloat16", "float16", "sem", "convergence",
        }  # fmt: skip
        np.testing.assert_array_equal(scores["convergence|probes"], [16, 17, 18])
        assert (scores["sem|params/conv1/kernel"] >= 0).all() and scores["sem|params/conv1/kernel"].any()
    assert "<html" in (finished / "report.html").read_text()
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["epoch"]) for m in metrics] == [
        (stage, epoch) for stage in ("dense", "finetuned", "int8") for epoch in (1, 2)
    ]


def test_what_it_leaves_goes_on(finished):
    """The network for other recipes, and the integers for ONNX Runtime."""
    network = load_network(finished)
    assert network.plan == PruningPlan.load(finished / "seed0" / "plan.json")
    assert network.apply(network.variables, np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 10)
    (logits,) = onnx_session(finished / "seed0" / "model.onnx").runtime.run(
        None, {"x": np.zeros((2, 8, 8, 1), np.float32)}
    )
    assert logits.shape == (2, 10)


def test_resume_ends_in_the_same_numbers(finished, capsys):
    """Every stage is taken from its checkpoint; the accuracies are evaluated anew and must agree."""
    before = json.loads((finished / "summary.json").read_text())["stages"]
    (finished / "summary.json").unlink()
    assert command([*TINY, "--output", str(finished), "--resume"]) == 0
    assert json.loads((finished / "summary.json").read_text())["stages"] == before
    told = "".join(capsys.readouterr())
    (given,) = re.findall(r"^next: python -m recipes\.quantize (short .*)$", told, re.MULTILINE)
    config, _ = parse(quantize.VARIANTS, given.split(), name="quantize")
    network = load_network(config.network)
    assert len(load_data(network, config.data, config.train_images).x_train) == config.train_images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "alexnet"], "unknown model 'alexnet'"),
        (["--data", "imagenet"], "imagenet"),
        (["--dense.batch-size", "5000"], "--dense.batch-size 5000"),
        (["--int8.epochs", "0"], "--int8.epochs must be at least 1"),
        (["--num-probes", "1"], "--num-probes"),
        (["--macs", "0.0001"], "out of reach"),
        (["--macs", "1.5"], "in \\(0, 1\\]"),
        (["--trace-examples", "100000"], "trace-examples"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_bad_settings_fail_before_anything_is_written(tmp_path, capsys, arguments, message):
    assert command([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_existing_run_asks_what_to_do(finished, capsys):
    assert command([*TINY, "--output", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error
