"""Checkpoints in: every layout gives the network PyTorch computes, and every bad one is refused by name."""

import jax
import numpy as np
import pytest

from ehap_jax.models import make_model
from interop import CheckpointError, from_torch, to_torch
from interop.forms import RESNET
from interop.layouts import LAYOUTS, layout_for
from recipes.network import described_model
from tests.interop.conftest import lively, torch_logits

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from tests.interop import third_party  # noqa: E402


def renamed(state_dict, name):
    """The state dict of a dense ResNet under another layout's names."""
    return {layout_for(name, RESNET).names.key(RESNET.names.part(key)): value for key, value in state_dict.items()}


RESNET_LAYOUTS = [name for name, tables in LAYOUTS.items() if any(table.form is RESNET for table in tables)]


@pytest.mark.parametrize("name", RESNET_LAYOUTS)
def test_every_layout_is_the_same_resnet(name, network):
    _, expected, _ = from_torch(network.state_dict())
    for layout in ("auto", name):
        _, variables, info = from_torch(renamed(network.state_dict(), name), layout)
        assert name in (info.layout, *info.also_fits)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), variables, expected))


@pytest.fixture(scope="module", params=third_party.CASES)
def published(request):
    """(case, module, images) of a network with a public repository's names."""
    case = third_party.CASES[request.param]
    shape = (2, case.size, case.size, 3)
    return case, lively(case.make()), np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_published_networks_give_pytorchs_logits(published):
    case, module, images = published
    apply, variables, info = from_torch(module.state_dict())
    assert {info.layout, *info.also_fits} == set(case.layouts)
    assert (info.form.name, info.depth, info.num_classes) == (case.form, case.depth, 5)
    assert (None if info.model is None else type(info.model).__name__) == case.model
    expected = torch_logits(module, images)
    assert expected.std() > 0.01
    np.testing.assert_allclose(np.asarray(jax.jit(apply)(variables, images)), expected, atol=2e-5)
    assert len(jax.tree.leaves(variables)) + len(info.unread) == len(module.state_dict()), "a tensor was left out"
    if info.model is not None:
        name, options = described_model(info.model)
        assert make_model(name, info.num_classes, **options) == info.model
        fresh = jax.eval_shape(info.model.init, jax.random.key(0), images)
        assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, variables)


def test_published_networks_go_back_bit_for_bit(published):
    """Under their own names, and as a network of `interop.torch_models` that computes the same."""
    from interop import torch_models

    case, module, images = published
    _, variables, _ = from_torch(module.state_dict())
    back = to_torch(variables, layout=case.layouts[0])
    read = {k: v for k, v in module.state_dict().items() if not k.endswith(("num_batches_tracked", "indexes"))}
    assert back.keys() == read.keys()
    assert all(torch.equal(back[key], value) for key, value in read.items())
    written = to_torch(variables)
    plain = torch_models.load(written)
    np.testing.assert_allclose(torch_logits(plain, images), torch_logits(module, images), atol=1e-5)
    own = {key: value for key, value in plain.state_dict().items() if "num_batches" not in key}
    assert list(own) == list(written), "not in the order of the modules"
    again = from_torch(written)[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, variables))


def test_info_describes_the_network(network):
    _, variables, info = from_torch(network.state_dict())
    assert (info.layout, info.depth, info.num_classes) == ("akamaster", 8, 5)
    assert info.shortcut == ("B" if any("shortcut" in key for key in network.state_dict()) else "A")
    assert info.normalisation[0] == (0.485, 0.456, 0.406)
    assert len(info.unread) == sum("num_batches" in key for key in network.state_dict())
    fresh = jax.eval_shape(info.model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, variables)
    leaves = len(jax.tree.leaves(variables))
    assert leaves + len(info.unread) == len(network.state_dict())


@pytest.mark.slow
def test_prefixes_containers_and_metadata(network, images, tmp_path):
    wrapped = {"module." + key: value for key, value in network.state_dict().items()}
    torch.save({"state_dict": wrapped, "best_prec1": 91.5, "epoch": 3}, tmp_path / "net.th")
    apply, variables, info = from_torch(tmp_path / "net.th")
    assert dict(info.metadata) == {"best_prec1": 91.5, "epoch": 3}
    np.testing.assert_allclose(np.asarray(apply(variables, images)), torch_logits(network, images), atol=1e-5)


def test_options_saved_beside_the_weights_do_not_matter(network, tmp_path):
    import argparse

    saved = {"net": network.state_dict(), "acc": 93.0, "args": argparse.Namespace(depth=8)}
    torch.save(saved, tmp_path / "net.t7")
    assert from_torch(tmp_path / "net.t7")[2].metadata == {"acc": 93.0}


