"""Plain PyTorch networks that load what `to_torch` writes, strictly.

Widths are read from the tensors, so dense, masked and shrunk networks are the same class. Where a residual add joins
tensors that do not hold the same channels (a zero-padded shortcut, or a network pruned under union coupling), two
integer buffers of the block say where each operand's channels lie in the sum:

    sum = zeros(channels);  sum[branch_index] += branch;  sum[residual_index] += residual

A block without those buffers adds its operands directly, padding option A's shortcut with as many zero channels below
as above. Keys are those of `interop.forms`; for CIFAR ResNets akamaster's: `conv1.weight`, `bn1.*`,
`layer1.0.conv1.weight`, …, `linear.*`, and `layer2.0.shortcut.0.weight` / `layer2.0.shortcut.1.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interop.forms import (
    FORMS,
    INDEX_BUFFERS,
    MEAN_VGGS,
    PRERESNET,
    RESNET,
    VGGS,
    WIDE,
    CheckpointError,
    Form,
)
from interop.layouts import recognise
from interop.spec import (
    HEAD_WIDTH,
    BlockSpec,
    InvertedBlock,
    InvertedSpec,
    ResidualSpec,
    Spec,
    VGGSpec,
    ViTSpec,
    read_spec,
)

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise ImportError("interop.torch_models needs PyTorch: pip install 'ehap-jax[torch]'") from error


def add_by_index(branch: torch.Tensor, residual: torch.Tensor, block: Any) -> torch.Tensor:
    """The sum of two operands whose channels lie where the block's buffers say."""
    total = branch.new_zeros(branch.shape[0], block.spec.outputs, *branch.shape[2:])
    return total.index_add(1, block.branch_index, branch).index_add(1, block.residual_index, residual)


