"""The kinds of networks that go in and out, and what each part is called in PyTorch and in Flax.

A `Form` is one kind of function: which parts it has (roles), what `to_torch` calls each and where `ehap_jax.models`
keeps it, and how they are joined. A role's module name is a template over the stage `{s}` and the block `{b}`. What
other repositories call the same parts is in `interop.layouts`.

Roles of residual networks: stem_conv, stem_bn (and ReLU); conv1, bn1, … in a block; shortcut_conv (reads the block's
input) or projection (reads the activated input of a pre-activation block), shortcut_bn; add (tensors only where a
pruned network adds by index); final_bn (and ReLU) or final_affine (without); linear. Of VGG: conv1, bn1
(not in plain ones), …, fc1, fc2, and linear (reads what a last maximum leaves) or mean_linear (reads the mean over
what the last convolution leaves). Stages are counted from 1, blocks from 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which tensor, what was expected and what was found."""


class Part(NamedTuple):
    """One tensor of the network: role ("conv1", "bn2", …), stage, block (0, 0 outside stages), leaf ("weight", …)."""

    role: str
    stage: int
    block: int
    leaf: str


Kind = Literal["conv", "norm", "layer_norm", "tokens", "dense", "add", "unread"]

INDEX_BUFFERS = ("branch_index", "residual_index")
"""Where the channels of each operand lie in a sum by index."""

KEPT_INDICES = ("in_indices", "out_indices")
"""What EHAP and HAP keep beside a pruned layer: the numbers of its input and output channels."""

LEAVES: Mapping[Kind, tuple[str, ...]] = {
    "conv": ("weight",),
    "norm": ("weight", "bias", "running_mean", "running_var"),
    "layer_norm": ("weight", "bias"),
    "tokens": ("cls_token", "pos_embed"),
    "dense": ("weight", "bias"),
    "add": INDEX_BUFFERS,
    "unread": (),
}
"""The leaves every part of a kind has."""

OTHER_LEAVES: Mapping[Kind, tuple[str, ...]] = {
    "conv": ("bias",),
    "norm": ("num_batches_tracked",),
    "layer_norm": (),
    "tokens": (),
    "dense": (),
    "add": (),
    "unread": ("indexes",),
}
"""The leaves it may have. `UNREAD` are those that no forward pass reads; they are recorded as such."""

UNREAD = ("num_batches_tracked", "indexes")

FLAX_LEAVES: Mapping[Kind, Mapping[tuple[str, str], str]] = {
    "conv": {("params", "kernel"): "weight", ("params", "bias"): "bias"},
    "norm": {
        ("params", "scale"): "weight",
        ("params", "bias"): "bias",
        ("batch_stats", "mean"): "running_mean",
        ("batch_stats", "var"): "running_var",
    },
    "layer_norm": {("params", "scale"): "weight", ("params", "bias"): "bias"},
    "tokens": {("params", "cls_token"): "cls_token", ("params", "pos_embed"): "pos_embed"},
    "dense": {("params", "kernel"): "weight", ("params", "bias"): "bias"},
    "add": {},
    "unread": {},
}


def kind_of(role: str) -> Kind:
    """What a role is: "bn1" is a norm, "projection" a convolution, "fc1" a dense layer."""
    if role == "add" or "select" in role:
        return "add" if role == "add" else "unread"
    if role == "tokens":
        return "tokens"
    if role.endswith("_ln"):
        return "layer_norm"
    if "bn" in role or role == "final_affine":
        return "norm"
    return "conv" if "conv" in role or role == "projection" else "dense"


_NUMBER = re.compile(r"\{[sb]\}|(?<![0-9])(?:0|[1-9][0-9]{0,3})(?![0-9])")


@lru_cache(maxsize=1 << 16)
def without_numbers(name: str) -> tuple[str, tuple[str, ...]]:
    """A module name or template with each number, or slot for one, replaced by "#", and what was replaced.

    Only numbers below 10,000 without leading zeros are replaced, so that a name has one reading and none is huge:
    "layer1.0.conv2" gives ("layer#.#.conv#", ("1", "0", "2")).
    """
    return _NUMBER.sub("#", name), tuple(_NUMBER.findall(name))


