"""Folders of image files: what is read, what is cached, and what can be wrong with them."""

import os
import struct
import time
import zlib

import numpy as np
import pytest

from ehap_jax.data import load_dataset

Image = pytest.importorskip("PIL.Image", reason="folders of images need Pillow: pip install 'ehap-jax[images]'")


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of 8x8 images: 10 each for training, 2 each for testing, one of them grey."""
    monkeypatch.setenv("EHAP_JAX_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    root = tmp_path / "pets"
    for split, count in (("train", 10), ("test", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                shape = (8, 8) if (split, label, number) == ("test", "dog", 1) else (8, 8, 3)
                write(root / split / label / f"{number}.png", generator.integers(0, 256, shape, np.uint8))
    return root


def test_images_and_labels_are_those_of_the_files(folder):
    dataset = load_dataset(f"folder:{folder}", validation_fraction=0.2)
    assert dataset.name == "pets" and dataset.num_classes == 2 and len(dataset.x_train) == 16
    np.testing.assert_array_equal(dataset.y_test, [0, 0, 1, 1])
    np.testing.assert_array_equal(dataset.x_test[2], np.asarray(Image.open(folder / "test" / "dog" / "0.png")))
    grey = np.asarray(Image.open(folder / "test" / "dog" / "1.png"))
    np.testing.assert_array_equal(dataset.x_test[3], np.repeat(grey[..., None], 3, axis=2))


def test_a_changed_file_is_decoded_anew_and_an_unchanged_one_is_not(folder, monkeypatch):
    first = load_dataset(f"folder:{folder}")
    with monkeypatch.context() as patched:
        patched.setattr("ehap_jax.data.folder._decode", lambda _: pytest.fail("decoded again"))
        np.testing.assert_array_equal(load_dataset(f"folder:{folder}").x_train, first.x_train)
    write(folder / "test" / "cat" / "0.png", np.full((8, 8, 3), 7, np.uint8))
    assert (load_dataset(f"folder:{folder}").x_test[0] == 7).all()


def test_a_damaged_cache_says_so(folder, tmp_path):
    load_dataset(f"folder:{folder}")
    (file,) = (tmp_path / "cache").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read.*delete the file"):
        load_dataset(f"folder:{folder}")


def test_folders_that_do_not_fit(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere/train"):
        load_dataset(f"folder:{tmp_path}/nowhere")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no images"):
        load_dataset(f"folder:{tmp_path}/bare")
    write(folder / "test" / "fox" / "0.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"classes that .*lacks: fox"):
        load_dataset(f"folder:{folder}")
    (folder / "test" / "fox" / "0.png").unlink()
    (folder / "train" / "cat" / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.jpg is not a readable image"):
        load_dataset(f"folder:{folder}")
    (folder / "train" / "cat" / "broken.jpg").unlink()
    write(folder / "train" / "dog" / "large.png", np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"large\.png is \(9, 8\) pixels"):
        load_dataset(f"folder:{folder}")


def png(height, width):
    """A PNG of a few hundred bytes that says to be of any size, its pixels all zero."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(3000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(png(13_000, 13_000)), r"hostile\.png is \(13000, 13000\) pixels, .*resize"),
        (lambda p: p.write_bytes(png(10**9, 10**9)), r"hostile\.png is not a readable image: DecompressionBomb"),
        (lambda p: p.write_bytes(png(8, 8)[:45]), "not a readable image"),
        (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), "not a readable image"),
        (os.mkfifo, r"hostile\.png is not a regular file, but a pipe"),
        (lambda p: p.symlink_to("/dev/zero"), "but a device"),
        (lambda p: p.mkdir(), "but a folder"),
        (lambda p: p.symlink_to("/nowhere"), "there is no image"),
    ],
)
def test_hostile_files_are_refused_at_once(folder, make, message):
    make(folder / "train" / "dog" / "hostile.png")
    started = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_dataset(f"folder:{folder}")
    assert time.monotonic() - started < 5


def test_one_size_that_is_too_large(folder):
    for file in folder.glob("*/*/*.png"):
        file.write_bytes(png(5000, 5000))
    with pytest.raises(ValueError, match=r"is \(5000, 5000\) pixels, more than 16,777,216"):
        load_dataset(f"folder:{folder}")
