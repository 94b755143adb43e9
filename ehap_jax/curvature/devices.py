"""One function on every device of a mesh: examples divided over its axis ``"data"``, probes over ``"probe"``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ehap_jax._placement import bind, bound_to
from ehap_jax.curvature.problem import Problem, batch_size

__all__ = [
    "DATA",
    "EXAMPLES",
    "OWN",
    "PROBE",
    "SAME",
    "SHARES",
    "check_mesh",
    "divide",
    "fetch",
    "gather_probes",
    "on_devices",
    "place",
    "probe_index",
    "same_everywhere",
    "size_of",
    "sum_over_data",
    "wait_for_all",
]

PyTree = Any
DATA, PROBE = "data", "probe"

SAME = "same"
"""The same value on every device."""

EXAMPLES = "examples"
"""Arrays whose first axis is divided over the data axis."""

SHARES = "shares"
"""A value per index of the data axis."""

OWN = "own"
"""A value of its own on every device."""


def check_mesh(mesh: Mesh | None) -> None:
    """Raise a ValueError unless the axes of ``mesh`` are ``"data"``, ``"probe"`` or both."""
    if mesh is not None and (not mesh.axis_names or not set(mesh.axis_names) <= {DATA, PROBE}):
        raise ValueError(f'the axes of a mesh are "data" (examples), "probe" (probes) or both; got {mesh.axis_names}')


def size_of(mesh: Mesh | None, axis: str) -> int:
    """How many devices lie along an axis; 1 where there is none."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def _automatic(mesh: Mesh) -> Mesh:
    """The same devices with shardings left to the compiler: those of `jax.make_mesh` are types that must match."""
    return Mesh(mesh.devices, mesh.axis_names)


def _spec(mesh: Mesh, kind: str) -> P:
    if kind == OWN:
        return P(mesh.axis_names)
    return P(DATA) if kind in (EXAMPLES, SHARES) and DATA in mesh.axis_names else P()


def on_devices(mesh: Mesh | None, function: Callable, given: Sequence[str], returned: str) -> Callable:
    """``function`` run on every device at once; itself where ``mesh`` is None.

    Args:
      given: of every argument, how it lies on the devices: `SAME`, `EXAMPLES`, `SHARES` or `OWN`.
      returned: the same of the result, `SAME` or `OWN`.
    """
    if mesh is None:
        return function

    def here(*arguments):
        inside = [
            jax.tree.map(lambda x: x[0], argument) if kind in (SHARES, OWN) else argument
            for argument, kind in zip(arguments, given, strict=True)
        ]
        found = function(*inside)
        return jax.tree.map(lambda x: x[None], found) if returned == OWN else found

    specs = tuple(_spec(mesh, kind) for kind in given)
    return jax.shard_map(here, mesh=_automatic(mesh), in_specs=specs, out_specs=_spec(mesh, returned), check_vma=False)


def place(mesh: Mesh | None, tree: PyTree, kind: str) -> PyTree:
    """Arrays of this process put on the mesh, every device receiving its part; as they are where ``mesh`` is None.

    With several processes each must hold the same whole arrays.
    """
    if mesh is None:
        return tree
    sharding = NamedSharding(_automatic(mesh), _spec(mesh, kind))

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=str(jax.random.key_impl(x)))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)


def divide(problem: Problem, mesh: Mesh | None) -> Problem:
    """A problem on a mesh: its parameters everywhere, every chunk's examples divided over the data axis.

    Without a mesh all of it is bound to a device if any of it is.

    What is left of a chunk, fewer examples than devices, is a chunk of its own with one example per device; devices
    beyond the rest repeat the first example with the weight 0.
    """
    if mesh is None:
        layout, *arrays = problem
        return Problem(layout, *bind(arrays, bound_to(arrays)))
    along, size = size_of(mesh, DATA), sum(batch_size(chunk) for chunk in problem.chunks)
    dtype = problem.layout.policy.sums
    chunks, weights = [], []
    for chunk in problem.chunks:
        count = batch_size(chunk)
        each, rest = divmod(count, along)
        if each:
            chunks.append(jax.tree.map(lambda x, n=each * along: x[:n], chunk))
            weights.append(np.full(along, each / size, dtype))
        if rest:
            index = np.concatenate([np.arange(each * along, count), np.zeros(along - rest, int)])
            chunks.append(jax.tree.map(lambda x, i=index: x[i], chunk))
            weights.append(np.where(np.arange(along) < rest, 1 / size, 0.0).astype(dtype))
    return Problem(
        problem.layout,
        place(mesh, problem.leaves, SAME),
        place(mesh, chunks, EXAMPLES),
        place(mesh, weights, SHARES),
    )


def fetch(tree: PyTree) -> PyTree:
    """Arrays that are the same on every device, as arrays of this process's default device."""

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=str(jax.random.key_impl(x)))
        return jnp.asarray(np.asarray(x))

    return jax.tree.map(one, tree)


def same_everywhere(value: bool, what: str) -> bool:
    """``value``, where all processes agree on it.

    Raises:
      ValueError: they do not; ``what`` says on what.
    """
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import process_allgather

        found = np.asarray(process_allgather(np.asarray(value)))
        if found.min() != found.max():
            raise ValueError(f"the processes differ in {what}: it must lie on a file system that all of them share")
    return value


def wait_for_all(what: str) -> None:
    """Return once every process has come here; ``what`` names the place."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(what)


def sum_over_data(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Inside `on_devices`: the sum over the data axis."""
    return jax.lax.psum(tree, DATA) if mesh is not None and DATA in mesh.axis_names else tree


def probe_index(mesh: Mesh | None) -> jax.Array:
    """Inside `on_devices`: this device's place along the probe axis."""
    return jax.lax.axis_index(PROBE) if mesh is not None and PROBE in mesh.axis_names else jnp.int32(0)


def gather_probes(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Inside `on_devices`: the values along the probe axis, in its order, as a new first axis."""
    if mesh is not None and PROBE in mesh.axis_names:
        return jax.lax.all_gather(tree, PROBE)
    return jax.tree.map(lambda x: x[None], tree)
