"""Hostile files for every reader: seeded mutations of honest ones, and what becomes of each.

    python -m benchmarks.hostile_files                     # 1,800 inputs, results/hostile_files.json
    python -m benchmarks.hostile_files --only load_model   # that reader anew, in a file that has the others already

A file from somebody else must be read, or be refused by a ValueError or an OSError that names the file and is not long
(recipes print it on one line). It must never run code, take more memory than twice its honest size and 64 MiB, or more
than two seconds of the processor and one per megabyte. What is accepted must hold what the reader promises of every
file (finite weights, no negative variance). Each reader is tried in a process of its own; an input that ends it counts
as "crashed".
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.hostile_readers import Reader, readers
from benchmarks.measure import about, read_results, write_results
from benchmarks.mutations import CANARY, copy_honest, mutate

SLACK = 64 * 2**20
MOST_MEMORY = 2**30
"""What a reader may take before the system refuses it more, so that the machine lives on."""
LONGEST = 2000
"""Characters of a message."""
HANGS = 20
"""Seconds after which a reader that waits is stopped."""
GOOD = ("refused", "accepted")


class Outcome(NamedTuple):
    """What became of one input.

    kind: "refused" or "accepted"; "executed", "believed" (accepted, and not what the reader promises), "traceback" (an
    error nobody expects), "unnamed" (an error without the name of the file), "long", "memory", "slow" or "hung".
    """

    kind: str
    file: str
    mutation: str
    said: str


def attempt(reader: Reader, honest: Path, folder: Path, seed: int) -> Outcome:
    """Mutate one file of a copy of the honest ones, read it, and judge what happens."""
    rng = np.random.default_rng(seed)
    copy_honest(honest, folder)
    files = sorted(path for pattern in reader.files for path in folder.glob(pattern))
    chosen = files[rng.integers(len(files))]
    size = sum(path.stat().st_size for path in files)
    mutation, name = mutate(rng, chosen), str(chosen.relative_to(folder))
    size = max(size, chosen.stat().st_size if chosen.is_file() else 0)

    def outcome(kind: str, said: object = "") -> Outcome:
        return Outcome(kind, name, mutation, str(said).replace(str(folder), "")[:500])

    before, started = _reset_peak(), time.process_time()
    try:
        with _stopped_after(HANGS), _limited_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader.read(folder)
        kind, said = "accepted", ""
    except _HungError:
        return outcome("hung")
    except (ValueError, OSError) as error:
        kind, said, found = "refused", str(error), None
    except MemoryError:
        return outcome("memory", f"more than {MOST_MEMORY:,} bytes")
    except Exception as error:
        return outcome("traceback", f"{type(error).__name__}: {error}")
    seconds, grown = time.process_time() - started, _peak() - before
    if any(folder.rglob(CANARY)):
        return outcome("executed")
    if grown > 2 * size + SLACK:
        return outcome("memory", f"{grown:,} bytes for {size:,}")
    if seconds > 2 + size / 2**20:
        return outcome("slow", f"{seconds:.1f} s for {size:,} bytes")
    if len(said) > LONGEST:
        return outcome("long", said)
    if kind == "refused" and str(folder) not in said and chosen.stem not in said:
        return outcome("unnamed", said)
    if kind == "accepted":
        try:
            reader.check(found)
        except AssertionError as wrong:
            return outcome("believed", wrong)
    return outcome(kind, said)


class _HungError(BaseException):
    """A reader took longer than it may; no Exception, so that none takes it for its own."""


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _HungError

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextmanager
def _limited_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize:") + MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reset_peak() -> int:
    """Forget the peak of this process's memory; returns what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS:")


def _peak() -> int:
    return _memory("VmHWM:")


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def attempts(name: str, seeds: Iterable[int]) -> Iterator[Outcome]:
    """The outcomes of the inputs of some seeds."""
    reader = readers()[name]
    with tempfile.TemporaryDirectory() as there:
        honest, folder = Path(there, "honest"), Path(there, "mutated")
        honest.mkdir()
        reader.write(honest)
        copy_honest(honest, folder)
        reader.check(reader.read(folder))  # an honest file is read; this also compiles what reading compiles
        for seed in seeds:
            yield attempt(reader, honest, folder, seed)


def try_reader(name: str, count: int, seed: int) -> list[Outcome]:
    """All inputs of a reader in processes of their own; one that dies is begun again after the input that killed it."""
    found: list[Outcome] = []
    while len(found) < count:
        command = [sys.executable, "-m", "benchmarks.hostile_files", "--one", name, "--inputs", str(count)]
        command += ["--seed", str(seed), "--done", str(len(found))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
        found += [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [""])[-1]
            found.append(Outcome("crashed", "", "", f"status {done.returncode}: {said}"[:500]))
    return found


def table(results: dict[str, Any]) -> str:
    """Outcomes per reader, for people."""
    kinds = sorted({kind for row in results["readers"].values() for kind in row["outcomes"]})
    kinds = [*(kind for kind in GOOD if kind in kinds), *(kind for kind in kinds if kind not in GOOD)]
    lines = [f"{'reader':<26}{'inputs':>8}" + "".join(f"{kind:>12}" for kind in kinds)]
    for name, row in results["readers"].items():
        counts = "".join(f"{row['outcomes'].get(kind, 0):>12}" for kind in kinds)
        lines.append(f"{name:<26}{row['inputs']:>8}{counts}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(readers()), default=None, help="try these anew")
    parser.add_argument("--inputs", type=int, default=150, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--done", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("results/hostile_files.json"))
    given = parser.parse_args(arguments)
    if given.one is not None:
        for outcome in attempts(given.one, range(given.seed + given.done, given.seed + given.inputs)):
            print(json.dumps(outcome), flush=True)
        return 0
    results = read_results(given.output) or {"readers": {}}
    for name in given.only or readers():
        outcomes = try_reader(name, given.inputs, given.seed)
        results["readers"][name] = {
            "inputs": len(outcomes),
            "seed": given.seed,
            "outcomes": dict(Counter(outcome.kind for outcome in outcomes)),
            "not_kept": [outcome._asdict() for outcome in outcomes if outcome.kind not in GOOD],
            **about(),
        }
        write_results(given.output, results)
        print(f"{name}: {results['readers'][name]['outcomes']}", flush=True)
    print(table(results))
    broken = sum(len(row["not_kept"]) for row in results["readers"].values())
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
