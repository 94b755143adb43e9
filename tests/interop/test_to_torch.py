"""State dicts out: bit for bit what went in, loaded strictly, the same network dense, masked and shrunk."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.pruning import PruningPlan, allocate, mask_variables, random_scores, shrink, shrink_variables
from interop import CheckpointError, from_torch, to_torch
from tests.interop.conftest import lively, nchw, torch_logits

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop import torch_models  # noqa: E402
from tests.interop import third_party  # noqa: E402


@pytest.fixture(scope="module")
def loaded(network):
    return from_torch(network.state_dict())


@pytest.mark.parametrize("layout", [None, "weiaicunzai", "ehap"])
def test_round_trip_is_bit_exact(layout, network):
    _, variables, info = from_torch(network.state_dict())
    if layout == "ehap" and info.shortcut == "A":
        with pytest.raises(CheckpointError, match="block 0 of stage 2 pads its shortcut with zeros"):
            to_torch(variables, layout=layout)
        return
    written = to_torch(variables, layout=layout)
    again, shortcut = from_torch(written, layout or "auto")[1:]
    assert shortcut.spec == info.spec
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), again, variables)
    assert jax.tree.all(same)
    if layout is None:
        original = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
        assert list(written) == list(original)
        assert all(torch.equal(written[k], v) and written[k].dtype == v.dtype for k, v in original.items())


def test_bfloat16_survives(loaded):
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded[1])
    written = to_torch(halved)
    expected = np.asarray(halved["params"]["conv1"]["kernel"].astype(jnp.float32)).transpose(3, 2, 0, 1)
    assert written["conv1.weight"].dtype == torch.bfloat16
    np.testing.assert_array_equal(written["conv1.weight"].float().numpy(), expected)


FAMILIES = {
    "resnet A": lambda: torch_models.cifar_resnet(8, widths=(4, 8, 16), num_classes=5),
    "resnet B": lambda: torch_models.cifar_resnet(8, widths=(4, 8, 16), shortcut="B", stem=6, num_classes=5),
    "wide": lambda: torch_models.wide_resnet(10, 2, stem=4, num_classes=5),
    "preresnet": lambda: torch_models.preresnet(11, stem=6, widths=(3, 4, 6), expansion=2, num_classes=5),
    "vgg": lambda: torch_models.vgg(11, widths=(4, 6, 6, 8, 8), hidden=(9,), conv_bias=True, num_classes=5),
    "vgg, mean": lambda: torch_models.vgg(11, widths=(4, 6, 6, 8, 8), hidden=(), last_pool="mean", num_classes=5),
}


COUPLINGS = dict(zip(FAMILIES, itertools.cycle(("union", "group"))))


class Family(NamedTuple):
    """A dense network in JAX, its graph, and images."""

    name: str
    apply: Any
    variables: Any
    graph: Any
    images: np.ndarray


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    size = 32 if "vgg" in request.param else 8
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    apply, variables, _ = from_torch(lively(FAMILIES[request.param]()).state_dict())
    return Family(request.param, apply, variables, trace_graph(apply)(variables, images[:1]), images)


@pytest.fixture(scope="module")
def plan(family):
    """A random plan, pruning the residual streams as the coupling of the family allows."""
    scores = random_scores(family.graph, key=jax.random.key(0))
    return allocate(family.graph, scores, channels=0.6, coupling=COUPLINGS[family.name])


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


def test_macs_and_parameters_are_those_pytorch_counts(family, plan):
    """Dense and shrunk, on the converted model."""
    image = torch.from_numpy(family.images[:1].transpose(0, 3, 1, 2).copy())
    for cost, state in (
        (count_cost(family.graph), to_torch(family.variables)),
        (count_cost(family.graph, plan), to_torch(shrink_variables(family.variables, plan), plan)),
    ):
        module = torch_models.load(state)
        assert hooked_macs(module, image) == cost.macs
        assert sum(p.numel() for p in module.parameters()) == cost.params


@pytest.mark.slow
def test_pruned_networks_compute_the_same(family, plan):
    assert plan.keep
    masked = mask_variables(family.variables, plan)
    small = shrink_variables(family.variables, plan)
    expected = np.asarray(jax.jit(shrink(family.apply, plan))(small, family.images))

    dense_module = torch_models.load(to_torch(masked))
    np.testing.assert_allclose(torch_logits(dense_module, family.images), expected, atol=1e-5)

    written = to_torch(small, plan)
    module = torch_models.load(written)
    np.testing.assert_allclose(torch_logits(module, family.images), expected, atol=1e-5)
    assert sum(p.numel() for p in module.parameters()) == sum(p.size for p in jax.tree.leaves(small["params"]))

    again, same, info = from_torch(module.state_dict())
    np.testing.assert_allclose(np.asarray(jax.jit(again)(same, family.images)), expected, atol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, small))
    if plan.coupling == "union" and info.form.kind == "residual":
        assert info.shortcut == "indexed"
        assert any(b.outputs > b.branch for stage in info.spec.blocks for b in stage), "the plan tests no union"


@pytest.fixture(scope="module")
def union_plan(loaded, images):
    graph = trace_graph(loaded[0])(loaded[1], images)
    return allocate(graph, random_scores(graph, key=jax.random.key(1)), channels=0.6, coupling="union")


@pytest.mark.slow
def test_pruned_network_goes_on_training_in_pytorch(loaded, union_plan, images):
    module = torch_models.load(to_torch(shrink_variables(loaded[1], union_plan), union_plan)).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    x, labels = nchw(images), torch.tensor([0, 1, 2])
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


def test_a_forgotten_plan_is_noticed_where_zeros_are_padded(images):
    module = lively(torch_models.cifar_resnet(8, widths=(4, 8, 16), num_classes=5))
    apply, variables, _ = from_torch(module.state_dict())
    keep = {
        "params/layer2_0/conv2/kernel": range(2, 8),
        "params/layer3_0/conv2/kernel": np.delete(np.arange(16), [4, 5]),
    }
    plan = PruningPlan.from_keep(trace_graph(apply)(variables, images), keep)
    small = shrink_variables(variables, plan)
    with pytest.raises(CheckpointError, match=r"shortcut of 4 channels to make 6, .* pass the plan that shrunk them"):
        to_torch(small)
    expected = torch_logits(torch_models.load(to_torch(mask_variables(variables, plan))), images)
    np.testing.assert_allclose(torch_logits(torch_models.load(to_torch(small, plan)), images), expected, atol=1e-5)
    guessed = torch_logits(torch_models.load(to_torch(small, indices={})), images)
    assert np.abs(guessed - expected).max() > 0.01, "the guess would have done"


def test_union_needs_akamasters_names(loaded, union_plan):
    with pytest.raises(CheckpointError, match="'weiaicunzai' has no place for"):
        to_torch(shrink_variables(loaded[1], union_plan), union_plan, layout="weiaicunzai")


@pytest.fixture(scope="module")
def strided():
    """A ResNet-8 with a convolution on every shortcut that changes shape, as EHAP and HAP have it; and images."""
    apply, variables, _ = from_torch(
        lively(torch_models.cifar_resnet(8, widths=(12, 24, 48), shortcut="B")).state_dict()
    )
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    return apply, variables, trace_graph(apply)(variables, images[:1]), images


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["group", "union"])
def test_pruned_networks_load_into_ehaps_and_haps_modules(coupling, strided):
    """Strictly, with the logits of the shrunk network, and back."""
    apply, variables, graph, images = strided
    plan = allocate(graph, random_scores(graph, key=jax.random.key(2)), channels=0.6, coupling=coupling)
    small = shrink_variables(variables, plan)
    expected = np.asarray(jax.jit(shrink(apply, plan))(small, images))

    written = to_torch(small, plan, layout="ehap")
    module = third_party.PrunedUnitResNet(written)
    module.load_state_dict(written, strict=False)
    assert {key for key in module.state_dict() if "num_batches" not in key} == written.keys()
    np.testing.assert_allclose(torch_logits(module.eval(), images), expected, atol=1e-5)
    again, same, info = from_torch(module.state_dict())
    assert info.layout == "ehap"
    np.testing.assert_allclose(np.asarray(jax.jit(again)(same, images)), expected, atol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, small))

    written = to_torch(small, plan, layout="hap")
    indices = {key: value.tolist() for key, value in written.items() if key.endswith("_indices")}
    weights = {key: value for key, value in written.items() if key not in indices}
    again, same, info = from_torch(weights, indices={f"module.{key}": value for key, value in indices.items()})
    assert info.layout == "hap" and "hap" not in info.also_fits
    np.testing.assert_allclose(np.asarray(jax.jit(again)(same, images)), expected, atol=1e-5)


def test_positions_are_yielded_by_a_set_in_order():
    """What `kept_indices` relies on: the numbers 0, …, n - 1 leave a Python set in order, however they entered."""
    rng = np.random.default_rng(0)
    for count in (*range(1, 300), 512, 1000, 2048):
        split = rng.permutation(count)
        branch, residual = np.sort(split[: count // 2 + 1]).tolist(), np.sort(split[count // 3 :]).tolist()
        assert list(set(branch + residual)) == list(range(count))


@pytest.mark.slow
def test_sums_that_ehaps_code_has_not(strided):
    """A channel of a sum that neither operand has."""
    _, variables, graph, _ = strided
    plan = allocate(graph, random_scores(graph, key=jax.random.key(2)), channels=0.6, coupling="union")
    small = shrink_variables(variables, plan)
    _, read, info = from_torch(to_torch(small, plan))
    holes = {key: np.arange(len(value)) for key, value in info.indices.items()}
    with pytest.raises(CheckpointError, match="channels that neither operand has"):
        to_torch(read, indices=holes, layout="ehap")


def test_other_variables_are_refused(loaded):
    with pytest.raises(CheckpointError, match=r"0 paths matched, 1 did not: params/dense/kernel"):
        to_torch({"params": {"dense": {"kernel": jnp.ones((2, 2))}}})
    extra = dict(loaded[1], ema={"decay": jnp.ones(())})
    with pytest.raises(CheckpointError, match="1 did not: ema/decay"):
        to_torch(extra)
    with pytest.raises(CheckpointError, match="params/linear/bias"):
        to_torch(jax.tree_util.tree_map_with_path(lambda p, x: None if "linear" in str(p) else x, loaded[1]))
    with pytest.raises(KeyError, match="unknown layout"):
        to_torch(loaded[1], layout="keras")
    with pytest.raises(CheckpointError, match="'xternalz' has no names for a resnet; these have: akamaster, chenyaofo"):
        to_torch(loaded[1], layout="xternalz")


def test_implants_have_no_place_in_pytorch(loaded, images):
    graph = trace_graph(loaded[0])(loaded[1], images)
    plan = PruningPlan.from_keep(
        graph, {"params/layer1_0/conv1/kernel": [0, 2]}, implants={"params/layer1_0/conv1/kernel": [2]}
    )
    with pytest.raises(CheckpointError, match=r"layer1_0/conv1/kernel has implants.*mask_variables"):
        to_torch(shrink_variables(loaded[1], plan), plan)


def test_names_of_another_layout_are_refused_by_load(loaded):
    with pytest.raises(CheckpointError, match="the names are those of 'weiaicunzai'; rename them"):
        torch_models.load(to_torch(loaded[1], layout="weiaicunzai"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch_models.cifar_resnet(9), "depth must be 6n \\+ 2"),
        (lambda: torch_models.cifar_resnet(8, shortcut="C"), "shortcut must be"),
        (lambda: torch_models.cifar_resnet(8, widths=(4, 7, 9)), "cannot join 4 to 7"),
        (lambda: torch_models.wide_resnet(12), "depth must be 6n \\+ 4"),
        (lambda: torch_models.preresnet(12), "depth must be 9n \\+ 2"),
        (lambda: torch_models.vgg(12), "VGG has depth 11, 13, 16, 19"),
        (lambda: torch_models.vgg(11, last_pool="mean"), "none before a mean"),
    ],
)
def test_networks_that_do_not_exist(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_index_buffers_must_be_distinct_positions(loaded, union_plan):
    written = to_torch(shrink_variables(loaded[1], union_plan), union_plan)
    key = next(key for key in written if key.endswith("residual_index") and len(written[key]) > 1)
    written[key] = torch.zeros_like(written[key])
    with pytest.raises(CheckpointError, match="distinct positions"):
        torch_models.load(written)
    with pytest.raises(CheckpointError, match="distinct positions"):
        from_torch(written)
