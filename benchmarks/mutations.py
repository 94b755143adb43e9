"""What can be wrong with a file: seeded mutations of its bytes, of its fields, and of what stands at its name."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Mutation = Callable[[np.random.Generator, Path], Any]
"""`mutate(rng, path)` changes the file in place."""

CANARY = "EXECUTED"
"""A folder beside the mutated files that appears where a payload ran."""

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2.5, 10**12, 10**30, -(10**12), 1e308, float("nan"), float("inf"), "", "x" * 10_000,
    "a\nb\x1b[2J", "../../../etc/passwd", "/dev/zero", "\ud800", "float8_e4m3",
    [], [[]], {}, {"a": {"b": {}}}, [10**12], [-1], ["0"],
)  # fmt: skip


class _Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, where: Path) -> None:
        self._where = where

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._where),)


def payload(path: Path) -> bytes:
    """A pickle that runs code."""
    return pickle.dumps(_Payload(path.parent / CANARY))


def _bytes(change: Callable[[np.random.Generator, bytes], bytes]) -> Mutation:
    def mutate(rng: np.random.Generator, path: Path) -> None:
        path.write_bytes(change(rng, path.read_bytes()))

    return mutate


def _flip(rng: np.random.Generator, content: bytes) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(0, len(content), rng.integers(1, 9)):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def _at_header(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut where a header begins or ends: a zip's parts, the first bytes, the last ones."""
    marks = [
        at + shift for mark in (b"PK", b"IDAT", b"\n", b"{", b"}") for at in _found(content, mark) for shift in (0, 4)
    ]
    return content[: rng.choice([*marks, 1, 8, 100, len(content) - 1])]


def _found(content: bytes, mark: bytes) -> list[int]:
    at, found = content.find(mark), []
    while at >= 0 and len(found) < 100:
        found.append(at)
        at = content.find(mark, at + 1)
    return found


def _overwrite(rng: np.random.Generator, content: bytes) -> bytes:
    at, length = rng.integers(0, len(content)), rng.integers(1, 64)
    filling = rng.choice([b"\x00", b"\xff", b"9"])
    return content[:at] + bytes(filling) * int(length) + content[at + length :]


def _grow(rng: np.random.Generator, content: bytes) -> bytes:
    at = rng.integers(0, len(content))
    return content[:at] + rng.bytes(int(rng.integers(1, 1000))) + content[at:]


def _replaced_by(make: Callable[[Path], Any]) -> Mutation:
    def mutate(_: np.random.Generator, path: Path) -> None:
        path.unlink()
        make(path)

    return mutate


def _pickled(path: Path) -> None:
    path.write_bytes(payload(path))


ANY: dict[str, Mutation] = {
    "bits": _bytes(_flip),
    "cut": _bytes(lambda rng, content: content[: rng.integers(0, len(content))]),
    "cut at a header": _bytes(_at_header),
    "overwritten": _bytes(_overwrite),
    "grown": _bytes(_grow),
    "twice": _bytes(lambda _, content: content * 2),
    "empty": _bytes(lambda *_: b""),
    "noise": _bytes(lambda rng, content: rng.bytes(len(content))),
    "text": _bytes(lambda *_: "Thésis\n".encode()),
    "a pickle with a payload": _replaced_by(_pickled),
    "gone": _replaced_by(lambda _: None),
    "a folder": _replaced_by(Path.mkdir),
    "a pipe": _replaced_by(os.mkfifo),
    "an endless device": _replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _replaced_by(lambda path: path.symlink_to(path)),
    "a link to nowhere": _replaced_by(lambda path: path.symlink_to("/nowhere")),
}
"""Of every file."""


