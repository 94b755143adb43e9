"""Runs that are killed at random moments and resumed: do they end in the same bits as one that was left alone?

    python -m benchmarks.kills                          # 60 kills of recipes.ehap at a tiny size
    python -m benchmarks.kills --kills 5 --seed 1       # five more; results/reliability.json keeps the others
    python -m benchmarks.kills --kills 20 --miniature   # of benchmarks.killed_job, which takes seconds

A run is left alone once, and the moments of its lines are noted. Others are ended by SIGKILL, SIGTERM or SIGINT at
moments spread evenly over all of it, resumed, ended again, up to three times each, and resumed to their end. Summary
(without seconds), plan, metrics, scores, network and the files for others must be the same byte for byte, and no
temporary file may be left. Where this user may mount one, a small disk is filled as well: the last line says so, and
with more space the run goes on to the same bits. The seed chooses signals and moments.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import about, read_results, write_results

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TINY = [
    "digits", "--seeds", "1", "--widths", "4", "4", "8", "--prune.keep", "0.5", "--prune.scores.examples", "16",
    "--prune.scores.probes", "20",
    *(word for phase in ("pretrain", "finetune", "int8") for word in (f"--{phase}.epochs", "2")),
    *(word for phase in ("pretrain", "finetune", "int8") for word in (f"--{phase}.batch-size", "256")),
]  # fmt: skip


BAD = ("different", "left_over")
"""Of a part of the results: files that differ from those of a run left alone, and temporary ones."""


class Job(NamedTuple):
    """command: words before the directory. files: what must be the same, as patterns in the directory."""

    command: tuple[str, ...]
    files: tuple[str, ...] = ("summary.json", "plan.json", "metrics.jsonl", "network.npz")


MINIATURE = Job((sys.executable, "-m", "benchmarks.killed_job"))
MAIN = Job(
    (sys.executable, "-m", "recipes.ehap", *TINY, "--resume", "--output"),
    ("summary.json", "plan.json", "metrics.jsonl", "scores.npz", "seed0/network.*", "seed0/model/*"),
)


class Kill(NamedTuple):
    """One of them: the signal, after how many lines and seconds, the last line, and the status it led to."""

    signal: str
    lines: int
    seconds: float
    last_line: str
    status: int


def start(job: Job, run: Path) -> subprocess.Popen[str]:
    """The job in the background; an interrupt works there even where it is ignored here, as in a background shell."""
    here = signal.getsignal(signal.SIGINT)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # no preexec_fn: it forks, which JAX's threads may not like
    try:
        return subprocess.Popen([*job.command, str(run)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    finally:
        signal.signal(signal.SIGINT, here)


def left_alone(job: Job, run: Path) -> list[float]:
    """Run to the end; the seconds at which its lines appeared, and at which it ended.

    Raises:
        RuntimeError: it failed.
    """
    started, lines, moments = time.monotonic(), [], []
    with start(job, run) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            moments.append(time.monotonic() - started)
    if process.returncode:
        raise RuntimeError(f"{' '.join(job.command)} ended with status {process.returncode}: {''.join(lines)[-500:]}")
    return [*moments, time.monotonic() - started]


def kill_at(job: Job, run: Path, moments: Sequence[float], moment: float, how: signal.Signals) -> Kill:
    """Start or resume, and end it so long after the line that came before `moment` in the run that was left alone.

    A busy machine, or a resume that skips what is done, moves the line and not what is between two of them.
    """
    lines = bisect.bisect(moments[:-1], moment)
    seconds = moment - (moments[lines - 1] if lines else 0.0)
    last = ""
    with start(job, run) as process:
        assert process.stderr is not None
        for _ in range(lines):
            line = process.stderr.readline()
            if not line:
                break
            last = line.strip()
        time.sleep(seconds)
        process.send_signal(how)
        process.communicate()
    return Kill(how.name, lines, seconds, last, process.returncode)


def contents(job: Job, run: Path) -> dict[str, str]:
    """SHA-256 of what must be the same in every file."""
    files = sorted(path for pattern in job.files for path in run.glob(pattern))
    return {str(file.relative_to(run)): hashlib.sha256(_compared(file)).hexdigest() for file in files}


def _compared(file: Path) -> bytes:
    """The bytes of a file without the seconds of a summary, and with the names of a safetensors header in order.

    The library writes its metadata in another order in every process.
    """
    content = file.read_bytes()
    if file.name == "summary.json":
        return json.dumps({**json.loads(content), "seconds": None}).encode()
    if file.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
    return content


def leftovers(run: Path) -> list[str]:
    """Temporary files that nobody has cleared away."""
    patterns = (".*.unfinished-*", ".model.*", "*.orbax-checkpoint-tmp*")
    return sorted(str(path.relative_to(run)) for pattern in patterns for path in run.rglob(pattern))


def try_kills(
    job: Job, count: int, seed: int, folder: Path, keep: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Kill runs `count` times in all; what differs from the run left alone is listed.

    ``keep`` is given what was found so far, after every run that came to its end.

    Returns:
        {"kills": [...], "runs": how many, "different": [...], "left_over": [...], "seconds_alone": of the run}.
    """
    rng = np.random.default_rng(seed)
    moments = left_alone(job, folder / "alone")
    expected = contents(job, folder / "alone")
    # Evenly spread: one moment in every share of the whole, in random order.
    spread = rng.permutation((np.arange(count) + rng.random(count)) / count) * moments[-1]
    kills: list[Kill] = []
    different, left, runs = [], leftovers(folder / "alone"), 0
    found: dict[str, Any] = {}
    while len(kills) < count:
        run = folder / f"killed{runs}"
        for moment in spread[len(kills) : len(kills) + int(rng.integers(1, 4))]:
            kills.append(kill_at(job, run, moments, float(moment), SIGNALS[rng.integers(len(SIGNALS))]))
            print(f"{len(kills):>4} of {count}: {kills[-1]}", flush=True)
        left_alone(job, run)
        ended = contents(job, run)
        names = sorted(name for name in {*expected, *ended} if expected.get(name) != ended.get(name))
        different += [f"killed{runs}/{name}" for name in names]
        left += [f"killed{runs}/{name}" for name in leftovers(run)]
        shutil.rmtree(run)
        runs += 1
        found = {
            "kills": [kill._asdict() for kill in kills],
            "signals": dict(Counter(kill.signal for kill in kills)),
            "statuses": {str(status): number for status, number in Counter(kill.status for kill in kills).items()},
            "runs": runs,
            "compared": sorted(expected),
            "different": different,
            "left_over": left,
            "seconds_alone": moments[-1],
        }
        keep(found)
    return found


