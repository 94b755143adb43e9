"""What every measurement needs: a fresh process, clocks, where and of what it was taken, and a result file.

`python -m benchmarks.measure` prints what a measurement would be stamped with here and now.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ehap_jax._whole_files import write_json
from ehap_jax.training.run_directory import processor, versions


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns, when the device has finished, with wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(call())
    return found, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def least(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Least wall-clock and CPU seconds of a call repeated for about ``seconds``, after one that does not count."""
    timed(call)
    found: list[dict[str, float]] = []
    while len(found) < 3 or sum(one["seconds"] for one in found) < seconds:
        found.append(timed(call)[1])
    return {clock: min(one[clock] for one in found) for clock in found[0]}


def peak_memory() -> float:
    """The largest resident memory of this process so far, in GB.

    Linux hands `ru_maxrss` of a process that starts another down to it, hence its own peak where the system tells it.
    """
    status = Path("/proc/self/status")
    own = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")] if status.exists() else []
    return (int(own[0].split()[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


class ProcessFailed(RuntimeError):
    """A process ended with another status than 0.

    Attributes:
      status: minus the number of the signal where one ended it. reason: the last line of its errors; "" for none.
    """

    def __init__(self, command: Sequence[str], status: int, errors: str) -> None:
        self.status, self.reason = status, (errors.strip().splitlines() or [""])[-1].strip()
        super().__init__(f"{' '.join(command)} ended with status {status}: {self.reason}")


def fresh_process(
    module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """Run ``python -m module arguments`` and read the JSON object in its last line; its errors are shown when it ends.

    Raises:
        ProcessFailed: it failed; names the command and the last line of its errors.
        subprocess.TimeoutExpired: it took more than ``seconds``.
    """
    command = [sys.executable, "-m", module, *arguments]
    given = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given, timeout=seconds)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode != 0:
        raise ProcessFailed(command, done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def read_results(path: Path) -> dict[str, Any]:
    """Those of earlier parts of the same benchmark."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    write_json(path, results)


def provenance() -> dict[str, Any]:
    """On what, how busy it was, with which versions and with which flags of the compiler."""
    return {
        "cpu": processor()["name"],
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def torch_device(precision: str, gpu: bool) -> Any:
    """Where PyTorch computes, with TF32 switched as the precision asks and a thread for every core it may use.

    Raises:
      RuntimeError: a GPU was asked for, and PyTorch sees none.
    """
    import torch

    if gpu and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def about() -> dict[str, Any]:
    """`provenance`, with the version of PyTorch where it is installed."""
    found = provenance()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["versions"]["packages"]["torch"] = importlib.metadata.version("torch")
    return found


def torch_provenance(device: Any) -> dict[str, Any]:
    """`about`, of PyTorch's device: JAX is kept off the accelerator here, as it would take its memory."""
    import torch

    found = {**about(), "torch_threads": torch.get_num_threads()}
    if device.type == "cuda":
        name = {"backend": "gpu", "kind": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
        found["versions"]["device"] = name
    return found


if __name__ == "__main__":
    print(json.dumps(provenance()))
