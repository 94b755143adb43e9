"""Tensors out of checkpoint files, without ever running what is in them.

PyTorch files are read with `torch.load(weights_only=True)` after their zip directory is found to be honest;
`.safetensors` files are data by construction. Every failure is a `CheckpointError` that says what to do.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop.forms import CheckpointError

CONTAINERS = ("state_dict", "net", "model", "model_state_dict", "model_state")
"""Where training scripts put the state dict inside what they save."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of a checkpoint by name, and the plain values saved beside them.

    Args:
        source: a PyTorch file, a `.safetensors` file, a state dict (of torch tensors or arrays), or a dictionary that
            holds one under "state_dict", "net", "model", "model_state_dict" or "model_state".

    Returns:
        (tensors, metadata): names without the prefixes of DataParallel and torch.compile; metadata holds numbers and
        strings such as {"epoch": 200, "best_prec1": 92.6}, and for safetensors the file's own metadata.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, dishonest, or one that would have to run code to be read.
        TypeError: something else than a path or a mapping.
    """
    if isinstance(source, Mapping):
        container: Any = source
        name = "the state dict"
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            raise CheckpointError(f"{path} is a directory; pass the checkpoint file inside it")
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty")
        name = str(path)
        if path.suffix == ".safetensors":
            tensors, metadata = _read_safetensors(path)
            return _without_prefix(tensors), dict(metadata)
        container = _read_torch(path)
    elif hasattr(source, "state_dict"):
        raise TypeError("from_torch takes a state dict; pass module.state_dict() instead of the module")
    else:
        raise TypeError(f"from_torch takes a path or a state dict, not {type(source).__name__}")
    tensors, metadata = _find_state_dict(container, name)
    nameless = [key for key in tensors if not isinstance(key, str)]
    if nameless:
        raise CheckpointError(
            f"{name}: the tensors of a state dict have names; one of these has the key {nameless[0]!r}"
        )
    arrays = {key: _to_numpy(key, value) for key, value in tensors.items()}
    return _without_prefix(arrays), metadata


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError("reading PyTorch files needs PyTorch: pip install 'ehap-jax[torch]'") from error
    import argparse
    import pickle

    if zipfile.is_zipfile(path):
        _check_zip(path)
    try:
        # A Namespace of options is plain data, and the files of EigenDamage and HAP carry one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights only load failed" in str(error).lower() and "invalid magic number" not in str(error).lower():
            raise CheckpointError(_refusal(path, error)) from error
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint: {_first_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        if "torchscript" in str(error).lower():
            raise CheckpointError(
                f"{path} is a TorchScript archive, which holds code. Convert it once, if you trust it:\n"
                f'  module = torch.jit.load("{path}", map_location="cpu")\n'
                f'  torch.save(module.state_dict(), "{path.stem}-weights.pth")'
            ) from error
        raise CheckpointError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    except (UnicodeDecodeError, AssertionError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint: {_first_line(error)}") from error


def _refusal(path: Path, error: BaseException) -> str:
    return (
        f"{path} pickles Python objects (a whole module, say); reading it would run code, so it is refused "
        f"({_first_line(error)}). If you trust the file, convert it once where its classes can be imported:\n"
        f'  module = torch.load("{path}", map_location="cpu", weights_only=False)\n'
        f'  torch.save(module.state_dict(), "{path.stem}-weights.pth")'
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (told or lines or [type(error).__name__])[0][:200]


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
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {_first_line(error)}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading .safetensors needs safetensors: pip install 'ehap-jax[torch]'") from error
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, damaged or not safetensors: {_first_line(error)}") from error


def _find_state_dict(container: Any, name: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    if not isinstance(container, Mapping):
        raise CheckpointError(f"{name} holds a {type(container).__name__}; expected a dictionary of tensors")
    if container and all(_is_tensor(value) for value in container.values()):
        return container, {}
    found = [key for key in CONTAINERS if isinstance(container.get(key), Mapping)]
    if len(found) != 1:
        keys = ", ".join(map(str, list(container)[:12]))
        what = f"several: {', '.join(found)}" if found else f"none of {', '.join(CONTAINERS)}"
        raise CheckpointError(f"{name}: cannot tell which entry is the state dict ({what}); its keys are: {keys}")
    tensors = container[found[0]]
    strange = [key for key, value in tensors.items() if not _is_tensor(value)]
    if strange or not tensors:
        what = f"{strange[0]!r} is not a tensor" if strange else "it is empty"
        raise CheckpointError(f"{name}[{found[0]!r}] is not a state dict: {what}")
    plain = {k: v for k, v in container.items() if isinstance(v, bool | int | float | str)}
    plain |= {k: v.item() for k, v in container.items() if _is_tensor(v) and np.prod(tuple(v.shape), dtype=int) == 1}
    return tensors, plain


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
    if str(value.dtype) == "torch.bfloat16":
        value = value.float()
    return value.numpy()


def _without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if tensors and all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
