"""How public checkpoints name the parts of one residual network, as tables.

A CIFAR-style residual network has ten roles: the stem's convolution and norm, two convolutions and two norms
per block, the convolution and norm of a projection shortcut, a residual add (it has tensors only where a pruned
network adds by index), and the classifier. A `Layout` gives the module name
of each role as a template over the stage `{s}` and the block `{b}`; everything else (recognition, renaming in both
directions, the list of what was left over) is derived from the table. Adding a layout is adding a table.

Positions are counted the way akamaster's files count them: stages from 1, blocks from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which tensor, what was expected and what was found."""


class Part(NamedTuple):
    """One tensor of the network: role ("conv1", "bn2", …), stage, block (0, 0 outside stages), leaf ("weight", …)."""

    role: str
    stage: int
    block: int
    leaf: str


CONV_LEAVES = ("weight",)
NORM_LEAVES = ("weight", "bias", "running_mean", "running_var")
DENSE_LEAVES = ("weight", "bias")
INDEX_BUFFERS = ("branch_index", "residual_index")
LEAVES: Mapping[str, tuple[str, ...]] = {
    "stem_conv": CONV_LEAVES,
    "stem_bn": NORM_LEAVES,
    "conv1": CONV_LEAVES,
    "bn1": NORM_LEAVES,
    "conv2": CONV_LEAVES,
    "bn2": NORM_LEAVES,
    "shortcut_conv": CONV_LEAVES,
    "shortcut_bn": NORM_LEAVES,
    "linear": DENSE_LEAVES,
    "add": INDEX_BUFFERS,
}
"""The leaves every role has. `num_batches_tracked` is a counter no forward pass reads; it is recorded as such."""

CONVS = ("stem_conv", "conv1", "conv2", "shortcut_conv")
IN_BLOCK = ("conv1", "bn1", "conv2", "bn2", "shortcut_conv", "shortcut_bn", "add")


@dataclass(frozen=True)
class Layout:
    """The module names of one family of checkpoints.

    modules: role -> template, e.g. "layer{s}.{b}.conv1".
    first_stage, first_block: the numbers the family gives to the first stage and the first block.
    index_leaves: extra leaves on convolutions and the classifier that hold kept indices (EHAP's pruned files).
    mean, std: the input normalisation the family trains with, per RGB channel of images in [0, 1].
    source: where the names come from.
    """

    name: str
    modules: Mapping[str, str]
    source: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    first_stage: int = 1
    first_block: int = 0
    index_leaves: tuple[str, ...] = ()
    patterns: tuple[tuple[str, re.Pattern[str]], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        compiled = []
        for role, template in self.modules.items():
            pattern = re.escape(template)
            pattern = pattern.replace(re.escape("{s}"), r"(?P<s>\d+)").replace(re.escape("{b}"), r"(?P<b>\d+)")
            compiled.append((role, re.compile(pattern)))
        object.__setattr__(self, "patterns", tuple(compiled))

    def module(self, role: str, stage: int = 0, block: int = 0) -> str:
        """The module name of a role: `module("conv1", 2, 0)` is "layer2.0.conv1" for akamaster."""
        numbers = {"s": stage + self.first_stage - 1, "b": block + self.first_block}
        return self.modules[role].format(**numbers)

    def key(self, part: Part) -> str:
        """The state-dict key of a part."""
        return f"{self.module(part.role, part.stage, part.block)}.{part.leaf}"

    def part(self, key: str) -> Part | None:
        """The part a state-dict key names, or None where the layout has no such key."""
        module, _, leaf = key.rpartition(".")
        for role, pattern in self.patterns:
            found = pattern.fullmatch(module)
            if found is None:
                continue
            known = leaf in LEAVES[role]
            known |= leaf == "num_batches_tracked" and "bn" in role
            known |= leaf in self.index_leaves and (role in CONVS or role == "linear")
            if not known:
                return None
            groups = found.groupdict()
            stage = int(groups["s"]) - self.first_stage + 1 if "s" in groups else 0
            block = int(groups["b"]) - self.first_block if "b" in groups else 0
            return None if stage < 0 or block < 0 else Part(role, stage, block, leaf)
        return None


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100 = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)

AKAMASTER = Layout(
    name="akamaster",
    source="github.com/akamaster/pytorch_resnet_cifar10",
    mean=_IMAGENET[0],
    std=_IMAGENET[1],
    modules={
        "stem_conv": "conv1",
        "stem_bn": "bn1",
        "conv1": "layer{s}.{b}.conv1",
        "bn1": "layer{s}.{b}.bn1",
        "conv2": "layer{s}.{b}.conv2",
        "bn2": "layer{s}.{b}.bn2",
        "shortcut_conv": "layer{s}.{b}.shortcut.0",
        "shortcut_bn": "layer{s}.{b}.shortcut.1",
        "add": "layer{s}.{b}",
        "linear": "linear",
    },
)

