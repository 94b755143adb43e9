"""Hutchinson's estimate of the Hessian's trace, one number per output channel of every kernel at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax.curvature.control_variate import METHODS, split_curvature
from ehap_jax.curvature.devices import (
    DATA,
    SAME,
    check_mesh,
    divide,
    fetch,
    place,
    same_everywhere,
    size_of,
    wait_for_all,
)
from ehap_jax.curvature.estimate import NO_PRODUCT, PRODUCTS, TraceEstimate, TraceState, estimate_of, no_probes
from ehap_jax.curvature.heads import softmax_cross_entropy
from ehap_jax.curvature.hvp import require_same_shapes
from ehap_jax.curvature.memory import choose_product
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.probe_loop import (
    Run,
    advance,
    first_state,
    linearizations,
    not_finite,
    scales_of,
    typed,
)
from ehap_jax.curvature.probes import is_kernel
from ehap_jax.curvature.problem import Problem, prepare
from ehap_jax.curvature.products import add_products, no_products
from ehap_jax.curvature.saved_trace import fingerprint, load_trace, save_trace

__all__ = ["channel_trace", "probe_channel_products"]

PyTree = Any
DEFAULT_PROBES_PER_STEP = 16
MIN_PROBES_TO_STOP = 16


def channel_trace(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_probes: int,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    probes_per_step: int | None = None,
    microbatch: int | None = None,
    rtol: float | None = None,
    state: TraceState | None = None,
    select: Callable[[str, jax.Array], bool] = is_kernel,
    channel_axis: int | Mapping[str, int] = -1,
    method: str = "hutchinson",
    model: Callable[[PyTree, PyTree], jax.Array] | None = None,
    head: Callable = softmax_cross_entropy,
    until: Callable[[TraceEstimate], bool] | None = None,
    product: str = "auto",
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
    save_to: str | Path | None = None,
    save_every: float = 30.0,
    progress: Callable[[int, int], None] | None = None,
) -> TraceEstimate:
    """Estimate ``Tr(H_cc)`` for every output channel c of every selected leaf (HAP eq. 8; EHAP).

    ``mean_i v_i,c . (H v_i)_c`` over Rademacher probes ``v_i`` on all selected leaves at once (Hutchinson, 1989),
    H the Hessian of the mean loss. It is unbiased. Leaves that are not selected stay constant. Nothing is
    synchronised with the host within a chunk of probes, and the compiled step is kept for the next call with
    the same loss function (the same object: do not pass a fresh lambda each time) and the same shapes.

    Args:
      loss: ``loss(params, batch)`` returning the mean loss of the batch. It is given the floating-point leaves
        of both in the policy's dtype (integers as they are), and takes its softmax in float32 itself.
      params: pytree of arrays; may hold constants such as running statistics beside the weights.
      batch: pytree of arrays with a common first axis of examples; or `Batches`, several of them.
      key: probe i is drawn from ``jax.random.fold_in(key, i)``: the same for every policy and chunking.
      num_probes: how many probes the mean holds in the end, those in ``state`` included.
      policy: the numerical precision.
      probes_per_step: probes between two looks at the result by the host (progress, ``rtol``, ``until``); 16 by
        default.
      microbatch: differentiate at most this many examples at a time on a device; chunks are weighted by their number
        of examples, so an uneven last one is exact.
      rtol: stop early once the standard error of the total trace is at most ``rtol * |total|``, looked at after
        every chunk once there are 16 probes.
      state: ``TraceEstimate.state`` of an earlier call with the same arguments, to add probes to it. The result
        is bit-identical to that of one uninterrupted call.
      select: ``select(path, leaf)``, whether to probe a leaf; by default those with two axes or more.
      channel_axis: the axis of output channels of every leaf, or ``{path: axis}`` (-1 for paths not in it).
      method: ``"hutchinson"``; or with ``model``, ``"control_variate"``: the exact Gauss-Newton traces plus
        Hutchinson's estimate of what is left of the Hessian, from the same probes: unbiased, and as a rule less noisy
        (`variance_reduction` measures it); or ``"auto"``: no probes for the kernels where nothing is left, which the
        graph of the model proves (see `piecewise_linear_kernels`), and the control variate for the others.
      model: ``model(params, x) -> logits``, with batches as for `gauss_newton_trace`.
      head: of the loss: `softmax_cross_entropy`, `squared_error` or ``second_derivative(loss of one example)``.
      until: stop early once ``until(estimate)`` is true, looked at when ``rtol`` is.
      product: ``"linearize"`` keeps the residuals of the gradient and runs only its linear part for every probe;
        ``"jvp"`` differentiates the gradient anew, slower and with less memory; ``"remat"`` also forgets what lies
        between segments of the network and computes it again (see `rematerialized`). ``"auto"`` is the first of them
        that fits into ``memory_budget``; `product_memory` tells which, and what each needs. They round differently.
      memory_budget: bytes per device for ``"auto"``; half of the free memory by default.
      mesh: devices to share the work: examples are divided over its axis ``"data"``, probes over its axis ``"probe"``.
        The probes are the same ones, and the result is that of one device to rounding (docs/many_devices.md).
      save_to: a file for the state. It is written about every ``save_every`` seconds, between chunks, and at the
        end. If it is there already, it must be of the same arguments (see `fingerprint`), and the run goes on from
        it: a run killed at any moment and repeated gives bit-identical results.
      save_every: seconds between two writes.
      progress: called as ``progress(done, num_probes)`` after every chunk.

    Returns:
      A `TraceEstimate`.

    Raises:
      TypeError: the loss does not return one floating-point scalar; a selected parameter is an integer.
      ValueError: nothing is selected; batch leaves differ in length; NaN or infinity in ``params`` or ``batch``,
        named by path; the loss is not deterministic, or with ``microbatch`` not a mean over examples; ``state``
        is of another key, policy or set of leaves; ``save_to`` is of something else, or comes with ``state``;
        options out of range.
      FileNotFoundError: the folder of ``save_to`` does not exist.
      FloatingPointError: ``Hv`` is not finite, in float16 at the smallest scale; names the first such leaf.

    >>> import jax, jax.numpy as jnp
    >>> def loss(p, batch):
    ...     return 0.5 * ((batch @ p["kernel"]) ** 2).sum(-1).mean()
    >>> p = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> trace = channel_trace(loss, p, jnp.eye(2), key=jax.random.key(0), num_probes=4)
    >>> trace.mean["kernel"].tolist(), trace.mean["bias"], trace.total()
    ([1.0, 1.0, 1.0], None, 3.0)
    """
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1; got {num_probes}")
    chunk = DEFAULT_PROBES_PER_STEP if probes_per_step is None else probes_per_step
    if chunk < 1:
        raise ValueError(f"probes_per_step must be at least 1; got {probes_per_step}")
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol must be positive; got {rtol}")
    if save_to is not None and not Path(save_to).absolute().parent.is_dir():
        raise FileNotFoundError(f"save_to: the folder {Path(save_to).absolute().parent} does not exist")
    check_mesh(mesh)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    options: dict[str, Any] = {"policy": policy, "channel_axis": channel_axis, "microbatch": microbatch}
    problem = prepare(loss, params, batch, select=select, shards=size_of(mesh, DATA), **options)
    like_params, known = problem.layout.like_params, {}
    if method != "hutchinson":
        loss, select, known = split_curvature(
            loss, params, batch, model=model, head=head, method=method, select=select, **options
        )
        if not any(select(path, problem.leaves[0]) for path in problem.layout.paths):
            return estimate_of(like_params, no_probes(typed(key), policy.sums), known)
        problem = prepare(loss, params, batch, select=select, shards=size_of(mesh, DATA), check_loss=False, **options)
    problem = divide(problem, mesh)
    made_from = None
    if save_to is not None:
        made_from = fingerprint(
            loss,
            params,
            batch,
            key=key,
            num_probes=num_probes,
            select=select,
            **options,
        )
        if same_everywhere(Path(save_to).exists(), f"whether {save_to} exists"):
            if state is not None:
                raise ValueError(f"both state= and a saved trace, {save_to}: give one of them to go on from")
            state = load_trace(save_to, params, made_from).state
    if state is not None:
        _require_same_run(state, problem, key)
        if product == "auto":
            product = PRODUCTS[int(state.product)]
    product = choose_product(product, memory_budget, lambda way: Run(loss, problem, way, mesh), key, policy).product
    run = Run(loss, problem, product, mesh)
    now: TraceState = first_state(run, key, policy) if state is None else place(mesh, fetch(state), SAME)

    def estimate(state: TraceState) -> TraceEstimate:
        return estimate_of(like_params, state if mesh is None else fetch(state), known)

    def enough(state: TraceState) -> bool:
        if int(state.count) < MIN_PROBES_TO_STOP or (rtol is None and until is None):
            return False
        found = estimate(state)
        precise = rtol is not None and found.total_sem() <= rtol * abs(found.total())
        return precise or (until is not None and bool(until(found)))

    def save(state: TraceState) -> None:
        if made_from is not None and save_to is not None and jax.process_index() == 0:
            save_trace(save_to, estimate(state), made_from)

    done, saved_at = int(now.count), time.monotonic()
    linear, linear_scale = [], None
    while done < num_probes and not enough(now):
        if linear_scale != float(now.loss_scale):
            linear, linear_scale = linearizations(run, now), float(now.loss_scale)
        now = advance(run, linear, now, done, min(done + chunk, num_probes))
        done, failure = (int(x) for x in jax.device_get((now.count, now.failure)))
        if failure >= 0:
            raise not_finite(problem.layout, failure, now)
        if time.monotonic() - saved_at >= save_every:
            save(now)
            saved_at = time.monotonic()
        if progress is not None:
            progress(done, num_probes)
    save(now)
    if save_to is not None:
        wait_for_all(f"{save_to} is written")
    return estimate(now)


def probe_channel_products(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    v: PyTree,
    batch: PyTree,
    *,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    microbatch: int | None = None,
    select: Callable[[str, jax.Array], bool] = is_kernel,
    channel_axis: int | Mapping[str, int] = -1,
) -> PyTree:
    """``v_c . (H v)_c`` per output channel for one explicit probe: what `channel_trace` averages.

    Args:
      v: like ``params``; leaves that are not selected are ignored. The policy casts it to its dtype. The scales
        are the policy's own (1 where it names none): nothing is searched or repeated.

    Returns:
      Like ``params``: ``(channels,)`` in float32 (float64 for that policy), None for leaves not selected.

    Raises:
      FloatingPointError: ``Hv`` is not finite. ValueError and TypeError as `channel_trace`.

    >>> import jax.numpy as jnp
    >>> loss = lambda p, batch: (p["kernel"] ** 2).sum() + 0 * batch.sum()
    >>> p, v = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> probe_channel_products(loss, p, v, jnp.zeros(1))["kernel"].tolist()
    [20.0, 40.0]
    """
    problem = prepare(
        loss,
        params,
        batch,
        policy=policy,
        select=select,
        channel_axis=channel_axis,
        microbatch=microbatch,
        check_loss=False,
    )
    layout = problem.layout
    require_same_shapes(params, v)
    directions, _ = layout.split(jax.tree.leaves(policy.cast(v)))
    scales = scales_of(policy)
    found = no_products(layout, problem.leaves)
    for examples, weight in zip(problem.chunks, problem.weights, strict=True):
        found = add_products(loss, layout, problem.leaves, directions, examples, weight, scales, found)
    if bool(found.any_bad):
        leaf = layout.paths[int(jnp.argmax(found.leaf_bad))]
        raise FloatingPointError(f"Hv is not finite at {leaf!r} in {policy.compute}")
    return layout.like_params(found.channels)


def _require_same_run(state: TraceState, problem: Problem, key: jax.Array) -> None:
    if int(state.product) == NO_PRODUCT:
        raise ValueError("the state is of an exact trace, to which no probes can be added; start without state=")
    expected = {path: x.shape for path, x in no_products(problem.layout, problem.leaves).channels.items()}
    actual = {path: x.shape for path, x in state.moments.mean["channel"].items()}
    if expected != actual:
        differing = sorted(p for p in {*expected, *actual} if expected.get(p) != actual.get(p))
        raise ValueError(f"the state belongs to other parameters or another selection: {differing} differ")
    if not np.array_equal(jax.random.key_data(state.key), jax.random.key_data(typed(key))):
        raise ValueError("the state was started with another key; its next probe would not be the next one")
    if state.moments.mean["total"].dtype != jnp.dtype(problem.layout.policy.sums):
        raise ValueError(f"the state's sums are not in {problem.layout.policy.sums}: it has another policy")
