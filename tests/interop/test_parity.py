"""JAX and PyTorch agree: on the public checkpoints in float32, on a small network in float64."""

import json
import re

import numpy as np
import pytest

from interop import compare
from interop.parity import (
    gradient_pair,
    hessian_vector_pair,
    logits_pair,
    normalise,
    pair,
    probe_pair,
    pruned_pair,
    relative,
)
from tests.interop.conftest import lively

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop.torch_models import cifar_resnet  # noqa: E402


@pytest.fixture(scope="module")
def nets(checkpoints):
    return pair(checkpoints["resnet20"])


@pytest.fixture(scope="module")
def batch(cifar, nets):
    """Test images: the loss of the first training images is 2e-5, and 1 - p has few digits left there in float32."""
    return normalise(cifar["x_test"][:16], nets.info), cifar["y_test"][:16]


@pytest.fixture(scope="module")
def projected():
    """A small network with projection shortcuts."""
    return lively(cifar_resnet(8, widths=(4, 8, 16), shortcut="B", num_classes=5))


def test_pretrained_network_is_what_its_authors_say(checkpoints):
    info = pair(checkpoints["resnet32"]).info
    assert (info.depth, info.shortcut, info.num_classes, info.layout) == (32, "A", 10, "akamaster")
    assert abs(info.metadata["best_prec1"] - 92.63) < 0.2


def test_logits_and_answers(nets, cifar):
    ours, theirs = logits_pair(nets, normalise(cifar["x_test"][:100], nets.info), batch_size=64)
    assert ours.shape == theirs.shape == (100, 10)
    assert np.abs(ours - theirs).max() <= 1e-4
    np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
    assert np.mean(ours.argmax(axis=1) == cifar["y_test"][:100]) >= 0.85


def test_loss_gradient(nets, batch):
    ours, theirs = gradient_pair(nets, *batch)
    assert ours.keys() == theirs.keys()
    assert relative(ours, theirs) <= 1e-4


def test_hessian_vector_product_and_channel_traces(nets, batch):
    ours, theirs = hessian_vector_pair(nets, *batch, 3)
    assert relative(ours, theirs) <= 1e-4
    probe = probe_pair(nets, 3)[1]
    traces = [
        {name: (value * probe[name].numpy()).reshape(len(value), -1).sum(axis=1) for name, value in Hv.items()}
        for Hv in (ours, theirs)
    ]
    assert len(theirs) == 20 and sum(len(trace) for trace in traces[1].values()) == 698
    assert all(relative({name: traces[0][name]}, {name: trace}) <= 1e-3 for name, trace in traces[1].items())


@pytest.mark.parametrize("coupling", ["group", "union"])
def test_pruned_pretrained_network(nets, batch, coupling):
    ours, theirs = pruned_pair(nets, batch[0], channels=0.5, coupling=coupling)
    assert np.abs(ours - theirs).max() <= 1e-4
    full = logits_pair(nets, batch[0])[0]
    assert np.abs(ours - full).max() > 0.1, "nothing was pruned"


def test_probes_are_the_same_numbers(projected):
    nets = pair(projected.state_dict())
    v, probe = probe_pair(nets, 1)
    kernel = np.asarray(v["layer2_0"]["conv1"]["kernel"])
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), probe["layer2.0.conv1.weight"].numpy())
    np.testing.assert_array_equal(np.asarray(v["linear"]["kernel"]).T, probe["linear.weight"].numpy())
    assert not np.any(np.asarray(v["linear"]["bias"])) and "linear.bias" not in probe
    assert set(np.unique(kernel)) == {-1.0, 1.0}


def test_relative_sees_a_difference():
    a = {"x": np.array([3.0, 4.0]), "y": np.zeros(2)}
    assert relative(a, a) == 0
    assert relative({"x": np.array([3.0, 4.5]), "y": np.zeros(2)}, a) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def figures(projected, tmp_path_factory):
    """The compare command on a small network with projection shortcuts: (exit status, JSON, folder)."""
    folder = tmp_path_factory.mktemp("compare")
    torch.save(projected.state_dict(), folder / "tiny.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    answers = np.arange(6, dtype=np.uint8) % 5
    np.savez(folder / "data.npz", x_test=pixels, y_test=answers, x_train=pixels, y_train=answers)
    options = ["--data", str(folder / "data.npz"), "--out", str(folder / "new" / "out.json")]
    with pytest.MonkeyPatch.context() as patch:  # pruned networks have tests of their own, and take long to compile
        patch.setattr(compare, "pruned_pair", lambda *_, **__: (np.zeros(1), np.zeros(1)))
        status = compare.main([str(folder / "tiny.pth"), *options, "--batch", "4", "--probes", "1"])
    return status, json.loads((folder / "new" / "out.json").read_text()), folder


@pytest.mark.slow
def test_compare_measures_everything(figures):
    status, document, _ = figures
    (result,) = document["results"]
    assert status == 0
    assert result["predictions_that_differ"] == 0 and result["test_images"] == 6
    assert {"commit", "versions", "device_jax", "python"} <= set(document)
    assert set(compare.LIMITS) <= set(result)


@pytest.mark.slow
def test_one_step_of_sgd_in_train_mode(figures):
    (result,) = figures[1]["results"]
    assert result["sgd_step_max_abs"] <= 1e-5 < 1e-3 < result["sgd_step_size"]


@pytest.mark.parametrize("figure", ["logits_max_abs", "gradient_relative", "hessian_vector_relative"])
def test_float64_agrees_to_nine_digits(figures, figure):
    (result,) = figures[1]["results"]
    assert result[f"float64_{figure}"] <= 1e-9
    assert result[f"float64_{figure}"] < result[figure] / 1000, "float64 was not used"


def test_compare_fails_beyond_a_limit_and_refuses_bad_input(figures, monkeypatch, capsys):
    _, document, folder = figures
    monkeypatch.setattr(compare, "compare", lambda *_, **__: document["results"][0])
    options = ["--data", str(folder / "data.npz"), "--out", str(folder / "again.json"), "--batch", "4"]
    assert compare.main([str(folder / "tiny.pth"), *options]) == 0
    monkeypatch.setitem(compare.LIMITS, "gradient_relative", -1.0)
    assert compare.main([str(folder / "tiny.pth"), *options]) == 1
    assert re.search(r"gradient_relative .*!", capsys.readouterr().out)
    np.savez(folder / "bad.npz", x_test=np.zeros(3))
    for arguments, told in [
        ([str(folder / "absent.pth"), *options], "absent.pth"),
        ([str(folder / "tiny.pth"), "--data", str(folder / "bad.npz")], "has no x_train, y_test, y_train"),
        ([str(folder / "tiny.pth"), *options, "--batch", "7"], "--batch must be 1 to 6"),
    ]:
        with pytest.raises(SystemExit):
            compare.main(arguments)
        assert told in capsys.readouterr().err
