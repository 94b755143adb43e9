"""CIFAR through TFDS: an archive in its authors' format, prepared by TFDS itself, read back, cached."""

import dataclasses
import hashlib
import io
import sys
import tarfile

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="TFDS is an optional extra: pip install 'ehap-jax[tfds]'")
pytest.importorskip("array_record", reason="TFDS is an optional extra: pip install 'ehap-jax[tfds]'")
from ehap_jax.data import cifar_archive, load_dataset
from ehap_jax.data.cifar_archive import CIFAR_ARCHIVES, read_records


def build_archive(folder, name, counts=(30, 10), seed=0):
    """A small archive in the format of `name`, the facts about it, and what is in it by split."""
    facts = CIFAR_ARCHIVES[name]
    generator, contents, truth = np.random.default_rng(seed), {}, {}
    for split, count in zip(("train", "test"), counts, strict=True):
        files = getattr(facts, split)
        images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = generator.integers(0, 10, (count, len(facts.labels)), np.uint8)
        truth[split] = images, labels[:, -1]
        records = np.concatenate([labels, images.transpose(0, 3, 1, 2).reshape(count, -1)], axis=1)
        for file, part in zip(files, np.array_split(records, len(files)), strict=True):
            contents[file] = part.tobytes()
    for label, file in facts.labels:
        number = {"coarse_label": 20, "label": 100 if name == "cifar100" else 10}[label]
        contents[file] = "\n".join(f"{label}{i}" for i in range(number)).encode() + b"\n\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / facts.filename
    with tarfile.open(path, "w:gz") as tar:
        for file, content in contents.items():
            member = tarfile.TarInfo(facts.prefix + file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return dataclasses.replace(facts, size=path.stat().st_size, sha256=digest), truth


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty TFDS folder and an empty cache."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("EHAP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tfds"


def rows_of(images, labels):
    rows = np.concatenate([images.reshape(len(images), -1), np.asarray(labels)[:, None]], axis=1)
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_prepared_by_tfds_read_back_and_cached(place, monkeypatch, name):
    facts, truth = build_archive(place / "downloads" / "manual", name)
    monkeypatch.setitem(CIFAR_ARCHIVES, name, facts)
    dataset = load_dataset(f"tfds:{name}", validation_fraction=0.3)
    assert dataset.num_classes == {"cifar10": 10, "cifar100": 100}[name] and dataset.augmentation.flip
    np.testing.assert_array_equal(rows_of(dataset.x_test, dataset.y_test), rows_of(*truth["test"]))
    images = np.concatenate([dataset.x_train, dataset.x_val])
    labels = np.concatenate([dataset.y_train, dataset.y_val])
    np.testing.assert_array_equal(rows_of(images, labels), rows_of(*truth["train"]))
    assert "tensorflow" not in sys.modules, "preparing and reading must not need TensorFlow"

    # The second time the arrays come from the cache: nothing is decoded, and the archive may be gone.
    (place / "downloads" / "manual" / facts.filename).unlink()
    monkeypatch.setattr("ehap_jax.data.tfds._stack", lambda *_: pytest.fail("decoded again"))
    again = load_dataset(f"tfds:{name}", validation_fraction=0.3)
    np.testing.assert_array_equal(again.x_train, dataset.x_train)
    np.testing.assert_array_equal(again.y_val, dataset.y_val)


def test_a_directory_with_other_contents_is_not_taken_from_the_cache(place, monkeypatch, tmp_path):
    for seed in (0, 1):
        facts, truth = build_archive(place / "downloads" / "manual", "cifar10", seed=seed)
        monkeypatch.setitem(CIFAR_ARCHIVES, "cifar10", facts)
        dataset = load_dataset("tfds:cifar10", validation_fraction=0.3)
        np.testing.assert_array_equal(rows_of(dataset.x_test, dataset.y_test), rows_of(*truth["test"]))
        (place / "cifar10").rename(tmp_path / f"old{seed}")


def test_an_archive_that_is_another_file_is_refused(place):
    manual = place / "downloads" / "manual"
    build_archive(manual, "cifar10")
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz has sha256 .*, expected c4a38c50"):
        load_dataset("tfds:cifar10")
    assert not (place / "cifar10").exists()


def test_offline_it_says_what_to_put_where(place, monkeypatch):
    import tensorflow_datasets as tfds

    def no_network(self, url):
        raise tfds.download.DownloadError(f"no route to {url}")

    monkeypatch.setattr(tfds.download.DownloadManager, "download", no_network)
    with pytest.raises(FileNotFoundError, match=r"Put cifar-10-binary.tar.gz \(from .* into .*/downloads/manual"):
        load_dataset("tfds:cifar10")
    with pytest.raises(FileNotFoundError, match=r"tfds:mnist is not prepared.*where TensorFlow is installed"):
        load_dataset("tfds:mnist")


def test_names_that_are_no_data_set_of_images(place):
    with pytest.raises(ValueError, match="has no data set 'no_such_set'"):
        load_dataset("tfds:no_such_set")


def test_records_that_are_cut_off():
    facts = cifar_archive.CIFAR_ARCHIVES["cifar100"]
    with pytest.raises(ValueError, match=r"train.bin has 3073 bytes, not a multiple of 3074"):
        read_records(b"0" * 3073, facts, "train.bin")