@dataclass(frozen=True)
class Names:
    """Module names by role.

    modules: role -> template, e.g. "layer{s}.{b}.conv1".
    first_stage, first_block: the numbers given to the first stage and the first block.
    """

    modules: Mapping[str, str]
    first_stage: int = 1
    first_block: int = 0
    plain: Mapping[str, tuple[str, ...]] = field(init=False, repr=False)
    numbered: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plain: dict[str, tuple[str, ...]] = {}
        numbered: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {}
        for role, template in self.modules.items():
            if "{" in template:
                shape, slots = without_numbers(template)
                numbered[shape] = (*numbered.get(shape, ()), (role, slots))
            else:
                plain[template] = (*plain.get(template, ()), role)
        object.__setattr__(self, "plain", plain)
        object.__setattr__(self, "numbered", numbered)

    def module(self, role: str, stage: int = 0, block: int = 0) -> str:
        """The module name of a role: `module("conv1", 2, 0)` is "layer2.0.conv1" for akamaster."""
        return self.modules[role].format(s=stage + self.first_stage - 1, b=block + self.first_block)

    def key(self, part: Part) -> str:
        """The state-dict key of a part."""
        module = self.module(part.role, part.stage, part.block)
        return f"{module}.{part.leaf}" if module else part.leaf

    def places(self, module: str) -> list[tuple[str, int, int]]:
        """Every (role, stage, block) that a module name may stand for."""
        found = [(role, 0, 0) for role in self.plain.get(module, ())]
        shape, numbers = without_numbers(module)
        for role, slots in self.numbered.get(shape, ()):
            given = {"{s}": self.first_stage - 1, "{b}": self.first_block}
            for slot, number in zip(slots, numbers, strict=True):
                if slot in given:
                    given[slot] = int(number)
                elif slot != number:
                    break
            else:
                stage, block = given["{s}"] - self.first_stage + 1, given["{b}"] - self.first_block
                if stage >= ("{s}" in slots) and block >= 0:
                    found.append((role, stage, block))
        return found

    def part(self, key: str, more_leaves: tuple[str, ...] = ()) -> Part | None:
        """The part a state-dict key names, or None. more_leaves: what convolutions and dense layers may have, too."""
        module, _, leaf = key.rpartition(".")
        for place in self.places(module):
            kind = kind_of(place[0])
            known = (*LEAVES[kind], *OTHER_LEAVES[kind], *(more_leaves if kind in ("conv", "dense") else ()))
            if leaf in known:
                return Part(*place, leaf)
        return None