_DOWNSAMPLE = {
    **AKAMASTER.modules,
    "shortcut_conv": "layer{s}.{b}.downsample.0",
    "shortcut_bn": "layer{s}.{b}.downsample.1",
    "linear": "fc",
}
CHENYAOFO = Layout(
    name="chenyaofo",
    source="github.com/chenyaofo/pytorch-cifar-models",
    mean=_CIFAR10[0],
    std=_CIFAR10[1],
    modules=_DOWNSAMPLE,
)
HAP = Layout(
    name="hap",
    source="github.com/yaozhewei/HAP",
    mean=_CIFAR10[0],
    std=_CIFAR10[1],
    modules=_DOWNSAMPLE,
)
TORCHVISION = Layout(
    name="torchvision",
    source="torchvision's names on a CIFAR stem",
    mean=_IMAGENET[0],
    std=_IMAGENET[1],
    modules=_DOWNSAMPLE,
)
EIGENDAMAGE = Layout(
    name="eigendamage",
    source="github.com/alecwangcq/EigenDamage-Pytorch",
    mean=_CIFAR10[0],
    std=_CIFAR10[1],
    modules={
        **AKAMASTER.modules,
        "stem_bn": "bn",
        "shortcut_conv": "layer{s}.{b}.downsample.0",
        "shortcut_bn": "layer{s}.{b}.bn3",
    },
)
WEIAICUNZAI = Layout(
    name="weiaicunzai",
    source="github.com/weiaicunzai/pytorch-cifar100",
    mean=_CIFAR100[0],
    std=_CIFAR100[1],
    first_stage=2,
    modules={
        "stem_conv": "conv1.0",
        "stem_bn": "conv1.1",
        "conv1": "conv{s}_x.{b}.residual_function.0",
        "bn1": "conv{s}_x.{b}.residual_function.1",
        "conv2": "conv{s}_x.{b}.residual_function.3",
        "bn2": "conv{s}_x.{b}.residual_function.4",
        "shortcut_conv": "conv{s}_x.{b}.shortcut.0",
        "shortcut_bn": "conv{s}_x.{b}.shortcut.1",
        "linear": "fc",
    },
)
EHAP = Layout(
    name="ehap",
    source="the code released with arXiv 2306.07030",
    mean=_CIFAR10[0],
    std=_CIFAR10[1],
    first_block=1,
    index_leaves=("in_indices", "out_indices"),
    modules={
        "stem_conv": "features.init_block.conv",
        "stem_bn": "features.init_block.bn",
        "conv1": "features.stage{s}.unit{b}.body.conv1.conv",
        "bn1": "features.stage{s}.unit{b}.body.conv1.bn",
        "conv2": "features.stage{s}.unit{b}.body.conv2.conv",
        "bn2": "features.stage{s}.unit{b}.body.conv2.bn",
        "shortcut_conv": "features.stage{s}.unit{b}.identity_conv.conv",
        "shortcut_bn": "features.stage{s}.unit{b}.identity_conv.bn",
        "linear": "output",
    },
)

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for layout in (AKAMASTER, CHENYAOFO, HAP, TORCHVISION, EIGENDAMAGE, WEIAICUNZAI, EHAP)
}
"""Every known layout by name, in the order in which `recognise` reports them."""


class Match(NamedTuple):
    """A layout laid over a set of keys. Complete when `left_over` and `missing` are empty."""

    layout: Layout
    parts: dict[str, Part]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]


def match(layout: Layout, keys: Iterable[str]) -> Match:
    """Lay one layout over state-dict keys: which key is which part, what is left over, what is missing.

    Missing means: needed by the blocks the keys themselves show to exist (every block up to the last one seen has two
    convolutions and two norms, a projection shortcut has both its parts, stem and classifier are there).
    """
    parts: dict[str, Part] = {}
    left_over = []
    for key in keys:
        part = layout.part(key)
        if part is None:
            left_over.append(key)
        else:
            parts[key] = part
    present = set(parts.values())
    stages = [p.stage for p in present if p.role in IN_BLOCK]
    blocks = {s: max(p.block for p in present if p.role in IN_BLOCK and p.stage == s) + 1 for s in set(stages)}
    wanted: list[tuple[str, int, int]] = [("stem_conv", 0, 0), ("stem_bn", 0, 0)]
    for stage in range(1, max(stages, default=1) + 1):
        for block in range(blocks.get(stage, 1)):
            wanted += [(role, stage, block) for role in ("conv1", "bn1", "conv2", "bn2")]
            if any(p.stage == stage and p.block == block and p.role.startswith("shortcut") for p in present):
                wanted += [("shortcut_conv", stage, block), ("shortcut_bn", stage, block)]
    wanted.append(("linear", 0, 0))
    needed = [Part(role, s, b, leaf) for role, s, b in wanted for leaf in LEAVES[role]]
    missing = tuple(layout.key(part) for part in needed if part not in present)
    return Match(layout, parts, tuple(left_over), missing)