def fill_disk(job: Job, kilobytes: int, folder: Path) -> dict[str, Any] | None:
    """Run on a disk of so many kB, enlarge it, and resume; None where this user may not mount one.

    Returns:
        {"kilobytes", "status", "said": what the full disk led to, "different": files, "status_resumed"}.
    """
    disk, out = folder / "disk", folder / "out"
    disk.mkdir(exist_ok=True)
    command = " ".join(f"'{word}'" for word in [*job.command, str(disk / "run")])
    script = (
        f"mount -t tmpfs -o size={kilobytes}k none '{disk}' || exit 99\n"
        f"{command} > /dev/null 2> '{folder}/said'; echo $?\n"
        f"mount -o remount,size=256m '{disk}'\n"
        f"{command} > /dev/null 2>&1; echo $?; rm -rf '{out}'; cp -r '{disk}/run' '{out}'\n"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 99 or not done.stdout:
        return None
    status, resumed = map(int, done.stdout.split())
    expected, found = contents(job, folder / "alone"), contents(job, out)
    return {
        "kilobytes": kilobytes,
        "status": status,
        "said": (folder / "said").read_text().strip().splitlines()[-1:],
        "status_resumed": resumed,
        "different": sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)),
    }


def with_part(results: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """Results of several parts with one more, or with one of them anew, and what they come to together."""
    parts = {**results.get("parts", {}), name: part}
    totals: dict[str, Any] = {key: sum(len(part[key]) for part in parts.values()) for key in ("kills", *BAD)}
    totals["runs"] = sum(part["runs"] for part in parts.values())
    for key in ("signals", "statuses"):
        totals[key] = dict(sum((Counter(part[key]) for part in parts.values()), Counter[str]()))
    return {"totals": totals, "parts": parts}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--miniature", action="store_true", help="a job of seconds instead of the recipe")
    parser.add_argument("--kills-only", action="store_true", help="fill no disk")
    parser.add_argument("--output", type=Path, default=Path("results/reliability.json"))
    given = parser.parse_args(arguments)
    job = MINIATURE if given.miniature else MAIN
    name = f"{job.command[2]}, {given.kills} kills from seed {given.seed}"
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        # Compiled once for all processes: what is tried is what they write, and not how long they compile.
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PLATFORMS": "cpu"}
        os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        left_alone(job, folder / "alone")
        full = [fill_disk(job, kilobytes, folder) for kilobytes in (() if given.kills_only else (48, 160, 400))]
        here = {"full_disk": [one for one in full if one is not None], "seed": given.seed, **about()}
        shutil.rmtree(folder / "alone")  # the next one finds everything compiled, as those that are killed do

        def keep(found: dict[str, Any]) -> None:
            write_results(given.output, with_part(read_results(given.output), name, found | here))

        found = try_kills(job, given.kills, given.seed, folder, keep)
    bad = found["different"] + found["left_over"] + [x for one in here["full_disk"] for x in one["different"]]
    print(f"{len(found['kills'])} kills in {found['runs']} runs, {len(bad)} differences or leftovers: {bad[:5]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