@dataclass(frozen=True)
class Form:
    """One kind of network.

    names: what `to_torch` calls the parts; its order is the order of the modules.
    flax: module paths in Flax variables; those of `ehap_jax.models` where it has such a network.
    kind: residual, vgg, inverted (sums of narrow tensors, MobileNetV2) or vit.
    preactivation: norm and ReLU before each convolution of a block, not after.
    kernels: sizes of a block's convolutions. strided: which of them has the block's stride.
    grouped: which of them may be grouped. stems: sizes of the first convolution; one of 7×7 has stride 2 and is
        followed by a 3×3 maximum of stride 2 (networks for ImageNet).
    sometimes: groups of roles that are there together or not at all; every other role but `add` is always there.
    mark: a role of which there must be at least one.
    extra_depth: what is added to the convolutions in the blocks (of VGG: in all) to give the depth in a network's name.
    """

    name: str
    names: Names
    flax: Names
    kind: Literal["residual", "vgg", "inverted", "vit"] = "residual"
    preactivation: bool = False
    kernels: tuple[int, ...] = (3, 3)
    strided: int = 0
    grouped: int | None = None
    stems: tuple[int, ...] = (3,)
    sometimes: tuple[tuple[str, ...], ...] = ()
    mark: str | None = None
    extra_depth: int = 2

    @property
    def stages(self) -> tuple[int, ...]:
        """Convolutions in each stage of a VGG."""
        return VGG_STAGES[sum(role.startswith("conv") for role in self.names.modules) + self.extra_depth]

    @property
    def shortcut(self) -> str:
        """The role of the 1×1 convolution on the shortcut."""
        return "projection" if "projection" in self.names.modules else "shortcut_conv"

    def has(self, role: str) -> bool:
        """Whether networks of this form may have such a part."""
        return role in self.names.modules

    def in_block(self, role: str) -> bool:
        """Whether the role is one of every block."""
        return "{b}" in self.names.modules[role]

    def path(self, part: Part) -> str:
        """The variable path of a part: Part("conv1", 1, 0, "weight") is "params/layer1_0/conv1/kernel"."""
        for (collection, name), leaf in FLAX_LEAVES[kind_of(part.role)].items():
            if leaf == part.leaf:
                return f"{collection}/{self.flax.module(part.role, part.stage, part.block)}/{name}"
        raise KeyError(f"{part} has no place among Flax variables")

    def part_at(self, path: str) -> Part | None:
        """The part a Flax variable path names, or None."""
        collection, _, rest = path.partition("/")
        module, _, name = rest.rpartition("/")
        for place in self.flax.places(module):
            leaf = FLAX_LEAVES[kind_of(place[0])].get((collection, name))
            if leaf is not None:
                return Part(*place, leaf)
        return None

    def key_at(self, path: str) -> str:
        """The name `to_torch` gives to the variable at a path. KeyError where the form has none there."""
        part = self.part_at(path)
        if part is None:
            raise KeyError(f"{path} is no part of a network of the form {self.name!r}")
        return self.names.key(part)

    def path_of(self, key: str) -> str:
        """The inverse of `key_at`."""
        part = self.names.part(key)
        if part is None:
            raise KeyError(f"{key} is no part of a network of the form {self.name!r}")
        return self.path(part)

    def missing(self, parts: Iterable[Part], at_most: int = 1000) -> list[Part]:
        """What a network with these parts would need, too; the first of it, where it is more than `at_most`.

        Every block up to the last one seen has its convolutions and norms, a group of `sometimes` is whole, and the
        parts outside blocks are there.
        """
        present = set(parts)
        seen = {(p.role, p.stage, p.block) for p in present if kind_of(p.role) not in ("add", "unread")}
        blocks: dict[int, set[int]] = {}
        for role, stage, block in seen:
            if self.in_block(role):
                blocks.setdefault(stage, set()).add(block)
        # As many as were seen, and those: a number in a file is never counted up to.
        staged = any("{s}" in template for template in self.names.modules.values())
        stages = sorted({*range(1, max(len(blocks), 1) + 1), *blocks}) if staged else [0]
        places = [(s, b) for s in stages for b in sorted({*range(len(blocks.get(s, ())) or 1), *blocks.get(s, ())})]
        grouped = {role for group in self.sometimes for role in group}

        def wanted() -> Iterator[tuple[str, int, int]]:
            for role in self.names.modules:
                if kind_of(role) not in ("add", "unread"):
                    groups = [group for group in self.sometimes if role in group]
                    for place in places if self.in_block(role) else [(0, 0)]:
                        if role not in grouped or any((other, *place) in seen for group in groups for other in group):
                            yield (role, *place)
            if self.mark is not None and not any(role == self.mark for role, _, _ in seen):
                yield (self.mark, 1, 0)

        lacking = (Part(*place, leaf) for place in wanted() for leaf in LEAVES[kind_of(place[0])])
        return list(islice((part for part in lacking if part not in present), at_most))

    def order(self, part: Part) -> tuple[int, int, int, int]:
        """Sorts parts in the order of the modules."""
        roles = list(self.names.modules)
        first_inside = min((i for i, role in enumerate(roles) if self.in_block(role)), default=0)
        role = roles.index(part.role)
        stage = part.stage if self.in_block(part.role) or role < first_inside else 1_000_000
        leaves = (*LEAVES["norm"], *LEAVES["tokens"], *INDEX_BUFFERS, *KEPT_INDICES)
        return (stage, part.block, role, leaves.index(part.leaf))


