"""The same network as an ONNX file: QDQ for a quantised one, plain float32 for any other.

Every quantised layer is written as DequantizeLinear, operation, QuantizeLinear, which ONNX Runtime fuses into one
integer kernel; what only moves integers about is written on the integers themselves.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from ehap_jax.quant.fake_quant import Quantized
from ehap_jax.quant.integer import folded_kernel, to_integer
from ehap_jax.quant.observers import QState
from ehap_jax.quant.onnx_graph import Tensor
from ehap_jax.quant.onnx_steps import StepWriter, outputs_of
from ehap_jax.quant.program import FloatLayerStep, Program, lower
from ehap_jax.quant.roundings import prepare
from ehap_jax.quant.weights import evaluated_variables, value_of, variable_values

OPSET = 21
OLDEST_OPSET = 18  # of reductions whose axes are an input, and of BitwiseNot
OPSET_OF_16_BITS = 21
EXTERNAL_ABOVE = 2**31 - 2**20  # a protocol buffer holds less than 2 GiB

INLINE = 128  # bytes: the constants that shapes follow from stay in the file


class Plan(Protocol):
    """A pruning plan: something with a JSON document."""

    def document(self) -> dict[str, Any]: ...


def to_onnx(
    function: Quantized | Callable,
    variables,
    qstate: QState | None = None,
    *,
    example,
    plan: Plan | None = None,
    metadata: Mapping[str, Any] | None = None,
    dynamic_batch: bool = False,
    expose: bool = False,
    opset: int = OPSET,
):
    """``function`` as an ``onnx.ModelProto``: a quantised one as QDQ, any ``apply(variables, x)`` in floating point.

    Activations are uint8 with a zero point (int8 where the rule says symmetric), weights int8 per channel, biases int32
    at scale ``s_x · s_w``; ReLU is the saturation of QuantizeLinear, or a Clip of integers. ONNX Runtime then computes
    the integers of :func:`ehap_jax.quant.to_integer`, bit for bit, in the sessions of
    :func:`ehap_jax.quant.onnx_session`. Affine tails are folded in both forms. The input has the layout of ``example``.

    ``plan`` and ``metadata`` are stored as JSON in the file's metadata. ``dynamic_batch`` leaves the first axis of
    every input and output free. ``expose`` adds every quantised tensor as an output, under the names of
    ``IntegerNetwork.tensors`` and in JAX's layout.

    Raises ImportError without the ``onnx`` package; ValueError for an opset that is too old, a ``dynamic_batch`` that
    the network does not allow, and ranges that are not calibrated; NotImplementedError for a primitive without a rule
    (named) and for an operation between quantised layers that has no integer form.

    >>> import jax.numpy as jnp
    >>> model = to_onnx(lambda w, x: x @ w, jnp.ones((3, 2)), example=jnp.ones((1, 3)))
    >>> [node.op_type for node in model.graph.node]
    ['Gemm', 'Identity']
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("to_onnx needs the onnx package: pip install 'ehap-jax[onnx]'") from error
    newest = onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise ValueError(f"opset {opset} is too old; to_onnx needs {OLDEST_OPSET} at least.")
    if opset > newest:
        raise ValueError(f"opset {opset} is not known to the installed onnx package, whose newest is {newest}.")
    quantized = isinstance(function, Quantized)
    if quantized is (qstate is None):
        raise ValueError("a quantised function needs its ranges (qstate), and only a quantised function has any.")
    if quantized:
        assert qstate is not None
        export = _quantised_export(function, variables, qstate, expose, opset)
    else:
        export = _float_export(function, variables)
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), example)
    graph = export(example)
    if dynamic_batch:
        _check_dynamic(graph, export(jax.tree.map(_one_more, example)))
    return _model(graph, opset, dynamic_batch, _properties(plan, metadata))


