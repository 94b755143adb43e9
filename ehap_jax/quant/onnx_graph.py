"""Writing ONNX nodes while remembering how every tensor lies in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: axis k of it is axis ``axes[k]`` of the JAX array, whose shape is ``shape``.

    ``fill`` is the number that stands for 0.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: np.dtype
    fill: int = 0

    @property
    def lies(self) -> tuple[int, ...]:
        """The shape it has in the file."""
        return tuple(self.shape[axis] for axis in self.axes)


@dataclass
class Writer:
    """Nodes and constants of a graph in the making; see :mod:`ehap_jax.quant.onnx_export`."""

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    unshared: set[str] = field(default_factory=set)

    def name(self, wanted: str) -> str:
        wanted = wanted or "array"  # the path of variables that are a single array is empty
        name, number = wanted, 2
        while name in self.taken:
            name, number = f"{wanted}.{number}", number + 1
        self.taken.add(name)
        return name

    def node(self, op: str, inputs: Sequence[str], *, out: str | None = None, **attributes: Any) -> str:
        """Append ``op``; returns the name of its output."""
        from onnx import helper

        made = out if out is not None else self.name(op)
        self.nodes.append(helper.make_node(op, list(inputs), [made], **attributes))
        return made

    def constant(self, array, hint: str = "constant", *, shared: bool = True) -> str:
        """The name of an array stored in the file; equal small ones are stored once if they may be ``shared``."""
        array = np.asarray(array)
        if shared and array.size <= 64:
            for name, known in self.constants.items():
                same = name not in self.unshared and known.dtype == array.dtype and known.shape == array.shape
                if same and known.tobytes() == array.tobytes():
                    return name
        name = self.name(hint)
        if not shared:
            self.unshared.add(name)
        self.constants[name] = np.ascontiguousarray(array) if array.ndim else array
        return name

    def lay(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        """The same tensor with its axes in memory in another order."""
        axes = tuple(axes)
        if axes == tensor.axes:
            return tensor
        perm = [tensor.axes.index(axis) for axis in axes]
        return replace(tensor, name=self.node("Transpose", [tensor.name], perm=perm), axes=axes)

    def in_order(self, tensor: Tensor) -> Tensor:
        """With the axes of the JAX array."""
        return self.lay(tensor, range(len(tensor.shape)))

    def cast(self, tensor: Tensor, dtype) -> Tensor:
        """The same numbers as another type."""
        from onnx import helper

        dtype = np.dtype(dtype)
        if dtype == tensor.dtype:
            return tensor
        name = self.node("Cast", [tensor.name], to=helper.np_dtype_to_tensor_dtype(dtype))
        return replace(tensor, name=name, dtype=dtype)

    def reshape(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A reshape as JAX means it; the size of the first axis is not written, so that a batch may have any size."""
        shape = tuple(int(n) for n in shape)
        if shape == tensor.shape:
            return tensor
        wanted = list(shape)
        if shape and tensor.shape:
            wanted[0] = 0 if shape[0] == tensor.shape[0] else -1  # copied, or what is left
        tensor = self.in_order(tensor)
        name = self.node("Reshape", [tensor.name, self.constant(np.array(wanted, np.int64), "shape")])
        return replace(tensor, name=name, shape=shape, axes=tuple(range(len(shape))))
