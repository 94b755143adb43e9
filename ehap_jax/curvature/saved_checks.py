"""Whether the arrays of a saved trace can be those of one: a file is believed only where it is consistent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ehap_jax._untrusted_files import parse_json, shown
from ehap_jax.curvature.estimate import Origin


def record(arrays: Mapping[str, np.ndarray], name: str, kind: Any, path: str | Path) -> Any:
    """The dataclass of texts stored as JSON under ``name``; those with None as their default may be missing.

    Raises a ValueError that names the file and the field.
    """
    found = parse_json(str(arrays.get(name, "")), f"{path}: {name}")
    for field in fields(kind):
        value = found.get(field.name)
        if not isinstance(value, str) and not (value is None and field.default is None):
            raise ValueError(f"{path}: {name} has {shown(value)} as its {field.name}, not a text")
    return kind(**{field.name: found.get(field.name) for field in fields(kind)})


def origin_of(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> Origin:
    """What the numbers are of. ``shapes`` are those of the parameters, by path.

    Raises a ValueError that names the file and the field.
    """
    found = parse_json(str(arrays.get("origin", "")), f"{path}: origin")
    for name, kinds in (("method", str), ("compute", str), ("product", str | None)):
        if not isinstance(found.get(name), kinds):
            raise ValueError(f"{path}: origin has {shown(found.get(name))} as its {name}, not a text")
    axes = found.get("axes")
    if not isinstance(axes, list):
        raise ValueError(f"{path}: origin has {shown(axes)} as its axes, not a list")
    for entry in axes:
        fits = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], list)
        if not fits or not all(type(axis) is int and 0 <= axis < len(shapes.get(entry[0], ())) for axis in entry[1]):
            raise ValueError(f"{path}: origin has {shown(entry)} among its axes, not a parameter and axes of it")
    along = tuple((leaf, tuple(own)) for leaf, own in axes)
    return Origin(found["method"], found["compute"], along, found.get("product"))


def check_trace_arrays(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    origin: Origin,
    key: str,
    path: str | Path,
) -> None:
    """Raise unless these can be the arrays of a trace.

    Args:
      arrays: by name, as `save_trace` writes them.
      shapes: of the parameters, by path.
      origin: says along which axes their channels lie.
      key: ``implementation:data`` of the random key it was made with.
      path: the file, for messages.

    Raises:
      ValueError: naming the array, what it is and what it should be.
    """

    def require(name: str, wanted: str, right: Callable[[np.ndarray], Any]) -> None:
        if name not in arrays:
            raise ValueError(f"{path} is not a whole saved trace: it has no {shown(name)}")
        array = arrays[name]
        if not right(array):
            found = f"{array.dtype}{list(array.shape)} {shown(array.ravel()[:4].tolist())}"
            raise ValueError(f"{path}: {shown(name)} is {found}; it should be {wanted}")

    axes = dict(origin.axes)

    def per_channel(leaf: str) -> Callable[[np.ndarray], bool]:
        sizes = tuple(shapes[leaf][axis] for axis in axes[leaf]) if leaf in axes else None
        return lambda x: x.shape == sizes and _finite(x)

    for name in ("count", "rejected"):
        require(name, "a whole number from 0", lambda x: x.shape == () and x.dtype.kind == "i" and x >= 0)
    for name in ("loss_scale", "probe_scale"):
        require(name, "a positive number", lambda x: x.shape == () and _finite(x) and x > 0)
    require("failure", "truth values", lambda x: x.ndim == 1 and x.dtype == bool)
    require("key_impl", "a text", lambda x: x.shape == () and x.dtype.kind == "U")
    made_with = f"{arrays['key_impl']}:"
    require("key", f"the key {key}", lambda x: x.dtype == np.uint32 and made_with + str(x.tolist()) == key)

    prefix = "mean/channel/"
    probed = {name.removeprefix(prefix): x.shape for name, x in arrays.items() if name.startswith(prefix)}
    for leaf in probed:
        require(f"{prefix}{leaf}", "finite, one number per channel of that parameter", per_channel(leaf))
    wanted = {"total": ()} | {f"layer/{leaf}": () for leaf in probed}
    wanted |= {f"channel/{leaf}": shape for leaf, shape in probed.items()}
    for name, shape in wanted.items():
        text = f"finite, of shape {shape}"
        require(f"mean/{name}", text, lambda x, shape=shape: x.shape == shape and _finite(x))
        require(
            f"squares/{name}",
            f"{text}, and not negative",
            lambda x, shape=shape: x.shape == shape and _finite(x) and (x >= 0).all(),
        )
    for name in arrays:
        kind, _, rest = name.partition("/")
        if kind == "known":
            require(name, "finite, one number per channel of that parameter", per_channel(rest))
        elif kind in ("mean", "squares") and rest not in wanted:
            raise ValueError(f"{path}: {shown(name)} is of no parameter whose trace was estimated")


def _finite(x: np.ndarray) -> bool:
    return x.dtype in (np.float32, np.float64) and bool(np.isfinite(x).all())
