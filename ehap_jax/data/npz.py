"""Data sets in a NumPy archive: `npz:PATH` with x_train, y_train, x_test and y_test."""

from pathlib import Path

import numpy as np

from ehap_jax._untrusted_files import read_arrays
from ehap_jax.data.dataset import Source, small_image_augmentation

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: str | Path) -> Source:
    """Images uint8 (N, H, W, C) and integer labels (N,) from an .npz file; pickled arrays are refused.

    Classes are 0 .. the largest label of either split. Augmentation is CIFAR's: a crop after padding by 4 pixels
    (an eighth of the height, at least 1) and a flip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an .npz file, a key is missing (the message lists those found), an array does not fit, or
            labels are of more classes than there are training images.
    """
    path = Path(path)
    arrays = read_arrays(path, _KEYS, what="data file")
    x_train, y_train, x_test, y_test = (arrays[key] for key in _KEYS)
    labels = [y for y in (y_train, y_test) if y.size and np.issubdtype(y.dtype, np.integer)]
    num_classes = max((int(y.max()) for y in labels), default=0) + 1
    if num_classes > max(len(y_train), 1):
        raise ValueError(
            f"{path} has a label {num_classes - 1} and {len(y_train)} training images, which is fewer than one for "
            "every class; labels count the classes from 0"
        )
    return Source(path.stem, (x_train, y_train), (x_test, y_test), num_classes, small_image_augmentation(x_train))
