"""INT8 quantisation-aware training in PyTorch, HAWQ style, as EHAP uses it (arXiv 2306.07030, section 4.4).

Weights: BatchNorm folded with its running statistics (HAWQ-V3, arXiv 2011.10680), symmetric, one scale per output
channel, integers in [-127, 127]. Activations: asymmetric, one range per tensor, uint8 with an integral zero point; the
range is the first batch's, then `0.99 · old + 0.01 · new`. Rounding is passed straight through, with slope exactly 0
where a value is clipped. A residual branch is rounded before the sum, and so is the mean before the classifier.
"""

from __future__ import annotations

from typing import Any

from interop.torch_models import Block, ResidualNetwork

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise ImportError("interop.reference needs PyTorch: pip install 'ehap-jax[torch]'") from error

DECAY = 0.99


class FakeQuantise(torch.autograd.Function):
    """`(clip(rint(x / scale) + zero, low, high) − zero) · scale`, straight through."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int
    ) -> torch.Tensor:
        q = (x / scale).round() + zero
        ctx.save_for_backward((q >= low) & (q <= high))
        return (q.clamp(low, high) - zero) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return torch.where(kept, gradients[0], 0.0), None, None, None, None


def quantise_weight(weight: torch.Tensor) -> torch.Tensor:
    """A kernel (out, …) rounded to [-127, 127] per output channel; the scale is a constant of the gradient."""
    largest = weight.detach().abs().flatten(1).amax(dim=1)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127).reshape(-1, *[1] * (weight.ndim - 1))
    return FakeQuantise.apply(weight, scale, torch.zeros_like(scale), -127, 127)  # pyright: ignore[reportReturnType]


class Activation(nn.Module):
    """The range of one tensor, and rounding to it."""

    low: torch.Tensor
    high: torch.Tensor
    batches: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point; the range is widened to contain 0."""
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return scale, (-low / scale).round().clamp(0, 255)

    def forward(self, x: torch.Tensor, observe: bool) -> torch.Tensor:
        if observe:
            keep = DECAY if self.batches > 0 else 0.0
            self.low = keep * self.low + (1 - keep) * x.detach().min()
            self.high = keep * self.high + (1 - keep) * x.detach().max()
            self.batches = self.batches + 1
        return FakeQuantise.apply(x, *self.grid(), 0, 255)  # pyright: ignore[reportReturnType]


class QuantisedResNet(nn.Module):
    """A post-activation ResNet of `interop.torch_models`, dense or pruned, in simulated INT8.

    `observe=True` moves the ranges; leave it out once they are frozen. Trained with `torch.optim` like any module: its
    parameters are the float network's, BatchNorm's scale and bias included; the running statistics stay.

    Raises:
        ValueError: another kind of network.
    """

    def __init__(self, model: ResidualNetwork) -> None:
        super().__init__()
        if model.form.name != "resnet":
            raise ValueError("QAT is written for post-activation ResNets")
        self.model = model
        self.ranges = nn.ModuleDict()
        for name in self._sites():
            self.ranges[name.replace(".", "_")] = Activation()

    def _sites(self) -> list[str]:
        names = ["conv1", "mean", "linear"]
        for stage, specs in zip(self.model.stage_names, self.model.spec.blocks, strict=True):
            for number, spec in enumerate(specs):
                block = f"{stage}.{number}"
                names += [f"{block}.conv1", f"{block}.conv2", f"{block}.branch"]
                names += [f"{block}.shortcut"] if spec.shortcut is not None else []
        return names

    def forward(self, x: torch.Tensor, observe: bool = False) -> torch.Tensor:
        def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
            return self.ranges[name.replace(".", "_")](x, observe)

        model = self.model
        x = F.relu(folded(model.conv1, model.bn1, rounded("conv1", x)))
        for stage in model.stage_names:
            for number, block in enumerate(model.get_submodule(stage).children()):
                assert isinstance(block, Block)
                name = f"{stage}.{number}"
                x = rounded(f"{name}.conv1", x)
                y = F.relu(folded(block.conv1, block.bn1, x))
                y = folded(block.conv2, block.bn2, rounded(f"{name}.conv2", y))
                residual = x[:, :, :: block.spec.stride, :: block.spec.stride]
                if block.spec.shortcut is not None:
                    residual = rounded(f"{name}.shortcut", folded(block.shortcut[0], block.shortcut[1], x))
                x = F.relu(block.add(rounded(f"{name}.branch", y), residual))
        x = rounded("linear", rounded("mean", x).mean(dim=(2, 3)))
        return F.linear(x, quantise_weight(model.linear.weight), model.linear.bias)


def folded(conv: Any, norm: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution with the norm behind it folded in and its kernel rounded."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = quantise_weight(conv.weight * scale[:, None, None, None])
    bias = norm.bias - norm.running_mean * scale
    return F.conv2d(x, kernel, bias, conv.stride, conv.padding)
