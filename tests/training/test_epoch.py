"""Epochs: the shuffle, the update against one written by hand, scan against step, and bad input."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from ehap_jax.models import train_apply
from ehap_jax.training import (
    create_train_state,
    cross_entropy,
    forward_from_apply,
    frozen_forward,
    make_epoch,
    sgd_cosine,
)

N, BATCH = 22, 8


def linear(variables, x):
    return x.reshape(x.shape[0], -1) @ variables["params"]["kernel"]


def to_float(key, images):
    return images.astype(jnp.float32) / 255


class ConvNet(nn.Module):
    """One convolution with BatchNorm: the smallest network whose loops could differ."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn1")(x))
        return nn.Dense(3)(x.mean(axis=(1, 2)))


class Problem(NamedTuple):
    images: np.ndarray
    labels: np.ndarray
    variables: dict


@pytest.fixture(scope="module")
def problem():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (N, 2, 2, 1), np.uint8)
    kernel = jnp.asarray(generator.normal(size=(4, 3)), jnp.float32)
    return Problem(images, (np.arange(N) % 3).astype(np.int32), {"params": {"kernel": kernel}})


@pytest.mark.slow
def test_one_epoch_is_torchs_sgd_on_a_permutation_of_the_data(problem):
    """Every step is recorded through `prepare`; torch.optim.SGD repeats them on the same batches."""
    torch = pytest.importorskip("torch")
    seen = []

    def prepare(key, images):
        jax.debug.callback(lambda a: seen.append(np.asarray(a)), images, ordered=True)
        return to_float(key, images)

    optimizer = sgd_cosine(0.5, total_steps=10, weight_decay=0.01)
    epoch = make_epoch(frozen_forward(linear), optimizer, prepare, batch_size=BATCH, num_examples=N)
    state, metrics = epoch(
        create_train_state(problem.variables, optimizer, jax.random.key(0)), problem.images, problem.labels
    )
    jax.effects_barrier()

    rows = {image.tobytes(): i for i, image in enumerate(problem.images)}
    assert len(rows) == N
    order = [[rows[np.ascontiguousarray(image).tobytes()] for image in batch] for batch in seen]
    assert [len(batch) for batch in order] == [BATCH, BATCH]
    assert len({i for batch in order for i in batch}) == 2 * BATCH  # no image twice in an epoch

    kernel = torch.tensor(np.asarray(problem.variables["params"]["kernel"]), requires_grad=True)
    sgd = torch.optim.SGD([kernel], lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10)
    losses, correct = [], 0
    for batch in order:
        x = torch.tensor(problem.images[batch] / 255, dtype=torch.float32).reshape(BATCH, -1)
        y = torch.tensor(problem.labels[batch].astype(np.int64))
        logits = x @ kernel
        loss = torch.nn.functional.cross_entropy(logits, y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        schedule.step()
        losses.append(loss.item())
        correct += int((logits.argmax(1) == y).sum())
    np.testing.assert_allclose(state.params["kernel"], kernel.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics.accuracy, correct / (2 * BATCH), rtol=1e-6)
    assert int(state.step) == 2


@pytest.fixture(scope="module")
def network():
    """A network with BatchNorm: both loops over the same two epochs, and how often each was compiled."""
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (N, 8, 8, 1), np.uint8)
    labels = generator.integers(0, 3, N).astype(np.int32)
    model = ConvNet()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    optimizer = sgd_cosine(0.1, total_steps=4)
    traced = {"scan": 0, "step": 0}
    results = {}
    for loop in traced:

        def prepare(key, images, loop=loop):
            traced[loop] += 1
            return to_float(key, images)

        epoch = make_epoch(
            forward_from_apply(train_apply(model)), optimizer, prepare, batch_size=BATCH, num_examples=N, loop=loop
        )
        for seed in (0, 1):
            state = create_train_state(variables, optimizer, jax.random.key(seed))
            state, _ = epoch(state, images, labels)
            results[loop, seed] = epoch(state, images, labels)
    return results, traced, variables


