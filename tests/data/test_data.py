"""Data sets: splits that do not overlap, statistics, archives, and every kind of bad input."""

import numpy as np
import pytest

from ehap_jax.data import Augmentation, limit_training, load_dataset, make_dataset


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load_dataset("digits")


def images(count, seed=0, shape=(4, 4, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def archive(path, **changes):
    arrays = {
        "x_train": images(40),
        "y_train": np.arange(40) % 4,
        "x_test": images(8, 1),
        "y_test": np.arange(8) % 4,
    }
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return f"npz:{path}"


def test_digits_are_the_sources(digits):
    from sklearn.datasets import load_digits

    x = np.concatenate([digits.x_train, digits.x_val, digits.x_test])
    y = np.concatenate([digits.y_train, digits.y_val, digits.y_test])
    assert x.dtype == np.uint8 and x.shape == (1797, 8, 8, 1) and y.dtype == np.int32
    source = load_digits()

    def table(pixels, labels):
        rows = np.concatenate([np.rint(pixels.reshape(-1, 64)).astype(int), np.asarray(labels)[:, None]], axis=1)
        return rows[np.lexsort(rows.T)]

    np.testing.assert_array_equal(table(x * (16 / 255), y), table(source.data, source.target))
    assert digits.image_shape == (8, 8, 1) and digits.num_classes == 10
    assert not digits.augmentation.flip


def test_test_split_is_fixed_and_validation_follows_the_seed(digits):
    other = load_dataset("digits", seed=1)
    np.testing.assert_array_equal(digits.x_test, other.x_test)
    assert not np.array_equal(digits.x_val, other.x_val)
    again = load_dataset("digits", seed=1)
    np.testing.assert_array_equal(other.x_val, again.x_val)


def test_splits_are_stratified(digits):
    whole = np.bincount(np.concatenate([digits.y_train, digits.y_val, digits.y_test]))
    np.testing.assert_array_equal(np.bincount(digits.y_test), np.round(whole * 0.2))
    np.testing.assert_array_equal(np.bincount(digits.y_val), np.round((whole - np.round(whole * 0.2)) * 0.1))


def test_statistics_are_those_of_the_training_split_alone(digits):
    np.testing.assert_allclose(digits.mean, np.mean(digits.x_train / 255, axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(digits.std, np.std(digits.x_train / 255, axis=(0, 1, 2)), rtol=1e-12)


def test_arrays_are_read_only(digits):
    with pytest.raises(ValueError, match="read-only"):
        digits.x_train[0] = 0


def test_npz_round_trip(tmp_path):
    dataset = load_dataset(archive(tmp_path / "small.npz"), validation_fraction=0.2, seed=3)
    assert dataset.name == "small" and dataset.num_classes == 4
    assert len(dataset.x_train) == 32 and np.array_equal(np.bincount(dataset.y_val), [2, 2, 2, 2])
    np.testing.assert_array_equal(dataset.x_test, images(8, 1))
    together = np.concatenate([dataset.x_train, dataset.x_val]).reshape(40, -1)
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(images(40).reshape(40, -1), axis=0))
    assert dataset.augmentation == Augmentation(crop_padding=1, flip=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "has no y_test; it holds: 'x_train', 'y_train', 'x_test'"),
        ({"x_train": images(40).astype(np.float32)}, "x_train must be uint8.*float32"),
        ({"x_test": images(8)[..., 0]}, r"x_test must be uint8 of shape \(N, H, W, C\)"),
        ({"y_train": np.arange(39) % 4}, r"y_train must be integers of shape \(40,\)"),
        ({"y_train": np.arange(40) % 4 * 1.0}, "y_train must be integers"),
        ({"y_train": np.arange(40) % 4 - 1}, r"y_train has labels in \[-1, 2\]"),
        ({"x_test": images(8, 1, (5, 5, 3))}, "test images"),
        ({"x_test": images(0), "y_test": np.zeros(0, int)}, "test split is empty"),
        ({"x_test": np.array([{}], dtype=object)}, "x_test' holds object, not plain numbers"),
        ({"y_train": np.append(np.arange(39) % 4, 10**12)}, "a label 1000000000000 and 40 training images"),
    ],
)
def test_bad_archives_name_the_fault(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(archive(tmp_path / "bad.npz", **changes))


def test_files_that_are_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no data file"):
        load_dataset(f"npz:{tmp_path}/none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.npz is not a readable \.npz"):
        load_dataset(f"npz:{tmp_path}/text.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"cut\.npz is not a readable \.npz"):
        load_dataset(f"npz:{tmp_path}/cut.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="single array"):
        load_dataset(f"npz:{tmp_path}/one.npy")


def test_arrays_nobody_asked_for_are_not_unpacked(tmp_path):
    spec = archive(tmp_path / "small.npz", huge=np.array([{}], dtype=object))
    assert load_dataset(spec).num_classes == 4


@pytest.mark.parametrize("spec", ["cifar10", "npz", "npz:", "digits:8", ""])
def test_unknown_data_set_names_those_known(spec):
    with pytest.raises(ValueError, match=r"unknown data set.*'tfds:NAME'.*'npz:PATH'.*'folder:PATH'.*'digits'"):
        load_dataset(spec)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_validation_fraction_outside_its_range(fraction):
    with pytest.raises(ValueError, match="validation_fraction"):
        load_dataset("digits", validation_fraction=fraction)


def test_a_constant_channel_normalises_to_zero_and_too_few_images_are_an_error():
    x = np.full((20, 2, 2, 1), 7, np.uint8)
    y = np.zeros(20, int)
    dataset = make_dataset("flat", (x, y), (x, y), num_classes=1, augmentation=Augmentation())
    assert dataset.std == (1.0,)
    with pytest.raises(ValueError, match="0 for validation"):
        make_dataset("tiny", (x[:2], y[:2]), (x, y), num_classes=1, augmentation=Augmentation())


def test_a_given_normalisation_takes_the_place_of_the_training_splits(tmp_path):
    spec = archive(tmp_path / "small.npz")
    dataset = load_dataset(spec, normalisation=((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    assert dataset.mean == (0.5, 0.4, 0.3) and dataset.std == (0.2, 0.2, 0.1)
    for wrong in (((0.5,), (0.2,)), ((0.5, 0.4, 0.3), (0.2, 0.0, 0.1)), ((0.5, 0.4, 0.3), (0.2, float("nan"), 0.1))):
        with pytest.raises(ValueError, match="3 channels need as many finite means"):
            load_dataset(spec, normalisation=wrong)


@pytest.mark.parametrize("count", [4, 13, 36])
def test_limited_training_images_are_a_share_of_every_class(tmp_path, count):
    dataset = load_dataset(archive(tmp_path / "small.npz"), validation_fraction=0.1)
    small = limit_training(dataset, count)
    assert len(small.x_train) == len(small.y_train) == count and small.mean == dataset.mean
    share = np.bincount(dataset.y_train) * count / 36
    assert (np.abs(np.bincount(small.y_train, minlength=4) - share) <= 1).all()
    whole = {image.tobytes() for image in dataset.x_train}
    assert len({image.tobytes() for image in small.x_train} & whole) == count
    assert limit_training(dataset, None) is dataset
    with pytest.raises(ValueError, match="cannot take 37 of 36 training images"):
        limit_training(dataset, 37)
