"""The command line of a recipe: a configuration with named variants, and how to run it."""

from __future__ import annotations

import _thread
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from ehap_jax.training import OutOfTime, RunDirectory, Sink, check_output, is_run, tensorboard_sink, wandb_sink

Config = TypeVar("Config")

MISSED, FAILED, UNFINISHED, INTERRUPTED = 1, 2, 3, 130
"""Exit statuses: results that miss their bounds; a setting that cannot work, or a run that failed, such as training
that diverged; stopped by --max-minutes, not finished; stopped by Ctrl-C, as shells have it."""

PACKAGES = {
    "report": ("matplotlib", "jinja2"),
    "spectrum": ("matfree", "matplotlib"),
    "onnx": ("onnx", "onnxruntime"),
    "tensorboard": ("tensorboard",),
}
"""What an extra of ehap-jax installs for the recipes."""


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

    def create_run(self, config: Any, *extras: str) -> RunDirectory:
        """The run directory, new or taken up, once every package is there that the run needs, be it in the end.

        Args:
            config: what determines the run.
            extras: of `PACKAGES`.

        Raises:
            ImportError: naming the packages that are missing, and the extra.
        """
        for extra in extras:
            require(extra)
        return RunDirectory.create(self.output, config, resume=self.resume, overwrite=self.overwrite)


@dataclass(frozen=True)
class TrainingOptions(RunOptions):
    """How to run what trains."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run directory, too."""
    wandb: bool = False
    """Log to Weights & Biases, too."""

    def create_run(self, config: Any, *extras: str) -> RunDirectory:
        if self.wandb and find_spec("wandb") is None:
            raise ImportError("--wandb needs Weights & Biases: pip install wandb")
        return super().create_run(config, *extras, *(("tensorboard",) if self.tensorboard else ()))

    def sinks(self, config: Any) -> tuple[Sink, ...]:
        """Where training metrics go beside the run directory."""
        found: list[Sink] = []
        if self.tensorboard:
            found.append(tensorboard_sink(self.output / "tensorboard"))
        if self.wandb:
            found.append(wandb_sink(self.output.name, asdict(config), self.output))
        return tuple(found)


def require(extra: str) -> None:
    """Raise ImportError unless the packages of an extra are installed."""
    missing = [name for name in PACKAGES[extra] if find_spec(name) is None]
    if missing:
        raise ImportError(f"no {' and no '.join(missing)} here: pip install 'ehap-jax[{extra}]'")


def run_command(
    main: Callable[[Any, Any], None],
    variants: Mapping[str, tuple[str, Any]],
    arguments: Sequence[str] | None = None,
    *,
    name: str,
    options: type[RunOptions] = TrainingOptions,
) -> int:
    """Parse a configuration and run `main(config, options)`.

    A setting that cannot work, and a run that failed, is one line on standard error and status 2; results that miss
    their bounds are one and 1; Ctrl-C is one, which says how to go on, and 130.

    Args:
        main: the recipe.
        variants: name -> (what it is, its configuration); chosen by the first argument where there are several.
        arguments: default is the command line.
        name: of the recipe, for messages and the default run directory.
        options: `RunOptions` for a recipe that trains nothing.
    """
    config, given = parse(variants, arguments, name=name, options=options)

    def work() -> None:
        check_output(given.output, resume=given.resume, overwrite=given.overwrite)
        main(config, given)

    return reported(work, name, given.output)


def reported(work: Callable[[], None], name: str, output: Path, *, resumable: bool = True) -> int:
    """Call `work` and say on one line what stopped it; returns the exit status (see `run_command`)."""
    try:
        with _no_interrupt_lost():
            work()
    except OutOfTime as stopped:
        print(f"{name}: {stopped}; continue with --resume", file=sys.stderr)
        return UNFINISHED
    except Missed as missed:
        print(f"{name}: {missed}", file=sys.stderr)
        return MISSED
    except KeyboardInterrupt:
        print(f"{name}: interrupted{_how_to_go_on(output, resumable)}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if _is_out_of_space(error):
            print(f"{name}: no space left for {output}; make some{_how_to_go_on(output, resumable)}", file=sys.stderr)
            return FAILED
        if not isinstance(error, ValueError | OSError | ImportError | ArithmeticError | NotImplementedError):
            raise
        print(f"{name}: {_on_one_line(error)}", file=sys.stderr)
        return FAILED
    return 0


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Where Ctrl-C falls into a callback from C, such as JAX's of the garbage collector, Python drops it: once more."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _how_to_go_on(output: Path, resumable: bool) -> str:
    return "; continue with --resume" if resumable and is_run(output) else ""


def _is_out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error; checkpoints are written by libraries that say so in texts alone."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _on_one_line(error: BaseException) -> str:
    """What an error says; names in it may come from files, and no terminal obeys them."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(str(error).split()))


def parse(
    variants: Mapping[str, tuple[str, Config]],
    arguments: Sequence[str] | None,
    *,
    name: str,
    options: type[RunOptions] = TrainingOptions,
) -> tuple[Config, RunOptions]:
    """The configuration and the options on a command line; tyro's own exit where they do not parse."""
    kind = type(next(iter(variants.values()))[1])
    flat = tyro.conf.arg(name="")
    line: Any = make_dataclass(
        "CommandLine", [("config", Annotated[kind, flat]), ("run", Annotated[options, flat])], frozen=True
    )
    line.__doc__ = kind.__doc__
    default = options(Path("runs") / name)
    lines = {variant: (text, line(config, default)) for variant, (text, config) in variants.items()}
    prog = f"python -m recipes.{name}"
    if len(lines) == 1:
        parsed = tyro.cli(line, args=arguments, default=next(iter(lines.values()))[1], prog=prog)
    else:
        parsed = tyro.extras.overridable_config_cli(lines, args=arguments, prog=prog)
    return parsed.config, parsed.run
