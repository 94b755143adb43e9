"""masked == shrunk on networks nobody wrote rules for, over random plans and both couplings."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from ehap_jax.graph import channel_groups, trace_graph
from ehap_jax.models import WideResNet
from ehap_jax.pruning import allocate, magnitude_scores, shrink, shrink_variables
from tests.pruning.invariant import assert_all_plans, assert_invariant, jit, normal, random_plan, randomise
from tests.pruning.networks import conv

conv3 = partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
conv1 = partial(nn.Conv, kernel_size=(1, 1), use_bias=False)


@pytest.fixture(autouse=True)
def flax_promotes():
    """Some Flax layers mix integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class PreActivationResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = conv3(4)(x)
        for width, stride in ((4, 1), (6, 2)):
            y = nn.relu(norm()(x))
            short = x if stride == 1 else conv1(width, strides=stride)(y)
            y = conv3(width, strides=stride)(y)
            x = short + conv3(width)(nn.relu(norm()(y)))
        return nn.Dense(3)(nn.relu(norm()(x)).mean((1, 2)))


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (4, 6):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if width == 4 else x
        x = nn.avg_pool(x, (2, 2), (1, 1), padding="SAME").reshape(x.shape[0], -1)
        return nn.Dense(3)(nn.relu(nn.Dense(7)(x)))


class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu6(norm()(conv3(4)(x)))
        for width in (4, 5):
            y = nn.relu6(norm()(conv1(6)(x)))
            y = nn.relu6(norm()(conv3(6, feature_group_count=6)(y)))
            y = norm()(conv1(width)(y))
            x = x + y if width == x.shape[-1] else y
        return nn.Dense(3)(x.mean((1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = conv3(4)(x)
        for _ in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = jnp.concatenate([x, conv3(3)(y)], axis=-1)
        x = nn.avg_pool(conv1(5)(nn.relu(x)), (2, 2), (2, 2))
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


class SqueezeAndExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv3(6)(x)
        gate = nn.sigmoid(nn.Dense(6)(nn.silu(nn.Dense(4)(x.mean((1, 2))))))
        x = nn.gelu(x + conv3(6)(x * gate[:, None, None, :]))
        return nn.Dense(3)(x.mean((1, 2)))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=(2, 2))(x).reshape(x.shape[0], -1, 8)
        cls = self.param("cls", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, 8)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm(use_fast_variance=False)(x)[:, 0])


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(4, (3, 3))(x))
        b = nn.relu(nn.Conv(6, (3, 3), strides=(2, 2))(a))
        c = nn.relu(nn.Conv(5, (3, 3), kernel_dilation=(2, 2))(b))
        up = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(c)
        up = jnp.concatenate([up, jax.image.resize(b, (*a.shape[:3], 6), "nearest"), a], axis=-1)
        return nn.Conv(2, (1, 1))(nn.leaky_relu(nn.Conv(4, (3, 3))(up)))


class SharedWeights(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Conv(5, (3, 3))
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        x = nn.relu(shared(nn.relu(shared(x))) + x)
        return nn.Dense(3)(x.mean((1, 2)))


class GroupNormalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=3)(conv3(6)(x)))
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=1)(conv3(5)(x)))
        x = nn.tanh(nn.LayerNorm()(nn.Conv(6, (3, 3), feature_group_count=1)(x)))
        return nn.Dense(3)(x.mean((1, 2)))


MODELS = {
    "wrn": WideResNet(10, 1, 3),  # EHAP's post-activation WRN is the ResNet of test_shrink.py, with another stem
    "preactivation": PreActivationResNet(),
    "vgg": VGG(),
    "mobilenet": MobileNetV2(),
    "densenet": DenseNet(),
    "squeeze-excite": SqueezeAndExcite(),
    "vit": ViT(),
    "unet": UNet(),
    "shared": SharedWeights(),
    "groupnorm": GroupNormalised(),
}
COUPLINGS = dict(zip(MODELS, itertools.cycle(("union", "group"))))
"""The coupling of every network's plan; gates are tried with the other one (tests/graph/test_gates.py)."""
WITH_BATCH_NORM = ["preactivation", "vgg", "mobilenet", "densenet"]


def images(count=2):
    return normal(count, 4, 4, 3)


def prepare(name):
    model = MODELS[name]
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0), images()))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name):
    model, variables = prepare(name)
    assert_all_plans(model.apply, variables, images(), seeds=(0,), couplings=(COUPLINGS[name],))


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_training(name):
    """Logits, new running statistics and the gradient of both, batch statistics in use."""
    model, variables = prepare(name)
    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    graph = trace_graph(model.apply)(variables, images())
    assert_invariant(apply, variables, images(4), plan=random_plan(graph, 1, "union"))


def unit_sizes(name, path, coupling="group"):
    """How many channels of the kernel ``path`` go at once, as the set over its groups."""
    model, variables = prepare(name)
    groups = channel_groups(trace_graph(model.apply)(variables, images()), coupling=coupling)
    return {len(g.producers[path]) for g in groups if path in g.producers}, groups


