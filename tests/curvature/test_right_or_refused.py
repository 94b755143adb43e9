"""Drawn losses on small networks: every trace is that of the dense float64 Hessian within its error, or refused.

A structure is a model, a loss and options, and is compiled once; weights, masks, decay, labels and data are drawn.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import (
    channel_trace,
    gauss_newton_trace,
    probe_channel_products,
    softmax_cross_entropy,
    weighted,
)
from ehap_jax.graph import trace_graph
from tests.curvature.dense_hessians import DOUBLE

pytestmark = pytest.mark.slow

DRAWS = 56
EXAMPLES, INPUTS, HIDDEN, CLASSES = 8, 4, 4, 3
SQUARE = {"a": (INPUTS, HIDDEN), "b": (HIDDEN, CLASSES)}

ERRORS = 9
"""Standard errors from 24 probes: Student's t is beyond this once in 10^8."""


def relu(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def transposed(p, x):
    """Square kernels stored (out, in)."""
    return jax.nn.relu(x @ p["a"].T) @ p["b"]


def gelu(p, x):
    return jax.nn.gelu(x @ p["a"]) @ p["b"]


@jax.custom_vjp
def reversed_gradient(h):
    return h


reversed_gradient.defvjp(lambda h: (h, None), lambda _, g: (-g,))


def adversarial(p, x):
    return reversed_gradient(jax.nn.relu(x @ p["a"])) @ p["b"]


def each(model, p, batch):
    z = jax.nn.log_softmax(model(p, batch["x"]))
    return -jnp.take_along_axis(z, jnp.maximum(batch["label"], 0)[:, None], 1)[:, 0]


def decayed(model, p, batch):
    return each(model, p, batch).mean() + p["decay"] * ((p["a"] ** 2).sum() + jnp.linalg.norm(p["b"].ravel()) ** 2)


def entangled(model, p, batch):
    """A penalty with a Hessian that is not diagonal."""
    return each(model, p, batch).mean() + p["decay"] * ((p["a"] ** 2).sum() * (p["b"] ** 2).sum())


def masked(model, p, batch):
    valid = (batch["label"] >= 0).astype(batch["x"].dtype)
    return (each(model, p, batch) * valid).sum() / jnp.maximum(valid.sum(), 1)


def weighed(model, p, batch):
    return (each(model, p, batch) * batch["weight"]).sum() / batch["weight"].sum()


def hidden_weights(model, p, batch):
    """Weights under a name that no head reads."""
    return (each(model, p, batch) * batch["importance"]).mean()


def smoothed(model, p, batch):
    z = jax.nn.log_softmax(model(p, batch["x"]))
    return 0.9 * each(model, p, batch).mean() - 0.1 * z.mean(1).mean()


@dataclass(frozen=True)
class Structure:
    model: Callable
    loss: Callable
    head: Any = softmax_cross_entropy
    microbatch: int | None = None
    axes: tuple[int, int] = (1, 1)
    exact: bool = False  # by gauss_newton_trace too

    def draw(self, rng):
        normal = lambda *shape: rng.normal(size=shape).astype(np.float64)  # noqa: E731
        params = {path: normal(*shape) for path, shape in SQUARE.items()}
        params["decay"] = np.float64(rng.choice([0.0, 1e-4, 1e-2]))
        label = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)
        padding = np.arange(EXAMPLES) >= EXAMPLES - rng.choice([0, 0, 2, 3])
        weight = np.where(padding, 0, rng.choice([1.0, rng.uniform(0.5, 2)], EXAMPLES)).astype(np.float64)
        batch = {"x": 2 * normal(EXAMPLES, INPUTS)}
        if self.loss is masked or self.loss is weighed:
            label = np.where(padding, -1, label).astype(np.int32)
        if self.loss is weighed:
            batch["weight"] = weight
        if self.loss is hidden_weights:
            batch["importance"] = np.where(rng.random() < 0.5, 1, weight).astype(np.float64)
        return params, batch | {"label": label}


