"""Hutchinson's estimate of the Hessian's trace, one number per output channel of every kernel at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.curvature.estimate import Moments, TraceEstimate, TraceState, estimate_of
from ehap_jax.curvature.hvp import require_same_shapes
from ehap_jax.curvature.memory import choose_method
from ehap_jax.curvature.precision import LARGEST_LOSS_SCALE, SMALLEST_SCALE, Policy
from ehap_jax.curvature.probes import is_kernel, rademacher
from ehap_jax.curvature.problem import Layout, Problem, prepare
from ehap_jax.curvature.products import (
    Linearization,
    Products,
    add_linear_products,
    add_products,
    linearize,
    no_products,
)
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
    until: Callable[[TraceEstimate], bool] | None = None,
    method: str = "auto",
    memory_budget: int | None = None,
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
      microbatch: differentiate at most this many examples at a time; chunks are weighted by their number of
        examples, so an uneven last one is exact.
      rtol: stop early once the standard error of the total trace is at most ``rtol * |total|``, looked at after
        every chunk once there are 16 probes.
      state: ``TraceEstimate.state`` of an earlier call with the same arguments, to add probes to it. The result
        is bit-identical to that of one uninterrupted call.
      select: ``select(path, leaf)``, whether to probe a leaf; by default those with two axes or more.
      channel_axis: the axis of output channels of every leaf, or ``{path: axis}`` (-1 for paths not in it).
      until: stop early once ``until(estimate)`` is true, looked at when ``rtol`` is.
      method: ``"linearize"`` keeps the residuals of the gradient and runs only its linear part for every probe;
        ``"jvp"`` differentiates the gradient anew, slower and with less memory; ``"auto"`` linearises where the
        residuals fit into ``memory_budget``. The two round differently.
      memory_budget: bytes for ``"auto"``; half of the free memory by default.
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
    problem = prepare(
        loss, params, batch, policy=policy, select=select, channel_axis=channel_axis, microbatch=microbatch
    )
    on_device = _loops_on_device(problem)
    if on_device and len(problem.chunks) > 1:
        # The chunks are scanned over there, and the residuals of all of them would have to be stacked.
        if method == "linearize":
            raise ValueError('method="linearize" does not go with microbatch= on an accelerator; use "jvp"')
        method = "jvp" if method == "auto" else method
    made_from = None
    if save_to is not None:
        made_from = fingerprint(
            loss,
            params,
            batch,
            key=key,
            num_probes=num_probes,
            policy=policy,
            microbatch=microbatch,
            select=select,
            channel_axis=channel_axis,
        )
        if Path(save_to).exists():
            if state is not None:
                raise ValueError(f"both state= and a saved trace, {save_to}: give one of them to go on from")
            state = load_trace(save_to, params, made_from).state
    if state is not None:
        _require_same_run(state, problem, key)
        if method == "auto":
            method = "linearize" if bool(state.linear) else "jvp"
    run = _Run(loss, problem, choose_method(method, memory_budget, loss, problem) == "linearize", on_device)
    if state is None:
        state = _first_state(run, key, policy)

    def enough(state: TraceState) -> bool:
        if int(state.count) < MIN_PROBES_TO_STOP or (rtol is None and until is None):
            return False
        now = estimate_of(problem.layout.like_params, state)
        precise = rtol is not None and now.total_sem() <= rtol * abs(now.total())
        return precise or (until is not None and bool(until(now)))

    done, saved_at = int(state.count), time.monotonic()
    linear, linear_scale = [], None
    while done < num_probes and not enough(state):
        if not run.on_device and linear_scale != float(state.loss_scale):
            linear, linear_scale = _linearizations(run, state), float(state.loss_scale)
        state = _advance(run, linear, state, min(done + chunk, num_probes) - done)
        done, failure = (int(x) for x in jax.device_get((state.count, state.failure)))
        if failure >= 0:
            raise _not_finite(problem.layout, failure, state)
        if made_from is not None and save_to is not None and time.monotonic() - saved_at >= save_every:
            save_trace(save_to, estimate_of(problem.layout.like_params, state), made_from)
            saved_at = time.monotonic()
        if progress is not None:
            progress(done, num_probes)
    if made_from is not None and save_to is not None:
        save_trace(save_to, estimate_of(problem.layout.like_params, state), made_from)
    return estimate_of(problem.layout.like_params, state)


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
    scales = _scales(policy, policy.loss_scale or 1.0, policy.probe_scale or 1.0)
    found = no_products(layout, problem.leaves)
    for examples, weight in zip(problem.chunks, problem.weights, strict=True):
        found = add_products(loss, layout, problem.leaves, directions, examples, weight, scales, found)
    if bool(found.any_bad):
        leaf = layout.paths[int(jnp.argmax(found.leaf_bad))]
        raise FloatingPointError(f"Hv is not finite at {leaf!r} in {policy.compute}")
    return layout.like_params(found.channels)


def _update(layout: Layout, state: TraceState, found: Products) -> TraceState:
    """Take the probe into the mean; or, if anything was not finite, lower the guilty scale and count no probe."""
    # A stale product says nothing about the probe: the state stays as it is.
    bad = found.any_bad & ~found.stale
    layer = {path: channels.sum() for path, channels in found.channels.items()}
    sample = {"channel": found.channels, "layer": layer, "total": sum(layer.values())}
    count = state.count + jnp.int32(1)
    n = count.astype(layout.policy.sums)
    mean = jax.tree.map(lambda m, x: m + (x - m) / n, state.moments.mean, sample)
    squares = jax.tree.map(
        lambda s, x, old, new: s + (x - old) * (x - new), state.moments.squares, sample, state.moments.mean, mean
    )
    keep = partial(jax.tree.map, lambda old, new: jnp.where(found.any_bad | found.stale, old, new))
    lower_loss = _lowers_loss(found, state)
    guilty = jnp.where(lower_loss, state.loss_scale, state.probe_scale)
    exhausted = bad & (guilty <= SMALLEST_SCALE) if layout.policy.backs_off else bad
    half = guilty / 2
    return TraceState(
        key=state.key,
        count=keep(state.count, count),
        rejected=state.rejected + bad.astype(jnp.int32),
        loss_scale=jnp.where(bad & lower_loss, half, state.loss_scale),
        probe_scale=jnp.where(bad & ~lower_loss, half, state.probe_scale),
        linear=state.linear,
        failure=jnp.where(exhausted, jnp.argmax(found.leaf_bad).astype(jnp.int32), state.failure),
        moments=keep(state.moments, Moments(mean, squares)),
    )


def _lowers_loss(found: Products, state: TraceState) -> jax.Array:
    """Whether the loss scale is the guilty one.

    The gradient knows the loss scale alone and the slope of the loss along the probe knows the probe scale alone;
    if both are finite, the product overflowed, and the larger of the two gives way.
    """
    larger = state.loss_scale >= state.probe_scale
    return found.gradient_bad | (~found.tangent_bad & larger)


class _Run(NamedTuple):
    """How one run goes about its probes."""

    loss: Callable
    problem: Problem
    linear: bool
    on_device: bool


_update_step = partial(jax.jit, static_argnames="layout")(_update)
_draw = partial(jax.jit, static_argnames="layout")(
    lambda layout, leaves, key, i: rademacher(jax.random.fold_in(key, i), layout.split(leaves)[0])
)


def _linearizations(run: _Run, state: TraceState) -> list[Linearization]:
    """Of every chunk, at the state's loss scale; none where they are not used or are made on the device."""
    layout, leaves, chunks, _ = run.problem
    if not run.linear:
        return []
    return [linearize(run.loss, layout, leaves, chunk, state.loss_scale) for chunk in chunks]


