"""What is differentiated along what: a loss, the leaves that are probed, and the checks before any long work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.probes import is_kernel
from ehap_jax.graph import Graph, channel_structure

__all__ = [
    "Axes",
    "Batches",
    "Layout",
    "Problem",
    "kernels_of",
    "layout_of",
    "prepare",
    "require_finite",
    "require_representable",
]

PyTree = Any

Axes = int | tuple[int, ...]
"""One axis, or several: a channel is an index along each."""


@dataclass(frozen=True)
class Layout:
    """Everything about a problem that is fixed at compile time; hashable, so compiled steps are reused.

    Attributes:
      structure: the tree structure of ``params``.
      paths: the paths of the probed leaves, in tree order.
      places: their places among the leaves of ``params``.
      axes: the axes along which each has its channels, ascending.
      policy: the numerical precision, without first scales: they are not compiled in.
    """

    structure: Any
    paths: tuple[str, ...]
    places: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    policy: Policy

    @property
    def named_axes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The path and the axes of every probed leaf."""
        return tuple(zip(self.paths, self.axes, strict=True))

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
        """Each leaf of ``products`` summed over all axes but those of its channels."""
        return {
            path: products[path].sum(tuple(a for a in range(products[path].ndim) if a not in axes))
            for path, axes in self.named_axes
            if path in products
        }


class Batches(tuple):
    """Several batches as one: ``channel_trace(loss, params, Batches(loader), ...)``.

    The Hessian is that of the mean loss over all their examples; each batch is weighted by its number of examples.
    They are differentiated one at a time, and every one may be cut further by ``microbatch``. All must have the
    same tree structure; those of one shape share a compilation.

    >>> batches = Batches({"x": jnp.ones((n, 2))} for n in (4, 4, 3))
    >>> len(batches), batch_size(batches)
    (3, 11)
    """


class Problem(NamedTuple):
    """A prepared loss: parameters and batch in the compute dtype, the batch cut into chunks.

    The mean loss of the batch is the sum of ``weight * loss(params, chunk)`` over the chunks.

    Attributes:
      layout: the compile-time part.
      leaves: the leaves of ``params`` in the compute dtype.
      chunks: the chunks of the batch.
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
    channel_axis: Axes | Mapping[str, Axes],
    microbatch: int | None,
    shards: int = 1,
    check_loss: bool = True,
) -> Problem:
    """Check a loss, its parameters and its batch, and cast and cut them; raises what `channel_trace` lists.

    With ``shards`` a chunk has up to ``microbatch`` examples for each of them.
    """
    policy.require_available()
    layout = layout_of(params, policy, select, channel_axis)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch is a number of examples and must be at least 1; got {microbatch}")
    size = batch_size(batch)
    params, batch = jax.tree.unflatten(layout.structure, leaves), _as_arrays(batch)
    require_finite(params, "params")
    require_finite(batch, "batch")
    parts = list(batch) if isinstance(batch, Batches) else [batch]
    step = size if microbatch is None else microbatch * shards
    if check_loss:
        _require_usable_loss(loss, params, parts, step, shards)
    cast = jax.tree.leaves(policy.cast(params))
    require_representable(params, jax.tree.unflatten(layout.structure, cast), "params", policy.compute)
    chunks = []
    for part in parts:
        narrow = policy.cast(part)
        require_representable(part, narrow, "batch", policy.compute)
        chunks += _cut(narrow, step)
    weights = [jnp.asarray(batch_size(chunk) / size, policy.sums) for chunk in chunks]
    return Problem(layout, cast, chunks, weights)


def _as_arrays(batch: PyTree) -> PyTree:
    if isinstance(batch, Batches):
        return Batches(jax.tree.map(jnp.asarray, part) for part in batch)
    return jax.tree.map(jnp.asarray, batch)


def _cut(batch: PyTree, step: int) -> list[PyTree]:
    """``batch`` in chunks of ``step`` examples and a rest; itself, not a copy, where it is one chunk."""
    size = batch_size(batch)
    if size <= step:
        return [batch]
    return [jax.tree.map(lambda x, s=start: x[s : s + step], batch) for start in range(0, size, step)]


def batch_size(batch: PyTree) -> int:
    """The number of examples: the common length of every leaf's first axis, added up over `Batches`."""
    if isinstance(batch, Batches):
        structures = {jax.tree.structure(part) for part in batch}
        if len(structures) > 1:
            raise ValueError(f"the batches differ in their structure: {sorted(map(str, structures))}")
        if not batch:
            raise ValueError("there are no batches")
        return sum(batch_size(part) for part in batch)
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


