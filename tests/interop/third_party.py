"""Networks named as public repositories name them, written out module by module; they share nothing with `interop`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, size=3, stride=1, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)


class DownsampleBlock(nn.Module):
    """chenyaofo, HAP, torchvision: `downsample` with its norm inside; EigenDamage: its norm is `bn3`."""

    def __init__(self, inputs, width, stride, eigendamage):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, stride=stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or inputs != width:
            layers = [conv(inputs, width, 1, stride)]
            if eigendamage:
                self.bn3 = nn.BatchNorm2d(width)
            else:
                layers.append(nn.BatchNorm2d(width))
            self.downsample = nn.Sequential(*layers)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        if hasattr(self, "bn3"):
            shortcut = self.bn3(shortcut)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class DownsampleResNet(nn.Module):
    def __init__(self, eigendamage=False, widths=(4, 6, 8)):
        super().__init__()
        self.conv1 = conv(3, widths[0])
        self.stem_norm = "bn" if eigendamage else "bn1"
        self.add_module(self.stem_norm, nn.BatchNorm2d(widths[0]))
        inputs = widths[0]
        for number, width in enumerate(widths, start=1):
            stage = [DownsampleBlock(inputs, width, 1 if number == 1 else 2, eigendamage)]
            stage.append(DownsampleBlock(width, width, 1, eigendamage))
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            inputs = width
        self.head = "linear" if eigendamage else "fc"
        self.add_module(self.head, nn.Linear(widths[-1], 5))

    def forward(self, x):
        x = F.relu(self.get_submodule(self.stem_norm)(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.get_submodule(self.head)(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ResidualFunctionBlock(nn.Module):
    """weiaicunzai's basic block and bottleneck."""

    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        convs = [conv(inputs, width, stride=stride), conv(width, width)]
        if bottleneck:
            convs = [conv(inputs, width // 2, 1), conv(width // 2, width // 2, 3, stride), conv(width // 2, width, 1)]
        layers = [layer for c in convs for layer in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())]
        self.residual_function = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(conv(inputs, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.residual_function(x) + self.shortcut(x))


class ResidualFunctionResNet(nn.Module):
    """weiaicunzai's ResNet-10, or 14 of bottlenecks: four stages, conv2_x to conv5_x."""

    def __init__(self, bottleneck=False, widths=(4, 4, 6, 8)):
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
        inputs = widths[0]
        for number, width in enumerate(widths, start=2):
            block = ResidualFunctionBlock(inputs, width, 1 + (number > 2), bottleneck)
            self.add_module(f"conv{number}_x", nn.Sequential(block))
            inputs = width
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ExpandedBlock(nn.Module):
    """kuangliu's bottleneck."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ExpandedResNet(nn.Module):
    """kuangliu's ResNet of bottlenecks, with one block in each of four stages."""

    def __init__(self, widths=(2, 2, 3, 4)):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        inputs = 4
        for number, width in enumerate(widths, start=1):
            self.add_module(f"layer{number}", nn.Sequential(ExpandedBlock(inputs, width, 1 + (number > 1))))
            inputs = 4 * width
        self.linear = nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ConvBlock(nn.Module):
    def __init__(self, inputs, outputs, size=3, stride=1, activate=True):
        super().__init__()
        self.conv, self.bn, self.activate = conv(inputs, outputs, size, stride), nn.BatchNorm2d(outputs), activate

    def forward(self, x):
        x = self.bn(self.conv(x))
        return F.relu(x) if self.activate else x


class Unit(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.body = nn.Sequential()
        self.body.add_module("conv1", ConvBlock(inputs, width, stride=stride))
        self.body.add_module("conv2", ConvBlock(width, width, activate=False))
        if stride != 1 or inputs != width:
            self.identity_conv = ConvBlock(inputs, width, 1, stride, activate=False)

    def forward(self, x):
        shortcut = self.identity_conv(x) if hasattr(self, "identity_conv") else x
        return F.relu(self.body(x) + shortcut)


class UnitResNet(nn.Module):
    """EHAP's names; with a narrow stem it is EHAP's post-activation wide network."""

    def __init__(self, stem=4, widths=(4, 6, 8)):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("init_block", ConvBlock(3, stem))
        inputs = stem
        for number, width in enumerate(widths, start=1):
            stage = nn.Sequential()
            for unit in (1, 2):
                stage.add_module(f"unit{unit}", Unit(inputs, width, 2 if unit == 1 < number else 1))
                inputs = width
            self.features.add_module(f"stage{number}", stage)
        self.output = nn.Linear(inputs, 5)

    def forward(self, x):
        return self.output(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class IndexedConvBlock(nn.Module):
    """EHAP's convolution after pruning: buffers beside its weight."""

    def __init__(self, outputs, inputs, size, stride, activate):
        super().__init__()
        self.conv, self.bn, self.activate = conv(inputs, outputs, size, stride), nn.BatchNorm2d(outputs), activate
        self.conv.register_buffer("out_indices", torch.zeros(outputs))
        self.conv.register_buffer("in_indices", torch.zeros(inputs))

    def forward(self, x):
        x = self.bn(self.conv(x))
        return F.relu(x) if self.activate else x


class IndexedUnit(nn.Module):
    """Both operands of the sum into one tensor whose channels are the union of theirs, in the order of a Python set."""

    def __init__(self, weights, prefix, stride):
        super().__init__()
        shapes = {key.removeprefix(prefix): value.shape[:2] for key, value in weights.items() if key.startswith(prefix)}
        self.body = nn.Sequential()
        self.body.add_module("conv1", IndexedConvBlock(*shapes["body.conv1.conv.weight"], 3, stride, True))
        self.body.add_module("conv2", IndexedConvBlock(*shapes["body.conv2.conv.weight"], 3, 1, False))
        if "identity_conv.conv.weight" in shapes:
            self.identity_conv = IndexedConvBlock(*shapes["identity_conv.conv.weight"], 1, stride, False)

    def forward(self, x):
        projected = hasattr(self, "identity_conv")
        shortcut = self.identity_conv(x) if projected else x
        labels = self.identity_conv.conv.out_indices if projected else self.body.conv1.conv.in_indices
        ours, theirs = self.body.conv2.conv.out_indices.tolist(), labels.tolist()
        union = list(set(ours + theirs))
        total = x.new_zeros(len(x), len(union), *shortcut.shape[2:])
        total[:, [place for place, label in enumerate(union) if label in theirs]] += shortcut
        total[:, [place for place, label in enumerate(union) if label in ours]] += self.body(x)
        return F.relu(total)


class PrunedUnitResNet(nn.Module):
    """EHAP's pruned network, with the widths of a state dict; three stages."""

    def __init__(self, weights):
        super().__init__()
        self.features = nn.Sequential()
        stem = weights["features.init_block.conv.weight"]
        self.features.add_module("init_block", IndexedConvBlock(*stem.shape[:2], 3, 1, True))
        for number in (1, 2, 3):
            stage, unit = nn.Sequential(), 1
            while f"features.stage{number}.unit{unit}.body.conv1.conv.weight" in weights:
                stride = 2 if unit == 1 < number else 1
                stage.add_module(f"unit{unit}", IndexedUnit(weights, f"features.stage{number}.unit{unit}.", stride))
                unit += 1
            self.features.add_module(f"stage{number}", stage)
        self.output = nn.Linear(*reversed(weights["output.weight"].shape))
        self.output.register_buffer("out_indices", torch.zeros(weights["output.weight"].shape[0]))
        self.output.register_buffer("in_indices", torch.zeros(weights["output.weight"].shape[1]))

    def forward(self, x):
        return self.output(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class ConvShortcutBlock(nn.Module):
    """xternalz's block: the shortcut's convolution reads what the first norm and ReLU leave."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.convShortcut = conv(inputs, width, 1, stride) if inputs != width else None

    def forward(self, x):
        activated = F.relu(self.bn1(x))
        branch = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return branch + (x if self.convShortcut is None else self.convShortcut(activated))


class NetworkBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.layer = nn.Sequential(ConvShortcutBlock(inputs, width, stride), ConvShortcutBlock(width, width, 1))

    def forward(self, x):
        return self.layer(x)


class ConvShortcutWRN(nn.Module):
    """WRN-16-1."""

    def __init__(self, stem=16, widen=1):
        super().__init__()
        a, b, c = (stem * widen * factor for factor in (1, 2, 4))
        self.conv1 = conv(3, stem)
        self.block1, self.block2, self.block3 = NetworkBlock(stem, a, 1), NetworkBlock(a, b, 2), NetworkBlock(b, c, 2)
        self.bn1, self.fc = nn.BatchNorm2d(c), nn.Linear(c, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Select(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.indexes = nn.Parameter(torch.ones(channels))


class SelectBottleneck(nn.Module):
    """HAP's and EigenDamage's bottleneck, with the parameters of a channel selection that nothing reads."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1, self.select, self.conv1 = nn.BatchNorm2d(inputs), Select(inputs), conv(inputs, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), conv(width, width, 1)
        self.downsample = nn.Sequential(conv(inputs, width, 1, stride)) if stride != 1 or inputs != width else None

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        y = self.conv3(F.relu(self.bn3(y)))
        return y + (x if self.downsample is None else self.downsample(x))


class SelectPreResNet(nn.Module):
    """PreResNet-11."""

    def __init__(self, widths=(4, 6, 8)):
        super().__init__()
        self.conv1 = conv(3, widths[0])
        inputs = widths[0]
        for number, width in enumerate(widths, start=1):
            self.add_module(f"layer{number}", nn.Sequential(SelectBottleneck(inputs, width, 1 + (number > 1))))
            inputs = width
        self.bn, self.select, self.fc = nn.BatchNorm2d(inputs), Select(inputs), nn.Linear(inputs, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PreActBlock(nn.Module):
    """weiaicunzai's pre-activation blocks, convolutions with biases; the wide one has a dropout in between."""

    def __init__(self, inputs, width, stride, wide):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            conv(inputs, width, stride=stride, bias=True),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *([nn.Dropout()] if wide else []),
            conv(width, width, bias=True),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            layer = conv(inputs, width, 1, stride, bias=True)
            self.shortcut = nn.Sequential(layer) if wide else layer

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class PreActResNet(nn.Module):
    """weiaicunzai's preactresnet with one block in each of four stages."""

    def __init__(self, widths=(4, 6, 6, 8)):
        super().__init__()
        self.pre = nn.Sequential(conv(3, widths[0], bias=True), nn.BatchNorm2d(widths[0]), nn.ReLU())
        inputs = widths[0]
        for number, width in enumerate(widths, start=1):
            self.add_module(f"stage{number}", nn.Sequential(PreActBlock(inputs, width, 1 + (number > 1), False)))
            inputs = width
        self.linear = nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.pre(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class WideResidual(nn.Module):
    """weiaicunzai's wide ResNet, whose last norm is not followed by a ReLU."""

    def __init__(self, widths=(4, 6, 8)):
        super().__init__()
        self.init_conv = conv(3, 4, bias=True)
        inputs = 4
        for number, width in enumerate(widths, start=2):
            self.add_module(f"conv{number}", nn.Sequential(PreActBlock(inputs, width, 1 + (number > 2), True)))
            inputs = width
        self.bn, self.linear = nn.BatchNorm2d(inputs), nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.bn(self.conv4(self.conv3(self.conv2(self.init_conv(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SequentialVGG(nn.Module):
    """Convolution, norm (or none), ReLU and maximum in one `nn.Sequential`, as everyone writes VGG."""

    def __init__(
        self, features, classifier, counts=(1, 1, 2, 2, 2), widths=(3, 4, 4, 5, 6), bias=True, mean=False, norm=True
    ):
        super().__init__()
        layers, inputs = [], 3
        for stage, (count, width) in enumerate(zip(counts, widths, strict=True), start=1):
            for _ in range(count):
                layers += [conv(inputs, width, bias=bias), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
                inputs = width
            if stage < 5 or not mean:
                layers.append(nn.MaxPool2d(2))
        self.features_name, self.mean = features, mean
        self.add_module(features, nn.Sequential(*layers))
        self.classifier = classifier(inputs)

    def forward(self, x):
        x = self.get_submodule(self.features_name)(x)
        x = F.avg_pool2d(x, 2) if self.mean else x
        return self.classifier(x.flatten(1))


def three_layers(inputs):
    layers = (nn.Linear(inputs, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 5))
    return nn.Sequential(*layers)


def three_layers_one_dropout(inputs):
    return nn.Sequential(nn.Linear(inputs, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))


def one_layer(inputs):
    return nn.Linear(inputs, 5)


class Case(NamedTuple):
    """A network, the layouts that must fit it, its form, depth, the Linen model it is (or none), image size."""

    make: Callable[[], nn.Module]
    layouts: tuple[str, ...]
    form: str
    depth: int
    model: str | None
    size: int = 8


CASES = {
    "resnet with downsample": Case(
        DownsampleResNet, ("chenyaofo", "hap", "torchvision"), "resnet", 14, "ResNet"
    ),
    "eigendamage resnet": Case(lambda: DownsampleResNet(eigendamage=True), ("eigendamage",), "resnet", 14, "ResNet"),
    "weiaicunzai resnet": Case(ResidualFunctionResNet, ("weiaicunzai",), "resnet", 10, None),
    "weiaicunzai bottlenecks": Case(
        lambda: ResidualFunctionResNet(bottleneck=True), ("weiaicunzai",), "bottleneck", 14, None
    ),
    "kuangliu bottlenecks": Case(ExpandedResNet, ("kuangliu", "ehap_jax"), "bottleneck", 14, None),
    "ehap thin resnet": Case(UnitResNet, ("ehap",), "resnet", 14, "ResNet"),
    "ehap wide resnet": Case(lambda: UnitResNet(2, (4, 6, 8)), ("ehap",), "resnet", 16, "ResNet"),
    "xternalz wide resnet": Case(ConvShortcutWRN, ("xternalz",), "wide", 16, "WideResNet"),
    "hap preresnet": Case(SelectPreResNet, ("hap", "eigendamage"), "preresnet", 11, "PreResNet"),
    "weiaicunzai preactresnet": Case(PreActResNet, ("weiaicunzai",), "preact", 10, None),
    "weiaicunzai wideresnet": Case(WideResidual, ("weiaicunzai",), "wide_affine", 10, None),
    "vgg, three dense layers": Case(
        lambda: SequentialVGG("features", three_layers),
        ("chenyaofo", "torchvision", "weiaicunzai"), "vgg11", 11, "VGG", 32,
    ),
    "weiaicunzai vgg, one dropout": Case(
        lambda: SequentialVGG("features", three_layers_one_dropout), ("weiaicunzai_early",), "vgg11", 11, "VGG", 32
    ),
    "kuangliu vgg": Case(lambda: SequentialVGG("features", one_layer), ("kuangliu",), "vgg11", 11, "VGG", 32),
    "eigendamage vgg": Case(
        lambda: SequentialVGG("feature", one_layer, (2, 2, 3, 3, 3), bias=False, mean=True),
        ("hap", "eigendamage"), "vgg16_mean", 16, None, 32,
    ),
    "hap vgg without norms": Case(
        lambda: SequentialVGG("feature", one_layer, (2, 2, 4, 4, 4), mean=True, norm=False),
        ("hap",), "vgg19_mean_plain", 19, None, 32,
    ),
    "torchvision vgg without norms": Case(
        lambda: SequentialVGG("features", three_layers, norm=False), ("torchvision",), "vgg11_plain", 11, None, 32
    ),
}  # fmt: skip
