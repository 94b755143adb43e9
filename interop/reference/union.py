"""Channel pruning with union coupling in PyTorch, as HAP and EHAP do it: every convolution loses its own outputs.

All channels of all convolutions are ranked together by sensitivity and the lowest go (HAP, arXiv 2101.08940, section
3; EHAP, arXiv 2306.07030, section 3). A residual stream keeps the union of what its writers keep, and each operand of
a sum is added at the places of its channels in that union. The released code enumerates the union as
`list(set(...))`; here it is sorted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from interop.spec import BlockSpec, ResidualSpec
from interop.torch_models import Block, ResidualNetwork

try:
    import torch
    from torch import nn
except ImportError as error:
    raise ImportError("interop.reference needs PyTorch: pip install 'ehap-jax[torch]'") from error

Kept = Mapping[str, torch.Tensor]
"""Name of a convolution -> the output channels it keeps, ascending."""


def kept_channels(
    scores: Mapping[str, torch.Tensor], fraction: float, *, max_layer_ratio: float = 0.95
) -> dict[str, torch.Tensor]:
    """The channels that stay when the least sensitive go, all layers ranked together.

    Args:
        scores: name of a convolution -> sensitivity of each of its output channels.
        fraction: of all these channels, the part that is kept, in (0, 1].
        max_layer_ratio: no layer loses more than this share of its channels; its best ones stay.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is what is kept, in (0, 1]; got {fraction}")
    everything = torch.cat(list(scores.values())).double()
    pruned = len(everything) - max(1, round(fraction * len(everything)))
    threshold = everything.sort().values[pruned]
    kept = {}
    for name, values in scores.items():
        best = values.double().argsort(descending=True, stable=True)
        least = max(1, len(values) - int(max_layer_ratio * len(values)))
        count = max(least, int((values.double() >= threshold).sum()))
        kept[name] = best[:count].sort().values
    return kept


def mask_union(model: ResidualNetwork, kept: Kept) -> ResidualNetwork:
    """A copy of full size whose pruned channels contribute exactly zero: their norm's scale and bias are zero."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, channels in kept.items():
            gone = torch.ones(_width(masked, name), dtype=torch.bool)
            gone[channels] = False
            norm: Any = masked.get_submodule(norm_after(name))
            norm.weight[gone] = 0
            norm.bias[gone] = 0
    return masked


def prune_union(model: ResidualNetwork, kept: Kept) -> ResidualNetwork:
    """The smaller network of the same function as `mask_union`, with sums by index where operands differ.

    Args:
        model: a post-activation ResNet of `interop.torch_models` that was not pruned before.
        kept: for every convolution that loses channels, those that stay.

    Raises:
        ValueError: another kind of network, or one that was pruned before.
    """
    if model.form.name != "resnet" or any(isinstance(m, Block) and m.spec.indexed for m in model.modules()):
        raise ValueError("union pruning is written for post-activation ResNets that were not pruned before")

    def stays(name: str) -> torch.Tensor:
        return kept.get(name, torch.arange(_width(model, name)))

    cuts = {"conv1": (stays("conv1"), torch.arange(model.spec.image_channels))}
    stream, places = stays("conv1"), {}
    stages = []
    for stage, specs in zip(model.stage_names, model.spec.blocks, strict=True):
        smaller = []
        for number, spec in enumerate(specs):
            name = f"{stage}.{number}"
            inner, branch = stays(f"{name}.conv1"), stays(f"{name}.conv2")
            cuts |= {f"{name}.conv1": (inner, stream), f"{name}.conv2": (branch, inner)}
            residual = stream + (spec.branch - spec.inputs) // 2
            if spec.shortcut is not None:
                residual = stays(f"{name}.shortcut.0")
                cuts[f"{name}.shortcut.0"] = (residual, stream)
            union = torch.unique(torch.cat([branch, residual]))
            indexed = len(branch) != len(union) or len(residual) != len(union)
            if indexed:
                places[f"{name}.branch_index"] = torch.searchsorted(union, branch)
                places[f"{name}.residual_index"] = torch.searchsorted(union, residual)
            shortcut = None if spec.shortcut is None else len(residual)
            widths = (len(inner), len(branch))
            smaller.append(BlockSpec(len(stream), widths, len(union), spec.stride, shortcut, indexed))
            stream = union
        stages.append(tuple(smaller))
    cuts["linear"] = (torch.arange(model.spec.num_classes), stream)
    spec = ResidualSpec(
        "resnet", len(cuts["conv1"][0]), tuple(stages), model.spec.num_classes, model.spec.image_channels
    )
    pruned = ResidualNetwork(spec).to(model.linear.weight.dtype)
    _copy_cut(model, pruned, cuts)
    pruned.load_state_dict(places, strict=False)
    return pruned.train(model.training)


def norm_after(conv: str) -> str:
    """The name of the norm behind a convolution: "layer1.0.bn2" behind "layer1.0.conv2"."""
    return conv.replace(".shortcut.0", ".shortcut.1").replace("conv", "bn")


def _width(model: nn.Module, conv: str) -> int:
    weight: Any = model.get_submodule(conv).weight
    return weight.shape[0]


def _copy_cut(model: nn.Module, pruned: nn.Module, cuts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for name, (outputs, inputs) in cuts.items():
            full: Any = model.get_submodule(name)
            small: Any = pruned.get_submodule(name)
            small.weight.copy_(full.weight[outputs][:, inputs])
            if name == "linear":
                small.bias.copy_(full.bias)
                continue
            old: Any = model.get_submodule(norm_after(name))
            new: Any = pruned.get_submodule(norm_after(name))
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                getattr(new, leaf).copy_(getattr(old, leaf)[outputs])
            new.num_batches_tracked.copy_(old.num_batches_tracked)
