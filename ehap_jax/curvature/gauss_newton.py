"""Exact channel traces of the Gauss-Newton matrix, which is the Hessian where the network is piecewise linear."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax.curvature.chunk_memory import bytes_per_example, examples_together
from ehap_jax.curvature.devices import DATA, EXAMPLES, SAME, check_mesh, place, size_of
from ehap_jax.curvature.estimate import Moments, TraceEstimate, estimate_of, exact_state
from ehap_jax.curvature.heads import (
    Head,
    curvature_shares,
    forms_root,
    inputs_and_targets,
    root_of,
    root_times,
    shares_of,
    softmax_cross_entropy,
    square_shares,
    weighted,
)
from ehap_jax.curvature.partial_sums import PartialSums, SumsFile
from ehap_jax.curvature.precision import SMALLEST_SCALE, Policy
from ehap_jax.curvature.problem import Axes, Layout, batch_size, kernels_of, layout_of, require_finite
from ehap_jax.curvature.saved_trace import fingerprint
from ehap_jax.curvature.tapped_model import require_proven, tapped_model
from ehap_jax.curvature.taps import Site, Taps
from ehap_jax.graph import Graph

__all__ = ["gauss_newton_trace"]

PyTree = Any

COLUMNS_PER_PASS = 16
"""Cotangents that go backward together."""

FIRST_FLOAT16_SCALE = 2.0**10
"""Cotangents are scaled to about this in float16, less where that overflows."""


def gauss_newton_trace(
    model: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    head: Head | weighted = softmax_cross_entropy,
    classes: Literal["all"] | int = "all",
    draw: Literal["signs", "labels"] = "signs",
    key: jax.Array | None = None,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    microbatch: int | None = None,
    memory_budget: int | None = None,
    graph: Graph | None = None,
    select: Callable[[str, jax.Array], bool] | None = None,
    channel_axis: Axes | Mapping[str, Axes] | None = None,
    on_unproven: Literal["error", "gauss_newton"] = "error",
    mesh: Mesh | None = None,
    save_to: str | Path | None = None,
    save_every: float = 30.0,
    progress: Callable[[int, int], None] | None = None,
) -> TraceEstimate:
    """``Tr(G_cc)`` for every output channel c of every selected kernel: exact, without probes.

    ``G = mean over examples of J^T H_out J``, J the Jacobian of the logits and H_out = S S^T the Hessian of the loss
    with respect to them. Its trace over a channel is the sum, over examples and columns of S, of the squared gradient
    of ``s . logits``. Where the logits are piecewise linear in the kernel (see `piecewise_linear_kernels`) this
    is the Hessian's own trace, the expectation of `channel_trace` (HAP eq. 8).

    Examples go through the network one by one as far as mathematics is concerned (under `jax.vmap`), and gradients
    are put together per example from what each convolution or product reads and the cotangents of its outputs.
    Kernels with uses of another kind (embeddings, elementwise products) cost one copy per example.

    Args:
      model: ``model(params, x) -> logits``, with the examples on the first axis of both.
      params: pytree of arrays; may hold constants such as running statistics beside the weights.
      batch: x itself, or a tuple or list ``(x, *targets)``, or a dict with ``"image"`` or ``"x"``, and perhaps
        ``"label"`` and ``"weight"``, or `Batches` of any of them. Targets are handed to the head.
      head: ``head(logits, *targets) -> S`` of one example, S of shape ``(*logits.shape, R)``, or ``(S, signs)`` with
        one sign per column; the loss is the mean over examples. `softmax_cross_entropy`, `squared_error`,
        ``second_derivative(loss)``, or your own; ``weighted(head)`` for a weighted mean.
      classes: ``"all"`` for every column of S: exact. K for K random combinations of the columns: unbiased, and the
        standard error over the K is reported.
      draw: with K, ``"signs"`` combines the columns with random ±1; ``"labels"`` draws K labels from the model's own
        probabilities (softmax cross-entropy only).
      key: with K, the random key. Combination i of example j is the same for every policy and chunking.
      policy: the numerical precision. Each cotangent is scaled by a power of two that is divided out of the squares,
        in float16 by up to 2**10 and less where that overflows.
      microbatch: examples at a time; by default as many as ``memory_budget`` allows, 16 at most on CPU.
      memory_budget: bytes that intermediate arrays may take, by estimate, the head's included. It is an error if
        ``microbatch`` examples, or one, need more. By default 1 GiB, or what one example needs if that is more.
      graph, select, channel_axis: which leaves, and along which axes their channels lie, as for `channel_trace`.
      on_unproven: ``"gauss_newton"`` reports the trace of G for kernels where it is not proven to be the Hessian's.
      mesh: devices of this process to divide the examples over, along the mesh's axis ``"data"``; ``microbatch`` and
        ``memory_budget`` count per device.
      save_to: a file for the sums so far, written about every ``save_every`` seconds and at the end. If it is there
        already, it must be of the same arguments, and the run goes on from it, with an identical result. Other devices,
        another ``microbatch`` or ``memory_budget`` change only the rounding.
      save_every: seconds between two writes.
      progress: called as ``progress(examples done, examples)`` after every chunk.

    Returns:
      A `TraceEstimate`. ``count`` is K; with ``"all"`` it is 0, for nothing is random, and ``sem`` is zero.

    Raises:
      ValueError: a selected kernel is not proven, with the reason; the examples are not independent (BatchNorm in
        training mode); labels out of range; the head does not fit the logits or the batch's targets, or is indefinite
        and ``classes`` is not ``"all"``; NaN or infinity in ``params`` or ``batch``, named by path; nothing is
        selected; the graph is of another network; leaves of the batch differ in length; ``memory_budget`` is too
        small; ``save_to`` is of something else; options out of range.
      TypeError: the model does not return one floating-point array; a selected parameter is an integer.
      FileNotFoundError: the folder of ``save_to`` does not exist.
      FloatingPointError: a trace is not finite, in float16 at the smallest scale; names the first such leaf.

    >>> model = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> p = {"a": jnp.eye(3), "b": jnp.ones((3, 2))}
    >>> trace = gauss_newton_trace(model, p, jnp.array([[1.0, -1.0, 2.0]]))
    >>> trace.mean["b"].tolist()
    [1.25, 1.25]
    """
    policy.require_available()
    check_mesh(mesh)
    if mesh is not None and jax.process_count() > 1:
        raise ValueError("an exact trace is computed by the devices of one process; channel_trace takes several")
    if on_unproven not in ("error", "gauss_newton"):
        raise ValueError(f'on_unproven must be "error" or "gauss_newton"; got {on_unproven!r}')
    draws = _draws(classes, draw, key, head.head if isinstance(head, weighted) else head)
    select, channel_axis = kernels_of(graph, params, select, channel_axis)
    layout = layout_of(params, policy, select, channel_axis)
    size = batch_size(batch)
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch is a number of examples and must be at least 1; got {microbatch}")
    if memory_budget is not None and not memory_budget > 0:
        raise ValueError(f"memory_budget is a number of bytes and must be positive; got {memory_budget}")
    require_finite(params, "params")
    require_finite(batch, "batch")
    x, targets = jax.tree.map(jnp.asarray, inputs_and_targets(batch))
    inner, targets, _ = shares_of(head, targets, size, policy.sums)
    x, cast = policy.cast(x), policy.cast(params)
    require_finite(cast, "params", policy.compute)
    require_finite(x, "batch", policy.compute)
    taps, leaves = tapped_model(model, cast, x, layout.paths), jax.tree.leaves(cast)
    if on_unproven == "error":
        require_proven(taps)
    shares = square_shares(head, batch, math.prod(taps.body.outputs[0].shape[1:]), policy.sums)
    root_columns = _count_columns(taps, inner, targets, policy, bool(draws))
    columns = draws or root_columns
    plan = _Plan(
        model=model,
        taps=taps,
        head=inner,
        layout=layout,
        draws=draws,
        draw=draw,
        root_columns=root_columns,
        columns=math.ceil(columns / math.ceil(columns / COLUMNS_PER_PASS)),
    )
    devices = size_of(mesh, DATA)
    each = bytes_per_example(taps, plan.columns, root_columns if forms_root(inner) else 0, policy)
    together = devices * examples_together(each, microbatch, memory_budget, _on_cpu(leaves))
    chunk = math.ceil(size / math.ceil(size / together) / devices) * devices
    key = jax.random.key(0) if key is None else key
    made_from = None
    if save_to is not None:
        settings: dict[str, Any] = {"policy": policy, "select": select, "channel_axis": channel_axis}
        roots = fingerprint(partial(_roots, model, head, policy), params, batch, key=key, **settings)
        made_from = replace(roots, probes=f"exact {draws} {draw}" if draws else "exact all")
    file = SumsFile(save_to, made_from, save_every)
    sums = PartialSums(
        {
            path: (columns, *(leaves[place].shape[axis] for axis in axes))
            for path, place, axes in zip(layout.paths, layout.places, layout.axes, strict=True)
        },
        policy.loss_scale or (FIRST_FLOAT16_SCALE if policy.backs_off else 1.0),
    )
    file.resume(sums)
    leaves = place(mesh, leaves, SAME)
    for first in range(sums.next, size, chunk):
        examples = range(first, first + chunk)
        _add_chunk(plan, leaves, x, targets, shares, key, policy, examples, columns, sums, mesh)
        sums.next = min(first + chunk, size)
        file.save(sums, now=sums.next == size)
        if progress is not None:
            progress(sums.next, size)
    return _estimate(layout, sums.by_path, draws, sums.rejected, key)


@dataclass(frozen=True)
class _Plan:
    """Everything that is fixed at compile time."""

    model: Callable
    taps: Taps
    head: Head
    layout: Layout
    draws: int  # 0: every column
    draw: str
    root_columns: int  # of the head
    columns: int  # of them, or combinations, that go backward together


def _draws(classes, draw: str, key, head) -> int:
    if draw not in ("signs", "labels"):
        raise ValueError(f'draw must be "signs" or "labels"; got {draw!r}')
    if classes == "all":
        return 0
    draws = operator.index(classes) if hasattr(classes, "__index__") and not isinstance(classes, bool) else 0
    if draws < 1:
        raise ValueError(f'classes must be "all" or a positive number of random combinations; got {classes!r}')
    if key is None:
        raise ValueError("random combinations need a key, for example key=jax.random.key(0)")
    if draw == "labels" and head is not softmax_cross_entropy:
        raise ValueError('draw="labels" draws from the softmax: it needs head=softmax_cross_entropy')
    return draws


def _count_columns(taps: Taps, head: Head, targets, policy: Policy, random: bool) -> int:
    """Of the head; raises what `root_of` does."""
    logits = jax.ShapeDtypeStruct(taps.body.outputs[0].shape[1:], policy.sums)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), targets)
    return jax.eval_shape(lambda z, t: root_of(head, z, t, random)[0], logits, one).shape[0]


def _cotangents(plan: _Plan, logits, targets, example, key, start):
    """The columns from ``start`` on of one example, (columns, *logits.shape), and their signs; zeros past the end."""
    logits = logits.astype(plan.layout.policy.sums)
    which = start + jnp.arange(plan.columns, dtype=jnp.int32)
    if not plan.draws:
        chosen = jax.nn.one_hot(which, plan.root_columns, dtype=logits.dtype)
        found, signs = root_times(plan.head, logits, targets, chosen)
        return found, chosen @ signs
    inside = (which < plan.draws).astype(logits.dtype)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, example), i))(which)
    if plan.draw == "labels":
        labels = jax.vmap(lambda k: jax.random.categorical(k, logits))(keys)
        return jax.nn.softmax(logits)[None] - jax.nn.one_hot(labels, logits.size, dtype=logits.dtype), inside
    flips = jax.vmap(lambda k: jax.random.bits(k, (plan.root_columns,), jnp.uint8) & jnp.uint8(1))(keys)
    return root_times(plan.head, logits, targets, 1 - 2 * flips.astype(logits.dtype))[0], inside


def _chunk(plan: _Plan, leaves, x, targets, examples, weights, key, start, scale):
    """Sums of squared channel gradients of a chunk: ``{path: (columns, channels)}``, and the logits (n, ...).

    Several compiled functions, for CPUs: in one, XLA works on all kernels side by side, beyond the caches, and slower.
    """
    taps, layout = plan.taps, plan.layout
    logits, read, deltas, own, counts = _passes(plan, leaves, x, targets, examples, weights, key, start, scale)
    axes = dict(layout.named_axes)
    found: dict[str, jax.Array] = {}
    others: list[int] = []
    for i, site in enumerate(taps.sites):
        (path, *_) = site.reads
        alone = site.direct and all(len(taps.sites_of(path)) == 1 for path in site.reads)
        if alone and all(map(site.sums_to, axes[path])):
            found[path] = _squares(_Kind(site), axes[path], layout.policy.sums, read[i], deltas[i], counts)
        else:
            others.append(i)
    if others or own:
        found |= _added_squares(
            plan, tuple(others), leaves, [read[i] for i in others], [deltas[i] for i in others], own, counts
        )
    for path, index in zip(layout.paths, layout.places, strict=True):
        if path not in found:  # used nowhere
            sizes = [leaves[index].shape[axis] for axis in axes[path]]
            found[path] = jnp.zeros((plan.columns, *sizes), layout.policy.sums)
    return found, logits


_whole_chunk = jax.jit(_chunk, static_argnames="plan")


def _chunk_function(leaves) -> Callable:
    """How a chunk is computed: by several compiled functions on CPU (see `_chunk`), by one elsewhere."""
    return _chunk if _on_cpu(leaves) else _whole_chunk


@partial(jax.jit, static_argnames="plan")
def _passes(plan: _Plan, leaves, x, targets, examples, weights, key, start, scale):
    """One pass forward and one backward of all columns.

    Returns the logits, what every site reads, the cotangents of what it writes, the gradients of untapped kernels, and
    with what each squared gradient counts, (columns, n).
    """
    taps, layout = plan.taps, plan.layout
    sums = jnp.dtype(layout.policy.sums)
    inputs = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[:, None], x))
    logits, read, pull = taps.backward(leaves, inputs)
    columns, signs = jax.vmap(partial(_cotangents, plan, key=key, start=start))(logits, targets, examples)
    columns, signs = jnp.swapaxes(columns, 0, 1), signs.T  # (r, n, ...), (r, n)
    # A power of two per example and column brings its largest entry near one: nothing underflows, nothing is rounded.
    _, exponent = jnp.frexp(jnp.abs(columns).max(tuple(range(2, columns.ndim)), keepdims=True))
    columns = jnp.ldexp(columns, -exponent) * scale
    unscale = jnp.ldexp(jnp.ones((), sums), exponent.reshape(signs.shape)) / scale
    counts = signs * unscale * unscale * weights[None, :]
    deltas, own = pull(columns.astype(logits.dtype))
    return logits, read, deltas, own, counts


class _Kind:
    """A site that equals every other one of the same operation: one compiled function serves all of them."""

    def __init__(self, site: Site) -> None:
        self.site, self.operation = site, site.operation

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kind) and self.operation == other.operation

    def __hash__(self) -> int:
        return hash(self.operation)


@partial(jax.jit, static_argnames=("kind", "axes", "sums"))
def _squares(kind: _Kind, axes: tuple[int, ...], sums: str, read, delta, counts):
    """Of a kernel that is used once, at a site of this kind: (columns, channels)."""
    site = kind.site
    squares = site.squares(site.inputs(read), site.cotangents(delta), axes, jnp.dtype(sums))
    return jnp.einsum("rn...,rn->r...", squares, counts)


@partial(jax.jit, static_argnames=("plan", "sites"))
def _added_squares(plan: _Plan, sites: tuple[int, ...], leaves, read, deltas, own, counts):
    """Of kernels whose gradients are put together of several uses before they are squared, by path."""
    taps, layout = plan.taps, plan.layout
    sums = jnp.dtype(layout.policy.sums)
    axes = dict(layout.named_axes)
    gradients = {path: g.astype(sums) for path, g in own.items()}
    for i, h, d in zip(sites, read, deltas, strict=True):
        site = taps.sites[i]
        g = site.gradients(site.inputs(h), site.cotangents(d), sums)
        for path, part in taps.pull_to_leaves(site, g, leaves).items():
            if path not in taps.untapped:
                gradients[path] = gradients[path] + part if path in gradients else part
    found = {}
    for path, g in gradients.items():
        others = tuple(2 + a for a in range(g.ndim - 2) if a not in axes[path])
        found[path] = jnp.einsum("rn...,rn->r...", (g * g).sum(others), counts)
    return found


def _roots(model, head: Head | weighted, policy: Policy, params, batch):
    """What the trace is made of besides the gradients, for the fingerprint: the head's columns for every example."""
    x, targets = inputs_and_targets(batch)
    logits = model(policy.cast(params), policy.cast(x)).astype(policy.sums)
    head, targets, shares = shares_of(head, targets, logits.shape[0], policy.sums)
    roots = jax.vmap(lambda *example: root_of(head, example[0], example[1:])[0])(logits, *targets)
    return roots, curvature_shares(head, targets, shares)


