"""The training benchmark: what is counted, and that PyTorch is given the same images."""

import json

import numpy as np
import pytest

from benchmarks import training
from ehap_jax.data.augment import normalise


def test_an_image_for_pytorch_is_a_normalised_crop_of_it():
    """Of all 9 × 9 × 2 crops and flips of the padded image it is one, and not always the same."""
    torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
    dataset = training.random_dataset(100)
    images, padded = training.Images(dataset), np.pad(dataset.x_train[3], ((4, 4), (4, 4), (0, 0)))
    crops = [padded[i : i + 32, j : j + 32, :][:, ::way] for i in range(9) for j in range(9) for way in (1, -1)]
    crops = np.asarray(normalise(np.stack(crops), dataset.mean, dataset.std))
    torch.manual_seed(0)
    found = [images[3] for _ in range(6)]
    assert all(label == dataset.y_train[3] for _, label in found)
    nearest = [np.abs(crops - image.permute(1, 2, 0).numpy()).max(axis=(1, 2, 3)) for image, _ in found]
    assert max(apart.min() for apart in nearest) < 1e-5
    assert len({int(apart.argmin()) for apart in nearest}) > 1


def test_the_first_epoch_is_not_counted(monkeypatch):
    clock = {"wall": 0.0, "cpu": 0.0}

    def epochs(dataset, network, batch_size, epochs, compute, row):
        for seconds in (100.0, 2.0, 2.0):
            clock["wall"] += seconds
            clock["cpu"] += 2 * seconds
            yield 0.0

    monkeypatch.setattr(training, "jax_epoch", epochs)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(training, "cpu_seconds", lambda: clock["cpu"])
    found = training.measure("jax", "resnet20", 8, 5, 3, "float32")
    assert found["first_epoch_seconds"] == 100.0 and found["images"] == 80
    assert found["images_per_second"] == 20.0 and found["cpu_seconds_per_1000_images"] == 100.0
    torch = {**found, "row": "torch", "images_per_second": 40.0}
    assert "0.50" in training.table([found, torch]).splitlines()[1]


def test_every_row_is_written(monkeypatch, tmp_path, capsys):
    class Here:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def apply(self, measure, options):
            row, network, *_ = options
            numbers = dict.fromkeys(("images_per_second", "first_epoch_seconds", "cpu_seconds_per_1000_images"), 1.0)
            return {"row": row, "network": network, **numbers}

    monkeypatch.setattr(
        training.multiprocessing, "get_context", lambda _: type("Context", (), {"Pool": lambda *_: Here()})
    )
    out = tmp_path / "some" / "training.json"
    assert training.main(["--network", "resnet20", "resnet32", "--output", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["network"], row["row"]) for row in rows] == [
        (network, row) for network in ("resnet20", "resnet32") for row in training.ROWS
    ]
    with pytest.raises(SystemExit):
        training.main(["--epochs", "1", "--output", str(out)])
    assert "--epochs must be at least 2" in capsys.readouterr().err
