"""Groups of whole networks against truth drawn by hand: who writes and who reads every channel."""

import jax
import jax.numpy as jnp
import pytest

from ehap_jax.graph import channel_groups, trace_graph
from ehap_jax.models import VGG, PreResNet, ResNet, WideResNet, eval_apply, make_model
from tests.pruning.test_architectures import MODELS, images

P, S = "params", "batch_stats"


def found(model, x, coupling="group"):
    apply = eval_apply(model) if hasattr(model, "num_classes") else model.apply
    with jax.numpy_dtype_promotion("standard"):  # Flax's average pool divides floats by integers
        graph = trace_graph(apply)(jax.eval_shape(model.init, jax.random.key(0), x), x)
    return {frozenset((p, a, i) for (p, a), i in g.slices.items()) for g in channel_groups(graph, coupling=coupling)}


def channels(count, *members):
    """``count`` groups; a member is (path, axis) or (path, axis, function of the channel to indices)."""
    return {
        frozenset((path, axis, (where[0](c) if where else (c,))) for path, axis, *where in members)
        for c in range(count)
    }


def norm(name):
    return ((f"{P}/{name}/scale", 0), (f"{P}/{name}/bias", 0), (f"{S}/{name}/mean", 0), (f"{S}/{name}/var", 0))


def inner(width, first, bn, second):
    """A channel between two convolutions of a block."""
    return channels(width, (f"{P}/{first}/kernel", 3), *norm(bn), (f"{P}/{second}/kernel", 2))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def resnet_inner(widths):
    truth = set()
    for stage, width in enumerate(widths, start=1):
        block = f"layer{stage}_0"
        truth |= inner(width, f"{block}/conv1", f"{block}/bn1", f"{block}/conv2")
    return truth


@pytest.mark.parametrize("post_activation_wrn", [False, True])
def test_resnet_b(post_activation_wrn):
    """Projections start a new stream: one stream per stage (and one more for a stem of another width)."""
    widths = (16, 32, 64) if post_activation_wrn else (4, 6, 8)
    model = make_model("ehap-wrn10-1", 3) if post_activation_wrn else ResNet(8, 3, shortcut="B", widths=widths)
    truth = resnet_inner(widths)
    stream = [(f"{P}/conv1/kernel", 3), *norm("bn1"), (f"{P}/layer1_0/conv1/kernel", 2)]
    for stage, width in enumerate(widths, start=1):
        block, after = f"layer{stage}_0", f"layer{stage + 1}_0"
        stream += [(f"{P}/{block}/conv2/kernel", 3), *norm(f"{block}/bn2")]
        if stage > 1:
            stream += [(f"{P}/{block}/downsample_conv/kernel", 3), *norm(f"{block}/downsample_bn")]
        if stage < 3:
            stream += [(f"{P}/{after}/conv1/kernel", 2), (f"{P}/{after}/downsample_conv/kernel", 2)]
        else:
            stream += [(f"{P}/linear/kernel", 0)]
        truth |= channels(width, *stream)
        stream = []
    assert found(model, shape(1, 8, 8, 3)) == truth


def test_resnet_b_under_union_coupling():
    """Every writer of a stream is a group of its own; what reads the stream follows, and is in no group."""
    model, widths = ResNet(8, 3, shortcut="B", widths=(4, 6, 8)), (4, 6, 8)
    truth = resnet_inner(widths)
    truth |= channels(4, (f"{P}/conv1/kernel", 3), *norm("bn1"), (f"{P}/layer1_0/conv1/kernel", 2))
    for stage, width in enumerate(widths, start=1):
        block = f"layer{stage}_0"
        truth |= channels(width, (f"{P}/{block}/conv2/kernel", 3), *norm(f"{block}/bn2"))
        if stage > 1:
            truth |= channels(width, (f"{P}/{block}/downsample_conv/kernel", 3), *norm(f"{block}/downsample_bn"))
    assert found(model, shape(1, 8, 8, 3), "union") == truth


def test_resnet_a():
    """Padding shifts the stream: channel c of 4 is c + 1 of 6 and c + 2 of 8; what is padded has fewer writers."""
    truth = resnet_inner((4, 6, 8))
    for c in range(-2, 6):
        members = [(f"{P}/layer3_0/conv2/kernel", 3, (c + 2,)), (f"{P}/linear/kernel", 0, (c + 2,))]
        members += [(path, axis, (c + 2,)) for path, axis in norm("layer3_0/bn2")]
        if 0 <= c + 1 < 6:
            members += [(path, axis, (c + 1,)) for path, axis in norm("layer2_0/bn2")]
            members += [(f"{P}/layer2_0/conv2/kernel", 3, (c + 1,)), (f"{P}/layer3_0/conv1/kernel", 2, (c + 1,))]
        if 0 <= c < 4:
            members += [(path, axis, (c,)) for name in ("bn1", "layer1_0/bn2") for path, axis in norm(name)]
            members += [(f"{P}/{name}/kernel", 3, (c,)) for name in ("conv1", "layer1_0/conv2")]
            members += [(f"{P}/{name}/conv1/kernel", 2, (c,)) for name in ("layer1_0", "layer2_0")]
        truth.add(frozenset(members))
    assert found(ResNet(8, 3, shortcut="A", widths=(4, 6, 8)), shape(1, 8, 8, 3)) == truth


