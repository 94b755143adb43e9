"""Recipes use all devices. In a process of its own: devices are counted when it starts."""

import json
import os
import subprocess
import sys

import pytest

TWO_DEVICES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from ehap_jax.data import load_dataset
from ehap_jax.graph import trace_graph
from ehap_jax.training import Deadline, Progress, RunDirectory
from recipes import criteria
from recipes.lab import Lab

rng = np.random.default_rng(0)
sizes = {"before": (64, 5), "behind": (5, 10)}
variables = {"params": {name: np.asarray(rng.normal(size=s), np.float32) for name, s in sizes.items()}}

def smooth(v, x):
    return jax.numpy.tanh(x.reshape(len(x), -1) @ v["params"]["before"]) @ v["params"]["behind"]

def linear(v, x):
    return jax.nn.relu(x.reshape(len(x), -1) @ v["params"]["before"]) @ v["params"]["behind"]

def traces(all_devices, folder):
    criteria.all_devices = all_devices
    found = []
    with Progress() as progress:
        lab = Lab(load_dataset("digits"), RunDirectory.create(folder), progress, Deadline())
        for number, (apply, estimator) in enumerate([(smooth, "probes"), (smooth, "auto"), (linear, "exact")]):
            graph = trace_graph(apply)(variables, np.zeros((1, 8, 8, 1), np.float32))
            settings = criteria.ScoreConfig(examples=17, probes=5, microbatch=4, estimator=estimator)
            found.append(criteria.hessian_trace(lab, 0, graph, apply, variables, settings, f"trace{number}"))
    return found

used = []
def counted(axis, original=criteria.all_devices):
    used.append((axis, original(axis).size))
    return original(axis)

many = traces(counted, Path(sys.argv[1]) / "many")
one = traces(lambda axis: None, Path(sys.argv[1]) / "one")
apart = [
    max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(*map(jax.tree.leaves, (m.mean, o.mean))))
    for m, o in zip(many, one)
]
print(json.dumps({"used": used, "apart": apart}))
"""


@pytest.mark.slow
def test_a_trace_is_divided_over_them_and_is_that_of_one(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", TWO_DEVICES, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["used"] == [["probe", 2], ["probe", 2], ["data", 2]]
    probes, auto, exact = found["apart"]
    assert probes == 0.0, "probes are divided, and each is computed as on one device"
    assert max(auto, exact) < 1e-6
