"""Running statistics of normalisation layers estimated again, for networks whose activations have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax.graph.trace import state_leaf

PyTree = Any


def recalibrate(train_apply: Callable, variables: PyTree, batches: Iterable, *, relative_to: PyTree = None) -> PyTree:
    """``variables`` with the running statistics that ``batches`` have, the plain average over batches.

    Pruning, merging and quantisation change what a normalisation layer sees, and so make its statistics wrong: new
    ones repair more than the choice of channels decides (EagleEye, arXiv 2007.02491). No gradient is taken.

    Statistics are found as what ``train_apply(variables, *batch) -> (outputs, updates)`` returns under the path of a
    variable. An update is ``momentum · old + (1 - momentum) · batch's own`` with a momentum of its own per layer, which
    two calls tell apart.

    Args:
      train_apply: the training function, as of ``ehap_jax.models.train_apply``, ``shrink(train_apply, plan)``, a Linen
        model with ``mutable``, NNX through ``nnx.split``, or hand-written.
      variables: to recalibrate.
      batches: inputs of ``train_apply``, each an array or a tuple of its arguments after the variables. Training
        images as in evaluation, a thousand or more in all; batches of one shape share a compilation.
      relative_to: variables of the network as it was trained, of the same shapes (mask, do not shrink). Then statistics
        move by as much as they differ between the two on these batches, so that an unchanged network keeps what it has:
        batches are few beside those of training, and not augmented. What is positive and shrinks does so in
        proportion, ``old · new / before``, and stays positive; all else is ``old + new - before``.

    Raises:
      ValueError: there are no batches; nothing that the function returns is a statistic; an update is not a moving
        average of its old value, or one of 16 bits too slow to be told; a statistic is not finite, or beyond its dtype;
        ``relative_to`` has other paths or shapes.

    >>> def train_apply(v, x):
    ...     return x, {"mean": 0.5 * v["mean"] + 0.5 * x.mean(0)}
    >>> recalibrate(train_apply, {"mean": jnp.zeros(1)}, [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [5.0]])])
    {'mean': Array([3.5], dtype=float32)}
    """
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not batches:
        raise ValueError("there are no batches to estimate statistics from")
    found = _statistics(train_apply, variables, batches)
    if relative_to is not None:
        _require_same_shapes(variables, relative_to)
        found = _moved(variables, relative_to, found, _statistics(train_apply, relative_to, batches))
    _require_finite(found)
    recalibrated = _with(variables, found)
    _require_range(recalibrated, found)
    return recalibrated


def _statistics(train_apply: Callable, variables: PyTree, batches: list[tuple]) -> dict[str, np.ndarray]:
    """The mean over batches of every statistic by path."""
    updates = _updates_of(train_apply)
    shapes = {p: jnp.shape(leaf) for p, leaf in _named(variables).items()}
    probe = jax.eval_shape(updates, variables, *batches[0])
    places = {output: state_leaf(shapes, output, leaf.shape) for output, leaf in _named(probe).items()}
    places = {output: path for output, path in places.items() if path is not None}
    if not places:
        raise ValueError(
            "train_apply returns no new value of any variable: it must return (outputs, updates) with updates such as "
            '{"batch_stats": ...}, under the paths that its variables have'
        )
    dtypes = {path: _named(variables)[path].dtype for path in places.values()}
    rounding = {path: _rounding(_named(probe)[output].dtype) for output, path in places.items()}
    zeros = {path: np.zeros(shapes[path]) for path in places.values()}

    def updated(old: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _read(updates(_with(variables, old), *batches[0]), places)

    without = updated(zeros)
    _require_finite(without)
    momentum: dict[str, np.ndarray] = {path: np.zeros(shapes[path]) for path in without}
    # Several old values where one slope is known to few digits: its roundings differ, and its mean has more of them.
    factors = 2 ** np.linspace(0, 1, 16, endpoint=False) if max(rounding.values()) > 1e-4 else np.ones(1)
    for factor in factors:
        # An old value as large as what it is averaged with: the slope is then exact to a rounding.
        old = {path: _held(factor * (1 + np.abs(value)), dtypes[path]) for path, value in without.items()}
        found = updated(old)
        momentum = {path: momentum[path] + (found[path] - without[path]) / old[path] / len(factors) for path in found}
    for output, path in places.items():
        slope, slack = momentum[path], max(1e-3, 4 * rounding[path])
        if not (slope.size and np.ptp(slope) < slack and -slack < slope.mean() < 1 - 1e-6):
            raise ValueError(
                f"what train_apply returns as {output} is not a moving average of {path}: it does not change by a "
                "constant share of the old value below 1"
            )
        if rounding[path] > 1e-4 and 1 - slope.mean() < slack:
            raise ValueError(
                f"{path}: an average with the momentum {slope.mean():.3g} has no digits left in "
                f"{_named(probe)[output].dtype}; keep the statistics in float32"
            )
    total = {path: np.zeros(shapes[path]) for path in without}
    for batch in batches:
        found = without if batch is batches[0] else _read(updates(_with(variables, zeros), *batch), places)
        total = {path: total[path] + found[path] / (1 - momentum[path].mean()) for path in total}
    return {path: value / len(batches) for path, value in total.items()}


def _rounding(dtype: jnp.dtype) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def _held(values: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """Positive values as an array of ``dtype`` has them, well inside its range."""
    if jnp.issubdtype(dtype, jnp.floating):
        values = np.minimum(values, float(jnp.finfo(dtype).max) / 4)
    return np.asarray(jnp.asarray(values, dtype), np.float64)


def _read(updates: PyTree, places: dict[str, str]) -> dict[str, np.ndarray]:
    """The new values by the path of their variable."""
    found = _named(updates)
    return {path: np.asarray(found[output], np.float64) for output, path in places.items()}


def _require_finite(statistics: dict[str, np.ndarray]) -> None:
    bad = [path for path, value in statistics.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"the statistics {bad[0]} of these batches are not finite")


def _require_range(variables: PyTree, statistics: Mapping[str, np.ndarray]) -> None:
    """Raise where a statistic is beyond the dtype that it is kept in."""
    named = _named(variables)
    for path in statistics:
        if not np.isfinite(np.asarray(named[path], np.float64)).all():
            raise ValueError(
                f"the statistics {path} reach {np.abs(statistics[path]).max():.3g}, beyond {named[path].dtype}; keep "
                "them in float32"
            )


def _updates_of(train_apply: Callable) -> Callable:
    """Compiled, and kept for the next call with the same function where it can be told to be the same."""
    try:
        hash(train_apply)
    except TypeError:
        return _compiled_updates(train_apply)
    return _kept_updates(train_apply)


def _compiled_updates(train_apply: Callable) -> Callable:
    return jax.jit(lambda variables, *batch: train_apply(variables, *batch)[1])


_kept_updates = lru_cache(maxsize=16)(_compiled_updates)


def _with(variables: PyTree, replaced: Mapping[str, np.ndarray]) -> PyTree:
    def one(path, leaf):
        name = path_name(path)
        return jnp.asarray(replaced[name], leaf.dtype) if name in replaced else leaf

    return jax.tree_util.tree_map_with_path(one, variables)


def _named(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _moved(variables, relative_to, after: dict, before: dict) -> dict[str, np.ndarray]:
    """The trained statistics, moved as those of the batches moved."""
    trained = {path: np.asarray(leaf, np.float64) for path, leaf in _named(relative_to).items() if path in after}
    moved = {}
    for path, new in after.items():
        old, base = trained[path], before[path]
        shrinks = (old >= 0) & (new >= 0) & (base > new)
        moved[path] = np.where(shrinks, old * new / np.where(shrinks, base, 1.0), old + new - base)
    return moved


def _require_same_shapes(variables: PyTree, relative_to: PyTree) -> None:
    ours, theirs = ({p: jnp.shape(leaf) for p, leaf in _named(v).items()} for v in (variables, relative_to))
    for path in sorted({*ours, *theirs}):
        if ours.get(path) != theirs.get(path):
            raise ValueError(
                f"relative_to has {theirs.get(path, 'no such variable')} at {path}, variables {ours.get(path)}: mask "
                "the network with mask_variables, recalibrate it, and shrink it then"
            )
