"""The one name that a leaf of a pytree has everywhere: in plans, traces, files and messages."""

from __future__ import annotations

import jax
from jax.tree_util import GetAttrKey


def path_name(path) -> str:
    """A pytree key path as text, ``params/conv1/kernel``.

    The array inside an ``nnx.Variable`` has the variable's name, as in ``nnx.to_pure_dict``.
    """
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
