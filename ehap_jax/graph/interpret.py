"""What is known about each primitive, and evaluation of a graph with chosen operations replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ehap_jax import _compat
from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, SCAN, Body, Constant, Graph, Node, Value

Handler = Callable[[Node, list], "list | None"]


@dataclass(frozen=True)
class Rule:
    """What the library knows about one primitive; see "how to add a primitive rule" in CONTRIBUTING.md.

    propagate: ``(structure, node, input labels) -> output labels``, how channel labels move through it.
    resize: ``(node, args, kept_inputs, kept_outputs) -> outputs``, the same operation on smaller arrays; None where
        the primitive's parameters hold no sizes, so that it is simply applied.
    macs: ``(node, input shapes, output shapes) -> int`` multiply-accumulates; None for operations that are not counted.
    """

    propagate: Callable
    resize: Callable | None = None
    macs: Callable | None = None


RULES: dict[str, Rule] = {}


def register(*names: str, resize: Callable | None = None, macs: Callable | None = None):
    """Decorator: the decorated ``propagate`` function is the rule of the primitives ``names``."""

    def decorate(propagate):
        for name in names:
            if name in RULES:
                raise ValueError(f"primitive {name!r} already has a rule")
            RULES[name] = Rule(propagate, resize, macs)
        return propagate

    return decorate


def evaluate(body: Body, args: Sequence, handle: Handler, constants: dict[Value, Any] | None = None) -> list:
    """Run ``body`` on ``args``; ``handle(node, inputs)`` may return a node's outputs, or None to run it as it is.

    ``constants`` replaces arrays that the traced function closed over (default: as traced).
    """
    env: dict[Value, Any] = dict(zip(body.inputs, args, strict=True))
    env.update(body.constants if constants is None else constants)

    def read(operand):
        return operand.value if isinstance(operand, Constant) else env[operand]

    for node in body.nodes:
        inputs = [read(operand) for operand in node.inputs]
        with _compat.at_source(node.source_info):  # what is traced anew keeps the user's line
            outputs = handle(node, inputs)
            if outputs is None:
                outputs = _compat.bind(node.primitive, inputs, node.params)
        env.update(zip(node.outputs, outputs, strict=True))
    return [read(operand) for operand in body.outputs]


def evaluate_call(node: Node, args: Sequence, run: Callable, run_derivative: Callable) -> list:
    """A custom-derivative, checkpoint or scan call with its bodies evaluated anew, its meaning kept.

    ``run(body, args)`` evaluates the inside. custom_jvp and custom_vjp keep their derivative rule, evaluated by
    ``run_derivative(node, args)`` when it is asked for; checkpoint keeps its policy.
    """
    body = node.body
    assert body is not None
    if node.name in REMAT:
        call = jax.checkpoint(
            lambda *a: run(body, a), policy=node.params["policy"], prevent_cse=node.params["prevent_cse"]
        )
        return call(*args)
    if node.name == SCAN:
        return _scan(node, args, run)
    assert node.name in CUSTOM_RULE
    if node.name == "custom_jvp_call":
        call = jax.custom_jvp(lambda *a: run(body, a))

        def jvp(primals, tangents):
            outs = run_derivative(node, (*primals, *tangents))
            return outs[: len(node.outputs)], outs[len(node.outputs) :]

        call.defjvp(jvp)
        return call(*args)
    call = jax.custom_vjp(lambda *a: run(body, a))
    # The traced rule recomputes the forward pass from the inputs; under jit XLA shares it with the primal.
    call.defvjp(lambda *a: (run(body, a), a), lambda saved, cts: tuple(run_derivative(node, (*saved, *cts))))
    return call(*args)


def _scan(node: Node, args: Sequence, run: Callable) -> list:
    consts, carried = _compat.scan_operands(node.params)

    def step(carry, xs):
        outs = run(node.body, (*args[:consts], *carry, *xs))
        return tuple(outs[: len(carry)]), tuple(outs[len(carry) :])

    options = {name: node.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(step, tuple(args[consts:carried]), tuple(args[carried:]), **options)
    return [*carry, *ys]


def function_of(graph: Graph, handle: Handler) -> Callable:
    """``graph`` as a function of the same signature, ``handle`` deciding node by node what is run instead."""

    def run(variables, *args):
        outs = evaluate(graph.body, jax.tree.leaves((variables, *args)), handle)
        return jax.tree.unflatten(graph.output_tree, outs)

    return run
