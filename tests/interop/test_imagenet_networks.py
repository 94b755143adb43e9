"""Networks for ImageNet under torchvision's and timm's names: logits, costs, pruned, in and out."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest

from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.pruning import allocate, mask_variables, random_scores, shrink, shrink_variables
from interop import CheckpointError, from_torch, to_torch
from tests.interop.conftest import lively, torch_logits

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop import torch_models  # noqa: E402
from tests.interop import imagenet_networks as zoo  # noqa: E402


class Case(NamedTuple):
    """A small network, its form, depth, image size."""

    make: Callable[[], torch.nn.Module]
    form: str
    depth: int
    size: int = 33
    layout: str = "torchvision"


CASES = {
    "resnet18": Case(lambda: zoo.ResNet(zoo.BasicBlock, (2, 2, 2, 2), 4, classes=5), "resnet", 18),
    "bottlenecks": Case(lambda: zoo.ResNet(zoo.Bottleneck, (2, 1, 1, 1), 4, classes=5), "bottleneck", 17),
    "wide bottlenecks": Case(
        lambda: zoo.ResNet(zoo.Bottleneck, (1, 1, 1, 1), 4, base_width=128, classes=5), "bottleneck", 14
    ),
    "resnext": Case(lambda: zoo.ResNet(zoo.Bottleneck, (1, 2, 1, 1), 4, groups=4, classes=5), "bottleneck", 17),
    "mobilenet_v2": Case(
        lambda: zoo.MobileNetV2((3, 4, 5, 6, 7, 8, 9), 4, 10, expansion=2, classes=5), "mobilenetv2", 53
    ),
    "vit": Case(lambda: zoo.VisionTransformer(128, 2, 2, 24, 4, 12, 5), "vit", 2, 12, "timm"),
    "vgg11_bn": Case(
        lambda: zoo.VGG((1, 1, 2, 2, 2), (3, 4, 4, 5, 6), hidden=7, grid=2, classes=5), "vgg11", 11, 64
    ),
    "vgg11, means of 2×2": Case(
        lambda: zoo.VGG((1, 1, 2, 2, 2), (3, 4, 4, 5, 6), 7, grid=1, norm=False, classes=5), "vgg11_plain", 11, 64
    ),
}  # fmt: skip


class Loaded(NamedTuple):
    """A case, its PyTorch network, what was read, and images."""

    case: Case
    module: torch.nn.Module
    apply: Callable
    variables: dict
    info: object
    images: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def loaded(request):
    case = CASES[request.param]
    torch.manual_seed(0)
    module = lively(case.make())
    images = np.random.default_rng(0).normal(size=(2, case.size, case.size, 3)).astype(np.float32)
    return Loaded(case, module, *from_torch(module.state_dict()), images)


def test_logits_are_those_of_pytorch(loaded):
    case, module, apply, variables, info, images = loaded
    assert (info.layout, info.form.name, info.depth, info.num_classes) == (case.layout, case.form, case.depth, 5)
    assert info.normalisation[0] == (0.485, 0.456, 0.406)
    expected = torch_logits(module, images)
    assert expected.std() > 0.01
    np.testing.assert_allclose(np.asarray(jax.jit(apply)(variables, images)), expected, atol=3e-5)
    assert len(jax.tree.leaves(variables)) + len(info.unread) == len(module.state_dict()), "a tensor was left out"


def test_they_go_back_bit_for_bit(loaded):
    case, module, _, variables, _, images = loaded
    back = to_torch(variables, layout=case.layout)
    read = {key: value for key, value in module.state_dict().items() if "num_batches" not in key}
    assert back.keys() == read.keys() and all(torch.equal(back[key], value) for key, value in read.items())
    plain = torch_models.load(to_torch(variables))
    np.testing.assert_allclose(torch_logits(plain, images), torch_logits(module, images), atol=2e-5)


PLANS = [(name, "union" if number % 2 == 0 else "group") for number, name in enumerate(CASES)] + [("vit", "union")]


@pytest.mark.slow
@pytest.mark.parametrize(("loaded", "coupling"), PLANS, indirect=["loaded"])
def test_pruned_networks_compute_the_same_everywhere(coupling, loaded):
    """Masked in PyTorch, shrunk in JAX, shrunk in PyTorch."""
    case, module, apply, variables, _, images = loaded
    graph = trace_graph(apply)(variables, images[:1])
    plan = allocate(graph, random_scores(graph, key=jax.random.key(0)), channels=0.7, coupling=coupling)
    assert plan.keep
    small = shrink_variables(variables, plan)
    expected = np.asarray(jax.jit(shrink(apply, plan))(small, images))
    module.load_state_dict(to_torch(mask_variables(variables, plan), layout=case.layout), strict=False)
    np.testing.assert_allclose(torch_logits(module, images), expected, atol=3e-5)
    if case.form == "vit" and coupling == "union":
        with pytest.raises(CheckpointError, match=r"outputs of params/block0/attention_out/kernel.*mask_variables"):
            to_torch(small, plan)
        return
    written = to_torch(small, plan)
    again, same, info = from_torch(written)
    if coupling == "union" and info.form.kind in ("residual", "inverted"):
        assert info.shortcut == "indexed", "the plan tests no union"
    np.testing.assert_allclose(np.asarray(jax.jit(again)(same, images)), expected, atol=3e-5)
    np.testing.assert_allclose(torch_logits(torch_models.load(written), images), expected, atol=3e-5)
    module.load_state_dict(to_torch(variables, layout=case.layout), strict=False)


def test_transformers_that_are_not_read():
    """Heads of another width are in no shape, so such a network would silently be another one."""
    with pytest.raises(CheckpointError, match=r"pos_embed: .* multiple of 64 up to 1024"):
        from_torch(zoo.VisionTransformer(96, 1, 3, 8, 4, 12, 5).state_dict())
    with pytest.raises(CheckpointError, match=r"found 10 tokens of width 1280"):
        from_torch(zoo.VisionTransformer(1280, 1, 16, 8, 4, 12, 5).state_dict())
    weights = zoo.VisionTransformer(128, 1, 2, 8, 4, 12, 5).state_dict()
    with pytest.raises(CheckpointError, match=r"attn\.qkv\.weight: expected heads of 64"):
        from_torch(
            weights | {"blocks.0.attn.qkv.weight": torch.ones(60, 128), "blocks.0.attn.qkv.bias": torch.ones(60)}
        )
    apply, variables, _ = from_torch(weights)
    with pytest.raises(ValueError, match="images of 12 pixels"):
        apply(variables, np.zeros((1, 16, 16, 3), np.float32))


def test_mobilenets_of_other_lengths_are_refused():
    weights = zoo.MobileNetV2((3, 4, 5, 6, 7, 8, 9), 4, 10, expansion=2, classes=5).state_dict()
    more = {
        key.replace("features.17.", "features.19."): value for key, value in weights.items() if "features.17." in key
    }
    with pytest.raises(CheckpointError):
        from_torch(weights | more)


PUBLISHED = {
    # Parameters and multiply-accumulates at 224×224, from torchvision's table of weights; MACs of convolutions and
    # dense layers, in units of 10^9 and rounded as there.
    "resnet18": (lambda: zoo.ResNet(zoo.BasicBlock, (2, 2, 2, 2)), 11_689_512, 1.81),
    "resnet34": (lambda: zoo.ResNet(zoo.BasicBlock, (3, 4, 6, 3)), 21_797_672, 3.66),
    "resnet50": (lambda: zoo.ResNet(zoo.Bottleneck, (3, 4, 6, 3)), 25_557_032, 4.09),
    "resnet101": (lambda: zoo.ResNet(zoo.Bottleneck, (3, 4, 23, 3)), 44_549_160, 7.80),
    "resnext50_32x4d": (
        lambda: zoo.ResNet(zoo.Bottleneck, (3, 4, 6, 3), groups=32, base_width=4), 25_028_904, 4.23
    ),
    "wide_resnet50_2": (lambda: zoo.ResNet(zoo.Bottleneck, (3, 4, 6, 3), base_width=128), 68_883_240, 11.40),
    "mobilenet_v2": (zoo.MobileNetV2, 3_504_872, 0.30),
    "vit_small_patch16_224": (zoo.VisionTransformer, 22_050_664, 4.60),
    "vgg16_bn": (lambda: zoo.VGG((2, 2, 3, 3, 3)), 138_365_992, 15.47),
}  # fmt: skip


def zeros_like_state(make):
    """A state dict of that network's shapes that takes no memory to make."""
    with torch.device("meta"):
        return {key: np.broadcast_to(np.float32(0), value.shape) for key, value in make().state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_costs(name):
    make, params, gigamacs = PUBLISHED[name]
    apply, variables, info = from_torch(zeros_like_state(make))
    assert info.layout in ("torchvision", "timm")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    cost = count_cost(trace_graph(apply)(shapes, jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)))
    assert cost.params == params
    assert cost.macs / 1e9 == pytest.approx(gigamacs, abs=0.006)