def _one_probe(run: _Run, linear: list[Linearization], state: TraceState) -> Products:
    """The products of the state's next probe on the whole batch."""
    layout, leaves, chunks, weights = run.problem
    v = _draw(layout, leaves, state.key, state.count)
    scales = (state.loss_scale, state.probe_scale)
    found = no_products(layout, leaves)
    for i, weight in enumerate(weights):
        if linear:
            found = add_linear_products(layout, linear[i], v, weight, scales, found)
        else:
            found = add_products(run.loss, layout, leaves, v, chunks[i], weight, scales, found)
    return found


@partial(jax.jit, static_argnames=("loss", "layout", "linear"))
def _advance_on_device(
    loss, layout, linear, leaves, stacked, rest, full_weight, rest_weight, state: TraceState, target
):
    """Probes until ``target`` are in the mean, or one has failed, or the linearisation is out of date."""
    first_scale = state.loss_scale
    lines = linearize(loss, layout, leaves, rest, first_scale) if linear else None

    def probe(state):
        v = rademacher(jax.random.fold_in(state.key, state.count), layout.split(leaves)[0])
        scales = (state.loss_scale, state.probe_scale)
        found = no_products(layout, leaves)
        if stacked is not None:
            found, _ = jax.lax.scan(
                lambda f, c: (add_products(loss, layout, leaves, v, c, full_weight, scales, f), None),
                found,
                stacked,
            )
        if lines is not None:
            found = add_linear_products(layout, lines, v, rest_weight, scales, found)
        else:
            found = add_products(loss, layout, leaves, v, rest, rest_weight, scales, found)
        return _update(layout, state, found)

    def going_on(state):
        fresh = (state.loss_scale == first_scale) if linear else True
        return (state.count < target) & (state.failure < 0) & fresh

    return jax.lax.while_loop(going_on, probe, state)