def block_names(prefix: str, convs: int, shortcut: Mapping[str, str], *, norm_first: bool = False) -> dict[str, str]:
    """conv1, bn1, … (or bn1, conv1, …) and the shortcut of a block, under a prefix."""
    roles = [
        role for i in range(1, convs + 1) for role in ((f"bn{i}", f"conv{i}") if norm_first else (f"conv{i}", f"bn{i}"))
    ]
    return {role: f"{prefix}{role}" for role in roles} | {role: prefix + name for role, name in shortcut.items()}


_TORCH, _FLAX = "layer{s}.{b}.", "layer{s}_{b}/"
_ADD = {"add": "layer{s}.{b}"}

RESNET = Form(
    name="resnet",
    names=Names(
        {"stem_conv": "conv1", "stem_bn": "bn1"}
        | block_names(_TORCH, 2, {"shortcut_conv": "shortcut.0", "shortcut_bn": "shortcut.1"})
        | _ADD
        | {"linear": "linear"}
    ),
    flax=Names(
        {"stem_conv": "conv1", "stem_bn": "bn1", "linear": "linear"}
        | block_names(_FLAX, 2, {"shortcut_conv": "downsample_conv", "shortcut_bn": "downsample_bn"})
    ),
    stems=(3, 7),
    sometimes=(("shortcut_conv", "shortcut_bn"),),
)
"""Post-activation basic blocks: CIFAR ResNets with shortcut A or B, EHAP's wide network, ResNet-18 and 34."""

BOTTLENECK = Form(
    name="bottleneck",
    names=Names(
        {"stem_conv": "conv1", "stem_bn": "bn1"}
        | block_names(_TORCH, 3, {"shortcut_conv": "shortcut.0", "shortcut_bn": "shortcut.1"})
        | _ADD
        | {"linear": "linear"}
    ),
    flax=Names(
        {"stem_conv": "conv1", "stem_bn": "bn1", "linear": "linear"}
        | block_names(_FLAX, 3, {"shortcut_conv": "downsample_conv", "shortcut_bn": "downsample_bn"})
    ),
    kernels=(1, 3, 1),
    strided=1,
    grouped=1,
    stems=(3, 7),
    sometimes=(("shortcut_conv", "shortcut_bn"),),
)
"""Post-activation bottlenecks, strided in the middle: ResNet-50 and up, wide ones, ResNeXt (arXiv 1611.05431)."""

WIDE = Form(
    name="wide",
    names=Names(
        {"stem_conv": "conv1"}
        | block_names(_TORCH, 2, {"projection": "projection"}, norm_first=True)
        | _ADD
        | {"final_bn": "bn", "linear": "linear"}
    ),
    flax=Names(
        {"stem_conv": "conv1", "final_bn": "bn1", "linear": "linear"}
        | block_names(_FLAX, 2, {"projection": "downsample_conv"}, norm_first=True)
    ),
    preactivation=True,
    sometimes=(("projection",),),
    mark="projection",
    extra_depth=4,
)
"""Pre-activation wide ResNets (arXiv 1605.07146), whose 1×1 convolutions read the activated input."""

PRERESNET = Form(
    name="preresnet",
    names=Names(
        {"stem_conv": "conv1"}
        | block_names(_TORCH, 3, {"shortcut_conv": "shortcut.0"}, norm_first=True)
        | _ADD
        | {"final_bn": "bn", "linear": "linear"}
    ),
    flax=Names(
        {"stem_conv": "conv1", "final_bn": "bn", "linear": "linear"}
        | block_names(_FLAX, 3, {"shortcut_conv": "downsample_conv"}, norm_first=True)
    ),
    preactivation=True,
    kernels=(1, 3, 1),
    strided=1,
    sometimes=(("shortcut_conv",),),
)
"""Pre-activation bottlenecks (arXiv 1603.05027), in the form the pruning papers use."""

