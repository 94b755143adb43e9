"""Images per second of training, beside a plain PyTorch loop and torch.compile: same network, same weights, same run.

    python -m benchmarks.training                                        # ResNet-20, CPU
    python -m benchmarks.training --network resnet32 ehap-wrn28-8 --compute bfloat16 --batches 200      # a GPU

JAX: `ehap_jax.training.make_epoch`, the data set on the device as uint8; shuffle, crop, flip and normalisation inside
jit. `jax.devices` (CPU only): the same with a device per core, which share every batch. PyTorch: what one writes first,
a DataLoader with crop and flip per image (in worker processes on a GPU), channels_last, SGD with Nesterov momentum,
autocast to bfloat16 where that is asked for; eager, and through torch.compile with its defaults. Images are random
numbers of CIFAR's shape: the speed does not depend on what they show. Every row runs in a process of its own; its first
epoch (which compiles) is reported apart. `load_average` far above the cores means that others used the machine: then
compare CPU seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._whole_files import write_json
from ehap_jax.data import Augmentation, Dataset, limit_training, make_dataset
from ehap_jax.models import init_variables, make_model, train_apply
from ehap_jax.training import (
    all_devices,
    create_train_state,
    forward_from_apply,
    low_precision,
    make_epoch,
    sgd_cosine,
    training_inputs,
)
from ehap_jax.training.run_directory import versions

ROWS = ("jax", "jax.devices", "torch", "torch.compile")
RATE, MOMENTUM, DECAY = 0.05, 0.9, 5e-4


def random_dataset(images: int) -> Dataset:
    """`images` training images of CIFAR's shape (and a few for the other splits)."""
    generator = np.random.default_rng(0)
    total = round(images / 0.9) + 10

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        return generator.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 10

    dataset = make_dataset(
        "random", split(total), split(10), num_classes=10, augmentation=Augmentation(crop_padding=4, flip=True)
    )
    return limit_training(dataset, images)


def measure(row: str, network: str, batch_size: int, batches: int, epochs: int, compute: str) -> dict[str, Any]:
    """One row: seconds of the first epoch, and images per second over the others."""
    if row == "jax.devices":
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    dataset = random_dataset(batch_size * batches)
    epoch = (jax_epoch if row.startswith("jax") else torch_epoch)(dataset, network, batch_size, epochs, compute, row)
    started = time.perf_counter()
    next(epoch)
    first = time.perf_counter() - started
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(epochs - 1):
        next(epoch)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    images = (epochs - 1) * batch_size * batches
    return {
        "row": row,
        "network": network,
        "compute": compute,
        "batch_size": batch_size,
        "images": images,
        "first_epoch_seconds": first,
        "images_per_second": images / wall,
        "cpu_seconds_per_1000_images": 1000 * cpu / images,
        "load_average": os.getloadavg()[0],
    }


def cpu_seconds() -> float:
    """Of this process and the worker processes it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def start(network: str, dataset: Dataset) -> tuple[Any, Any]:
    """The module and its first variables, the same for all rows."""
    options = {"shortcut": "B"} if "resnet" in network else {}
    model = make_model(network, 10, **options)
    return model, init_variables(model, jax.random.key(0), dataset.image_shape)


def jax_epoch(dataset: Dataset, network: str, batch_size: int, epochs: int, compute: str, _: str) -> Iterator[float]:
    """Loss of every epoch, when the epoch is done."""
    model, variables = start(network, dataset)
    count = len(dataset.x_train)
    optimizer = sgd_cosine(RATE, epochs * (count // batch_size), momentum=MOMENTUM, weight_decay=DECAY)
    forward = forward_from_apply(train_apply(model))
    if compute != "float32":
        forward = low_precision(forward, compute)
    inputs = training_inputs(dataset)
    run = make_epoch(forward, optimizer, inputs, batch_size=batch_size, num_examples=count, mesh=all_devices("data"))
    state = create_train_state(variables, optimizer, jax.random.key(0))
    images, labels = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train)
    while True:
        state, metrics = run(state, images, labels)
        yield float(metrics.loss)


def torch_epoch(
    dataset: Dataset, network: str, batch_size: int, epochs: int, compute: str, row: str
) -> Iterator[float]:
    """Loss of every epoch, when the epoch is done."""
    import torch

    from interop import to_torch
    from interop.torch_models import load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, variables = start(network, dataset)
    module = load(to_torch(variables)).to(device).train()
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    step: Callable = torch.compile(module) if row == "torch.compile" else module
    optimizer = torch.optim.SGD(module.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    steps = epochs * (len(dataset.x_train) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = torch.utils.data.DataLoader(
        Images(dataset),  # pyright: ignore[reportArgumentType]
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, os.cpu_count() or 1) if device.type == "cuda" else 0,
        pin_memory=device.type == "cuda",
        persistent_workers=device.type == "cuda",
    )
    half = torch.autocast(device.type, torch.bfloat16, enabled=compute == "bfloat16")
    while True:
        total = torch.zeros((), device=device)
        for images, labels in loader:
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(device, non_blocking=True)
            with half:
                loss = torch.nn.functional.cross_entropy(step(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        yield float(total) / len(loader)


class Images:
    """The training images for a DataLoader: each one cropped, flipped and normalised on its own."""

    def __init__(self, dataset: Dataset) -> None:
        import torch

        self.images = torch.from_numpy(dataset.x_train.copy()).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(dataset.y_train.astype(np.int64))
        self.mean = torch.tensor(dataset.mean).view(3, 1, 1)
        self.std = torch.tensor(dataset.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        import torch

        image = torch.nn.functional.pad(self.images[index], (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = image[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image.float() / 255 - self.mean) / self.std, self.labels[index]


def table(rows: list[dict[str, Any]]) -> str:
    """For people: images per second, and how many times the plain PyTorch loop's."""
    plain = {row["network"]: row["images_per_second"] for row in rows if row["row"] == "torch"}
    lines = [f"{'network':<14}{'row':<15}{'images/s':>10}{'× torch':>9}{'first epoch':>13}{'CPU s/1000':>12}"]
    for row in rows:
        ratio = row["images_per_second"] / plain[row["network"]] if row["network"] in plain else float("nan")
        lines.append(
            f"{row['network']:<14}{row['row']:<15}{row['images_per_second']:>10.0f}{ratio:>9.2f}"
            f"{row['first_epoch_seconds']:>11.1f} s{row['cpu_seconds_per_1000_images']:>12.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet20"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=20, help="per epoch")
    parser.add_argument("--epochs", type=int, default=3, help="the first one is not counted")
    parser.add_argument("--compute", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path("results/training.json"))
    given = parser.parse_args(arguments)
    if given.epochs < 2 or given.batches < 1:
        parser.error("--epochs must be at least 2 and --batches at least 1")
    rows = []
    for network in given.network:
        for row in given.rows:
            options = (row, network, given.batch_size, given.batches, given.epochs, given.compute)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, options))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.training {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip()
    document = {"command": command, "versions": versions(), "cores": os.cpu_count(), "rows": rows}
    write_json(given.output, document)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
