"""Variables in one NumPy archive, by path: readable without knowing their structure, and without pickle."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax._untrusted_files import read_arrays, shown
from ehap_jax._whole_files import write_arrays

MAX_DEPTH = 32


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
        name = path_name(keys)
        array = np.asarray(leaf)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name}: {array.dtype} cannot be stored in an .npz; convert it to float32 first")
        if not all(isinstance(key, jax.tree_util.DictKey) and "/" not in str(key.key) for key in keys):
            raise TypeError(f"{name}: variables must be nested dictionaries with names that have no slash")
        arrays[name] = array
    write_arrays(path, arrays)
    return path


def load_variables(path: str | Path) -> dict[str, Any]:
    """The variables written by `save_variables`, as nested dictionaries of NumPy arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an .npz of plain arrays, or a name is also the beginning of another.
    """
    variables: dict[str, Any] = {}
    for name, array in read_arrays(path, what="file of variables").items():
        *folders, last = name.split("/")
        place: Any = variables
        for folder in folders[: MAX_DEPTH + 1]:
            place = place.setdefault(folder, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place or len(folders) > MAX_DEPTH:
            raise ValueError(f"{path}: {shown(name)} is no name of a variable beside the others")
        place[last] = array
    return variables
