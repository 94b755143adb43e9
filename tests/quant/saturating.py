"""ONNX Runtime's 8-bit kernel of processors that saturate, as a model in NumPy, and dense networks run with it."""

import numpy as np

from ehap_jax.quant.program import LayerStep, QuantizeStep


def exact_product(x, w):
    """``x @ w`` of integers, as every other processor sums it."""
    return x.astype(np.int32) @ w.astype(np.int32)


def saturating_product(x, w):
    """``x @ w`` of integers 0…255 (rows, k) and −128…127 (k, columns): VPMADDUBSW adds pairs along k in 16 bits."""
    odd = x.shape[1] % 2
    x, w = np.pad(x.astype(np.int32), ((0, 0), (0, odd))), np.pad(w.astype(np.int32), ((0, odd), (0, 0)))
    products = x[:, :, None] * w[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    return np.clip(pairs, np.iinfo(np.int16).min, np.iinfo(np.int16).max).sum(axis=1)


def run_dense(network, x, product):
    """(logits, {name: integers}) of an ``IntegerNetwork`` of dense layers (inputs, outputs) and ReLU, with ``product``.

    The kernel multiplies raw integers; their zero point times the sum of the weights is subtracted afterwards.
    """
    program = network.structure.program(x)
    (name,) = program.inputs
    tensors, real = {name: np.asarray(x)}, {}

    def rounded(steps, target):
        zero = target.out.grid.zero
        tensors[target.out.name] = np.clip(np.rint(steps) + np.float32(zero), target.low, target.high).astype(np.int32)

    for step in program.steps:
        match step:
            case QuantizeStep(source, target):
                rounded(tensors[source] / np.float32(target.out.grid.scale), target)
            case LayerStep(site, source, target):
                weights, kernel = network.layers[site.name], np.asarray(network.layers[site.name].kernel, np.int32)
                total = product(tensors[source.name], kernel) - source.grid.zero * kernel.sum(axis=0)
                total = (total + np.asarray(weights.bias)).astype(np.float32)
                if isinstance(target, str):
                    real[target] = total * np.asarray(network.multipliers[target])
                else:
                    rounded(total * np.asarray(network.multipliers[target.out.name]), target)
            case _:
                raise NotImplementedError(f"{step}: the model knows dense layers alone")
    (out,) = program.outputs
    return real[out], {name: tensors[integers.name] for name, integers in program.integers.items()}
