"""Checkpoints as training scripts make them: with optimizers, schedules, averages, options and NumPy's numbers."""

import argparse
import warnings

import jax
import numpy as np
import pytest

from interop import CheckpointError, from_torch

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from tests.interop.third_party import (  # noqa: E402
    DownsampleResNet,
    ResidualFunctionResNet,
    SequentialVGG,
    UnitResNet,
    one_layer,
)


def optimizer_of(net):
    """SGD after one step, with momentum buffers."""
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    sgd.step()
    return sgd


def akamaster(net):
    """trainer.py: DataParallel; best_prec1 is what `accuracy` gave."""
    return {"state_dict": torch.nn.DataParallel(net).state_dict(), "best_prec1": np.float64(91.25)}


def kuangliu(net):
    """main.py: DataParallel and the accuracy in percent."""
    return {"net": torch.nn.DataParallel(net).state_dict(), "acc": 100.0 * 9120 / 10000, "epoch": 17}


def weiaicunzai(net):
    """train.py: the weights alone."""
    return net.state_dict()


def hap(net):
    """main_pretrain.py: the options and the loss of the last batch, a tensor."""
    args = argparse.Namespace(network="resnet", depth=14, learning_rate=0.1, resume=None)
    wrapped = torch.nn.DataParallel(net).state_dict()
    return {"net": wrapped, "acc": 93.5, "epoch": 149, "loss": torch.tensor(0.25), "args": args}


def ehap(net):
    """main_train.py: its cosine schedule leaves numpy.float64 in the optimizer's groups."""
    sgd = optimizer_of(net)
    for group in sgd.param_groups:
        group["lr"] = 0.5 * (1 + np.cos(np.pi * 3 / 300)) * 0.05
    return {
        "net": net.state_dict(), "optimizer": sgd.state_dict(), "acc": np.float64(92.5), "epoch": np.int64(3),
        "loss": torch.tensor(0.3), "losses": np.linspace(1, 0, 5),
    }  # fmt: skip


def imagenet_example(net):
    """torch's example and torchvision's references: schedule, options, random states."""
    sgd = optimizer_of(net)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, milestones=[2, 4])
    return {
        "model": net.state_dict(), "optimizer": sgd.state_dict(), "lr_scheduler": schedule.state_dict(),
        "args": argparse.Namespace(lr=np.float32(0.1)), "epoch": 4, "rng": torch.get_rng_state(),
        "numpy_rng": np.random.RandomState(0).get_state(),
    }  # fmt: skip


def lightning(net):
    """ModelCheckpoint: the network is an attribute of the module, hyperparameters and callbacks are dictionaries."""
    sgd = optimizer_of(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=10)
    return {
        "epoch": 9, "global_step": 3910, "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"backbone.{key}": value for key, value in net.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 10}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_acc'}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [sgd.state_dict()], "lr_schedulers": [schedule.state_dict()],
        "hparams_name": "kwargs", "hyper_parameters": {"lr": np.float64(0.1), "depth": 14},
    }  # fmt: skip


SCRIPTS = {
    "akamaster": (akamaster, DownsampleResNet, {"best_prec1": 91.25}),
    "kuangliu": (kuangliu, lambda: SequentialVGG("features", one_layer), {"acc": 91.2, "epoch": 17}),
    "weiaicunzai": (weiaicunzai, ResidualFunctionResNet, {}),
    "HAP": (hap, DownsampleResNet, {"acc": 93.5, "epoch": 149, "loss": 0.25}),
    "EHAP": (ehap, UnitResNet, {"acc": 92.5, "epoch": 3, "loss": pytest.approx(0.3)}),
    "torchvision's references": (imagenet_example, DownsampleResNet, {"epoch": 4}),
    "PyTorch Lightning": (
        lightning, DownsampleResNet,
        {"epoch": 9, "global_step": 3910, "pytorch-lightning_version": "2.4.0", "hparams_name": "kwargs"},
    ),
}  # fmt: skip


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_files_of_training_scripts_are_read(script, zipped, tmp_path):
    make, network, metadata = SCRIPTS[script]
    torch.manual_seed(0)
    net = network()
    saved = make(net)
    torch.save(saved, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    _, variables, info = from_torch(tmp_path / "net.pth")
    assert same(variables, from_torch(net.state_dict())[1])
    assert info.metadata == metadata and all(type(value) in (int, float, str) for value in info.metadata.values())


@pytest.mark.slow
def test_averaged_weights_are_another_entry(tmp_path):
    torch.manual_seed(0)
    net = DownsampleResNet()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.5)
    torch.save({"model": net.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "net.pth")
    _, variables, _ = from_torch(tmp_path / "net.pth")
    _, halved, _ = from_torch(tmp_path / "net.pth", entry="model_ema")
    assert same(variables, from_torch(net.state_dict())[1])
    assert same(halved["params"], jax.tree.map(lambda leaf: 0.5 * leaf, variables["params"]))
    with pytest.raises(CheckpointError, match=r"none of ema.* one of its keys: model, model_ema"):
        from_torch(tmp_path / "net.pth", entry="ema")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("code", ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
def test_numpys_numbers_are_read_as_they_are(code, order, tmp_path):
    number = np.array([1]).astype(np.dtype(code).newbyteorder(order))[0]
    torch.save({"net": DownsampleResNet().state_dict(), "x": number}, tmp_path / "net.pth")
    found = from_torch(tmp_path / "net.pth")[2].metadata
    assert found == {"x": 1} and type(found["x"]) is type(number.item())


def test_what_is_not_a_number_is_left_out(tmp_path):
    """Bytes that do not fit their dtype, objects in arrays: nothing is built from them."""
    from interop.inert import DType, scalar

    odd = {
        "text": np.str_("x"),
        "when": np.datetime64("2020"),
        "array": np.array([{}], dtype=object),
        "dtype": np.dtype("f4"),
    }
    torch.save({"net": DownsampleResNet().state_dict(), **odd}, tmp_path / "net.pth")
    assert from_torch(tmp_path / "net.pth")[2].metadata == {}
    assert scalar(DType("f8"), b"short") is None
    assert scalar(DType("O8"), b"12345678") is None and scalar(DType(["f8"]), b"12345678") is None
    assert scalar("f8", b"12345678") is None


def test_messages_do_not_advise_what_cannot_work(tmp_path):
    """No file is to be loaded with its code, and a dictionary has no state_dict()."""
    net = DownsampleResNet()
    torch.save(net, tmp_path / "module.pth")
    torch.save({"net": net, "cfg": [1]}, tmp_path / "pruned.pth")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(net.state_dict(), tmp_path / "protocol.pth", pickle_protocol=4)
    told = {}
    for name in ("module", "pruned", "text", "protocol"):
        with pytest.raises(CheckpointError) as refused, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from_torch(tmp_path / f"{name}.pth")
        told[name] = str(refused.value)
        assert "weights_only" not in told[name] and "torch.load" not in told[name] and "trust" not in told[name]
    assert "DownsampleResNet" in told["module"] and "torch.save(module.state_dict()" in told["pruned"]
    assert "neither a zip archive nor a pickle" in told["text"] and "protocol" in told["protocol"]
