"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_MARK = ".unfinished-"
"""In the name of every temporary file, so that those a kill left behind are told from all others."""


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, of the same suffix, which takes its place when the block ends.

    The folder of `path` is made. Where the block raises, `path` is as it was and nothing is left behind; a kill leaves
    the temporary file, for `remove_unfinished`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}{_MARK}", suffix=target.suffix)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_unfinished(directory: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers left in a directory and below; only where nobody else writes."""
    for left in Path(directory).rglob(f".*{_MARK}*"):
        if left.is_file() and not left.is_symlink():
            left.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` by `text`, in UTF-8."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Replace the file at `path` by a document of JSON's own types, readable by people."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Replace the file at `path` by an .npz of arrays, numbers and texts; no pickle."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
