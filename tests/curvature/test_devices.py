"""Traces on meshes of eight virtual devices and in two processes: those of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ehap_jax.curvature import channel_trace
from tests.curvature import on_devices

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def command(*arguments, devices, module="on_devices"):
    """Programs are compiled in the parts that users have: as a whole, two of them round one operation differently."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=32"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.curvature.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(child, timeout=1800):
    try:
        said, _ = child.communicate(timeout=timeout)
    finally:
        child.kill()
    assert child.returncode == 0, said


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("devices") / "found.json"
    finished(command(output, devices=8))
    return json.loads(output.read_text())


ROUNDINGS = 1e-5
"""Of the largest trace, where examples are added in another order: some 100 roundings of float32. Processors differ."""


def assert_same(found, expected):
    assert found["count"] == expected["count"] == on_devices.PROBES
    for name in ("mean", "sem"):
        a, b = np.array(found[name]), np.array(expected[name])
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDINGS * np.abs(b).max())


@pytest.mark.parametrize("shape", [*(f"{d}x{p}" for d, p in on_devices.SHAPES), "linearize", "probe only"])
def test_a_mesh_gives_the_result_of_one_device(found, shape):
    assert_same(found[shape], found["one"])


def test_the_result_here_is_that_of_the_other_process(found):
    assert_same(on_devices.flat(on_devices.trace()), found["one"])


def test_probes_alone_divided_change_no_bit(found):
    assert found["1x8"] == found["probe only"] == found["one"]


def test_the_loop_on_the_device_gives_the_same(found):
    expected = np.array(found["one"]["mean"])
    np.testing.assert_allclose(found["loop on device"], expected, rtol=0, atol=ROUNDINGS * np.abs(expected).max())


def test_going_on_with_another_number_of_devices(found):
    assert found["stopped at"] == 5
    assert_same(found["resumed"], found["one"])
    assert_same(found["went on with one"], found["one"])


def test_float16_backs_off_as_on_one_device(found):
    one, many = found["float16"]
    assert one["rejected"] > 0
    assert one == many
    assert found["first scales"][0] == found["first scales"][1]


def test_dividing_the_examples_divides_the_memory(found):
    together, divided = found["needs"]
    assert divided < 0.6 * together


def test_two_processes(found, tmp_path):
    """Through jax.distributed, with gloo between processes: both return the trace, one of them writes the file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    output = tmp_path / "found"
    children = [command(output, address, 2, i, devices=2) for i in range(2)]
    for child in children:
        finished(child)
    for i in range(2):
        report = json.loads(output.with_suffix(f".{i}.json").read_text())
        assert report["processes"] == 2 and report["devices"] == [4, 2]
        assert_same(report["found"], found["one"])
        assert report["read"] == report["found"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".npz"]


def test_axes_of_other_names_are_refused():
    mesh = jax.make_mesh((1,), ("batch",))
    with pytest.raises(ValueError, match=r'"data" \(examples\), "probe".*batch'):
        channel_trace(on_devices.loss, *on_devices.problem(), key=jax.random.key(0), num_probes=1, mesh=mesh)


def test_an_exact_trace_on_a_mesh_is_that_of_one_device(found):
    """On three meshes in several compiled functions, the way of CPUs; in one; begun on four devices, ended on one."""
    one, *others = (np.array(values) for values in found["exact"])
    assert one.max() > 0 and len(others) == 5
    for other in others:
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * one.max())
