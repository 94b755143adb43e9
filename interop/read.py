"""Tensors out of checkpoint files, without ever running what is in them.

PyTorch files are read with `torch.load(weights_only=True)` after their zip directory is found to be honest;
`.safetensors` files are data by construction. What training scripts pickle beside the weights is read as plain data
(`interop.inert`). Every failure is a `CheckpointError` that says what to do.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from interop.forms import CheckpointError
from interop.inert import inert_globals

CONTAINERS = ("state_dict", "net", "model", "model_state_dict", "model_state")
"""Where training scripts put the state dict inside what they save."""

WRAPPERS = ("module", "_orig_mod")
"""What DataParallel, AveragedModel and torch.compile put into names."""


def read_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    entry: str | None = None,
    beside: Mapping[str, Any] | None = None,
) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of a checkpoint by name, and the plain values saved beside them.

    Args:
        source: a PyTorch file, a `.safetensors` file, a state dict (of torch tensors or arrays), or a dictionary that
            holds one under "state_dict", "net", "model", "model_state_dict" or "model_state".
        entry: the key of the state dict in that dictionary, where it is another one ("model_ema").
        beside: arrays or lists of numbers that belong to it, under names of the same kind.

    Returns:
        (tensors, metadata): names without what wrappers put before or into them (DataParallel, torch.compile, the
        attribute of a LightningModule); metadata holds numbers and strings such as {"epoch": 200, "best_prec1": 92.6},
        and for safetensors the file's own metadata.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, dishonest, or one that would have to run code to be read.
        TypeError: something else than a path or a mapping.
    """
    extra = {key: _to_numpy(key, value) for key, value in (beside or {}).items()}
    if isinstance(source, Mapping):
        container: Any = source
        name = "the state dict"
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            raise CheckpointError(f"{path} is a directory; pass the checkpoint file inside it")
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}")
        if not path.is_file():
            raise CheckpointError(f"{path} is no regular file")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty")
        name = str(path)
        if path.suffix == ".safetensors":
            tensors, metadata = _read_safetensors(path)
            return _without_wrappers(tensors | extra), dict(metadata)
        container = _read_torch(path)
    elif hasattr(source, "state_dict"):
        raise TypeError("from_torch takes a state dict; pass module.state_dict() instead of the module")
    else:
        raise TypeError(f"from_torch takes a path or a state dict, not {type(source).__name__}")
    tensors, metadata = _find_state_dict(container, name, entry)
    nameless = [key for key in tensors if not isinstance(key, str)]
    if nameless:
        raise CheckpointError(
            f"{name}: the tensors of a state dict have names; one of these has the key {nameless[0]!r}"
        )
    arrays = {key: _to_numpy(key, value) for key, value in tensors.items()}
    return _without_wrappers(arrays | extra), metadata


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError("reading PyTorch files needs PyTorch: pip install 'ehap-jax[torch]'") from error
    import pickle

    with open(path, "rb") as file:
        first = file.read(4)
    if first == b"PK\x03\x04":
        _check_zip(path)
    elif first[:1] != b"\x80":
        raise CheckpointError(f"{path} is no PyTorch checkpoint: it is neither a zip archive nor a pickle")
    try:
        with torch.serialization.safe_globals(list(inert_globals())):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except (MemoryError, RecursionError, OverflowError, AssertionError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint: {_first_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        if "torchscript" in str(error).lower():
            raise CheckpointError(
                f"{path} is a TorchScript archive, which holds code and is not read; save the weights alone where it "
                "was made: torch.save(module.state_dict(), ...)"
            ) from error
        raise CheckpointError(f"{path} is truncated or damaged: {_first_line(error)}") from error


def _refusal(path: Path, told: str) -> str:
    """Why PyTorch's reader of plain data gave up, from what it says."""
    foreign = re.search(r"GLOBAL (\S+)", told)
    if foreign is not None or "Can only" in told or "unrecognized function" in told:
        what = "Python objects" if foreign is None else f"an object of the kind {foreign.group(1)}"
        return (
            f"{path} pickles {what}, which would run code to be read, so it is refused. Save the weights alone with "
            "the program that wrote the file: torch.save(module.state_dict(), ...)"
        )
    if "Unsupported operand" in told:
        return (
            f"{path} is damaged, or pickled with a protocol that state dicts do not have; save it with the default "
            "one: torch.save(state_dict, ...)"
        )
    return f"{path} is damaged or not a PyTorch checkpoint: {_first_line(told)}"


def _first_line(error: BaseException | str) -> str:
    """What went wrong, without PyTorch's advice on how to load it all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "weights_only" not in line and "weights only" not in line.lower()]
    return (told or [type(error).__name__])[0][:200]


def _check_zip(path: Path) -> None:
    """Refuse archives whose directory promises more bytes than the file has, and damaged ones."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(
                    f"{path}: entry {packed[0]!r} is compressed, which torch.save never does; refused, because it "
                    "can expand to any size"
                )
            for entry in entries:
                if entry.file_size != entry.compress_size or entry.header_offset + entry.file_size > size:
                    raise CheckpointError(
                        f"{path}: entry {entry.filename!r} claims {entry.file_size} bytes; the file has {size}"
                    )
            total = sum(entry.file_size for entry in entries)
            if total > size:
                raise CheckpointError(f"{path}: the entries claim {total} bytes in all; the file has {size}")
            bad = archive.testzip()
            if bad is not None:
                raise CheckpointError(f"{path} is damaged: the checksum of entry {bad!r} is wrong")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {_first_line(error)}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading .safetensors needs safetensors: pip install 'ehap-jax[torch]'") from error
    key = ""
    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                tensors[key] = file.get_tensor(key)
            return tensors, dict(file.metadata() or {})
    except AttributeError as error:
        kind = str(error).rpartition("attribute ")[2]
        raise CheckpointError(f"{path}: {key} is of {kind}, which NumPy lacks; save it as float32") from error
    except (SafetensorError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, damaged or not safetensors: {_first_line(error)}") from error


def _find_state_dict(container: Any, name: str, entry: str | None) -> tuple[Mapping[str, Any], dict[str, Any]]:
    if not isinstance(container, Mapping):
        raise CheckpointError(f"{name} holds a {type(container).__name__}; expected a dictionary of tensors")
    if entry is None and container and all(_is_tensor(value) for value in container.values()):
        return container, {}
    candidates = CONTAINERS if entry is None else (entry,)
    found = [key for key in candidates if isinstance(container.get(key), Mapping)]
    if len(found) != 1:
        keys = ", ".join(str(key)[:80] for key in list(container)[:12])
        what = f"several: {', '.join(found)}" if found else f"none of {', '.join(candidates)}"
        raise CheckpointError(
            f"{name}: cannot tell which entry is the state dict ({what}); pass entry=... to choose one of its keys: "
            f"{keys}"
        )
    tensors = container[found[0]]
    strange = [key for key, value in tensors.items() if not _is_tensor(value)]
    if strange or not tensors:
        what = f"{strange[0]!r} is not a tensor" if strange else "it is empty"
        raise CheckpointError(f"{name}[{found[0]!r}] is not a state dict: {what}")
    return tensors, {k: plain for k, v in container.items() if (plain := _plain(v)) is not None}


def _plain(value: Any) -> bool | int | float | str | None:
    """A number or a string as Python has it; None for anything else."""
    if _is_tensor(value) and np.prod(tuple(value.shape), dtype=int) == 1:
        value = value.item()
    return value if isinstance(value, bool | int | float | str) else None


NARROW_FLOATS = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
"""Floating-point formats that NumPy lacks; float32 holds each of their values."""


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _to_numpy(key: str, value: Any) -> np.ndarray:
    if not hasattr(value, "untyped_storage"):
        return np.asarray(value)
    if value.layout.__str__() != "torch.strided" or value.is_quantized or value.device.type == "meta":
        raise CheckpointError(f"{key}: only plain dense tensors are read; this one is {value.layout}, {value.device}")
    claimed = value.numel() * value.element_size()
    if claimed > value.untyped_storage().nbytes():
        raise CheckpointError(
            f"{key}: shape {tuple(value.shape)} claims {claimed} bytes, stored are {value.untyped_storage().nbytes()}"
        )
    value = value.detach().cpu()
    kind = str(value.dtype).removeprefix("torch.")
    if kind in NARROW_FLOATS:
        value = value.float()
    try:
        return value.numpy()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{key}: tensors of {kind} are not read") from error


def _without_wrappers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names without the components of `WRAPPERS` and without the path that all of them begin with.

    No network has all of its parts in one module, so such a path is that of the network inside something else.
    """
    averaged = {"n_averaged"} if len(tensors) > 1 else set()  # torch.optim.swa_utils.AveragedModel counts its updates
    names = {key: [part for part in key.split(".") if part not in WRAPPERS] for key in tensors if key not in averaged}
    modules = [parts[:-1] for parts in names.values()]
    ends = zip(min(modules, default=[]), max(modules, default=[]), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    renamed = {".".join(parts[shared:]): tensors[key] for key, parts in names.items()}
    return renamed if len(renamed) == len(names) else tensors
