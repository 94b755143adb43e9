"""An estimate of traces with its standard errors, and the state from which it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax._random_key import random_key
from ehap_jax.curvature.problem import Layout

__all__ = ["PRODUCTS", "Origin", "TraceEstimate", "TraceState"]

PyTree = Any

PRODUCTS = ("jvp", "linearize", "remat")
"""The ways to a Hessian-vector product."""


class Moments(NamedTuple):
    """Running mean and sum of squared deviations (Welford, 1962) of the same pytree."""

    mean: PyTree
    squares: PyTree


@jax.tree_util.register_static
@dataclass(frozen=True)
class Origin:
    """What the numbers of a state are. It is fixed at compile time: a pytree without leaves.

    Attributes:
      method: ``"hutchinson"``, probes on the Hessian; ``"control_variate"``, probes on what the Gauss-Newton matrix
        leaves of it; ``"gauss_newton"``, the exact traces of that matrix.
      compute: the dtype of the policy.
      axes: the paths of all leaves with a trace, and the axes along which their channels lie.
      product: how products are computed, one of `PRODUCTS`; None where there are none.
    """

    method: str
    compute: str
    axes: tuple[tuple[str, tuple[int, ...]], ...]
    product: str | None = None


class TraceState(NamedTuple):
    """Where an estimate stands, all of it on the device; pass it back to go on.

    Attributes:
      key: the random key; probe i is drawn from ``fold_in(key, i)``.
      count: probes that are in the mean; 0 if it is exact.
      rejected: products that were not finite and were repeated with a lower scale.
      loss_scale, probe_scale: the float16 scales now in use.
      failure: ``(leaves,)``, whose products stayed non-finite at the smallest scale.
      moments: of the traces of one probe: ``{"channel": {path: (channels,)}, "layer": {path: ()}, "total": ()}``.
      origin: of what, and how; going on with ``product="auto"`` keeps to its product.
    """

    key: jax.Array
    count: jax.Array
    rejected: jax.Array
    loss_scale: jax.Array
    probe_scale: jax.Array
    failure: jax.Array
    moments: Moments
    origin: Origin


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "sem", "count", "rejected", "state", "known"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TraceEstimate:
    """Estimated traces of the diagonal Hessian blocks, with their standard errors.

    Attributes:
      mean: like ``params``: ``(channels,)`` for a probed leaf, the estimated trace of the Hessian block of each
        output channel, an axis for each of ``axes``; None for the others. Divide by the weights in a channel for HAP's
        average.
      sem: like ``mean``: the standard error of the mean over probes (ddof = 1; NaN after one probe, 0 where exact).
      count: the number of probes, or of random combinations by `gauss_newton_trace`; 0 if nothing is random.
      rejected: how many float16 products were repeated with a lower scale.
      state: pass it to `channel_trace` to add probes.
      known: ``{path: (channels,)}``, the part of ``mean`` that was computed exactly and added to that of the probes.
    """

    mean: PyTree
    sem: PyTree
    count: int
    rejected: int
    state: TraceState
    known: dict[str, jax.Array] = field(default_factory=dict)

    @property
    def axes(self) -> dict[str, tuple[int, ...]]:
        """``{path: the axes of the leaf along which its channels lie}``, ascending."""
        return dict(self.state.origin.axes)

    def methods(self) -> dict[str, str]:
        """``{path: how its traces were found}``.

        ``"hutchinson"``: from probes. ``"exact"``: proven to be the Gauss-Newton matrix's, which need none.
        ``"control_variate"``: those of the Gauss-Newton matrix, and the rest from probes. ``"gauss_newton"``: by
        `gauss_newton_trace`.
        """
        found = dict.fromkeys(self._probed(), self.state.origin.method)
        return found | {path: "exact" for path in self.known if path not in found}

    def probe_rms(self) -> dict[str, np.ndarray]:
        """``{path: (channels,)}``, the root mean square of a single probe's ``v_c . (H v)_c``; of probed leaves.

        It is not the trace: its square exceeds the trace's by the variance of a probe. But that variance grows with
        the trace and is known after a few probes, when the mean is still noise, so it ranks channels early
        (docs/exact_traces.md).
        """
        moments = jax.device_get(self.state.moments)
        mean, squares = moments.mean["channel"], moments.squares["channel"]
        return {path: np.sqrt(np.square(m) + squares[path] / max(self.count, 1)) for path, m in mean.items()}

    def layer(self) -> dict[str, float]:
        """``{path: estimated trace of the whole kernel's Hessian block}``."""
        return {path: float(np.sum(np.asarray(m, np.float64))) for path, m in self._channels().items()}

    def layer_sem(self) -> dict[str, float]:
        """``{path: standard error of layer()[path]}``; channels of one probe are correlated, and this knows."""
        moments = self.state.moments
        found = {path: float(_sem(s, self.count)) for path, s in jax.device_get(moments.squares["layer"]).items()}
        return found | {path: 0.0 for path in self.known if path not in found}

    def total(self) -> float:
        """The estimated sum of all the traces, added up in float64."""
        return sum(self.layer().values())

    def total_sem(self) -> float:
        """The standard error of ``total()``."""
        return float(_sem(jax.device_get(self.state.moments.squares["total"]), self.count))

    @property
    def product(self) -> str | None:
        """How Hessian-vector products were computed, one of `PRODUCTS`; None where there are none."""
        return self.state.origin.product

    def _probed(self) -> dict[str, Any]:
        return self.state.moments.mean["channel"]

    def _channels(self) -> dict[str, np.ndarray]:
        return jax.device_get(_added(self._probed(), self.known))


def _added(probed: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Both by path, their sum where there are both."""
    both = {path: x + known[path] if path in known else x for path, x in probed.items()}
    return both | {path: x for path, x in known.items() if path not in probed}


def _sem(squares, count: int):
    squares = np.asarray(squares)
    if count == 0:  # exact
        return np.zeros_like(squares)
    return np.sqrt(squares / (count - 1) / count) if count > 1 else np.full_like(squares, np.nan)


def estimate_of(
    like_params: Callable[[dict], PyTree], state: TraceState, known: Mapping[str, jax.Array] | None = None
) -> TraceEstimate:
    """The estimate a state stands for, with what is ``known`` besides.

    ``like_params`` puts ``{path: value}`` into a pytree like ``params``.

    Raises:
      FloatingPointError: a mean or a standard error is beyond the dtype of the sums.
    """
    _require_finite_moments(state.moments)
    count, known = int(state.count), dict(known or {})
    squares = jax.device_get(state.moments.squares["channel"])
    sem = {path: jnp.asarray(_sem(s, count)) for path, s in squares.items()}
    sem |= {path: jnp.zeros_like(x) for path, x in known.items() if path not in squares}
    return TraceEstimate(
        mean=like_params(_added(state.moments.mean["channel"], known)),
        sem=like_params(sem),
        count=count,
        rejected=int(state.rejected),
        state=state,
        known=known,
    )


def _require_finite_moments(moments: Moments) -> None:
    """Raise where sums overflowed: a standard error of infinity is none, and one of NaN nobody would notice."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(moments)):
        if not np.isfinite(leaf).all():
            where = path_name(path)
            raise FloatingPointError(
                f"the sums of the traces overflow {np.asarray(leaf).dtype} ({where}): squares of products beyond 1e19 "
                "do; scale the loss down, and the traces up again, or use Policy('float64')"
            )


def exact_state(
    method: str, layout: Layout, key: jax.Array, moments: Moments | None = None, count: int = 0, rejected: int = 0
) -> TraceState:
    """The state of an estimate that needed no probes; without ``moments``, of nothing but what is known besides."""
    policy = layout.policy
    zero = {"channel": {}, "layer": {}, "total": jnp.zeros((), policy.sums)}
    return TraceState(
        key=random_key(key),
        count=jnp.int32(count),
        rejected=jnp.int32(rejected),
        loss_scale=jnp.ones((), policy.sums),
        probe_scale=jnp.ones((), policy.sums),
        failure=jnp.zeros(0, bool),
        moments=Moments(zero, zero) if moments is None else moments,
        origin=Origin(method, policy.compute, layout.named_axes),
    )
