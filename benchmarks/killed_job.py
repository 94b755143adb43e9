"""A run of seconds with the parts of a long one: training with checkpoints, a saved trace, a plan and a summary.

    python -m benchmarks.killed_job DIRECTORY     # begins, or goes on where it was stopped

`benchmarks.kills` ends it at random moments. It prints a line per epoch and per probe.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.curvature import channel_trace
from ehap_jax.graph import trace_graph
from ehap_jax.pruning import allocate, hessian_scores
from ehap_jax.training import Checkpoints, EpochMetrics, RunDirectory, TrainState, fit, save_variables

EPOCHS, PROBES = 6, 6
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)


def model(p, x):
    return jax.nn.relu(x @ p["in"]) @ p["out"]


def loss(p, x):
    return (model(p, x) ** 2).mean()


@jax.jit
def epoch(state: TrainState, x: jax.Array, _: jax.Array) -> tuple[TrainState, EpochMetrics]:
    """One step of gradient descent with noise that depends on the key and on the step alone."""
    value, gradient = jax.value_and_grad(loss)(state.params, x)
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (3, 4)) / 100
    params = jax.tree.map(lambda p, g: p - g / 10, state.params, gradient)
    params["in"] = params["in"] + noise
    return state._replace(params=params, step=state.step + 1), EpochMetrics(value, value)


def report(what: str, number: int) -> None:
    print(f"{what} {number}", file=sys.stderr, flush=True)


def main(directory: Path) -> None:
    run = RunDirectory.create(directory, {"epochs": EPOCHS, "probes": PROBES}, resume=True)
    start = {"in": jnp.ones((3, 4)), "out": jnp.asarray([[1.0, 2.0], [2.0, 1.0], [0.5, 1.0], [1.0, 0.1]])}
    state = TrainState(start, {}, (), jnp.zeros((), jnp.int32), jax.random.key(0))

    def on_epoch(number: int, _: TrainState, metrics: EpochMetrics) -> None:
        run.append_metrics({"epoch": number, "loss": metrics.loss}, identity=("epoch",))
        report("epoch", number)

    with Checkpoints(run.file("checkpoints")) as saved:
        labels = np.zeros(len(X), np.int32)
        params = fit(epoch, state, X, labels, epochs=EPOCHS, checkpoints=saved, on_epoch=on_epoch).params
    options = {"key": jax.random.key(1), "num_probes": PROBES, "probes_per_step": 1, "save_every": 0.0}
    trace = channel_trace(
        loss, params, X, **options, save_to=run.file("trace.npz"), progress=lambda done, _: report("probe", done)
    )
    graph = trace_graph(model)(params, X)
    plan = allocate(graph, hessian_scores(graph, params, trace), params=0.6)
    run.write_json("plan.json", plan.document())
    save_variables(run.file("network.npz"), params)
    run.write_json("summary.json", {"total": trace.total(), "sem": trace.total_sem(), "seconds": run.seconds()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