@pytest.mark.slow
def test_heads_and_mlp_units_of_a_transformer_are_groups():
    sizes, groups = unit_sizes("vit", "params/MultiHeadDotProductAttention_0/query/kernel")
    assert sizes == {1}, "one index of the head axis"
    heads = [g for g in groups if "params/MultiHeadDotProductAttention_0/query/kernel" in g.producers]
    assert len(heads) == 4
    block = "params/MultiHeadDotProductAttention_0"
    assert heads[1].slices[f"{block}/out/kernel", 0] == (1,) and heads[1].slices[f"{block}/value/bias", 0] == (1,)
    mlp = [g for g in groups if "params/Dense_1/kernel" in g.producers]
    assert [g.slices["params/Dense_0/kernel", 0] for g in mlp] == [(c,) for c in range(6)]


def test_normalisation_groups_go_whole():
    assert unit_sizes("groupnorm", "params/Conv_0/kernel")[0] == {2}
    assert unit_sizes("groupnorm", "params/Conv_1/kernel")[0] == {1}


def test_flatten_takes_all_pixels_of_a_channel():
    _, groups = unit_sizes("vgg", "params/Conv_1/kernel")
    last = [g for g in groups if "params/Conv_1/kernel" in g.producers]
    assert last[2].slices["params/Dense_1/kernel", 0] == (2, 8, 14, 20), "2x2 pixels of 6 channels"


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.body = nnx.Conv(5, 5, (3, 3), rngs=rngs)
        self.noise = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        return self.head(nnx.relu(x + self.noise(self.body(x))).mean((1, 2)))


@pytest.mark.slow
def test_nnx_through_split():
    """The state of ``nnx.split``, random keys in it, is a pytree like any other; new statistics come back with it."""
    graphdef, state = nnx.split(NNXNetwork(nnx.Rngs(0)))
    variables = randomise(nnx.to_pure_dict(state))

    def apply(variables, x, train=False):
        pure = nnx.split(nnx.merge(graphdef, state))[1]
        nnx.replace_by_pure_dict(pure, variables)
        model = nnx.merge(graphdef, pure)
        model.train() if train else model.eval()
        y = model(x)
        if not train:
            return y
        return y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    graph = assert_all_plans(apply, variables, images(), seeds=(0,))
    assert {"stem/kernel", "body/kernel"} <= {path for g in channel_groups(graph) for path in g.producers}
    assert_invariant(partial(apply, train=True), variables, images(), plan=random_plan(graph, 2, "union"))


def test_a_plan_serves_an_nnx_state_and_its_pure_dict():
    """The leaves of both have the same names."""
    rngs = nnx.Rngs(0)
    graphdef, state = nnx.split(nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs)))
    apply = lambda state, x: nnx.merge(graphdef, state)(x)  # noqa: E731
    pure, x = nnx.to_pure_dict(state), normal(2, 3)
    graph = trace_graph(apply)(state, x)
    plan = allocate(graph, magnitude_scores(graph, state), channels=0.5)
    small = shrink_variables(state, plan)
    assert jax.tree.map(jnp.shape, shrink_variables(pure, plan)) == jax.tree.map(jnp.shape, nnx.to_pure_dict(small))
    np.testing.assert_array_equal(nnx.merge(graphdef, small)(x), shrink(apply, plan)(small, x))


@pytest.mark.slow
def test_equinox():
    """An Equinox module is a pytree of arrays beside functions; ``partition`` separates them."""
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed: pip install 'ehap-jax[test]'")

    class Network(eqx.Module):
        stem: eqx.nn.Conv2d
        body: eqx.nn.Conv2d
        hidden: eqx.nn.MLP

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.stem = eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0])
            self.body = eqx.nn.Conv2d(6, 6, 3, padding=1, key=keys[1])
            self.hidden = eqx.nn.MLP(6, 3, 5, 1, key=keys[2])

        def __call__(self, x):
            x = jax.nn.relu(self.stem(x))
            return self.hidden(jax.nn.relu(x + self.body(x)).mean((1, 2)))

    module = eqx.filter_eval_shape(Network, jax.random.key(0))
    arrays, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    variables = randomise(arrays)

    def apply(variables, x):
        return jax.vmap(eqx.combine(variables, static))(x)

    graph = assert_all_plans(apply, variables, normal(2, 3, 4, 4), seeds=(0,))
    drawn = {tuple(sorted(g.producers)) for g in channel_groups(graph)}
    assert drawn == {("body/weight", "stem/weight"), ("hidden/layers/0/weight",)}


# ------------------------------------------------------------------------------------------- loops, branches, noise


@pytest.mark.slow
def test_scan_over_stacked_blocks():
    """Stacked residual layers: the stream lives and dies with every layer, the hidden width with the stack."""
    v = {
        "in": normal(3, 6, seed=0),
        "up": 0.4 * normal(4, 6, 5, seed=1),
        "bias": normal(4, 5, seed=2),
        "down": 0.4 * normal(4, 5, 6, seed=3),
        "out": normal(6, 2, seed=4),
    }

    def apply(v, x):
        def layer(h, w):
            up, bias, down = w
            h = h + jax.nn.relu(h @ up + bias[None]) @ down
            return h, h

        h, every = jax.lax.scan(layer, x @ v["in"], (v["up"], v["bias"], v["down"]))
        return h @ v["out"] + every.mean(0) @ v["out"]

    graph = assert_all_plans(apply, v, normal(2, 3, seed=1), seeds=(0, 1))
    drawn = {tuple(sorted(g.slices)) for g in channel_groups(graph)}
    assert drawn == {
        (("down", 2), ("in", 1), ("out", 0), ("up", 1)),
        (("bias", 1), ("down", 1), ("up", 2)),
    }


