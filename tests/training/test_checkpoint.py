"""A run killed and resumed ends in the same bits; half a checkpoint is never read."""

import errno
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.data import Augmentation, augment
from ehap_jax.training import Checkpoints, create_train_state, fit, frozen_forward, make_epoch, sgd_cosine

N, EPOCHS = 12, 4


def network(variables, x):
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ variables["params"]["first"])
    return hidden @ variables["params"]["second"]


def prepare(key, images):
    return augment(key, images, Augmentation(1, True)).astype(jnp.float32) / 255


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def run():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (N, 3, 3, 1), np.uint8)
    labels = (np.arange(N) % 2).astype(np.int32)
    params = {
        "first": jnp.asarray(generator.normal(size=(9, 5)), jnp.float32),
        "second": jnp.asarray(generator.normal(size=(5, 2)), jnp.float32),
    }
    optimizer = sgd_cosine(0.3, total_steps=EPOCHS * 3)
    epoch = make_epoch(frozen_forward(network), optimizer, prepare, batch_size=4, num_examples=N)
    start = create_train_state({"params": params, "batch_stats": {}}, optimizer, jax.random.key(7))
    return lambda **options: fit(epoch, options.pop("state", start), images, labels, epochs=EPOCHS, **options), start


def assert_identical(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "saved") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)})
        left = shutil.disk_usage(tmp_path)._replace(free=40_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: left)
        with pytest.raises(OSError, match=r"No space left .* takes about 74,816 bytes, there are 40,000") as found:
            checkpoints.save(2, {"w": jnp.ones(10_000)})
        assert found.value.errno == errno.ENOSPC and checkpoints.latest() == 1
        assert [path.name for path in (tmp_path / "saved").iterdir()] == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_killed_after_any_epoch_and_resumed_is_bit_identical(run, tmp_path, every):
    train, start = run
    whole = train()
    assert float(jnp.abs(whole.params["first"] - start.params["first"]).max()) > 1e-3
    for kill_after in (1, 3):
        directory = tmp_path / str(kill_after)
        reported = []

        def kill(number, state, metrics, kill_after=kill_after):
            if number == kill_after + 1:
                raise Killed

        with pytest.raises(Killed), Checkpoints(directory) as checkpoints:
            train(checkpoints=checkpoints, checkpoint_every=every, on_epoch=kill)
        saved = kill_after // every * every
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.latest() == (saved or None)
            # Where there is a checkpoint, the state handed in gives only the structure: its numbers must not matter.
            state = start if not saved else jax.tree.map(jnp.zeros_like, start._replace(key=None))
            state = state._replace(key=start.key if not saved else jax.random.key(0))
            resumed = train(state=state, checkpoints=checkpoints, on_epoch=lambda n, *_, to=reported: to.append(n))
            assert checkpoints.latest() == EPOCHS
        assert reported == list(range(saved + 1, EPOCHS + 1))
        assert_identical(whole, resumed)


def test_checkpoints_are_written_by_the_clock(run, tmp_path, monkeypatch):
    train, _ = run
    now, saved = 0.0, []

    def after_40_seconds(*_):
        nonlocal now
        now += 40.0

    monkeypatch.setitem(fit.__globals__, "time", SimpleNamespace(monotonic=lambda: now))
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints, "save", lambda number, _: saved.append(number))
        train(checkpoints=checkpoints, checkpoint_seconds=60.0, on_epoch=after_40_seconds)
    assert saved == [2, EPOCHS]


def test_a_finished_run_is_restored_without_training(run, tmp_path):
    train, _ = run
    with Checkpoints(tmp_path) as checkpoints:
        first = train(checkpoints=checkpoints)
        assert_identical(first, train(checkpoints=checkpoints, on_epoch=lambda *_: pytest.fail("trained again")))


def test_half_written_checkpoints_are_passed_over(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(3)})
    (tmp_path / "2.orbax-checkpoint-tmp-1").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        np.testing.assert_array_equal(checkpoints.restore({"w": jnp.zeros(3, jnp.int32)})["w"], [0, 1, 2])


def test_wrong_requests_are_named(tmp_path):
    with Checkpoints(tmp_path / "none", keep=2) as checkpoints:
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            checkpoints.restore({"w": jnp.zeros(3)})
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full(3, float(step))})
        with pytest.raises(ValueError, match="already has checkpoint 3; cannot save 3"):
            checkpoints.save(3, {"w": jnp.zeros(3)})
        with pytest.raises(FileNotFoundError, match="no checkpoint 1 in"):  # only two are kept
            checkpoints.restore({"w": jnp.zeros(3)}, 1)
        np.testing.assert_array_equal(checkpoints.restore({"w": jnp.zeros(3)}, 2)["w"], 2.0)
        with pytest.raises(ValueError, match=r"w: stored \(\(3,\), 'float32'\), expected \(\(4,\), 'float32'\)"):
            checkpoints.restore({"w": jnp.zeros(4)})
        with pytest.raises(ValueError, match=r"expected \(\(3,\), 'int32'\)"):
            checkpoints.restore({"w": jnp.zeros(3, jnp.int32)})
        with pytest.raises(ValueError, match="v: stored None"):
            checkpoints.restore({"w": jnp.zeros(3), "v": jnp.zeros(1)})
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(run, tmp_path):
    train, start = run
    bad = start._replace(params=jax.tree.map(lambda w: w * jnp.inf, start.params))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FloatingPointError, match="loss of epoch 1 is nan"):
            train(state=bad, checkpoints=checkpoints)
        assert checkpoints.latest() is None


def test_more_epochs_in_the_checkpoint_than_asked_for(run, tmp_path):
    train, start = run
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(EPOCHS + 1, start)
        with pytest.raises(ValueError, match="holds 5 epochs, more than the 4"):
            train(checkpoints=checkpoints)
        with pytest.raises(ValueError, match="checkpoint_every"):
            train(checkpoints=checkpoints, checkpoint_every=0)
