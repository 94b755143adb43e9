"""Data sets by name, for recipes and command lines."""

from collections.abc import Callable
from pathlib import Path

from ehap_jax._nearest import nearest
from ehap_jax.data.dataset import Dataset, Normalisation, Source, make_dataset
from ehap_jax.data.digits import read_digits
from ehap_jax.data.folder import read_folder
from ehap_jax.data.npz import read_npz
from ehap_jax.data.tfds import read_tfds

_READERS: dict[str, Callable[..., Source]] = {"tfds": read_tfds, "npz": read_npz, "folder": read_folder}

_KNOWN = (
    "'tfds:NAME' (such as tfds:cifar10), 'npz:PATH' (x_train, y_train, x_test, y_test), "
    "'folder:PATH' (train/<class>/*.png, test/<class>/*.png), 'digits' (scikit-learn's, offline)"
)


def load_dataset(
    spec: str,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    normalisation: Normalisation | None = None,
    cache: str | Path | None = None,
) -> Dataset:
    """The data set called `spec`: "tfds:NAME", "npz:PATH", "folder:PATH" or "digits".

    Args:
        spec: the name.
        validation_fraction: share of the training data held out for validation, in (0, 1).
        seed: of the validation split.
        normalisation: (mean, std) per channel for images in [0, 1]; those of the training split by default.
        cache: folder for decoded images of "tfds:" and "folder:"; default is $EHAP_JAX_CACHE or ~/.cache/ehap_jax.

    Raises:
        ValueError: no data set has that name; the message lists those known.
        FileNotFoundError: it is not here; the message says what to put where.
        ImportError: an extra is missing; the message names it.

    Example:
        >>> load_dataset("digits").image_shape
        (8, 8, 1)
    """
    name, separator, argument = spec.partition(":")
    if name == "digits" and not separator:
        source = read_digits()
    elif name in _READERS and argument:
        options = {} if name == "npz" else {"cache": cache}
        source = _READERS[name](argument, **options)
    else:
        near = nearest(name, ["digits", *_READERS])
        raise ValueError(f"unknown data set {spec!r}{near}; known data sets: {_KNOWN}")
    return make_dataset(
        *source[:3],
        num_classes=source.num_classes,
        augmentation=source.augmentation,
        validation_fraction=validation_fraction,
        seed=seed,
        normalisation=normalisation,
    )
