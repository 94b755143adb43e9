"""JAX and PyTorch agree: on the public checkpoints in float32, on a small network in float64."""

import jax
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from interop.parity import (
    gradient_pair,
    hessian_vector_pair,
    logits_pair,
    normalise,
    pair,
    probe_pair,
    pruned_pair,
    relative,
    sgd_pair,
    trace_pair,
)

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def nets(checkpoints):
    return pair(checkpoints["resnet20"])


@pytest.fixture(scope="module")
def batch(cifar, nets):
    return normalise(cifar["x_train"][:8], nets.info), cifar["y_train"][:8]


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
    key = jax.random.key(3)
    assert relative(*hessian_vector_pair(nets, *batch, key)) <= 1e-4
    ours, theirs = trace_pair(nets, *batch, [key])
    assert len(theirs) == 20 and sum(len(trace) for trace in theirs.values()) == 698
    assert all(relative({name: ours[name]}, {name: trace}) <= 1e-3 for name, trace in theirs.items())


@pytest.mark.parametrize("coupling", ["group", "union"])
def test_pruned_pretrained_network(nets, batch, coupling):
    ours, theirs = pruned_pair(nets, batch[0], channels=0.5, coupling=coupling)
    assert np.abs(ours - theirs).max() <= 1e-4
    full = logits_pair(nets, batch[0])[0]
    assert np.abs(ours - full).max() > 0.1, "nothing was pruned"


def test_one_step_of_sgd(network, images):
    nets = pair(network.state_dict())
    labels = np.array([0, 1, 2])
    ours, theirs = sgd_pair(nets, images, labels, rate=0.1)
    before = network.state_dict()
    assert max(np.abs(ours[name] - value).max() for name, value in theirs.items()) <= 1e-5
    assert max(np.abs(before[name].numpy() - value).max() for name, value in theirs.items()) > 1e-2


def test_float64_agrees_to_nine_digits(network, images):
    with enable_x64():
        doubled = {k: v.double() if v.is_floating_point() else v for k, v in network.state_dict().items()}
        nets = pair(doubled)
        x, labels = images.astype(np.float64), np.array([0, 1, 2])
        assert nets.variables["params"]["conv1"]["kernel"].dtype == np.float64
        ours, theirs = logits_pair(nets, x)
        assert ours.dtype == np.float64
        assert np.abs(ours - theirs).max() <= 1e-9
        assert relative(*gradient_pair(nets, x, labels)) <= 1e-9
        assert relative(*hessian_vector_pair(nets, x, labels, jax.random.key(0))) <= 1e-9


def test_probes_are_the_same_numbers(network):
    nets = pair(network.state_dict())
    v, probe = probe_pair(nets, jax.random.key(1))
    kernel = np.asarray(v["layer2_0"]["conv1"]["kernel"])
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), probe["layer2.0.conv1.weight"].numpy())
    np.testing.assert_array_equal(np.asarray(v["linear"]["kernel"]).T, probe["linear.weight"].numpy())
    assert not np.any(np.asarray(v["linear"]["bias"])) and "linear.bias" not in probe
    assert set(np.unique(kernel)) == {-1.0, 1.0}


def test_relative_sees_a_difference():
    a = {"x": np.array([3.0, 4.0]), "y": np.zeros(2)}
    assert relative(a, a) == 0
    assert relative({"x": np.array([3.0, 4.5]), "y": np.zeros(2)}, a) == pytest.approx(0.1)


def test_compare_writes_its_figures(network, images, tmp_path, capsys, monkeypatch):
    import json

    from interop import compare

    monkeypatch.setattr(compare, "KEPT_CHANNELS", 0.6)
    torch.save(network.state_dict(), tmp_path / "tiny.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    answers = np.arange(6, dtype=np.uint8) % 5
    np.savez(tmp_path / "data.npz", x_test=pixels, y_test=answers, x_train=pixels, y_train=answers)
    out = tmp_path / "figures" / "parity.json"
    options = ["--data", str(tmp_path / "data.npz"), "--out", str(out), "--batch", "4", "--probes", "1"]
    assert compare.main([str(tmp_path / "tiny.pth"), *options]) == 0
    document = json.loads(out.read_text())
    (result,) = document["results"]
    assert result["predictions_that_differ"] == 0 and result["test_images"] == 6
    assert set(compare.LIMITS) <= set(result) and {"commit", "versions", "device_jax"} <= set(document)
    assert "hessian_vector_relative" in capsys.readouterr().out
    monkeypatch.setitem(compare.LIMITS, "gradient_relative", -1.0)
    assert compare.main([str(tmp_path / "tiny.pth"), *options]) == 1
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "absent.pth"), *options])
