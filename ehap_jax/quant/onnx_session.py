"""ONNX Runtime sessions whose integers are right on this processor.

On x86 processors without VNNI, ONNX Runtime multiplies 8-bit activations with 8-bit weights by VPMADDUBSW, which adds
two products in 16 bits and saturates: 2 · 255 · 127 = 64,770 becomes 32,767. Signed activations take the same path.
Weights of 7 bits cannot reach the limit. For others ONNX Runtime has an option that makes the weights unsigned, whose
products it adds in 32 bits. Whether a processor saturates is measured on a tiny model, not looked up in a list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

PRECISE = "session.x64quantprecision"
"""ONNX Runtime's option for 8-bit weights on processors that saturate; without effect on others."""

LARGEST_SAFE_WEIGHT = 64
"""2 · 255 · 64 is below 2¹⁵, 2 · 255 · 65 is not."""

CPU = ("CPUExecutionProvider",)


class OnnxSession(NamedTuple):
    """A session, and how it was made.

    runtime: the ``onnxruntime.InferenceSession``. saturates: whether the processor adds pairs of 8-bit products in 16
    bits. precise: whether ONNX Runtime's option was set. choice: the same in words.
    """

    runtime: Any
    saturates: bool
    precise: bool
    choice: str

    def document(self) -> dict[str, Any]:
        """What a result file says about it."""
        return {"int8_saturates": self.saturates, "onnx_session": self.choice}


