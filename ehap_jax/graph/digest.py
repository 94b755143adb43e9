"""A digest of everything a function computes with: operations, constants and derivative rules, whatever their names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ehap_jax import _compat
from ehap_jax.graph.trace import CUSTOM_RULE, Body, Constant, Node, Operand, body_of, trace_graph

__all__ = ["program_digest"]

HOST_CALLS = frozenset({"pure_callback", "io_callback"})
ADDRESS = re.compile(r" at 0x\w+")


def program_digest(function: Callable, *args: Any, derivatives: int = 0) -> str:
    """32 hexadecimal digits that are the same for two functions where JAX traces them to the same program.

    The program is all there is: every operation with its parameters, and the value of every array that is closed over,
    in loops, branches and derivative rules too. Names and addresses are not in it, and `jax.jit` changes nothing, so it
    is the same in another process; another JAX version may trace the function differently.

    Args:
      function: ``function(*args)``; traced, not run.
      args: arrays, or `jax.ShapeDtypeStruct`; only their shapes and dtypes are read.
      derivatives: how often the function will be differentiated: the rules of ``custom_jvp`` and ``custom_vjp`` are
        followed this deep (a rule may call itself).

    Raises:
      ValueError: the function calls back into Python, of which nothing can be known.

    >>> import jax.numpy as jnp
    >>> table = lambda c: jax.jit(lambda x: (x * jnp.full(3, c)).sum())
    >>> digests = [program_digest(table(c), jnp.ones(3)) for c in (1.0, 1.0, 5.0)]
    >>> digests[0] == digests[1], digests[0] == digests[2]
    (True, False)
    """
    found = _Digest()
    found.add_body(trace_graph(function, on_unknown="freeze")(*args).body, derivatives)
    return found.hash.hexdigest()[:32]


class _Digest:
    """What has been read so far, as a hash."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def add(self, *texts: Any) -> None:
        self.hash.update("".join(f"{text}|" for text in texts).encode())

    def add_array(self, array: Any) -> None:
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            self.add(jax.random.key_impl(array))
            array = jax.random.key_data(array)
        array = np.asarray(array)
        self.add(array.shape, array.dtype)
        self.hash.update(np.ascontiguousarray(array).tobytes())

    def add_body(self, body: Body, derivatives: int) -> None:
        """Values are known by the order in which they appear."""
        numbers: dict[Operand, int] = {}

        def define(values) -> None:
            for value in values:
                numbers[value] = len(numbers)
                self.add(value.shape, value.dtype)

        def read(operands) -> None:
            for operand in operands:
                if isinstance(operand, Constant):
                    self.add_array(np.asarray(operand.value))
                else:
                    self.add(numbers[operand])

        define(body.inputs)
        define(body.constants)
        for array in body.constants.values():
            self.add_array(array)
        for node in body.nodes:
            self.add(node.name)
            read(node.inputs)
            self.add_operation(node, derivatives)
            define(node.outputs)
        read(body.outputs)

    def add_operation(self, node: Node, derivatives: int) -> None:
        if node.name in HOST_CALLS:
            raise ValueError(
                f"{node.name} at {node.source} runs a Python function, and what that computes cannot be known: nothing "
                "saved can be told apart from what another function would give"
            )
        if node.name not in CUSTOM_RULE:
            self.add_parameter(node.params, derivatives)
            return
        assert node.body is not None
        self.add_body(node.body, derivatives)
        if derivatives:
            self.add_body(node.derivative, derivatives - 1)

    def add_parameter(self, value: Any, derivatives: int) -> None:
        if isinstance(value, _compat.ClosedJaxpr | _compat.Jaxpr):
            self.add_body(body_of(value), derivatives)
        elif isinstance(value, Mapping):
            for name in sorted(value):
                self.add(name)
                self.add_parameter(value[name], derivatives)
        elif isinstance(value, tuple | list):
            self.add(len(value))
            for part in value:
                self.add_parameter(part, derivatives)
        elif isinstance(value, np.ndarray | jax.Array):
            self.add_array(value)
        else:
            self.add(ADDRESS.sub("", repr(value)))