@pytest.mark.slow
def test_scan_and_step_loops_agree(network):
    results, _, variables = network
    (scanned, scan_metrics), (stepped, step_metrics) = results["scan", 0], results["step", 0]
    for a, b in zip(jax.tree.leaves(scanned.variables), jax.tree.leaves(stepped.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(scan_metrics.loss, step_metrics.loss, rtol=1e-4)
    moved = stepped.model_state["batch_stats"]["bn1"]["mean"] - variables["batch_stats"]["bn1"]["mean"]
    assert float(jnp.abs(moved).max()) > 1e-3


def test_seeds_differ_and_share_one_compilation(network):
    results, traced, _ = network
    first, second = (results["step", seed][0].params["conv1"]["kernel"] for seed in (0, 1))
    assert float(jnp.abs(first - second).max()) > 1e-5
    assert traced == {"scan": 1, "step": 1}


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["scan", "step"])
def test_compiled_once_however_much_is_bound_to_a_device(problem, loop, caplog):
    """Weights of an earlier training, or of a checkpoint, are bound to their device; a new optimizer's are not."""
    optimizer = sgd_cosine(0.1, total_steps=10)
    epoch = make_epoch(
        frozen_forward(linear), optimizer, to_float, batch_size=BATCH, num_examples=N, loop=loop, average=0.9
    )
    free = create_train_state(problem.variables, optimizer, jax.random.key(0), average=True)
    bound = free._replace(params=jax.device_put(free.params, jax.devices()[0]))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        state, _ = epoch(free, problem.images, problem.labels)
        epoch(state, problem.images, problem.labels)
        assert all(not leaf.committed for leaf in jax.tree.leaves(state)), "it stays free to go anywhere"
        for state in (bound, jax.device_put(free, jax.devices()[0])):
            for _ in range(2):
                state, _ = epoch(state, problem.images, problem.labels)
    names = [
        record.getMessage().split("Finished XLA compilation of ")[-1].split(" in ")[0] for record in caplog.records
    ]
    for program in {"scan": ["scanned"], "step": ["forward_pass", "backward_pass"]}[loop]:
        assert names.count(f"jit({program})") == 2, program  # bound and free


@pytest.mark.slow
def test_epochs_are_shuffled_afresh(problem):
    firsts = []

    def prepare(key, images):
        jax.debug.callback(lambda a: firsts.append(np.asarray(a).tobytes()), images, ordered=True)
        return to_float(key, images)

    optimizer = sgd_cosine(0.1, total_steps=10)
    epoch = make_epoch(frozen_forward(linear), optimizer, prepare, batch_size=N, num_examples=N)
    state = create_train_state(problem.variables, optimizer, jax.random.key(0))
    once, _ = epoch(state, problem.images, problem.labels)
    epoch(once, problem.images, problem.labels)
    epoch(state, problem.images, problem.labels)
    jax.effects_barrier()
    assert firsts[0] != firsts[1] and firsts[0] == firsts[2]


@pytest.mark.slow
def test_project_runs_after_every_step_and_sees_carried_collections(problem):
    mask = jnp.ones((4, 3)).at[:, 1].set(0.0)

    def project(variables):
        params = jax.tree.map(lambda w, m: w * m, variables["params"], variables["masks"])
        return {**variables, "params": params}

    optimizer = sgd_cosine(0.1, total_steps=10)
    epoch = make_epoch(frozen_forward(linear), optimizer, to_float, batch_size=BATCH, num_examples=N, project=project)
    variables = {**problem.variables, "masks": {"kernel": mask}}
    state, _ = epoch(create_train_state(variables, optimizer, jax.random.key(0)), problem.images, problem.labels)
    kernel = np.asarray(state.params["kernel"])
    assert (kernel[:, 1] == 0).all() and (kernel[:, [0, 2]] != problem.variables["params"]["kernel"][:, [0, 2]]).all()
    np.testing.assert_array_equal(state.model_state["masks"]["kernel"], mask)


@pytest.mark.slow
def test_cross_entropy_of_half_precision_logits_is_in_float32():
    logits = jnp.asarray([[8.0, 0.0]], jnp.float16)
    loss = cross_entropy(logits, jnp.asarray([0]))
    assert loss.dtype == jnp.float32
    # One rounding of 8 in float32 is 1e-6; in float16 it is 8e-3, more than the loss itself.
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-8))], atol=1e-6)


def test_bad_input_is_named(problem):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"batch size 23 .* 22 images"):
        make_epoch(frozen_forward(linear), optimizer, to_float, batch_size=N + 1, num_examples=N)
    with pytest.raises(ValueError, match="'auto', 'scan' or 'step'"):
        make_epoch(frozen_forward(linear), optimizer, to_float, batch_size=N, num_examples=N, loop="fast")
    epoch = make_epoch(frozen_forward(linear), optimizer, to_float, batch_size=N, num_examples=N)
    state = create_train_state(problem.variables, optimizer, jax.random.key(0))
    with pytest.raises(ValueError, match="for 22 examples, but got 21 images and 22 labels"):
        epoch(state, problem.images[1:], problem.labels)
    bad = {"params": {"kernel": problem.variables["params"]["kernel"].at[1, 2].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"cannot train: NaN or infinity in params/kernel \(1 of 12\)"):
        create_train_state(bad, optimizer, jax.random.key(0))
    with pytest.raises(KeyError, match="no 'params' collection"):
        create_train_state({"kernel": jnp.ones(2)}, optimizer, jax.random.key(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"total_steps": 5, "warmup_steps": 5}, r"warmup_steps \(5\)"),
        ({"momentum": 1.0}, r"momentum 1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay -1\.0"),
    ],
)
def test_optimizer_refuses_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        sgd_cosine(**{"learning_rate": 0.1, "total_steps": 10, **arguments})


@pytest.mark.slow
def test_weight_decay_can_spare_vectors():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = sgd_cosine(1.0, 10, momentum=0.0, weight_decay=0.1, decay_norms=False)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)