def onnx_session(model, *, options=None, providers: Sequence[str] = CPU, saturates: bool | None = None) -> OnnxSession:
    """An ONNX Runtime session that computes the integers which ``model`` says, on any processor.

    It has ``session.x64quantprecision=1`` where the processor saturates and the file has weights that could.

    Args:
        model: an ``onnx.ModelProto``, or the path of a file, such as :func:`ehap_jax.quant.save_onnx` writes.
        options: ``onnxruntime.SessionOptions``; the option above is set in it.
        providers: ONNX Runtime's execution providers.
        saturates: whether the processor does; measured by :func:`sums_saturate` where it is None.

    Raises:
        ImportError: without the packages ``onnx`` and ``onnxruntime``.
        RuntimeError: sums of this processor saturate with the option, too.
        ValueError: the option is needed, and cannot be applied since weights or zero points in the file share a tensor.

    >>> import jax.numpy as jnp
    >>> from ehap_jax import to_onnx
    >>> model = to_onnx(lambda w, x: x @ w, jnp.ones((3, 2)), example=jnp.ones((1, 3)))
    >>> onnx_session(model).choice
    'default options: the file has no int8 weights'
    """
    onnx, runtime = _packages()
    if isinstance(model, str | os.PathLike):
        source, model = os.fspath(model), onnx.load(os.fspath(model))
    else:
        source = model.SerializeToString()
    options = runtime.SessionOptions() if options is None else options
    providers, largest = tuple(providers), largest_weight(model)
    if saturates is None:
        saturates = sums_saturate(providers)
        if saturates and largest > LARGEST_SAFE_WEIGHT and sums_saturate(providers, precise=True):
            raise RuntimeError(
                f"ONNX Runtime's sums of 8-bit products saturate on this processor, with {PRECISE}=1, too; quantise "
                "with QuantRule(weight_bits=7), whose sums cannot."
            )
    precise, reason = _choose(saturates, largest)
    if precise:
        options.add_session_config_entry(PRECISE, "1")
    try:
        made = runtime.InferenceSession(source, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's exceptions have no public base
        if not precise or "replace the existing tensor" not in str(error):
            raise
        raise ValueError(
            f"this processor needs {PRECISE}=1, and ONNX Runtime cannot apply it: weights or zero points in the file "
            "share a tensor. Export it again with to_onnx, which gives every weight its own, or with weights of 7 bits."
        ) from error
    return OnnxSession(made, saturates, precise, reason)


def _choose(saturates: bool, largest: int) -> tuple[bool, str]:
    """Whether the option is set, and why, for the largest weight of a file."""
    if largest == 0:
        return False, "default options: the file has no int8 weights"
    if largest <= LARGEST_SAFE_WEIGHT:
        return False, f"default options: weights of at most {largest} saturate on no processor"
    if saturates:
        return True, f"{PRECISE}=1: sums of 8-bit products saturate on this processor"
    return False, "default options: sums of 8-bit products do not saturate on this processor"


def largest_weight(model) -> int:
    """The largest magnitude of an int8 weight in an ``onnx.ModelProto``; 0 for none.

    Weights are the constants with two axes at least. Those that the file stores in floating point and rounds itself
    count as 128.
    """
    from onnx import TensorProto, numpy_helper

    constants = dict(_constants(model.graph))
    if any(node.op_type == "QuantizeLinear" and node.input[0] in constants for node in model.graph.node):
        return 128
    weights = [one for one in constants.values() if one.data_type == TensorProto.INT8 and len(one.dims) > 1]
    return max((int(np.abs(numpy_helper.to_array(one).astype(np.int16)).max(initial=0)) for one in weights), default=0)


def _constants(graph) -> Iterator[tuple[str, Any]]:
    """Name and tensor of every constant of a graph and of the graphs in its nodes."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield node.output[0], attribute.t
            if attribute.HasField("g"):
                yield from _constants(attribute.g)


@cache
def sums_saturate(providers: tuple[str, ...] = CPU, *, precise: bool = False) -> bool:
    """Whether ONNX Runtime adds pairs of 8-bit products in 16 bits here, measured once on two small layers.

    precise: with the option that prevents it. Raises ImportError without the packages ``onnx`` and ``onnxruntime``.
    """
    _, runtime = _packages()
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry(PRECISE, str(int(precise)))
    session = runtime.InferenceSession(_probe().SerializeToString(), options, providers=list(providers))
    found = session.run(None, {"x": np.ones((1, PROBE_CHANNELS, 1, 1), np.float32)})
    return any((y < 0.99 * PROBE_CHANNELS).any() for y in found)


PROBE_CHANNELS = 16


def _probe():
    """A 1×1 convolution and a dense layer, by themselves: the sum of 16 ones, each 255/255 · 127/127 in integers."""
    from onnx import TensorProto, helper, numpy_helper

    n = PROBE_CHANNELS
    kernel = np.full((n, n), 127, np.int8)
    arrays = {
        "step": np.float32(1 / 255),
        "zero": np.uint8(0),
        "wide": np.float32(n / 255),
        "steps": np.full(n, 1 / 127, np.float32),
        "rows": np.array([1, n]),
        "conv/kernel": kernel.reshape(n, n, 1, 1),
        "dense/kernel": kernel,
        **{f"{name}/zeros": np.zeros(n, np.int8) for name in ("conv", "dense")},
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["integers"]),
        helper.make_node("Reshape", ["integers", "rows"], ["row"]),
    ]
    for name, op, source, axis in (("conv", "Conv", "integers", 0), ("dense", "Gemm", "row", 1)):
        nodes += [
            helper.make_node("DequantizeLinear", [source, "step", "zero"], [f"{name}/x"]),
            helper.make_node(
                "DequantizeLinear", [f"{name}/kernel", "steps", f"{name}/zeros"], [f"{name}/w"], axis=axis
            ),
            helper.make_node(op, [f"{name}/x", f"{name}/w"], [f"{name}/y"]),
            helper.make_node("QuantizeLinear", [f"{name}/y", "wide", "zero"], [f"{name}/q"]),
            helper.make_node("DequantizeLinear", [f"{name}/q", "wide", "zero"], [name]),
        ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, n, 1, 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("conv", "dense")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    return model


def _packages():
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX Runtime sessions need: pip install 'ehap-jax[onnx]'") from error
    return onnx, onnxruntime
