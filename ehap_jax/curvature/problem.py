"""What is differentiated along what: a loss, the leaves that are probed, and the checks before any long work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.curvature.precision import Policy

__all__ = ["Layout", "Problem", "layout_of", "prepare"]

PyTree = Any


@dataclass(frozen=True)
class Layout:
    """Everything about a problem that is fixed at compile time; hashable, so compiled steps are reused.

    Attributes:
      structure: the tree structure of ``params``.
      paths: the paths of the probed leaves, in tree order.
      places: their places among the leaves of ``params``.
      axes: the output-channel axis of each.
      policy: the numerical precision, without first scales: they are not compiled in.
    """

    structure: Any
    paths: tuple[str, ...]
    places: tuple[int, ...]
    axes: tuple[int, ...]
    policy: Policy

    def split(self, leaves: list) -> tuple[dict[str, jax.Array], list]:
        """The probed leaves by path, and all leaves with the probed ones replaced by None."""
        probed = {path: leaves[place] for path, place in zip(self.paths, self.places, strict=True)}
        return probed, [None if place in self.places else leaf for place, leaf in enumerate(leaves)]

    def join(self, probed: Mapping[str, Any], rest: list) -> PyTree:
        """``params`` again, from the two parts that `split` returns."""
        leaves = list(rest)
        for path, place in zip(self.paths, self.places, strict=True):
            leaves[place] = probed[path]
        return jax.tree.unflatten(self.structure, leaves)

    def like_params(self, probed: Mapping[str, Any]) -> PyTree:
        """A pytree like ``params`` with a value at every probed leaf and None at the others."""
        return self.join(probed, [None] * self.structure.num_leaves)

    def channel_sums(self, products: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Each leaf summed over all axes but its channel axis."""
        return {
            path: products[path].sum(tuple(a for a in range(products[path].ndim) if a != axis))
            for path, axis in zip(self.paths, self.axes, strict=True)
        }


class Problem(NamedTuple):
    """A prepared loss: parameters and batch in the compute dtype, the batch cut into chunks.

    The mean loss of the batch is the sum of ``weight * loss(params, chunk)`` over full chunks and the rest.

    Attributes:
      layout: the compile-time part.
      leaves: the leaves of ``params`` in the compute dtype.
      chunks: the chunks of the batch, all of one size but for the last.
      weights: for each chunk, its share of the examples, in the dtype of sums.
    """

    layout: Layout
    leaves: list[jax.Array]
    chunks: list[PyTree]
    weights: list[jax.Array]


def prepare(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    policy: Policy,
    select: Callable[[str, jax.Array], bool],
    channel_axis: int | Mapping[str, int],
    microbatch: int | None,
    check_loss: bool = True,
) -> Problem:
    """Check a loss, its parameters and its batch, and cast and cut them; raises what `channel_trace` lists."""
    policy.require_available()
    layout = layout_of(params, policy, select, channel_axis)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    size = batch_size(batch)
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch is a number of examples and must be at least 1; got {microbatch}")
    step = size if microbatch is None else min(microbatch, size)
    params, batch = jax.tree.unflatten(layout.structure, leaves), jax.tree.map(jnp.asarray, batch)
    _require_finite(params, "params", "")
    _require_finite(batch, "batch", "")
    if check_loss:
        _require_usable_loss(loss, params, batch, step if step < size else None)
    cast = jax.tree.leaves(policy.cast(params))
    _require_finite(jax.tree.unflatten(layout.structure, cast), "params", f" in {policy.compute}")
    batch = policy.cast(batch)
    _require_finite(batch, "batch", f" in {policy.compute}")
    starts = range(0, size, step)
    chunks = [batch] if step == size else [jax.tree.map(lambda x, s=s: x[s : s + step], batch) for s in starts]
    weights = [jnp.asarray(min(step, size - start) / size, policy.sums) for start in starts]
    return Problem(layout, cast, chunks, weights)


