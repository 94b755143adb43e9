"""Which way to compute products, from the memory that the compiler says it needs and the memory there is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ehap_jax.curvature.devices import DATA, check_mesh, divide, size_of
from ehap_jax.curvature.estimate import TraceState
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.probe_loop import (
    Run,
    add_chunk,
    add_linear_chunk,
    begin,
    blank_state,
    linearize_chunk,
    on_device_loop,
)
from ehap_jax.curvature.problem import Axes, kernels_of, prepare
from ehap_jax.graph import Graph

__all__ = ["ProductMemory", "choose_product", "free_memory", "product_memory"]

PyTree = Any
SHARE_OF_FREE_MEMORY = 0.5

FASTEST_FIRST = ("linearize", "jvp", "remat")


class ProductMemory(NamedTuple):
    """Which way products are computed, and what the ways that were considered need.

    Attributes:
      product: the way: ``"linearize"``, ``"jvp"`` or ``"remat"``.
      needs: bytes per device of every way that was considered, parameters and batch included: the fastest first, up to
        the first that fits. Empty where the way was given.
      budget: the bytes there were to choose by; None where the way was given.
      source: ``"compiler"``, or ``"estimate"`` where the backend reports no memory: from the sizes of the residuals.
    """

    product: str
    needs: dict[str, int]
    budget: int | None
    source: str


def product_memory(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    microbatch: int | None = None,
    graph: Graph | None = None,
    select: Callable[[str, jax.Array], bool] | None = None,
    channel_axis: Axes | Mapping[str, Axes] | None = None,
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
) -> ProductMemory:
    """How `channel_trace` called with the same arguments computes its products, and the bytes that decide it.

    What is compiled here is what `channel_trace` runs: a call after this one compiles nothing again.

    Args:
      loss, params, batch, policy, microbatch, graph, select, channel_axis, mesh: of `channel_trace` by probes alone.
      memory_budget: bytes per device; half of the free memory by default.

    Returns:
      A `ProductMemory`.

    Raises:
      ValueError: nothing fits into ``memory_budget``; the rest as `channel_trace`.

    >>> import jax.numpy as jnp
    >>> def loss(p, x):
    ...     return (jnp.tanh(x @ p["kernel"]) ** 2).sum(1).mean()
    >>> found = product_memory(loss, {"kernel": jnp.ones((4, 4))}, jnp.ones((8, 4)), memory_budget=10**6)
    >>> found.product, list(found.needs)
    ('linearize', ['linearize'])
    """
    check_mesh(mesh)
    select, channel_axis = kernels_of(graph, params, select, channel_axis)
    problem = prepare(
        loss,
        params,
        batch,
        policy=policy,
        select=select,
        channel_axis=channel_axis,
        microbatch=microbatch,
        shards=size_of(mesh, DATA),
    )
    problem = divide(problem, mesh)
    return choose_product("auto", memory_budget, lambda way: Run(loss, problem, way, mesh), jax.random.key(0), policy)


def choose_product(
    product: str, memory_budget: int | None, run_of: Callable[[str], Run], key: jax.Array, policy: Policy
) -> ProductMemory:
    """The way that was asked for; for ``"auto"`` the fastest that fits into ``memory_budget`` bytes per device.

    By default the budget is half of what is free, and where nothing fits into that, the way that needs least is taken.

    Raises:
      ValueError: an unknown way; a budget that is not positive; nothing fits into the budget that was given.
    """
    if product not in ("auto", *FASTEST_FIRST):
        raise ValueError(f"product must be one of auto, {', '.join(FASTEST_FIRST)}; got {product!r}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget is a positive number of bytes; got {memory_budget}")
    if product != "auto":
        return ProductMemory(product, {}, None, "compiler")
    device = run_of("jvp").problem.leaves[0].addressable_shards[0].device
    budget = int(SHARE_OF_FREE_MEMORY * free_memory(device)) if memory_budget is None else memory_budget
    needs, source = {}, "compiler"
    for way in FASTEST_FIRST:
        run = run_of(way)
        needs[way], source = needed_bytes(run, blank_state(run, key, policy))
        if needs[way] <= budget:
            return ProductMemory(way, needs, budget, source)
    least = min(needs, key=lambda way: needs[way])
    if memory_budget is not None:
        raise ValueError(
            f"nothing fits into memory_budget={memory_budget}: {least!r} needs least, {needs[least]} bytes by the "
            f"{source}. Give more, or a smaller microbatch="
        )
    return ProductMemory(least, needs, budget, source)


def needed_bytes(run: Run, state: TraceState) -> tuple[int, str]:
    """Bytes on a device at the peak of a probe, and whether the compiler says so or an estimate."""
    needed = _loop_bytes(run, state) if run.on_device else _step_bytes(run, state)
    return (_estimated_bytes(run, state), "estimate") if needed is None else (needed, "compiler")


def _loop_bytes(run: Run, state: TraceState) -> int | None:
    layout, leaves, chunks, weights = run.problem
    arguments = (leaves, chunks, weights, state, state.count)
    stats = _stats(on_device_loop.lower(run.loss, layout, run.mesh, run.linear, *arguments))
    return stats and stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes


def _step_bytes(run: Run, state: TraceState) -> int | None:
    """What lies there all the time, and the most that one of the programs adds to it."""
    layout, leaves, chunks, weights = run.problem
    v, found = begin(layout, run.mesh, leaves, state)
    scales = (state.loss_scale, state.probe_scale)
    working: dict[tuple, int] = {}
    lines: dict[tuple, int] = {}
    shapes = [tuple(x.shape for x in jax.tree.leaves(chunk)) for chunk in chunks]
    for shape, chunk, weight in zip(shapes, chunks, weights, strict=True):
        if shape in working:
            continue
        if run.linear:
            arguments = (run.loss, layout, run.mesh, leaves, chunk, state.loss_scale)
            first = linearize_chunk.lower(*arguments)
            line = jax.eval_shape(linearize_chunk, *arguments)
            if leaves[0].committed:  # else a description with a sharding would be compiled for apart
                line = jax.tree.map(lambda x, s: x.update(sharding=s), line, first.compile().output_shardings)
            lines[shape] = _bytes(line)
            programs = [(first, 0), (add_linear_chunk.lower(layout, run.mesh, line, v, weight, scales, found), 1)]
        else:
            programs = [(add_chunk.lower(run.loss, layout, run.mesh, leaves, v, chunk, weight, scales, found), 1)]
        for program, writes in programs:
            stats = _stats(program)
            if stats is None:
                return None
            added = stats.temp_size_in_bytes + writes * stats.output_size_in_bytes
            working[shape] = max(working.get(shape, 0), added)
    resident = _bytes((leaves, chunks, v, found)) + sum(lines.get(shape, 0) for shape in shapes)
    return resident + max(working.values())


def _estimated_bytes(run: Run, state: TraceState) -> int:
    """An upper bound from the residuals of every chunk: kept, or made with their derivatives for one chunk at a time.

    While they are made, all that JAX keeps counts, and rematerialisation is given no credit.
    """
    layout, leaves, chunks, _ = run.problem
    devices = 1 if run.mesh is None else run.mesh.size
    kept, made = [], []
    for chunk in chunks:
        line = jax.eval_shape(linearize_chunk, run.given, layout, run.mesh, leaves, chunk, state.loss_scale)
        kept.append(_size(jax.tree.leaves(line)) // devices)
        made.append(_size(line.kept.rest.outputs))
    return _bytes((leaves, chunks)) + (sum(kept) if run.linear else max(made)) + max(made)


def _size(arrays: Iterable[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _stats(lowered: Any) -> Any:
    """What the compiler says about memory, or None."""
    try:
        return lowered.compile().memory_analysis()
    except NotImplementedError:
        return None


def _bytes(tree: PyTree) -> int:
    """Of all arrays, what lies on one device."""
    leaves = jax.tree.leaves(tree)
    shapes = [x.sharding.shard_shape(x.shape) if x.sharding else x.shape for x in leaves]
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))


def free_memory(device: Any) -> int:
    """Bytes that are free on an accelerator, or in this machine or container for the CPU."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)