def _add_chunk(
    plan: _Plan,
    leaves,
    x,
    targets,
    shares: np.ndarray,
    key,
    policy: Policy,
    chunk: range,
    columns: int,
    sums: PartialSums,
    mesh,
) -> None:
    """Add a chunk's share of the sum of squares; what lies beyond the last example weighs nothing."""
    size = len(shares)
    examples = np.minimum(np.asarray(chunk), size - 1).astype(np.int32)
    weights = np.where(np.asarray(chunk) < size, shares[examples], np.zeros((), shares.dtype))
    inputs, outputs = jax.tree.map(lambda leaf: leaf[examples], (x, targets))
    chunk_of = _chunk_function(leaves)
    here = place(mesh, (inputs, outputs, jnp.asarray(examples), jnp.asarray(weights)), EXAMPLES)
    for start in range(0, columns, plan.columns):
        while True:
            scale = jnp.asarray(sums.scale, policy.sums)
            squares, logits = chunk_of(plan, leaves, *here, key, jnp.int32(start), scale)
            squares = {path: np.asarray(s, np.float64) for path, s in jax.device_get(squares).items()}
            bad = [path for path, s in squares.items() if not np.isfinite(s).all()]
            if not bad:
                break
            if not policy.backs_off or sums.scale <= SMALLEST_SCALE:
                wider = ' Use Policy("float32")' if policy.sums != policy.compute else ""
                raise FloatingPointError(
                    f"the trace of {bad[0]!r} is not finite in {policy.compute} for examples {chunk[0]} to "
                    f"{min(chunk[-1], size - 1)}, though params and batch are: it overflows on the way.{wider}"
                )
            sums.scale, sums.rejected = sums.scale / 2, sums.rejected + 1
        if chunk[0] == 0 and start == 0:
            _require_independent(plan, leaves, x, logits[0])
        for path, s in squares.items():
            sums.add(path, start, s)