STRUCTURES = {
    "decay": Structure(relu, decayed),
    "entangled": Structure(relu, entangled),
    "weights": Structure(transposed, weighed, weighted(softmax_cross_entropy), axes=(0, 1), exact=True),
    "padding, cut": Structure(relu, masked, microbatch=3),
    "padding": Structure(transposed, masked, axes=(0, 1)),
    "weights unknown to the head": Structure(relu, hidden_weights),
    "smoothed": Structure(relu, smoothed),
    "smooth network": Structure(gelu, decayed),
    "adversarial": Structure(adversarial, decayed),
}


@pytest.fixture(autouse=True)
def in_float64():
    with enable_x64():
        yield


@pytest.mark.parametrize("name", STRUCTURES)
def test_right_or_refused(name):
    structure = STRUCTURES[name]
    loss = partial(structure.loss, structure.model)
    rng = np.random.default_rng(sorted(STRUCTURES).index(name))
    drawn = [structure.draw(rng) for _ in range(DRAWS)]
    graph = trace_graph(structure.model)(drawn[0][0], drawn[0][1]["x"])
    options = {"graph": graph, "microbatch": structure.microbatch, "policy": DOUBLE}
    hessians = dense(loss, drawn)
    outcomes: Counter[str] = Counter()
    for number, (params, batch) in enumerate(drawn):
        given, key = (params, batch), jax.random.key(number)
        for method in ["probes", "auto", *["exact"] * structure.exact]:
            try:
                if method == "probes":
                    v = {path: rng.choice([-1.0, 1.0], shape).astype(np.float64) for path, shape in SQUARE.items()}
                    v["decay"] = params["decay"]
                    found = probe_channel_products(loss, params, v, batch, **options)
                    error = dict.fromkeys(SQUARE, 0.0)
                elif method == "auto":
                    found = channel_trace(
                        loss, *given, key=key, num_probes=24, probes_per_step=24, method="auto",
                        model=structure.model, head=structure.head, **options,
                    )  # fmt: skip
                    assert found.axes == {path: (axis,) for path, axis in zip(SQUARE, structure.axes, strict=True)}
                    outcomes.update(found.methods().values())
                    found, error = found.mean, found.sem
                else:
                    found = gauss_newton_trace(structure.model, *given, head=structure.head, **options)
                    found, error = found.mean, found.sem
            except ValueError:
                outcomes["refused"] += 1
                continue
            outcomes[method] += 1
            H = {path: blocks[number] for path, blocks in hessians.items()}
            for path, axis in zip(SQUARE, structure.axes, strict=True):
                products = v_products(H, v, path) if method == "probes" else np.diag(H[path, path])
                truth = products.reshape(SQUARE[path]).sum(1 - axis)
                scale = max(np.abs(products).max(), np.abs(truth).max())
                allowed = ERRORS * np.asarray(error[path]) + 1e-7 * scale
                assert (np.abs(np.asarray(found[path]) - truth) <= allowed).all(), (number, method, path)
    assert outcomes["probes"] and outcomes["auto"], outcomes  # not all are refused
    expected = {
        "decay": {"exact"},
        "weights": {"exact"},
        "padding, cut": {"refused"},
        "padding": {"exact", "refused"},
        "weights unknown to the head": {"exact", "control_variate"},
        "entangled": {"exact", "control_variate"},
        "smoothed": {"exact"},
        "smooth network": {"exact", "control_variate"},
        "adversarial": {"exact", "hutchinson"},
    }
    assert expected[name] <= set(outcomes), outcomes


def dense(loss, drawn):
    """{(path, path): (draws, size, size)}, the blocks of the Hessian over both kernels, in float64."""
    params, batches = jax.tree.map(lambda *x: np.stack(x), *drawn)
    kernels = {path: params.pop(path) for path in SQUARE}
    one = jax.hessian(lambda kernels, rest, batch: loss(kernels | rest, batch))
    H = jax.jit(jax.vmap(one))(kernels, params, batches)
    size = {path: int(np.prod(shape)) for path, shape in SQUARE.items()}
    return {(p, q): np.asarray(H[p][q]).reshape(len(drawn), size[p], size[q]) for p in SQUARE for q in SQUARE}


def v_products(H, v, path):
    """``v * (H v)`` of one kernel."""
    return v[path].ravel() * sum(H[path, other] @ v[other].ravel() for other in SQUARE)
