"""Hutchinson's estimate of the Hessian's trace, one number per output channel of every kernel at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ehap_jax._random_key import random_key
from ehap_jax.curvature.control_variate import METHODS, split_curvature
from ehap_jax.curvature.devices import (
    DATA,
    check_mesh,
    divide,
    fetch,
    size_of,
)
from ehap_jax.curvature.estimate import TraceEstimate, TraceState, estimate_of, exact_state
from ehap_jax.curvature.heads import softmax_cross_entropy
from ehap_jax.curvature.hvp import require_same_shapes
from ehap_jax.curvature.memory import choose_product
from ehap_jax.curvature.overflow import where_not_finite
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.probe_loop import (
    Run,
    advance,
    first_state,
    hopeless,
    linearizations,
    not_finite,
    scales_of,
)
from ehap_jax.curvature.problem import Axes, kernels_of, prepare
from ehap_jax.curvature.products import add_products, no_products
from ehap_jax.curvature.saved_trace import TraceFile, fingerprint
from ehap_jax.graph import Graph

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
    graph: Graph | None = None,
    select: Callable[[str, jax.Array], bool] | None = None,
    channel_axis: Axes | Mapping[str, Axes] | None = None,
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
        of both in the policy's dtype (integers as they are), and takes its softmax and its mean in float32 itself.
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
        is bit-identical to that of one uninterrupted call. Loss, weights and batch are not in a state: that they are
        the same is up to you, while ``save_to`` checks them.
      graph: of ``trace_graph(apply)(params, x)``: its kernels are probed, along the axes that it prunes, which is what
        `hessian_scores` asks for whatever layout the kernels are stored in.
      select: ``select(path, leaf)``, whether to probe a leaf; by default the kernels of the graph, without one the
        leaves with two axes or more.
      channel_axis: without a graph, the axis of output channels of every leaf, or ``{path: axis}`` (-1 for paths not in
        it). A tuple of axes gives a number for every index along all of them, heads × features.
      method: ``"hutchinson"``; or with ``model``, ``"control_variate"``: the exact Gauss-Newton traces plus
        Hutchinson's estimate of what is left of the Hessian, from the same probes: unbiased, and as a rule less noisy
        (`variance_reduction` measures it); or ``"auto"``: no probes for the kernels where nothing is left, which the
        graph of the model proves (see `piecewise_linear_kernels`), and the control variate for the others. The exact
        part comes first, and is not computed again where it is in ``save_to``.
      model: ``model(params, x) -> logits``, with batches as for `gauss_newton_trace`.
      head: of the loss: `softmax_cross_entropy`, `squared_error` or ``second_derivative(loss of one example)``.
      until: stop early once ``until(estimate)`` is true, looked at when ``rtol`` is.
      product: ``"linearize"`` keeps the residuals of the gradient and runs only its linear part for every probe;
        ``"jvp"`` differentiates the gradient anew, slower and with less memory; ``"remat"`` also forgets what lies
        between segments of the network and computes it again (see `rematerialized`). ``"auto"`` is the first of them
        that fits into ``memory_budget``; `product_memory` tells which, and what each needs. They round differently.
      memory_budget: bytes per device for ``product="auto"``, half of the free memory by default; and for the exact
        part of the other methods, see `gauss_newton_trace`.
      mesh: devices to share the work: examples are divided over its axis ``"data"``, probes over its axis ``"probe"``.
        The probes are the same ones, and the result is that of one device to rounding (docs/many_devices.md). The
        exact part of the other methods is divided over the devices of one process; of several, each computes all of it.
      save_to: a file for the trace. It is written about every ``save_every`` seconds, between chunks of probes, and at
        the end. If it is there already, it must be of the same arguments (see `fingerprint`), and the run goes on from
        it: a run killed at any moment and repeated gives bit-identical results.
      save_every: seconds between two writes.
      progress: called as ``progress(done, num_probes)`` after every chunk; before that, where the method has an exact
        part, as ``progress(done, examples)`` after every chunk of its examples.

    Returns:
      A `TraceEstimate`.

    Raises:
      TypeError: ``key`` is no random key; the loss does not return one floating-point scalar, or returns it in the
        policy's 16 bits; a selected parameter is an integer.
      ValueError: nothing is selected; the graph is of another network; batch leaves differ in length; NaN or infinity
        in ``params`` or ``batch``, or a kernel or batch that vanishes in 16 bits, named by path; the loss is not
        deterministic, or with ``microbatch`` not a mean over examples; ``state`` is of another key, method, dtype of
        the policy, set of leaves or axes, or has more than ``num_probes`` probes; ``save_to`` is of something else, or
        comes with ``state``; options out of range.
      FileNotFoundError: the folder of ``save_to`` does not exist.
      FloatingPointError: ``Hv`` is not finite, in float16 at the smallest scale or because activations overflow; says
        which of the two, and names the first layer concerned in the order of the network; or the sums overflow.

    >>> import jax, jax.numpy as jnp
    >>> def loss(p, batch):
    ...     return 0.5 * ((batch @ p["kernel"]) ** 2).sum(-1).mean()
    >>> p = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> trace = channel_trace(loss, p, jnp.eye(2), key=jax.random.key(0), num_probes=4)
    >>> trace.mean["kernel"].tolist(), trace.mean["bias"], trace.total()
    ([1.0, 1.0, 1.0], None, 3.0)
    """
    key = random_key(key)
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
    select, channel_axis = kernels_of(graph, params, select, channel_axis)
    options: dict[str, Any] = {"policy": policy, "microbatch": microbatch}
    options |= {"select": select, "channel_axis": channel_axis}
    problem = prepare(loss, params, batch, shards=size_of(mesh, DATA), **options)
    reported = problem.layout
    made_from = None
    if save_to is not None:
        how = {"method": method, "model": model, "head": head}
        made_from = fingerprint(loss, params, batch, key=key, num_probes=num_probes, **how, **options)
    file = TraceFile(save_to, made_from, save_every)
    saved = file.read(params)
    if saved is not None:
        if state is not None:
            raise ValueError(f"both state= and a saved trace, {save_to}: give one of them to go on from")
        state = saved.state
    probed, known = "hutchinson", {}
    if method != "hutchinson":
        loss, left, known, probed = split_curvature(
            loss,
            params,
            batch,
            model=model,
            head=head,
            method=method,
            known=None if saved is None else saved.known,
            memory_budget=memory_budget,
            mesh=mesh,
            progress=progress,
            **options,
        )
        if not left:
            exact = estimate_of(reported.like_params, exact_state(probed, reported, key), known)
            file.save(lambda: exact, last=True)
            return exact
        options |= {"select": lambda path, leaf: path in left, "check_loss": False}
        problem = prepare(loss, params, batch, shards=size_of(mesh, DATA), **options)
    problem = divide(problem, mesh)

    def run_by(product: str) -> Run:
        return Run(loss, problem, product, mesh, probed, reported)

    if state is not None:
        _require_same_run(state, run_by(product), key, num_probes)
        if product == "auto":
            product = state.origin.product or product
    run = run_by(choose_product(product, memory_budget, run_by, key, policy).product)
    now = first_state(run, key, policy) if state is None else run.place(fetch(state))
    now = now._replace(origin=run.origin)

    def estimate(state: TraceState) -> TraceEstimate:
        return estimate_of(reported.like_params, state if mesh is None else fetch(state), known)

    def enough(state: TraceState) -> bool:
        if int(state.count) < MIN_PROBES_TO_STOP or (rtol is None and until is None):
            return False
        found = estimate(state)
        precise = rtol is not None and found.total_sem() <= rtol * abs(found.total())
        return precise or (until is not None and bool(until(found)))

    done = int(now.count)
    linear, linear_scale = [], None
    while done < num_probes and not enough(now):
        if linear_scale != float(now.loss_scale):
            linear, linear_scale = linearizations(run, now), float(now.loss_scale)
        now = advance(run, linear, now, done, min(done + chunk, num_probes))
        count, failed = jax.device_get((now.count, now.failure))
        # Where not one probe came through, what is wrong may be out of reach of the scales.
        if failed.any() or (count == done and hopeless(run)):
            raise not_finite(run, failed, now)
        done = int(count)
        file.save(partial(estimate, now))
        if progress is not None:
            progress(done, num_probes)
    file.save(partial(estimate, now), last=True)
    return estimate(now)


