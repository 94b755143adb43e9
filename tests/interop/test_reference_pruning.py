"""Union coupling, fine-tuning and QAT in PyTorch against ours, on the same weights, plans and batches."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.models import train_apply
from ehap_jax.pruning import allocate, random_scores, shrink, shrink_variables
from ehap_jax.quant import INT8, fake_quant, rounded_activations
from ehap_jax.training.optimizer import sgd_cosine
from interop import from_torch, to_torch
from tests.interop.conftest import lively, nchw, torch_logits

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop import torch_models  # noqa: E402
from interop.reference import finetune, qat, union  # noqa: E402
from interop.to_torch import named_arrays  # noqa: E402


@pytest.fixture(scope="module")
def setting(images):
    """(module, apply, variables, info, scores, plan under union coupling, kept channels under PyTorch's names)."""
    module = lively(torch_models.cifar_resnet(8, widths=(4, 8, 12), shortcut="B", num_classes=3))
    apply, variables, info = from_torch(module.state_dict())
    graph = trace_graph(apply)(variables, images[:1])
    scores = random_scores(graph, key=jax.random.key(2))
    plan = allocate(graph, scores, channels=0.6, coupling="union")
    kept = {name_of(info, path): torch.from_numpy(np.asarray(k)) for path, k in plan.keep.items()}
    return module, apply, variables, info, scores, plan, kept


def name_of(info, path):
    return info.form.key_at(path).removesuffix(".weight")


@pytest.mark.slow
def test_the_same_channels_are_kept(setting):
    scores, plan = setting[4:6]
    convs = {path: torch.from_numpy(np.array(v)) for path, v in scores.values.items() if "linear" not in path}
    left = sum(len(plan.keep.get(path, values)) for path, values in convs.items())
    found = union.kept_channels(convs, left / sum(len(v) for v in convs.values()))
    assert sum(len(k) for k in found.values()) == left
    for path, channels in found.items():
        np.testing.assert_array_equal(channels, plan.keep.get(path, np.arange(len(convs[path]))), err_msg=path)


def test_an_emptied_layer_keeps_its_best_channels():
    kept = union.kept_channels({"a": torch.arange(20.0) / 100, "b": torch.arange(20.0) + 1}, 0.5, max_layer_ratio=0.9)
    assert kept["a"].tolist() == [18, 19] and kept["b"].tolist() == list(range(20))
    with pytest.raises(ValueError, match="fraction"):
        union.kept_channels({"a": torch.ones(2)}, 0)


@pytest.mark.slow
def test_union_pruning_gives_the_same_network(setting, images):
    module, _, variables, _, _, plan, kept = setting
    pruned = union.prune_union(module, kept)
    ours = to_torch(shrink_variables(variables, plan), plan)
    theirs = {key: value for key, value in pruned.state_dict().items() if "num_batches" not in key}
    assert any(key.endswith("branch_index") for key in ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    expected = torch_logits(union.mask_union(module, kept), images)
    np.testing.assert_allclose(torch_logits(pruned, images), expected, atol=1e-5)
    assert np.abs(expected - torch_logits(module, images)).max() > 0.1
    with pytest.raises(ValueError, match="not pruned before"):
        union.prune_union(pruned, {})


def batches(count=4, size=6):
    generator = np.random.default_rng(3)
    return [
        (generator.normal(size=(size, 8, 8, 3)).astype(np.float32), generator.integers(0, 3, size).astype(np.int32))
        for _ in range(count)
    ]


def torch_batches():
    return [(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y.astype(np.int64))) for x, y in batches()]


RATES = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


@pytest.mark.slow
def test_masked_and_shrunk_networks_train_alike(setting, images):
    module, kept = setting[0], setting[6]
    masked, pruned = union.mask_union(module, kept), union.prune_union(module, kept)
    first = finetune.finetune(masked, torch_batches(), total_steps=5, kept=kept, **RATES)
    second = finetune.finetune(pruned, torch_batches(), total_steps=5, **RATES)
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert not masked.training
    np.testing.assert_allclose(torch_logits(masked, images), torch_logits(pruned, images), atol=1e-4)
    with pytest.raises(ValueError, match="more batches than total_steps"):
        finetune.finetune(pruned, torch_batches(), total_steps=2)


@pytest.mark.slow
def test_fine_tuning_takes_the_same_steps_in_jax(setting):
    module, _, variables, info, _, plan, kept = setting
    pruned = union.prune_union(module, kept)
    expected = finetune.finetune(pruned, torch_batches(), total_steps=5, **RATES)
    forward = shrink(train_apply(info.model), plan)
    small = shrink_variables(variables, plan)
    optimizer = sgd_cosine(total_steps=5, **RATES)

    def loss(params, stats, x, y):
        logits, updates = forward({"params": params, "batch_stats": stats}, x)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean(), updates["batch_stats"]

    @jax.jit
    def step(params, stats, state, x, y):
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats, x, y)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    params, stats, losses = small["params"], small["batch_stats"], []
    state = optimizer.init(params)
    for x, y in batches():
        params, stats, state, value = step(params, stats, state, x, y)
        losses.append(float(value))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    ours = named_arrays({"params": params}, info.form)
    for name, value in pruned.named_parameters():
        np.testing.assert_allclose(ours[name], value.detach().numpy(), atol=1e-4, err_msg=name)


