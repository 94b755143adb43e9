"""Cotangents of the logits, column by column, for every example of a batch: what exact traces and removal costs share.

The Hessian of a head is ``S S^T``. Its columns, or random combinations of them, go backward through the network, some
examples and some columns at a time. What becomes of them is up to the caller.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax.curvature.chunk_memory import examples_together
from ehap_jax.curvature.devices import DATA, EXAMPLES, SAME, check_mesh, place, size_of
from ehap_jax.curvature.heads import (
    Head,
    curvature_shares,
    forms_root,
    has_gradient,
    inputs_and_targets,
    loss_gradient,
    require_targets,
    root_of,
    root_times,
    shares_of,
    softmax_cross_entropy,
    weighted,
)
from ehap_jax.curvature.partial_sums import PartialSums, SumsFile
from ehap_jax.curvature.precision import SMALLEST_SCALE, Policy
from ehap_jax.curvature.problem import batch_size, require_finite, require_representable

__all__ = ["Columns", "Examples", "add_up", "columns_of", "count_draws", "first_scale", "head_roots", "read_examples"]

PyTree = Any

COLUMNS_PER_PASS = 16
"""Cotangents that go backward together."""

FIRST_FLOAT16_SCALE = 2.0**10
"""Cotangents are scaled to about this in float16, less where that overflows."""


def count_draws(classes: Literal["all"] | int, draw: str, key: jax.Array | None, head: Head | weighted) -> int:
    """The number of random combinations that ``classes`` asks for, 0 for every column.

    Raises:
      ValueError: ``classes``, ``draw`` or ``key`` do not fit each other or the head.
    """
    if draw not in ("signs", "labels"):
        raise ValueError(f'draw must be "signs" or "labels"; got {draw!r}')
    if classes == "all":
        return 0
    draws = operator.index(classes) if hasattr(classes, "__index__") and not isinstance(classes, bool) else 0
    if draws < 1:
        raise ValueError(f'classes must be "all" or a positive number of random combinations; got {classes!r}')
    if key is None:
        raise ValueError("random combinations need a key, for example key=jax.random.key(0)")
    if draw == "labels" and (head.head if isinstance(head, weighted) else head) is not softmax_cross_entropy:
        raise ValueError('draw="labels" draws from the softmax: it needs head=softmax_cross_entropy')
    return draws


class Examples(NamedTuple):
    """A checked batch and the variables, in the compute dtype.

    Attributes:
      params: the variables. x: what the model reads.
      head: of one example. targets: what it is handed besides the logits.
      size: the number of examples.
    """

    params: PyTree
    x: PyTree
    head: Head
    targets: tuple
    size: int


def read_examples(params: PyTree, batch: PyTree, policy: Policy, mesh: Mesh | None, head: Head | weighted) -> Examples:
    """Check and cast variables and batch.

    Raises:
      ValueError: the head takes other targets, or no weights; NaN or infinity, named by path; leaves of the batch that
        differ in length; several processes.
    """
    policy.require_available()
    check_mesh(mesh)
    if mesh is not None and jax.process_count() > 1:
        raise ValueError("what is exact is computed by the devices of one process; channel_trace takes several")
    size = batch_size(batch)
    require_finite(params, "params")
    require_finite(batch, "batch")
    x, targets = jax.tree.map(jnp.asarray, inputs_and_targets(batch))
    inner, targets, _ = shares_of(head, targets, size, policy.sums)
    narrow, cast = policy.cast(x), policy.cast(params)
    require_representable(params, cast, "params", policy.compute)
    require_representable(x, narrow, "batch", policy.compute)
    return Examples(cast, narrow, inner, targets, size)


@dataclass(frozen=True)
class Columns:
    """Which cotangents go backward for every example; hashable, as it is fixed at compile time.

    Attributes:
      head: whose root S they are of.
      draws: how many random combinations of its columns; 0 for every column.
      draw: the kind of combination.
      of_root: columns of S.
      gradient: whether the gradient of the loss follows as one column more, with the sign 0.
      sums: the dtype they are computed in.
    """

    head: Head
    draws: int
    draw: str
    of_root: int
    gradient: bool
    sums: str

    @property
    def squared(self) -> int:
        """How many are of the root."""
        return self.draws or self.of_root

    @property
    def count(self) -> int:
        return self.squared + self.gradient

    @property
    def together(self) -> int:
        """How many go backward in one pass."""
        return math.ceil(self.count / math.ceil(self.count / COLUMNS_PER_PASS))

    @property
    def formed(self) -> int:
        """Columns of the root that are formed at once besides."""
        return self.of_root if forms_root(self.head) else 0

    def scaled(self, logits, targets, examples, key, start, scale):
        """The columns from ``start`` on of a chunk of n examples, and what undoes their scales.

        Every example's column is multiplied by a power of two that brings its largest entry near ``scale``: nothing
        underflows, nothing is rounded.

        Returns:
          columns (together, n, *logits.shape[1:]) in the dtype of ``logits``, signs (together, n), and factors
          (together, n) to multiply what is linear in a column by.
        """
        columns, signs = jax.vmap(partial(self._of_example, key=key, start=start))(logits, targets, examples)
        columns, signs = jnp.swapaxes(columns, 0, 1), signs.T
        _, exponent = jnp.frexp(jnp.abs(columns).max(tuple(range(2, columns.ndim)), keepdims=True))
        columns = jnp.ldexp(columns, -exponent) * scale
        unscale = jnp.ldexp(jnp.ones((), jnp.dtype(self.sums)), exponent.reshape(signs.shape)) / scale
        return columns.astype(logits.dtype), signs, unscale

    def _of_example(self, logits, targets, example, key, start):
        """(together, *logits.shape), and their signs; zeros past the end."""
        logits = logits.astype(self.sums)
        which = start + jnp.arange(self.together, dtype=jnp.int32)
        found, signs = self._of_root(logits, targets, example, key, which)
        if self.gradient:
            last = (which == self.squared).astype(logits.dtype)
            found = found + last.reshape(-1, *[1] * logits.ndim) * loss_gradient(self.head, logits, targets)[None]
        return found, signs

    def _of_root(self, logits, targets, example, key, which):
        if not self.draws:
            chosen = jax.nn.one_hot(which, self.of_root, dtype=logits.dtype)
            found, signs = root_times(self.head, logits, targets, chosen)
            return found, chosen @ signs
        inside = (which < self.draws).astype(logits.dtype)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, example), i))(which)
        if self.draw == "labels":
            labels = jax.vmap(lambda k: jax.random.categorical(k, logits))(keys)
            found = jax.nn.softmax(logits)[None] - jax.nn.one_hot(labels, logits.size, dtype=logits.dtype)
        else:
            flips = jax.vmap(lambda k: jax.random.bits(k, (self.of_root,), jnp.uint8) & jnp.uint8(1))(keys)
            found = root_times(self.head, logits, targets, 1 - 2 * flips.astype(logits.dtype))[0]
        return found * inside.reshape(-1, *[1] * logits.ndim), inside


def columns_of(
    examples: Examples, shape: tuple[int, ...], policy: Policy, draws: int, draw: str, *, gradient: bool
) -> Columns:
    """The columns for logits of one example of ``shape``; with ``gradient`` that of the loss, where the head has one.

    Raises:
      ValueError: the head does not fit the logits or the batch's targets; it is indefinite, and random combinations
        are wanted.
    """
    head, targets = examples.head, examples.targets
    if gradient:
        require_targets(head, targets, shape)
    logits = jax.ShapeDtypeStruct(shape, policy.sums)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), targets)
    root = jax.eval_shape(lambda z, t: root_of(head, z, t, bool(draws))[0], logits, one)
    if not root.shape[0]:
        raise ValueError(
            "the softmax of one logit has no curvature; for one logit give head=second_derivative(your loss)"
        )
    return Columns(head, draws, draw, root.shape[0], gradient and has_gradient(head, targets), policy.sums)


def first_scale(policy: Policy) -> float:
    """Of the cotangents."""
    return policy.loss_scale or (FIRST_FLOAT16_SCALE if policy.backs_off else 1.0)


def head_roots(model, head: Head | weighted, policy: Policy, params: PyTree, batch: PyTree) -> Any:
    """The head's columns for every example: what a result is made of besides gradients, for its fingerprint."""
    x, targets = inputs_and_targets(batch)
    logits = model(policy.cast(params), policy.cast(x)).astype(policy.sums)
    head, targets, shares = shares_of(head, targets, logits.shape[0], policy.sums)
    roots = jax.vmap(lambda *example: root_of(head, example[0], example[1:])[0])(logits, *targets)
    return roots, curvature_shares(head, targets, shares)


