"""The integers that an INT8 network was trained to be: run in JAX, and as an ONNX file."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.data import normalise
from ehap_jax.quant import IntegerNetwork, onnx_session, save_onnx, to_integer, to_onnx
from recipes.int8 import Int8Network
from recipes.lab import Lab
from recipes.network import Network


def integer_network(lab: Lab, int8: Int8Network) -> IntegerNetwork:
    """The network in integers from the first rounding to the logits."""
    example = jnp.zeros((1, *lab.dataset.image_shape))
    return to_integer(int8.quantized, int8.variables["variables"], int8.variables["ranges"], example=example)


def run_integers(network: IntegerNetwork, x: jax.Array) -> jax.Array:
    """Logits; what `recipes.lab.accuracy` evaluates."""
    return network(x)


def int8_onnx(lab: Lab, seed: int, network: Network, int8: Int8Network, *, expose: bool = False) -> Any:
    """The same integers as an `onnx.ModelProto`, its quantised activations outputs, too, where they are exposed.

    Args:
        lab: where.
        seed: of the network, for the file's metadata.
        network: that was quantised; dense or shrunk.
        int8: what became of it.
        expose: see `to_onnx`.
    """
    weights, ranges = int8.variables["variables"], int8.variables["ranges"]
    return to_onnx(int8.quantized, weights, ranges, expose=expose, **_onnx_options(lab, seed, network))


def float_onnx(lab: Lab, seed: int, network: Network) -> Any:
    """A network in floating point as an `onnx.ModelProto`."""
    return to_onnx(network.apply, network.variables, **_onnx_options(lab, seed, network))


def test_inputs(lab: Lab, start: int, end: int) -> np.ndarray:
    """Normalised test images."""
    return np.asarray(normalise(jnp.asarray(lab.dataset.x_test[start:end]), lab.dataset.mean, lab.dataset.std))


def onnx_error(lab: Lab, model: Any, integers: IntegerNetwork, images: int = 256) -> float:
    """Largest difference between the logits of ONNX Runtime and of JAX on test images, relative to the largest logit.

    Args:
        lab: where.
        model: of `int8_onnx`.
        integers: the same network in JAX.
        images: how many test images at most.
    """
    x = test_inputs(lab, 0, images)
    (theirs,), ours = onnx_session(model).runtime.run(None, {"x": x}), jax.jit(run_integers)(integers, x)
    return float(np.abs(theirs - np.asarray(ours)).max() / np.abs(theirs).max())


def write_onnx(lab: Lab, model: Any, name: str) -> None:
    """Write a file of the run, in place of an earlier one."""
    path = lab.run.file(name)
    path.unlink(missing_ok=True)
    save_onnx(model, path)


def _onnx_options(lab: Lab, seed: int, network: Network) -> dict[str, Any]:
    return {
        "example": jax.ShapeDtypeStruct((1, *lab.dataset.image_shape), jnp.float32),
        "plan": network.plan,
        "metadata": {
            "seed": seed,
            "model": network.architecture.model,
            "normalisation": network.architecture.normalisation,
        },
        "dynamic_batch": True,
    }
