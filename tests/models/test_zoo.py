"""Every network of the papers: published parameters and MACs, forward against PyTorch, names, bad options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.models import PreResNet, ResNet, WideResNet, eval_apply, known_models, make_model, train_apply

F32 = jnp.float32


def shapes(model, image_shape=(32, 32, 3)):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape))))


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)["params"]))


@pytest.mark.parametrize(
    ("name", "options", "millions", "digits"),
    [
        ("hap-resnet32", {}, 7.43, 2),
        ("ehap-wrn28-8", {}, 23.36, 2),
        ("wrn28-10", {}, 36.5, 1),  # arXiv 1605.07146, table 4
        ("wrn40-4", {}, 8.9, 1),  # the same
        ("preresnet164", {}, 1.7, 1),  # arXiv 1603.05027, table 4 (ResNet-164)
        ("vgg16", {}, 15.25, 2),
        ("vgg16", {"conv_bias": True}, 15.25, 2),
        ("vgg19", {"hidden": ()}, 20.04, 2),  # arXiv 1708.06519, table 1, as are the next
        ("preresnet164", {}, 1.70, 2),
    ],
)
def test_published_parameter_counts(name, options, millions, digits):
    assert round(count(make_model(name, 10, **options)) / 1e6, digits) == millions


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("vgg19", {"hidden": ()}, 20.08),  # arXiv 1708.06519, table 1, CIFAR-100
        ("preresnet164", {}, 1.73),  # the same
    ],
)
def test_published_parameter_counts_for_100_classes(name, options, millions):
    assert round(count(make_model(name, 100, **options)) / 1e6, 2) == millions


@pytest.mark.parametrize("name", ["resnet110", "preresnet29", "hap-preresnet29", "vgg19", "wrn28-8"])
def test_90_more_classes_are_90_more_rows_of_the_head(name):
    ten, hundred = (shapes(make_model(name, n))["params"] for n in (10, 100))
    features = ten["linear"]["kernel"].shape[0]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (ten, hundred)]
    assert sizes[1] - sizes[0] == 90 * (features + 1)


@pytest.mark.parametrize(
    ("name", "options", "mega_macs", "digits"),
    [
        ("resnet32", {"shortcut": "B"}, 69.1, 1),
        ("resnet56", {"shortcut": "B"}, 125.7, 1),
        ("ehap-wrn28-8", {}, 3360, -1),
        ("hap-resnet32", {}, 1100, -1),
        ("vgg16", {}, 313.7, 1),
    ],
)
def test_published_multiply_accumulates(name, options, mega_macs, digits):
    model = make_model(name, 10, **options)
    graph = trace_graph(eval_apply(model))(shapes(model), jax.ShapeDtypeStruct((1, 32, 32, 3), F32))
    assert round(count_cost(graph).macs / 1e6, digits) == mega_macs


def test_ehaps_and_the_true_wide_resnet_differ():
    ehap, true = make_model("ehap-wrn28-8", 10), make_model("wrn28-8", 10)
    assert isinstance(ehap, ResNet) and isinstance(true, WideResNet)
    assert (count(ehap), count(true)) == (23_356_634, 23_354_842)


@pytest.mark.parametrize(
    ("name", "options", "image_shape"),
    [
        ("preresnet11", {"stem": 4, "widths": (2, 3, 4)}, (8, 8, 1)),
        ("hap-preresnet11", {"stem": 4, "widths": (2, 3, 4)}, (8, 8, 1)),
        ("wrn10-1", {}, (8, 8, 1)),
        ("ehap-wrn10-1", {}, (8, 8, 1)),
        ("vgg11", {"widths": (2, 2, 3, 3, 4), "hidden": (5,)}, (32, 32, 1)),
        ("vgg19", {"widths": (2, 2, 3, 3, 4), "hidden": ()}, (64, 32, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_any_class_count_channels_and_dtype_in_both_modes(name, options, image_shape, dtype):
    model = make_model(name, 7, dtype=dtype, **options)
    x = jax.ShapeDtypeStruct((2, *image_shape), F32)
    variables = shapes(model, image_shape)
    logits = jax.eval_shape(eval_apply(model), variables, x)
    assert logits.shape == (2, 7) and logits.dtype == F32
    logits, state = jax.eval_shape(train_apply(model), variables, x)
    assert logits.shape == (2, 7)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), dict(state)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), {"batch_stats": variables["batch_stats"]}
    )


# ---- against PyTorch, from the same arrays --------------------------------------------------------------------------


def random_variables(model, image_shape, seed=0):
    generator = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim == 1:
            return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (generator.normal(size=leaf.shape) * np.sqrt(2 / leaf.size * leaf.shape[-1])).astype(np.float32)

    return jax.tree.map(draw, dict(shapes(model, image_shape)))


class Torch:
    """Layers of torch.nn.functional by the names of a Linen module; NCHW inside."""

    def __init__(self, variables):
        torch = pytest.importorskip("torch")
        self.torch, self.f = torch, torch.nn.functional
        self.params, self.stats = (
            jax.tree.map(lambda a: torch.tensor(np.asarray(a)), variables[name]) for name in ("params", "batch_stats")
        )

    def conv(self, path, x, stride=1):
        p = self.leaf(self.params, path)
        kernel = p["kernel"].permute(3, 2, 0, 1)
        return self.f.conv2d(x, kernel, p.get("bias"), stride=stride, padding=kernel.shape[-1] // 2)

    def norm_relu(self, path, x):
        p, s = self.leaf(self.params, path), self.leaf(self.stats, path)
        return self.f.relu(self.f.batch_norm(x, s["mean"], s["var"], p["scale"], p["bias"], eps=1e-5))

    def dense(self, path, x):
        p = self.leaf(self.params, path)
        return x @ p["kernel"] + p["bias"]

    @staticmethod
    def leaf(tree, path):
        for part in path.split("/"):
            tree = tree[part]
        return tree


def torch_preresnet(t, x, stages=3):
    y = t.conv("conv1", x)
    for stage in range(1, stages + 1):
        block, stride = f"layer{stage}_0", 1 if stage == 1 else 2
        z = t.conv(f"{block}/conv1", t.norm_relu(f"{block}/bn1", y))
        z = t.conv(f"{block}/conv2", t.norm_relu(f"{block}/bn2", z), stride)
        z = t.conv(f"{block}/conv3", t.norm_relu(f"{block}/bn3", z))
        y = z + t.conv(f"{block}/downsample_conv", y, stride)
    return t.dense("linear", t.norm_relu("bn", y).mean((2, 3)))


def torch_wideresnet(t, x):
    y = t.conv("conv1", x)
    for stage in (1, 2, 3):
        block, stride = f"layer{stage}_0", 1 if stage == 1 else 2
        a = t.norm_relu(f"{block}/bn1", y)
        z = t.conv(f"{block}/conv2", t.norm_relu(f"{block}/bn2", t.conv(f"{block}/conv1", a, stride)))
        y = z + (t.conv(f"{block}/downsample_conv", a, stride) if stage > 1 else y)
    return t.dense("linear", t.norm_relu("bn1", y).mean((2, 3)))


def torch_vgg(t, x):
    number = 0
    for repeats in (1, 1, 2, 2, 2):
        for _ in range(repeats):
            number += 1
            x = t.norm_relu(f"bn{number}", t.conv(f"conv{number}", x))
        x = t.f.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    return t.dense("linear", t.f.relu(t.dense("fc1", x)))


@pytest.mark.parametrize(
    ("name", "options", "image_shape", "reference"),
    [
        ("preresnet11", {"stem": 4, "widths": (2, 3, 4)}, (8, 8, 3), torch_preresnet),
        ("wrn10-1", {}, (8, 8, 3), torch_wideresnet),
        ("vgg11", {"widths": (2, 2, 3, 3, 4), "hidden": (5,), "conv_bias": True}, (64, 32, 3), torch_vgg),
    ],
)
def test_logits_equal_pytorchs(name, options, image_shape, reference):
    model = make_model(name, 5, **options)
    variables = random_variables(model, image_shape)
    x = np.random.default_rng(1).normal(size=(2, *image_shape)).astype(np.float32)
    torch = Torch(variables)
    want = reference(torch, torch.torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    got = jax.jit(eval_apply(model))(jax.tree.map(jnp.asarray, variables), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("preresnet30", {}, r"9n \+ 2"),
        ("preresnet29", {"widths": (1,)}, "three positive"),
        ("wrn26-8", {}, r"6n \+ 4"),
        ("wrn28-0", {}, "widen must be at least 1"),
        ("ehap-wrn26-8", {}, r"6n \+ 4"),
        ("ehap-wrn28-0", {}, "widen must be at least 1"),
        ("vgg17", {}, "depth 11, 13, 16, 19"),
        ("vgg16", {"widths": (1, 2)}, "five positive"),
    ],
)
def test_bad_sizes_are_errors_before_any_work(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, 10, **options)


def test_vgg_refuses_images_it_would_shrink_to_nothing():
    with pytest.raises(ValueError, match=r"32x32 pixels at least, got \(8, 8\)"):
        shapes(make_model("vgg11", 10), (8, 8, 1))


def test_every_family_is_listed():
    names = " ".join(known_models())
    for name in ("resnet20", "hap-resnet32", "preresnet164", "hap-preresnet29", "wrn28-8", "ehap-wrn28-8", "vgg<11"):
        assert name in names
    hap = make_model("hap-preresnet29", 10)
    assert isinstance(hap, PreResNet) and hap.widths == (64, 128, 256) and hap.expansion == 1


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("renset20", "resnet20"), ("vg16", "vgg16"), ("hapresnet32", "hap-resnet32"), ("wnr28-10", "wrn28-10")],
)
def test_a_misspelt_name_is_told_its_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown model {name!r}; did you mean {nearest!r}"):
        make_model(name, 10)
