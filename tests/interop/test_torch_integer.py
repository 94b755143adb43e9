"""The INT8 network in PyTorch: every integer is JAX's, and so is every bit of the logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.pruning import allocate, random_scores, shrink, shrink_variables
from ehap_jax.quant import INT8, QuantRule, fake_quant, to_integer
from ehap_jax.quant.program import LayerStep
from interop import from_torch
from interop.network import convolve
from tests.interop.conftest import lively

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop import torch_models  # noqa: E402
from interop.torch_integer import IntegerModule  # noqa: E402

FAMILIES = {
    "resnet A": (lambda: torch_models.cifar_resnet(8, widths=(4, 6, 8)), 8),
    "wide": (lambda: torch_models.wide_resnet(10, 2, stem=3), 8),
    "vgg": (lambda: torch_models.vgg(11, widths=(3, 4, 4, 5, 5), hidden=(6,)), 32),
}


def quantised(apply, variables, images, rules=INT8):
    network = fake_quant(apply, rules=rules)
    calibrate = jax.jit(partial(network.apply, update=True))
    _, ranges = calibrate(variables, network.init(variables, images), images)
    return to_integer(network, variables, ranges, example=images)


@pytest.fixture(scope="module", params=["resnet A, union", *FAMILIES])
def pair(request):
    """(integer network, module, images); the first one pruned, with sums by index."""
    make, size = FAMILIES[request.param.removesuffix(", union")]
    images = np.random.default_rng(0).normal(size=(6, size, size, 3)).astype(np.float32)
    apply, variables, _ = from_torch(lively(make()).state_dict())
    if request.param.endswith("union"):
        graph = trace_graph(apply)(variables, images[:1])
        plan = allocate(graph, random_scores(graph, key=jax.random.key(0)), channels=0.6, coupling="union")
        apply, variables = shrink(apply, plan), shrink_variables(variables, plan)
    network = quantised(apply, variables, images[:4])
    return network, IntegerModule(network, (size, size, 3)), images


def torch_images(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.slow
def test_every_integer_is_the_same(pair):
    network, module, images = pair
    ours = jax.jit(lambda n, x: n.tensors(x))(network, images)
    theirs = module.tensors(torch_images(images))
    assert ours.keys() == theirs.keys() and len(ours) > 10
    differ = {name: int(np.sum(theirs[name].numpy() != np.asarray(ours[name]))) for name in ours}
    assert not any(differ.values()), differ
    assert any(np.ptp(np.asarray(values)) > 100 for values in ours.values()), "nothing happens in this network"


@pytest.mark.slow
def test_logits_are_the_same_bits_for_any_batch_size(pair):
    network, module, images = pair
    ours = np.asarray(jax.jit(lambda n, x: n(x))(network, images))
    for size in (6, 1):
        theirs = module(torch_images(images[:size])).numpy()
        assert theirs.dtype == np.float32 and theirs.tobytes() == ours[:size].tobytes()


def test_state_dict_is_the_integers(pair, tmp_path):
    network, module, images = pair
    state = module.state_dict()
    assert {str(v.dtype) for v in state.values()} == {"torch.int8", "torch.int32", "torch.float32"}
    kernels = {key: value for key, value in state.items() if key.endswith(".kernel")}
    assert sum(v.numel() for v in kernels.values()) == sum(w.kernel.size for w in network.layers.values())
    from safetensors.torch import load_file, save_file

    save_file(state, tmp_path / "int8.safetensors")
    expected = module(torch_images(images[:2]))
    other = IntegerModule(network, images.shape[1:])
    for buffer in other.buffers():
        buffer.zero_()
    assert not torch.equal(other(torch_images(images[:2])), expected)
    other.load_state_dict(load_file(tmp_path / "int8.safetensors"), strict=True)
    assert torch.equal(other(torch_images(images[:2])), expected)


@pytest.mark.slow
def test_what_is_left_in_floating_point_is_refused():
    apply, variables, _ = from_torch(lively(torch_models.cifar_resnet(8, widths=(2, 2, 4))).state_dict())
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    network = quantised(apply, variables, images, rules=(QuantRule("*linear*", skip=True), *INT8))
    with pytest.raises(NotImplementedError, match="has no counterpart in the PyTorch module"):
        IntegerModule(network, (8, 8, 3))


@pytest.mark.slow
def test_one_layer_that_is_rounded_to_two_grids():
    """Its sums have a multiplier for each of them; and layers may be called anything."""

    def apply(w, x):
        y = convolve(x, w["keys"], 1)
        both = convolve(jax.nn.relu(y), w["a.b"], 1) + convolve(jnp.clip(y, -1, 1), w["a_b"], 1)
        return jnp.mean(jax.nn.relu(both), axis=(1, 2)) @ w["d"]

    draw = np.random.default_rng(1).normal
    variables = {name: jnp.asarray(draw(size=(1, 1, 3, 3)), jnp.float32) for name in ("keys", "a.b", "a_b")}
    variables["d"] = jnp.asarray(draw(size=(3, 5)), jnp.float32)
    images = draw(size=(4, 6, 6, 3)).astype(np.float32) * 2
    network = quantised(apply, variables, images)
    module = IntegerModule(network, (6, 6, 3))
    targets = [step.target.out for step in module.steps if isinstance(step, LayerStep) and step.site.name == "keys"]
    assert len(targets) == 2 and targets[0].grid.scale != targets[1].grid.scale
    assert module.layer_numbers.keys() == network.layers.keys() == {"keys", "a.b", "a_b", "d"}
    logits, ours = jax.jit(lambda n, x: (n(x), n.tensors(x)))(network, images)
    theirs = module.tensors(torch_images(images))
    assert not any(np.any(theirs[name].numpy() != np.asarray(ours[name])) for name in ours)
    np.testing.assert_array_equal(module(torch_images(images)).numpy(), logits)
