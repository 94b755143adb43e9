"""The quantised network as a list of steps on integers, which JAX executes and ONNX writes down.

A step's operands are names: of integer tensors (``Integers``: a name and its grid) or of real ones. Everything between
the first rounding and the last layer is a step on integers; the rest, before and after, is a step on real numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, Constant, Node, Operand, Value
from ehap_jax.quant.fold import Site
from ehap_jax.quant.residual import SUMS
from ehap_jax.quant.roundings import JOINS, REARRANGEMENTS, Network, Pool, Rounding, Scale, bounds
from ehap_jax.quant.rules import skipping


@dataclass(frozen=True)
class IntegerGrid:
    """The numbers ``(q − zero) · scale`` for integers ``low ≤ q ≤ high``; ``scale`` is a float32."""

    scale: float
    zero: int
    low: int
    high: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds the integers."""
        types = (np.uint8, np.int8, np.uint16, np.int16, np.int32)
        return next(np.dtype(t) for t in types if np.iinfo(t).min <= self.low and self.high <= np.iinfo(t).max)

    @property
    def stored_offset(self) -> int:
        """What is subtracted from the integers to store them: 128 for unsigned ones of up to 8 bits, as int8."""
        return 128 if self.dtype == np.uint8 else 0

    def integer(self, real: float) -> int:
        """The integer of one number."""
        return int(self.integers(real))

    def integers(self, real) -> np.ndarray:
        """The integers of an array, int32."""
        steps = np.rint(np.clip(np.asarray(real, np.float32) / np.float32(self.scale), -(2.0**30), 2.0**30))
        return np.clip(steps + self.zero, self.low, self.high).astype(np.int32)


@dataclass(frozen=True)
class Integers:
    """An integer tensor of the program."""

    name: str
    grid: IntegerGrid
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """Where a step rounds to. low, high: the integers its result is clipped to (a ReLU raises ``low`` to the zero)."""

    out: Integers
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class QuantizeStep:
    source: str
    target: Target


@dataclass(frozen=True, eq=False)
class DequantizeStep:
    """Integers as the real numbers they stand for, in the ``dtype`` that the function has there."""

    source: Integers
    out: str
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class LayerStep:
    """A conv or dense layer with its tail.

    ``target`` is the name of a real tensor, of the dtype of ``site.result``, where nothing rounds the result.
    """

    site: Site
    source: Integers
    target: Target | str


@dataclass(frozen=True, eq=False)
class ScaleStep:
    scale: Scale
    name: str
    source: Integers
    target: Target


@dataclass(frozen=True, eq=False)
class AddStep:
    """``a + b``, or ``a − b``."""

    a: Integers
    b: Integers
    subtract: bool
    target: Target


@dataclass(frozen=True, eq=False)
class PoolStep:
    pool: Pool
    source: Integers
    target: Target


@dataclass(frozen=True, eq=False)
class MoveStep:
    """A rearrangement or maximum of integers on one grid.

    operands: the node's, ``Integers`` or arrays known by now: the indices of a gather, or int32 integers of the grid.
    """

    node: Node
    operands: tuple[Integers | np.ndarray, ...]
    out: Integers


@dataclass(frozen=True, eq=False)
class ClipStep:
    source: Integers
    target: Target


@dataclass(frozen=True, eq=False)
class RequantizeStep:
    """From one grid to another."""

    source: Integers
    target: Target


@dataclass(frozen=True, eq=False)
class FloatLayerStep:
    """A layer that a rule leaves in floating point, with its tail."""

    site: Site
    source: str
    out: str


@dataclass(frozen=True, eq=False)
class FloatStep:
    """Any other operation. operands: names of real tensors, or values that depend on variables alone."""

    node: Node
    operands: tuple[str | Operand, ...]
    outs: tuple[str, ...]


Step = (
    QuantizeStep | DequantizeStep | LayerStep | ScaleStep | AddStep | PoolStep | MoveStep | ClipStep | RequantizeStep
    | FloatLayerStep | FloatStep
)  # fmt: skip


