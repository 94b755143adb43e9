"""CIFAR-10 and CIFAR-100 prepared by TFDS without TensorFlow, from the binary archives of their authors.

TFDS's own builders read them but cannot prepare them without TensorFlow. The builder made here writes the same
features under the same name and version, so that a prepared directory is read the same way whoever prepared it.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarArchive:
    """What a binary CIFAR archive is: records of label bytes followed by 3072 bytes, red, green and blue planes.

    name, version: of the TFDS data set. url, size, sha256: of the archive. labels: feature -> the file with its class
    names, in the order of the label bytes. train, test: the files of records.
    """

    name: str
    version: str
    url: str
    size: int
    sha256: str
    prefix: str
    labels: tuple[tuple[str, str], ...]
    train: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def filename(self) -> str:
        """The archive's file name."""
        return self.url.rsplit("/", 1)[-1]


CIFAR_ARCHIVES = {
    "cifar10": CifarArchive(
        name="cifar10",
        version="3.0.2",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        size=170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        prefix="cifar-10-batches-bin/",
        labels=(("label", "batches.meta.txt"),),
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test=("test_batch.bin",),
    ),
    "cifar100": CifarArchive(
        name="cifar100",
        version="3.0.2",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        size=168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        prefix="cifar-100-binary/",
        labels=(("coarse_label", "coarse_label_names.txt"), ("label", "fine_label_names.txt")),
        train=("train.bin",),
        test=("test.bin",),
    ),
}


def prepare_cifar(archive: CifarArchive, data_dir: Path, manual_dir: Path) -> None:
    """Write the data set into `data_dir/name/version` in array_record, from `manual_dir` or the network.

    An archive in `manual_dir` is checked by its sha256 before it is used.

    Raises:
        ValueError: the archive in `manual_dir` is not the one expected.
        FileNotFoundError: there is none, and the download failed; the message says what to put where.
    """
    import tensorflow_datasets as tfds

    _check_manual(archive, manual_dir)
    builder = _builder_class(archive)(data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except (OSError, tfds.download.DownloadError) as error:
        if (manual_dir / archive.filename).exists():
            raise
        raise FileNotFoundError(
            f"{archive.name} is not prepared in {data_dir} and cannot be downloaded ({type(error).__name__}). Put "
            f"{archive.filename} (from {archive.url}, sha256 {archive.sha256}) into {manual_dir}, or a prepared "
            f"directory at {data_dir / archive.name / archive.version}; $TFDS_DATA_DIR names another place"
        ) from error


def read_records(content: bytes, archive: CifarArchive, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 32, 3) and label bytes uint8 (N, number of labels) of one file of records.

    Raises:
        ValueError: the file does not hold whole records.
    """
    width = len(archive.labels) + _PIXELS
    if not content or len(content) % width:
        raise ValueError(f"{archive.filename}: {file} has {len(content)} bytes, not a multiple of {width}")
    records = np.frombuffer(content, np.uint8).reshape(-1, width)
    planes = records[:, len(archive.labels) :].reshape(-1, *_SHAPE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, : len(archive.labels)]


def _check_manual(archive: CifarArchive, manual_dir: Path) -> None:
    file = manual_dir / archive.filename
    if not file.exists():
        return
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != archive.sha256:
        raise ValueError(f"{file} has sha256 {found}, expected {archive.sha256}; it is damaged or another file")


def _builder_class(archive: CifarArchive) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.utils import Size

    class Cifar(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Writes the features of TFDS's own builder of that name."""

        name = archive.name
        VERSION = tfds.core.Version(archive.version)
        # As a plain attribute it takes the place of TFDS's file of checksums.
        url_infos = {archive.url: UrlInfo(Size(archive.size), archive.sha256, archive.filename)}  # noqa: RUF012

        def _info(self) -> tfds.core.DatasetInfo:
            labels = {name: tfds.features.ClassLabel() for name, _ in archive.labels}
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{archive.name} from {archive.url}",
                features=tfds.features.FeaturesDict(
                    {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3)), **labels}
                ),
                supervised_keys=("image", "label"),
                homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            path = Path(dl_manager.download(archive.url))
            features: Any = self.info.features
            with tarfile.open(path) as tar:
                for label, file in archive.labels:
                    names = _member(tar, archive, file).decode().split("\n")
                    features[label].names = [name for name in names if name]
            return {"train": self._generate_examples(path, "train"), "test": self._generate_examples(path, "test")}

        def _generate_examples(self, path: Path, split: str) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            count = 0
            with tarfile.open(path) as tar:
                for file in getattr(archive, split):
                    images, labels = read_records(_member(tar, archive, file), archive, file)
                    for image, values in zip(images, labels, strict=True):
                        example = {name: int(v) for (name, _), v in zip(archive.labels, values, strict=True)}
                        identity = f"{split}_{count:05d}"
                        yield identity, {"id": identity, "image": _png(image), **example}
                        count += 1

    return Cifar


def _png(image: np.ndarray) -> io.BytesIO:
    """Encoded here, as TFDS encodes arrays with TensorFlow."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    stream.seek(0)
    return stream


def _member(tar: tarfile.TarFile, archive: CifarArchive, file: str) -> bytes:
    try:
        stream = tar.extractfile(archive.prefix + file)
    except KeyError as error:
        raise ValueError(f"{archive.filename} has no {archive.prefix + file}") from error
    assert stream is not None, f"{archive.prefix + file} is not a file"
    return stream.read()
