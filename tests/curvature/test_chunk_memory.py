"""Chunks of examples against a memory budget, by what the compiler says that they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.curvature import gauss_newton, gauss_newton_trace, softmax_cross_entropy, squared_error
from tests.curvature.dense_hessians import make

pytestmark = pytest.mark.slow


def needs(monkeypatch, *arguments, **options):
    """Examples of the first chunk, and the bytes that its program needs by the compiler."""
    seen = []

    def chunk(plan, leaves, x, *rest):
        found = gauss_newton._whole_chunk.lower(plan, leaves, x, *rest).compile().memory_analysis()
        seen.append((len(x), found.temp_size_in_bytes + found.output_size_in_bytes))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gauss_newton, "_chunk_function", lambda leaves: chunk)
        gauss_newton_trace(*arguments, **options)
    return seen[0]


@pytest.mark.parametrize("name", ["plain", "depthwise", "max-pool"])
def test_what_is_chosen_fits_the_memory_budget(monkeypatch, name):
    model, params, x, axes = make(name, double=False)
    several = (model, params, jnp.tile(x, (3, 1, 1, 1)))
    together, most = needs(monkeypatch, *several, channel_axis=axes, microbatch=15)
    budget = most // 3
    examples, found = needs(monkeypatch, *several, channel_axis=axes, memory_budget=budget)
    assert 1 < examples < together == 15 and found <= budget < most
    with pytest.raises(ValueError, match=rf"memory_budget={budget}: 15 examples at a time need .* microbatch=\d+ fits"):
        gauss_newton_trace(*several, channel_axis=axes, microbatch=15, memory_budget=budget)
    with pytest.raises(ValueError, match="memory_budget=9: 1 example needs about"):
        gauss_newton_trace(*several, channel_axis=axes, memory_budget=9)


@pytest.mark.parametrize("head", [softmax_cross_entropy, squared_error])
@pytest.mark.parametrize("options", [{}, {"classes": 2, "key": jax.random.key(0)}])
def test_a_thousand_classes_need_no_square_matrix(monkeypatch, head, options):
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.normal(size=(3, 1000)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    examples, found = needs(monkeypatch, lambda p, x: x @ p["w"], params, x, head=head, **options)
    assert examples == 4 and found < 4 * 1000**2 * 4 / 10
