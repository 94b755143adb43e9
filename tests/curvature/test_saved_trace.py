"""Saved traces: bit-identical after a kill, refused when anything that determines them differs."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.curvature import Policy, channel_trace, fingerprint, load_trace, save_trace

KEY = jax.random.key(5)
PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 24).reshape(6, 4), "bias": jnp.ones(4)}
BATCH = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
FLOAT16 = Policy("float16")


def loss(p, batch):
    h = jnp.tanh(batch @ p["kernel"] + p["bias"][None, :])
    return (h.astype(jnp.float32) ** 2).sum(1).mean()


def values(estimate):
    leaves = jax.tree.leaves(estimate)
    typed = [isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [np.asarray(jax.random.key_data(x) if t else x) for x, t in zip(leaves, typed, strict=True)]


def assert_identical(a, b):
    assert jax.tree.structure(a.mean) == jax.tree.structure(b.mean)
    for x, y in zip(values(a), values(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole():
    return channel_trace(loss, PARAMS, BATCH, key=KEY, num_probes=60, policy=FLOAT16)


@pytest.mark.slow
def test_what_is_read_is_what_was_written(whole, tmp_path):
    of = fingerprint(loss, PARAMS, BATCH, key=KEY, num_probes=60, policy=FLOAT16)
    save_trace(tmp_path / "trace.npz", whole, of)
    assert_identical(load_trace(tmp_path / "trace.npz", PARAMS, of), whole)
    assert_identical(load_trace(tmp_path / "trace.npz", PARAMS, replace(of, probes=None)), whole)
    assert os.listdir(tmp_path) == ["trace.npz"]


KILLED = """
import sys
from ehap_jax.curvature import channel_trace
from tests.curvature.test_saved_trace import BATCH, LONG, PARAMS, loss

