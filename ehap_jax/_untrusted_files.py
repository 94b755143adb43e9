"""Files that may come from anyone: read within limits that follow from their size, and never executed.

Whatever is wrong with a file is a ValueError of one line that names it, never an exception of the format's own library.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ehap_jax._nearest import nearest_path

MAX_JSON_BYTES = 32 * 2**20
MAX_JSON_DEPTH = 256
MAX_UNPACKED = 100
"""How many times its own size an archive may unpack to; small ones up to `ALWAYS_UNPACKED` bytes."""
ALWAYS_UNPACKED = 64 * 2**20
_PIECE = 2**20
_BROKEN = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, MemoryError, OverflowError,
)  # fmt: skip
"""What `zipfile` raises for damaged, encrypted and oddly packed files, and the readers below."""


def regular_file(path: str | os.PathLike[str], what: str = "file", max_bytes: float = math.inf) -> Path:
    """The path, once it is known to be of a file that can be read to its end: no device, pipe or folder.

    Raises:
        FileNotFoundError: there is none; the message begins with "there is no" and `what` it is.
        ValueError: it is something else, or larger than `max_bytes`.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no {what} {path}{nearest_path(path)}") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no name of a file: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file, but a {_kind(found.st_mode)}")
    if found.st_size > max_bytes:
        raise ValueError(f"{path} has {found.st_size:,} bytes; a {what} has {max_bytes:,} at most")
    return path


def shown(value: Any, limit: int = 80) -> str:
    """A value from a file for a message: on one line, without control characters, and short."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def read_json(path: str | os.PathLike[str], *, what: str = "JSON file") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is too large, not JSON, nested deeper than `MAX_JSON_DEPTH`, or holds something else than an
            object.
    """
    path = regular_file(path, what, MAX_JSON_BYTES)
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text; errors, as those of `read_json`, begin with `where`."""
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{where} has {len(text):,} bytes of JSON; {MAX_JSON_BYTES:,} at most are read")
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} is nested deeper than {MAX_JSON_DEPTH} levels") from error
    except ValueError as error:  # malformed, no UTF-8, or an integer of thousands of digits
        raise ValueError(f"{where} is not a JSON file: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{where} must hold an object {{...}}, not a {type(document).__name__}")
    if _depth_exceeds(document, MAX_JSON_DEPTH):
        raise ValueError(f"{where} is nested deeper than {MAX_JSON_DEPTH} levels")
    return document


def read_arrays(
    path: str | os.PathLike[str], names: Sequence[str] | None = None, *, what: str = ".npz file"
) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, read without pickle; the others are not unpacked.

    Args:
        path: the file.
        names: which; all of them by default.
        what: it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, lacks a name (the message lists those found), has Python objects in it, or an
            array says to be larger than it is.
    """
    path = regular_file(path, what)
    with path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise ValueError(f"{path} holds a single array, and is no .npz archive")
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            _check_names(members, names or ())
            chosen = {name: members[name] for name in names} if names is not None else members
            _check_sizes(path.stat().st_size, chosen.values())
            return {name: _array(archive, name, member) for name, member in chosen.items()}
    except _BROKEN as error:
        raise ValueError(f"{path} is not a readable .npz archive of plain arrays: {_said(error)}") from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in members:
            raise ValueError(f"it has {shown(name)} twice")
        members[name] = member
    return members


def _check_names(members: Collection[str], names: Collection[str]) -> None:
    missing = [name for name in names if name not in members]
    if missing:
        found = ", ".join(shown(name) for name in list(members)[:20]) or "nothing"
        raise ValueError(f"it has no {', '.join(missing)}; it holds: {found}")


def _check_sizes(size: int, members: Iterable[zipfile.ZipInfo]) -> None:
    claimed = sum(member.file_size for member in members)
    if claimed > max(MAX_UNPACKED * size, ALWAYS_UNPACKED):
        raise ValueError(f"its {size:,} bytes would unpack to {claimed:,}, more than {MAX_UNPACKED} times as many")


def _array(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> np.ndarray:
    """One array; the bytes its header promises are there, no more and no fewer."""
    with archive.open(member) as stream:
        shape, in_columns, dtype = _header(stream, name)
        # Python's integers, which do not overflow.
        claimed = math.prod(shape) * dtype.itemsize
        there = member.file_size - stream.tell()
        if claimed != there:
            raise ValueError(f"{shown(name)} says to be {dtype} of shape {shown(shape)}, and has {there:,} bytes")
        content = np.empty(claimed, np.uint8)
        done = 0
        while piece := stream.read(_PIECE):
            content[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        if done != claimed:
            raise ValueError(f"{shown(name)} ends after {done:,} of {claimed:,} bytes")
    if dtype.kind == "b" and (content > 1).any():
        raise ValueError(f"{shown(name)} has truth values other than 0 and 1")
    array = np.ndarray(shape, dtype, content.data if claimed else None, order="F" if in_columns else "C")
    if dtype.kind == "U":
        letters = np.frombuffer(content, np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if (letters > sys.maxunicode).any():
            raise ValueError(f"{shown(name)} has letters that Unicode lacks")
    return array


def _header(stream: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) by the header of an .npy file."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{shown(name)} has version {version} of NumPy's format")
    try:
        shape, in_columns, dtype = readers[version](stream)
    except Exception as error:  # NumPy parses the header as Python literals, and raises what their parser raises
        raise ValueError(f"the header of {shown(name)} cannot be read: {_said(error)}") from error
    if dtype.kind not in "biufcU" or dtype.itemsize == 0 or dtype.fields is not None:
        raise ValueError(f"{shown(name)} holds {dtype}, not plain numbers or text")
    if any(type(length) is not int or length < 0 for length in shape) or len(shape) > 32:
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
    return shape, in_columns, dtype


def _said(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def _depth_exceeds(document: Any, limit: int) -> bool:
    level, depth = [document], 0
    while level:
        if depth > limit:
            return True
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        depth += 1
    return False


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "device")