def _advance(run: _Run, linear: list[Linearization], state: TraceState, steps: int) -> TraceState:
    """Up to ``steps`` more probes without a word to the host.

    On CPU a Python loop over a compiled step: XLA:CPU runs the weight gradients of convolutions about 20 times
    slower inside a loop body (jax#12868). Elsewhere a loop on the device.
    """
    layout, leaves, chunks, weights = run.problem
    if run.on_device:
        *full, rest = chunks
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *full) if full else None
        target = state.count + jnp.int32(steps)
        return _advance_on_device(
            run.loss, layout, run.linear, leaves, stacked, rest, weights[0], weights[-1], state, target
        )
    for _ in range(steps):
        state = _update_step(layout, state, _one_probe(run, linear, state))
    return state


def _loops_on_device(problem: Problem) -> bool:
    """Not on CPU, and only where all chunks but the last are alike, as a loop on the device needs them."""
    shapes = {tuple(x.shape for x in jax.tree.leaves(chunk)) for chunk in problem.chunks[:-1]}
    return len(shapes) <= 1 and next(iter(problem.leaves[0].devices())).platform != "cpu"


def _first_state(run: _Run, key: jax.Array, policy: Policy) -> TraceState:
    """Count zero, with scales at which the first probe's product is finite and has a factor of 4 to spare."""
    layout = run.problem.layout
    searching = policy.backs_off and policy.loss_scale is None
    loss_scale = policy.loss_scale or (LARGEST_LOSS_SCALE if searching else 1.0)
    scales = _scales(policy, loss_scale, policy.probe_scale or 1.0)
    channels = no_products(layout, run.problem.leaves).channels
    layer = {path: jnp.zeros((), policy.sums) for path in layout.paths}
    zero = {"channel": channels, "layer": layer, "total": jnp.zeros((), policy.sums)}
    state = TraceState(
        key=_typed(key),
        count=jnp.int32(0),
        rejected=jnp.int32(0),
        loss_scale=scales[0],
        probe_scale=scales[1],
        failure=jnp.int32(-1),
        linear=jnp.array(run.linear),
        moments=Moments(zero, jax.tree.map(jnp.zeros_like, zero)),
    )
    return _search_scales(run, state) if searching else state


def _search_scales(run: _Run, state: TraceState) -> TraceState:
    while True:
        found = _one_probe(run, _linearizations(run, state), state)
        if not bool(found.any_bad):
            return state._replace(loss_scale=state.loss_scale / 4)
        lower_loss = bool(_lowers_loss(found, state))
        guilty = state.loss_scale if lower_loss else state.probe_scale
        if float(guilty) <= SMALLEST_SCALE:
            raise _not_finite(run.problem.layout, int(jnp.argmax(found.leaf_bad)), state)
        state = state._replace(**{"loss_scale" if lower_loss else "probe_scale": guilty / 4})


def _scales(policy: Policy, loss_scale: float, probe_scale: float) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(loss_scale, policy.sums), jnp.asarray(probe_scale, policy.sums)


def _typed(key: jax.Array) -> jax.Array:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def _require_same_run(state: TraceState, problem: Problem, key: jax.Array) -> None:
    expected = {path: x.shape for path, x in no_products(problem.layout, problem.leaves).channels.items()}
    actual = {path: x.shape for path, x in state.moments.mean["channel"].items()}
    if expected != actual:
        differing = sorted(p for p in {*expected, *actual} if expected.get(p) != actual.get(p))
        raise ValueError(f"the state belongs to other parameters or another selection: {differing} differ")
    if not np.array_equal(jax.random.key_data(state.key), jax.random.key_data(_typed(key))):
        raise ValueError("the state was started with another key; its next probe would not be the next one")
    if state.moments.mean["total"].dtype != jnp.dtype(problem.layout.policy.sums):
        raise ValueError(f"the state's sums are not in {problem.layout.policy.sums}: it has another policy")


def _not_finite(layout: Layout, leaf: int, state: TraceState) -> FloatingPointError:
    policy = layout.policy
    scales = f", down to loss scale {float(state.loss_scale):g} and probe scale {float(state.probe_scale):g}"
    return FloatingPointError(
        f"Hv of probe {int(state.count)} is not finite in {policy.compute}{scales if policy.backs_off else ''}; "
        f'the first leaf concerned is {layout.paths[leaf]!r}. Use Policy("float32") or check the model there'
    )
