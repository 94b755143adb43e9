"""Data sets by name, for recipes and command lines."""

from ehap_jax.data.dataset import Dataset, Normalisation
from ehap_jax.data.digits import load_digits
from ehap_jax.data.npz import load_npz

_KNOWN = "'digits' (scikit-learn's, offline), 'npz:PATH' (x_train, y_train, x_test, y_test)"


def load_dataset(
    spec: str, *, validation_fraction: float = 0.1, seed: int = 0, normalisation: Normalisation | None = None
) -> Dataset:
    """The data set called `spec`: "digits" or "npz:PATH".

    Args:
        spec: the name.
        validation_fraction: share of the training data held out for validation, in (0, 1).
        seed: of the validation split.
        normalisation: (mean, std) per channel for images in [0, 1]; those of the training split by default.

    Raises:
        ValueError: no data set has that name; the message lists those known.

    Example:
        >>> load_dataset("digits").image_shape
        (8, 8, 1)
    """
    name, separator, argument = spec.partition(":")
    if name == "digits" and not separator:
        return load_digits(validation_fraction=validation_fraction, seed=seed, normalisation=normalisation)
    if name == "npz" and argument:
        return load_npz(argument, validation_fraction=validation_fraction, seed=seed, normalisation=normalisation)
    raise ValueError(f"unknown data set {spec!r}; known data sets: {_KNOWN}")