def probe_channel_products(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    v: PyTree,
    batch: PyTree,
    *,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    microbatch: int | None = None,
    graph: Graph | None = None,
    select: Callable[[str, jax.Array], bool] | None = None,
    channel_axis: Axes | Mapping[str, Axes] | None = None,
) -> PyTree:
    """``v_c . (H v)_c`` per output channel for one explicit probe: what `channel_trace` averages.

    The host waits for the result, to see whether it is finite, so this does not work inside `jax.jit`; `hvp` does.

    Args:
      loss, params, batch, policy, microbatch, graph, select, channel_axis: of `channel_trace`.
      v: like ``params``; leaves that are not selected are ignored. The policy casts it to its dtype. The scales
        are the policy's own (1 where it names none): nothing is searched or repeated.

    Returns:
      Like ``params``: ``(channels,)`` in float32 (float64 for that policy), None for leaves not selected.

    Raises:
      FloatingPointError: ``Hv`` is not finite; names the first layer concerned. ValueError and TypeError as
        `channel_trace`.

    >>> import jax.numpy as jnp
    >>> loss = lambda p, batch: (p["kernel"] ** 2).sum() + 0 * batch.sum()
    >>> p, v = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> probe_channel_products(loss, p, v, jnp.zeros(1))["kernel"].tolist()
    [20.0, 40.0]
    """
    select, channel_axis = kernels_of(graph, params, select, channel_axis)
    problem = prepare(
        loss,
        params,
        batch,
        policy=policy,
        select=select,
        channel_axis=channel_axis,
        microbatch=microbatch,
        check_loss=microbatch is not None,
    )
    layout = problem.layout
    require_same_shapes(params, v)
    directions, _ = layout.split(jax.tree.leaves(policy.cast(v)))
    scales = scales_of(policy)
    found = no_products(layout, problem.leaves)
    for examples, weight in zip(problem.chunks, problem.weights, strict=True):
        found = add_products(loss, layout, problem.leaves, directions, examples, weight, scales, found)
    if bool(found.any_bad):
        where = where_not_finite(loss, problem, None, jax.device_get(found.suspects))
        raise FloatingPointError(f"Hv is not finite in {policy.compute}; {where}")
    return layout.like_params(found.channels)


