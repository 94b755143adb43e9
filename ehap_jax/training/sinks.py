"""Where else the numbers of a run go: TensorBoard's event files, Weights & Biases."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Sink = Callable[[int, Mapping[str, float]], None]
"""`sink(step, {tag: value})`."""


def tensorboard_sink(directory: str | Path) -> Sink:
    """Event files that `tensorboard --logdir` reads, written without TensorFlow; a resumed run adds another file.

    Raises:
        ImportError: TensorBoard is not installed; the message names the extra.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs TensorBoard: pip install 'ehap-jax[tensorboard]'") from error
    writer = EventFileWriter(str(directory))

    def sink(step: int, values: Mapping[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    return sink


def wandb_sink(name: str, config: Any, directory: str | Path) -> Sink:
    """A Weights & Biases run called `name`, with `config`; the epoch of a stage is logged beside its numbers.

    Raises:
        ImportError: wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--wandb needs Weights & Biases: pip install wandb") from error
    run = wandb.init(project="ehap_jax", name=name, config=config, dir=str(directory))

    def sink(step: int, values: Mapping[str, float]) -> None:
        run.log({**values, "epoch": step})

    return sink