@pytest.mark.parametrize("kind", ["cond", "while"])
def test_branches_and_unbounded_loops_freeze_what_enters_them(kind):
    v = {n: normal(*s, seed=i) for i, (n, s) in enumerate(SMALL.items())}

    def apply(v, x):
        h = jax.nn.relu(x @ v["a"]) @ v["b"]
        if kind == "cond":
            h = jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, h)
        else:
            h = jax.lax.fori_loop(0, jnp.asarray(x[0, 0] > 0, jnp.int32) + 2, lambda i, h: jnp.sin(h), h)
        return h @ v["c"]

    x = jnp.ones((2, 3))
    graph = trace_graph(apply)(v, x)
    assert {path for g in channel_groups(graph) for path in g.producers} == {"a"}
    if kind == "cond":
        assert_invariant(apply, v, x, plan=random_plan(graph, 0, "group"))


SMALL = {"a": (3, 5), "b": (5, 4), "c": (4, 2)}


@pytest.mark.slow
def test_dropout_draws_the_same_noise_for_the_channels_that_stay():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, *, deterministic=False):
            x = nn.Dropout(0.4)(nn.relu(conv3(6)(x)), deterministic=deterministic)
            x = nn.Dropout(0.4, broadcast_dims=(1, 2))(conv3(5)(x), deterministic=deterministic)
            return nn.Dense(3)(x.mean((1, 2)))

    model = Dropped()
    v = randomise(jax.eval_shape(partial(model.init, deterministic=True), jax.random.key(0), images()))

    def apply(v, x, key):
        return model.apply(v, x, rngs={"dropout": key})

    assert_all_plans(apply, v, images(), jax.random.key(3), seeds=(0,))


@pytest.mark.slow
def test_scatter_gather_and_updates_pass_whole_axes():
    v = {n: normal(*s, seed=i) for i, (n, s) in enumerate(SMALL.items())}

    def apply(v, x):
        h = jax.nn.relu(x @ v["a"])
        h = jnp.zeros((4, 5)).at[jnp.array([1, 3, 1])].add(h)
        h = h[jnp.array([3, 1, 1])]
        h = jax.lax.dynamic_update_slice(jnp.zeros((4, 5)), h, (x.shape[0] - 2, 0))
        h = jax.lax.dynamic_slice(h, (1, 0), (3, 5))
        h = jnp.roll(h, 1, axis=0)[::-1]
        return jnp.where(h > 0.1, h, 0.5 * h) @ v["b"] @ v["c"]

    assert_all_plans(apply, v, normal(3, 3, seed=9), seeds=(0, 1))


@pytest.mark.slow
def test_channels_are_reversed_split_and_padded():
    v = {"a": (3, 6), "b": (4, 3), "c": (5, 2)}
    v = {n: normal(*s, seed=i) for i, (n, s) in enumerate(v.items())}

    def apply(v, x):
        h = jax.nn.relu(x @ v["a"])
        first, second = jnp.split(h[:, ::-1], [4], axis=1)
        y = first @ v["b"]
        z = jnp.pad(second, ((0, 0), (1, 2))) + jnp.pad(h[:, 1::2], ((0, 0), (2, 0)))
        return y @ jnp.ones((3, 2)) + z @ v["c"]

    assert_all_plans(apply, v, normal(3, 3, seed=9), seeds=range(3), keep=0.7)


@pytest.mark.slow
def test_closed_over_arrays_are_sliced_like_parameters():
    scale, kernel = jnp.arange(1.0, 6.0), normal(3, 3, 5, 4, seed=5)
    v = {
        "c": normal(3, 3, 3, 5, seed=0),
        "d": normal(3, 3, 4, 4, seed=1),
        "h": normal(4, 2, seed=2),
    }

    def apply(v, x):
        h = jnp.tanh(conv(x, v["c"])) * scale[None, None, None]
        h = conv(jax.nn.relu(conv(h, kernel)), v["d"])
        return h.mean((1, 2)) @ v["h"]

    assert_all_plans(apply, v, images(), seeds=(0,))


@pytest.mark.slow
def test_a_new_network_needs_one_compilation_per_plan():
    """Shrinking costs tracing time only: under jit the second call with the same shapes traces nothing."""
    model, variables = prepare("groupnorm")
    count = 0

    def apply(v, x):
        nonlocal count
        count += 1
        return model.apply(v, x)

    graph = trace_graph(model.apply)(variables, images())
    plan = random_plan(graph, 0, "group")
    small, v = jit(shrink(apply, plan)), shrink_variables(variables, plan)
    small(v, images())
    once = count
    small(v, images() + 1)
    assert count == once == 1
