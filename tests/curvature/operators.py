"""The products under test as functions of ``(params, v, batch)``, and a network with curvature of every kind.

python -m tests.curvature.operators OUTPUT     # every product on all devices there are, as JSON
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ehap_jax.curvature import fisher_vp, gnvp, hvp, linearized_hvp


def model(p, x):
    return jnp.tanh(x @ p["first"] + p["bias"][None, :]) @ p["second"]


def loss(p, batch):
    x, y = batch
    return -jnp.take_along_axis(jax.nn.log_softmax(model(p, x)), y[:, None], axis=1).mean()


PRODUCTS = {
    "hvp": lambda params, v, batch: hvp(loss)(params, v, batch),
    "linearized_hvp": lambda params, v, batch: linearized_hvp(loss, params, batch)(v),
    "gnvp": lambda params, v, batch: gnvp(model)(params, v, batch),
    "fisher_vp": lambda params, v, batch: fisher_vp(loss)(params, v, batch),
}


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(8)
    shapes = {"first": (4, 3), "bias": (3,), "second": (3, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return params, (jnp.asarray(rng.normal(size=(8, 4)), dtype), jnp.asarray(rng.integers(0, 3, 8), jnp.int32))


def direction(params):
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


def on_all_devices(output):
    params, batch = problem()
    v = direction(params)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    found = {}
    for name, product in PRODUCTS.items():

        def here(params, v, batch, product=product):
            return jax.lax.pmean(product(params, v, batch), "data")

        given = (P(), P(), P("data"))
        divided = jax.jit(jax.shard_map(here, mesh=mesh, in_specs=given, out_specs=P(), check_vma=False))
        placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
        results = (jax.jit(product)(params, v, batch), divided(params, v, placed))
        found[name] = [np.asarray(ravel_pytree(result)[0]).tolist() for result in results]
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    on_all_devices(Path(sys.argv[-1]))