class Block(nn.Module):
    """Branch plus shortcut, the sum by index where the spec says so.

    Post-activation: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)). Pre-activation: conv2(relu(bn2(conv1(
    relu(bn1(x)))))) + shortcut(x), with a third convolution in a bottleneck; `projection` reads relu(bn1(x)).
    """

    branch_index: torch.Tensor
    residual_index: torch.Tensor

    def __init__(self, form: Form, spec: BlockSpec, bias: bool = False) -> None:
        super().__init__()
        self.form, self.spec = form, spec
        inputs = spec.inputs
        for number, (size, width) in enumerate(zip(form.kernels, spec.widths, strict=True), start=1):
            stride = spec.stride if number == form.strided + 1 else 1
            groups = spec.groups if number - 1 == form.grouped else 1
            conv = nn.Conv2d(inputs, width, size, stride, padding=size // 2, groups=groups, bias=bias)
            pair = [(f"conv{number}", conv), (f"bn{number}", nn.BatchNorm2d(inputs if form.preactivation else width))]
            for name, layer in reversed(pair) if form.preactivation else pair:
                self.add_module(name, layer)
            inputs = width
        self.shortcut = nn.Sequential()
        self.projection = None
        if spec.shortcut is not None:
            layer = nn.Conv2d(spec.inputs, spec.shortcut, 1, spec.stride, bias=bias)
            if form.has("projection"):
                self.projection = layer
            else:
                self.shortcut.append(layer)
        if spec.shortcut is not None and form.has("shortcut_bn"):
            self.shortcut.append(nn.BatchNorm2d(spec.shortcut))
        if spec.indexed:
            self.register_buffer("branch_index", torch.arange(spec.branch))
            self.register_buffer("residual_index", torch.arange(spec.residual))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch, source = x, x
        for index in range(len(self.form.kernels)):
            conv, norm = self.get_submodule(f"conv{index + 1}"), self.get_submodule(f"bn{index + 1}")
            if self.form.preactivation:
                branch = F.relu(norm(branch))
                source = branch if index == 0 and self.projection is not None else source
                branch = conv(branch)
            else:
                branch = norm(conv(branch))
                branch = F.relu(branch) if index + 1 < len(self.form.kernels) else branch
        residual = self.shortcut(source) if self.projection is None else self.projection(source)
        if self.spec.shortcut is None and self.spec.stride > 1:
            residual = residual[:, :, :: self.spec.stride, :: self.spec.stride]
        total = self.add(branch, residual)
        return total if self.form.preactivation else F.relu(total)

    def add(self, branch: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The residual sum."""
        if self.spec.indexed:
            return add_by_index(branch, residual, self)
        pad = (self.spec.branch - residual.shape[1]) // 2
        return branch + (F.pad(residual, (0, 0, 0, 0, pad, pad)) if pad else residual)


class ResidualNetwork(nn.Module):
    """A residual network of any widths: stem, stages of blocks, mean pooling, classifier.

    Input: float images, (N, channels, H, W). Output: logits, (N, num_classes).
    """

    def __init__(self, spec: ResidualSpec) -> None:
        super().__init__()
        self.spec, self.form = spec, FORMS[spec.form]
        form, last = self.form, spec.blocks[-1][-1].outputs
        size = spec.stem_size
        stride = 2 if size == 7 else 1
        self.conv1 = nn.Conv2d(spec.image_channels, spec.stem, size, stride, size // 2, bias=spec.conv_bias)
        self.bn1 = nn.BatchNorm2d(spec.stem) if form.has("stem_bn") else None
        prefix = form.names.module("add", 0, 0).partition("0")[0]
        self.stage_names = [f"{prefix}{number}" for number in range(1, len(spec.blocks) + 1)]
        for name, stage in zip(self.stage_names, spec.blocks, strict=True):
            self.add_module(name, nn.Sequential(*[Block(form, block, spec.conv_bias) for block in stage]))
        self.bn = nn.BatchNorm2d(last) if form.has("final_bn") or form.has("final_affine") else None
        self.linear = nn.Linear(last, spec.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        if self.bn1 is not None:
            x = F.relu(self.bn1(x))
        if self.spec.stem_size == 7:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        if self.bn is not None:
            x = self.bn(x)
            x = x if self.form.has("final_affine") else F.relu(x)
        return self.linear(x.mean(dim=(2, 3)))


def _norm_layer(inputs: int, width: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, norm and ReLU6."""
    conv = nn.Conv2d(inputs, width, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU6())


class InvertedResidual(nn.Module):
    """A block of MobileNetV2; the sum is by index where the spec says so."""

    branch_index: torch.Tensor
    residual_index: torch.Tensor

    def __init__(self, spec: InvertedBlock) -> None:
        super().__init__()
        self.spec = spec
        self.conv = nn.Sequential(
            _norm_layer(spec.inputs, spec.hidden),
            _norm_layer(spec.hidden, spec.hidden, 3, spec.stride, spec.hidden),
            nn.Conv2d(spec.hidden, spec.branch, 1, bias=False),
            nn.BatchNorm2d(spec.branch),
        )
        if spec.indexed:
            self.register_buffer("branch_index", torch.arange(spec.branch))
            self.register_buffer("residual_index", torch.arange(spec.inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.conv(x)
        if self.spec.indexed:
            return add_by_index(branch, x, self)
        return branch + x if self.spec.residual else branch


class MobileNetV2(nn.Module):
    """A MobileNetV2 of any widths. Input: float images, (N, channels, H, W). Output: logits, (N, num_classes)."""

    def __init__(self, spec: InvertedSpec) -> None:
        super().__init__()
        self.spec = spec
        first = nn.Module()
        first.conv = nn.Sequential(
            _norm_layer(spec.stem, spec.stem, 3, 1, spec.stem),
            nn.Conv2d(spec.stem, spec.first, 1, bias=False),
            nn.BatchNorm2d(spec.first),
        )
        blocks = [InvertedResidual(block) for block in spec.blocks]
        stem = _norm_layer(spec.image_channels, spec.stem, 3, 2)
        self.features = nn.ModuleList([stem, first, *blocks, _norm_layer(spec.blocks[-1].outputs, spec.last)])
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(spec.last, spec.num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem, first, *blocks = self.features
        x = first.get_submodule("conv")(stem(x))
        for block in blocks:
            x = block(x)
        return self.classifier(x.mean(dim=(2, 3)))


class VGG(nn.Module):
    """VGG of any widths, with BatchNorm or without.

    Input: float images, (N, channels, 32, 32), or larger ones whose features the grid divides.
    Output: logits, (N, classes).
    """

    def __init__(self, spec: VGGSpec) -> None:
        super().__init__()
        self.spec, self.form = spec, FORMS[spec.form]
        inputs = spec.image_channels
        for number, width in enumerate(spec.widths, start=1):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, width, 3, padding=1, bias=spec.conv_bias))
            if self.form.has(f"bn{number}"):
                self.add_module(f"bn{number}", nn.BatchNorm2d(width))
            inputs = width
        inputs *= spec.grid**2
        for number, width in enumerate(spec.hidden, start=1):
            self.add_module(f"fc{number}", nn.Linear(inputs, width))
            inputs = width
        self.head = "linear" if self.form.has("linear") else "mean_linear"
        self.add_module(self.head, nn.Linear(inputs, spec.num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = 0
        for stage, count in enumerate(self.form.stages, start=1):
            for _ in range(count):
                number += 1
                x = self.get_submodule(f"conv{number}")(x)
                x = F.relu(self.get_submodule(f"bn{number}")(x) if self.form.has(f"bn{number}") else x)
            if stage < len(self.form.stages) or self.head == "linear":
                x = F.max_pool2d(x, 2)
        x = x.mean(dim=(2, 3)) if self.head == "mean_linear" else F.adaptive_avg_pool2d(x, self.spec.grid).flatten(1)
        for number in range(1, len(self.spec.hidden) + 1):
            x = F.relu(self.get_submodule(f"fc{number}")(x))
        return self.get_submodule(self.head)(x)


class Attention(nn.Module):
    """Self-attention over tokens, (N, T, width) to the same, with heads of 64 channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * HEAD_WIDTH)
        self.proj = nn.Linear(heads * HEAD_WIDTH, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=HEAD_WIDTH**-0.5).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.get_submodule("fc2")(F.gelu(self.mlp.get_submodule("fc1")(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A vision transformer with timm's names. Input: float images of one size, (N, channels, H, H). Output: logits."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.tokens, spec.width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(spec.image_channels, spec.width, spec.patch, spec.patch)
        blocks = [TransformerBlock(spec.width, *widths) for widths in zip(spec.heads, spec.hidden, strict=True)]
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(spec.width, eps=1e-6), nn.Linear(spec.width, spec.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.get_submodule("proj")(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


Network = ResidualNetwork | MobileNetV2 | VisionTransformer | VGG


def build(spec: Spec) -> Network:
    """The network with these widths, initialised by PyTorch's defaults."""
    if isinstance(spec, InvertedSpec):
        return MobileNetV2(spec)
    if isinstance(spec, ViTSpec):
        return VisionTransformer(spec)
    return VGG(spec) if isinstance(spec, VGGSpec) else ResidualNetwork(spec)


def cifar_resnet(
    depth: int = 20,
    *,
    widths: tuple[int, ...] = (16, 32, 64),
    shortcut: str = "A",
    stem: int | None = None,
    num_classes: int = 10,
    image_channels: int = 3,
) -> ResidualNetwork:
    """A dense CIFAR ResNet of depth 6n + 2 (He et al. 2016, section 4.2), initialised by PyTorch's defaults.

    EHAP's wide network is `cifar_resnet(26, widths=(128, 256, 512), shortcut="B", stem=16)`.

    Raises:
        ValueError: a depth that is not 2 · stages · n + 2, an unknown shortcut, or widths option A cannot pad.

    Example:
        >>> tuple(cifar_resnet(8, widths=(4, 8, 16))(torch.zeros(2, 3, 8, 8)).shape)
        (2, 10)
    """
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
    stem = widths[0] if stem is None else stem
    for inputs, width in zip((stem, *widths), widths, strict=False):
        if shortcut == "A" and (width < inputs or (width - inputs) % 2):
            raise ValueError(f"shortcut A pads evenly on both sides; it cannot join {inputs} to {width} channels")
    inner = tuple((width, width) for width in widths)
    return _residual(RESNET, depth, stem, inner, shortcut == "B", num_classes, image_channels)


def wide_resnet(
    depth: int = 28, widen: int = 8, *, stem: int = 16, num_classes: int = 10, image_channels: int = 3
) -> ResidualNetwork:
    """A dense pre-activation wide ResNet of depth 6n + 4 (arXiv 1605.07146), stages of `stem · widen · (1, 2, 4)`.

    Raises:
        ValueError: a depth that is not 6n + 4.

    Example:
        >>> tuple(wide_resnet(10, 2, stem=2)(torch.zeros(2, 3, 8, 8)).shape)
        (2, 10)
    """
    inner = tuple((stem * widen * factor,) * 2 for factor in (1, 2, 4))
    return _residual(WIDE, depth, stem, inner, True, num_classes, image_channels)


def preresnet(
    depth: int = 164,
    *,
    stem: int = 16,
    widths: tuple[int, ...] = (16, 32, 64),
    expansion: int = 4,
    num_classes: int = 10,
    image_channels: int = 3,
) -> ResidualNetwork:
    """A dense pre-activation bottleneck ResNet of depth 9n + 2 (arXiv 1603.05027).

    Raises:
        ValueError: a depth that is not 3 · stages · n + 2.

    Example:
        >>> tuple(preresnet(11, stem=4, widths=(2, 4, 8))(torch.zeros(2, 3, 8, 8)).shape)
        (2, 10)
    """
    inner = tuple((width, width, width * expansion) for width in widths)
    return _residual(PRERESNET, depth, stem, inner, True, num_classes, image_channels)


def vgg(
    depth: int = 16,
    *,
    widths: tuple[int, ...] = (64, 128, 256, 512, 512),
    hidden: tuple[int, ...] = (512, 512),
    conv_bias: bool = False,
    last_pool: str = "max",
    num_classes: int = 10,
    image_channels: int = 3,
) -> VGG:
    """A dense VGG-11/13/16/19 with BatchNorm. last_pool: "max", or "mean" over what the last convolution leaves.

    Raises:
        ValueError: an unknown depth or pool, not five widths, more than two hidden layers, or any before a mean.
    """
    if depth not in VGGS or last_pool not in ("max", "mean"):
        raise ValueError(f"VGG has depth {', '.join(map(str, VGGS))} and last_pool max or mean: {depth}, {last_pool!r}")
    if len(widths) != 5 or len(hidden) > (2 if last_pool == "max" else 0):
        raise ValueError(f"five widths and at most two hidden layers (none before a mean), got {widths}, {hidden}")
    form = (VGGS if last_pool == "max" else MEAN_VGGS)[depth]
    each = tuple(width for width, count in zip(widths, form.stages, strict=True) for _ in range(count))
    return VGG(VGGSpec(form.name, each, tuple(hidden), num_classes, image_channels, conv_bias))


def _residual(
    form: Form,
    depth: int,
    stem: int,
    widths: tuple[tuple[int, ...], ...],
    projected: bool,
    num_classes: int,
    image_channels: int,
) -> ResidualNetwork:
    per_block = len(form.kernels) * len(widths)
    count, rest = divmod(depth - form.extra_depth, per_block)
    if count < 1 or rest:
        raise ValueError(f"depth must be {per_block}n + {form.extra_depth} for {len(widths)} stages, got {depth}")
    blocks, inputs = [], stem
    for index, inner in enumerate(widths):
        stage = []
        for number in range(count):
            stride = 2 if number == 0 and index > 0 else 1
            project = projected and (stride > 1 or inputs != inner[-1])
            stage.append(BlockSpec(inputs, inner, inner[-1], stride, inner[-1] if project else None))
            inputs = inner[-1]
        blocks.append(tuple(stage))
    return ResidualNetwork(ResidualSpec(form.name, stem, tuple(blocks), num_classes, image_channels))


def load(state_dict: Mapping[str, Any]) -> Network:
    """The network of a state dict with the names `to_torch` writes, loaded strictly and set to eval mode.

    Raises:
        CheckpointError: names of another layout (`to_torch(from_torch(…)[1])` renames them), tensors that are missing
            or do not fit each other.

    Example:
        >>> net = cifar_resnet(8, widths=(4, 8, 16))
        >>> load(net.state_dict()).spec == net.spec
        True
    """
    found, _ = recognise(state_dict)
    if found.layout.names is not found.layout.form.names:
        raise CheckpointError(
            f"the names are those of {found.layout.name!r}; rename them with to_torch(from_torch(state_dict)[1])"
        )
    module = build(read_spec(found.layout.form, {key: tuple(value.shape) for key, value in state_dict.items()}))
    dtypes = {value.dtype for value in state_dict.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        module.to(dtypes.pop())
    module.load_state_dict(state_dict, strict=True)
    for name, block in module.named_modules():
        if isinstance(block, Block | InvertedResidual) and block.spec.indexed:
            for buffer in INDEX_BUFFERS:
                index = getattr(block, buffer)
                if index.unique().numel() != index.numel() or index.min() < 0 or index.max() >= block.spec.outputs:
                    raise CheckpointError(f"{name}.{buffer}: expected distinct positions below {block.spec.outputs}")
    return module.eval()
