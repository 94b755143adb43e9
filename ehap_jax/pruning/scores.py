"""Channel scores: how much a network would miss each output channel of each kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax._random_key import random_key
from ehap_jax.graph.channels import channel_structure
from ehap_jax.graph.trace import Graph


@dataclass(frozen=True, eq=False)
class Scores:
    """values: kernel path -> one score per output channel, higher is more important. norms: ‖w_c‖² per channel, which
    breaks ties (the channels that are dead have exactly zero trace). criterion: where the scores come from; provenance:
    more about that (probes, examples), which plans carry with them."""

    values: Mapping[str, np.ndarray]
    norms: Mapping[str, np.ndarray]
    criterion: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, values in self.values.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{path}: {(~np.isfinite(values)).sum()} of {values.size} scores are not finite; look for "
                    "NaN in the weights or the trace."
                )

    @property
    def negative(self) -> int:
        """How many scores are below zero (noise of a trace estimate; they rank lowest, after exact zeros)."""
        return sum(int((values < 0).sum()) for values in self.values.values())


def hessian_scores(graph: Graph, variables, trace) -> Scores:
    """Second-order sensitivity ``S_c = Tr(H_cc) / p_c · ‖w_c‖²`` (HAP, arXiv 2101.08940, eq. 8).

    ``p_c`` is the number of weights of channel c, ``trace`` a TraceEstimate over ``variables`` or over its ``params``
    collection. Estimates are taken as they are: a negative one is noise of the estimator and stays negative, so that
    its channel goes early, right after those that are exactly zero (``Scores.negative`` counts them).

    The estimate knows along which axes of a kernel its channels lie. Those must hold the axis along which the graph
    prunes the kernel; a finer trace, heads × features for heads, is summed. A plain pytree of numbers per channel (the
    estimate's ``sem``, its ``probe_rms()``) is taken to be along the graph's axis, unless another axis has its length.

    Raises KeyError for a kernel without a trace, ValueError for a trace along other axes or of another length, or with
    NaN.
    """
    mean, axes = getattr(trace, "mean", trace), getattr(trace, "axes", {})
    found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(mean)}
    norms, sizes = _kernels(graph, variables)
    values = {}
    for path, norm in norms.items():
        name = path if path in found else path.removeprefix("params/")
        if name not in found:
            raise KeyError(f"the trace has no entry for kernel {path}; it has {', '.join(sorted(found))}.")
        along = _along_axis(graph, path, np.asarray(found[name], np.float64), axes.get(name))
        values[path] = along / sizes[path] * norm
    made = {name: int(getattr(trace, name)) for name in ("count", "rejected") if hasattr(trace, name)}
    return Scores(values, norms, "hessian", made)


def _along_axis(graph: Graph, path: str, trace: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """A kernel's trace along the axis by which the graph prunes it; ``axes`` are the trace's own, if it knows them."""
    shape, axis = graph.leaves[path].shape, channel_structure(graph).kernel_axes[path]
    what = f"{path} of shape {shape} has its output channels along axis {axis}"
    if axes is None:
        if axis != len(shape) - 1 and shape.count(shape[axis]) > 1:
            raise ValueError(f"{what}, but numbers alone do not tell theirs; give the TraceEstimate itself.")
        axes = (axis,)
    if axis not in axes or trace.shape != tuple(shape[a] for a in axes):
        raise ValueError(
            f"{what}, but its trace is of shape {trace.shape} along {axes}; estimate it with graph=graph, "
            f"or with channel_axis={{{path!r}: {axis}}}."
        )
    return trace.sum(tuple(i for i, a in enumerate(axes) if a != axis))


def magnitude_scores(graph: Graph, variables, *, order: int = 2) -> Scores:
    """Mean weight magnitude per channel, ``(Σ|w|^order / p_c)^(1/order)``, order 1 or 2: comparable between layers."""
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    norms, sizes = _kernels(graph, variables)
    sums = norms if order == 2 else _kernels(graph, variables, power=1)[0]
    return Scores({p: (s / sizes[p]) ** (1 / order) for p, s in sums.items()}, norms, f"magnitude l{order}")


def random_scores(graph: Graph, *, key) -> Scores:
    """Independent uniform scores: the baseline every criterion has to beat."""
    axes = channel_structure(graph).kernel_axes
    sizes = [graph.leaves[path].shape[axes[path]] for path in sorted(axes)]
    drawn = np.asarray(jax.random.uniform(random_key(key), (sum(sizes),)), np.float64)
    values = dict(zip(sorted(axes), np.split(drawn, np.cumsum(sizes)[:-1]), strict=True)) if sizes else {}
    return Scores(values, {path: np.zeros_like(v) for path, v in values.items()}, "random")


def norm_scale_scores(graph: Graph, variables, *, scale: str = "*scale") -> Scores:
    """``|γ_c|`` of the normalisation that acts on a channel (network slimming, arXiv 1708.06519).

    ``scale`` is the path pattern of the factors. A kernel takes the mean over the factors that live and die with its
    channel alone, or else (pre-activation networks) with the stream that it writes. Kernels with none get no score:
    leave them out of ``allocate`` with ``exclude``.

    Raises ValueError where no kernel has such a factor.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    norms, _ = _kernels(graph, variables)
    values: dict[str, np.ndarray] = {}
    for coupling in ("union", "group"):
        found = {path: np.full(norm.shape, np.nan) for path, norm in norms.items() if path not in values}
        for group in channel_structure(graph, coupling).groups():
            factors = [
                np.abs(np.asarray(_leaf(leaves, path), np.float64))[list(indices)]
                for (path, axis), indices in group.slices.items()
                if axis == 0 and len(graph.leaves[path].shape) == 1 and fnmatchcase(path, scale)
            ]
            for path, indices in group.producers.items():
                if factors and path in found:
                    found[path][list(indices)] = np.concatenate(factors).mean()
        values.update({path: score for path, score in found.items() if not np.isnan(score).any()})
    if not values:
        raise ValueError(f"no kernel of this network has a factor whose path matches {scale!r}.")
    return Scores(values, norms, "normalisation scale")


def taylor_scores(graph: Graph, variables, loss: Callable, batch) -> Scores:
    """First-order Taylor importance ``(Σ_{w in c} g_w w)²`` (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).

    ``loss(variables, batch)`` is the mean loss, ``g`` its gradient: the squared change of the loss when the channel is
    set to zero, to first order.
    """
    gates = jax.jit(partial(_gate_gradients, graph, loss))(variables, batch)
    values = {path: np.square(np.asarray(gate, np.float64)) for path, gate in gates.items()}
    return Scores(values, _kernels(graph, variables)[0], "taylor")


def fisher_scores(graph: Graph, variables, loss: Callable, batch, *, microbatch: int | None = None) -> Scores:
    """Empirical Fisher information of a gate on every channel, ``½ mean_n (Σ_{w in c} g_{n,w} w)²``.

    One gradient per example n (Theis et al. 2018, arXiv 1801.05787, eq. 7), vmapped over ``microbatch`` examples at a
    time (default: all). ``loss(variables, batch)`` is called with batches of one; all leaves of ``batch`` have the
    example axis first.

    Raises ValueError where the leaves of ``batch`` disagree on the number of examples.
    """
    counts = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
    if len(counts) != 1:
        raise ValueError(f"all leaves of the batch need the same number of examples; got {sorted(counts)}.")
    (count,) = counts
    step = microbatch or count
    if step < 1:
        raise ValueError(f"microbatch must be at least 1, got {microbatch!r}.")

    @jax.jit
    def squares(variables, examples):
        gates = jax.vmap(partial(_gate_gradients, graph, loss), (None, 0))(variables, examples)
        return jax.tree.map(lambda gate: jnp.square(gate.astype(jnp.float32)).sum(0), gates)

    total: dict[str, np.ndarray] = {}
    for start in range(0, count, step):
        examples = jax.tree.map(lambda leaf, a=start: leaf[a : a + step, None], batch)
        for path, value in squares(variables, examples).items():
            total[path] = total.get(path, 0.0) + np.asarray(value, np.float64)
    values = {path: value / (2 * count) for path, value in total.items()}
    return Scores(values, _kernels(graph, variables)[0], "fisher", {"examples": count})


def _gate_gradients(graph: Graph, loss: Callable, variables, batch) -> dict[str, jax.Array]:
    """``Σ_{w in c} g_w w`` per kernel and output channel: the gradient of a factor 1 on the channel's weights."""
    grads = jax.grad(loss, allow_int=True)(variables, batch)
    grads = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    gates = {}
    for path, axis in channel_structure(graph).kernel_axes.items():
        w, g = _leaf(leaves, path), _leaf(grads, path)
        gates[path] = (w * g).sum([i for i in range(w.ndim) if i != axis])
    return gates


def leaves_by_path(variables, graph: Graph) -> dict[str, Any]:
    """The trained variables by the graph's paths. Raises KeyError or ValueError where they are not the graph's."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    found = {path: _leaf(leaves, path) for path in graph.parameters}
    for path, leaf in found.items():
        if np.shape(leaf) != graph.leaves[path].shape:
            raise ValueError(f"{path} has shape {np.shape(leaf)}, the graph {graph.leaves[path].shape}.")
    return found


def _leaf(leaves: Mapping[str, Any], path: str):
    """A variable by the graph's path, in the variables themselves or in their ``params`` collection alone."""
    for name in (path, path.removeprefix("params/")):
        if name in leaves:
            return leaves[name]
    raise KeyError(f"{path} of the graph is not among the variables given.")


def _kernels(graph: Graph, variables, power: int = 2) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Per kernel ``Σ|w_c|^power`` over each output channel, and the number of weights in a channel."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    sums, sizes = {}, {}
    for path, axis in channel_structure(graph).kernel_axes.items():
        leaf = _leaf(leaves, path)
        if np.shape(leaf) != graph.leaves[path].shape:
            raise ValueError(f"{path} has shape {np.shape(leaf)}, the graph {graph.leaves[path].shape}.")
        kernel = np.moveaxis(np.abs(np.asarray(leaf, np.float64)), axis, 0)
        sums[path] = (kernel.reshape(kernel.shape[0], -1) ** power).sum(1)
        sizes[path] = kernel[0].size
    return sums, sizes
