"""Traces on disk: what was estimated, from what, and where to go on; written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax import _untrusted_files, _whole_files
from ehap_jax._paths import path_name
from ehap_jax._random_key import random_key
from ehap_jax._untrusted_files import shown
from ehap_jax.curvature.devices import same_everywhere, wait_for_all
from ehap_jax.curvature.estimate import Moments, TraceEstimate, TraceState, estimate_of
from ehap_jax.curvature.heads import softmax_cross_entropy
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.problem import Axes, Batches, kernels_of, layout_of
from ehap_jax.curvature.residual_loss import residual_loss
from ehap_jax.curvature.saved_checks import check_trace_arrays, origin_of, record
from ehap_jax.graph import Graph, program_digest

__all__ = ["TraceFile", "TraceFingerprint", "fingerprint", "load_trace", "save_trace"]

PyTree = Any
FORMAT = "ehap_jax trace 4"


@dataclass(frozen=True)
class TraceFingerprint:
    """Everything that determines a trace, each part as a short text; SHA-256 where it is large.

    Attributes:
      weights: of every leaf of ``params``: path, shape, dtype and bytes.
      batch: of every leaf of the batch, the same.
      loss: the loss and its derivative rules as JAX traces them, with every array closed over (see `program_digest`),
        so renaming or moving the function changes nothing and a changed temperature, label smoothing or layer does.
        Another JAX version may trace it differently.
      policy: the precision and any first scales that were asked for.
      key: the random key.
      method: how traces are found; where a model and a head have a part in it, theirs as for the loss.
      selection: the probed paths and the axes of their channels.
      microbatch: the chunk size, which changes the rounding.
      probes: how many probes were asked for; None matches any number.
    """

    weights: str
    batch: str
    loss: str
    policy: str
    key: str
    selection: str
    microbatch: str
    method: str
    probes: str | None = None


def fingerprint(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_probes: int | None = None,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    microbatch: int | None = None,
    graph: Graph | None = None,
    select: Callable[[str, jax.Array], bool] | None = None,
    channel_axis: Axes | Mapping[str, Axes] | None = None,
    method: str = "hutchinson",
    model: Callable[[PyTree, PyTree], jax.Array] | None = None,
    head: Callable = softmax_cross_entropy,
) -> TraceFingerprint:
    """The fingerprint of `channel_trace` called with the same arguments. Traces the loss, runs nothing.

    Args:
      loss, params, batch, key, policy, microbatch, graph, select, channel_axis, method, model, head: as for
        `channel_trace`.
      num_probes: of `channel_trace`; None matches any number.

    Returns:
      A `TraceFingerprint`: equal for two calls where all that determines their traces is equal.

    Raises:
      ValueError: the loss calls back into Python, so that what it computes cannot be known; nothing is selected;
        the method needs a model, or a head whose loss is known.
      TypeError: a selected parameter is an integer.

    >>> import jax, jax.numpy as jnp
    >>> of = lambda s: fingerprint(
    ...     lambda p, b: s * (p["w"] ** 2).sum(), {"w": jnp.ones((2, 2))}, jnp.ones(1), key=jax.random.key(0)
    ... )
    >>> of(1.0) == of(1.0), of(1.0).loss == of(2.0).loss, of(1.0).weights == of(2.0).weights
    (True, False, True)
    """
    key = random_key(key)
    select, channel_axis = kernels_of(graph, params, select, channel_axis)
    layout = layout_of(params, policy, select, channel_axis)
    one = batch[0] if isinstance(batch, Batches) else batch
    if method != "hutchinson":
        method += f" of {program_digest(residual_loss(method, model, head), params, one, derivatives=2)}"
    return TraceFingerprint(
        weights=_digest(params),
        batch=_digest(tuple(batch) if isinstance(batch, Batches) else batch),
        loss=program_digest(loss, params, one, derivatives=2),
        policy=repr(policy),
        key=_key_text(key),
        selection=repr(layout.named_axes),
        microbatch=str(microbatch),
        method=method,
        probes=None if num_probes is None else str(num_probes),
    )


def save_trace(path: str | Path, estimate: TraceEstimate, of: TraceFingerprint) -> None:
    """Write ``estimate`` and its fingerprint to ``path`` (npz, no pickle), replacing what is there at once.

    The file is written under another name in the same folder, flushed to the disk and then renamed: whoever reads
    ``path``, after a kill at any moment too, finds the old trace or the new one, whole.

    Args:
      path: the file; its folder is made.
      estimate: of `channel_trace`.
      of: what it was made from, as `fingerprint` says.

    Raises:
      OSError: the file cannot be written; what was there is as it was.

    >>> import tempfile
    >>> from ehap_jax.curvature import channel_trace
    >>> loss, p, batch = (lambda p, b: (p["w"] ** 2).sum()), {"w": jnp.ones((2, 2))}, jnp.ones(1)
    >>> options = {"key": jax.random.key(0), "num_probes": 1}
    >>> of = fingerprint(loss, p, batch, **options)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_trace(f"{folder}/trace.npz", channel_trace(loss, p, batch, **options), of)
    ...     load_trace(f"{folder}/trace.npz", p, of).total()
    8.0
    """
    state = estimate.state
    arrays: dict[str, Any] = {
        "key": jax.random.key_data(state.key),
        "key_impl": str(jax.random.key_impl(state.key)),
        "origin": json.dumps(asdict(state.origin)),
    }
    scalars = ("count", "rejected", "loss_scale", "probe_scale", "failure")
    arrays |= {name: getattr(state, name) for name in scalars}
    for kind, moments in state.moments._asdict().items():
        arrays[f"{kind}/total"] = moments["total"]
        arrays |= {f"{kind}/{level}/{p}": x for level in ("channel", "layer") for p, x in moments[level].items()}
    arrays |= {f"known/{p}": x for p, x in estimate.known.items()}
    write_arrays(path, arrays, of)


def write_arrays(path: str | Path, arrays: dict[str, Any], of: TraceFingerprint) -> None:
    """Arrays and the fingerprint of what they are, whole or not at all."""
    _whole_files.write_arrays(path, {"format": FORMAT, "fingerprint": json.dumps(asdict(of)), **jax.device_get(arrays)})


def read_arrays(path: str | Path, expected: TraceFingerprint) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote, of what is expected; raises as `load_trace`."""
    try:
        arrays = _untrusted_files.read_arrays(path, what="saved trace")
    except ValueError as error:
        raise ValueError(f"not a saved trace, or a damaged one: {error}") from error
    if str(arrays.get("format")) != FORMAT:
        found = shown(str(arrays.get("format")))
        raise ValueError(f"{path} is not a saved trace of this version: its format is {found}")
    require_same(record(arrays, "fingerprint", TraceFingerprint, path), expected, str(path))
    return arrays


