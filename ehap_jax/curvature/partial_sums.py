"""The sums of an exact trace over the examples so far, on disk too, so that a run that was killed goes on."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from ehap_jax.curvature.saved_trace import TraceFingerprint, read_arrays, write_arrays

__all__ = ["PartialSums", "SumsFile"]


class PartialSums:
    """Per kernel and column the sum of squares, in float64, and where the run stands.

    Attributes:
      by_path: ``{path: (columns, *channels)}``.
      next: the first example that is not in the sums.
      scale: the float16 scale in use. rejected: how often it was lowered.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], scale: float) -> None:
        self.by_path = {path: np.zeros(shape) for path, shape in shapes.items()}
        self.next, self.scale, self.rejected = 0, scale, 0

    def add(self, path: str, start: int, squares: np.ndarray) -> None:
        """Squares of the columns from ``start`` on; those beyond the last column are zero and left out."""
        into = self.by_path[path][start : start + len(squares)]
        into += squares[: len(into)]


class SumsFile:
    """Where partial sums are kept, if anywhere."""

    def __init__(self, path: str | Path | None, of: TraceFingerprint | None, every: float) -> None:
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"save_to: the folder {Path(path).absolute().parent} does not exist")
        self._path, self._of, self._every = path, of, every
        self._saved = time.monotonic()

    def resume(self, sums: PartialSums) -> None:
        """Go on from the file, where there is one; raises a ValueError if it is of something else."""
        if self._path is None or self._of is None or not Path(self._path).exists():
            return
        arrays = read_arrays(self._path, self._of)
        sums.next, sums.rejected = int(arrays["next"]), int(arrays["rejected"])
        sums.scale = float(arrays["scale"])
        for path in sums.by_path:
            sums.by_path[path] = arrays[f"sum/{path}"]

    def save(self, sums: PartialSums, *, now: bool = False) -> None:
        """Write, if it is time."""
        if self._path is None or self._of is None or not (now or time.monotonic() - self._saved >= self._every):
            return
        arrays = {"next": sums.next, "scale": sums.scale, "rejected": sums.rejected}
        write_arrays(self._path, arrays | {f"sum/{path}": x for path, x in sums.by_path.items()}, self._of)
        self._saved = time.monotonic()
