"""Minutes that every recipe takes on handwritten digits, run as its users run it: one process each.

    python -m benchmarks.recipe_times                       # all of them, one after the other
    python -m benchmarks.recipe_times --only prune trace    # those, in a file that has the others already
    python -m benchmarks.recipe_times --max-minutes 10      # stops between two recipes; the next call goes on

The digits are 8 × 8 pixels and 1,295 training images: these are the times of a first look, not those of CIFAR-10. The
recipes build on one another: the first trains the network that the others start from. Every recipe keeps on
what, how busy it was before, and with which versions it was timed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import fresh_process, read_results, write_results
from ehap_jax.training import Deadline, OutOfTime
from recipes.command import MISSED

COMMANDS = {
    "pretrain": "digits",
    "quickstart": "--seeds 1",
    "trace": "short DENSE --data digits",
    "prune": "short DENSE --data digits --train-images 1280 --finetune.epochs 10",
    "quantize": "short PRUNED --data digits --train-images 1280 --seeds 1 --qat.epochs 4",
    "ehap": "digits --dense DENSE --seeds 1",
    "compare_precision": "short DENSE --data digits --train-images 1280 --seeds 1",
    "compare_criteria": "short DENSE --data digits --train-images 1280 --cells.seeds 1",
    "sweep": "short DENSE --data digits --train-images 1280",
    "reproduce": "cpu DENSE --data digits --train-images 1280 --cells.seeds 1",
    "compare_estimators": "short DENSE --data digits --train-images 1280 --seeds 1",
    "compare_removal": "short DENSE --data digits",
    "spectrum": "short DENSE --data digits",
}
"""Recipe -> its arguments; DENSE and PRUNED are the runs of pretrain and prune."""


def measure(recipe: str, runs: Path) -> dict[str, Any]:
    """Run one recipe into a folder of `runs`.

    Raises:
        RuntimeError: it failed; the message is the last line it wrote.
    """
    words = COMMANDS[recipe].replace("DENSE", str(runs / "pretrain")).replace("PRUNED", str(runs / "prune"))
    command = [sys.executable, "-m", f"recipes.{recipe}", *shlex.split(words), "--output", str(runs / recipe)]
    load, started = os.getloadavg()[0], time.perf_counter()
    done = subprocess.run([*command, "--overwrite"], capture_output=True, text=True, check=False)
    missed = done.returncode == MISSED and (runs / recipe / "summary.json").is_file()  # ran whole, and says so
    if done.returncode and not missed:
        raise RuntimeError(f"recipes.{recipe} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    minutes = (time.perf_counter() - started) / 60
    where = fresh_process("benchmarks.measure", [])  # this process leaves the device to the recipes
    return {"arguments": COMMANDS[recipe], "minutes": minutes, **where, "load_average": load}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=None, help="measure these anew")
    parser.add_argument("--max-minutes", type=float, default=None)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "recipe_times")
    parser.add_argument("--output", type=Path, default=Path("results/recipe_times.json"))
    given = parser.parse_args(arguments)
    deadline = Deadline(given.max_minutes)
    found = read_results(given.output).get("recipes", {})
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.runs.mkdir(parents=True, exist_ok=True)
    for recipe in given.only or [name for name in COMMANDS if name not in found]:
        try:
            deadline.check(f"{len(found)} of {len(COMMANDS)} recipes measured")
        except OutOfTime as stopped:
            print(f"recipe_times: {stopped}; call it again to go on", file=sys.stderr)
            return 3
        found[recipe] = measure(recipe, given.runs)
        write_results(given.output, {"recipes": found})
        print(f"{recipe:<20}{found[recipe]['minutes']:6.1f} min", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
