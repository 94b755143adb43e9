"""Channel scores: how much a network would miss each output channel of each kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from ehap_jax.graph.channels import channel_structure
from ehap_jax.graph.trace import Graph, path_name


@dataclass(frozen=True, eq=False)
class Scores:
    """values: kernel path -> one score per output channel, higher is more important. norms: ‖w_c‖² per channel, which
    breaks ties (the channels that are dead have exactly zero trace). criterion: where the scores come from."""

    values: Mapping[str, np.ndarray]
    norms: Mapping[str, np.ndarray]
    criterion: str

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

    ``p_c`` is the number of weights of channel c, ``trace`` a TraceEstimate (or its mean) over ``variables`` or over
    its ``params`` collection. Estimates are taken as they are: a negative one is noise of the estimator and stays
    negative, so that its channel goes early, right after those that are exactly zero (``Scores.negative`` counts them).

    Raises KeyError for a kernel without a trace, ValueError for a trace of another length or with NaN.
    """
    mean = getattr(trace, "mean", trace)
    found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(mean)}
    norms, sizes = _kernels(graph, variables)
    values = {}
    for path, norm in norms.items():
        leaf = found.get(path, found.get(path.removeprefix("params/")))
        if leaf is None:
            raise KeyError(f"the trace has no entry for kernel {path}; it has {', '.join(sorted(found))}.")
        channel_trace = np.asarray(leaf, np.float64)
        if channel_trace.shape != norm.shape:
            raise ValueError(
                f"{path} has {norm.shape[0]} output channels, but its trace has shape {channel_trace.shape}."
            )
        values[path] = channel_trace / sizes[path] * norm
    return Scores(values, norms, "hessian")


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
    drawn = np.asarray(jax.random.uniform(key, (sum(sizes),)), np.float64)
    values = dict(zip(sorted(axes), np.split(drawn, np.cumsum(sizes)[:-1]), strict=True)) if sizes else {}
    return Scores(values, {path: np.zeros_like(v) for path, v in values.items()}, "random")


def _kernels(graph: Graph, variables, power: int = 2) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Per kernel ``Σ|w_c|^power`` over each output channel, and the number of weights in a channel."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    sums, sizes = {}, {}
    for path, axis in channel_structure(graph).kernel_axes.items():
        if path not in leaves:
            raise KeyError(f"kernel {path} of the graph is not among the variables given.")
        kernel = np.moveaxis(np.abs(np.asarray(leaves[path], np.float64)), axis, 0)
        if kernel.shape[0] != graph.leaves[path].shape[axis]:
            raise ValueError(f"{path} has shape {np.shape(leaves[path])}, the graph {graph.leaves[path].shape}.")
        sums[path] = (kernel.reshape(kernel.shape[0], -1) ** power).sum(1)
        sizes[path] = kernel[0].size
    return sums, sizes
