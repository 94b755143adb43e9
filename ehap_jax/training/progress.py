"""A progress bar with the time left per stage; in a file or a pipe, one line per finished stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Bars for the stages of a run, one under the other.

    Args:
        console: where to draw; default is standard error, so that results can be piped.

    Example:
        >>> with Progress() as progress, progress.stage("dense", total=2) as advance:
        ...     for epoch in range(2):
        ...         advance(loss=0.5)
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """A stage of `total` units; yields `advance(steps=1, **values)`, whose values are shown after the bar.

        Where there is no terminal, a line with the name, the seconds and the last values is printed when the stage
        is done.
        """
        started = time.perf_counter()
        note = ""
        task = self._bars.add_task(name, total=total, note="")

        def advance(steps: int = 1, **values: float | int | str) -> None:
            nonlocal note
            note = ", ".join(f"{key} {_short(value)}" for key, value in values.items()) or note
            self._bars.update(task, advance=steps, note=note)

        yield advance
        if not self.console.is_terminal:
            seconds = time.perf_counter() - started
            line = f"{name}: {seconds:.1f} s" + (f", {note}" if note else "")
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def counted(self, name: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """A stage that counts itself; yields `report(done, total)`, as `channel_trace(progress=)` takes."""
        with self.stage(name, total) as advance:
            before = 0

            def report(done: int, _: int) -> None:
                nonlocal before
                advance(done - before)
                before = done

            yield report

    def note(self, text: str) -> None:
        """Print a line of text above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
