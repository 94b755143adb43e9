"""The numerical precision of a curvature product, and the two scales that make float16 safe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Policy"]

PyTree = Any
_DTYPES = ("float64", "float32", "bfloat16", "float16")

LARGEST_LOSS_SCALE = 2.0**20
"""Where the search for float16's loss scale starts: a mean loss over 2**5 or more examples stays finite."""

SMALLEST_SCALE = 2.0**-24
"""A scale is not lowered beyond this: the smallest number that float16 can hold."""


@dataclass(frozen=True)
class Policy:
    """In which dtype curvature is computed.

    Parameters, activations and tangents are in ``compute``. The softmax and the loss belong in float32, and the loss
    function sees to it by casting its logits: one that returns 16 bits is an error. The product ``v * Hv`` and every
    sum are in float32 (float64 for ``"float64"``).

    float16 has five bits of exponent, so small cotangents vanish and large ones overflow. ``grad`` is taken
    of ``loss_scale * loss`` and the probe is ``probe_scale * v``; both are powers of two, so that multiplying
    and dividing by them does not round, and both are divided out in float32.

    Attributes:
      compute: ``"float64"`` (needs 64-bit types switched on), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
      loss_scale: the first loss scale, a power of two. By default the search starts at 2**20 and goes down
        until ``Hv`` is finite with a margin of 4 (float16), or 1 is used (all others).
      probe_scale: the first probe scale, a power of two; by default 1.

    Raises:
      ValueError: an unknown dtype, or a scale that is not a power of two.

    >>> Policy("float16").sums
    'float32'
    """

    compute: str = "float32"
    loss_scale: float | None = None
    probe_scale: float | None = None

    def __post_init__(self):
        if self.compute not in _DTYPES:
            raise ValueError(f"compute must be one of {', '.join(_DTYPES)}; got {self.compute!r}")
        for name in ("loss_scale", "probe_scale"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf and math.frexp(value)[0] == 0.5):
                raise ValueError(f"{name} must be a power of two, so that dividing it out is exact; got {value}")

    @property
    def sums(self) -> str:
        """The dtype of sums, products and results."""
        return "float64" if self.compute == "float64" else "float32"

    @property
    def backs_off(self) -> bool:
        """Whether a non-finite product lowers a scale; otherwise it is an error at once."""
        return self.compute == "float16"

    def require_available(self) -> None:
        """Raise unless this JAX process can compute in ``compute``."""
        if self.compute == "float64" and jax.dtypes.canonicalize_dtype("float64") != jnp.float64:
            raise ValueError(
                'Policy("float64") needs 64-bit types: call jax.config.update("jax_enable_x64", True) '
                "before any array is made"
            )

    def require_full_loss(self, dtype: Any) -> None:
        """Raise a TypeError where a loss of this dtype shows that its softmax was taken in 16 bits."""
        if jnp.dtype(dtype) == jnp.dtype(self.compute) != jnp.dtype(self.sums):
            raise TypeError(
                f"the loss comes back in {jnp.dtype(dtype)}: it must take its softmax and mean in {self.sums} itself, "
                f"so cast the logits first: logits.astype(jnp.{self.sums})"
            )

    def cast(self, tree: PyTree) -> PyTree:
        """``tree`` with its floating-point leaves in ``compute``; integer and boolean leaves as they are."""
        dtype = jnp.dtype(self.compute)

        def one(leaf):
            leaf = jnp.asarray(leaf)
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(one, tree)
