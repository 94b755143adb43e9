"""What a training script pickles beside its weights, as plain data: options, NumPy's scalars, dtypes and arrays.

A pickle names a function and the arguments to call it with. The functions that are called here for NumPy's names are
these, whatever NumPy would do: they keep the arguments, or decode the bytes of one number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_NUMBERS = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"])


class DType:
    """The code ("f8") and byte order of a `numpy.dtype`."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="

    def decode(self, data: Any) -> bool | int | float | complex | None:
        """The number in these bytes; None where they are not one of a numeric type."""
        known = isinstance(self.code, str) and self.code in _NUMBERS and self.order in ("<", ">", "=", "|")
        if not known or not isinstance(data, bytes):
            return None
        dtype = np.dtype(f"{self.order}{self.code}")
        return np.frombuffer(data, dtype)[0].item() if len(data) == dtype.itemsize else None


class Array:
    """A `numpy.ndarray` beside the weights (a learning curve, a random state), which nothing reads."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """`numpy.core.multiarray.scalar`: a Python number, or None for what is not one."""
    return dtype.decode(data) if isinstance(dtype, DType) else None


def array(*_: Any) -> Array:
    """`numpy.core.multiarray._reconstruct`."""
    return Array()


def inert_globals() -> Iterator[tuple[Callable[..., Any], str]]:
    """(what is called, the name in the pickle), for `torch.serialization.safe_globals`."""
    yield argparse.Namespace, "argparse.Namespace"
    yield DType, "numpy.dtype"
    yield Array, "numpy.ndarray"
    for core in ("numpy.core", "numpy._core"):
        yield scalar, f"{core}.multiarray.scalar"
        yield array, f"{core}.multiarray._reconstruct"
