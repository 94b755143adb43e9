"""recipes.ehap: the whole method from a trained network."""

from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.data import load_dataset, normalise
from ehap_jax.quant import onnx_session
from recipes import ehap
from recipes.network import load_network
from tests.recipes.tiny import phase, read


@pytest.mark.slow
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
        from interop.model_directory import load_model

        found = load_model(tmp_path / "run" / "seed0" / "model")
        data = load_dataset("digits", normalisation=found.info.normalisation)
        x = np.asarray(normalise(data.x_test, data.mean, data.std))
        (logits,) = onnx_session(found.onnx).runtime.run(None, {"x": x})
        assert np.mean(np.argmax(logits, 1) == data.y_test) == stages["int8"]["accuracy"]
        assert found.metadata["test accuracy, int8"] == stages["int8"]["accuracy"]