def add_up(
    model: Callable,
    chunk_of: Callable,
    add: Callable[[range, int, Mapping[str, np.ndarray]], None],
    examples: Examples,
    columns: Columns,
    sums: PartialSums,
    *,
    shares: np.ndarray,
    what: str,
    each: int,
    key: jax.Array,
    policy: Policy,
    microbatch: int | None,
    memory_budget: int | None,
    mesh: Mesh | None,
    file: SumsFile,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Take all columns of all examples backward, chunk by chunk; in float16 a chunk that overflows is done again.

    Args:
      model: ``model(params, x) -> logits``.
      chunk_of: ``chunk_of(leaves, x, targets, examples, weights, key, start, scale) -> ({name: array}, logits)`` for
        the columns from ``start`` on; ``weights`` (n,) are the examples' ``shares``, 0 for those that fill up a chunk.
      add: ``add(which examples, start, arrays)``, in float64, puts a chunk's arrays into ``sums``.
      sums: where they are, and where the run stands.
      shares: with what share the square of each example counts, (n,).
      what: is computed, for errors, such as "the trace".
      each: bytes that one example takes.

    Raises:
      ValueError: ``microbatch`` or ``memory_budget`` out of range; the examples are not independent; the file is of
        something else.
      FloatingPointError: a sum is not finite, in float16 at the smallest scale.
    """
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch is a number of examples and must be at least 1; got {microbatch}")
    if memory_budget is not None and not memory_budget > 0:
        raise ValueError(f"memory_budget is a number of bytes and must be positive; got {memory_budget}")
    size, devices = examples.size, size_of(mesh, DATA)
    leaves, structure = jax.tree.flatten(examples.params)
    together = devices * examples_together(each, microbatch, memory_budget, on_cpu(leaves))
    chunk = math.ceil(size / math.ceil(size / together) / devices) * devices
    file.resume(sums)
    leaves = place(mesh, leaves, SAME)
    for first in range(sums.next, size, chunk):
        numbers = np.arange(first, first + chunk)
        inside = numbers < size
        which = np.minimum(numbers, size - 1).astype(np.int32)
        weights = np.where(inside, shares[which], np.zeros((), shares.dtype))
        inputs, outputs = jax.tree.map(lambda leaf, i=which: leaf[i], (examples.x, examples.targets))
        here = place(mesh, (inputs, outputs, jnp.asarray(which), jnp.asarray(weights)), EXAMPLES)
        real = range(first, min(first + chunk, size))
        for start in range(0, columns.count, columns.together):

            def attempt(scale, start=start, here=here):
                return chunk_of(leaves, *here, key, jnp.int32(start), jnp.asarray(scale, policy.sums))

            arrays, logits = _finite(attempt, sums, policy, real, what)
            if first == 0 and start == 0:
                _require_independent(partial(_logits, model, structure, leaves), examples.x, logits, policy)
            add(real, start, arrays)
        sums.next = real.stop
        file.save(sums, now=sums.next == size)
        if progress is not None:
            progress(sums.next, size)


def _finite(attempt: Callable, sums: PartialSums, policy: Policy, real: range, what: str):
    """The arrays of a chunk, at a scale at which they are finite."""
    while True:
        arrays, logits = attempt(sums.scale)
        arrays = {name: np.asarray(x, np.float64) for name, x in jax.device_get(arrays).items()}
        bad = [name for name, x in arrays.items() if not np.isfinite(x).all()]
        if not bad:
            return arrays, logits
        if not policy.backs_off or sums.scale <= SMALLEST_SCALE:
            wider = ' Use Policy("float32")' if policy.sums != policy.compute else ""
            raise FloatingPointError(
                f"{what} of {bad[0]!r} is not finite in {policy.compute} for examples {real[0]} to {real[-1]}, though "
                f"params and batch are: it overflows on the way.{wider}"
            )
        sums.scale, sums.rejected = sums.scale / 2, sums.rejected + 1


@partial(jax.jit, static_argnums=(0, 1))
def _logits(model: Callable, structure, leaves, x):
    return model(jax.tree.unflatten(structure, leaves), x)


def _require_independent(logits_of: Callable, x: PyTree, alone, policy: Policy) -> None:
    """Check that the first example's logits are those it has ``alone`` also before the second one and after it.

    Differences count beside the largest logit of all examples in ``alone``: those of the first may cancel to nothing.
    """
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], x) for i in (0, 1))
    if not len(jax.tree.leaves(second)[0]):  # a batch of one example has nothing to couple
        return
    pairs = [jax.tree.map(lambda *parts: jnp.concatenate(parts), *pair) for pair in ((first, second), (second, first))]
    beside = np.stack([np.asarray(logits_of(pair)[i], np.float64) for i, pair in enumerate(pairs)])
    alone = np.asarray(alone, np.float64)
    tolerance = {"float64": 1e-6, "float32": 1e-3}.get(policy.compute, 0.1)
    if not np.abs(beside - alone[0]).max() <= tolerance * max(np.abs(alone).max(), 1e-30):
        raise ValueError(
            "the logits of two examples together differ from those of each alone: the examples are not independent. "
            "Use normalisation with running statistics (eval mode)"
        )


def on_cpu(leaves) -> bool:
    return next(iter(leaves[0].devices())).platform == "cpu"