def _require_same_run(state: TraceState, run: Run, key: jax.Array, num_probes: int) -> None:
    """Raise a ValueError that says in what the state differs from those of ``run``."""
    was, now = state.origin, run.origin
    if was.method == "gauss_newton":
        raise ValueError("the state is of an exact trace, to which no probes can be added; start without state=")
    for what, old, new in (("method", was.method, now.method), ("policy", was.compute, now.compute)):
        if old != new:
            raise ValueError(f"the state has another {what}: {old}, and now it is {new}; start without state=")
    expected = {path: x.shape for path, x in no_products(run.problem.layout, run.problem.leaves).channels.items()}
    actual = {path: x.shape for path, x in state.moments.mean["channel"].items()}
    if expected != actual:
        differing = sorted(p for p in {*expected, *actual} if expected.get(p) != actual.get(p))
        raise ValueError(f"the state belongs to other parameters or another selection: {differing} differ")
    if was.axes != now.axes:
        differing = sorted({path for path, _ in {*was.axes} ^ {*now.axes}})
        raise ValueError(f"the state has the channels of {differing} along other axes; start without state=")
    if not np.array_equal(jax.random.key_data(state.key), jax.random.key_data(random_key(key))):
        raise ValueError("the state was started with another key; its next probe would not be the next one")
    if int(state.count) > num_probes:
        raise ValueError(
            f"the state has {int(state.count)} probes already, more than num_probes={num_probes}, the number that the "
            "mean holds in the end; probes cannot be taken out of it"
        )
