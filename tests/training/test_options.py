"""What training can do beyond plain steps: averages, smoothing, distillation, low precision, several devices."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ehap_jax.training import (
    Checkpoints,
    Deadline,
    OutOfTime,
    Teacher,
    create_train_state,
    cross_entropy,
    distillation_loss,
    fit,
    load_variables,
    low_precision,
    make_epoch,
    save_variables,
    sgd_cosine,
    smoothed_cross_entropy,
)

N, BATCH = 24, 8


def forward(params, model_state, x):
    """A linear map with a running mean of the batch's features."""
    mean = jnp.mean(x, axis=0).astype(jnp.float32)
    running = 0.9 * model_state["stats"]["mean"] + 0.1 * mean
    return (x - mean[None].astype(x.dtype)) @ params["w"], {**model_state, "stats": {"mean": running}}


def prepare(key, images):
    return images.astype(jnp.float32) / 255 + 0.1 * jax.random.normal(key, images.shape)


def example():
    """Images, labels and the variables to start from."""
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.integers(0, 256, (N, 6), np.uint8))
    variables = {
        "params": {"w": jnp.asarray(generator.normal(size=(6, 3)), jnp.float32)},
        "stats": {"mean": jnp.zeros(6)},
        "count": jnp.zeros((), jnp.int32),
    }
    return images, jnp.asarray(np.arange(N) % 3, jnp.int32), variables


@pytest.fixture(scope="module")
def data():
    return example()


def run(data, *, epochs=1, forward=forward, average=None, **options):
    images, labels, variables = data
    optimizer = sgd_cosine(0.3, total_steps=20)
    epoch = make_epoch(forward, optimizer, prepare, batch_size=BATCH, num_examples=N, average=average, **options)
    state = create_train_state(variables, optimizer, jax.random.key(1), average=average is not None)
    states = [state]
    for _ in range(epochs):
        state, metrics = epoch(state, images, labels)
        states.append(state)
    return states, metrics


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["scan", "step"])
def test_average_follows_the_variables(data, loop):
    """Batches as large as the data: every epoch is one step, so the states between the steps are known."""
    images, labels, variables = data
    optimizer = sgd_cosine(0.3, total_steps=20)
    epoch = make_epoch(forward, optimizer, prepare, batch_size=N, num_examples=N, average=0.25, loop=loop)
    state = create_train_state(variables, optimizer, jax.random.key(1), average=True)
    expected = jax.tree.map(np.asarray, variables)
    for step in range(4):
        state, _ = epoch(state, images, labels)
        rate = min(0.25, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda old, new, r=rate: r * old + (1 - r) * new if new.dtype == np.float32 else new,
            expected,
            jax.tree.map(np.asarray, state.variables),
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.averaged, expected)
    assert float(jnp.abs(state.averaged["params"]["w"] - state.params["w"]).max()) > 1e-3


@pytest.mark.slow
def test_an_average_changes_nothing_else_and_survives_a_checkpoint(data, tmp_path):
    (_, plain), _ = run(data)
    (_, state), _ = run(data, average=0.9)
    np.testing.assert_array_equal(plain.params["w"], state.params["w"])
    assert plain.averaged["params"]["w"] is plain.params["w"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        np.testing.assert_array_equal(checkpoints.restore(state).averaged["params"]["w"], state.averaged["params"]["w"])


@pytest.mark.slow
def test_smoothing_is_that_of_optax():
    generator = np.random.default_rng(0)
    logits, labels = jnp.asarray(generator.normal(size=(5, 4)), jnp.float32), jnp.array([0, 3, 1, 1, 2])
    expected = optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, 4), 0.2))
    np.testing.assert_allclose(smoothed_cross_entropy(0.2)(logits, labels), expected, rtol=1e-6)
    assert smoothed_cross_entropy(0.0) is cross_entropy
    assert smoothed_cross_entropy(0.2)(logits.astype(jnp.bfloat16), labels).dtype == jnp.float32
    with pytest.raises(ValueError, match="label smoothing"):
        smoothed_cross_entropy(1.0)


def test_distillation_loss_is_the_scaled_divergence():
    generator = np.random.default_rng(0)
    ours, theirs = (generator.normal(size=(4, 3)) for _ in range(2))
    p, q = (np.exp(z / 2) / np.exp(z / 2).sum(1, keepdims=True) for z in (theirs, ours))
    expected = 4 * (p * np.log(p / q)).sum(1)
    found = distillation_loss(jnp.asarray(ours, jnp.float32), jnp.asarray(theirs, jnp.float32), 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_teacher_weighs_in(data, weight):
    """With weight 0 it changes nothing; with weight 1 labels change nothing, and the student moves towards it."""
    images, labels, variables = data
    target = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)), jnp.float32)
    teacher = Teacher(lambda w, x: (x - jnp.mean(x, axis=0, keepdims=True)) @ w, target, weight=weight)
    (start, *_, end), _ = run(data, epochs=3, teacher=teacher)
    if weight == 0:
        (*_, plain), _ = run(data, epochs=3)
        np.testing.assert_array_equal(end.params["w"], plain.params["w"])
        return
    (*_, other), _ = run((images, (labels + 1) % 3, variables), epochs=3, teacher=teacher)
    np.testing.assert_array_equal(end.params["w"], other.params["w"])
    shown = prepare(jax.random.key(3), images)
    logits = [shown @ w for w in (start.params["w"], end.params["w"], target)]
    before, after = (float(jnp.mean(distillation_loss(z, logits[2], 4.0))) for z in logits[:2])
    assert after < before


