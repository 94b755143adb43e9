"""What tests of curvature share."""

import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import gauss_newton_trace
from ehap_jax.curvature.probe_loop import Run
from tests.curvature.dense_hessians import DOUBLE, small


@pytest.fixture(scope="session")
def two_layers():
    """Float64 parameters of `small`, 7 examples with labels, and the exact trace."""
    rng = np.random.default_rng(8)
    with enable_x64():
        params = {
            "w": jnp.asarray(rng.normal(size=(4, 5))),
            "b": jnp.asarray(rng.normal(size=5)),
            "out": jnp.asarray(rng.normal(size=(5, 3))),
        }
        x, labels = jnp.asarray(rng.normal(size=(7, 4))), jnp.asarray(rng.integers(0, 3, 7), jnp.int32)
        return params, x, labels, gauss_newton_trace(small, params, x, policy=DOUBLE)


@pytest.fixture
def loop_on_device(monkeypatch):
    """Probes in one compiled loop, as accelerators run them: for statistics over thousands of cheap probes."""
    monkeypatch.setattr(Run, "on_device", True)