@pytest.mark.slow
def test_safetensors(network, images, tmp_path):
    from safetensors.torch import save_file

    save_file(network.state_dict(), tmp_path / "net.safetensors", metadata={"epoch": "3"})
    apply, variables, info = from_torch(tmp_path / "net.safetensors")
    assert info.metadata == {"epoch": "3"}
    np.testing.assert_allclose(np.asarray(apply(variables, images)), torch_logits(network, images), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_widens_exactly(network, dtype):
    halved = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    _, variables, _ = from_torch(halved)
    expected = halved["conv1.weight"].float().numpy().transpose(2, 3, 1, 0)
    assert variables["params"]["conv1"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(np.asarray(variables["params"]["conv1"]["kernel"]), expected)


def ehap_pruned(kept_branch, kept_residual, widths):
    """A one-block EHAP file whose stem keeps `kept_residual` and whose conv2 keeps `kept_branch`."""
    stream = sorted(set(kept_branch) | set(kept_residual))
    make = np.random.default_rng(1).normal
    shapes = {
        "features.init_block.conv.weight": (len(kept_residual), 3, 3, 3),
        "features.stage1.unit1.body.conv1.conv.weight": (widths, len(kept_residual), 3, 3),
        "features.stage1.unit1.body.conv2.conv.weight": (len(kept_branch), widths, 3, 3),
        "output.weight": (5, len(stream)),
        "output.bias": (5,),
    }
    tensors = {key: torch.tensor(make(size=shape) * 0.3).float() for key, shape in shapes.items()}
    for conv in [key for key in shapes if key.endswith("conv.weight")]:
        size = shapes[conv][0]
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            value = np.abs(make(size=size)) + 0.5 if leaf == "running_var" else make(size=size)
            tensors[conv.replace("conv.weight", f"bn.{leaf}")] = torch.tensor(value).float()
    unit = "features.stage1.unit1.body"
    tensors |= {
        "features.init_block.conv.out_indices": torch.IntTensor(kept_residual),
        "features.init_block.conv.in_indices": torch.IntTensor([0, 1, 2]),
        f"{unit}.conv1.conv.out_indices": torch.IntTensor(range(widths)),
        f"{unit}.conv1.conv.in_indices": torch.IntTensor(kept_residual),
        f"{unit}.conv2.conv.out_indices": torch.IntTensor(kept_branch),
        f"{unit}.conv2.conv.in_indices": torch.IntTensor(range(widths)),
        "output.out_indices": torch.IntTensor(range(5)),
        "output.in_indices": torch.IntTensor(stream),
    }
    return tensors


@pytest.mark.parametrize(
    ("branch", "residual"), [([0, 2, 3], [1, 2]), ([1, 33, 64, 70], [0, 2, 64, 71]), ([5, 40], [5, 40])]
)
def test_pruned_ehap_network(branch, residual, images):
    tensors = ehap_pruned(branch, residual, widths=3)
    apply, variables, info = from_torch(tensors)
    assert (info.layout, info.shortcut) == ("ehap", "indexed")
    used = {"features.stage1.unit1.body.conv2.conv.out_indices", "features.stage1.unit1.body.conv1.conv.in_indices"}
    assert info.unread.keys() == {key for key in tensors if key.endswith("_indices")} - used
    assert len(jax.tree.leaves(variables)) + len(info.unread) + len(used) == len(tensors), "a tensor was left out"

    from torch.nn import functional as F

    def unit(x, name):
        x = F.conv2d(x, tensors[f"{name}.conv.weight"], padding=1)
        moments = (tensors[f"{name}.bn.running_mean"], tensors[f"{name}.bn.running_var"])
        return F.batch_norm(x, *moments, tensors[f"{name}.bn.weight"], tensors[f"{name}.bn.bias"])

    x = unit(torch.tensor(images).permute(0, 3, 1, 2), "features.init_block").relu()
    out = unit(x, "features.stage1.unit1.body.conv1").relu()
    out = unit(out, "features.stage1.unit1.body.conv2")
    # The published sum: channels in the order in which a Python set yields them, filled in one by one.
    order = list(set(branch + residual))
    total = torch.zeros(len(x), len(order), *x.shape[2:])
    total[:, [i for i, c in enumerate(order) if c in branch]] += out
    total[:, [i for i, c in enumerate(order) if c in residual]] += x
    expected = F.linear(total.relu().mean((2, 3)), tensors["output.weight"], tensors["output.bias"])
    np.testing.assert_allclose(np.asarray(apply(variables, images)), expected.numpy(), atol=1e-5)

    from interop.torch_models import load

    exported = to_torch(variables, indices=info.indices)
    np.testing.assert_allclose(torch_logits(load(exported), images), expected.numpy(), atol=1e-5)
    again, same_variables, _ = from_torch(exported)
    np.testing.assert_array_equal(np.asarray(again(same_variables, images)), np.asarray(apply(variables, images)))


def test_haps_indices_are_given_beside_its_weights(images):
    """HAP keeps them as attributes of its modules, numbered as in the dense network."""
    tensors = ehap_pruned([1, 33, 64, 70], [0, 2, 64, 71], widths=3)
    expected = from_torch(tensors)[0](from_torch(tensors)[1], images)
    modules = {"init_block.conv": "conv1", "init_block.bn": "bn1", "output": "fc"}
    modules |= {f"conv{n}.conv": f"layer1.0.conv{n}" for n in (1, 2)} | {
        f"conv{n}.bn": f"layer1.0.bn{n}" for n in (1, 2)
    }
    hap = {}
    for key, value in tensors.items():
        module, _, leaf = key.removeprefix("features.").removeprefix("stage1.unit1.body.").rpartition(".")
        hap[f"module.{modules[module]}.{leaf}"] = value
    indices = {key: value.tolist() for key, value in hap.items() if key.endswith("_indices")}
    weights = {key: value for key, value in hap.items() if key not in indices}
    apply, variables, info = from_torch(weights, indices=indices)
    assert (info.layout, info.shortcut) == ("hap", "indexed")
    np.testing.assert_array_equal(apply(variables, images), expected)
    with pytest.raises(CheckpointError, match=r"fc\.weight: expected shape \(any, 4\)"):
        from_torch(weights)


@pytest.mark.parametrize("bad", [[0, -2], [0, 0], [0.5, 1], [0, float("nan")], [0, 2**40], ["a", "b"], [True, False]])
def test_kept_indices_are_distinct_whole_numbers(bad):
    tensors = ehap_pruned([0, 2], [1, 2], widths=3)
    tensors["features.stage1.unit1.body.conv2.conv.out_indices"] = np.array(bad)
    with pytest.raises(CheckpointError, match=r"conv2\.conv\.out_indices: kept indices (are whole|repeat)"):
        from_torch(tensors)


def test_pruned_ehap_indices_must_fit_their_weights():
    tensors = ehap_pruned([0, 2], [1, 2], widths=3)
    tensors["output.in_indices"] = torch.IntTensor([0, 1])
    with pytest.raises(
        CheckpointError, match=r"output\.in_indices: expected an index per channel .*\(3,\), found \(2,\)"
    ):
        from_torch(tensors)


def broken(network, **changes):
    state_dict = dict(network.state_dict())
    for key, value in changes.items():
        if value is None:
            del state_dict[key]
        else:
            state_dict[key] = value
    return state_dict


def test_missing_and_extra_keys_are_listed(network):
    with pytest.raises(CheckpointError, match=r"missing    1 tensors: layer2\.0\.bn1\.running_var"):
        from_torch(broken(network, **{"layer2.0.bn1.running_var": None}))
    with pytest.raises(CheckpointError, match=r"left over  1 tensors: head\.scale"):
        from_torch(broken(network, **{"head.scale": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"left over  2 tensors: a, b(.|\n)*known layouts: akamaster, chenyaofo"):
        from_torch({"a": torch.ones(3), "b": torch.ones(1)})
    with pytest.raises(KeyError, match="unknown layout 'resnets'"):
        from_torch(network.state_dict(), "resnets")


def test_missing_whole_block_is_noticed(network):
    state_dict = {k: v for k, v in network.state_dict().items() if not k.startswith("layer2.")}
    with pytest.raises(CheckpointError, match=r"layer2\.0\.conv1\.weight"):
        from_torch(state_dict)


@pytest.mark.parametrize(
    ("key", "shape", "told"),
    [
        ("layer1.0.conv2.weight", (4, 5, 3, 3), r"layer1\.0\.conv2\.weight: expected shape \(any, 4, 3, 3\)"),
        ("layer2.0.bn1.weight", (7,), r"layer2\.0\.bn1\.weight: expected shape \(8\), found \(7,\)"),
        ("linear.weight", (5, 15), r"linear\.weight: expected shape \(any, 16\), found \(5, 15\)"),
        ("conv1.weight", (4, 3, 5, 5), r"conv1\.weight: expected shape \(any, any, 3, 3\), found \(4, 3, 5, 5\)"),
    ],
)
def test_shapes_that_contradict_each_other(network, key, shape, told):
    with pytest.raises(CheckpointError, match=told):
        from_torch(broken(network, **{key: torch.ones(shape)}))


def test_shape_errors_use_the_names_of_the_file(network):
    state_dict = renamed(network.state_dict(), "weiaicunzai")
    state_dict["conv3_x.0.residual_function.1.weight"] = torch.ones(7)
    with pytest.raises(CheckpointError, match=r"conv3_x\.0\.residual_function\.1\.weight: expected shape"):
        from_torch(state_dict)


def test_wrong_number_of_classes(network):
    with pytest.raises(CheckpointError, match=r"linear\.weight: expected 10 classes, found 5"):
        from_torch(network.state_dict(), num_classes=10)
    assert from_torch(network.state_dict(), num_classes=5)[2].num_classes == 5


def test_non_finite_weights_are_counted(network):
    bad = network.state_dict()["layer1.0.conv1.weight"].clone()
    bad[0, 0, 0, :2] = float("nan")
    with pytest.raises(CheckpointError, match=r"3 weights in 2 tensors .* first is in 'layer1\.0\.conv1\.weight'"):
        from_torch(broken(network, **{"layer1.0.conv1.weight": bad, "linear.bias": torch.tensor([1, 1, np.inf, 0, 0])}))


def test_weights_that_are_not_finite_in_bfloat16(network, tmp_path):
    from safetensors.torch import save_file

    halved = {key: v.bfloat16() if v.is_floating_point() else v for key, v in network.state_dict().items()}
    halved["linear.bias"][2] = float("nan")
    save_file(halved, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"net\.safetensors: 1 weights in 1 tensors .* is in 'linear\.bias'"):
        from_torch(tmp_path / "net.safetensors")


def test_weights_beyond_the_range_of_the_variables(network):
    large = torch.tensor([1e39, 0, 0, -1e39, 0], dtype=torch.float64)
    with pytest.raises(
        CheckpointError, match=r"linear\.bias: 2 of its float64 weights are beyond the range of float32"
    ):
        from_torch(broken(network, **{"linear.bias": large}))


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_objects_are_refused_and_never_run(network, tmp_path):
    torch.save(network, tmp_path / "module.pth")
    with pytest.raises(
        CheckpointError, match=r"ResidualNetwork, which would run code.*torch\.save\(module\.state_dict\(\)"
    ):
        from_torch(tmp_path / "module.pth")
    witness = tmp_path / "witness"
    torch.save({"state_dict": network.state_dict(), "extra": Payload(str(witness))}, tmp_path / "evil.pth")
    torch.save(network, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("evil.pth", "legacy.pth"):
        with pytest.raises(CheckpointError, match="refused"):
            from_torch(tmp_path / name)
    assert not witness.exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.98])
def test_truncated_files(network, tmp_path, fraction, new_format):
    whole = tmp_path / "whole.pth"
    torch.save(network.state_dict(), whole, _use_new_zipfile_serialization=new_format)
    data = whole.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        from_torch(tmp_path / "cut.pth")


def test_damaged_and_foreign_files(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    data = bytearray((tmp_path / "whole.pth").read_bytes())
    middle = data.find(network.state_dict()["layer3.0.conv2.weight"].numpy().tobytes()[:64])
    assert middle > 0
    data[middle + 3] ^= 0x40
    (tmp_path / "flipped.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        from_torch(tmp_path / "flipped.pth")
    (tmp_path / "text.pth").write_text("<!doctype html><html>404</html>")
    with pytest.raises(CheckpointError, match=r"text\.pth"):
        from_torch(tmp_path / "text.pth")
    (tmp_path / "cut.safetensors").write_bytes(bytes(20))
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        from_torch(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        from_torch(tmp_path / "absent.pth")
    with pytest.raises(TypeError, match=r"module\.state_dict\(\)"):
        from_torch(network)


def test_zip_that_lies_about_its_size(network, tmp_path):
    import zipfile

    torch.save(network.state_dict(), tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as new:
        for entry in old.infolist():
            deflate = entry.filename.endswith("data/0")
            kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
            new.writestr(entry.filename, bytes(10_000_000) if deflate else old.read(entry), kind)
    with pytest.raises(CheckpointError, match="compressed"):
        from_torch(tmp_path / "bomb.pth")

    data = bytearray((tmp_path / "whole.pth").read_bytes())
    directory = data.find(b"PK\x01\x02")
    data[directory + 20 : directory + 28] = (2**31 - 1).to_bytes(4, "little") * 2
    (tmp_path / "liar.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="claims 2147483647 bytes"):
        from_torch(tmp_path / "liar.pth")


def test_tensor_that_is_larger_than_its_storage(network):
    state_dict = broken(network, **{"linear.bias": torch.ones(1).expand(5)})
    with pytest.raises(CheckpointError, match=r"linear\.bias: shape \(5,\) claims 20 bytes, stored are 4"):
        from_torch(state_dict)


def test_several_state_dicts_are_ambiguous(network):
    weights = network.state_dict()
    with pytest.raises(CheckpointError, match="several: state_dict, model"):
        from_torch({"state_dict": weights, "model": weights})
    with pytest.raises(CheckpointError, match="none of"):
        from_torch({"epoch": 3})


def test_tensors_without_names(tmp_path):
    torch.save({0: torch.ones(3)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="tensors of a state dict have names; one of these has the key 0"):
        from_torch(tmp_path / "net.pt")
