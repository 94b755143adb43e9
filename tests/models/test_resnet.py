"""The CIFAR ResNet: sizes and names, shortcuts against PyTorch, dtypes, and the pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ehap_jax.models import ResNet, eval_apply, init_variables, make_model, train_apply
from ehap_jax.models.resnet import parameter_free_shortcut

X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def shapes(model, image_shape=(32, 32, 3)):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape))))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module", params=["A", "B"])
def small(request):
    model = ResNet(depth=8, num_classes=5, shortcut=request.param, widths=(4, 8, 16))
    # Random everywhere, statistics and affine parameters too, so that a swap of any two shows.
    generator = np.random.default_rng(2)

    def draw(leaf):
        if leaf.ndim == 1:
            return jnp.asarray(generator.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(generator.normal(size=leaf.shape) * np.sqrt(2 / leaf.size * leaf.shape[-1]), leaf.dtype)

    return model, jax.tree.map(draw, dict(shapes(model, (8, 8, 3))))


@pytest.mark.parametrize(
    ("depth", "shortcut", "millions"),
    [
        (20, "A", 0.27),
        (32, "A", 0.46),
        (44, "A", 0.66),
        (56, "A", 0.85),
        (110, "A", 1.7),
        (32, "B", 0.467),
        (56, "B", 0.856),
    ],
)
def test_published_parameter_counts(depth, shortcut, millions):
    digits = len(str(millions).split(".")[1])
    params = shapes(make_model(f"resnet{depth}", 10, shortcut=shortcut))["params"]
    assert round(count(params) / 1e6, digits) == millions


def test_parameter_paths_are_those_a_pytorch_user_expects():
    leaves = jax.tree_util.tree_leaves_with_path(shapes(ResNet(depth=8, num_classes=10, shortcut="B")))
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    assert found["params/conv1/kernel"] == (3, 3, 3, 16)
    assert found["params/layer2_0/conv1/kernel"] == (3, 3, 16, 32)
    assert found["params/layer2_0/downsample_conv/kernel"] == (1, 1, 16, 32)
    assert found["params/layer3_0/downsample_bn/scale"] == (64,)
    assert found["batch_stats/layer1_0/bn2/var"] == (16,)
    assert found["params/linear/kernel"] == (64, 10)
    assert found["params/linear/bias"] == (10,)
    assert not any("conv" in path and path.endswith("bias") for path in found)


def test_parameter_free_shortcut_is_akamasters():
    shortcut = parameter_free_shortcut(jnp.asarray(X), 7, 2)
    want = np.zeros((4, 4, 4, 7), np.float32)
    want[..., 2:5] = X[:, ::2, ::2]
    np.testing.assert_array_equal(shortcut, want)
    with pytest.raises(ValueError, match="cannot narrow 3 channels to 2"):
        parameter_free_shortcut(jnp.asarray(X), 2, 1)


def torch_forward(variables, x, shortcut, train):
    """The same network written with torch.nn.functional, from the same arrays."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    params, stats = jax.tree.map(lambda a: torch.tensor(np.asarray(a)), (variables["params"], variables["batch_stats"]))

    def conv(p, x, stride=1):
        kernel = p["kernel"].permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(p, s, x):
        return functional.batch_norm(x, s["mean"], s["var"], p["scale"], p["bias"], training=train, eps=1e-5)

    y = functional.relu(norm(params["bn1"], stats["bn1"], conv(params["conv1"], torch.tensor(x).permute(0, 3, 1, 2))))
    for index, stride in ((1, 1), (2, 2), (3, 2)):
        p, s = params[f"layer{index}_0"], stats[f"layer{index}_0"]
        z = functional.relu(norm(p["bn1"], s["bn1"], conv(p["conv1"], y, stride)))
        z = norm(p["bn2"], s["bn2"], conv(p["conv2"], z))
        if stride == 2 and shortcut == "A":
            y = functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, z.shape[1] // 4, z.shape[1] // 4))
        elif stride == 2:
            y = norm(p["downsample_bn"], s["downsample_bn"], conv(p["downsample_conv"], y, 2))
        y = functional.relu(z + y)
    y = y.mean((2, 3)) @ params["linear"]["kernel"] + params["linear"]["bias"]
    return y.numpy()


@pytest.mark.parametrize("train", [False, True])
def test_logits_equal_pytorchs(small, train):
    model, variables = small
    got = train_apply(model)(variables, X)[0] if train else eval_apply(model)(variables, X)
    want = torch_forward(variables, X, model.shortcut, train)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_train_mode_moves_the_running_statistics_by_a_tenth(small):
    model, variables = small
    _, state = train_apply(model)(variables, X)
    kernel = np.asarray(variables["params"]["conv1"]["kernel"])
    y = jax.lax.conv_general_dilated(X, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    want = 0.9 * variables["batch_stats"]["bn1"]["mean"] + 0.1 * jnp.mean(y, axis=(0, 1, 2))
    np.testing.assert_allclose(state["batch_stats"]["bn1"]["mean"], want, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(state["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_compute_keeps_parameters_and_head_in_float32(small, dtype):
    model, variables = small
    half = model.clone(dtype=dtype)
    logits, state = jax.eval_shape(train_apply(half), variables, X)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    convolutions = [
        e for e in jax.make_jaxpr(eval_apply(half))(variables, X).eqns if e.primitive.name == "conv_general_dilated"
    ]
    assert len(convolutions) == (7 if model.shortcut == "A" else 9)
    assert {v.aval.dtype for e in convolutions for v in e.invars} == {jnp.dtype(dtype)}
    want = eval_apply(model)(variables, X)
    # Nine layers of rounding to 8 bits; each adds at most about half a unit of 2**-8 relative to the largest logit.
    np.testing.assert_allclose(eval_apply(half)(variables, X), want, atol=9 * 2**-8 * float(jnp.abs(want).max()))


class OneLayer(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Conv(2, (3, 3))(x))


@pytest.mark.slow
def test_init_variables_is_the_models_own_init():
    got = init_variables(OneLayer(), jax.random.key(5), (4, 4, 1))
    want = OneLayer().init(jax.random.key(5), jnp.zeros((1, 4, 4, 1)))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_initial_kernels_are_he_normal():
    # Only this kernel is computed; the rest of the initialisation is dead code to the compiler.
    def init(key):
        variables = ResNet(depth=8, num_classes=10).init(key, jnp.zeros((1, 8, 8, 1)))
        return variables["params"]["layer3_0"]["conv2"]["kernel"]

    kernel = jax.jit(init)(jax.random.key(0))
    variance = 2 / (9 * 64)
    # The sample variance of n normals has relative standard deviation sqrt(2/n); 5 of them.
    assert abs(float(jnp.var(kernel)) / variance - 1) < 5 * np.sqrt(2 / kernel.size)
    assert float(jnp.abs(kernel).max()) > 3 * np.sqrt(variance)  # normal, not cut off at two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, r"6n \+ 2"),
        ({"depth": 2}, r"6n \+ 2"),
        ({"depth": 20, "shortcut": "C"}, "'A'.*'B'"),
        ({"depth": 20, "widths": (16, 32)}, "three positive"),
    ],
)
def test_bad_options_are_errors_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet(num_classes=10, **arguments)


def test_unknown_model_names_those_known():
    with pytest.raises(ValueError, match=r"unknown model 'resnext29'.*resnet<6n\+2>"):
        make_model("resnext29", 10)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        make_model("resnet20", 0)
    with pytest.raises(TypeError, match="depht"):
        make_model("resnet20", 10, depht=3)
