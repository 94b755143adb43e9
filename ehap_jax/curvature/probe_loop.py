"""The loop over probes: what is compiled, on which devices it runs, and how probes enter the mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax._placement import bind, bound_to
from ehap_jax._random_key import random_key
from ehap_jax.curvature.devices import (
    EXAMPLES,
    OWN,
    PROBE,
    SAME,
    SHARES,
    gather_probes,
    on_devices,
    place,
    probe_index,
    size_of,
    sum_over_data,
)
from ehap_jax.curvature.estimate import Moments, Origin, TraceState
from ehap_jax.curvature.overflow import loss_overflows, where_not_finite
from ehap_jax.curvature.precision import LARGEST_LOSS_SCALE, SMALLEST_SCALE, Policy
from ehap_jax.curvature.probes import rademacher
from ehap_jax.curvature.problem import Layout, Problem
from ehap_jax.curvature.products import (
    Linearization,
    Products,
    add_linear_products,
    add_products,
    linearize,
    no_products,
)
from ehap_jax.curvature.rematerialize import rematerialized

__all__ = [
    "Run",
    "advance",
    "blank_state",
    "first_state",
    "hopeless",
    "linearizations",
    "not_finite",
    "scales_of",
]


@dataclass(frozen=True)
class Run:
    """How one run goes about its probes.

    Attributes:
      given: the loss as the user wrote it.
      problem: prepared, and divided over the mesh.
      product: one of `PRODUCTS`.
      mesh: the devices, or None for the one that the parameters are on.
      method: what the probes estimate, as in `Origin`.
      reported: the leaves that the estimate is of in the end; by default those that are probed.
    """

    given: Callable
    problem: Problem
    product: str
    mesh: Mesh | None = None
    method: str = "hutchinson"
    reported: Layout | None = None

    @property
    def origin(self) -> Origin:
        layout = self.reported or self.problem.layout
        return Origin(self.method, layout.policy.compute, layout.named_axes, self.product)

    @cached_property
    def loss(self) -> Callable:
        return rematerialized(self.given) if self.product == "remat" else self.given

    def place(self, tree):
        """Arrays put where those of the problem are: on the mesh, the same on every device, or on their device."""
        return bind(tree, bound_to(self.problem.leaves)) if self.mesh is None else place(self.mesh, tree, SAME)

    @property
    def linear(self) -> bool:
        return self.product == "linearize"

    @property
    def on_device(self) -> bool:
        """Whether the loop over probes runs on the device.

        Not on CPU: XLA:CPU runs the weight gradients of convolutions about 20 times slower inside a loop body
        (jax#12868), so there it is a Python loop over compiled steps.
        """
        return next(iter(self.problem.leaves[0].devices())).platform != "cpu"


def advance(run: Run, linear: list[Linearization], state: TraceState, done: int, target: int) -> TraceState:
    """From ``done`` to ``target`` probes without a word to the host; fewer where a product was not finite."""
    goal = run.place(jnp.int32(target))
    if run.on_device:
        return advance_on_device(run, state, goal)
    for _ in range(-(-(target - done) // size_of(run.mesh, PROBE))):
        state = _take_in(run.problem.layout, run.mesh, state, one_probe(run, linear, state), goal)
    return state


def linearizations(run: Run, state: TraceState) -> list[Linearization]:
    """Of every chunk, at the state's loss scale; none where they are not used or are made on the device."""
    if not run.linear or run.on_device:
        return []
    layout, leaves, chunks, _ = run.problem
    return [linearize_chunk(run.loss, layout, run.mesh, leaves, chunk, state.loss_scale) for chunk in chunks]


def one_probe(run: Run, linear: list[Linearization], state: TraceState) -> Products:
    """The products of the state's next probe on the whole batch; on a mesh, of the next probes, in parts."""
    layout, leaves, chunks, weights = run.problem
    v, found = begin(layout, run.mesh, leaves, state)
    scales = (state.loss_scale, state.probe_scale)
    for i, weight in enumerate(weights):
        if linear:
            found = add_linear_chunk(layout, run.mesh, linear[i], v, weight, scales, found)
        else:
            found = add_chunk(run.loss, layout, run.mesh, leaves, v, chunks[i], weight, scales, found)
    return found


def begin(layout: Layout, mesh, leaves, state: TraceState) -> tuple[dict[str, jax.Array], Products]:
    """Every device's probe, and its empty sum.

    On one device leaf by leaf: the generator takes most of a second to compile, so it is compiled once per shape.
    """
    if mesh is None:
        return _draw(layout, mesh, leaves, state), bind(no_products(layout, leaves), bound_to(leaves))
    return _begin_on_mesh(layout, mesh, leaves, state)


@partial(jax.jit, static_argnames=("layout", "mesh"))
def _begin_on_mesh(layout: Layout, mesh, leaves, state: TraceState) -> tuple[dict[str, jax.Array], Products]:

    def here(leaves, state):
        return _draw(layout, mesh, leaves, state), no_products(layout, leaves)

    return on_devices(mesh, here, (SAME, SAME), OWN)(leaves, state)


@partial(jax.jit, static_argnames=("loss", "layout", "mesh"))
def add_chunk(loss, layout: Layout, mesh, leaves, v, examples, weight, scales, found: Products) -> Products:
    """`add_products` on every device."""
    given = (SAME, OWN, EXAMPLES, SHARES, SAME, OWN)
    return on_devices(mesh, partial(add_products, loss, layout), given, OWN)(leaves, v, examples, weight, scales, found)


@partial(jax.jit, static_argnames=("loss", "layout", "mesh"))
def linearize_chunk(loss, layout: Layout, mesh, leaves, examples, loss_scale) -> Linearization:
    """`linearize` on every device."""
    given = (SAME, EXAMPLES, SAME)
    return on_devices(mesh, partial(linearize, loss, layout), given, OWN)(leaves, examples, loss_scale)


@partial(jax.jit, static_argnames=("layout", "mesh"))
def add_linear_chunk(layout: Layout, mesh, linear: Linearization, v, weight, scales, found: Products) -> Products:
    """`add_linear_products` on every device."""
    given = (OWN, OWN, SHARES, SAME, OWN)
    return on_devices(mesh, partial(add_linear_products, layout), given, OWN)(linear, v, weight, scales, found)


def _draw(layout: Layout, mesh, leaves, state: TraceState) -> dict[str, jax.Array]:
    key = jax.random.fold_in(state.key, state.count + probe_index(mesh))
    return rademacher(key, layout.split(leaves)[0])


def advance_on_device(run: Run, state: TraceState, target: jax.Array) -> TraceState:
    """Probes until ``target`` are in the mean, or one has failed, or the linearisation is out of date."""
    layout, leaves, chunks, weights = run.problem
    return on_device_loop(run.loss, layout, run.mesh, run.linear, leaves, chunks, weights, state, target)


@partial(jax.jit, static_argnames=("loss", "layout", "mesh", "linear"))
def on_device_loop(loss, layout: Layout, mesh, linear: bool, leaves, chunks, weights, state: TraceState, target):
    """What `advance_on_device` compiles."""

    def here(leaves, chunks, weights, state, target):
        groups = _alike(chunks, weights)
        first_scale = state.loss_scale
        if linear:
            groups = [
                (jax.lax.map(lambda c: linearize(loss, layout, leaves, c, first_scale), group), shares)
                for group, shares in groups
            ]

        def probes(state):
            v, scales = _draw(layout, mesh, leaves, state), (state.loss_scale, state.probe_scale)

            def add(found, chunk):
                part, weight = chunk
                if linear:
                    return add_linear_products(layout, part, v, weight, scales, found), None
                return add_products(loss, layout, leaves, v, part, weight, scales, found), None

            found = no_products(layout, leaves)
            for group in groups:
                found, _ = jax.lax.scan(add, found, group)
            return _combine(layout, mesh, state, found, target)

        def going_on(state):
            fresh = (state.loss_scale == first_scale) if linear else True
            return (state.count < target) & ~state.failure.any() & fresh

        return jax.lax.while_loop(going_on, probes, state)

    given = (SAME, EXAMPLES, SHARES, SAME, SAME)
    return on_devices(mesh, here, given, SAME)(leaves, chunks, weights, state, target)


def _alike(chunks: list, weights: list) -> list[tuple]:
    """Chunks of one shape stacked, with their weights: a loop runs over each stack."""
    groups: dict[tuple, list[int]] = {}
    for i, chunk in enumerate(chunks):
        groups.setdefault(tuple(x.shape for x in jax.tree.leaves(chunk)), []).append(i)
    return [
        (
            jax.tree.map(lambda *parts: jnp.stack(parts), *(chunks[i] for i in group)),
            jnp.stack([weights[i] for i in group]),
        )
        for group in groups.values()
    ]


@partial(jax.jit, static_argnames=("layout", "mesh"))
def _take_in(layout: Layout, mesh, state: TraceState, found: Products, target: jax.Array) -> TraceState:
    return on_devices(mesh, partial(_combine, layout, mesh), (SAME, OWN, SAME), SAME)(state, found, target)


@partial(jax.jit, static_argnames="mesh")
def _first_of(mesh, found: Products) -> Products:
    """The first of the products that the devices have."""

    def here(found):
        return jax.tree.map(lambda x: x[0], _gather(mesh, found))

    return on_devices(mesh, here, (OWN,), SAME)(found)


def _gather(mesh, found: Products) -> Products:
    """The products of the probes along the mesh, over all data, with a new first axis."""
    channels, *flags = found
    counts = jax.tree.map(lambda flag: flag.astype(jnp.int32), flags)
    channels, counts = sum_over_data(mesh, (channels, counts))
    return gather_probes(mesh, Products(channels, *(count > 0 for count in counts)))


def _combine(layout: Layout, mesh, state: TraceState, found: Products, target: jax.Array) -> TraceState:
    """Take in the probes of all devices, one after another in their order.

    So the result does not depend on how many devices there are. After one that was not finite the rest is dropped: they
    come again with the lower scale, as they would on one device.
    """

    def take(carry, one):
        state, going = carry
        going = going & (state.count < target)
        new = _update(layout, state, one)
        moved = jax.tree.map(lambda a, b: jnp.where(going, a, b), new[1:], state[1:])
        return (TraceState(state.key, *moved), going & ~(one.any_bad | one.stale)), None

    (state, _), _ = jax.lax.scan(take, (state, jnp.array(True)), _gather(mesh, found))
    return state


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
    lowers, half = bad & ~exhausted, guilty / 2
    return TraceState(
        key=state.key,
        count=keep(state.count, count),
        rejected=state.rejected + bad.astype(jnp.int32),
        loss_scale=jnp.where(lowers & lower_loss, half, state.loss_scale),
        probe_scale=jnp.where(lowers & ~lower_loss, half, state.probe_scale),
        failure=jnp.where(exhausted, found.suspects, state.failure),
        moments=keep(state.moments, Moments(mean, squares)),
        origin=state.origin,
    )


def _lowers_loss(found: Products, state: TraceState) -> jax.Array:
    """Whether the loss scale is the guilty one.

    The gradient knows the loss scale alone and the slope of the loss along the probe knows the probe scale alone;
    if both are finite, the product overflowed, and the larger of the two gives way.
    """
    larger = state.loss_scale >= state.probe_scale
    return found.gradient_bad | (~found.tangent_bad & larger)


def blank_state(run: Run, key: jax.Array, policy: Policy) -> TraceState:
    """No probes yet, and the first scales that the policy asks for or a search starts from."""
    layout = run.problem.layout
    scales = scales_of(policy, LARGEST_LOSS_SCALE if policy.backs_off else 1.0)
    channels = no_products(layout, run.problem.leaves).channels
    layer = {path: jnp.zeros((), policy.sums) for path in layout.paths}
    zero = {"channel": channels, "layer": layer, "total": jnp.zeros((), policy.sums)}
    state = TraceState(
        key=random_key(key),
        count=jnp.int32(0),
        rejected=jnp.int32(0),
        loss_scale=scales[0],
        probe_scale=scales[1],
        failure=jnp.zeros(len(layout.paths), bool),
        moments=Moments(zero, jax.tree.map(jnp.zeros_like, zero)),
        origin=run.origin,
    )
    return run.place(state)


def first_state(run: Run, key: jax.Array, policy: Policy) -> TraceState:
    """Count zero, with scales at which the first probe's product is finite and has a factor of 4 to spare."""
    state = blank_state(run, key, policy)
    return _search_scales(run, state) if policy.backs_off and policy.loss_scale is None else state


def _search_scales(run: Run, state: TraceState) -> TraceState:
    """Chunk by chunk: what is too large is mostly seen at the first, and what one needs is no news to the next."""
    problem = run.problem
    for chunk, weight in zip(problem.chunks, problem.weights, strict=True):
        state = _lower_scales(replace(run, problem=problem._replace(chunks=[chunk], weights=[weight])), state)
    return state._replace(loss_scale=state.loss_scale / 4)


def _lower_scales(run: Run, state: TraceState) -> TraceState:
    """Until the next probe's product is finite."""
    first = state
    while True:
        found = _first_of(run.mesh, one_probe(run, linearizations(run, state), state))
        if not bool(found.any_bad):
            return state
        lower_loss = bool(_lowers_loss(found, state))
        guilty = state.loss_scale if lower_loss else state.probe_scale
        if float(guilty) <= SMALLEST_SCALE or (state is first and hopeless(run)):
            raise not_finite(run, jax.device_get(found.suspects), state)
        state = state._replace(**{"loss_scale" if lower_loss else "probe_scale": guilty / 4})


def scales_of(policy: Policy, otherwise: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """The first loss and probe scale: what the policy names, or ``otherwise`` for the loss and 1 for the probe."""
    return (
        jnp.asarray(policy.loss_scale or otherwise, policy.sums),
        jnp.asarray(policy.probe_scale or 1.0, policy.sums),
    )


def hopeless(run: Run) -> bool:
    """Whether no scale can make a product finite, because the loss is not finite before any scale comes in."""
    return loss_overflows(run.given, run.problem, run.mesh)


def not_finite(run: Run, failed: np.ndarray, state: TraceState) -> FloatingPointError:
    """The error that says where to look; ``failed``: ``(leaves,)``, whose products are not finite."""
    policy = run.problem.layout.policy
    scales = f" at loss scale {float(state.loss_scale):g} and probe scale {float(state.probe_scale):g}"
    return FloatingPointError(
        f"Hv of probe {int(state.count)} is not finite in {policy.compute}{scales if policy.backs_off else ''}; "
        f'{where_not_finite(run.given, run.problem, run.mesh, failed)}. Use Policy("float32") or check the model there'
    )
