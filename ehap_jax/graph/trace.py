"""A pure function as data: its jaxpr, inlined, with every input leaf known by its pytree path.

``trace_graph(apply)(variables, x)`` traces ``apply`` and returns a :class:`Graph` of :class:`Node` and :class:`Value`.
Of its operations it runs only those that make the indices of a gather or scatter out of constants, and have no effects,
so that it is known which indices are meant. Nested ``jit`` calls are inlined. Calls that carry meaning of their own
(``custom_jvp``, ``custom_vjp``, ``checkpoint``, ``scan``) stay nodes, with their bodies traced in turn, so that a
rewriting can keep the derivative rule, the rematerialisation policy or the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ehap_jax import _compat
from ehap_jax._paths import path_name

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_lin"})
CUSTOM_RULE = frozenset({"custom_jvp_call", "custom_vjp_call"})
REMAT = frozenset({"checkpoint", "remat", "remat2"})
SCAN = "scan"
MOST_INDICES = 2**16  # of a gather or scatter that are computed while tracing


@dataclass(frozen=True, eq=False)
class Value:
    """One array of the graph; compared and hashed by identity."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True, eq=False)
class Constant:
    """A scalar written into the jaxpr."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.shape(self.value))

    @property
    def dtype(self):
        return jnp.asarray(self.value).dtype


Operand = Value | Constant


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: ``outputs = primitive(*inputs, **params)``.

    ``source`` is the user's line, of JAX's ``source_info``. ``body`` is the traced inside of a call, None elsewhere.
    ``effects`` are what it does beside computing its outputs, such as writing to a ref.
    """

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[Value, ...]
    source: str
    body: Body | None = None
    effects: Collection[Any] = ()
    source_info: Any = None

    @property
    def name(self) -> str:
        return self.primitive.name

    @cached_property
    def derivative(self) -> Body:
        """The rule of a custom_jvp or custom_vjp call, traced when first asked for (a rule may call itself).

        custom_jvp: inputs then tangents to outputs then output tangents. custom_vjp: inputs then cotangents to input
        cotangents.
        """
        primals = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.inputs)

        def call(*args):
            return _compat.bind(self.primitive, args, self.params)

        if self.name == "custom_jvp_call":
            tangents = tuple(jax.ShapeDtypeStruct(v.shape, _tangent_dtype(v.dtype)) for v in self.inputs)
            closed = jax.make_jaxpr(lambda p, t: jax.jvp(call, p, t))(primals, tangents)
        else:
            cotangents = [jax.ShapeDtypeStruct(v.shape, _tangent_dtype(v.dtype)) for v in self.outputs]
            closed = jax.make_jaxpr(lambda p, ct: jax.vjp(call, *p)[1](ct))(primals, cotangents)
        return _read(closed.jaxpr, closed.consts, self.source)


@dataclass(frozen=True, eq=False)
class Body:
    """A straight-line list of nodes. ``constants`` are arrays the traced function closed over."""

    inputs: tuple[Value, ...]
    constants: dict[Value, Any]
    nodes: tuple[Node, ...]
    outputs: tuple[Operand, ...]

    def walk(self) -> Iterator[Node]:
        """Every node, those inside calls (not inside derivative rules) after the call itself."""
        for node in self.nodes:
            yield node
            if node.body is not None:
                yield from node.body.walk()


