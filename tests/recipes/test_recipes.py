"""Every recipe at a tiny size: what it writes, that it resumes, that it stops at its time limit, and its errors."""

import json
import re
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax import INT8, fake_quant
from ehap_jax.curvature import gauss_newton_trace
from ehap_jax.data import limit_training, load_dataset, normalise
from ehap_jax.graph import trace_graph
from ehap_jax.pruning import PruningPlan
from ehap_jax.report import read_run
from ehap_jax.training import Deadline, OutOfTime, Progress, RunDirectory, load_variables
from recipes import (
    cells,
    command,
    compare_criteria,
    compare_estimators,
    compare_precision,
    criteria,
    ehap,
    int8,
    model_directory,
    pretrain,
    prune,
    quantize,
    reproduce,
    reproduction,
    spectrum,
    sweep,
    trace,
)
from recipes.command import Missed, run_command
from recipes.lab import Lab, Phase, training_batch
from recipes.network import load_network

MODEL = ["--data", "digits", "--widths", "4", "4", "8"]


def phase(name, epochs=1):
    return [f"--{name}.epochs", str(epochs), f"--{name}.batch-size", "256", f"--{name}.warmup", "0"]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrain") / "run"
    assert pretrain.command(["digits", *MODEL, *phase("phase", 2), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("prune") / "run"
    given = ["short", str(dense), "--data", "digits", "--train-images", "1000", "--prune.scores.examples", "16"]
    assert prune.command([*given, *phase("finetune"), "--output", str(output)]) == 0
    return output


def test_pretrain_writes_a_network_that_loads(dense):
    network = load_network(dense)
    summary = read(dense / "summary.json")
    (stage,) = summary["stages"]
    assert stage["params"] == sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"]))
    assert 0 <= summary["checks"]["validation_accuracy"] <= 1 and "<html" in (dense / "report.html").read_text()
    assert network.apply(network.variables, np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 10)
    assert load_variables(dense / "network.npz").keys() == network.variables.keys()


@pytest.fixture(scope="module")
def quantized(pruned, tmp_path_factory):
    """Under a bound that nothing reaches: everything is written all the same."""
    pytest.importorskip("onnxruntime", reason="needs pip install 'ehap-jax[onnx]'")
    output = tmp_path_factory.mktemp("quantize") / "run"
    given = ["short", str(pruned), "--data", "digits", "--train-images", "600", "--seeds", "1", *phase("qat")]
    given += ["--calibration-images", "128", "--compared-images", "32", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "POINTS", -1.0)
        assert quantize.command(given) == 1
    return output


def test_quantize_runs_the_integers_of_a_pruned_network(pruned, quantized):
    output = quantized
    summary = read(output / "summary.json")
    stages = {stage["stage"]: stage for stage in summary["stages"]}
    trained = ["qat_fake", "qat_integer", "qat_onnx", "qat_float"]
    assert list(stages) == ["float", "float_trained", "ptq_fake", "ptq_integer", *trained]
    assert stages["qat_onnx"]["accuracy"] == stages["qat_integer"]["accuracy"]
    assert stages["float"]["accuracy"] == read(pruned / "summary.json")["stages"][-1]["accuracy"]
    assert stages["qat_integer"]["bytes"] < 0.5 * stages["float"]["bytes"]
    for base in ("float", "float_trained"):
        lost = abs(stages["qat_integer"]["accuracy"] - stages[base]["accuracy"]) * 100
        assert summary["checks"][f"points_from_{base}_qat_integer"] == pytest.approx(lost)
    (differences,) = read(output / "differences.json")
    assert differences["qat: integer and ONNX Runtime"]["differ"] == 0
    for kind in ("ptq", "qat"):
        apart = differences[f"{kind}: fake and integer"]
        assert apart["rate"] < 0.01 and apart["largest_lsb"] <= 2 and apart["of"] > 10_000
    assert (output / "seed0" / "float.onnx").is_file() and "<html" in (output / "report.html").read_text()


def test_the_control_of_quantize_is_int8_training_without_rounding(pruned, tmp_path, monkeypatch):
    """With the rounding left out of the INT8 training, too, both end in the same weights."""
    network = load_network(pruned)
    data = load_dataset("digits", normalisation=network.architecture.normalisation)
    with Progress() as progress:
        run = RunDirectory.create(tmp_path / "run")
        lab = Lab(limit_training(data, 300), run, progress, Deadline())
        settings = Phase(2, learning_rate=0.01, batch_size=100)
        control = quantize.train_float(lab, 0, network, settings)

        def unrounded(variables, ranges, x, *, update):
            return network.apply(variables, x), ranges

        rounding = fake_quant(network.apply, rules=INT8)
        ranges = int8.calibrate(lab, rounding, network.variables, 100)
        monkeypatch.setattr(int8, "fake_quant", lambda *_, **__: rounding._replace(apply=unrounded))
        trained = int8.train_int8(lab, 0, network.apply, network.variables, settings, calibrated=ranges)
    assert jax.tree.all(jax.tree.map(np.array_equal, control, trained.variables["variables"]))
    assert not np.array_equal(control["params"]["conv1"]["kernel"], network.variables["params"]["conv1"]["kernel"])
    assert jax.tree.all(jax.tree.map(np.array_equal, control["batch_stats"], network.variables["batch_stats"]))


def test_the_bounds_of_quantize():
    agree, apart = {quantize.ONNX: {"differ": 0, "of": 9}}, {quantize.ONNX: {"differ": 2, "of": 9}}
    assert quantize.misses(0.3, [agree, {}]) == [] and quantize.misses(100 * abs(0.92 - 0.917), [agree]) == []
    assert quantize.misses(0.31, [agree]) == ["the integers are 0.31 points from float training, beyond 0.3"]
    assert quantize.misses(0.0, [agree, apart]) == ["seed 1: 2 of 9 integers differ between JAX and ONNX Runtime"]
    assert len(quantize.misses(float("nan"), [apart])) == 2


def test_a_finished_network_is_a_directory_for_others(pruned, quantized):
    pytest.importorskip("safetensors", reason="needs pip install 'ehap-jax[torch]'")
    from interop.model_directory import load_model

    network, found = load_network(pruned), load_model(pruned / "model")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found.variables, network.variables))
    assert found.plan is not None and found.info.normalisation == network.architecture.normalisation
    assert found.metadata["test accuracy, finetuned"] == read(pruned / "summary.json")["stages"][-1]["accuracy"]
    assert found.config["run"] == read(pruned / "config.json")
    assert "output channels kept, union coupling" in (pruned / "model" / "README.md").read_text()

    trained = load_model(quantized / "seed0" / "model")
    assert trained.onnx is not None and b"QuantizeLinear" in trained.onnx.read_bytes() and trained.plan is not None
    assert "qat_onnx" in (trained.onnx.parent / "README.md").read_text()
    assert "test accuracy, float" not in trained.metadata, "that was measured on other weights"
    images = load_dataset("digits", normalisation=trained.info.normalisation)
    x = normalise(images.x_test, images.mean, images.std)
    right = np.mean(np.argmax(trained.apply(trained.variables, x), 1) == images.y_test)
    assert trained.metadata["test accuracy, qat_float"] == pytest.approx(right)


