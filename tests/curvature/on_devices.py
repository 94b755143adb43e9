"""Run by `test_devices` with eight virtual devices, or in several processes: traces on meshes, as JSON.

python -m tests.curvature.on_devices OUTPUT                          # eight devices of one process
python -m tests.curvature.on_devices OUTPUT HOST:PORT PROCESSES ID   # in each of several processes
"""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax.curvature import Policy, channel_trace, gauss_newton, gauss_newton_trace, is_kernel, product_memory
from ehap_jax.curvature.devices import DATA, SAME, divide, place, size_of
from ehap_jax.curvature.probe_loop import Run, advance_on_device, first_state
from ehap_jax.curvature.problem import prepare

SEED = 11
SHAPES = ((8, 1), (1, 8), (2, 4), (4, 2))
PROBES = 10


def loss(p, batch):
    h = jnp.tanh(batch @ p["first"] + p["bias"][None, :])
    return ((h @ p["second"]).astype(p["bias"].dtype if h.dtype == jnp.float64 else jnp.float32) ** 2).sum(1).mean()


def problem():
    """Eleven examples: no number of devices here divides them."""
    rng = np.random.default_rng(4)
    shapes = {"first": (6, 5), "bias": (5,), "second": (5, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(11, 6)), jnp.float32)


def trace(**options):
    options = {"key": jax.random.key(SEED), "num_probes": PROBES, "product": "jvp"} | options
    return channel_trace(loss, *problem(), **options)


def mesh(data, probe):
    return Mesh(np.array(jax.devices()).reshape(data, probe), ("data", "probe"))


def vector(tree):
    return np.concatenate([np.asarray(x, float) for x in jax.tree.leaves(tree)]).tolist()


def flat(estimate):
    """Means and standard errors of all channels, and how they came about."""
    mean, sem = (
        np.concatenate([np.asarray(x, float) for x in jax.tree.leaves(t)]) for t in (estimate.mean, estimate.sem)
    )
    return {
        "mean": mean.tolist(),
        "sem": sem.tolist(),
        "count": estimate.count,
        "rejected": estimate.rejected,
        "loss_scale": float(estimate.state.loss_scale),
    }


def loop_on_device(on, product):
    prepared = prepare(
        loss,
        *problem(),
        policy=Policy(),
        select=is_kernel,
        channel_axis=-1,
        microbatch=2,
        shards=size_of(on, DATA),
    )
    run = Run(loss, divide(prepared, on), product, on)
    state = advance_on_device(run, first_state(run, jax.random.key(SEED), Policy()), place(on, jnp.int32(PROBES), SAME))
    return vector(state.moments.mean["channel"])


def stop_at(count):
    def progress(done, total):
        if done >= count:
            raise KeyboardInterrupt

    return progress


def one_process(output):
    found = {"one": flat(trace())}
    for data, probe in SHAPES:
        found[f"{data}x{probe}"] = flat(trace(mesh=mesh(data, probe)))
    found["linearize"] = flat(trace(mesh=mesh(2, 4), microbatch=2, product="linearize"))
    found["probe only"] = flat(trace(mesh=jax.make_mesh((8,), ("probe",))))
    found["loop on device"] = loop_on_device(mesh(4, 2), "linearize")
    file = output.with_suffix(".npz")
    try:
        trace(mesh=mesh(2, 4), progress=stop_at(5), probes_per_step=5, save_every=0, save_to=file)
    except KeyboardInterrupt:
        with np.load(file) as saved:
            found["stopped at"] = int(saved["count"])
    found["resumed"] = flat(trace(mesh=mesh(4, 2), save_to=file))
    part = trace(mesh=mesh(2, 4), num_probes=3)
    found["went on with one"] = flat(trace(state=part.state))
    half = {"policy": Policy("float16", 2.0**20)}
    found["float16"] = [flat(trace(**half)), flat(trace(mesh=mesh(1, 8), **half))]
    scales = [trace(policy=Policy("float16"), num_probes=1, mesh=m).state.loss_scale for m in (None, mesh(1, 8))]
    found["first scales"] = [float(scale) for scale in scales]
    bytes_needed = [product_memory(loss, *problem(), mesh=m).needs["linearize"] for m in (mesh(1, 8), mesh(8, 1))]
    found["needs"] = bytes_needed
    found["exact"] = [exact(), exact(mesh(8, 1)), exact(mesh(2, 4)), exact(jax.make_mesh((8,), ("data",)))]
    with mock.patch.object(gauss_newton, "_chunk_function", lambda leaves: gauss_newton._whole_chunk):
        found["exact"].append(exact(mesh(8, 1)))
    file = output.with_suffix(".exact.npz")
    four = Mesh(np.array(jax.devices()[:4]), ("data",))
    try:
        exact(four, microbatch=1, progress=stop_at(4), save_every=0, save_to=file)
    except KeyboardInterrupt:
        found["exact"].append(exact(save_to=file))
    output.write_text(json.dumps(found))


def exact(on=None, **options):
    params, x = problem()

    def model(p, x):
        return jax.nn.relu(x @ p["first"] + p["bias"][None, :]) @ p["second"]

    return vector(gauss_newton_trace(model, params, x, mesh=on, **({"microbatch": 2} | options)).mean)


def several_processes(output, address, processes, process):
    jax.distributed.initialize(address, int(processes), int(process))
    options = {"mesh": mesh(2, jax.device_count() // 2), "save_to": output.with_suffix(".npz")}
    report = {
        "processes": jax.process_count(),
        "devices": [jax.device_count(), jax.local_device_count()],
        "found": flat(trace(**options)),
        "read": flat(trace(**options)),
    }
    output.with_suffix(f".{process}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    (several_processes if len(sys.argv) > 2 else one_process)(Path(sys.argv[1]), *sys.argv[2:])
