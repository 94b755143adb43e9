"""README's examples run as they stand, on a network with BatchNorm; and README stays short."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax import PruningPlan
from ehap_jax.models import ResNet, eval_apply, train_apply

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_examples_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curvature, papers, torch = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = ResNet(depth=8, widths=(4, 4, 8), num_classes=3)
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    variables, labels = model.init(jax.random.key(1), x, train=False), jnp.arange(8) % 3

    def loss(variables, batch):
        logits = eval_apply(model)(variables, batch[0]).astype(jnp.float32)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1))

    names = {
        "apply": eval_apply(model), "train_apply": train_apply(model), "variables": variables, "x": x, "labels": labels,
        "batches": [x], "loss": loss, "batch": (x, labels), "key": jax.random.key(2),
    }  # fmt: skip
    exec(curvature, names)
    assert isinstance(names["plan"], PruningPlan)
    close = jnp.abs(names["integers"](x) - names["small"](names["small_variables"], x)).max()
    assert (tmp_path / "model.onnx").exists() and np.isfinite(close)
    exec(papers.replace("num_probes=300", "num_probes=2"), names)
    assert names["plan"].provenance["criterion"] == "hessian"
    assert "from_torch" in torch and "to_torch" in torch  # tests/interop runs these on real files


def test_it_stays_short():
    assert len(README.splitlines()) <= 120
