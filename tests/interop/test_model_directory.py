"""A saved model comes back bit for bit, and nothing that was tampered with comes back at all."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.pruning import allocate, random_scores, shrink, shrink_variables
from ehap_jax.quant import onnx_session, to_onnx
from interop import CheckpointError, from_torch, to_torch
from tests.interop.conftest import lively, torch_logits

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
safetensors = pytest.importorskip("safetensors", reason="safetensors is an optional extra")
from safetensors.torch import load_file, save_file  # noqa: E402

from interop import torch_models  # noqa: E402
from interop.model_directory import load_model, save_model  # noqa: E402
from tests.interop.imagenet_networks import MobileNetV2  # noqa: E402

CONFIG = {"seed": 0, "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
METADATA = {"test accuracy": 0.875, "data": "none | at all"}


@pytest.fixture(scope="module")
def loaded():
    module = lively(torch_models.cifar_resnet(8, widths=(4, 8, 16), num_classes=5))
    return from_torch(module.state_dict())


@pytest.fixture(scope="module")
def shrunk(loaded, images):
    """coupling -> (plan, variables)."""
    apply, variables, _ = loaded
    graph = trace_graph(apply)(variables, images)
    found = {}
    for coupling in ("group", "union"):
        plan = allocate(graph, random_scores(graph, key=jax.random.key(1)), channels=0.6, coupling=coupling)
        found[coupling] = plan, shrink_variables(variables, plan)
    return found


@pytest.fixture
def saved(shrunk, tmp_path):
    plan, small = shrunk["group"]
    return save_model(tmp_path / "model", small, plan, config=CONFIG, metadata=METADATA)


def same_bits(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(equal)


def test_dense_round_trip(loaded, images, tmp_path):
    apply, variables, _ = loaded
    there = save_model(tmp_path / "deep" / "model", variables, config=CONFIG, metadata=METADATA)
    assert [path.name for path in there.parent.iterdir()] == ["model"], "a temporary directory was left"
    found = load_model(there)
    assert same_bits(found.variables, variables)
    assert found.plan is None and (found.config, found.metadata) == (CONFIG, METADATA)
    assert found.info.normalisation == ((0.5,) * 3, (0.25,) * 3)
    np.testing.assert_array_equal(found.apply(found.variables, images), apply(variables, images))


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["group", "union"])
def test_shrunk_round_trip(coupling, loaded, shrunk, images, tmp_path):
    plan, small = shrunk[coupling]
    found = load_model(save_model(tmp_path / "model", small, plan, config=CONFIG, metadata=METADATA))
    assert same_bits(found.variables, small)
    assert found.plan is not None and found.plan.coupling == coupling
    assert {p: k.tolist() for p, k in found.plan.keep.items()} == {p: k.tolist() for p, k in plan.keep.items()}
    expected = np.asarray(jax.jit(shrink(loaded[0], found.plan))(found.variables, images))
    np.testing.assert_allclose(np.asarray(found.apply(found.variables, images)), expected, atol=1e-5)
    module = torch_models.load(load_file(tmp_path / "model" / "model.safetensors"))
    np.testing.assert_allclose(torch_logits(module, images), expected, atol=1e-5)


@pytest.mark.slow
def test_network_pruned_elsewhere_keeps_its_positions(shrunk, images, tmp_path):
    plan, small = shrunk["union"]
    apply, variables, info = from_torch(to_torch(small, plan))
    assert info.indices
    found = load_model(save_model(tmp_path / "m", variables, config={}, metadata={}, indices=info.indices))
    assert same_bits(found.variables, variables) and found.plan is None
    np.testing.assert_array_equal(found.apply(found.variables, images), apply(variables, images))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_come_back_as_they_were(dtype, loaded, tmp_path):
    halved = jax.tree.map(lambda leaf: leaf.astype(dtype), loaded[1])
    halved["batch_stats"] = loaded[1]["batch_stats"]
    assert same_bits(load_model(save_model(tmp_path / "m", halved, config={}, metadata={})).variables, halved)


def test_weights_file_carries_config_and_plan(saved):
    with safetensors.safe_open(saved / "model.safetensors", framework="numpy") as file:
        inside = file.metadata()
    assert json.loads(inside["config.json"])["config"] == CONFIG
    assert json.loads(inside["plan.json"]) == json.loads((saved / "plan.json").read_text())


def test_model_card_tells_the_numbers(saved, shrunk):
    card = (saved / "README.md").read_text()
    small = shrunk["group"][1]
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(small['params'])):,}" in card
    assert "| test accuracy | 0.875 |" in card and "none \\| at all" in card
    assert "group coupling" in card and "random" in card and "[0.25, 0.25, 0.25]" in card


def test_nothing_is_overwritten(saved, loaded):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match="another name"):
        save_model(saved, loaded[1], config={}, metadata={})
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": {"x": object()}}, TypeError, "JSON"),
        ({"metadata": {"loss": float("nan")}}, ValueError, "finite"),
        ({"config": {"normalisation": [0.5]}}, ValueError, "normalisation"),
        ({"config": {"normalisation": {"mean": [0, 0, 0], "std": [1, 0, 1]}}}, ValueError, "positive"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(arguments, error, message, loaded, tmp_path):
    with pytest.raises(error, match=message):
        save_model(tmp_path / "m", loaded[1], **{"config": {}, "metadata": {}, **arguments})
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(loaded, tmp_path):
    broken = jax.tree.map(jnp.asarray, loaded[1])
    broken["params"]["linear"]["bias"] = broken["params"]["linear"]["bias"].at[1].set(jnp.nan)
    with pytest.raises(CheckpointError, match=r"linear\.bias has 1 weights"):
        save_model(tmp_path / "m", broken, config={}, metadata={})


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def both(folder, change):
    """Change config.json and its copy inside the weights."""
    edit(folder / "config.json", change)
    with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
        inside = file.metadata() | {"config.json": (folder / "config.json").read_text()}
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata=inside)


def reweigh(folder, change):
    """Change the tensors and keep the metadata."""
    with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
        inside = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=inside)


TAMPERED = {
    "config": (lambda f: edit(f / "config.json", lambda d: d["metadata"].update(accuracy=1)), "not the one inside"),
    "plan": (lambda f: edit(f / "plan.json", lambda d: d["provenance"].update(x=1)), "not the one inside"),
    "version": (lambda f: edit(f / "config.json", lambda d: d.update(version=1)), "version 1"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "not a JSON file"),
    "deep json": (lambda f: (f / "config.json").write_text("[" * 100_000), "not a JSON file"),
    "huge number": (lambda f: (f / "config.json").write_text("9" * 5_000), "not a JSON file"),
    "no checksum": (lambda f: both(f, lambda d: d["tensors"]["linear.bias"].pop("sha256")), "dtype and sha256"),
    "form": (lambda f: both(f, lambda d: d["network"].update(form="mlp")), "network.form is 'mlp'; known: resnet"),
    "form of no kind": (lambda f: both(f, lambda d: d["network"].update(form=[])), r"network\.form is \[\]; known"),
    "no tensors": (lambda f: edit(f / "config.json", lambda d: d.pop("tensors")), "'tensors' must be a dict"),
    "shape": (
        lambda f: reweigh(f, lambda t: t.update({"linear.bias": torch.zeros(4)})),
        r"linear\.bias: expected float32 of shape \(5,\), found float32 of \(4,\)",
    ),
    "dtype": (lambda f: reweigh(f, lambda t: t.update({"linear.bias": torch.zeros(5).double()})), "found float64"),
    "lost": (lambda f: reweigh(f, lambda t: t.pop("linear.bias")), r"missing \['linear.bias'\]"),
    "other weights": (lambda f: reweigh(f, lambda t: t["linear.bias"].fill_(0.5)), "its sha256 is another"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "truncated",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_directories_are_refused(name, saved):
    tamper, message = TAMPERED[name]
    load_model(saved)
    tamper(saved)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_plan_of_another_network_is_refused(saved, shrunk, tmp_path):
    """Even where the copy inside the weights agrees with it."""
    other = save_model(tmp_path / "other", shrunk["union"][1], shrunk["union"][0], config=CONFIG, metadata=METADATA)
    shutil.copy(other / "plan.json", saved / "plan.json")
    with safetensors.safe_open(saved / "model.safetensors", framework="numpy") as file:
        inside = file.metadata() | {"plan.json": (other / "plan.json").read_text()}
    save_file(load_file(saved / "model.safetensors"), saved / "model.safetensors", metadata=inside)
    with pytest.raises(CheckpointError, match=r"plan\.json does not fit"):
        load_model(saved)


def test_positions_in_residual_sums_must_be_the_plans(shrunk, tmp_path):
    plan, small = shrunk["union"]
    saved = save_model(tmp_path / "model", small, plan, config={}, metadata={})

    def reverse(tensors):
        key = next(key for key in tensors if key.endswith("residual_index") and len(tensors[key]) > 1)
        tensors[key] = tensors[key].flip(0).contiguous()

    reweigh(saved, reverse)
    with pytest.raises(CheckpointError, match="its sha256 is another"):
        load_model(saved)

    def seal(document):
        for name, tensor in load_file(saved / "model.safetensors").items():
            document["tensors"][name]["sha256"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    both(saved, seal)
    with pytest.raises(CheckpointError, match="other positions"):
        load_model(saved)


def test_flipped_bits_of_the_weights_are_noticed(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(8, len(whole), 40):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_model(saved)
    path.write_bytes(whole)
    load_model(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "plan.json", "model.onnx"])
def test_links_out_of_the_directory_are_not_followed(name, saved, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes((saved / name).read_bytes() if (saved / name).exists() else b"x")
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(outside)
    if name == "model.onnx":
        both(saved, lambda d: d.update(onnx={name: hashlib.sha256(b"x").hexdigest()}))
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*outside"):
        load_model(saved)


def test_a_link_to_itself_is_no_file(saved):
    (saved / "config.json").unlink()
    (saved / "config.json").symlink_to("config.json")
    with pytest.raises(FileNotFoundError, match=r"is not a saved model: it has no config\.json"):
        load_model(saved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch_models.wide_resnet(10, 1, stem=4),
        lambda: torch_models.preresnet(11),
        lambda: MobileNetV2((3, 4, 5, 6, 7, 8, 9), 4, 10, expansion=2, classes=5),
    ],
    ids=["wide", "preresnet", "mobilenetv2"],
)
def test_other_forms_come_back(make, images, tmp_path):
    apply, variables, _ = from_torch(lively(make()).state_dict())
    found = load_model(save_model(tmp_path / "model", variables, config={}, metadata={}))
    assert same_bits(found.variables, variables)
    np.testing.assert_array_equal(found.apply(found.variables, images), apply(variables, images))


@pytest.mark.slow
def test_onnx_file_goes_along_and_may_not_change(loaded, shrunk, images, tmp_path):
    pytest.importorskip("onnx", reason="ONNX is an optional extra: pip install 'ehap-jax[onnx]'")
    pytest.importorskip("onnxruntime", reason="ONNX is an optional extra: pip install 'ehap-jax[onnx]'")
    plan, small = shrunk["group"]
    model = to_onnx(shrink(loaded[0], plan), small, example=images)
    there = save_model(tmp_path / "model", small, plan, config=CONFIG, metadata=METADATA, onnx=model)
    found = load_model(there)
    assert found.onnx == there / "model.onnx" and "`model.onnx`" in (there / "README.md").read_text()
    (logits,) = onnx_session(found.onnx).runtime.run(None, {"x": images})
    np.testing.assert_allclose(logits, found.apply(found.variables, images), atol=1e-4)
    found.onnx.write_bytes(found.onnx.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="sha256"):
        load_model(there)
    found.onnx.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx"):
        load_model(there)


def test_onnx_file_from_elsewhere_is_refused(saved):
    (saved / "model.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="knows nothing of"):
        load_model(saved)


def test_recorded_data_do_not_admit_an_onnx_file(saved):
    (saved / "model.onnx.data").write_bytes(b"x")
    both(saved, lambda d: d.update(onnx={"model.onnx.data": hashlib.sha256(b"x").hexdigest()}))
    with pytest.raises(CheckpointError, match=r"records \['model\.onnx\.data'\] without the model\.onnx"):
        load_model(saved)
    (saved / "model.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="knows nothing of"):
        load_model(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "plan.json"])
def test_missing_files_are_named(name, saved):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_model(saved)
    with pytest.raises(FileNotFoundError, match="no model directory"):
        load_model(saved / "nowhere")


def test_float64_needs_x64(loaded, tmp_path):
    doubled = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), loaded[1])
    saved = save_model(tmp_path / "m", doubled, config={}, metadata={})
    with pytest.raises(ValueError, match="jax_enable_x64"):
        load_model(saved)
