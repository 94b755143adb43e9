"""Decoded images, kept once per source and content."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from ehap_jax._untrusted_files import read_arrays
from ehap_jax._whole_files import write_arrays

_VERSION = 1
"""Goes into every key; raised when what is stored changes."""


def checksum_of(files: Iterable[Path], root: Path) -> str:
    """sha256 over the names below `root` and the contents of files, in sorted order."""
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def cached_arrays(
    source: str, checksum: str, decode: Callable[[], Mapping[str, np.ndarray]], folder: str | Path | None = None
) -> dict[str, np.ndarray]:
    """`decode()`, from the file of the same source and checksum where there is one.

    Args:
        source: where the images come from, for the name of the file.
        checksum: of everything they depend on.
        decode: makes the arrays.
        folder: default is $EHAP_JAX_CACHE or ~/.cache/ehap_jax.

    Raises:
        ValueError: the cached file is damaged; the message says to delete it.
    """
    folder = Path(folder or os.environ.get("EHAP_JAX_CACHE") or Path.home() / ".cache" / "ehap_jax")
    key = hashlib.sha256(f"{_VERSION} {source} {checksum}".encode()).hexdigest()[:24]
    name = "".join(letter if letter.isalnum() else "-" for letter in source.split("/")[-1])[:40]
    file = folder / f"{name}-{key}.npz"
    if file.exists():
        try:
            return read_arrays(file)
        except ValueError as error:
            raise ValueError(f"the cached images in {file} cannot be read ({error}); delete the file") from error
    arrays = dict(decode())
    write_arrays(file, arrays)
    return arrays
