"""Variables in one NumPy archive, by path: readable without knowing their structure, and without pickle."""

import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ehap_jax._whole_files import written_whole


def save_variables(path: str | Path, variables: Any) -> Path:
    """Write nested dictionaries of arrays as an .npz of the names "params/conv1/kernel"; replaces an earlier file.

    Raises:
        TypeError: the variables hold something other than dictionaries of arrays, or a dtype NumPy lacks.

    Example:
        >>> import tempfile
        >>> path = save_variables(tempfile.mkdtemp() + "/variables.npz", {"params": {"w": np.ones(2, np.float32)}})
        >>> load_variables(path)["params"]["w"].tolist()
        [1.0, 1.0]
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        array = np.asarray(leaf)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name}: {array.dtype} cannot be stored in an .npz; convert it to float32 first")
        if not all(isinstance(key, jax.tree_util.DictKey) and "/" not in str(key.key) for key in keys):
            raise TypeError(f"{name}: variables must be nested dictionaries with names that have no slash")
        arrays[name] = array
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def load_variables(path: str | Path) -> dict[str, Any]:
    """The variables written by `save_variables`, as nested dictionaries of NumPy arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an .npz of plain arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of variables {path}")
    variables: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                *folders, last = name.split("/")
                place = variables
                for folder in folders:
                    place = place.setdefault(folder, {})
                place[last] = archive[name]
    except (zipfile.BadZipFile, EOFError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not an .npz of plain arrays: {error}") from error
    return variables