@pytest.mark.slow
def test_low_precision_computes_in_it_and_keeps_float32_weights(data):
    seen = []

    def spied(params, model_state, x):
        logits, now = forward(params, model_state, x)
        seen.append((params["w"].dtype, x.dtype, logits.dtype))
        return logits, now

    (_, exact), _ = run(data)
    (_, low), _ = run(data, forward=low_precision(spied, jnp.bfloat16))
    assert {jnp.dtype(dtype).name for dtypes in seen for dtype in dtypes} == {"bfloat16"}
    assert low.params["w"].dtype == low.model_state["stats"]["mean"].dtype == jnp.float32
    moved = float(jnp.abs(exact.params["w"] - data[2]["params"]["w"]).max())
    gap = float(jnp.abs(low.params["w"] - exact.params["w"]).max())
    # Three steps with gradients of 8 significant bits: a few 2**-8 of the way, and not none at all.
    assert 0 < gap < 0.05 * moved
    with pytest.raises(ValueError, match="float16"):
        low_precision(forward, jnp.float16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": 1.0}, "average is a decay"),
        ({"teacher": Teacher(forward, None, weight=2.0)}, "weight 2.0"),
        ({"teacher": Teacher(forward, None, temperature=0.0)}, "temperature 0.0"),
    ],
)
def test_options_out_of_range(data, options, message):
    with pytest.raises(ValueError, match=message):
        run(data, **options)


def test_an_average_needs_a_state_with_one(data):
    images, labels, variables = data
    optimizer = sgd_cosine(0.3, total_steps=20)
    epoch = make_epoch(forward, optimizer, prepare, batch_size=BATCH, num_examples=N, average=0.9)
    with pytest.raises(ValueError, match="average=True"):
        epoch(create_train_state(variables, optimizer, jax.random.key(1)), images, labels)


MESH = """
import json, jax, numpy as np
from tests.training import test_options as t
from ehap_jax.training import all_devices
given = t.example()
(*_, one), alone = t.run(given, epochs=2)
found = {"devices": jax.device_count()}
for loop in ("step", "scan"):
    (*_, many), shared = t.run(given, epochs=2, mesh=all_devices("data"), loop=loop)
    found[loop] = [
        float(np.abs(one.params["w"] - many.params["w"]).max()),
        float(np.abs(one.model_state["stats"]["mean"] - many.model_state["stats"]["mean"]).max()),
        float(alone.loss - shared.loss), len(many.params["w"].sharding.device_set),
    ]
def loud(params, model_state, x):
    jax.debug.inspect_array_sharding(x, callback=lambda s: shards.append(s.shard_shape(x.shape)))
    return t.forward(params, model_state, x)
shards = []
t.run(given, mesh=all_devices("data"), forward=loud)
found["shards"] = shards
print(json.dumps(found))
"""


@pytest.mark.slow
def test_eight_devices_end_where_one_does():
    """Batch statistics are those of the whole batch. In a process of its own: devices are counted when it starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", MESH], capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    for loop in ("step", "scan"):
        weights, statistics, loss, devices = found[loop]
        assert devices == 8 and max(weights, statistics, abs(loss)) < 1e-5
    assert found["shards"] and all(tuple(shard) == (1, 6) for shard in found["shards"])


def test_a_batch_that_the_mesh_cannot_share(data):
    class Three:
        size = 3

    with pytest.raises(ValueError, match="8 is not a multiple of the 3 devices"):
        run(data, mesh=Three())


@pytest.mark.slow
def test_a_deadline_saves_the_epoch_it_stops_after(data, tmp_path):
    images, labels, variables = data
    optimizer = sgd_cosine(0.3, total_steps=20)
    epoch = make_epoch(forward, optimizer, prepare, batch_size=BATCH, num_examples=N)
    state = create_train_state(variables, optimizer, jax.random.key(1))
    over = Deadline(minutes=1, started=-1000.0)
    assert over.passed and not Deadline(minutes=1).passed
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(OutOfTime, match="1 of 3 epochs"):
            fit(epoch, state, images, labels, epochs=3, checkpoints=checkpoints, checkpoint_every=3, deadline=over)
        assert checkpoints.latest() == 1
        resumed = fit(epoch, state, images, labels, epochs=3, checkpoints=checkpoints)
    whole = fit(epoch, state, images, labels, epochs=3)
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])
    with pytest.raises(ValueError, match="positive number of minutes"):
        Deadline(minutes=0)


def test_variables_round_trip_and_bad_files(tmp_path):
    tree = {"params": {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}, "n": jnp.int32(3), "ok": jnp.array([True])}
    found = load_variables(save_variables(tmp_path / "v.npz", tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    with pytest.raises(TypeError, match="a: bfloat16 cannot be stored"):
        save_variables(tmp_path / "b.npz", {"a": jnp.zeros(2, jnp.bfloat16)})
    with pytest.raises(TypeError, match="nested dictionaries"):
        save_variables(tmp_path / "c.npz", {"a": [jnp.zeros(2)]})
    with pytest.raises(FileNotFoundError, match="no file of variables"):
        load_variables(tmp_path / "none.npz")
    (tmp_path / "d.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"not a readable \.npz archive"):
        load_variables(tmp_path / "d.npz")