def integers_made(step: Step) -> Integers | None:
    """The integer tensor that a step makes, if it makes one."""
    if isinstance(step, MoveStep):
        return step.out
    target = getattr(step, "target", None)
    return target.out if isinstance(target, Target) else None


@dataclass(frozen=True, eq=False)
class Program:
    """inputs: names of the network's arguments. outputs: of its results, or values that depend on variables alone.

    same: the integers of a range whose values needed no step of their own, being another range's.
    """

    network: Network
    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str | Operand, ...]
    same: Mapping[str, Integers]

    @property
    def integers(self) -> dict[str, Integers]:
        """Every integer tensor by name; those of a range are named after it."""
        return {out.name: out for out in map(integers_made, self.steps) if out is not None} | dict(self.same)


def lower(network: Network, grids: Mapping[str, IntegerGrid], static: Mapping[Value, np.ndarray]) -> Program:
    """The steps of a quantised network; ``grids`` by range, ``static`` the values that depend on no data or variable.

    Raises NotImplementedError for an operation between quantised layers that has no integer form.
    """
    return _Lowering(network, grids, static).program()


class _Lowering:
    def __init__(self, network: Network, grids: Mapping[str, IntegerGrid], static: Mapping[Value, np.ndarray]) -> None:
        self.network, self.grids, self.static = network, grids, static
        self.made_by: dict[Value, Node] = {}
        self.alias: dict[Value, Operand] = {}
        for node in network.graph.body.walk():
            self.made_by.update({out: node for out in node.outputs})
            if node.body is not None and node.name in REMAT | CUSTOM_RULE:
                self.alias.update(zip(node.body.inputs, node.inputs, strict=True))
                self.alias.update(zip(node.outputs, node.body.outputs, strict=True))
        self.results = {site.result: site for site in network.sites.by_node.values()}
        self.steps: list[Step] = []
        self.names: set[str] = set()
        self.same: dict[str, Integers] = {}
        self.on_grid: dict[tuple[Value, str], Integers] = {}
        self.moved: dict[Value, Integers] = {}
        self.reals: dict[Value, str] = {}
        self.raws: dict[Value, str] = {}
        self.tainted: dict[Value, bool] = {}

    def program(self) -> Program:
        arguments = self.network.graph.arguments
        inputs = tuple(self.name("x" if len(arguments) == 1 else f"x{i}") for i in range(len(arguments)))
        self.raws.update(zip(arguments, inputs, strict=True))
        for node in self.network.graph.body.walk():  # in order, so that no recursion is deep
            for out in node.outputs:
                if out in self.network.made:
                    self.rounded(out)
        outputs = tuple(self.real_operand(v) for v in self.network.graph.body.outputs)
        return Program(self.network, inputs, tuple(self.steps), outputs, self.same)

    def name(self, wanted: str) -> str:
        name, number = wanted, 2
        while name in self.names:
            name, number = f"{wanted}.{number}", number + 1
        self.names.add(name)
        return name

    # Integers

    def rounded(self, value: Value) -> Integers:
        """A value with a rounding of its own, on its grid."""
        return self.round(value, self.network.made[value][0])

    def round(self, value: Value, rounding: Rounding) -> Integers:
        name = self.network.names[rounding]
        if (value, name) not in self.on_grid:
            found = self.integer(value, self.grids[name], name, -inf, inf)
            self.on_grid[value, name] = found
            if name not in self.names:  # the integers of another range, which happen to be the same ones
                self.same[self.name(name)] = found
        return self.on_grid[value, name]

    def input_of(self, node: Node, position: int) -> Integers:
        """What a node reads as integers."""
        if (node, position) in self.network.own:
            rounding = self.network.own[node, position][0]
            return self.round(rounding.value, rounding)
        operand = node.inputs[position]
        assert isinstance(operand, Value)
        return self.read(operand)

    def read(self, value: Value) -> Integers:
        """A rounded value, or a rearrangement of one."""
        if value in self.network.made:
            return self.rounded(value)
        if value not in self.moved:
            node = self.made_by[value]
            source = node.inputs[0]
            assert isinstance(source, Value) and node.name in REARRANGEMENTS
            integers = self.read(source)
            self.moved[value] = self.move(node, value, {0: integers}, f"{integers.name}/{node.name}")
        return self.moved[value]

    def integer(self, value: Value, grid: IntegerGrid, name: str, low: float, high: float) -> Integers:
        """``value``, clipped to the real numbers ``[low, high]``, on ``grid``."""
        node, network = self.made_by.get(value), self.network

        def target() -> Target:
            out = Integers(self.name(name), grid, value.shape)
            return Target(out, max(grid.low, grid.integer(low)), min(grid.high, grid.integer(high)))

        def operand(source: Operand, named: str = name) -> Integers:
            assert isinstance(source, Value)
            if source in network.made:
                return self.convert(self.rounded(source), grid, named, low, high)
            return self.integer(source, grid, named, low, high)

        if node is not None and value in self.results and self.results[value].node in network.layers:
            site = self.results[value]
            return self.emit(LayerStep(site, self.input_of(site.node, 1 - site.kernel_operand), target()))
        if node is not None and node in network.sums:
            a, b = self.input_of(node, 0), self.input_of(node, 1)
            return self.emit(AddStep(a, b, node.name == "sub", target()))
        if value in network.pools:
            pool = network.pools[value]
            return self.emit(PoolStep(pool, self.input_of(pool.reduce, 0), target()))
        if value in network.scales:
            scale = network.scales[value]
            first = scale.steps[0].node
            source = self.input_of(first, first.inputs.index(scale.base))
            return self.emit(ScaleStep(scale, f"{name}/scale", source, target()))
        if node is not None and (clip := bounds(node)) is not None and clip[0] not in network.sites.sources:
            low, high = min(max(clip[1], low), high), min(max(clip[2], low), high)
            return operand(clip[0])
        if node is not None and node.name in REARRANGEMENTS | JOINS:
            data = {i: v for i, v in enumerate(node.inputs) if isinstance(v, Value) and v not in network.sites.sources}
            if any(self.is_tainted(v) for v in data.values()) and (len(data) == 1 or node.name in JOINS):
                fill = node.params["fill_value"] if node.name == "gather" else None
                if fill is not None and (fill < low or fill > high):  # what it fills with is clipped after it
                    unclipped = self.integer(value, grid, f"{name}/gather", -inf, inf)
                    return self.emit(ClipStep(unclipped, target()))
                operands = {i: operand(v, f"{name}/{node.name}{i if len(data) > 1 else ''}") for i, v in data.items()}
                return self.move(node, value, operands, name, low, high)
        if value in self.alias:
            return operand(self.alias[value])
        if self.is_tainted(value):
            assert node is not None
            raise NotImplementedError(
                f"{node.name} at {node.source} stands between quantised layers and has no integer form. Leave the "
                f"layer that reads it in floating point with {self.skipping_reader(name)} before the other rules"
                + (", or give residual_bits=8 to the layers it adds." if self.is_unrounded_sum(node) else ".")
            )
        return self.emit(QuantizeStep(self.raw(value), target()))

    def convert(self, source: Integers, grid: IntegerGrid, name: str, low: float, high: float) -> Integers:
        lowest, highest = max(grid.low, grid.integer(low)), min(grid.high, grid.integer(high))
        if source.grid == grid and (lowest, highest) == (grid.low, grid.high):
            return source
        target = Target(Integers(self.name(name), grid, source.shape), lowest, highest)
        if source.grid == grid:
            return self.emit(ClipStep(source, target))
        return self.emit(RequantizeStep(source, target))

    def move(
        self,
        node: Node,
        value: Value,
        data: Mapping[int, Integers],
        name: str,
        low: float = -inf,
        high: float = inf,
    ) -> Integers:
        """A rearrangement of ``data``, by operand; numbers that it adds are clipped to ``[low, high]``."""
        (source, *_) = data.values()
        operands: list[Integers | np.ndarray] = []
        for position, operand in enumerate(node.inputs):
            if position in data:
                operands.append(data[position])
            elif isinstance(operand, Constant) or operand in self.static:
                known = operand.value if isinstance(operand, Constant) else self.static[operand]
                if node.name != "gather":  # numbers beside those of the data
                    known = source.grid.integers(np.clip(np.asarray(known, np.float32), low, high))
                operands.append(np.asarray(known))
            else:
                what = "by indices" if node.name == "gather" else "with numbers"
                raise NotImplementedError(
                    f"{node.name} at {node.source} rearranges quantised values {what} that depend on variables. Leave "
                    f"the layer that reads it in floating point with {self.skipping_reader(name)}."
                )
        out = Integers(self.name(name), source.grid, value.shape)
        self.steps.append(MoveStep(node, tuple(operands), out))
        return out

    def emit(self, step: Any) -> Integers:
        self.steps.append(step)
        return step.target.out

    def is_tainted(self, operand: Operand) -> bool:
        """Whether a value was computed from quantised layers, with none in between that a rule left out."""
        if not isinstance(operand, Value) or operand in self.network.sites.sources:
            return False
        if operand not in self.tainted:
            node = self.made_by.get(operand)
            site = self.results.get(operand)
            if site is not None:
                known = site.node in self.network.layers
            elif operand in self.alias:
                known = self.is_tainted(self.alias[operand])
            else:
                known = node is not None and any(self.is_tainted(v) for v in node.inputs)
            self.tainted[operand] = known
        return self.tainted[operand]

    def skipping_reader(self, name: str) -> str:
        """The rule that leaves the layer for which a tensor is made in floating point."""
        return skipping(self.network.reader(name))

    def is_unrounded_sum(self, node: Node) -> bool:
        """Whether a rule without ``residual_bits`` may be why a node has no integer form."""
        branches = [v for v in node.inputs if isinstance(v, Value) and v not in self.network.sites.sources]
        rules = self.network.rules.values()
        return node.name in SUMS and len(branches) == 2 and any(rule.residual_bits is None for rule in rules)

    # Real numbers

    def real_operand(self, operand: Operand) -> str | Operand:
        if isinstance(operand, Constant) or operand in self.network.sites.sources:
            return operand
        return self.real(operand)

    def real(self, value: Value) -> str:
        """The name of a value as real numbers, rounded if it is."""
        if value not in self.network.made:
            return self.raw(value)
        if value not in self.reals:
            integers = self.rounded(value)
            self.reals[value] = self.name(f"{self.network.names[self.network.made[value][0]]}/real")
            self.steps.append(DequantizeStep(integers, self.reals[value], np.dtype(value.dtype)))
        return self.reals[value]

    def raw(self, value: Value) -> str:
        """The name of a value as real numbers, before any rounding of it."""
        if value in self.raws:
            return self.raws[value]
        node, site = self.made_by.get(value), self.results.get(value)
        if site is not None and site.node in self.network.layers:
            source = self.input_of(site.node, 1 - site.kernel_operand)
            self.raws[value] = self.name(f"{site.name}/real")
            self.steps.append(LayerStep(site, source, self.raws[value]))
        elif site is not None:
            source = self.real_operand(site.activation)
            assert isinstance(source, str)
            self.raws[value] = self.name(site.name)
            self.steps.append(FloatLayerStep(site, source, self.raws[value]))
        elif value in self.alias:
            inner = self.alias[value]
            assert isinstance(inner, Value), "a call whose result is a constant depends on no data"
            self.raws[value] = self.real(inner)
        else:
            assert node is not None
            operands = tuple(self.real_operand(v) for v in node.inputs)
            outs = tuple(self.name(node.name) for _ in node.outputs)
            self.raws.update(zip(node.outputs, outs, strict=True))
            self.steps.append(FloatStep(node, operands, outs))
        return self.raws[value]
