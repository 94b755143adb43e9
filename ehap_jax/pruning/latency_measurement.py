"""Measure layers on the present device, at several widths, and keep the numbers in a file."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._compat import bind
from ehap_jax._untrusted_files import read_json
from ehap_jax._whole_files import write_json
from ehap_jax.graph.trace import Graph
from ehap_jax.pruning.latency import LatencyTable, TimedLayer, WidthGrid, grid_widths, layers_of

FORMAT = "ehap_jax.latency"


def measure_latency(
    graph: Graph,
    *,
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
    repeats: int = 10,
    cache: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Time every different layer of ``graph`` at ``fractions`` of its input and output channels, on this device.

    A layer is timed as networks have it, with a factor and an offset per output channel and a ReLU, compiled, for the
    input shape the graph was traced with: the least of ``repeats`` runs, in seconds. Layers of the same shape are
    measured once. ``cache`` is a JSON file that keeps the measurements by device and versions; what it has is not
    measured again. ``progress(done, all)`` is called before every layer that is measured.

    Raises ValueError for fractions out of (0, 1] or a cache that is another file.

    >>> from ehap_jax.graph import trace_graph
    >>> graph = trace_graph(lambda w, x: x @ w)(jnp.ones((4, 8)), jnp.ones((2, 4)))
    >>> table = measure_latency(graph, fractions=(0.5, 1.0), repeats=1)
    >>> [(grid.inputs, grid.outputs) for grid in table.layers.values()]
    [((2, 4), (4, 8))]
    """
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise ValueError(f"fractions must be in (0, 1], got {fractions!r}.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats!r}.")
    device = device_name()
    document = _read(cache)
    try:
        known = {name: _grid(entry) for name, entry in document["devices"].get(device, {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{cache} has no table of widths and seconds for {device}; remove it") from error
    layers = {layer.signature: layer for layer in layers_of(graph)}
    wanted = {name: grid_widths(layer, fractions) for name, layer in layers.items()}
    missing = [n for n in layers if n not in known or (known[n].inputs, known[n].outputs) != wanted[n]]
    for done, name in enumerate(missing):
        if progress is not None:
            progress(done, len(missing))
        known[name] = _measure(layers[name], *wanted[name], repeats)
        document["devices"].setdefault(device, {})[name] = known[name]._asdict()
        if cache is not None:
            write_json(cache, document)
    return LatencyTable(device, {name: known[name] for name in layers})


def device_name() -> str:
    """The accelerator or processor, the number of cores, and the versions that decide about compiled code."""
    device = jax.devices()[0]
    kind, cores = device.device_kind, ""
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        names = (
            [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x]
            if info.exists()
            else []
        )
        kind, cores = names[0] if names else platform.machine(), f", {len(os.sched_getaffinity(0))} cores"
    return f"{kind}{cores}, jax {jax.__version__}"


def _measure(layer: TimedLayer, inputs: tuple[int, ...], outputs: tuple[int, ...], repeats: int) -> WidthGrid:
    if layer.axes is None:
        full = _time(layer, [v.shape for v in layer.node.inputs], repeats)
        return WidthGrid(inputs, outputs, ((0.0, full),))
    rows = [[_time(layer, layer.shapes(i, o), repeats) for o in outputs] for i in inputs]
    return WidthGrid(inputs, outputs, tuple(map(tuple, rows)))


def _time(layer: TimedLayer, shapes: list[tuple[int, ...]], repeats: int) -> float:
    """Seconds of one call: the least of several."""
    params = layer.node.params
    along = params["dimension_numbers"].out_spec[1] if "rhs_dilation" in params else -1

    @jax.jit
    def run(operands, scale):
        (y,) = bind(layer.node.primitive, operands, params)
        width = [1] * y.ndim
        width[along] = y.shape[along]
        factor = jax.lax.broadcast(scale, (y.shape[along],)).reshape(width).astype(y.dtype)
        return jnp.maximum(y * factor + factor, jnp.zeros((), y.dtype))

    rng = np.random.default_rng(0)
    operands = [
        jnp.asarray(rng.normal(size=shape), operand.dtype)
        for shape, operand in zip(shapes, layer.node.inputs, strict=True)
    ]
    scale = jnp.ones((), jnp.float32)
    jax.block_until_ready(run(operands, scale))
    once = _seconds(run, operands, scale, 1)
    calls = max(1, min(100, round(2e-3 / max(once, 1e-7))))
    return min(_seconds(run, operands, scale, calls) for _ in range(repeats))


def _seconds(run, operands, scale, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        y = run(operands, scale)
    jax.block_until_ready(y)
    return (time.perf_counter() - start) / calls


def _grid(entry) -> WidthGrid:
    seconds = np.array(entry["seconds"], np.float64)
    grid = WidthGrid(tuple(map(int, entry["inputs"])), tuple(map(int, entry["outputs"])), tuple(map(tuple, seconds)))
    if seconds.shape != (len(grid.inputs), len(grid.outputs)) or not (seconds >= 0).all():
        raise ValueError(f"{seconds} are no times of {grid.inputs} by {grid.outputs} channels")
    return grid


def _read(cache) -> dict:
    if cache is None or not Path(cache).exists():
        return {"format": FORMAT, "devices": {}}
    document = read_json(cache)
    if document.get("format") != FORMAT:
        raise ValueError(f'{cache} is not a latency table: "format" is not {FORMAT!r}.')
    return document
