"""What one probe of a channel trace costs, here and in PyTorch, in one run on one device.

    python -m benchmarks.channel_trace                    # the rows meant for this device, CPU or GPU
    python -m benchmarks.channel_trace --max-minutes 10   # a part of them; the same command goes on from there
    python -m benchmarks.channel_trace --quick --out /tmp/quick.json      # a tiny network: does it run?

`ehap` is `channel_trace` as a user calls it; `ehap-devices` (CPU only) the same with a mesh of a device per core, which
divide the images. `float32` is JAX's matmul precision "highest" (in PyTorch: TF32 off),
`tf32` JAX's default (in PyTorch: TF32 on), the same as `float32` on a CPU and therefore left out there; `bfloat16` and
`float16` are policies (in PyTorch: autocast; for `torch-func` the network cast). PyTorch's rows are the functions of
`interop.reference.products` on the same weights, with one thread per core that the process may use: `torch-published`
as EHAP's released code does it, `torch-vectorised` the same without its host loop, `torch-affine` that with BatchNorm
as multiplication and addition, `torch-func` jvp of grad, `torch-compile` that through `torch.compile`. `peak` is the
most FLOP/s that a matrix product and a 3x3 convolution reach here, the better of JAX and PyTorch.

Every row runs in a process of its own, without caches of compiled programs, and is written when it is done; rows that
are there already (of this device, these sizes and these versions of JAX and PyTorch) are not run again. One that
fails, or takes longer than its limits, is written as that, with the reason: `--row-seconds` count from when the first
probe is done, `--first-seconds` bound what comes before. ms are the median over probes, after the first; on an
accelerator, in both, the host waits once per 16 probes, and the first 16 are not counted. `compile` is tracing and
compilation by JAX's own clock; for PyTorch it is what the first probes took beyond later ones, with the gradient's
graph before them. FLOP/s count convolutions and matrix products of the way that is used (see `probe_rows.PASSES`),
without what rematerialisation repeats. Memory: on a GPU the allocator's peak; on a CPU the largest resident memory of
the process, of which `before` was there before the network, and which for JAX holds the compiler too; `needed` is what
the compiler says that the trace itself needs. Weights and images are random numbers: the speed does not depend on them.

`times_as_fast_as` and `fastest_pytorch` are made of the rows that are comparable: device, versions of JAX and PyTorch
and flags of XLA are the same where both record them. On a CPU the ratios are of CPU time and, beside it, of wall-clock
time; the commits and load averages of both rows stand with them. 16 bits are compared with our `float32` and `tf32`.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ProcessFailed, about, fresh_process, read_results, write_results
from benchmarks.probe_comparison import comparable, compare, lines_of, table
from benchmarks.probe_measurement import measure
from benchmarks.probe_rows import NETWORKS, PEAKS, PRECISIONS, TORCH, VARIANTS, Row, planned
from ehap_jax.training import Deadline

UNCACHED = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "JAX_TRACEBACK_FILTERING": "off",  # which would end the errors with a line of its own
}
"""The environment of every row: what it finds compiled, it does not have to compile."""


def run_row(row: Row, given: argparse.Namespace, here: dict[str, Any], gpu: bool, left: float) -> dict[str, Any]:
    """In a process of its own; what was not done in time, or failed, says so."""
    line = ["--one", json.dumps(asdict(row)), "--seconds", str(given.seconds), "--probes", str(given.probes)]
    line += ["--row-seconds", str(given.row_seconds), *(["--gpu"] if gpu else [])]
    apart = UNCACHED | ({"JAX_PLATFORMS": "cpu"} if row.variant in (*TORCH, "peak-torch") else {})
    limit = min(given.first_seconds + given.row_seconds, left)
    try:
        return fresh_process("benchmarks.channel_trace", line, apart, limit)
    except subprocess.TimeoutExpired:
        reason = f"not done in {limit:.0f} s"
    except ProcessFailed as error:
        reason = f"ended with status {error.status}: {error.reason}"
        if error.status == -signal.SIGALRM:
            reason = f"not done in {given.row_seconds:g} s after the first probe"
    return {**asdict(row), "failed": reason, **here}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/channel_trace.json"))
    parser.add_argument("--preset", choices=("cpu", "gpu"), help="which rows; by default those for this device")
    parser.add_argument("--quick", action="store_true", help="a tiny network, for a look at whether it runs")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *PEAKS), help="of the preset's rows, these")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of the preset's rows, these")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), help="of the preset's rows, these")
    parser.add_argument("--seconds", type=float, default=15.0, help="of measuring per row, after the first probe")
    parser.add_argument("--probes", type=int, default=32, help="per row at most")
    parser.add_argument("--row-seconds", type=float, default=240.0, help="after the first probe, then it is given up")
    parser.add_argument("--first-seconds", type=float, default=1800.0, help="for what comes before, compilation too")
    parser.add_argument("--max-minutes", type=float, help="stop then; the same command goes on from there")
    parser.add_argument("--again", action="store_true", help="also the rows that failed before")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        row = json.loads(given.one)
        limit = partial(signal.setitimer, signal.ITIMER_REAL, given.row_seconds)  # its signal ends the process
        done = measure(Row(**row), given.seconds, given.probes, started=limit, gpu=given.gpu) if row else about()
        print(json.dumps(done))
        return
    if given.quick and given.out == parser.get_default("out"):
        parser.error("--quick needs an --out of its own: its numbers are no results")
    if min(given.seconds, given.row_seconds, given.first_seconds) <= 0 or given.probes < 2:
        parser.error("--seconds, --row-seconds and --first-seconds must be positive and --probes at least 2")
    deadline = Deadline(given.max_minutes)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    here = fresh_process("benchmarks.channel_trace", ["--one", "null"])  # this process leaves the device alone
    gpu = here["versions"]["device"]["backend"] != "cpu"
    if given.preset == "gpu" and not gpu:
        parser.error("--preset gpu needs a GPU, and JAX sees none")
    rows = planned("quick" if given.quick else given.preset or ("gpu" if gpu else "cpu"))
    wanted = {"variant": given.variants, "precision": given.precisions, "network": given.networks}
    rows = [r for r in rows if all(not w or not getattr(r, k) or getattr(r, k) in w for k, w in wanted.items())]
    if not rows:
        parser.error("no row of the preset has these --variants, --precisions and --networks")
    kept = compare(read_results(given.out).get("rows", []))
    begun = 0
    for row in rows:
        mine = [k for k in kept if asdict(row).items() <= k.items() and comparable(k, here)]
        if any("failed" not in k or not given.again for k in mine):
            continue
        over = f"the time is over before {row.name}; the same command goes on from there"
        if deadline.passed:
            print(over)
            break
        found = run_row(row, given, here, gpu, 60 * (deadline.minutes_left() or np.inf))
        # One that had all of the time to itself would not be done the next time either.
        if "failed" in found and deadline.passed and begun:
            print(over)
            break
        begun += 1
        kept = compare([*(k for k in kept if k not in mine), found])
        write_results(given.out, {"rows": kept})
        print("\n".join(lines_of(kept[-1])), flush=True)
    write_results(given.out, {"rows": kept})
    print(table(k for k in kept if comparable(k, here)))


if __name__ == "__main__":
    main()