def test_preactivation_bottlenecks():
    """Norms stand before the convolutions that read the stream; projections read it raw."""
    widths, expansion = (2, 3, 4), 2
    truth, stream = set(), [(f"{P}/conv1/kernel", 3)]
    for stage, width in enumerate(widths, start=1):
        block = f"layer{stage}_0"
        truth |= inner(width, f"{block}/conv1", f"{block}/bn2", f"{block}/conv2")
        truth |= inner(width, f"{block}/conv2", f"{block}/bn3", f"{block}/conv3")
        stream += [*norm(f"{block}/bn1"), (f"{P}/{block}/conv1/kernel", 2), (f"{P}/{block}/downsample_conv/kernel", 2)]
        truth |= channels(5 if stage == 1 else widths[stage - 2] * expansion, *stream)
        stream = [(f"{P}/{block}/{name}/kernel", 3) for name in ("conv3", "downsample_conv")]
    truth |= channels(widths[-1] * expansion, *stream, *norm("bn"), (f"{P}/linear/kernel", 0))
    model = PreResNet(11, 3, stem=5, widths=widths, expansion=expansion)
    assert found(model, shape(1, 8, 8, 3)) == truth


def test_preactivation_wide_resnet():
    truth, stream = set(), [(f"{P}/conv1/kernel", 3)]
    for stage, width in enumerate((16, 32, 64), start=1):
        block = f"layer{stage}_0"
        truth |= inner(width, f"{block}/conv1", f"{block}/bn2", f"{block}/conv2")
        stream += [*norm(f"{block}/bn1"), (f"{P}/{block}/conv1/kernel", 2)]
        if stage > 1:
            truth |= channels(width // 2, *stream, (f"{P}/{block}/downsample_conv/kernel", 2))
            stream = [(f"{P}/{block}/downsample_conv/kernel", 3)]
        stream += [(f"{P}/{block}/conv2/kernel", 3)]
    truth |= channels(64, *stream, *norm("bn1"), (f"{P}/linear/kernel", 0))
    assert found(WideResNet(10, 1, 3), shape(1, 8, 8, 3)) == truth


def test_vgg():
    widths = [2, 3, 4, 4, 3, 3, 5, 5]  # VGG-11: 1, 1, 2, 2, 2 convolutions per stage
    truth = set()
    for number, width in enumerate(widths, start=1):
        last = number == len(widths)
        reader = (f"{P}/fc1/kernel", 0, lambda c: (c, c + 5)) if last else (f"{P}/conv{number + 1}/kernel", 2)
        truth |= channels(width, (f"{P}/conv{number}/kernel", 3), *norm(f"bn{number}"), reader)
    truth |= channels(6, (f"{P}/fc1/kernel", 1), (f"{P}/fc1/bias", 0), (f"{P}/linear/kernel", 0))
    model = VGG(11, 3, widths=(2, 3, 4, 3, 5), hidden=(6,))
    assert found(model, shape(1, 64, 32, 3)) == truth, "2x1 pixels reach the dense layer"


def test_mobilenet():
    """Expansion, depthwise convolution and both norms go with the expanded channel."""
    truth = set()
    for block in range(2):
        conv, bn = 1 + 3 * block, 1 + 3 * block
        truth |= channels(
            6,
            (f"{P}/Conv_{conv}/kernel", 3),
            *norm(f"BatchNorm_{bn}"),
            (f"{P}/Conv_{conv + 1}/kernel", 3),
            *norm(f"BatchNorm_{bn + 1}"),
            (f"{P}/Conv_{conv + 2}/kernel", 2),
        )
    stream = [(f"{P}/Conv_0/kernel", 3), *norm("BatchNorm_0"), (f"{P}/Conv_1/kernel", 2), (f"{P}/Conv_3/kernel", 3)]
    truth |= channels(4, *stream, *norm("BatchNorm_3"), (f"{P}/Conv_4/kernel", 2))
    truth |= channels(5, (f"{P}/Conv_6/kernel", 3), *norm("BatchNorm_6"), (f"{P}/Dense_0/kernel", 0))
    assert found(MODELS["mobilenet"], images(1)) == truth


def test_densenet():
    """Every layer reads, at an offset, what all before it wrote."""
    truth, starts = set(), [(0, 4, 0), (4, 3, 1), (7, 3, 2), (10, 3, 3)]
    for offset, width, number in starts:
        at = lambda c, o=offset: (c + o,)  # noqa: E731
        members = [(f"{P}/Conv_{number}/kernel", 3)]
        for later in range(number, 3):
            members += [(path, axis, at) for path, axis in norm(f"BatchNorm_{later}")]
            members += [(f"{P}/Conv_{later + 1}/kernel", 2, at)]
        truth |= channels(width, *members, (f"{P}/Conv_4/kernel", 2, at))
    truth |= channels(5, (f"{P}/Conv_4/kernel", 3), (f"{P}/Dense_0/kernel", 0))
    assert found(MODELS["densenet"], images(1)) == truth
