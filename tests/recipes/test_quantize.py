"""recipes.quantize: integers in JAX and in ONNX Runtime, their control and their bounds."""

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax import INT8, fake_quant
from ehap_jax.data import limit_training, load_dataset, normalise
from ehap_jax.training import Deadline, Progress, RunDirectory
from recipes import int8, quantize
from recipes.lab import Lab, Phase
from recipes.network import load_network
from tests.recipes.tiny import phase, read


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
    assert "output channels kept, group coupling" in (pruned / "model" / "README.md").read_text()

    trained = load_model(quantized / "seed0" / "model")
    assert trained.onnx is not None and b"QuantizeLinear" in trained.onnx.read_bytes() and trained.plan is not None
    assert "qat_onnx" in (trained.onnx.parent / "README.md").read_text()
    assert "test accuracy, float" not in trained.metadata, "that was measured on other weights"
    images = load_dataset("digits", normalisation=trained.info.normalisation)
    x = normalise(images.x_test, images.mean, images.std)
    right = np.mean(np.argmax(trained.apply(trained.variables, x), 1) == images.y_test)
    assert trained.metadata["test accuracy, qat_float"] == pytest.approx(right)
