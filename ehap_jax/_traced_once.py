"""Functions traced once for the same arguments, apart where 64-bit types are switched on."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import jax

Given = ParamSpec("Given")
Found = TypeVar("Found")


def traced_once(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """``lru_cache`` for what is made by tracing: the same code is another program where 64-bit types are on.

    Arguments that are equal in both modes (float32 arrays, say) would otherwise give integers of the wrong width.
    """

    @lru_cache(maxsize=16)
    def kept(mode, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        return function(*args, **kwargs)

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        return kept(jax.dtypes.canonicalize_dtype("float64"), *args, **kwargs)

    return call
