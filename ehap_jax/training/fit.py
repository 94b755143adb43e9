"""Epoch after epoch, with checkpoints between them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.training.checkpoint import Checkpoints
from ehap_jax.training.deadline import Deadline
from ehap_jax.training.epoch import EpochMetrics
from ehap_jax.training.state import TrainState


def fit(
    epoch: Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, EpochMetrics]],
    state: TrainState,
    images: Any,
    labels: Any,
    *,
    epochs: int,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 1,
    checkpoint_seconds: float = 0.0,
    on_epoch: Callable[[int, TrainState, EpochMetrics], None] | None = None,
    deadline: Deadline | None = None,
) -> TrainState:
    """Run `epoch` until `epochs` of them are done, counting those a checkpoint already holds.

    Started again with the same arguments after a kill, it ends in the same bits as a run that was never stopped.

    Args:
        epoch: from `make_epoch`.
        state: the state to start from where there is no checkpoint; gives the structure where there is one.
        images, labels: the training split, uint8 (N, H, W, C) and int32 (N,), put on the device once.
        epochs: how many in total.
        checkpoints: where to save, and to resume from if it has a checkpoint (numbered by epochs done).
        checkpoint_every: epochs from one checkpoint to the next; the last epoch is always saved.
        checkpoint_seconds: at least so long from one checkpoint to the next: a kill costs little more than that, or an
            epoch where that is longer, and short epochs are not spent on writing.
        on_epoch: called as `on_epoch(epochs_done, state, metrics)` before the checkpoint is saved, for bars and logs;
            a resumed run may repeat epochs it has already reported.
        deadline: where it has passed after an epoch other than the last, that epoch is saved and the run stops.

    Raises:
        OutOfTime: the deadline has passed.
        FloatingPointError: the loss of an epoch is not finite. The checkpoint before it stays as it was.
        ValueError: `checkpoint_every` is below 1, or the checkpoint is from more than `epochs` epochs.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, not {checkpoint_every}")
    done = checkpoints.latest() if checkpoints is not None else None
    if checkpoints is not None and done is not None:
        if done > epochs:
            raise ValueError(f"{checkpoints.directory} holds {done} epochs, more than the {epochs} asked for")
        state = checkpoints.restore(state, done)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    saved_at = time.monotonic()
    for number in range((done or 0) + 1, epochs + 1):
        state, metrics = epoch(state, images, labels)
        # Metrics reach the host once per epoch; this also waits for the epoch to be done.
        metrics = jax.device_get(metrics)
        if not np.isfinite(metrics.loss):
            raise FloatingPointError(
                f"the training loss of epoch {number} is {float(metrics.loss)}; lower the learning rate, "
                "or compute in bfloat16 or float32 if this was float16"
            )
        if on_epoch is not None:
            on_epoch(number, state, metrics)
        stopping = deadline is not None and deadline.passed and number < epochs
        due = number % checkpoint_every == 0 and time.monotonic() - saved_at >= checkpoint_seconds
        if checkpoints is not None and (due or number == epochs or stopping):
            checkpoints.save(number, state)
            saved_at = time.monotonic()
        if deadline is not None and stopping:
            deadline.check(f"{number} of {epochs} epochs done")
    return state
