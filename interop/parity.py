"""The same quantities computed by JAX and by PyTorch on the same weights, images and probes, and how far they differ.

Everything is compared under the names `to_torch` writes with PyTorch's axes, in NumPy arrays. A relative difference of
two sets of arrays is ‖a - b‖ / ‖b‖ over all of their elements, b being PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.curvature import hvp, probe_channel_products
from ehap_jax.graph import trace_graph
from ehap_jax.graph.structure import Coupling
from ehap_jax.pruning import allocate, magnitude_scores, shrink, shrink_variables
from interop.from_torch import CheckpointInfo, from_torch
from interop.to_torch import named_arrays, to_torch

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """One network in both frameworks.

    Attributes:
        apply, variables, info: as returned by `from_torch`.
        module: the PyTorch network holding the same weights, in eval mode.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    info: CheckpointInfo
    module: Any

    def named(self, params: Any) -> Arrays:
        """Parameters, or anything of their structure, under PyTorch's names with its axes."""
        return named_arrays({"params": params}, self.info.form)

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Mean cross-entropy in eval mode of (images, labels), a function of the trainable parameters."""
        images, labels = batch
        logits = self.apply({**self.variables, "params": params}, images)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(chosen)


def pair(source: Any, layout: str = "auto", *, dtype: Any = None) -> Pair:
    """Load a checkpoint into both frameworks.

    The PyTorch side holds what `to_torch` writes, so both compute with the very same bits.

    Raises:
        CheckpointError: as `from_torch`.
    """
    apply, variables, info = from_torch(source, layout, dtype=dtype)
    from interop.torch_models import load

    return Pair(apply, variables, info, load(to_torch(variables, indices=info.indices)))


def normalise(images: np.ndarray, info: CheckpointInfo) -> np.ndarray:
    """uint8 images (N, H, W, 3) to float32 as the checkpoint expects them."""
    mean, std = (np.asarray(value, np.float32) for value in info.normalisation)
    return (images.astype(np.float32) / np.float32(255) - mean) / std


def relative(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """‖found - expected‖ / ‖expected‖ over all entries, accumulated in float64."""
    difference = sum(np.sum((found[k].astype(np.float64) - expected[k]) ** 2) for k in expected)
    return float(np.sqrt(difference / sum(np.sum(expected[k].astype(np.float64) ** 2) for k in expected)))


def logits_pair(nets: Pair, images: np.ndarray, batch_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) of normalised images, by JAX and by PyTorch, computed in batches."""
    forward = jax.jit(nets.apply)
    ours, theirs = [], []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        short = batch_size - len(part)
        padded = np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)]) if start else part
        ours.append(np.asarray(forward(nets.variables, padded))[: len(part)])
        theirs.append(torch_logits(nets.module, part))
    return np.concatenate(ours), np.concatenate(theirs)


def gradient_pair(nets: Pair, images: np.ndarray, labels: np.ndarray) -> tuple[Arrays, Arrays]:
    """The gradient of the mean loss in every trainable parameter, eval mode."""
    import torch

    ours = jax.jit(jax.grad(nets.loss))(nets.variables["params"], jax_batch(images, labels))
    names = dict(nets.module.named_parameters())
    found = torch.autograd.grad(_torch_loss(nets.module, images, labels), list(names.values()))
    theirs = {name: value.numpy() for name, value in zip(names, found, strict=True)}
    return nets.named(ours), theirs


def hessian_vector_pair(nets: Pair, images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Arrays, Arrays]:
    """Hv over all kernels for one Rademacher v: JAX forward over reverse, PyTorch reverse twice."""
    import torch

    from interop.reference.trace import kernels

    v, torch_probe = probe_pair(nets, seed)
    Hv = jax.jit(hvp(nets.loss))(nets.variables["params"], v, jax_batch(images, labels))
    params = kernels(nets.module)
    gradients = torch.autograd.grad(_torch_loss(nets.module, images, labels), list(params.values()), create_graph=True)
    found = torch.autograd.grad(gradients, list(params.values()), [torch_probe[name] for name in params])
    theirs = {name: value.numpy() for name, value in zip(params, found, strict=True)}
    ours = nets.named(Hv)
    return {name: ours[name] for name in theirs}, theirs


