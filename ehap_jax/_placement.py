"""Where arrays are bound to: every mixture of arrays that are bound to a device and free ones is compiled anew."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding


def bound_to(tree: Any) -> Sharding | None:
    """The one device that arrays are bound to; None where none are, or where their owner spread them over several."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and leaf.committed]
    single = [array.sharding for array in arrays if isinstance(array.sharding, SingleDeviceSharding)]
    return single[0] if single and len(single) == len(arrays) else None


def bind(tree: Any, place: Sharding | None) -> Any:
    """All arrays bound to ``place``; as they are where it is None."""
    return tree if place is None else jax.device_put(tree, place)
