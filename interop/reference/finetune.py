"""Fine-tuning in PyTorch as EHAP does it, of shrunk networks and of masked ones.

SGD with Nesterov momentum, weight decay in the gradient, and a cosine from the peak rate to zero, one update per batch
(EHAP, arXiv 2306.07030, section 4). A masked network keeps its pruned norms at zero: their scale and bias are
multiplied by the mask after every update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from interop.reference.union import Kept, norm_after

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise ImportError("interop.reference needs PyTorch: pip install 'ehap-jax[torch]'") from error


def finetune(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    total_steps: int,
    learning_rate: float = 0.0512,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    kept: Kept | None = None,
) -> list[float]:
    """Train a network on, in train mode, in place; it is left in the mode it was in.

    Args:
        batches: (images (N, C, H, W) normalised, labels (N,)), at most `total_steps` of them.
        total_steps: updates until the rate is zero.
        kept: of a masked network (`mask_union`), what its convolutions keep; None for any other.

    Returns:
        The loss before each update.

    Raises:
        ValueError: more batches than steps. FloatingPointError: a loss that is not finite.
    """
    masks = _masks(model, kept or {})
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    losses: list[float] = []
    before = model.training
    model.train()
    for step, (images, labels) in enumerate(batches):
        if step >= total_steps:
            raise ValueError(f"there are more batches than total_steps ({total_steps})")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))
        # Not channels last: with AVX2 alone, PyTorch 2.13's gradient of strided 1×1 kernels of fewer than 8 channels is
        # then wrong, and writes beyond its memory.
        loss = F.cross_entropy(model(images.contiguous()), labels)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of update {step} is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in masks:
                parameter.mul_(mask)
        losses.append(loss.item())
    model.train(before)
    return losses


def _masks(model: nn.Module, kept: Kept) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The scale and bias of every norm behind a pruned convolution, and 1 where a channel is kept."""
    found = []
    for name, channels in kept.items():
        norm: Any = model.get_submodule(norm_after(name))
        mask = torch.zeros_like(norm.weight)
        mask[channels] = 1
        found += [(norm.weight, mask), (norm.bias, mask)]
    return found
