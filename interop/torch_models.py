"""Plain PyTorch residual networks that load what `to_torch` writes, strictly.

Widths are read from the tensors, so dense, masked and shrunk networks are the same class. Where a residual add joins
tensors that do not hold the same channels (a zero-padded shortcut, or a network pruned under union coupling), two
integer buffers of the block say where each operand's channels lie in the sum:

    sum = zeros(channels);  sum[branch_index] += branch;  sum[residual_index] += residual

A block without those buffers adds its operands directly, padding option A's shortcut with as many zero channels below
as above. Keys are akamaster's: `conv1.weight`, `bn1.*`, `layer1.0.conv1.weight`, …, `linear.*`, and
`layer2.0.shortcut.0.weight` / `layer2.0.shortcut.1.*` for projection shortcuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interop.layouts import INDEX_BUFFERS, CheckpointError
from interop.spec import BlockSpec, ResNetSpec, read_spec

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise ImportError("interop.torch_models needs PyTorch: pip install 'ehap-jax[torch]'") from error


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), the sum by index where the spec says so."""

    branch_index: torch.Tensor
    residual_index: torch.Tensor

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = nn.Conv2d(spec.inputs, spec.inner, 3, spec.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.inner)
        self.conv2 = nn.Conv2d(spec.inner, spec.branch, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(spec.branch)
        self.shortcut = nn.Sequential()
        if spec.shortcut is not None:
            self.shortcut.append(nn.Conv2d(spec.inputs, spec.shortcut, 1, spec.stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(spec.shortcut))
        if spec.indexed:
            residual = spec.inputs if spec.shortcut is None else spec.shortcut
            self.register_buffer("branch_index", torch.arange(spec.branch))
            self.register_buffer("residual_index", torch.arange(residual))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        residual = self.shortcut(x)
        if self.spec.shortcut is None and self.spec.stride > 1:
            residual = residual[:, :, :: self.spec.stride, :: self.spec.stride]
        if self.spec.indexed:
            total = branch.new_zeros(branch.shape[0], self.spec.outputs, *branch.shape[2:])
            total = total.index_add(1, self.branch_index, branch)
            return F.relu(total.index_add(1, self.residual_index, residual))
        pad = (self.spec.branch - residual.shape[1]) // 2
        if pad:
            residual = F.pad(residual, (0, 0, 0, 0, pad, pad))
        return F.relu(branch + residual)


class ResNet(nn.Module):
    """A CIFAR-style residual network of any widths: 3×3 stem, stages of basic blocks, mean pooling, classifier.

    Input: float images, (N, channels, H, W). Output: logits, (N, num_classes).
    """

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = nn.Conv2d(spec.image_channels, spec.stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.stem)
        for number, stage in enumerate(spec.blocks, start=1):
            self.add_module(f"layer{number}", nn.Sequential(*[BasicBlock(block) for block in stage]))
        self.linear = nn.Linear(spec.blocks[-1][-1].outputs, spec.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, len(self.spec.blocks) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.linear(x.mean(dim=(2, 3)))


def cifar_resnet(
    depth: int = 20,
    *,
    widths: tuple[int, ...] = (16, 32, 64),
    shortcut: str = "A",
    num_classes: int = 10,
    image_channels: int = 3,
) -> ResNet:
    """A dense CIFAR ResNet of depth 6n + 2 (He et al. 2016, section 4.2), initialised by PyTorch's defaults.

    Raises:
        ValueError: a depth that is not 2 · stages · n + 2, an unknown shortcut, or widths option A cannot pad.

    Example:
        >>> tuple(cifar_resnet(8, widths=(4, 8, 16))(torch.zeros(2, 3, 8, 8)).shape)
        (2, 10)
    """
    per_block = 2 * len(widths)
    if depth < per_block + 2 or (depth - 2) % per_block:
        raise ValueError(f"depth must be {per_block}n + 2 for {len(widths)} stages, got {depth}")
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
    blocks = []
    inputs = widths[0]
    for index, width in enumerate(widths):
        stage = []
        for block in range((depth - 2) // per_block):
            stride = 2 if block == 0 and index > 0 else 1
            project = shortcut == "B" and (stride > 1 or inputs != width)
            if shortcut == "A" and (width < inputs or (width - inputs) % 2):
                raise ValueError(f"shortcut A pads evenly on both sides; it cannot join {inputs} to {width} channels")
            stage.append(BlockSpec(inputs, width, width, width, stride, width if project else None))
            inputs = width
        blocks.append(tuple(stage))
    return ResNet(ResNetSpec(widths[0], tuple(blocks), num_classes, image_channels))


def load(state_dict: Mapping[str, Any]) -> ResNet:
    """The network of a state dict with akamaster's names, loaded strictly and set to eval mode.

    Raises:
        CheckpointError: tensors that are missing or do not fit each other.
        RuntimeError: keys the network has no place for (PyTorch's strict loading).

    Example:
        >>> net = cifar_resnet(8, widths=(4, 8, 16))
        >>> load(net.state_dict()).spec == net.spec
        True
    """
    module = ResNet(read_spec({key: tuple(value.shape) for key, value in state_dict.items()}))
    dtypes = {value.dtype for value in state_dict.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        module.to(dtypes.pop())
    module.load_state_dict(state_dict, strict=True)
    for name, block in module.named_modules():
        if isinstance(block, BasicBlock) and block.spec.indexed:
            for buffer in INDEX_BUFFERS:
                index = getattr(block, buffer)
                if index.unique().numel() != index.numel() or index.min() < 0 or index.max() >= block.spec.outputs:
                    raise CheckpointError(f"{name}.{buffer}: expected distinct positions below {block.spec.outputs}")
    return module.eval()
