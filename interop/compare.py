"""Is it the same network? JAX beside PyTorch on a real checkpoint and real images, as a table and a JSON file.

    python -m interop.compare resnet20.th resnet32.th --data cifar10.npz --out results/interop_parity.json

The data file has `x_test`, `y_test` (uint8 images) and `x_train`, `y_train`. Logits and predictions are compared on
all test images, derivatives on a few training images. Exits with status 1 where a figure is beyond its limit.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ehap_jax._compat import enable_x64
from ehap_jax._whole_files import write_json
from ehap_jax.graph.structure import Coupling
from interop.parity import (
    gradient_pair,
    hessian_vector_pair,
    logits_pair,
    normalise,
    pair,
    pruned_pair,
    relative,
    sgd_pair,
    trace_pair,
)

LIMITS = {
    "logits_max_abs": 1e-4,
    "predictions_that_differ": 0,
    "gradient_relative": 1e-4,
    "hessian_vector_relative": 1e-4,
    "trace_relative": 1e-3,
    "trace_relative_worst_kernel": 1e-3,
    "sgd_step_max_abs": 1e-5,
    "float64_logits_max_abs": 1e-9,
    "float64_gradient_relative": 1e-9,
    "float64_hessian_vector_relative": 1e-9,
    "pruned_group_logits_max_abs": 1e-4,
    "pruned_union_logits_max_abs": 1e-4,
}
"""What each figure may be at most; in float32 where the name does not say otherwise."""

COUPLINGS: tuple[Coupling, ...] = ("group", "union")
KEPT_CHANNELS = 0.5
"""The pruned networks keep this fraction of the channels, by weight magnitude."""


def compare(
    checkpoint: str | os.PathLike[str],
    data: dict[str, np.ndarray],
    *,
    layout: str = "auto",
    batch: int = 32,
    probes: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure one checkpoint in both frameworks.

    Args:
        data: x_test (N, H, W, 3) uint8, y_test (N,), x_train, y_train.
        batch: training images for gradient, Hv, trace and SGD step.
        probes: Rademacher probes of the trace, the same in both.

    Returns:
        The figures named in `LIMITS` and the accuracies, as plain numbers.
    """
    started = time.perf_counter()
    nets = pair(checkpoint, layout)
    test, train = normalise(data["x_test"], nets.info), normalise(data["x_train"][:batch], nets.info)
    truth, labels = data["y_test"].astype(np.int64), data["y_train"][:batch]
    ours, theirs = logits_pair(nets, test)
    answers, expected = ours.argmax(axis=1), theirs.argmax(axis=1)
    seeds = [seed + i for i in range(probes)]
    traces = trace_pair(nets, train, labels, seeds)
    before = nets.named(nets.variables["params"])
    step = sgd_pair(nets, train, labels, rate=0.1)
    pruned = {
        f"pruned_{coupling}_logits_max_abs": float(np.abs(np.subtract(*outputs)).max())
        for coupling in COUPLINGS
        for outputs in [pruned_pair(nets, train, channels=KEPT_CHANNELS, coupling=coupling)]
    }
    with enable_x64():
        doubled, train64 = pair(checkpoint, layout, dtype=np.float64), train.astype(np.float64)
        float64 = {
            "float64_logits_max_abs": float(np.abs(np.subtract(*logits_pair(doubled, train64))).max()),
            "float64_gradient_relative": relative(*gradient_pair(doubled, train64, labels)),
            "float64_hessian_vector_relative": relative(*hessian_vector_pair(doubled, train64, labels, seeds[0])),
        }
    return {
        "checkpoint": Path(checkpoint).name,
        "layout": nets.info.layout,
        "form": nets.info.form.name,
        "depth": nets.info.depth,
        "shortcut": nets.info.shortcut,
        "test_images": len(truth),
        "correct_jax": int(np.sum(answers == truth)),
        "correct_torch": int(np.sum(expected == truth)),
        "accuracy_jax": float(np.mean(answers == truth)),
        "accuracy_torch": float(np.mean(expected == truth)),
        "predictions_that_differ": int(np.sum(answers != expected)),
        "logits_max_abs": float(np.abs(ours - theirs).max()),
        "gradient_relative": relative(*gradient_pair(nets, train, labels)),
        "hessian_vector_relative": relative(*hessian_vector_pair(nets, train, labels, seeds[0])),
        "trace_relative": relative(*traces),
        "trace_relative_worst_kernel": max(
            relative({name: traces[0][name]}, {name: value}) for name, value in traces[1].items()
        ),
        "sgd_step_max_abs": max(float(np.abs(step[0][name] - value).max()) for name, value in step[1].items()),
        "sgd_step_size": max(float(np.abs(before[name] - value).max()) for name, value in step[1].items()),
        **float64,
        **pruned,
        "train_loss": float(jax.jit(nets.loss)(nets.variables["params"], (train, labels.astype(np.int32)))),
        "kept_channels": KEPT_CHANNELS,
        "train_images": batch,
        "probes": probes,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The figures as plain text, one column per checkpoint."""
    head = f"{'':34}{'limit':>10}" + "".join(f"{r['checkpoint']:>24}" for r in results)
    rows = [head, "-" * len(head)]
    for name in ("accuracy_jax", "accuracy_torch"):
        rows.append(f"{name:34}{'':>10}" + "".join(f"{r[name]:>23.2%} " for r in results))
    for name, limit in LIMITS.items():
        cells = "".join(f"{r[name]:>22.3g}{' ' if r[name] <= limit else '!'} " for r in results)
        rows.append(f"{name:34}{limit:>10.0e}" + cells)
    return "\n".join(rows)


def provenance() -> dict[str, Any]:
    """Device, versions and commit of this run."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True, check=False
    )
    packages = ("jax", "jaxlib", "flax", "torch", "numpy")
    return {
        "device_jax": str(jax.devices()[0].device_kind),
        "device_torch": "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} logical CPUs",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": git.stdout.strip() or "unknown",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the return value is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m interop.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="PyTorch or safetensors files")
    parser.add_argument("--data", required=True, type=Path, help="npz with x_test, y_test, x_train, y_train")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--batch", type=int, default=32, help="training images for the derivatives")
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/interop_parity.json"))
    options = parser.parse_args(arguments)
    for path in (*options.checkpoints, options.data):
        if not path.is_file():
            parser.error(f"no file at {path}")
    with np.load(options.data) as archive:
        missing = {"x_test", "y_test", "x_train", "y_train"} - set(archive)
        if missing:
            parser.error(f"{options.data} has no {', '.join(sorted(missing))}")
        data = {key: archive[key] for key in archive}
    if not 0 < options.batch <= len(data["y_train"]) or options.probes < 1:
        parser.error(f"--batch must be 1 to {len(data['y_train'])}, --probes at least 1")
    results = []
    for path in options.checkpoints:
        print(f"comparing {path.name} …", file=sys.stderr, flush=True)
        results.append(
            compare(path, data, layout=options.layout, batch=options.batch, probes=options.probes, seed=options.seed)
        )
    print(table(results))
    document = {**provenance(), "data": options.data.name, "limits": LIMITS, "results": results}
    write_json(options.out, document)
    print(f"written to {options.out}", file=sys.stderr)
    return int(any(result[name] > limit for result in results for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
