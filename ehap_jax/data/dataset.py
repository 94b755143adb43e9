"""A data set in memory: three splits of uint8 images, and the statistics to normalise them."""

import dataclasses
from typing import NamedTuple

import numpy as np

from ehap_jax.data.augment import Augmentation

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, standard deviation) per channel, in units where 255 is 1."""


class Source(NamedTuple):
    """What a reader found: training and test data as (images uint8 (N, H, W, C), integer labels (N,))."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    num_classes: int
    augmentation: Augmentation


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images as uint8 (N, H, W, C), labels as int32 (N,), split three ways; read-only.

    The validation split is carved out of the training data, so that the test split is used for nothing but the
    last evaluation. `mean` and `std` are those of the training split unless others were given, per channel, in units
    where 255 is 1.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels


def make_dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    augmentation: Augmentation,
    validation_fraction: float = 0.1,
    seed: int = 0,
    normalisation: Normalisation | None = None,
) -> Dataset:
    """Carve a stratified validation split out of `train`, and measure mean and standard deviation on the rest.

    Args:
        name: what the data set is called in messages and run directories.
        train, test: (images uint8 (N, H, W, C), integer labels (N,)).
        num_classes: labels are in [0, num_classes).
        augmentation: what training does to an image.
        validation_fraction: share of every class's training images that is held out for validation, in (0, 1).
        seed: of the validation split; it does not touch the test split.
        normalisation: (mean, std) that a trained network expects; those of the training split by default.

    Raises:
        ValueError: shapes, dtypes, label range, fraction or normalisation do not fit; the message names the array.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), not {validation_fraction}")
    x_train, y_train = _checked(name, "train", train, num_classes)
    x_test, y_test = _checked(name, "test", test, num_classes)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{name}: training images are {x_train.shape[1:]}, test images {x_test.shape[1:]}")
    in_train, in_val = stratified_split(y_train, validation_fraction, seed)
    if not len(in_train) or not len(in_val):
        raise ValueError(
            f"{name}: {len(y_train)} training images leave {len(in_train)} for training and {len(in_val)} for "
            f"validation at validation_fraction={validation_fraction}; both need at least one"
        )
    mean, std = normalisation or channel_statistics(x_train[in_train])
    channels = x_train.shape[-1]
    if not len(mean) == len(std) == channels or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise ValueError(
            f"{name}: images of {channels} channels need as many finite means and positive stds: {mean}, {std}"
        )
    arrays = (x_train[in_train], y_train[in_train], x_train[in_val], y_train[in_val], x_test, y_test)
    for array in arrays:
        array.setflags(write=False)
    return Dataset(name, *arrays, num_classes=num_classes, mean=mean, std=std, augmentation=augmentation)


def small_image_augmentation(images: np.ndarray, *, flip: bool = True) -> Augmentation:
    """CIFAR's: a crop after padding by an eighth of the height (4 pixels of 32, at least 1), and a flip."""
    padding = max(1, images.shape[1] // 8) if images.ndim == 4 else 1
    return Augmentation(crop_padding=padding, flip=flip)


def limit_training(dataset: Dataset, count: int | None, seed: int = 0) -> Dataset:
    """The data set with `count` of its training images, every class by its share; all of them where it is None.

    Normalisation and the other splits stay as they are.

    Raises:
        ValueError: there are not as many training images, or `count` is below 1.
    """
    if count is None:
        return dataset
    total = len(dataset.x_train)
    if not 1 <= count <= total:
        raise ValueError(f"{dataset.name}: cannot take {count} of {total} training images")
    order = np.random.default_rng(seed).permutation(total)
    # The i-th image of a class with n images ranks at (i + 0.5) / n: the lowest ranks are a share of every class.
    ranks = np.empty(total)
    for label in np.unique(dataset.y_train):
        members = order[dataset.y_train[order] == label]
        ranks[members] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = np.sort(np.argsort(ranks, kind="stable")[:count])
    return dataclasses.replace(dataset, x_train=dataset.x_train[chosen], y_train=dataset.y_train[chosen])


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (rest, held_out); `round(fraction * n)` of every class's n examples are held out."""
    generator = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held_out.append(generator.permutation(members)[: round(fraction * len(members))])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, H, W, C), in units where 255 is 1.

    Computed from the counts of the 256 values, so exact and light on memory. A constant channel has standard
    deviation 1, so that normalising never divides by zero.
    """
    mean, std = [], []
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        values = np.arange(256) / 255
        average = float(counts @ values / counts.sum())
        deviation = float(np.sqrt(counts @ (values - average) ** 2 / counts.sum()))
        mean.append(average)
        std.append(deviation or 1.0)
    return tuple(mean), tuple(std)


def _checked(
    name: str, split: str, arrays: tuple[np.ndarray, np.ndarray], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = arrays
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{name}: x_{split} must be uint8 of shape (N, H, W, C), not {images.dtype} of shape {images.shape}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name}: y_{split} must be integers of shape {images.shape[:1]}, "
            f"not {labels.dtype} of shape {labels.shape}"
        )
    if not len(labels):
        raise ValueError(f"{name}: the {split} split is empty")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{name}: y_{split} has labels in [{labels.min()}, {labels.max()}], outside [0, {num_classes - 1}]"
        )
    return images, labels.astype(np.int32)