def batch_size(batch: PyTree) -> int:
    """The number of examples: the common length of every leaf's first axis."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = path_name(path) or "batch"
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"batch leaf {name!r} is a scalar; every leaf of a batch has an axis of examples")
        sizes[name] = jnp.shape(leaf)[0]
    if not sizes:
        raise ValueError("the batch has no leaves")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the leaves of the batch differ in their number of examples: {sizes}")
    size = next(iter(sizes.values()))
    if size == 0:
        raise ValueError("the batch has no examples")
    return size


def path_name(path) -> str:
    """A pytree path as a string: its keys joined by ``/``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def layout_of(
    params: PyTree,
    policy: Policy,
    select: Callable[[str, jax.Array], bool],
    channel_axis: int | Mapping[str, int],
) -> Layout:
    """Which leaves are probed and along which axes their channels lie; raises what `channel_trace` lists."""
    paths, places, axes = [], [], []
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    if isinstance(channel_axis, Mapping) and (unknown := set(channel_axis) - {name for name, _ in named}):
        raise ValueError(f"channel_axis names paths that params do not have: {sorted(unknown)}")
    for place, (name, leaf) in enumerate(named):
        if not select(name, leaf):
            continue
        dtype = jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter {name!r} is selected but has dtype {dtype}: only real floating-point "
                "leaves have a Hessian; leave it out with select="
            )
        rank = jnp.ndim(leaf)
        axis = channel_axis.get(name, -1) if isinstance(channel_axis, Mapping) else channel_axis
        if not -rank <= axis < rank:
            raise ValueError(f"channel_axis {axis} does not exist in {name!r} of shape {jnp.shape(leaf)}")
        paths.append(name)
        places.append(place)
        axes.append(axis % rank)
    if not paths:
        raise ValueError(f"no parameter is selected; the paths are {[name for name, _ in named]}")
    return Layout(jax.tree.structure(params), tuple(paths), tuple(places), tuple(axes), Policy(policy.compute))


@jax.jit
def _finite(leaves):
    return [jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True) for x in leaves]


def _require_finite(tree: PyTree, what: str, where: str) -> None:
    named = jax.tree_util.tree_leaves_with_path(tree)
    flags = jax.device_get(_finite([leaf for _, leaf in named]))
    for (path, _), finite in zip(named, flags, strict=True):
        if not finite:
            raise ValueError(f"{what} leaf {path_name(path)!r} holds NaN or infinity{where}")


@partial(jax.jit, static_argnames="loss")
def _losses(loss, params, whole, parts):
    """The loss traced and evaluated twice on ``whole``, then on each of ``parts``."""
    values = []
    for examples in (whole, whole, *parts):
        value = loss(params, examples)
        if not isinstance(value, jax.Array | np.ndarray | float):
            raise TypeError(
                f"loss(params, batch) must return one scalar array; it returned a {type(value).__name__}. "
                "A loss with auxiliary outputs needs a wrapper: lambda p, b: loss(p, b)[0]"
            )
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                "loss(params, batch) must return a floating-point scalar, the mean over the batch; "
                f"it returned shape {value.shape}, dtype {value.dtype}"
            )
        values.append(value.astype(jnp.float32))
    return jnp.stack(values)


def _require_usable_loss(loss, params, batch, microbatch) -> None:
    """Trace the loss twice and run it twice; where chunked, check that it is a mean over examples."""
    size = batch_size(batch) if microbatch is None else max(2, microbatch)

    def cut(start, stop):
        return batch if microbatch is None else jax.tree.map(lambda x: x[start:stop], batch)

    half = size // 2
    parts = () if microbatch is None else (cut(0, half), cut(half, size))
    runs = np.asarray([_losses(loss, params, cut(0, size), parts) for _ in range(2)], np.float64)
    first, repeats = runs[0, 0], runs[:, :2].ravel()
    if not np.isfinite(repeats).all():
        raise ValueError(f"the loss is {first} on finite parameters and a finite batch")
    if np.abs(repeats - first).max() > 1e-5 * max(abs(first), 1e-30):
        raise ValueError(
            f"the loss is not deterministic: the same parameters and batch gave {sorted(set(repeats.tolist()))}. "
            "Fix its random key, or switch off dropout and augmentation"
        )
    if microbatch is not None:
        mean = (half * runs[0, 2] + (size - half) * runs[0, 3]) / size
        if abs(mean - first) > 1e-4 * max(abs(first), abs(mean), 1e-6):
            raise ValueError(
                f"the loss of {size} examples is {first:.6g} but the mean of its two halves is {mean:.6g}, so it "
                "is not a mean over independent examples and microbatch= would change the result. Use "
                "normalisation with running statistics (eval mode) and a mean rather than a sum"
            )