@dataclass(frozen=True, eq=False)
class Graph:
    """The inlined jaxpr of ``apply(variables, *args)``.

    ``leaves`` maps the path of every array of ``variables`` to its :class:`Value`; ``arguments`` are the leaves of the
    other arguments, in order. ``output_paths`` are the paths of the output leaves. ``on_unknown`` says what
    :func:`channel_groups` does at a primitive without a rule.
    """

    body: Body
    leaves: dict[str, Value]
    arguments: tuple[Value, ...]
    output_paths: tuple[str, ...]
    output_tree: Any = field(repr=False)
    on_unknown: Literal["error", "freeze"] = "error"
    structures: dict[str, Any] = field(default_factory=dict, repr=False)  # what channel_structure derived

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Paths of the trained leaves: those under ``params/`` where there is such a collection, else all of them."""
        floating = [p for p, v in self.leaves.items() if jnp.issubdtype(v.dtype, jnp.floating)]
        trained = [p for p in floating if p.startswith("params/")]
        return tuple(trained or floating)

    def state_leaf(self, output_path: str, shape: tuple[int, ...]) -> str | None:
        """The variable that an output leaf is the updated value of, or None; see :func:`state_leaf`."""
        return state_leaf({path: value.shape for path, value in self.leaves.items()}, output_path, shape)


def state_leaf(variables: Mapping[str, tuple[int, ...]], output_path: str, shape: tuple[int, ...]) -> str | None:
    """Of variables with their shapes the one that an output leaf is the updated value of, or None.

    Networks in training mode return new running statistics beside the logits, as ``(y, {"batch_stats": …})``.
    An output leaf whose path ends in the whole path of a variable of the same shape is that variable's next value,
    if that path has a name in it: positions alone (``0/1``) identify nothing.
    """
    for path, own in variables.items():
        named = not all(part.isdigit() for part in path.split("/"))
        if named and own == shape and (output_path == path or output_path.endswith("/" + path)):
            return path
    return None


def trace_graph(apply: Callable, *, on_unknown: Literal["error", "freeze"] = "error") -> Callable[..., Graph]:
    """Turn ``apply(variables, *args)`` into a function of the same arguments that returns its :class:`Graph`.

    Arguments may be arrays or ``jax.ShapeDtypeStruct``; only their shapes and dtypes are read. Costs scale with the
    batch dimension of the traced input, so trace with a batch of one for per-image figures.

    >>> import jax, jax.numpy as jnp
    >>> graph = trace_graph(lambda w, x: jax.nn.relu(x @ w["kernel"]))({"kernel": jnp.ones((3, 4))}, jnp.ones((1, 3)))
    >>> list(graph.leaves)
    ['kernel']
    """
    if on_unknown not in ("error", "freeze"):
        raise ValueError(f'on_unknown must be "error" or "freeze", got {on_unknown!r}.')

    def traced(variables, *args) -> Graph:
        structs = jax.tree.map(_struct, (variables, *args))
        try:
            closed, out_shape = jax.make_jaxpr(apply, return_shape=True)(*structs)
        except NameError as error:
            if "unbound axis name" not in str(error):
                raise
            raise NameError(
                f"{error}: the function takes sums over a named axis (BatchNorm with axis_name=, for example). Call "
                "this where the axis is bound, inside jax.vmap(..., axis_name=), jax.pmap or jax.shard_map, or trace "
                "the evaluation function: its plan serves the training function, too."
            ) from None
        body = _read(closed.jaxpr, closed.consts)
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
        out_paths, out_tree = jax.tree_util.tree_flatten_with_path(out_shape)
        return Graph(
            body=body,
            leaves=dict(zip(paths, body.inputs[: len(paths)], strict=True)),
            arguments=body.inputs[len(paths) :],
            output_paths=tuple(path_name(path) for path, _ in out_paths),
            output_tree=out_tree,
            on_unknown=on_unknown,
        )

    return traced


def _struct(leaf) -> jax.ShapeDtypeStruct:
    if not all(isinstance(size, int | np.integer) for size in np.shape(leaf)):
        raise ValueError(
            f"an argument has the symbolic shape {np.shape(leaf)}; channels are followed at concrete sizes, so trace "
            "or export once per batch size."
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    dtype = getattr(leaf, "dtype", None)
    dtype = np.result_type(leaf) if dtype is None else dtype
    if not jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def body_of(jaxpr: _compat.ClosedJaxpr | _compat.Jaxpr, caller: str = "") -> Body:
    """A jaxpr from the parameters of an operation, the body of a loop for example, read by itself."""
    return _read(*_open(jaxpr), caller)


def _read(jaxpr: _compat.Jaxpr, consts, caller: str = "") -> Body:
    """A jaxpr as a :class:`Body` whose values are its own (JAX shares sub-jaxprs between call sites).

    ``caller`` is the line of the call: JAX's own functions may have no line of the user's inside.
    """
    inputs = tuple(_value(var) for var in jaxpr.invars)
    env: dict[_compat.Var, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
    read = _Read()
    _inline(jaxpr, consts, env, read, caller)
    return Body(inputs, read.constants, tuple(read.nodes), tuple(_operand(env, v) for v in jaxpr.outvars))


@dataclass(eq=False)
class _Read:
    """What has been read of a body.

    makers: the nodes, by output, whose results are the same at every call; in the order of the program. known: those
    results that were asked for, and the constants.
    """

    constants: dict[Value, Any] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    makers: dict[Operand, Node] = field(default_factory=dict)
    known: dict[Operand, Any] = field(default_factory=dict)

    def constant(self, value: Value, array) -> Value:
        self.constants[value] = array
        if _is_concrete(array):
            self.known[value] = array
        return value

    def append(self, node: Node) -> None:
        self.nodes.append(node)
        small = len(node.outputs) == 1 and prod(node.outputs[0].shape) <= MOST_INDICES
        if small and not node.effects and node.body is None and all(map(self._is_fixed, node.inputs)):
            self.makers[node.outputs[0]] = node

    def _is_fixed(self, operand: Operand) -> bool:
        return isinstance(operand, Constant) or operand in self.known or operand in self.makers

    def computed_now(self, operand: Operand) -> Operand:
        """What depends on constants alone as a constant array; anything else as it is."""
        if not self._is_fixed(operand):
            return operand
        needed: set[Operand] = set()
        waiting = [operand]
        while waiting:
            value = waiting.pop()
            if value in self.makers and value not in needed:
                needed.add(value)
                waiting.extend(self.makers[value].inputs)
        with jax.ensure_compile_time_eval():
            for value in [value for value in self.makers if value in needed]:
                node = self.makers.pop(value)
                (self.known[value],) = _compat.bind(node.primitive, [self._array(v) for v in node.inputs], node.params)
        return self.constant(Value(operand.shape, operand.dtype), np.asarray(self._array(operand)))

    def _array(self, operand: Operand):
        return operand.value if isinstance(operand, Constant) else self.known[operand]


def _inline(jaxpr: _compat.Jaxpr, consts, env, read: _Read, caller: str) -> None:
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        scalar = np.ndim(const) == 0 and _is_concrete(const)
        env[var] = Constant(const) if scalar else read.constant(_value(var), const)
    for eqn in jaxpr.eqns:
        source = _compat.source_line(eqn) or caller
        inputs = tuple(_operand(env, v) for v in eqn.invars)
        if eqn.primitive.name in INLINED:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            inner, inner_consts = _open(inner)
            inner_env = dict(zip(inner.invars, inputs, strict=True))
            _inline(inner, inner_consts, inner_env, read, source)
            env.update(zip(eqn.outvars, (_operand(inner_env, v) for v in inner.outvars), strict=True))
            continue
        if eqn.primitive.name == "convert_element_type" and isinstance(inputs[0], Constant):
            env[eqn.outvars[0]] = Constant(np.asarray(inputs[0].value).astype(eqn.params["new_dtype"]))
            continue
        if eqn.primitive.name == "gather" or eqn.primitive.name.startswith("scatter"):
            inputs = (inputs[0], read.computed_now(inputs[1]), *inputs[2:])
        outputs = tuple(_value(var) for var in eqn.outvars)
        env.update(zip(eqn.outvars, outputs, strict=True))
        node = Node(
            primitive=eqn.primitive,
            params=eqn.params,
            inputs=inputs,
            outputs=outputs,
            source=source,
            body=_call_body(eqn, source),
            effects=eqn.effects,
            source_info=eqn.source_info,
        )
        read.append(node)


def _call_body(eqn: _compat.JaxprEqn, source: str) -> Body | None:
    if eqn.primitive.name in CUSTOM_RULE:
        return body_of(eqn.params["call_jaxpr"], source)
    if eqn.primitive.name in REMAT or eqn.primitive.name == SCAN:
        return body_of(eqn.params["jaxpr"], source)
    return None


def _tangent_dtype(dtype):
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jax.dtypes.float0


def _open(jaxpr) -> tuple[_compat.Jaxpr, list]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, _compat.ClosedJaxpr) else (jaxpr, [])


def _value(var) -> Value:
    return Value(tuple(var.aval.shape), var.aval.dtype)


def _operand(env, var) -> Operand:
    return Constant(var.val) if isinstance(var, _compat.Literal) else env[var]


def _is_concrete(const) -> bool:
    return not isinstance(const, Tracer)
