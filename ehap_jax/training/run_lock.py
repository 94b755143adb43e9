"""One process at a time in a run directory, and how long each of them worked there."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

from ehap_jax._untrusted_files import read_json
from ehap_jax._whole_files import write_json

MARKER = ".ehap_jax_run"
"""The file that makes a directory a run's own: no other is ever deleted. Its lock is held by who works there."""
SECONDS = "seconds.json"
_EVERY = 5.0


class RunLock:
    """The lock on a run directory, held as long as this object lives, and released by the system when the process dies.

    Args:
        directory: of the run; the marker is made where there is none.

    Raises:
        BlockingIOError: another process works there; the message has its process id and what to do.
    """

    def __init__(self, directory: Path) -> None:
        descriptor = _locked(directory / MARKER)
        weakref.finalize(self, os.close, descriptor)
        self._clock = directory / SECONDS
        self._earlier = _earlier_seconds(self._clock)
        self._started = self._saved = time.monotonic()
        # In place, as another file would not be the locked one.
        os.ftruncate(descriptor, 0)
        record = {"format": "ehap_jax.run", "process": os.getpid(), "host": socket.gethostname()}
        os.pwrite(descriptor, json.dumps(record).encode(), 0)

    def seconds(self) -> float:
        """How long processes have worked in the directory, this one included."""
        return sum(self._earlier) + time.monotonic() - self._started

    def tick(self, *, now: bool = False) -> None:
        """Write the seconds down, if it is time: what a kill loses is what was not written."""
        if now or time.monotonic() - self._saved >= _EVERY:
            self._saved = time.monotonic()
            write_json(self._clock, {"processes": [*self._earlier, self._saved - self._started]})


_held: weakref.WeakValueDictionary[tuple[int, int], RunLock] = weakref.WeakValueDictionary()


def lock_run(directory: Path) -> RunLock:
    """The lock on a run directory; a process that holds it already gets the same one."""
    try:
        found = os.stat(directory / MARKER)
        own = _held.get((found.st_dev, found.st_ino))
    except FileNotFoundError:
        own = None
    if own is not None:
        return own
    lock = RunLock(directory)
    found = os.stat(directory / MARKER)
    _held[(found.st_dev, found.st_ino)] = lock
    return lock


def _locked(file: Path) -> int:
    """A descriptor of the file, locked; the system drops the lock with the process, so no dead one holds it."""
    import fcntl

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            warnings.warn(
                f"no locks on the file system of {file.parent}: let no other process write there", stacklevel=2
            )
            return descriptor
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(f"{file.parent} is in use by {_holder(file)}; wait for it or stop it") from error
        raise
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _holder(file: Path) -> str:
    try:
        record: dict[str, Any] = read_json(file)
        host = "" if record["host"] == socket.gethostname() else f" on {record['host']}"
        return f"process {int(record['process'])}{host}"
    except (ValueError, KeyError, TypeError, OSError):  # it is being written at this moment
        return "another process"


def _earlier_seconds(file: Path) -> list[float]:
    if not file.exists():
        return []
    found = read_json(file).get("processes")
    if not isinstance(found, list) or not all(type(x) in (int, float) and 0 <= x < 1e12 for x in found):
        raise ValueError(f"{file} has no list of seconds of processes; remove the file")
    return [float(x) for x in found]