def save_onnx(model, path: str | os.PathLike[str], *, external_above: int = EXTERNAL_ABOVE) -> Path:
    """Check ``model`` and write it, whole or not at all; nothing is overwritten.

    Weights of more than ``external_above`` bytes (a protocol buffer holds 2 GB) go to a second file, ``path.data``.

    Raises FileExistsError where a file exists, ``onnx.checker.ValidationError`` for an invalid model.
    """
    import onnx

    target = Path(path)
    beside = target.with_name(target.name + ".data")
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > external_above
    for file in (target, beside) if external else (target,):
        if file.exists():
            raise FileExistsError(f"{file} exists; remove it or save the model under another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / target.name
        if external:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            onnx.save_model(copy, str(written), save_as_external_data=True, location=beside.name, size_threshold=INLINE)
            onnx.checker.check_model(str(written), full_check=True)
            os.replace(Path(folder) / beside.name, beside)
        else:
            onnx.checker.check_model(model, full_check=True)
            onnx.save_model(model, str(written))
        os.replace(written, target)
    return target


@dataclass(frozen=True)
class _Graph:
    """Nodes and constants, with the tensors that come in and go out."""

    nodes: list[Any]
    constants: dict[str, np.ndarray]
    inputs: list[Tensor]
    outputs: list[Tensor]


def _graph(program: Program, writer: StepWriter, expose: bool) -> _Graph:
    results = outputs_of(program, writer)
    paths = program.network.graph.output_paths
    wanted = [(path or "y", tensor) for path, tensor in zip(paths, results, strict=True)]
    if expose:
        made = program.integers.items()
        wanted += [(name, writer.writer.in_order(writer.tensors[out.name])) for name, out in made]
    outputs = []
    for name, tensor in wanted:
        renamed = f"{name}/out" if expose else name
        writer.writer.node("Identity", [tensor.name], out=writer.writer.name(renamed))
        outputs.append(Tensor(renamed, tensor.shape, tensor.axes, tensor.dtype))
    inputs = [writer.tensors[name] for name in program.inputs]
    return _Graph(writer.writer.nodes, writer.writer.constants, inputs, outputs)


def _quantised_export(
    function: Quantized, variables, qstate: QState, expose: bool, opset: int
) -> Callable[[Any], _Graph]:
    network = None

    def export(example) -> _Graph:
        nonlocal network
        if network is None:
            network = to_integer(function, variables, qstate, example=example)
        program = network.structure.program(example)
        wide = [out for out in program.integers.values() if out.grid.dtype.itemsize > 1]
        if wide and opset < OPSET_OF_16_BITS:
            raise ValueError(
                f"opset {opset} is too old for the 16-bit integers of {wide[0].name}: {OPSET_OF_16_BITS} is not."
            )
        known = evaluated_variables(program.network, network.variables)
        layers = {
            name: (np.asarray(found.kernel), np.asarray(found.bias), np.asarray(found.scale))
            for name, found in network.layers.items()
        }
        folded = _folded(program, network.variables)
        return _graph(program, StepWriter(program, known, layers, folded), expose)

    return export


def _float_export(apply: Callable, variables) -> Callable[[Any], _Graph]:
    def export(example) -> _Graph:
        network = prepare(apply, (), variables, example)
        leaves = dict(zip(network.graph.leaves, jax.tree.leaves(variables), strict=True))
        known = evaluated_variables(network, leaves)
        program = lower(network, {}, known)
        return _graph(program, StepWriter(program, known, {}, _folded(program, leaves)), expose=False)

    return export


def _folded(program: Program, leaves: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kernel and bias of every layer in floating point, with its tail folded in."""
    sites = [step.site for step in program.steps if isinstance(step, FloatLayerStep)]

    def fold(leaves):
        known = variable_values(program.network, leaves)
        return {site.name: folded_kernel(site, lambda operand: value_of(operand, known)) for site in sites}

    return jax.device_get(jax.jit(fold)(dict(leaves)))


def _one_more(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((leaf.shape[0] + 1, *leaf.shape[1:]), leaf.dtype)


def _check_dynamic(graph: _Graph, larger: _Graph) -> None:
    """The nodes must be the same for one more example."""
    nodes = [[node.SerializeToString(deterministic=True) for node in found.nodes] for found in (graph, larger)]
    arrays = [{name: array.tobytes() for name, array in found.constants.items()} for found in (graph, larger)]
    if nodes[0] != nodes[1] or arrays[0] != arrays[1]:
        raise ValueError("the size of the batch is written into this network; export it with dynamic_batch=False.")


def _properties(plan: Plan | None, metadata: Mapping[str, Any] | None) -> dict[str, str]:
    found = {} if metadata is None else {name: json.dumps(value) for name, value in metadata.items()}
    if plan is not None:
        found["plan"] = json.dumps(plan.document())
    return found


def _model(graph: _Graph, opset: int, dynamic_batch: bool, properties: Mapping[str, str]):
    from onnx import checker, helper, numpy_helper

    from ehap_jax import __version__

    def described(tensor: Tensor):
        shape: list[int | str] = list(tensor.lies)
        if dynamic_batch:
            shape[0] = "batch"
        return helper.make_tensor_value_info(tensor.name, helper.np_dtype_to_tensor_dtype(tensor.dtype), shape)

    used = {name for node in graph.nodes for name in node.input}
    constants = [numpy_helper.from_array(array, name) for name, array in graph.constants.items() if name in used]
    made = helper.make_graph(
        graph.nodes, "ehap_jax", [described(v) for v in graph.inputs], [described(v) for v in graph.outputs], constants
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], producer_name="ehap_jax")
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    model.producer_version = __version__
    helper.set_model_props(model, dict(properties))
    if model.ByteSize() < EXTERNAL_ABOVE:
        checker.check_model(model, full_check=True)
    return model
