"""Exact channel traces of the Gauss-Newton matrix, which is the Hessian where the network is piecewise linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax._random_key import random_key
from ehap_jax.curvature.chunk_memory import bytes_of_traces
from ehap_jax.curvature.estimate import Moments, TraceEstimate, estimate_of, exact_state
from ehap_jax.curvature.example_columns import (
    Columns,
    add_up,
    columns_of,
    count_draws,
    first_scale,
    head_roots,
    on_cpu,
    read_examples,
)
from ehap_jax.curvature.heads import Head, softmax_cross_entropy, square_shares, weighted
from ehap_jax.curvature.partial_sums import PartialSums, SumsFile
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.problem import Axes, Layout, kernels_of, layout_of
from ehap_jax.curvature.saved_trace import fingerprint
from ehap_jax.curvature.tapped_model import require_proven, tapped_model
from ehap_jax.curvature.taps import Site, Taps
from ehap_jax.graph import Graph

__all__ = ["gauss_newton_trace"]

PyTree = Any


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
        and ``classes`` is not ``"all"``; NaN or infinity in ``params`` or ``batch``, or a kernel or batch that vanishes
        in 16 bits, named by path; nothing is selected; the graph is of another network; leaves of the batch differ in
        length; ``memory_budget`` is too small; ``save_to`` is of something else; options out of range.
      TypeError: the model does not return one floating-point array; a selected parameter is an integer.
      FileNotFoundError: the folder of ``save_to`` does not exist.
      FloatingPointError: a trace is not finite, in float16 at the smallest scale; names the first such leaf.

    >>> model = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> p = {"a": jnp.eye(3), "b": jnp.ones((3, 2))}
    >>> trace = gauss_newton_trace(model, p, jnp.array([[1.0, -1.0, 2.0]]))
    >>> trace.mean["b"].tolist()
    [1.25, 1.25]
    """
    key = None if key is None else random_key(key)
    if on_unproven not in ("error", "gauss_newton"):
        raise ValueError(f'on_unproven must be "error" or "gauss_newton"; got {on_unproven!r}')
    draws = count_draws(classes, draw, key, head)
    select, channel_axis = kernels_of(graph, params, select, channel_axis)
    layout = layout_of(params, policy, select, channel_axis)
    examples = read_examples(params, batch, policy, mesh, head)
    taps, leaves = tapped_model(model, examples.params, examples.x, layout.paths), jax.tree.leaves(examples.params)
    if on_unproven == "error":
        require_proven(taps)
    shares = square_shares(head, batch, math.prod(taps.logits_shape), policy.sums)
    columns = columns_of(examples, taps.logits_shape, policy, draws, draw, gradient=False)
    plan = _Plan(taps, layout, columns)
    key = jax.random.key(0) if key is None else key
    made_from = None
    if save_to is not None:
        settings: dict[str, Any] = {"policy": policy, "select": select, "channel_axis": channel_axis}
        roots = fingerprint(partial(head_roots, model, head, policy), params, batch, key=key, **settings)
        made_from = replace(roots, probes=f"exact {draws} {draw}" if draws else "exact all")
    sums = PartialSums(
        {
            path: (columns.count, *(leaves[place].shape[axis] for axis in axes))
            for path, place, axes in zip(layout.paths, layout.places, layout.axes, strict=True)
        },
        first_scale(policy),
    )

    def add(_: range, start: int, squares: Mapping[str, np.ndarray]) -> None:
        for path, found in squares.items():
            sums.add(path, start, found)

    add_up(
        model,
        partial(_chunk_function(leaves), plan),
        add,
        examples,
        columns,
        sums,
        shares=shares,
        what="the trace",
        each=bytes_of_traces(taps, columns.together, columns.formed, policy),
        key=key,
        policy=policy,
        microbatch=microbatch,
        memory_budget=memory_budget,
        mesh=mesh,
        file=SumsFile(save_to, made_from, save_every),
        progress=progress,
    )
    return _estimate(layout, sums.by_path, draws, sums.rejected, key)


@dataclass(frozen=True)
class _Plan:
    """Everything that is fixed at compile time."""

    taps: Taps
    layout: Layout
    columns: Columns


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
            found[path] = jnp.zeros((plan.columns.together, *sizes), layout.policy.sums)
    return found, logits


_whole_chunk = jax.jit(_chunk, static_argnames="plan")


def _chunk_function(leaves) -> Callable:
    """How a chunk is computed: by several compiled functions on CPU (see `_chunk`), by one elsewhere."""
    return _chunk if on_cpu(leaves) else _whole_chunk


@partial(jax.jit, static_argnames="plan")
def _passes(plan: _Plan, leaves, x, targets, examples, weights, key, start, scale):
    """One pass forward and one backward of all columns.

    Returns the logits, what every site reads, the cotangents of what it writes, the gradients of untapped kernels, and
    with what each squared gradient counts, (columns, n).
    """
    inputs = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[:, None], x))
    logits, read, pull = plan.taps.backward(leaves, inputs)
    columns, signs, unscale = plan.columns.scaled(logits, targets, examples, key, start, scale)
    deltas, own = pull(columns)
    return logits, read, deltas, own, signs * unscale * unscale * weights[None, :]


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
