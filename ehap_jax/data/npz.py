"""Data sets in a NumPy archive: `npz:PATH` with x_train, y_train, x_test and y_test."""

import zipfile
from pathlib import Path

import numpy as np

from ehap_jax.data.dataset import Source, small_image_augmentation

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: str | Path) -> Source:
    """Images uint8 (N, H, W, C) and integer labels (N,) from an .npz file; pickled arrays are refused.

    Classes are 0 .. the largest label of either split. Augmentation is CIFAR's: a crop after padding by 4 pixels
    (an eighth of the height, at least 1) and a flip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an .npz file, a key is missing (the message lists those found), or an array does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded.items()) if isinstance(loaded, np.lib.npyio.NpzFile) else None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable .npz archive of plain arrays: {error}") from error
    if arrays is None:
        raise ValueError(f"{path} holds a single array; expected an .npz archive with {', '.join(_KEYS)}")
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it holds: {', '.join(arrays) or 'nothing'}")
    x_train, y_train, x_test, y_test = (arrays[key] for key in _KEYS)
    labels = [y for y in (y_train, y_test) if y.size and np.issubdtype(y.dtype, np.integer)]
    num_classes = max((int(y.max()) for y in labels), default=0) + 1
    return Source(path.stem, (x_train, y_train), (x_test, y_test), num_classes, small_image_augmentation(x_train))