def _fields(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every field below a JSON document."""
    found, left = [], [document]
    while left:
        here = left.pop()
        keys = here.keys() if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        found += [(here, key) for key in keys]
        left += [here[key] for key in keys]
    return found


def mutated_json(rng: np.random.Generator, text: str) -> str:
    """A JSON text with another field, one fewer or one more, or a tree of another kind."""
    document = json.loads(text)
    container, key = (fields := _fields(document))[rng.integers(len(fields))]
    kind = rng.integers(4)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[str(VALUES[rng.integers(len(VALUES))])[:100]] = container[key]
    else:
        container[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(document)


def _text(change: Callable[[np.random.Generator, str], str]) -> Mutation:
    return lambda rng, path: path.write_text(change(rng, path.read_text(encoding="utf-8")), encoding="utf-8")


def _first_line(change: Callable[[np.random.Generator, str], str]) -> Callable[[np.random.Generator, str], str]:
    """Of files with a document per line; the others are one document."""

    def changed(rng: np.random.Generator, text: str) -> str:
        if text.startswith("{\n"):
            return change(rng, text)
        first, _, rest = text.partition("\n")
        return f"{change(rng, first)}\n{rest}"

    return changed


JSON: dict[str, Mutation] = {
    **{f"field {number}": _text(_first_line(mutated_json)) for number in range(8)},
    "a list": _text(lambda _, text: f"[{text}]"),
    "nested 100,000 deep": _text(lambda _, text: '{"a": ' + "[" * 100_000),
    "nested and closed": _text(lambda _, text: '{"a": ' + "[" * 900 + "]" * 900 + "}"),
    "an integer of 5,000 digits": _text(lambda _, text: text.replace("{", '{"n": ' + "9" * 5000 + ",", 1)),
    "another encoding": lambda _, path: path.write_bytes(path.read_bytes().decode().encode("utf-16")),
}


def npy(array: np.ndarray, **header: Any) -> bytes:
    """An .npy file whose header may lie."""
    stream = io.BytesIO()
    described = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(stream, described | header)
    return stream.getvalue() + array.tobytes()


def _archive(path: Path, members: Mapping[str, bytes], packed: bool = False) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def _array(change: Callable[[np.random.Generator, np.ndarray], bytes | None]) -> Mutation:
    """One array of an .npz is another, or gone where that is None."""

    def mutate(rng: np.random.Generator, path: Path) -> None:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        chosen = sorted(arrays)[rng.integers(len(arrays))]
        members = {name: npy(array) if name != chosen else change(rng, array) for name, array in arrays.items()}
        _archive(path, {name: content for name, content in members.items() if content is not None})

    return mutate


def _with_value(rng: np.random.Generator, array: np.ndarray) -> bytes:
    """One element of it is a number that few networks have."""
    number = rng.choice([np.nan, np.inf, -np.inf, -1.0, -5.0, 1e30, 2.5, 0.0, 1e12])
    if array.dtype.kind not in "biuf" or not array.size:
        return npy(np.array(number))
    changed = array.astype(array.dtype, copy=True)
    with np.errstate(all="ignore"):
        changed.flat[rng.integers(array.size)] = np.array(number).astype(array.dtype)
    return npy(changed)


def _other_dtype(rng: np.random.Generator, array: np.ndarray) -> bytes:
    dtype = rng.choice(["bool", "int64", "uint64", "float16", "float64", "complex64", "U5"])
    with np.errstate(all="ignore"):
        return npy(np.zeros(array.shape, str(dtype)) if array.dtype.kind == "U" else array.astype(str(dtype)))


def _members(path: Path) -> dict[str, bytes]:
    with np.load(path) as archive:
        return {name: npy(archive[name]) for name in archive.files}


def _pickle_in_array(rng: np.random.Generator, path: Path) -> None:
    members = _members(path)
    chosen = sorted(members)[rng.integers(len(members))]
    _archive(path, members | {chosen: npy(np.zeros(0, "u1"), descr="|O", shape=(1,)) + payload(path)})


def _bomb(_: np.random.Generator, path: Path) -> None:
    zeros = npy(np.zeros(0, "u1"), shape=(2**28,)) + bytes(2**28)
    _archive(path, _members(path) | {"extra": zeros}, packed=True)


def _encrypted(_: np.random.Generator, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for mark, shift in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for at in _found(bytes(content), mark):
            content[at + shift] |= 1
    path.write_bytes(content)


def _hidden_name(rng: np.random.Generator, path: Path) -> None:
    members = _members(path)
    old = sorted(members)[rng.integers(len(members))]
    new = str(rng.choice(["../../escape", "/abs", "a/" * 5000 + "b", "", "a\nb", "x" * 60_000]))
    _archive(path, members | {new: members.pop(old)})


NPZ: dict[str, Mutation] = {
    "no such array": _array(lambda *_: None),
    **{f"a value {number}": _array(_with_value) for number in range(4)},
    "another dtype": _array(_other_dtype),
    "another shape": _array(lambda rng, a: npy(np.zeros(tuple(rng.integers(0, 5, rng.integers(0, 4))), a.dtype))),
    "a header of 10¹²": _array(lambda _, a: npy(a, shape=(10**12,))),
    "a header of 2⁶⁴": _array(lambda _, a: npy(a, shape=(2**32, 2**32))),
    "a negative header": _array(lambda _, a: npy(a, shape=(-1, *a.shape))),
    "a header that is no literal": _array(lambda *_: b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118),
    "a pickle in an array": _pickle_in_array,
    "a zip bomb nobody asked for": _bomb,
    "encrypted": _encrypted,
    "another name": _hidden_name,
}


def png(height: int, width: int) -> bytes:
    """A small PNG that says to be of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


IMAGE: dict[str, Mutation] = {
    **{f"{n} × {n} pixels": _bytes(lambda *_, n=n: png(n, n)) for n in (9, 4000, 13_000, 2**31 - 1)},
    "PostScript": _bytes(lambda *_: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n"),
    "a GIF": _bytes(lambda *_: b"GIF89a\x08\x00\x08\x00\x00\x00\x00;"),
}


def _safetensors(change: Callable[[np.random.Generator, str], str]) -> Mutation:
    """Another header before the same bytes."""

    def mutate(rng: np.random.Generator, path: Path) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = change(rng, content[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])

    return mutate


def _length(_: np.random.Generator, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 10**12) + path.read_bytes()[8:])


SAFETENSORS: dict[str, Mutation] = {
    **{f"header field {number}": _safetensors(mutated_json) for number in range(10)},
    "a deep header": _safetensors(lambda *_: '{"a": ' + "[" * 10_000),
    "a header of 10¹² bytes": _length,
}


def _state(change: Callable[[np.random.Generator, dict[str, Any]], Any]) -> Mutation:
    """Another state dict, saved as PyTorch saves it."""

    def mutate(rng: np.random.Generator, path: Path) -> None:
        import torch

        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        zipped = zipfile.is_zipfile(path)
        torch.save(change(rng, state), path, _use_new_zipfile_serialization=zipped)

    return mutate


def _one_tensor(rng: np.random.Generator, state: dict[str, Any]) -> dict[str, Any]:
    import torch

    name = sorted(state)[rng.integers(len(state))]
    old = state[name]
    changes = (
        lambda: old.double().fill_(float(rng.choice([np.nan, np.inf, -1.0, 1e30]))),
        lambda: torch.zeros(()).expand(2**20, 2**20),
        lambda: old[:0] if old.ndim else old,
        lambda: old.to(torch.complex64),
        lambda: old.to(torch.float8_e4m3fn),
        lambda: old.to(torch.bool),
        lambda: "a text",
        lambda: {"nested": old},
        lambda: old.to_sparse() if old.is_floating_point() and old.ndim else old,
    )
    return state | {name: changes[rng.integers(len(changes))]()}


def _variance(rng: np.random.Generator, state: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in sorted(state) if name.endswith("running_var")]
    name = names[rng.integers(len(names))]
    return state | {name: -state[name]}


def _renamed(rng: np.random.Generator, state: dict[str, Any]) -> dict[str, Any]:
    names = sorted(state)
    old = names[rng.integers(len(names))]
    new = rng.choice(["layer1.999999999.conv1.weight", "layer1.-1.conv1.weight", "a\nb", "", "x" * 10_000, "../a"])
    return {str(new) if name == old else name: value for name, value in state.items()}


def _many(_: np.random.Generator, state: dict[str, Any]) -> dict[str, Any]:
    return state | {f"layer9.{i}.odd.weight": state["conv1.weight"] for i in range(20_000)}


def _payload_inside(_: np.random.Generator, path: Path) -> None:
    """The pickle of a zip archive is replaced; the older format is one pickle after another."""
    if not zipfile.is_zipfile(path):
        _pickled(path)
        return
    changed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, payload(path) if entry.filename.endswith("data.pkl") else old.read(entry))
    path.write_bytes(changed.getvalue())


TORCH: dict[str, Mutation] = {
    **{f"a tensor {number}": _state(_one_tensor) for number in range(6)},
    "a negative variance": _state(_variance),
    "another name": _state(_renamed),
    "another name again": _state(_renamed),
    "20,000 unknown names": _state(_many),
    "a list": _state(lambda _, state: list(state.values())),
    "a payload inside": _payload_inside,
}

SPECIAL: dict[str, dict[str, Mutation]] = {
    ".json": JSON, ".jsonl": JSON, ".npz": NPZ, ".png": IMAGE, ".jpg": IMAGE,
    ".safetensors": SAFETENSORS, ".pth": TORCH,
}  # fmt: skip


def mutate(rng: np.random.Generator, path: Path) -> str:
    """Change the file by a random mutation, half of the time one of its format; returns what was done."""
    special = SPECIAL[path.suffix]
    chosen = special if rng.random() < 0.6 else ANY
    name = sorted(chosen)[rng.integers(len(chosen))]
    chosen[name](rng, path)
    return name


def copy_honest(honest: Path, target: Path) -> None:
    """A copy to change; what a mutation made of the one before goes."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(honest, target)