def quantised(setting, batch):
    """Ours and the reference, calibrated on the same images: (Quantized, variables, ranges), QuantisedResNet."""
    module, apply, variables, _, _, plan, kept = setting
    pruned = union.prune_union(module, kept)
    small = shrink_variables(variables, plan)
    network = fake_quant(shrink(apply, plan), rules=INT8)
    _, ranges = jax.jit(partial(network.apply, update=True))(small, network.init(small, batch), batch)
    reference = qat.QuantisedResNet(pruned)
    with torch.no_grad():
        reference(nchw(batch), observe=True)
    return network, small, ranges, reference


SITES = {"conv1": "params/conv1/kernel", "linear": "params/linear/kernel", "mean": "params/linear/kernel:pool"} | {
    f"layer{n}_0_{ours}": f"params/layer{n}_0/{theirs}"
    for n in (1, 2, 3)
    for ours, theirs in (
        ("conv1", "conv1/kernel"),
        ("conv2", "conv2/kernel"),
        ("branch", "conv2/kernel:out"),
        ("shortcut", "downsample_conv/kernel:out"),
    )
    if not (n == 1 and ours == "shortcut")
}


def share_ranges(reference, ranges):
    """Give the reference our ranges to the last bit: one value rounded the other way moves every range behind it."""
    for site, path in SITES.items():
        for end in ("low", "high"):
            getattr(reference.ranges[site], end).fill_(float(getattr(ranges[path], end)))


@pytest.mark.slow
def test_qat_has_our_ranges_logits_and_gradients(setting):
    batch, labels = batches(1)[0]
    network, small, ranges, reference = quantised(setting, batch)
    assert reference.ranges.keys() == SITES.keys()
    for site, path in SITES.items():
        found = reference.ranges[site]
        np.testing.assert_allclose([found.low, found.high], [ranges[path].low, ranges[path].high], rtol=5e-3, atol=1e-5)
    share_ranges(reference, ranges)

    def loss(params):
        logits, _ = network.apply({**small, "params": params}, ranges, batch, update=False)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean(), logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(small["params"])
    theirs = reference(nchw(batch))
    expected = torch.nn.functional.cross_entropy(theirs, torch.from_numpy(labels.astype(np.int64)))
    expected.backward()
    np.testing.assert_allclose(float(value), expected.item(), rtol=2e-3)
    spread = float(theirs.detach().std())
    assert np.abs(np.asarray(logits) - theirs.detach().numpy()).max() < 0.02 * spread
    ours = named_arrays({"params": gradient}, setting[3].form)
    for name, parameter in reference.model.named_parameters():
        a, b = ours[name].ravel(), parameter.grad.numpy().ravel()
        assert a @ b > 0.999 * np.linalg.norm(a) * np.linalg.norm(b), name


@pytest.mark.slow
def test_qat_rounds_to_our_integers(setting):
    """Up to values that lie on the edge between two integers, which float32 sums in another order may cross."""
    batch, _ = batches(1)[0]
    network, small, ranges, reference = quantised(setting, batch)
    share_ranges(reference, ranges)
    ours = jax.jit(lambda v, r, x: rounded_activations(network, v, r, x))(small, ranges, batch)
    found = {}

    def hook(name):
        def keep(module, inputs, output):
            scale, zero = module.grid()
            found[name] = (output / scale + zero).round().int().numpy()

        return keep

    for name, module in reference.ranges.items():
        module.register_forward_hook(hook(name))
    with torch.no_grad():
        reference(nchw(batch))
    for site, path in SITES.items():
        theirs = found[site].transpose(0, 2, 3, 1) if found[site].ndim == 4 else found[site]
        difference = np.abs(theirs.astype(int) - np.asarray(ours[path]).astype(int))
        assert difference.max() <= 1 and np.mean(difference > 0) < 0.01, (site, np.mean(difference > 0))


@pytest.mark.slow
def test_quantisation_aware_training_learns(setting):
    batch, labels = batches(1)[0]
    reference = copy.deepcopy(quantised(setting, batch)[3])
    x, y = nchw(batch), torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(reference(x, observe=True), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_clipped_values_have_no_gradient():
    x = torch.tensor([-1.0, 0.1, 9.0], requires_grad=True)
    y = qat.FakeQuantise.apply(x, torch.tensor(0.01), torch.tensor(10.0), 0, 255)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([-0.1, 0.1, 2.45]))
    assert x.grad.tolist() == [0.0, 1.0, 0.0]