def load_trace(path: str | Path, params: PyTree, expected: TraceFingerprint) -> TraceEstimate:
    """Read what `save_trace` wrote, for a network with the structure of ``params``; an example is there.

    Args:
      path: the file.
      params: like those the trace is of; only their structure is read.
      expected: what the trace must be of, as `fingerprint` says.

    Returns:
      The estimate as it was saved; its ``state`` goes on from there.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a whole saved trace; or the trace is of something else than ``expected``, with the
        names of the parts that differ; or its arrays cannot be of one.
    """
    arrays = read_arrays(path, expected)
    shapes = {path_name(p): np.shape(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    origin = origin_of(arrays, shapes, path)
    check_trace_arrays(arrays, shapes, origin, expected.key, path)

    def moments(kind):
        found: dict[str, Any] = {"channel": {}, "layer": {}, "total": jnp.asarray(arrays[f"{kind}/total"])}
        for name, x in arrays.items():
            if name.startswith(f"{kind}/") and name != f"{kind}/total":
                _, level, leaf = name.split("/", 2)
                found[level][leaf] = jnp.asarray(x)
        return found

    state = TraceState(
        key=jax.random.wrap_key_data(jnp.asarray(arrays["key"]), impl=str(arrays["key_impl"])),
        count=jnp.asarray(arrays["count"]),
        rejected=jnp.asarray(arrays["rejected"]),
        loss_scale=jnp.asarray(arrays["loss_scale"]),
        probe_scale=jnp.asarray(arrays["probe_scale"]),
        failure=jnp.asarray(arrays["failure"]),
        moments=Moments(moments("mean"), moments("squares")),
        origin=origin,
    )

    def like_params(probed):
        return jax.tree_util.tree_map_with_path(lambda p, _: probed.get(path_name(p)), params)

    known = {name.removeprefix("known/"): jnp.asarray(x) for name, x in arrays.items() if name.startswith("known/")}
    return estimate_of(like_params, state, known)


class TraceFile:
    """Where the trace of a run is kept, if anywhere. Every process reads it, the first one writes it."""

    def __init__(self, path: str | Path | None, of: TraceFingerprint | None, every: float) -> None:
        self._path, self._of, self._every = path, of, every
        self._saved = time.monotonic()

    def read(self, params: PyTree) -> TraceEstimate | None:
        """What is there, None if nothing is; raises as `load_trace`."""
        if self._path is None or self._of is None:
            return None
        if not same_everywhere(Path(self._path).exists(), f"whether {self._path} exists"):
            return None
        return load_trace(self._path, params, self._of)

    def save(self, estimate: Callable[[], TraceEstimate], *, last: bool = False) -> None:
        """Write, if it is time; the ``last`` time in any case, and return when it is done."""
        if self._path is None or self._of is None:
            return
        if last or time.monotonic() - self._saved >= self._every:
            if jax.process_index() == 0:
                save_trace(self._path, estimate(), self._of)
            self._saved = time.monotonic()
        if last:
            wait_for_all(f"{self._path} is written")


def require_same(saved: TraceFingerprint, expected: TraceFingerprint, where: str) -> None:
    """Raise a ValueError that names every part in which two fingerprints differ."""
    differing = []
    for field in fields(TraceFingerprint):
        a, b = getattr(saved, field.name), getattr(expected, field.name)
        if a != b and not (field.name == "probes" and None in (a, b)):
            differing.append(f"{field.name} (saved {a}, now {b})")
    if differing:
        raise ValueError(
            f"the trace in {where} was made from something else; these differ: {'; '.join(differing)}. "
            "Remove the file, or name another one"
        )


def _key_text(key: jax.Array) -> str:
    key = random_key(key)
    return f"{jax.random.key_impl(key)}:{np.asarray(jax.random.key_data(key)).tolist()}"


def _digest(tree: PyTree) -> str:
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jnp.issubdtype(getattr(leaf, "dtype", None) or np.asarray(leaf).dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        kind = jax.random.key_impl(leaf) if is_key else array.dtype
        found.update(f"{path_name(path)}|{array.shape}|{kind}|".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:32]