channel_trace(
    loss, PARAMS, BATCH, **LONG, save_to=sys.argv[1], save_every=0, progress=lambda done, _: print(done, flush=True)
)
"""
LONG = {"key": KEY, "num_probes": 500, "policy": FLOAT16, "probes_per_step": 7}


def killed_after(file, seconds):
    """The counts that a run reports which is killed so long after the first of them."""
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    )
    assert child.stdout is not None
    first = child.stdout.readline()
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate()
    return [int(done) for done in (first + rest).split("\n")[:-1]]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_repeated_is_bit_identical(tmp_path):
    """Between chunks, within one or while the file is written: the moments are random."""
    file = tmp_path / "trace.npz"
    done = 0
    for seconds in np.random.default_rng(8).uniform(0, 0.3, 3):
        reported = killed_after(file, seconds)
        assert done < reported[0] <= reported[-1] < LONG["num_probes"]
        done = reported[-1]
    seen = []
    resumed = channel_trace(loss, PARAMS, BATCH, **LONG, save_to=file, progress=lambda done, total: seen.append(done))
    assert seen[0] > done
    assert_identical(resumed, channel_trace(loss, PARAMS, BATCH, **LONG))
    assert_identical(channel_trace(loss, PARAMS, BATCH, **LONG, save_to=file), resumed)


def test_a_run_that_stopped_early_is_not_continued(tmp_path):
    options = dict(key=KEY, num_probes=500, probes_per_step=20, save_to=tmp_path / "trace.npz")
    options["until"] = lambda estimate: estimate.count >= 30
    first = channel_trace(loss, PARAMS, BATCH, **options)
    assert first.count == 40
    assert_identical(channel_trace(loss, PARAMS, BATCH, **options), first)


def colder(p, batch):
    return 0.5 * loss(p, batch)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weights", dict(params=PARAMS | {"bias": PARAMS["bias"].at[0].add(1e-6)})),
        ("batch", dict(batch=BATCH.at[3, 2].add(1.0))),
        ("loss", dict(loss=colder)),
        ("policy", dict(policy=Policy("bfloat16"))),
        ("key", dict(key=jax.random.key(6))),
        ("selection", dict(select=lambda path, leaf: True)),
        ("selection", dict(channel_axis={"kernel": 0})),
        ("microbatch", dict(microbatch=4)),
        ("probes", dict(num_probes=4)),
    ],
)
def test_a_trace_of_something_else_is_refused_by_name(part, change, tmp_path):
    file = tmp_path / "trace.npz"
    arguments = dict(loss=loss, params=PARAMS, batch=BATCH, key=KEY, num_probes=3, save_to=file)

    def run(loss, params, batch, **options):
        return channel_trace(loss, params, batch, **options)

    run(**arguments)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"these differ: {part} ") as error:
        run(**(arguments | change))
    assert str(error.value).count("(saved ") == 1
    assert file.read_bytes() == before


def test_the_loss_is_known_by_what_it_computes():
    def of(f):
        return fingerprint(f, PARAMS, BATCH, key=KEY).loss

    table = np.arange(4, dtype=np.float32)
    assert of(loss) == of(lambda p, b: loss(p, b))
    assert of(lambda p, b: loss(p, b) + p["bias"] @ table) != of(lambda p, b: loss(p, b) + p["bias"] @ (table + 1))
    assert of(lambda p, b: 0.1234567 * loss(p, b)) != of(lambda p, b: 0.1234568 * loss(p, b))
    assert of(lambda p, b: jax.nn.relu(p["bias"]).sum()) == of(lambda p, b: jax.nn.relu(p["bias"]).sum())


def test_a_trace_of_a_loss_with_other_constants_is_refused(tmp_path):
    """Constants inside a compiled loss are arguments of no operation that is seen from outside."""

    def scaled(c):
        return jax.jit(lambda p, b: (p["kernel"] ** 2 * jnp.full((6, 4), c)).sum() + 0 * b.sum())

    options = dict(key=KEY, num_probes=1, save_to=tmp_path / "trace.npz")
    assert channel_trace(scaled(1.0), PARAMS, BATCH, **options).total() == 48
    assert channel_trace(scaled(1.0), PARAMS, BATCH, **options).total() == 48
    with pytest.raises(ValueError, match="these differ: loss "):
        channel_trace(scaled(5.0), PARAMS, BATCH, **options)


def test_a_loss_that_calls_the_host_is_refused_where_its_trace_would_be_saved(tmp_path):
    def loss(p, batch):
        weight = jax.pure_callback(lambda: np.float32(2), jax.ShapeDtypeStruct((), jnp.float32))
        return weight * (p["kernel"] ** 2).sum() + 0 * batch.sum()

    options = dict(key=KEY, num_probes=1)
    assert channel_trace(loss, PARAMS, BATCH, **options).total() == 96
    with pytest.raises(ValueError, match=r"pure_callback at .* runs a Python function"):
        channel_trace(loss, PARAMS, BATCH, **options, save_to=tmp_path / "trace.npz")


def test_files_that_are_not_whole_traces(whole, tmp_path):
    of = fingerprint(loss, PARAMS, BATCH, key=KEY, num_probes=60, policy=FLOAT16)
    file = tmp_path / "trace.npz"
    with pytest.raises(FileNotFoundError):
        load_trace(file, PARAMS, of)
    save_trace(file, whole, of)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_trace(file, PARAMS, of)
    np.savez(file, x=np.zeros(3))
    with pytest.raises(ValueError, match="not a saved trace of this version"):
        load_trace(file, PARAMS, of)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean/channel/kernel", np.full(4, np.nan, np.float32), r"'mean/channel/kernel' is float32\[4\] \[nan.*finite"),
        ("mean/channel/kernel", np.zeros(5, np.float32), "one number per channel"),
        ("mean/channel/kernel", np.zeros(4, np.int32), "finite"),
        ("mean/channel/ghost", np.zeros(4, np.float32), "one number per channel"),
        ("mean/layer/ghost", np.float32(1), "of no parameter whose trace"),
        ("mean/total", np.float32(np.inf), "finite"),
        ("squares/channel/kernel", -np.ones(4, np.float32), "not negative"),
        ("squares/layer/kernel", np.ones(2, np.float32), r"of shape \(\)"),
        ("squares/total", None, "has no 'squares/total'"),
        ("count", np.int32(-5), "'count' is int32.*-5.*whole number from 0"),
        ("count", np.float32(2.5), "whole number from 0"),
        ("count", None, "has no 'count'"),
        ("loss_scale", np.float32(0), "a positive number"),
        ("failure", np.zeros(1, np.uint8), "truth values"),
        ("key", np.zeros(2, np.uint32), "it should be the key threefry"),
        ("key_impl", np.array("rot13"), "it should be the key threefry"),
        ("known/kernel", np.full(4, np.nan, np.float32), "finite"),
        ("origin", np.array("[]"), "trace.npz: origin must hold an object"),
        ("origin", np.array('{"method": "a", "compute": "b", "axes": [["kernel", [7]]]}'), "among its axes"),
        ("origin", np.array('{"method": 3, "compute": "float16"}'), "origin has 3 as its method"),
        ("fingerprint", np.array("[" * 10**5), "fingerprint is nested"),
        ("fingerprint", np.array("{}"), "fingerprint has None as its weights"),
        ("fingerprint", None, "fingerprint is not a JSON file"),
    ],
)
def test_arrays_that_no_trace_has(whole, tmp_path, name, value, message):
    of = fingerprint(loss, PARAMS, BATCH, key=KEY, num_probes=60, policy=FLOAT16)
    file = tmp_path / "trace.npz"
    save_trace(file, whole, of)
    with np.load(file) as saved:
        arrays = dict(saved)
    arrays |= {name: value}
    np.savez(file, **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message):
        load_trace(file, PARAMS, of)


def test_a_folder_that_is_not_there_is_an_error_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        channel_trace(loss, PARAMS, BATCH, key=KEY, num_probes=3, save_to=tmp_path / "nowhere" / "trace.npz")


def test_a_state_and_a_saved_trace_at_once_is_an_error(whole, tmp_path):
    file = tmp_path / "trace.npz"
    channel_trace(loss, PARAMS, BATCH, key=KEY, num_probes=3, policy=FLOAT16, save_to=file)
    with pytest.raises(ValueError, match="both state="):
        channel_trace(loss, PARAMS, BATCH, key=KEY, num_probes=3, policy=FLOAT16, save_to=file, state=whole.state)
