"""One pass over the training data, with the data, its order and its augmentation on the device."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ehap_jax._placement import bind, bound_to
from ehap_jax.data.augment import augment, normalise
from ehap_jax.data.dataset import Dataset
from ehap_jax.training.losses import Teacher, cross_entropy, distillation_loss
from ehap_jax.training.state import TrainState

Forward = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
Prepare = Callable[[jax.Array, jax.Array], jax.Array]


class EpochMetrics(NamedTuple):
    """Mean loss and accuracy over the augmented batches of one epoch, each as the weights stood at its step."""

    loss: jax.Array
    accuracy: jax.Array


class _Totals(NamedTuple):
    loss: jax.Array
    correct: jax.Array


def forward_from_apply(apply: Callable[[Any, jax.Array], tuple[jax.Array, Any]]) -> Forward:
    """`forward(params, model_state, x) -> (logits, new_model_state)` from `apply(variables, x) -> (logits, updates)`.

    Collections that `apply` does not return, such as masks, are carried on as they are.
    """

    def forward(params: Any, model_state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        logits, updates = apply({"params": params, **model_state}, x)
        return logits, {**model_state, **updates}

    return forward


def frozen_forward(apply: Callable[[Any, jax.Array], jax.Array]) -> Forward:
    """A `forward` that trains the evaluation function `apply(variables, x) -> logits`; statistics stay frozen."""

    def forward(params: Any, model_state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return apply({"params": params, **model_state}, x), model_state

    return forward


def low_precision(forward: Forward, dtype: Any) -> Forward:
    """`forward` computed in `dtype`: parameters and images are cast on the way in, gradients and logits on the way out.

    The parameters that the optimizer holds stay as they are (float32 master weights), and so do running statistics.

    Args:
        forward: see `forward_from_apply`.
        dtype: such as `jnp.bfloat16`. float16 needs loss scaling, which training does not do.

    Raises:
        ValueError: `dtype` is float16 or not a floating-point type.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.float16:
        raise ValueError(f"training computes in bfloat16, float32 or float64, not {dtype}")

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def computed(params: Any, model_state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        logits, now = forward(jax.tree.map(cast, params), model_state, cast(x))
        return logits.astype(jnp.float32), jax.tree.map(lambda new, old: new.astype(old.dtype), now, model_state)

    return computed


def all_devices(axis: str) -> Mesh | None:
    """A mesh of all devices along one axis, for `mesh=` of `make_epoch` ("data") or of `channel_trace`.

    None where there is one device.
    """
    return Mesh(np.array(jax.devices()), (axis,)) if jax.device_count() > 1 else None


def training_inputs(dataset: Dataset) -> Prepare:
    """`prepare(key, uint8 images) -> float32 images`: the data set's augmentation, then normalisation."""

    def prepare(key: jax.Array, images: jax.Array) -> jax.Array:
        return normalise(augment(key, images, dataset.augmentation), dataset.mean, dataset.std)

    return prepare


def make_epoch(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    prepare: Prepare,
    *,
    batch_size: int,
    num_examples: int,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    project: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    loop: str = "auto",
    average: float | None = None,
    teacher: Teacher | None = None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, EpochMetrics]]:
    """A function `epoch(state, images, labels) -> (state, metrics)` over a fresh shuffle of the training data.

    The last `num_examples % batch_size` images of the shuffle wait for another epoch. Order and augmentation are
    functions of `state.key` and `state.step`, so an epoch repeated from the same state gives the same bits. Call it
    for several seeds, or several masks kept in `model_state`, and it compiles once.

    XLA's CPU backend runs gradients of convolutions inside a loop body about twenty times slower than outside, so
    there the epoch is a Python loop; elsewhere it is one jitted scan. In that loop the forward and the backward pass
    are two programs: in one, that backend would compute activations again, element by element in the transposed order
    in which weight gradients read them, which takes half of the gradient's time (`python -m benchmarks.probe_parts`).

    Args:
        forward: `forward(params, model_state, x) -> (logits, new_model_state)`, pure; see `forward_from_apply`.
        optimizer: an optax transformation, the one the state was created with.
        prepare: `prepare(key, uint8 batch) -> float batch`; see `training_inputs`.
        batch_size: images per step.
        num_examples: images per epoch, the length of `images`.
        loss: per-example loss of (logits, labels), (N,).
        project: after every step, `project(variables) -> variables` (of the same structure), such as masking again.
        loop: "scan", "step", or "auto" by backend.
        average: decay of the moving average of the variables, which follows in `state.average`; after t steps it is
            at most (1 + t) / (10 + t), so that the start is forgotten. The state must be created with `average=True`.
        teacher: a network to distil from.
        mesh: devices that share every batch, such as `all_devices("data")`. The state is the same on all of them, and
            so is the result (up to rounding) as on one: gradients and batch statistics are of the whole batch.

    Raises:
        ValueError: the batch is larger than the data set or no multiple of the mesh, an option is out of range, or
            `loop` is unknown; by `epoch`, `images` and `labels` do not have `num_examples` rows, or the state has no
            average.

    Example:
        >>> from ehap_jax.training import create_train_state
        >>> images, labels = jnp.ones((6, 2), jnp.uint8), jnp.zeros(6, jnp.int32)
        >>> forward = frozen_forward(lambda variables, x: x @ variables["params"])
        >>> optimizer = optax.sgd(0.1)
        >>> epoch = make_epoch(forward, optimizer, lambda key, x: x * 1.0, batch_size=3, num_examples=6)
        >>> state = create_train_state({"params": jnp.zeros((2, 2))}, optimizer, jax.random.key(0))
        >>> state, metrics = epoch(state, images, labels)
        >>> int(state.step), float(metrics.accuracy)
        (2, 1.0)
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch size {batch_size} is not between 1 and the {num_examples} images of the training split; "
            "choose a smaller batch"
        )
    if loop not in ("auto", "scan", "step"):
        raise ValueError(f"loop must be 'auto', 'scan' or 'step', not {loop!r}")
    if average is not None and not 0 <= average < 1:
        raise ValueError(f"average is a decay in [0, 1), not {average}")
    if teacher is not None and not (0 <= teacher.weight <= 1 and teacher.temperature > 0):
        raise ValueError(
            f"a teacher's weight {teacher.weight} must be in [0, 1], its temperature {teacher.temperature} positive"
        )
    if mesh is not None and batch_size % mesh.size:
        raise ValueError(f"batch size {batch_size} is not a multiple of the {mesh.size} devices of the mesh")
    steps = num_examples // batch_size

    def forward_pass(state: TrainState, order: jax.Array, images: jax.Array, labels: jax.Array, teaching: Any):
        start = jnp.mod(state.step, steps) * batch_size
        chosen = jax.lax.dynamic_slice(order, (start,), (batch_size,))
        # Keys of steps and of shuffles come from two different streams.
        raw, y = images[chosen], labels[chosen]
        if mesh is not None:
            raw, y = jax.lax.with_sharding_constraint((raw, y), NamedSharding(mesh, PartitionSpec("data")))
        x = prepare(jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step), raw)

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, model_state = forward(params, state.model_state, x)
            value = jnp.mean(loss(logits, y))
            if teacher is not None:
                taught = distillation_loss(logits, teacher.apply(teaching, x), teacher.temperature)
                value = (1 - teacher.weight) * value + teacher.weight * jnp.mean(taught)
            correct = jnp.sum(jnp.argmax(logits, axis=-1).astype(y.dtype) == y, dtype=jnp.int32)
            return value, (model_state, correct)

        value, backward, (model_state, correct) = jax.vjp(objective, state.params, has_aux=True)
        return value, model_state, correct, backward

    def backward_pass(
        state: TrainState, totals: _Totals, value: jax.Array, model_state: Any, correct: jax.Array, backward: Callable
    ) -> tuple[TrainState, _Totals]:
        (gradient,) = backward(jnp.ones_like(value))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        if project is not None:
            projected = dict(project({"params": params, **model_state}))
            params = projected.pop("params")
            model_state = projected
        totals = _Totals(totals.loss + value.astype(jnp.float32), totals.correct + correct)
        following = state.average
        if average is not None:
            following = _follow(state.average, {"params": params, **model_state}, average, state.step)
        return TrainState(params, model_state, opt_state, state.step + 1, state.key, following), totals

    def shuffle(state: TrainState) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step // steps)
        return jax.random.permutation(key, num_examples)

    def scanned(state: TrainState, images: jax.Array, labels: jax.Array, teaching: Any) -> tuple[TrainState, _Totals]:
        order = shuffle(state)

        def step(carry: tuple[TrainState, _Totals], _: None) -> tuple[tuple[TrainState, _Totals], None]:
            state, totals = carry
            return backward_pass(state, totals, *forward_pass(state, order, images, labels, teaching)), None

        return jax.lax.scan(step, (state, _zero_totals()), length=steps)[0]

    jitted_scan, jitted_shuffle = jax.jit(scanned), jax.jit(shuffle)
    jitted_forward, jitted_backward = jax.jit(forward_pass), jax.jit(backward_pass)

    def epoch(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, EpochMetrics]:
        if len(images) != num_examples or len(labels) != num_examples:
            raise ValueError(
                f"this epoch is for {num_examples} examples, but got {len(images)} images and {len(labels)} labels"
            )
        if average is not None and not jax.tree.leaves(state.average):
            raise ValueError("the state has no average to follow; create it with create_train_state(…, average=True)")
        teaching = None if teacher is None else teacher.variables
        totals = _zero_totals()
        everything = (state, totals, images, labels, teaching)
        place = bound_to(everything) if mesh is None else NamedSharding(mesh, PartitionSpec())
        state, totals, images, labels, teaching = bind(everything, place)
        if loop == "scan" or (loop == "auto" and jax.default_backend() != "cpu"):
            state, totals = jitted_scan(state, images, labels, teaching)
        else:
            order = jitted_shuffle(state)
            for _ in range(steps):
                # Nothing here holds on to what the forward pass leaves: it is as large as all activations.
                state, totals = jitted_backward(state, totals, *jitted_forward(state, order, images, labels, teaching))
        return state, EpochMetrics(totals.loss / steps, totals.correct / (steps * batch_size))

    return epoch


def _follow(average: Any, variables: Any, decay: float, step: jax.Array) -> Any:
    count = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1.0 + count) / (10.0 + count))

    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        return old + (1 - rate).astype(old.dtype) * (new - old)

    return jax.tree.map(one, average, variables)


def _zero_totals() -> _Totals:
    return _Totals(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
