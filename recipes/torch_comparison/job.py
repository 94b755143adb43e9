"""What `recipes.compare_torch` compares: its settings, and the network and images they name, in both frameworks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
import tyro

from ehap_jax.data import load_dataset
from ehap_jax.graph import Graph, trace_graph
from ehap_jax.graph.structure import Coupling
from ehap_jax.pruning import PruningPlan, Scores, allocate
from ehap_jax.training import Progress
from interop.parity import Pair, jax_batch, normalise, pair

PRECISION = "highest"
"""Of float32 products, in JAX and in PyTorch: the default of an accelerator is coarser than float32."""


@dataclass(frozen=True)
class Config:
    """What is compared; every setting is part of the result."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A PyTorch or safetensors file."""
    data: str
    """"npz:PATH", images uint8, with x_train, y_train, x_test and y_test."""
    layout: str = "auto"
    """How the checkpoint names its tensors."""
    images: int = 64
    """Training images for the derivatives."""
    test_images: int = 256
    """Test images for logits and accuracies."""
    probes: tuple[int, ...] = (1, 10, 100, 300)
    """Numbers of probes at which rankings are compared."""
    same_probes: int = 4
    """Probes given to both frameworks for traces and scores, and timed."""
    ratios: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Kept fractions of the prunable channels."""
    coupling: Coupling = "group"
    reference: Literal["auto", "exact", "probes"] = "auto"
    """What rankings are compared with; "auto" is exact where that is proven to be the Hessian."""
    reference_probes: int = 1000
    """Probes of the reference where it is not exact."""
    int8_images: int = 32
    """Test images on which every INT8 integer is compared."""
    cost: bool = True
    """Measure time and memory, too."""
    seed: int = 0


class Job(NamedTuple):
    """One network in both frameworks, its structure, and what it is fed (normalised)."""

    config: Config
    nets: Pair
    graph: Graph
    train: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    truth: np.ndarray
    progress: Progress

    @property
    def batch(self) -> tuple[jax.Array, jax.Array]:
        """The Hessian batch on JAX's device."""
        return jax_batch(self.train, self.labels)

    def plan(self, scores: Scores, ratio: float) -> PruningPlan:
        """What is kept of a network whose channels rank like this."""
        return allocate(self.graph, scores, channels=ratio, coupling=self.config.coupling)

    def accuracies(self, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
        """Of JAX's and of PyTorch's logits of the first test images."""
        both = {"accuracy_jax": ours, "accuracy_torch": theirs}
        return {name: float(np.mean(x.argmax(axis=1) == self.truth[: len(x)])) for name, x in both.items()}


def prepare(config: Config, progress: Progress) -> Job:
    """Load everything and check every setting before any work starts.

    Raises:
        ValueError: a setting, a checkpoint or data that do not fit each other. FileNotFoundError: no such file.
    """
    if not config.probes or min(config.probes) < 1:
        raise ValueError(f"--probes must be numbers from 1 on, got {config.probes}")
    if not config.ratios or not all(0 < ratio < 1 for ratio in config.ratios):
        raise ValueError(f"--ratios are kept fractions between 0 and 1, got {config.ratios}")
    if config.same_probes < 1 or config.reference_probes < 2:
        raise ValueError("--same-probes must be at least 1, --reference-probes at least 2")
    dataset = load_dataset(config.data)
    counts = {"images": len(dataset.x_train), "test_images": len(dataset.x_test), "int8_images": config.test_images}
    for name, count in counts.items():
        if not 1 <= getattr(config, name) <= count:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(config, name)} is not between 1 and the {count} there are")
    nets = pair(config.checkpoint, config.layout)
    spec = nets.info.spec
    if nets.info.indices:
        raise ValueError("this checkpoint was pruned before and adds by index; it cannot be pruned further in PyTorch")
    if dataset.image_shape[-1] != spec.image_channels:
        raise ValueError(f"the network reads {spec.image_channels} channels, the images have {dataset.image_shape[-1]}")
    if dataset.num_classes > spec.num_classes:
        raise ValueError(f"the network has {spec.num_classes} classes, the labels go up to {dataset.num_classes - 1}")
    train = normalise(dataset.x_train[: config.images], nets.info)
    test = normalise(dataset.x_test[: config.test_images], nets.info)
    graph = trace_graph(nets.apply)(nets.variables, train[:1])
    truth = dataset.y_test[: config.test_images]
    return Job(config, nets, graph, train, dataset.y_train[: config.images], test, truth, progress)
