"""``python -m ehap_jax.report RUN [RUN ...]``: the page of a run, or a comparison of several."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ehap_jax.report.page import write_comparison, write_report


@dataclass(frozen=True)
class CommandLine:
    """Write report.html into one run directory, or one page that compares several."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    output: Path = Path("comparison.html")
    """Where the comparison of several runs goes."""


def command(arguments: list[str] | None = None) -> int:
    line = tyro.cli(CommandLine, args=arguments)
    if not line.runs:
        print("report: name at least one run directory", file=sys.stderr)
        return 2
    try:
        page = write_report(line.runs[0]) if len(line.runs) == 1 else write_comparison(line.runs, line.output)
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(command())
