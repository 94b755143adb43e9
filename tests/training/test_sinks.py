"""Event files are read back by TensorBoard's own reader; Weights & Biases is stood in for by what it is called with."""

import sys
import types

import pytest

from ehap_jax.training import tensorboard_sink, wandb_sink


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is an optional extra: pip install 'ehap-jax[tensorboard]'")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    sink = tensorboard_sink(tmp_path)
    sink(1, {"dense/loss": 0.5, "dense/accuracy": 0.25})
    sink(2, {"dense/loss": 0.125})
    (file,) = tmp_path.iterdir()
    events = [
        (e.step, v.tag, v.tensor.float_val[0]) for e in EventFileLoader(str(file)).Load() for v in e.summary.value
    ]
    assert events == [(1, "dense/loss", 0.5), (1, "dense/accuracy", 0.25), (2, "dense/loss", 0.125)]
    assert "tensorflow" not in sys.modules


def test_wandb_gets_the_numbers_and_the_settings(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values: calls.append(values))
    stand_in = types.SimpleNamespace(init=lambda **given: calls.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    wandb_sink("first", {"epochs": 2}, tmp_path)(3, {"dense/loss": 0.5})
    assert calls[0] == {"project": "ehap_jax", "name": "first", "config": {"epochs": 2}, "dir": str(tmp_path)}
    assert calls[1] == {"dense/loss": 0.5, "epoch": 3}


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        (
            "tensorboard.summary.writer.event_file_writer",
            lambda path: tensorboard_sink(path),
            r"ehap-jax\[tensorboard\]",
        ),
        ("wandb", lambda path: wandb_sink("x", {}, path), "pip install wandb"),
    ],
)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=extra):
        make(tmp_path)
