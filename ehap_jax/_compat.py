"""The only lines that touch ``jax.extend`` or private JAX modules, or that differ between JAX versions."""

from __future__ import annotations

from importlib import import_module

import jax
from jax._src import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "Var",
    "at_source",
    "bind",
    "enable_x64",
    "scan_operands",
    "source_line",
]


def source_line(eqn: JaxprEqn) -> str:
    """``file:line (function)`` of the user code that produced ``eqn``."""
    return source_info_util.summarize(eqn.source_info)


def at_source(eqn_info):
    """Context manager in which what is traced has the source of another equation, its ``source_info``."""
    return source_info_util.user_context(None if eqn_info is None else eqn_info.traceback)


def bind(primitive: Primitive, args, params) -> list:
    """Apply ``primitive`` with an equation's parameters; always returns a list of outputs."""
    out = primitive.bind(*args, **primitive.get_bind_params(params))
    return list(out) if primitive.multiple_results else [out]


def enable_x64(enabled: bool = True):
    """Context manager that switches 64-bit types on: public in newer JAX, experimental before."""
    make = getattr(jax, "enable_x64", None)
    if make is None:
        make = import_module("jax.experimental").enable_x64
    return make(enabled)


def scan_operands(params) -> tuple[int, int]:
    """Of a ``scan`` equation: where its operands stop being constants, and where they stop being carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, carry, _ = (len(list(part)) for part in params["ft_in"].unpack())
    return consts, consts + carry