def kernels_of(
    graph: Graph | None,
    params: PyTree,
    select: Callable[[str, jax.Array], bool] | None,
    channel_axis: Axes | Mapping[str, Axes] | None,
) -> tuple[Callable[[str, jax.Array], bool], Axes | Mapping[str, Axes]]:
    """``select`` and ``channel_axis`` by what the caller gave.

    With a graph they are its kernels and the axis along which it prunes each, of which ``select`` may take some;
    without one the leaves with two axes or more, and their last axis.

    Raises:
      ValueError: both ``graph`` and ``channel_axis``; a kernel of the graph is not in ``params``, or of another shape.
    """
    if graph is None:
        return select or is_kernel, -1 if channel_axis is None else channel_axis
    if channel_axis is not None:
        raise ValueError("both graph= and channel_axis=: the graph has the axes of its kernels; give one of them")
    shapes = {path_name(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    axes: dict[str, Axes] = {}
    for path, axis in channel_structure(graph).kernel_axes.items():
        name = path if path in shapes else path.removeprefix("params/")
        if shapes.get(name) != graph.leaves[path].shape:
            found = f"of shape {shapes[name]}" if name in shapes else "missing"
            raise ValueError(
                f"kernel {path} of the graph has shape {graph.leaves[path].shape} but is {found} in params: "
                "graph= must be of the same network, trace_graph(apply)(variables, x)"
            )
        axes[name] = axis
    return lambda path, leaf: path in axes and (select is None or select(path, leaf)), axes


def layout_of(
    params: PyTree,
    policy: Policy,
    select: Callable[[str, jax.Array], bool],
    channel_axis: Axes | Mapping[str, Axes],
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
        given = channel_axis.get(name, -1) if isinstance(channel_axis, Mapping) else channel_axis
        several = given if isinstance(given, tuple) else (given,)
        for axis in several:
            if not -rank <= axis < rank:
                raise ValueError(f"channel_axis {axis} does not exist in {name!r} of shape {jnp.shape(leaf)}")
        paths.append(name)
        places.append(place)
        axes.append(tuple(sorted({axis % rank for axis in several})))
    if not paths:
        raise ValueError(f"no parameter is selected; the paths are {[name for name, _ in named]}")
    return Layout(jax.tree.structure(params), tuple(paths), tuple(places), tuple(axes), Policy(policy.compute))


@jax.jit
def _finite(leaves):
    return [jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True) for x in leaves]


def require_finite(tree: PyTree, what: str, compute: str | None = None) -> None:
    """Raise a ValueError that names the first leaf with NaN or infinity; ``compute`` is the dtype it was cast to."""
    named = jax.tree_util.tree_leaves_with_path(tuple(tree) if isinstance(tree, Batches) else tree)
    flags = jax.device_get(_finite([leaf for _, leaf in named]))
    for (path, _), finite in zip(named, flags, strict=True):
        if not finite:
            leaf = f"{what} leaf {path_name(path)!r}" if path else what
            raise ValueError(f"{leaf} holds NaN or infinity" + (f" in {compute}" if compute else ""))


@jax.jit
def _vanished(given, cast):
    return [(x != 0).any() & ~(y != 0).any() for x, y in zip(given, cast, strict=True)]


def require_representable(given: PyTree, cast: PyTree, what: str, compute: str) -> None:
    """Raise a ValueError that names the first leaf which ``compute`` cannot hold.

    It has become infinite; or all zero, where it was not and has two axes or more: a layer or a batch is gone.
    """
    require_finite(cast, what, compute)
    given = tuple(given) if isinstance(given, Batches) else given
    named = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(given)]
    pairs = [pair for pair in zip(named, jax.tree.leaves(cast), strict=True) if jnp.ndim(pair[1]) >= 2]
    flags = jax.device_get(_vanished([leaf for (_, leaf), _ in pairs], [leaf for _, leaf in pairs]))
    for ((path, _), _), gone in zip(pairs, flags, strict=True):
        if gone:
            leaf = f"{what} leaf {path_name(path)!r}" if path else what
            raise ValueError(f"{leaf} is not zero, but all of it is in {compute}; use bfloat16 or float32, or scale it")


def _checked_value(loss, params, examples):
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
    return value.astype(jnp.float32)


_loss = jax.jit(_checked_value, static_argnames="loss")


@partial(jax.jit, static_argnames="loss")
def _loss_twice(loss, params, examples):
    """The loss traced and evaluated twice."""
    return jnp.stack([_checked_value(loss, params, examples) for _ in range(2)])


def _require_usable_loss(loss, params, parts: list[PyTree], step: int, shards: int) -> None:
    """Trace the loss twice and run it twice; where a batch is cut, check that it is a mean over the pieces.

    A piece and the next one together must have the mean of their losses. Two at a time, so that a loss which has to be
    cut fits into memory; all of them, for padding lies in the last ones.
    """
    pieces = [_pieces(part, step, shards) for part in parts]
    first = pieces[0][0]
    values = np.asarray([_loss_twice(loss, params, first) for _ in range(2)], np.float64).ravel()
    if not np.isfinite(values).all():
        raise ValueError(f"the loss is {values[0]} on finite parameters and a finite batch")
    if np.abs(values - values[0]).max() > 1e-5 * max(abs(values[0]), 1e-30):
        raise ValueError(
            f"the loss is not deterministic: the same parameters and batch gave {sorted(set(values.tolist()))}. "
            "Fix its random key, or switch off dropout and augmentation"
        )
    for of_part in pieces:
        if len(of_part) > 1:
            _require_mean(loss, params, of_part)
            # Examples that are fitted have no loss to tell by; with other signs of the kernels they have.
            _require_mean(loss, _other_signs(params), of_part, only_finite=True)


def _other_signs(params: PyTree) -> PyTree:
    rng = np.random.default_rng(0)

    def one(leaf):
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf * jnp.asarray(rng.choice([-1, 1], leaf.shape), leaf.dtype)

    return jax.tree.map(one, params)


def _require_mean(loss, params, pieces: list[PyTree], *, only_finite: bool = False) -> None:
    """``only_finite``: nothing is said where the loss is not."""
    values = [float(_loss(loss, params, piece)) for piece in pieces]
    if only_finite and not np.isfinite(values).all():
        return
    start = 0
    for i, (a, b) in enumerate(itertools.pairwise(pieces)):
        m, n = batch_size(a), batch_size(b)
        both = float(_loss(loss, params, jax.tree.map(lambda *x: jnp.concatenate(x), a, b)))
        mean = (m * values[i] + n * values[i + 1]) / (m + n)
        if not abs(mean - both) <= 1e-4 * max(abs(both), abs(mean), 1e-6):
            raise ValueError(
                f"the loss of examples {start} to {start + m + n - 1} is {both:.6g} but the mean of its two pieces, "
                f"of {m} and {n}, is {mean:.6g}, so it is not a mean over independent examples and cutting the batch "
                "would change the result. Use normalisation with running statistics (eval mode) and a mean rather "
                "than a sum; a mean over valid examples alone must be cut into pieces with equally many of them, or "
                "not at all"
            )
        start += m


def _pieces(part: PyTree, step: int, shards: int) -> list[PyTree]:
    """What the loss is called with: the chunks of a batch, each divided over ``shards`` (see `devices.divide`)."""
    found = []
    for chunk in _cut(part, step):
        each = batch_size(chunk) // shards
        whole = each * shards
        found += [jax.tree.map(lambda x, s=s, n=each: x[s : s + n], chunk) for s in range(0, whole, max(each, 1))]
        found += [jax.tree.map(lambda x, s=s: x[s : s + 1], chunk) for s in range(whole, batch_size(chunk))]
    return found