@partial(jax.jit, static_argnames="plan")
def _logits(plan: _Plan, leaves, x):
    return plan.model(jax.tree.unflatten(plan.layout.structure, leaves), x)


def _require_independent(plan: _Plan, leaves, x, alone) -> None:
    """Check that the first example's logits are those it has ``alone`` also before the second one and after it."""
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], x) for i in (0, 1))
    if not len(jax.tree.leaves(second)[0]):  # a batch of one example has nothing to couple
        return
    pairs = [jax.tree.map(lambda *parts: jnp.concatenate(parts), *pair) for pair in ((first, second), (second, first))]
    beside = np.stack([np.asarray(_logits(plan, leaves, pair)[i], np.float64) for i, pair in enumerate(pairs)])
    alone = np.asarray(alone, np.float64)
    tolerance = {"float64": 1e-6, "float32": 1e-3}.get(plan.layout.policy.compute, 0.1)
    if not np.abs(beside - alone).max() <= tolerance * max(np.abs(alone).max(), 1e-30):
        raise ValueError(
            "the logits of two examples together differ from those of each alone: the examples are not independent. "
            "Use normalisation with running statistics (eval mode)"
        )


def _on_cpu(leaves) -> bool:
    return next(iter(leaves[0].devices())).platform == "cpu"


def _estimate(layout: Layout, by_column: dict, draws: int, rejected: int, key) -> TraceEstimate:
    """Traces with the moments over random combinations; without any, exact ones."""
    channel = dict(by_column)
    layer = {path: s.reshape(len(s), -1).sum(1) for path, s in channel.items()}
    samples = {"channel": channel, "layer": layer, "total": np.sum(list(layer.values()), axis=0)}
    sums = layout.policy.sums
    reduce: Callable[..., Any] = np.mean if draws else np.sum
    mean = jax.tree.map(lambda s: reduce(s, axis=0), samples)
    squares = jax.tree.map(lambda s, m: ((s - m) ** 2).sum(0) if draws else np.zeros_like(m), samples, mean)
    moments = Moments(*jax.tree.map(lambda m: jnp.asarray(m, sums), (mean, squares)))
    state = exact_state("gauss_newton", layout, key, moments, draws, rejected)
    return estimate_of(layout.like_params, state)
