"""A time limit at which a run stops cleanly, to be continued later."""

import time
from dataclasses import dataclass, field


class OutOfTime(Exception):
    """The time limit was reached; everything done so far is on disk, and the run can be resumed."""


@dataclass(frozen=True)
class Deadline:
    """So many minutes from when it is made; `Deadline()` never passes.

    Raises:
        ValueError: the limit is not positive.

    Example:
        >>> Deadline().passed, Deadline(minutes=60).passed
        (False, False)
    """

    minutes: float | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"the time limit must be a positive number of minutes, not {self.minutes}")

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self.minutes is not None and time.monotonic() - self.started >= 60 * self.minutes

    def minutes_left(self) -> float | None:
        """What remains for a part of the work, at least a second; None without a limit."""
        if self.minutes is None:
            return None
        return max(self.minutes - (time.monotonic() - self.started) / 60, 1 / 60)

    def check(self, done: str) -> None:
        """Stop here if the time is over; call it where everything up to `done` is saved.

        Raises:
            OutOfTime: the time is over.
        """
        if self.passed:
            raise OutOfTime(f"stopped after {self.minutes:g} minutes with {done}")
