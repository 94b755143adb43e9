"""One directory per run: config, versions, metrics and files, each there whole or not at all."""

import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ehap_jax._untrusted_files import parse_json, read_json, regular_file, shown
from ehap_jax._whole_files import remove_unfinished, write_text, written_whole
from ehap_jax.training.run_lock import MARKER, RunLock, lock_run

_PACKAGES = ("ehap-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_SHOWN = 8
"""Settings that a message about changed ones lists."""


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Where a run writes: `config.json`, `versions.json`, `metrics.jsonl`, and whatever `write_json` names.

    Every file is written under a temporary name and renamed, so a reader, or a kill, never sees half of one. As long
    as the object lives, no other process can take up the directory.

    Example:
        >>> import tempfile
        >>> run = RunDirectory.create(tempfile.mkdtemp() + "/run", {"epochs": 3})
        >>> run.append_metrics({"epoch": 1, "loss": 0.5})
        >>> run.read_metrics()
        [{'epoch': 1, 'loss': 0.5}]
    """

    path: Path
    lock: RunLock | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def create(
        cls, path: str | Path, config: Any = None, *, resume: bool = False, overwrite: bool = False
    ) -> "RunDirectory":
        """Make the directory with its `config.json` and `versions.json`, or take up an existing one.

        Args:
            path: the directory; its parents are made as needed.
            config: a dataclass or mapping that determines the run.
            resume: continue a run of the same config; its files stay, and what a kill left half written goes. A new
                directory is made if there is none.
            overwrite: delete an earlier run first. Only a directory that this class has made is deleted.

        Raises:
            FileExistsError: the directory has files in it, and neither `resume` nor `overwrite` was asked for, or
                it is not a run.
            BlockingIOError: another process works there; the message has its process id.
            NotADirectoryError: `path` is a file, or lies below one.
            PermissionError: no file can be made there.
            ValueError: `resume` and `overwrite` together, or a config that differs from the one being resumed.
        """
        path = Path(path)
        wanted = json.loads(_to_json({} if config is None else config))
        check_output(path, resume=resume, overwrite=overwrite)
        if overwrite and is_run(path):
            lock = lock_run(path)  # nobody else works there
            shutil.rmtree(path)
            del lock
        elif (path / "config.json").exists():
            _check_config(path, read_json(path / "config.json"), wanted)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, lock_run(path))
        remove_unfinished(path)
        run.write_json("config.json", wanted)
        now = versions()
        earlier = run.read_json("versions.json") if (path / "versions.json").exists() else None
        if earlier is None:
            run.write_json("versions.json", now)
        elif {**earlier, "resumed_from": None} != {**now, "resumed_from": None}:
            run.write_json("versions.json", {**now, "resumed_from": earlier})
        return run

    def file(self, name: str) -> Path:
        """The path of a file or subdirectory of the run, its parents made."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def write_text(self, name: str, text: str) -> Path:
        """Write a file atomically and return its path."""
        target = self.file(name)
        write_text(target, text)
        if self.lock is not None:
            self.lock.tick()
        return target

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as JSON: dataclasses, NamedTuples, paths, NumPy and JAX arrays and scalars included."""
        return self.write_text(name, _to_json(value) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read back a JSON file of the run; raises a ValueError that names it where it holds no object."""
        return read_json(self.path / name)

    def seconds(self) -> float:
        """How long all processes had the run open, this one included; a kill loses what was after its last file."""
        if self.lock is None:
            raise ValueError(f"{self.path} was opened to be read; seconds are counted in a run that was created")
        self.lock.tick(now=True)
        return self.lock.seconds()

    def append_metrics(self, record: Mapping[str, Any], *, identity: tuple[str, ...] = ()) -> None:
        """Add one record as a line of `metrics.jsonl`; the file is replaced whole.

        Args:
            record: names and numbers.
            identity: an earlier record that agrees in all these names is dropped, so that a resumed run which
                repeats an epoch records it once; such as `("seed", "stage", "epoch")`.
        """
        new = _plain(record)
        same = tuple(new[name] for name in identity)
        kept = [old for old in self.read_metrics() if not identity or tuple(old.get(k) for k in identity) != same]
        self.write_text("metrics.jsonl", "".join(json.dumps(item) + "\n" for item in [*kept, new]))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, oldest first; none if there is no such file."""
        target = self.path / "metrics.jsonl"
        if not target.exists():
            return []
        lines = regular_file(target).read_bytes().splitlines()
        return [parse_json(line, f"{target}, line {number}") for number, line in enumerate(lines, 1)]


def versions() -> dict[str, Any]:
    """What produced a result: Python, packages, processor, device, and the git commit where there is one."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "processor": processor(),
        "device": {"backend": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "git": _git_commit(Path(__file__).resolve().parent),
    }


def processor() -> dict[str, Any]:
    """Its name, and those of its vector instructions by which numbers and times differ, where Linux tells them."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = (found.get("flags") or found.get("Features") or "").split()
    return {
        "name": found.get("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
    }


def _git_commit(directory: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it, only where this package is part of the repository.

    Files of measured results do not count: a benchmark of several parts rewrites its own between them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", str(directory)):
            return None
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results")
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def check_output(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raise as `RunDirectory.create` where a directory may not be taken up; reads nothing that takes time."""
    path = Path(path)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other; choose one")
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a run directory")
    if not path.is_dir() or not any(path.iterdir()):
        _require_writable(path)
        return
    if not resume and not overwrite:
        raise FileExistsError(
            f"run directory {path} already exists; continue it with --resume, start again with --overwrite, "
            "or choose another path"
        )
    if not is_run(path):
        raise FileExistsError(f"{path} is not a run directory (it has no {MARKER}); choose another path")
    _require_writable(path)
    if overwrite:
        _require_writable(path.absolute().parent)  # from which the old one goes


def _require_writable(path: Path) -> None:
    """Raise unless a file can be made in the directory, or in the one in which it and its parents will be made.

    One is made, because no permission bits tell of read-only file systems and users who may do everything.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be made: {place} is a file; choose another path")
    try:
        with written_whole(place / "probe"):
            raise _Probed
    except _Probed:
        return
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PermissionError(
            f"cannot write in {place} ({os.strerror(error.errno or 0)}); choose another path"
        ) from error


class _Probed(Exception):
    """A file could be made, and goes again."""


def _check_config(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise where the settings of a run are not those of its resume."""
    differing = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
    if differing:
        changes = [
            f"{shown(key)[1:-1]}: {_setting(stored, key)} there, {_setting(wanted, key)} now"
            for key in differing[:_SHOWN]
        ]
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ValueError(
            f"cannot resume {path} with another configuration ({'; '.join(changes)}{more}); use --overwrite or another "
            "path"
        )


def _setting(config: Mapping[str, Any], key: str) -> str:
    return shown(config.get(key), 200)


def is_run(path: str | Path) -> bool:
    """Whether a directory was made by `RunDirectory.create`, and is no other one of somebody's files."""
    marker = Path(path) / MARKER
    return marker.is_file() and not marker.is_symlink()


def _to_json(value: Any) -> str:
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    """The value in JSON's own types; NaN and infinities, which JSON lacks, become their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    if isinstance(value, float):
        return str(value)
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")