def test_prune_writes_a_smaller_network_that_loads(dense, pruned):
    plan = PruningPlan.load(pruned / "plan.json")
    assert plan.coupling == "union" and plan.provenance["criterion"] == "hessian"
    stages = {stage["stage"]: stage for stage in read(pruned / "summary.json")["stages"]}
    assert stages["finetuned"]["params"] <= 0.5 * stages["dense"]["params"]
    assert stages["dense"]["accuracy"] == read(dense / "summary.json")["stages"][0]["accuracy"]
    network = load_network(pruned)
    assert sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"])) == stages["finetuned"]["params"]
    assert np.isfinite(network.apply(network.variables, np.zeros((2, 8, 8, 1), np.float32))).all()


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


CELLS = [
    "--cells.criteria", "hessian", "random", "--cells.keeps", "0.5", "--cells.seeds", "1",
    "--cells.prune.scores.examples", "16", *phase("cells.finetune"), *phase("cells.int8"), "--train-images", "256",
]  # fmt: skip


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


def test_cells_that_prune_step_by_step_do_not_share_what_they_trained(dense, tmp_path):
    given = ["short", str(dense), "--data", "digits", "--cells.criteria", "magnitude", "random", "--cells.keeps", "0.4"]
    given += ["--cells.prune.steps", "2", *phase("cells.prune.between"), *phase("cells.finetune")]
    assert sweep.command([*given, "--train-images", "256", "--output", str(tmp_path / "run")]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pruned = ("magnitude-0.4", "random-0.4")
    assert [row["stage"] for row in metrics] == ["dense-1", *(s for c in pruned for s in (f"{c}-step1", c))]
    _, one, other = read(tmp_path / "run" / "sweep.json")["statistics"]
    assert one["params"] != other["params"]


@pytest.fixture(scope="module")
def swept(dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep") / "run"
    given = ["short", str(dense), "--data", "digits", "--cells.criteria", "magnitude", "--cells.keeps", "0.5"]
    assert sweep.command([*given, *phase("cells.finetune"), "--train-images", "256", "--output", str(output)]) == 0
    return output


def test_sweep(swept):
    full, half = read(swept / "sweep.json")["statistics"]
    assert half["macs"] <= 0.5 * full["macs"] and (swept / "pareto.png").exists()


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


def test_ehap_from_a_trained_network(dense, tmp_path):
    given = ["digits", "--dense", str(dense), "--seeds", "1", "--train-images", "256", *phase("finetune")]
    given += ["--prune.scores.estimator", "exact", "--prune.scores.compute", "float32", "--prune.scores.examples", "16"]
    assert ehap.command([*given, *phase("int8"), *phase("pretrain"), "--output", str(tmp_path / "run")]) == 0
    stages = {stage["stage"]: stage for stage in read(tmp_path / "run" / "summary.json")["stages"]}
    assert list(stages) == ["dense", "pruned", "finetuned", "int8"]
    assert stages["int8"]["bytes"] < stages["finetuned"]["bytes"] < stages["dense"]["bytes"]
    assert load_network(tmp_path / "run" / "seed0").plan is not None
    installed = all(find_spec(name) for name in ("torch", "safetensors"))
    assert (tmp_path / "run" / "seed0" / "model" / "plan.json").is_file() == installed
    if installed and find_spec("onnxruntime"):
        import onnx

        from interop.model_directory import load_model

        found = load_model(tmp_path / "run" / "seed0" / "model")
        data = load_dataset("digits", normalisation=found.info.normalisation)
        x = np.asarray(normalise(data.x_test, data.mean, data.std))
        (logits,) = quantize.session(onnx.load(found.onnx)).run(None, {"x": x})
        assert np.mean(np.argmax(logits, 1) == data.y_test) == stages["int8"]["accuracy"]
        assert found.metadata["test accuracy, int8"] == stages["int8"]["accuracy"]


REPRODUCE = ["cpu", "DENSE", "--train-images", "512"]


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        (prune, ["short", "DENSE", "--train-images", "512", "--prune.keep", "0.001"], "out of reach"),
        (prune, ["short", "DENSE", "--train-images", "512", "--prune.steps", "0"], "--prune.steps must be at least 1"),
        (
            prune,
            ["short", "DENSE", "--train-images", "512", "--finetune.batch-size", "5000"],
            "--finetune.batch-size 5000",
        ),
        (prune, ["short", "DENSE", "--prune.scores.probes", "0", "--train-images", "512"], "--prune.scores.probes"),
        (prune, ["short", "nowhere"], "no checkpoint or run directory nowhere"),
        (reproduce, ["cpu", "nowhere"], "no checkpoint or run directory nowhere"),
        (trace, ["short", "DENSE", "--scores.examples", "100000"], "100000 images"),
        (
            compare_criteria,
            ["short", "DENSE", "--train-images", "512", "--cells.keeps", "1.5"],
            "--cells.keeps are fractions",
        ),
        (compare_criteria, ["short", "DENSE", "--train-images", "512", "--cells.seeds", "0"], "--cells.seeds"),
        (
            sweep,
            [
                "short",
                "DENSE",
                "--train-images",
                "512",
                "--cells.prune.steps",
                "2",
                "--cells.prune.between.epochs",
                "0",
            ],
            "--cells.prune.between.epochs",
        ),
        (reproduce, [*REPRODUCE, "--cells.int8.batch-size", "99999"], "--cells.int8.batch-size 99999"),
        (reproduce, [*REPRODUCE, "--cells.keeps", "1.5"], "--cells.keeps are fractions"),
        (reproduce, [*REPRODUCE, "--cells.keeps", "0.0001"], "out of reach"),
        (reproduce, [*REPRODUCE, "--cells.prune.steps", "0"], "--cells.prune.steps must be at least 1"),
        (reproduce, [*REPRODUCE, "--precision.scores.examples", "9999"], "--precision.scores.examples"),
        (pretrain, ["digits", "--phase.distill", "0.5"], "--phase.distill 0.5: this phase has no teacher"),
        (ehap, ["digits", "--int8.distill", "0.5"], "--int8.distill 0.5"),
        (quantize, ["short", "DENSE", "--train-images", "512", "--qat.distill", "0.5"], "--qat.distill 0.5"),
        (
            prune,
            ["short", "DENSE", "--train-images", "512", "--prune.steps", "2", "--prune.between.distill", "0.5"],
            "--prune.between.distill 0.5",
        ),
        (compare_precision, ["short", "DENSE", "--computes", "float32", "float32"], "--computes"),
        (sweep, ["short", "DENSE", "--max-minutes", "0"], "positive number of minutes"),
        (sweep, ["short", "DENSE", "--train-images", "512", "--cells.keeps", "0.001"], "out of reach"),
        (ehap, ["digits", "--model", "alexnet"], "unknown model 'alexnet'"),
        (pretrain, ["digits", "--model", "vgg11"], "vgg11 does not take --shortcut"),
        (pretrain, ["digits", "--train-images", "9999"], "cannot take 9999"),
        (pretrain, ["digits", "--phase.label-smoothing", "1"], "--phase.label-smoothing"),
        (pretrain, ["digits", "--phase.average", "1.5"], "--phase.average"),
        (pretrain, ["digits", "--phase.distill", "2"], "--phase.distill"),
        (pretrain, ["digits", "--phase.warmup", "30"], "--phase.warmup"),
    ],
)
def test_bad_settings_fail_before_anything_is_written(dense, tmp_path, capsys, recipe, arguments, message):
    given = [str(dense) if word == "DENSE" else word for word in arguments]
    assert recipe.command([*given, "--data", "digits", "--output", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


DATA_OF_ANOTHER_KIND = [(12, (8, 8, 1), "10 classes apart, .* has 12"), (10, (16, 16, 1), "8 × 8 × 1, .* 16 × 16 × 1")]


@pytest.mark.parametrize(("classes", "shape", "message"), DATA_OF_ANOTHER_KIND)
@pytest.mark.parametrize(
    "recipe",
    [prune, trace, compare_criteria, compare_precision, compare_estimators, quantize, spectrum, reproduce, ehap],
)
def test_data_that_does_not_fit_the_network(dense, tmp_path, capsys, recipe, classes, shape, message):
    def images(count):
        return np.zeros((count, *shape), np.uint8), np.arange(count) % classes

    (x_train, y_train), (x_test, y_test) = images(10 * classes), images(classes)
    np.savez(tmp_path / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    variant = {reproduce: "cpu", ehap: "digits"}.get(recipe, "short")
    network = ["--dense", str(dense)] if recipe is ehap else [str(dense)]
    given = [variant, *network, "--data", f"npz:{tmp_path / 'data.npz'}", "--output", str(tmp_path / "run")]
    assert recipe.command(given) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FloatingPointError("the training loss of epoch 1 is nan"), 2),
        (ArithmeticError("the shrunk network differs from the masked one"), 2),
        (NotImplementedError("no rule for this primitive"), 2),
        (Missed("the integers are 1.00 points from float training"), 1),
        (OutOfTime("stopped after 1 minutes"), 3),
    ],
)
def test_a_run_that_failed_is_told_from_one_that_missed_its_bounds(capsys, tmp_path, error, status):
    def main(*_):
        raise error

    assert run_command(main, pretrain.VARIANTS, ["digits", "--output", str(tmp_path)], name="pretrain") == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pretrain: {error}")


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("tensorboard", ["--tensorboard"], "no tensorboard here: .*ehap-jax.tensorboard"),
        ("wandb", ["--wandb"], "pip install wandb"),
        ("jinja2", [], "no jinja2 here: .*ehap-jax.report"),
    ],
)
def test_a_missing_package_is_found_before_anything_is_written(
    tmp_path, capsys, monkeypatch, missing, options, message
):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else name)
    given = ["digits", *MODEL, *options, "--output", str(tmp_path / "run")]
    assert pretrain.command(given) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_a_run_that_holds_no_network_says_so(stopped):
    with pytest.raises(FileNotFoundError, match=r"has no network\.json"):
        load_network(stopped[1])


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


def test_no_model_directory_without_its_packages(pruned, tmp_path, monkeypatch):
    notes = []
    progress = SimpleNamespace(note=notes.append)
    lab = SimpleNamespace(progress=progress, run=RunDirectory.create(tmp_path / "run"))
    monkeypatch.setattr(model_directory, "find_spec", lambda name: None if name == "safetensors" else name)
    assert model_directory.write_model_directory(lab, 0, load_network(pruned), {}) is None
    assert "no model/ without safetensors" in notes[0] and not (tmp_path / "run" / "model").exists()