PREACT = Form(
    name="preact",
    names=Names(
        {"stem_conv": "conv1", "stem_bn": "bn1"}
        | block_names("stage{s}.{b}.", 2, {"shortcut_conv": "shortcut.0"}, norm_first=True)
        | {"add": "stage{s}.{b}", "linear": "linear"}
    ),
    flax=Names(
        {"stem_conv": "conv1", "stem_bn": "bn1", "linear": "linear"}
        | block_names("stage{s}_{b}/", 2, {"shortcut_conv": "downsample_conv"}, norm_first=True)
    ),
    preactivation=True,
    sometimes=(("shortcut_conv",),),
)
"""Pre-activation basic blocks after a stem with norm and ReLU, with no norm before the classifier (weiaicunzai)."""

WIDE_AFFINE = Form(
    name="wide_affine",
    names=Names(
        {"stem_conv": "conv1"}
        | block_names("wide{s}.{b}.", 2, {"shortcut_conv": "shortcut.0"}, norm_first=True)
        | {"add": "wide{s}.{b}", "final_affine": "bn", "linear": "linear"}
    ),
    flax=Names(
        {"stem_conv": "conv1", "final_affine": "bn", "linear": "linear"}
        | block_names("wide{s}_{b}/", 2, {"shortcut_conv": "downsample_conv"}, norm_first=True)
    ),
    preactivation=True,
    sometimes=(("shortcut_conv",),),
    extra_depth=4,
)
"""weiaicunzai's wide ResNet: its shortcuts read the block's input, and its last norm is not followed by a ReLU."""

VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions in each stage by depth; a stage ends in a 2×2 maximum (the last one of the mean form does not)."""


def _vgg_form(depth: int, head: str, norm: bool) -> Form:
    numbers = range(1, sum(VGG_STAGES[depth]) + 1)
    roles = [role for i in numbers for role in ((f"conv{i}", f"bn{i}") if norm else (f"conv{i}",))]
    hidden = ["fc1", "fc2"] if head == "linear" else []
    plain = Names({role: role for role in (*roles, *hidden, head)})
    return Form(
        name=f"vgg{depth}{'' if head == 'linear' else '_mean'}{'' if norm else '_plain'}",
        names=plain,
        flax=plain,
        kind="vgg",
        sometimes=(("fc1",), ("fc2",)),
        extra_depth=3,
    )


VGGS = {depth: _vgg_form(depth, "linear", True) for depth in VGG_STAGES}
"""VGG with BatchNorm and five maxima, and zero, one or two hidden dense layers."""

MEAN_VGGS = {depth: _vgg_form(depth, "mean_linear", True) for depth in VGG_STAGES}
"""VGG with BatchNorm and four maxima; the mean over what is left goes into one dense layer."""

PLAIN_VGGS = {depth: _vgg_form(depth, "linear", False) for depth in VGG_STAGES}
PLAIN_MEAN_VGGS = {depth: _vgg_form(depth, "mean_linear", False) for depth in VGG_STAGES}
"""The same two without BatchNorm."""


def _inverted_names(prefix: str, layers: Sequence[str], parts: Sequence[str]) -> dict[str, str]:
    """ "expand_conv", "expand_bn" and so on: a convolution and a norm of each layer, under two names in turn."""
    roles = [f"{layer}_{part}" for layer in layers for part in ("conv", "bn")]
    return {role: prefix + name for role, name in zip(roles, parts, strict=True)}


_NARROWING, _INVERTED = ("depthwise", "project"), ("expand", "depthwise", "project")
_FIRST = tuple(f"first_{layer}" for layer in _NARROWING)

MOBILENET = Form(
    name="mobilenetv2",
    names=Names(
        {"stem_conv": "features.0.0", "stem_bn": "features.0.1"}
        | _inverted_names("features.1.conv.", _FIRST, ("0.0", "0.1", "1", "2"))
        | _inverted_names("features.{b}.conv.", _INVERTED, ("0.0", "0.1", "1.0", "1.1", "2", "3"))
        | {"add": "features.{b}", "last_conv": "features.18.0", "last_bn": "features.18.1", "linear": "classifier.1"},
        first_block=2,
    ),
    flax=Names(
        {role: role for role in ("stem_conv", "stem_bn", "last_conv", "last_bn", "linear")}
        | {f"{layer}_{part}": f"block1/{layer[6:]}_{part}" for layer in _FIRST for part in ("conv", "bn")}
        | {f"{layer}_{part}": f"block{{b}}/{layer}_{part}" for layer in _INVERTED for part in ("conv", "bn")},
        first_block=2,
    ),
    kind="inverted",
    extra_depth=5,
)
"""MobileNetV2 (arXiv 1801.04381), named as in torchvision. Its first block does not widen and has its own roles."""

INVERTED_STAGES = ((2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
"""(blocks, stride of the first) of each stage of MobileNetV2 after its first block (its table 2)."""

INVERTED_BLOCKS = tuple((stride if i == 0 else 1, i > 0) for count, stride in INVERTED_STAGES for i in range(count))
"""(stride, whether the input is added to the output) of each of those blocks."""

_VIT_BLOCK = ("attention_ln", "qkv", "attention_out", "mlp_ln", "fc1", "fc2")
_TIMM_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

VIT = Form(
    name="vit",
    names=Names(
        {"tokens": "", "patch_conv": "patch_embed.proj"}
        | {role: f"blocks.{{b}}.{name}" for role, name in zip(_VIT_BLOCK, _TIMM_BLOCK, strict=True)}
        | {"final_ln": "norm", "linear": "head"}
    ),
    flax=Names(
        {role: role for role in ("tokens", "patch_conv", "final_ln", "linear")}
        | {role: f"block{{b}}/{role}" for role in _VIT_BLOCK}
    ),
    kind="vit",
    extra_depth=0,
)
"""Vision transformers (arXiv 2010.11929) with a class token and heads of 64 channels, named as in timm and DeiT."""

_RESIDUAL = (RESNET, BOTTLENECK, WIDE, PRERESNET, PREACT, WIDE_AFFINE)
_VGGS = (VGGS, MEAN_VGGS, PLAIN_VGGS, PLAIN_MEAN_VGGS)
FORMS: Mapping[str, Form] = {
    f.name: f for f in (*_RESIDUAL, MOBILENET, VIT, *(form for forms in _VGGS for form in forms.values()))
}
"""Every form by name."""


def recognise_variables(paths: Iterable[str]) -> Form:
    """The form whose parts Flax variables with these paths are.

    Raises:
        CheckpointError: paths of no known network (how many matched the nearest one, and what did not).
    """
    paths = tuple(paths)
    found: list[tuple[list[str], list[Part], Form]] = []
    for form in FORMS.values():
        parts = [form.part_at(path) for path in paths]
        strange = [path for path, part in zip(paths, parts, strict=True) if part is None]
        found.append((strange, form.missing(part for part in parts if part is not None), form))
    strange, missing, form = min(found, key=lambda each: len(each[0]) + len(each[1]))
    if strange or missing or not paths:
        raise CheckpointError(
            f"these variables are no network that interop knows; the nearest form is {form.name}: "
            f"{len(paths) - len(strange)} paths matched, {len(strange)} did not{listed(strange)}, "
            f"{len(missing)} are missing{listed(missing, form.path)}"
        )
    return form


def listed(items: Sequence[Any], name: Callable[[Any], str] = str, limit: int = 8) -> str:
    """ ": a, b, … and 3 more" for a message; nothing where there are no items."""
    if not items:
        return ""
    rest = "" if len(items) <= limit else f", … and {len(items) - limit} more"
    return ": " + ", ".join(name(item)[:120] for item in items[:limit]) + rest


def to_flax_axes(array: np.ndarray) -> np.ndarray:
    """PyTorch's axes to Flax's: (out, in, h, w) -> (h, w, in, out), (out, in) -> (in, out), others unchanged."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array


def to_torch_axes(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_flax_axes`."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array
