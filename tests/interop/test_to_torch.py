"""State dicts out: bit for bit what went in, loaded strictly, the same network dense, masked and shrunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.pruning import allocate, mask_variables, random_scores, shrink, shrink_variables
from interop import CheckpointError, from_torch, to_torch
from interop.layouts import LAYOUTS
from tests.interop.conftest import torch_logits

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop import torch_models  # noqa: E402


@pytest.fixture(scope="module")
def loaded(network):
    return from_torch(network.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_exact(layout, network):
    _, variables, info = from_torch(network.state_dict())
    written = to_torch(variables, layout=layout)
    again, shortcut = from_torch(written, layout)[1:]
    assert shortcut.spec == info.spec
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), again, variables)
    assert jax.tree.all(same)
    if layout == "akamaster":
        original = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
        assert list(written) == list(original)
        assert all(torch.equal(written[k], v) and written[k].dtype == v.dtype for k, v in original.items())


def test_bfloat16_survives(loaded):
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded[1])
    written = to_torch(halved)
    expected = np.asarray(halved["params"]["conv1"]["kernel"].astype(jnp.float32)).transpose(3, 2, 0, 1)
    assert written["conv1.weight"].dtype == torch.bfloat16
    np.testing.assert_array_equal(written["conv1.weight"].float().numpy(), expected)


@pytest.fixture(scope="module")
def graph(loaded, images):
    apply, variables, _ = loaded
    return trace_graph(apply)(variables, images)


@pytest.fixture(scope="module", params=["group", "union"])
def plan(request, graph):
    """A random plan, pruning the residual streams as the coupling allows."""
    return allocate(graph, random_scores(graph, key=jax.random.key(0)), channels=0.6, coupling=request.param)


def hooked_macs(module, image):
    """Multiply-accumulates of one image, counted by PyTorch hooks from the tensors that each layer saw."""
    counted = []

    def hook(layer, inputs, output):
        per_output = layer.weight[0].numel()
        counted.append(output[0].numel() * per_output)

    handles = [m.register_forward_hook(hook) for m in module.modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    with torch.no_grad():
        module(image)
    for handle in handles:
        handle.remove()
    return sum(counted)


def test_macs_and_parameters_are_those_pytorch_counts(loaded, images, plan):
    """Dense and shrunk, on the converted model."""
    apply, variables, _ = loaded
    graph = trace_graph(apply)(variables, images[:1])
    image = torch.from_numpy(np.asarray(images[:1]).transpose(0, 3, 1, 2).copy())
    for cost, state in (
        (count_cost(graph), to_torch(variables)),
        (count_cost(graph, plan), to_torch(shrink_variables(variables, plan), plan)),
    ):
        module = torch_models.load(state)
        assert hooked_macs(module, image) == cost.macs
        assert sum(p.numel() for p in module.parameters()) == cost.params


@pytest.fixture(scope="module")
def union_plan(graph):
    return allocate(graph, random_scores(graph, key=jax.random.key(1)), channels=0.6, coupling="union")


def test_pruned_networks_compute_the_same(plan, network, loaded, images):
    apply, variables, _ = loaded
    assert plan.keep
    masked = mask_variables(variables, plan)
    small = shrink_variables(variables, plan)
    expected = np.asarray(jax.jit(shrink(apply, plan))(small, images))

    dense_module = torch_models.load(to_torch(masked))
    np.testing.assert_allclose(torch_logits(dense_module, images), expected, atol=1e-5)

    written = to_torch(small, plan)
    module = torch_models.load(written)
    np.testing.assert_allclose(torch_logits(module, images), expected, atol=1e-5)
    assert sum(p.numel() for p in module.parameters()) == sum(p.size for p in jax.tree.leaves(small["params"]))

    again, same, info = from_torch(module.state_dict())
    np.testing.assert_allclose(np.asarray(again(same, images)), expected, atol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, small))
    if plan.coupling == "union":
        assert info.shortcut == "indexed"
        assert any(b.outputs > b.branch for stage in info.spec.blocks for b in stage), "the plan tests no union"


def test_pruned_network_goes_on_training_in_pytorch(loaded, union_plan, images):
    module = torch_models.load(to_torch(shrink_variables(loaded[1], union_plan), union_plan)).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    x, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([0, 1, 2])
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(module(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_plan_and_variables_that_do_not_fit(loaded, union_plan):
    with pytest.raises(CheckpointError, match=r"the plan leaves \d+ channels, found \d+; pass shrink_variables"):
        to_torch(loaded[1], union_plan)


def test_union_needs_akamasters_names(loaded, union_plan):
    with pytest.raises(CheckpointError, match="'weiaicunzai' has no place for"):
        to_torch(shrink_variables(loaded[1], union_plan), union_plan, layout="weiaicunzai")


def test_other_variables_are_refused(loaded):
    with pytest.raises(CheckpointError, match=r"0 paths matched, 1 did not \(params/dense/kernel\)"):
        to_torch({"params": {"dense": {"kernel": jnp.ones((2, 2))}}})
    extra = dict(loaded[1], ema={"decay": jnp.ones(())})
    with pytest.raises(CheckpointError, match="ema/decay"):
        to_torch(extra)
    with pytest.raises(KeyError, match="unknown layout"):
        to_torch(loaded[1], layout="timm")


def test_index_buffers_must_be_distinct_positions(loaded, union_plan):
    written = to_torch(shrink_variables(loaded[1], union_plan), union_plan)
    key = next(key for key in written if key.endswith("residual_index") and len(written[key]) > 1)
    written[key] = torch.zeros_like(written[key])
    with pytest.raises(CheckpointError, match="distinct positions"):
        torch_models.load(written)
    with pytest.raises(CheckpointError, match="distinct positions"):
        from_torch(written)