def recognise(keys: Iterable[str], layout: str = "auto") -> tuple[Match, tuple[str, ...]]:
    """Find the layout of a state dict by its names.

    Returns the match and the names of all layouts that read every key as the same part of the same network (the
    names of chenyaofo, HAP and torchvision coincide; the network is the same whichever is meant).

    Raises:
        KeyError: an unknown layout name.
        CheckpointError: no layout fits (lists the best one, what it matched and what was left over), or two layouts
            fit and read the keys differently.

    Example:
        >>> keys = [AKAMASTER.key(Part(r, s, 0, leaf)) for r, s in [("stem_conv", 0), ("stem_bn", 0), ("conv1", 1),
        ...         ("bn1", 1), ("conv2", 1), ("bn2", 1), ("linear", 0)] for leaf in LEAVES[r]]
        >>> recognise(keys)[0].layout.name
        'akamaster'
    """
    keys = tuple(keys)
    if layout != "auto":
        if layout not in LAYOUTS:
            raise KeyError(f"unknown layout {layout!r}; known: auto, {', '.join(LAYOUTS)}")
        found = match(LAYOUTS[layout], keys)
        if found.left_over or found.missing:
            raise CheckpointError(_explain(found, f"the checkpoint does not have the layout {layout!r}"))
        return found, (layout,)
    matches = [match(each, keys) for each in LAYOUTS.values()]
    complete = [m for m in matches if not m.left_over and not m.missing]
    if not complete:
        best = max(matches, key=lambda m: (len(m.parts) - len(m.missing), len(m.parts)))
        raise CheckpointError(_explain(best, "no known layout fits the checkpoint; the nearest is " + best.layout.name))
    if any(m.parts != complete[0].parts for m in complete[1:]):
        names = ", ".join(m.layout.name for m in complete)
        raise CheckpointError(f"the names fit several layouts that differ: {names}. Pass layout=... to choose one.")
    return complete[0], tuple(m.layout.name for m in complete)


def _explain(found: Match, headline: str) -> str:
    lines = [
        headline,
        f"  matched    {len(found.parts)} tensors{_some(tuple(found.parts))}",
        f"  left over  {len(found.left_over)} tensors{_some(found.left_over)}",
        f"  missing    {len(found.missing)} tensors{_some(found.missing)}",
        f"  known layouts: {', '.join(LAYOUTS)}",
    ]
    return "\n".join(lines)


def _some(names: tuple[str, ...], limit: int = 8) -> str:
    if not names:
        return ""
    rest = "" if len(names) <= limit else f", … and {len(names) - limit} more"
    return ": " + ", ".join(names[:limit]) + rest


_FLAX = {
    "stem_conv": "conv1",
    "stem_bn": "bn1",
    "conv1": "layer{s}_{b}/conv1",
    "bn1": "layer{s}_{b}/bn1",
    "conv2": "layer{s}_{b}/conv2",
    "bn2": "layer{s}_{b}/bn2",
    "shortcut_conv": "layer{s}_{b}/downsample_conv",
    "shortcut_bn": "layer{s}_{b}/downsample_bn",
    "linear": "linear",
}
_FLAX_PATTERNS = tuple(
    (role, re.compile(template.replace("{s}", r"(?P<s>\d+)").replace("{b}", r"(?P<b>\d+)")))
    for role, template in _FLAX.items()
)
_FLAX_LEAVES = {
    "conv": {("params", "kernel"): "weight"},
    "bn": {
        ("params", "scale"): "weight",
        ("params", "bias"): "bias",
        ("batch_stats", "mean"): "running_mean",
        ("batch_stats", "var"): "running_var",
    },
    "linear": {("params", "kernel"): "weight", ("params", "bias"): "bias"},
}


def _kind(role: str) -> str:
    return "linear" if role == "linear" else "bn" if "bn" in role else "conv"


def flax_module(role: str, stage: int = 0, block: int = 0) -> str:
    """The module path of a role in `ehap_jax.models`, for example "layer1_0/conv1"."""
    return _FLAX[role].format(s=stage, b=block)


def flax_path(part: Part) -> str:
    """The variable path of a part: Part("conv1", 1, 0, "weight") is "params/layer1_0/conv1/kernel"."""
    for (collection, name), leaf in _FLAX_LEAVES[_kind(part.role)].items():
        if leaf == part.leaf:
            return f"{collection}/{flax_module(part.role, part.stage, part.block)}/{name}"
    raise KeyError(f"{part} has no place among Flax variables")


def flax_part(path: str) -> Part | None:
    """The part a Flax variable path names, or None."""
    collection, _, rest = path.partition("/")
    module, _, name = rest.rpartition("/")
    for role, pattern in _FLAX_PATTERNS:
        found = pattern.fullmatch(module)
        leaf = _FLAX_LEAVES[_kind(role)].get((collection, name))
        if found is not None and leaf is not None:
            groups = found.groupdict()
            return Part(role, int(groups.get("s", 0)), int(groups.get("b", 0)), leaf)
    return None


def to_flax_axes(array: np.ndarray) -> np.ndarray:
    """PyTorch's axes to Flax's: (out, in, h, w) -> (h, w, in, out), (out, in) -> (in, out), others unchanged."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array


def to_torch_axes(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_flax_axes`."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array
