"""Image files in a folder per class: `folder:PATH` with train/<class>/*.png and test/<class>/*.png."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ehap_jax._nearest import nearest_path
from ehap_jax._untrusted_files import regular_file
from ehap_jax.data.cache import cached_arrays, checksum_of
from ehap_jax.data.dataset import Source, small_image_augmentation

_SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
"""Whatever a file is called, no other decoder sees it; some run programs."""
MAX_PIXELS, MAX_BYTES = 4096 * 4096, 64 * 2**20


def read_folder(path: str | Path, *, cache: str | Path | None = None) -> Source:
    """Images of one size as RGB; classes are the sorted names of the folders in `train/`.

    Augmentation is CIFAR's. Decoded images are cached by the contents of all files. An image has 4096 × 4096 pixels at
    most, and none is decoded before its size is known to be that of the others.

    Raises:
        FileNotFoundError: the folder, `train/` or `test/` is not there, or has no images.
        ValueError: `test/` has a class that `train/` lacks; images differ in size or cannot be read (named).
        ImportError: Pillow is not installed; the message names the extra.
    """
    root = Path(path)
    files = {split: _images(root / split) for split in ("train", "test")}
    classes = sorted({file.parent.name for file in files["train"]})
    unknown = sorted({file.parent.name for file in files["test"]} - set(classes))
    if unknown:
        raise ValueError(f"{root / 'test'} has classes that {root / 'train'} lacks: {', '.join(unknown)}")

    def decode() -> Mapping[str, np.ndarray]:
        return {
            name: array
            for split, found in files.items()
            for name, array in (
                (f"x_{split}", _decode(found)),
                (f"y_{split}", np.array([classes.index(file.parent.name) for file in found], np.int32)),
            )
        }

    checksum = checksum_of((file for found in files.values() for file in found), root)
    arrays = cached_arrays(f"folder/{root.resolve().name}", checksum, decode, cache)
    train, test = ((arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test"))
    return Source(root.resolve().name, train, test, len(classes), small_image_augmentation(train[0]))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        near = nearest_path(folder if folder.parent.is_dir() else folder.parent)
        raise FileNotFoundError(f"there is no folder {folder}; expected {folder}/<class>/*.png or *.jpg{near}")
    found = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in _SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder} has no images; expected {folder}/<class>/*.png or *.jpg")
    return [regular_file(file, "image", MAX_BYTES) for file in found]


def _decode(files: list[Path]) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("folders of images need Pillow: pip install 'ehap-jax[images]'") from error
    images: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file, formats=_FORMATS) as image:
                size = (image.height, image.width)
                fits = size == (images[0].shape[:2] if images else size) and image.height * image.width <= MAX_PIXELS
                if fits:
                    images.append(np.asarray(image.convert("RGB")))
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise ValueError(f"{file} is not a readable image: {type(error).__name__}: {error}") from error
        if not fits and not images:
            raise ValueError(f"{file} is {size} pixels, more than {MAX_PIXELS:,}; make the images smaller")
        if not fits:
            raise ValueError(f"{file} is {size} pixels, {files[0]} is {images[0].shape[:2]}; resize them to one size")
    return np.stack(images)
