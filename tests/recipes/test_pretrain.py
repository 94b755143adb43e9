"""recipes.pretrain: a dense network from scratch."""

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.training import load_variables
from recipes.network import load_network
from tests.recipes.tiny import read

pytestmark = pytest.mark.slow


def test_pretrain_writes_a_network_that_loads(dense):
    network = load_network(dense)
    summary = read(dense / "summary.json")
    (stage,) = summary["stages"]
    assert stage["params"] == sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"]))
    assert 0 <= summary["checks"]["validation_accuracy"] <= 1 and "<html" in (dense / "report.html").read_text()
    assert network.apply(network.variables, np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 10)
    assert load_variables(dense / "network.npz").keys() == network.variables.keys()