def trace_pair(nets: Pair, images: np.ndarray, labels: np.ndarray, seeds: Sequence[int]) -> tuple[Arrays, Arrays]:
    """Channel traces averaged over the same probes: `probe_channel_products` and the PyTorch reference."""
    from interop.reference.trace import fixed_trace

    batch = jax_batch(images, labels)
    sums: Arrays = {}
    probes = []
    for seed in seeds:
        v, probe = probe_pair(nets, seed)
        products = probe_channel_products(nets.loss, nets.variables["params"], v, batch)
        for name, value in nets.named(products).items():
            sums[name] = sums.get(name, 0) + value.astype(np.float64)
        probes.append(probe)
    reference = fixed_trace(nets.module, *torch_batch(images, labels), probes)
    ours = {name: value / len(seeds) for name, value in sums.items()}
    return ours, {name: value.numpy() for name, value in reference.mean.items()}


def sgd_pair(nets: Pair, images: np.ndarray, labels: np.ndarray, rate: float) -> tuple[Arrays, Arrays]:
    """Every trainable parameter after one SGD step in train mode (batch statistics).

    Running statistics are left out: Flax updates them with the batch's biased variance, PyTorch with the unbiased one.

    Raises:
        ValueError: the network is not one of `ehap_jax.models`, so it has no train mode in JAX.
    """
    import copy

    import torch

    from ehap_jax.models import train_apply

    if nets.info.model is None:
        raise ValueError("only networks of ehap_jax.models have a train mode in JAX")
    train = train_apply(nets.info.model)

    def loss(params: Any) -> jax.Array:
        logits, _ = train({**nets.variables, "params": params}, jnp.asarray(images))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels.astype(np.int32)[:, None], axis=1)
        return -jnp.mean(chosen)

    params = nets.variables["params"]
    stepped = jax.jit(lambda p: jax.tree.map(lambda w, g: w - jnp.asarray(rate, w.dtype) * g, p, jax.grad(loss)(p)))
    module = copy.deepcopy(nets.module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    _torch_loss(module, images, labels).backward()
    optimizer.step()
    return nets.named(stepped(params)), {name: p.detach().numpy() for name, p in module.named_parameters()}


def pruned_pair(
    nets: Pair, images: np.ndarray, *, channels: float, coupling: Coupling
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the network pruned to a fraction of its channels by weight magnitude, by the same plan in both.

    JAX runs `shrink(apply, plan)`, PyTorch a module of the shrunk widths loaded from `to_torch(variables, plan)`.
    """
    from interop.torch_models import load

    graph = trace_graph(nets.apply)(nets.variables, images)
    scores = magnitude_scores(graph, nets.variables)
    plan = allocate(graph, scores, channels=channels, coupling=coupling)
    small = shrink_variables(nets.variables, plan)
    ours = np.asarray(jax.jit(shrink(nets.apply, plan))(small, images))
    return ours, torch_logits(load(to_torch(small, plan)), images)


def probe_pair(nets: Pair, seed: int) -> tuple[Any, dict[str, Any]]:
    """One Rademacher probe over the kernels in both frameworks, drawn by NumPy.

    In JAX's variables it is zero elsewhere; in PyTorch's it has the kernels alone.
    """
    import torch

    generator = np.random.default_rng(seed)

    def signs(leaf: jax.Array) -> np.ndarray:
        drawn = generator.integers(0, 2, leaf.shape) * 2 - 1 if leaf.ndim >= 2 else np.zeros(leaf.shape)
        return drawn.astype(leaf.dtype)

    v = jax.tree.map(signs, nets.variables["params"])
    arrays = {name: value for name, value in nets.named(v).items() if value.ndim >= 2}
    return v, {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def torch_images(images: np.ndarray) -> Any:
    """(N, H, W, C) array to a contiguous (N, C, H, W) tensor."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def jax_batch(images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The batch that `Pair.loss` takes, on JAX's device."""
    return jnp.asarray(images), jnp.asarray(labels.astype(np.int32))


def torch_batch(images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    """The same images and labels as tensors on the CPU."""
    import torch

    return torch_images(images), torch.from_numpy(labels.astype(np.int64))


def torch_logits(module: Any, images: np.ndarray) -> np.ndarray:
    """Logits (N, classes) of normalised images (N, H, W, C)."""
    import torch

    with torch.no_grad():
        return module(torch_images(images)).numpy()


def _torch_loss(module: Any, images: np.ndarray, labels: np.ndarray) -> Any:
    import torch

    x, y = torch_batch(images, labels)
    return torch.nn.functional.cross_entropy(module(x), y)
