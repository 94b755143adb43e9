"""Any image classification set of TensorFlow Datasets, read without TensorFlow: `tfds:NAME`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ehap_jax._nearest import nearest
from ehap_jax.data.cache import cached_arrays, checksum_of
from ehap_jax.data.cifar_archive import CIFAR_ARCHIVES, prepare_cifar
from ehap_jax.data.dataset import Source, small_image_augmentation

_SIGNS = ("mnist", "emnist", "kmnist", "omniglot", "svhn_cropped")
"""Sets of characters: a mirrored one is another sign, so they are not flipped."""


def read_tfds(name: str, *, data_dir: str | Path | None = None, cache: str | Path | None = None) -> Source:
    """A prepared set in array_record, through `tfds.data_source`; CIFAR-10 and CIFAR-100 are prepared here if need be.

    Decoded images are cached by the contents of the prepared files. Augmentation is CIFAR's, without the flip for
    sets of characters.

    Args:
        name: "cifar10", "fashion_mnist", "name/config:version"; it must have `image` and `label`, images of one size,
            a "train" and a "test" (or "validation") split.
        data_dir: default is $TFDS_DATA_DIR or ~/tensorflow_datasets. An archive of CIFAR is looked for in
            `downloads/manual` below it.
        cache: see `ehap_jax.data.load_dataset`.

    Raises:
        ImportError: TFDS is not installed; the message names the extra.
        ValueError: no such data set, or not one of images of one size with labels.
        FileNotFoundError: it is not prepared; the message says what to put where.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f"tfds:{name} needs TensorFlow Datasets: pip install 'ehap-jax[tfds]'") from error
    data_dir = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()
    builder = _builder(tfds, name, data_dir)
    if not builder.is_prepared():
        _prepare(name, builder, data_dir)
        builder = _builder(tfds, name, data_dir)
    keys, train, test, num_classes = _layout(name, builder.info)
    files = [Path(file) for split in (train, test) for file in builder.info.splits[split].filepaths]

    def decode() -> Mapping[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for label, split in (("train", train), ("test", test)):
            rows: Any = tfds.data_source(
                name, split=split, data_dir=data_dir, download=False, builder_kwargs={"file_format": "array_record"}
            )
            found[f"x_{label}"], found[f"y_{label}"] = _stack(name, rows, *keys)
        return found

    directory = Path(builder.data_dir)
    arrays = cached_arrays(f"tfds/{name}", checksum_of(files, directory), decode, cache)
    flip = name.split("/")[0].split(":")[0] not in _SIGNS
    return Source(
        name,
        (arrays["x_train"], arrays["y_train"]),
        (arrays["x_test"], arrays["y_test"]),
        num_classes,
        small_image_augmentation(arrays["x_train"], flip=flip),
    )


def _builder(tfds: Any, name: str, data_dir: Path) -> Any:
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        near = nearest(name, tfds.list_builders(with_community_datasets=False))
        raise ValueError(f"TensorFlow Datasets has no data set {name!r}{near}") from error
    except ValueError as error:
        # A directory prepared in another format cannot be read by index.
        raise ValueError(
            f"tfds:{name} cannot be read from {data_dir} in array_record ({str(error).splitlines()[0]}); prepare it "
            "with file_format='array_record', in another $TFDS_DATA_DIR if it is there in another format"
        ) from error


def _prepare(name: str, builder: Any, data_dir: Path) -> None:
    archive = CIFAR_ARCHIVES.get(name)
    if archive is None:
        raise FileNotFoundError(
            f"tfds:{name} is not prepared: there is no {builder.data_dir}. Prepare it where TensorFlow is installed "
            f"with tfds.builder({name!r}, file_format='array_record').download_and_prepare() and copy that directory "
            "here; $TFDS_DATA_DIR names another place"
        )
    prepare_cifar(archive, data_dir, data_dir / "downloads" / "manual")


def _layout(name: str, info: Any) -> tuple[tuple[str, str], str, str, int]:
    """((image, label) features, training split, test split, number of classes)."""
    keys = info.supervised_keys
    if not keys or len(keys) != 2 or not hasattr(info.features[keys[1]], "num_classes"):
        raise ValueError(f"tfds:{name} is not a set of images with one label each: {info.features}")
    splits = list(info.splits)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"tfds:{name} needs a 'train' and a 'test' or 'validation' split; it has {', '.join(splits)}")
    return keys, "train", test, info.features[keys[1]].num_classes


def _stack(name: str, rows: Sequence[Mapping[str, Any]], image: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    first = np.asarray(rows[0][image])
    images = np.empty((len(rows), *first.shape), np.uint8)
    labels = np.empty(len(rows), np.int32)
    for index, row in enumerate(rows):
        if row[image].shape != first.shape or row[image].dtype != np.uint8:
            raise ValueError(
                f"tfds:{name}: image {index} is {row[image].dtype} {row[image].shape}, the first is {first.dtype} "
                f"{first.shape}; all must be uint8 of one size"
            )
        images[index], labels[index] = row[image], row[label]
    return images, labels
