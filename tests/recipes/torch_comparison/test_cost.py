"""What is measured of a trace; that it is measured in fresh processes is tested in the whole comparison."""

import numpy as np
import pytest

from recipes.torch_comparison.cost import measure

pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("framework", ["JAX", "PyTorch"])
def test_time_and_memory(torch_inputs, framework):
    images, labels = np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, np.int32)
    cost = measure(framework, torch_inputs[0], "auto", images, labels, 1)
    assert cost["precision"] == "highest"
    assert 0 < cost["memory_before"] <= cost["peak_memory"]
    assert cost["seconds_per_probe"] > 0 and cost["cpu_seconds_per_probe"] > 0
