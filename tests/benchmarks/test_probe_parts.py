"""The parts of a probe: one kernel timed in every form, and sums of known times."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import probe_parts
from benchmarks.probe_parts import kept_bytes, line, sums, time_gradient, time_site
from benchmarks.probe_rows import Row
from ehap_jax.curvature.taps import find_taps
from ehap_jax.graph import trace_graph


def clock(seconds):
    return {"seconds": seconds, "cpu_seconds": 2 * seconds}


def part(uses, reads_images, saved=0.0):
    pair = {"apart": clock(4.0), "as_one": clock(4.0 - saved)}
    times = {"forward": clock(1.0), "backward": clock(2.0), "sum": pair, "both": pair}
    return {"uses": uses, "reads_images": reads_images, **times}


def test_sums_of_known_times():
    """Three forward and two backward, of the first one forward; what is slower as one is left apart."""
    parts = [part(1, True, 1.0), part(2, False, 0.5), part(3, False, -1.0)]
    found = sums(parts, clock(40.0))["sums"]
    assert found["seconds"] == {"alone": 36.0, "rest": 4.0, "merged_would_save": 2.0}
    assert found["cpu_seconds"] == {"alone": 72.0, "rest": 8.0, "merged_would_save": 4.0}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [(3, 3, 2, 4), (2, 3)])
def test_a_kernel_is_timed_in_every_form(kernel):
    def apply(params, x):
        if len(kernel) == 2:
            return x @ params["kernel"]
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = jnp.ones((2, 4, 4, 2) if len(kernel) == 4 else (2, 2))
    graph = trace_graph(apply)({"kernel": jnp.ones(kernel)}, x)
    (site,) = find_taps(graph, ["kernel"]).sites
    found = time_site(site, 1e-4)
    names = ("forward", "backward", "sum", "both") if len(kernel) == 4 else ("forward", "backward")
    assert {"input", "kernel", "output", *names} == found.keys()
    assert found["kernel"] == kernel and found["forward"]["seconds"] > 0
    assert ("as one" in line({"uses": 1, **found})) == (len(kernel) == 4)


@pytest.mark.slow
def test_both_ways_to_a_gradient_give_it(monkeypatch):
    """What is timed is the gradient, and all of it."""
    given = []
    monkeypatch.setattr(probe_parts, "least", lambda call, _: given.append(call()) or clock(1.0))
    loss, params, x = (lambda p, x: jnp.sum(jnp.sin(x @ p["kernel"]))), {"kernel": jnp.ones((2, 3))}, jnp.eye(2)
    found = time_gradient(loss, params, x, 1.0)
    assert found == {"forward": clock(1.0), "gradient": {"as_one": clock(1.0), "apart": clock(1.0)}}
    value, one, apart = given
    assert value == loss(params, x)
    expected = jnp.full((2, 3), jnp.cos(1.0))
    assert all(jnp.allclose(gradient["kernel"], expected) for gradient in (one, apart))


@pytest.mark.slow
def test_less_is_kept_than_jax_keeps():
    found = kept_bytes(Row("ehap", "float32", "tiny", 4, 8))
    assert found["float32"]["ours"] < found["float32"]["jax"] / 2
    assert 0.49 < found["float16"]["ours"] / found["float32"]["ours"] < 0.55
