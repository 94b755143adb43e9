"""Hostile checkpoints: no number is counted up to, nothing is silently wrong, every refusal is a CheckpointError."""

import time

import numpy as np
import pytest

from interop import CheckpointError, from_torch
from tests.interop.test_from_torch import broken

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from tests.interop import test_imagenet_networks as imagenet  # noqa: E402
from tests.interop import third_party  # noqa: E402


@pytest.mark.parametrize(
    "name", ["layer1.999999999", "layer999999999.0", "layer1.9999", "layer9999.0", "layer1." + "9" * 5000, "layer1.00"]
)
def test_a_number_in_a_name_is_never_counted_up_to(name, network):
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="no known layout fits") as refused:
        from_torch(broken(network, **{f"{name}.conv1.weight": torch.ones(4, 4, 3, 3)}))
    assert time.perf_counter() - started < 5
    assert len(str(refused.value)) < 5000


@pytest.mark.parametrize("name", ["unknown.{}.weight", "features.{}.weight", "layer1.{}.conv1.weight", "x{}"])
def test_thousands_of_unknown_names_take_no_time(name):
    """20,000 took 31 seconds; a name that no layout knows is now looked up once."""
    tensors = {name.format(number): np.ones(1, np.float32) for number in range(20_000)}
    started = time.perf_counter()
    with pytest.raises(CheckpointError):
        from_torch(tensors)
    assert time.perf_counter() - started < 5


def test_gaps_between_blocks_are_named(network):
    names = {key.replace("layer1.0.", "layer1.2."): value for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing .*: layer1\.0\.conv1\.weight"):
        from_torch(names)


def test_negative_variances_are_refused(network):
    bad = torch.tensor([1.0, -0.5, 1.0, -2.0])
    with pytest.raises(CheckpointError, match=r"layer1\.0\.bn1\.running_var: 2 of its variances are negative"):
        from_torch(broken(network, **{"layer1.0.bn1.running_var": bad}))


@pytest.mark.parametrize("dtype", ["bool", "complex64", "complex32", "int8", "int64", "uint16", "float8_e8m0fnu"])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype, network, tmp_path):
    key = "layer1.0.conv1.weight"
    tensors = broken(network, **{key: network.state_dict()[key].to(getattr(torch, dtype))})
    torch.save(tensors, tmp_path / "net.pth")
    for source in (tensors, tmp_path / "net.pth"):
        with pytest.raises(CheckpointError, match=rf"{key}: (expected floating-point weights|tensors of {dtype} are)"):
            from_torch(source)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats_widen_exactly_or_are_refused_by_name(dtype, network, tmp_path):
    from safetensors.torch import save_file

    key = "layer1.0.conv1.weight"
    narrow = network.state_dict()[key].to(getattr(torch, dtype))
    _, variables, _ = from_torch(broken(network, **{key: narrow}))
    expected = narrow.float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(np.asarray(variables["params"]["layer1_0"]["conv1"]["kernel"]), expected)
    save_file(broken(network, **{key: narrow}), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=f"{key} is of '{dtype}', which NumPy lacks; save it as float32"):
        from_torch(tmp_path / "net.safetensors")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_cut_and_flipped_files_are_refused_in_words(zipped, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "net.pth").read_bytes()
    rng = np.random.default_rng(0)
    inputs = [whole[:size] for size in (1, 2, 3, 4, 10, 50, 100, 200, 500, len(whole) // 2, len(whole) - 1)]
    for _ in range(60):
        damaged = bytearray(whole)
        for position in rng.integers(0, 3000, 3):
            damaged[position] = rng.integers(256)
        inputs.append(bytes(damaged))
    refused = 0
    for data in inputs:
        (tmp_path / "net.pth").write_bytes(data)
        try:
            from_torch(tmp_path / "net.pth")
        except CheckpointError as error:
            refused += 1
            assert "weights_only" not in str(error)
    assert refused >= 11


@pytest.mark.slow
@pytest.mark.parametrize("name", {**third_party.CASES, **imagenet.CASES})
def test_tensors_of_other_shapes_are_refused_by_name(name):
    """No axes, no elements, too many axes, one channel more: in 20 places of every kind of network."""
    module = {**third_party.CASES, **imagenet.CASES}[name].make()
    weights = {key: value for key, value in module.state_dict().items() if not key.endswith(("tracked", "indexes"))}
    rng = np.random.default_rng(0)
    for key in rng.choice(sorted(weights), min(20, len(weights)), replace=False):
        shape = tuple(weights[key].shape)
        for wrong in ((), (0,), (1, *shape), (*shape[:-1], shape[-1] + 1)):
            with pytest.raises(CheckpointError):
                from_torch(weights | {key: torch.ones(wrong)})


def test_what_is_no_file_is_not_opened(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="no regular file"):
        from_torch(tmp_path / "pipe.pth")


def test_names_in_an_archive_that_are_no_text(network, tmp_path):
    """A name that claims to be UTF-8 and is not."""
    file = tmp_path / "net.pth"
    torch.save(network.state_dict(), file)
    content = file.read_bytes()
    start = content.index(b"PK\x01\x02")  # of the first name in the directory
    flags = int.from_bytes(content[start + 8 : start + 10], "little") | 1 << 11
    content = content[: start + 8] + flags.to_bytes(2, "little") + content[start + 10 :]
    file.write_bytes(content[: start + 46] + b"\xff" + content[start + 47 :])
    with pytest.raises(CheckpointError, match=r"net\.pth is truncated or damaged: 'utf-8' codec"):
        from_torch(file)
