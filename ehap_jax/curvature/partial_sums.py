"""Sums over the examples so far, on disk too, so that a run that was killed goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ehap_jax.curvature.saved_trace import TraceFingerprint, read_arrays, write_arrays

__all__ = ["PartialSums", "SumsFile"]


class PartialSums:
    """Sums by name in float64, and where the run stands.

    Attributes:
      by_path: of an exact trace ``{path: (columns, *channels)}``, of removal costs what `removal_costs` lists.
      next: the first example that is not in the sums.
      scale: the float16 scale in use. rejected: how often it was lowered.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], scale: float) -> None:
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
        wanted = {name: () for name in ("next", "rejected", "scale")}
        wanted |= {f"sum/{path}": x.shape for path, x in sums.by_path.items()}
        for name, shape in wanted.items():
            found = arrays.get(name)
            if found is None or found.shape != shape or found.dtype.kind not in "if":
                raise ValueError(f"{self._path} has no {name} of shape {shape} with numbers; remove the file")
            if not name.startswith("sum/") and found < 0:  # sums may be negative, as those of an indefinite head
                raise ValueError(f"{self._path}: {name} is negative; remove the file")
            if not np.isfinite(found).all():
                raise ValueError(f"{self._path}: {name} is not finite; remove the file")
        sums.next, sums.rejected = int(arrays["next"]), int(arrays["rejected"])
        sums.scale = float(arrays["scale"])
        for path in sums.by_path:
            sums.by_path[path] = arrays[f"sum/{path}"].astype(np.float64)

    def save(self, sums: PartialSums, *, now: bool = False) -> None:
        """Write, if it is time."""
        if self._path is None or self._of is None or not (now or time.monotonic() - self._saved >= self._every):
            return
        arrays = {"next": sums.next, "scale": sums.scale, "rejected": sums.rejected}
        write_arrays(self._path, arrays | {f"sum/{path}": x for path, x in sums.by_path.items()}, self._of)
        self._saved = time.monotonic()
