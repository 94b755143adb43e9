"""The command line of a recipe: a configuration with named variants, and how to run it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from ehap_jax.training import OutOfTime, Sink, tensorboard_sink, wandb_sink

Config = TypeVar("Config")

MISSED, FAILED, UNFINISHED = 1, 2, 3
"""Exit statuses: results that miss their bounds; a setting that cannot work; stopped by --max-minutes, not finished."""


class Missed(Exception):
    """Everything is written, and the results miss what they should reach; the message says what."""


@dataclass(frozen=True)
class RunOptions:
    """How to run; no part of the result."""

    output: Path
    """Run directory."""
    resume: bool = False
    """Continue a run that was stopped."""
    overwrite: bool = False
    """Delete an earlier run of that name first."""
    max_minutes: float | None = None
    """Stop cleanly after about so many minutes, with exit status 3; --resume goes on."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run directory, too."""
    wandb: bool = False
    """Log to Weights & Biases, too."""

    def sinks(self, config: Any) -> tuple[Sink, ...]:
        """Where training metrics go beside the run directory."""
        found: list[Sink] = []
        if self.tensorboard:
            found.append(tensorboard_sink(self.output / "tensorboard"))
        if self.wandb:
            found.append(wandb_sink(self.output.name, asdict(config), self.output))
        return tuple(found)


def run_command(
    main: Callable[[Any, RunOptions], None],
    variants: Mapping[str, tuple[str, Any]],
    arguments: Sequence[str] | None = None,
    *,
    name: str,
) -> int:
    """Parse a configuration and run `main(config, options)`.

    A setting that cannot work is one line on standard error and status 2; results that miss their bounds are one and 1.

    Args:
        main: the recipe.
        variants: name -> (what it is, its configuration); chosen by the first argument where there are several.
        arguments: default is the command line.
        name: of the recipe, for messages and the default run directory.
    """
    config, options = parse(variants, arguments, name=name)
    try:
        main(config, options)
    except OutOfTime as stopped:
        print(f"{name}: {stopped}; continue with --resume", file=sys.stderr)
        return UNFINISHED
    except Missed as missed:
        print(f"{name}: {missed}", file=sys.stderr)
        return MISSED
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILED
    return 0


def parse(
    variants: Mapping[str, tuple[str, Config]], arguments: Sequence[str] | None, *, name: str
) -> tuple[Config, RunOptions]:
    """The configuration and the options on a command line; tyro's own exit where they do not parse."""
    kind = type(next(iter(variants.values()))[1])
    flat = tyro.conf.arg(name="")
    line: Any = make_dataclass(
        "CommandLine", [("config", Annotated[kind, flat]), ("run", Annotated[RunOptions, flat])], frozen=True
    )
    line.__doc__ = kind.__doc__
    options = RunOptions(Path("runs") / name)
    lines = {variant: (text, line(config, options)) for variant, (text, config) in variants.items()}
    prog = f"python -m recipes.{name}"
    if len(lines) == 1:
        parsed = tyro.cli(line, args=arguments, default=next(iter(lines.values()))[1], prog=prog)
    else:
        parsed = tyro.extras.overridable_config_cli(lines, args=arguments, prog=prog)
    return parsed.config, parsed.run
