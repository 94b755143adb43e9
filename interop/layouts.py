"""How public repositories name the parts of their networks, as tables over the forms of `interop.forms`.

Recognition, renaming in both directions and the list of what was left over are derived from the tables. Adding a
layout is adding a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from interop.forms import (
    BOTTLENECK,
    FORMS,
    KEPT_INDICES,
    MEAN_VGGS,
    MOBILENET,
    PLAIN_MEAN_VGGS,
    PLAIN_VGGS,
    PREACT,
    PRERESNET,
    RESNET,
    VGGS,
    VIT,
    WIDE,
    WIDE_AFFINE,
    CheckpointError,
    Form,
    Names,
    Part,
    block_names,
    listed,
    without_numbers,
)


@dataclass(frozen=True)
class Layout:
    """The naming of one public repository for one form.

    mean, std: the input normalisation it trains with, per RGB channel of images in [0, 1].
    index_leaves: extra leaves on convolutions and the classifier that hold kept indices: buffers in EHAP's pruned
        files, attributes of HAP's pruned modules.
    large: whether its networks may be for large images, that is, have a 7×7 stem, or dense layers that read a grid.
    padded: whether its code has shortcuts without parameters between different widths.
    source: where the names come from.
    """

    name: str
    form: Form
    names: Names
    source: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    index_leaves: tuple[str, ...] = ()
    padded: bool = True
    large: bool = False


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100 = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)

_DOWNSAMPLE = {"shortcut_conv": "layer{s}.{b}.downsample.0", "shortcut_bn": "layer{s}.{b}.downsample.1", "linear": "fc"}


def _renamed(form: Form, changes: Mapping[str, str]) -> Names:
    """A form's own names with some changed, and without a place for sums by index."""
    return Names({role: name for role, name in {**form.names.modules, **changes}.items() if role != "add"})


def _vgg_names(form: Form, features: str, heads: Mapping[str, str]) -> Names:
    """The numbers that convolution, norm, ReLU and maximum have in one `nn.Sequential`."""
    modules, position, conv = {}, 0, 0
    for count in form.stages:
        for _ in range(count):
            conv += 1
            layers = [role for role in (f"conv{conv}", f"bn{conv}") if form.has(role)]
            modules |= {role: f"{features}.{position + offset}" for offset, role in enumerate(layers)}
            position += len(layers) + 1
        position += 1
    return Names(modules | dict(heads))


_THREE = {"fc1": "classifier.0", "fc2": "classifier.3", "linear": "classifier.6"}
_ONE_DROPOUT = {"fc1": "classifier.0", "fc2": "classifier.3", "linear": "classifier.5"}

AKAMASTER = Layout(
    "akamaster", RESNET, RESNET.names, "github.com/akamaster/pytorch_resnet_cifar10", *_IMAGENET, large=True
)

_CHENYAOFO = ("github.com/chenyaofo/pytorch-cifar-models", *_CIFAR10)
_HAP = ("github.com/yaozhewei/HAP", *_CIFAR10)
_KUANGLIU = ("github.com/kuangliu/pytorch-cifar", *_CIFAR10)
_EIGENDAMAGE = ("github.com/alecwangcq/EigenDamage-Pytorch", *_CIFAR10)
_TORCHVISION = ("torchvision's names on the networks of ehap_jax.models", *_IMAGENET)
_WEIAICUNZAI = ("github.com/weiaicunzai/pytorch-cifar100", *_CIFAR100)
_SELECT = {"select": "layer{s}.{b}.select", "final_select": "select"}

_TABLES = (
    AKAMASTER,
    Layout("chenyaofo", RESNET, _renamed(RESNET, _DOWNSAMPLE), *_CHENYAOFO),
    *(Layout("chenyaofo", form, _vgg_names(form, "features", _THREE), *_CHENYAOFO) for form in VGGS.values()),
    *(
        Layout("hap", form, _renamed(form, _DOWNSAMPLE), *_HAP, index_leaves=KEPT_INDICES, padded=False)
        for form in (RESNET, BOTTLENECK)
    ),
    Layout(
        "hap",
        PRERESNET,
        _renamed(PRERESNET, {"shortcut_conv": "layer{s}.{b}.downsample.0", "linear": "fc", **_SELECT}),
        *_HAP,
        index_leaves=KEPT_INDICES,
        padded=False,
    ),
    *(
        Layout(
            "hap", form, _vgg_names(form, "feature", {"mean_linear": "classifier"}), *_HAP, index_leaves=KEPT_INDICES
        )
        for form in (*MEAN_VGGS.values(), *PLAIN_MEAN_VGGS.values())
    ),
    *(
        Layout("torchvision", form, _renamed(form, _DOWNSAMPLE), *_TORCHVISION, large=True)
        for form in (RESNET, BOTTLENECK)
    ),
    Layout("torchvision", MOBILENET, MOBILENET.names, *_TORCHVISION, large=True),
    Layout("timm", VIT, VIT.names, "github.com/huggingface/pytorch-image-models, and DeiT", *_IMAGENET, large=True),
    Layout(
        "torchvision", WIDE, _renamed(WIDE, {"projection": "layer{s}.{b}.downsample.0", "linear": "fc"}), *_TORCHVISION
    ),
    Layout(
        "torchvision",
        PRERESNET,
        _renamed(PRERESNET, {"shortcut_conv": "layer{s}.{b}.downsample.0", "linear": "fc"}),
        *_TORCHVISION,
    ),
    *(
        Layout("torchvision", form, _vgg_names(form, "features", _THREE), *_TORCHVISION, large=True)
        for form in (*VGGS.values(), *PLAIN_VGGS.values())
    ),
    Layout(
        "eigendamage",
        RESNET,
        _renamed(
            RESNET,
            {
                "stem_bn": "bn",
                "shortcut_conv": "layer{s}.{b}.downsample.0",
                "shortcut_bn": "layer{s}.{b}.bn3",
            },
        ),
        *_EIGENDAMAGE,
    ),
    Layout(
        "eigendamage",
        PRERESNET,
        _renamed(PRERESNET, {"shortcut_conv": "layer{s}.{b}.downsample.0", "linear": "fc", **_SELECT}),
        *_EIGENDAMAGE,
    ),
    *(
        Layout("eigendamage", form, _vgg_names(form, "feature", {"mean_linear": "classifier"}), *_EIGENDAMAGE)
        for form in MEAN_VGGS.values()
    ),
    *(
        Layout(
            "weiaicunzai",
            form,
            Names(
                {"stem_conv": "conv1.0", "stem_bn": "conv1.1"}
                | {
                    f"{role}{number + 1}": f"conv{{s}}_x.{{b}}.residual_function.{3 * number + offset}"
                    for number in range(len(form.kernels))
                    for offset, role in enumerate(("conv", "bn"))
                }
                | {"shortcut_conv": "conv{s}_x.{b}.shortcut.0", "shortcut_bn": "conv{s}_x.{b}.shortcut.1"}
                | {"linear": "fc"},
                first_stage=2,
            ),
            *_WEIAICUNZAI,
        )
        for form in (RESNET, BOTTLENECK)
    ),
    Layout(
        "weiaicunzai",
        PREACT,
        Names(
            {
                "stem_conv": "pre.0",
                "stem_bn": "pre.1",
                "bn1": "stage{s}.{b}.residual.0",
                "conv1": "stage{s}.{b}.residual.2",
                "bn2": "stage{s}.{b}.residual.3",
                "conv2": "stage{s}.{b}.residual.5",
                "shortcut_conv": "stage{s}.{b}.shortcut",
                "linear": "linear",
            }
        ),
        *_WEIAICUNZAI,
    ),
    Layout(
        "weiaicunzai",
        WIDE_AFFINE,
        Names(
            {
                "stem_conv": "init_conv",
                "bn1": "conv{s}.{b}.residual.0",
                "conv1": "conv{s}.{b}.residual.2",
                "bn2": "conv{s}.{b}.residual.3",
                "conv2": "conv{s}.{b}.residual.6",
                "shortcut_conv": "conv{s}.{b}.shortcut.0",
                "final_affine": "bn",
                "linear": "linear",
            },
            first_stage=2,
        ),
        *_WEIAICUNZAI,
    ),
    *(Layout("weiaicunzai", form, _vgg_names(form, "features", _THREE), *_WEIAICUNZAI) for form in VGGS.values()),
    *(
        Layout("weiaicunzai_early", form, _vgg_names(form, "features", _ONE_DROPOUT), *_WEIAICUNZAI)
        for form in VGGS.values()
    ),
    Layout("kuangliu", BOTTLENECK, BOTTLENECK.names, *_KUANGLIU),
    *(
        Layout(
            "kuangliu",
            form,
            _vgg_names(form, "features", {"linear": "classifier"}),
            *_KUANGLIU,
        )
        for form in VGGS.values()
    ),
    Layout(
        "xternalz",
        WIDE,
        Names(
            {"stem_conv": "conv1", "final_bn": "bn1", "linear": "fc"}
            | block_names("block{s}.layer.{b}.", 2, {"projection": "convShortcut"}, norm_first=True)
        ),
        "github.com/xternalz/WideResNet-pytorch",
        *_CIFAR10,
    ),
    Layout(
        "ehap",
        RESNET,
        Names(
            {
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
            first_block=1,
        ),
        "the code released with arXiv 2306.07030",
        *_CIFAR10,
        index_leaves=KEPT_INDICES,
        padded=False,
    ),
    *(
        Layout("ehap_jax", form, form.names, "interop.to_torch", *_CIFAR10, large=True)
        for form in FORMS.values()
        if form is not RESNET
    ),
)

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    name: tuple(table for table in _TABLES if table.name == name) for name in dict.fromkeys(t.name for t in _TABLES)
}
"""The tables of every known layout by name, in the order in which `recognise` reports them.

"ehap_jax" is what `to_torch` writes for forms other than "resnet", where it writes "akamaster".
"""


def layout_for(name: str, form: Form) -> Layout:
    """The table of a layout for one form.

    Raises:
        KeyError: an unknown layout. CheckpointError: the layout has no such network.
    """
    if name not in LAYOUTS:
        raise KeyError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}")
    for table in LAYOUTS[name]:
        if table.form is form:
            return table
    having = [other for other, tables in LAYOUTS.items() if any(table.form is form for table in tables)]
    raise CheckpointError(f"the layout {name!r} has no names for a {form.name}; these have: {', '.join(having)}")


def written_layout(form: Form) -> str:
    """The name of the layout that has the form's own names."""
    return next(table.name for table in _TABLES if table.names is form.names)


class Match(NamedTuple):
    """A layout laid over a set of keys. Complete when nothing is left over and nothing missing."""

    layout: Layout
    parts: dict[str, Part]
    left_over: tuple[str, ...]

    def missing(self) -> list[Part]:
        """What the network would need, too."""
        return self.layout.form.missing(self.parts.values())


def match(layout: Layout, keys: Iterable[str], foreign: Iterable[str] = ()) -> Match:
    """Lay one layout over state-dict keys: which key is which part, and what is left over, foreign keys included."""
    parts: dict[str, Part] = {}
    left_over = list(foreign)
    for key in keys:
        part = layout.names.part(key, layout.index_leaves)
        if part is None:
            left_over.append(key)
        else:
            parts[key] = part
    return Match(layout, parts, tuple(left_over))


_MODULES = frozenset(module for table in _TABLES for module in table.names.plain)
_SHAPES = frozenset(shape for table in _TABLES for shape in table.names.numbered)


def _is_familiar(module: str) -> bool:
    """Whether any table has a module of such a name."""
    return module in _MODULES or without_numbers(module)[0] in _SHAPES


def recognise(tensors: Mapping[str, Any] | Iterable[str], layout: str = "auto") -> tuple[Match, tuple[str, ...]]:
    """Find the layout of a state dict by its names, and, where its tensors are given, by what images it is for.

    Returns the match and the names of all layouts that read every key as the same part of the same network (the
    names of chenyaofo, HAP and torchvision coincide; the network is the same whichever is meant).

    Raises:
        KeyError: an unknown layout name.
        CheckpointError: no layout fits (lists the best one, what it matched and what was left over), or two layouts
            fit and read the keys differently.

    Example:
        >>> parts = RESNET.missing([])
        >>> recognise([RESNET.names.key(part) for part in parts])[0].layout.name
        'akamaster'
    """
    keys = tuple(tensors)
    if layout != "auto" and layout not in LAYOUTS:
        raise KeyError(f"unknown layout {layout!r}; known: auto, {', '.join(LAYOUTS)}")
    tables = _TABLES if layout == "auto" else LAYOUTS[layout]
    # Names that no table knows are put aside once, so that a file of many costs no more than one table.
    familiar = {key: _is_familiar(key.rpartition(".")[0]) for key in keys}
    known, foreign = ([key for key, found in familiar.items() if found is wanted] for wanted in (True, False))
    matches = [match(table, known, foreign) for table in tables]
    most = max(len(m.parts) for m in matches)
    lacking = [(m, m.missing()) for m in matches if len(m.parts) == most]
    complete = [m for m, missing in lacking if not m.left_over and not missing]
    if not complete:
        best, missing = min(lacking, key=lambda each: len(each[1]))
        which = f"{best.layout.name} ({best.layout.form.name})"
        headline = f"no known layout fits the checkpoint; the nearest is {which}"
        if layout != "auto":
            headline = (
                f"the checkpoint does not have the layout {layout!r}; the nearest form is {best.layout.form.name}"
            )
        raise CheckpointError(_explain(best, missing, headline))
    if isinstance(tensors, Mapping) and _is_large(complete[0], tensors):
        complete = [m for m in complete if m.layout.large] or complete
    first = complete[0]
    if any(m.parts != first.parts or m.layout.form is not first.layout.form for m in complete[1:]):
        names = ", ".join(f"{m.layout.name} ({m.layout.form.name})" for m in complete)
        raise CheckpointError(f"the names fit several layouts that differ: {names}. Pass layout=... to choose one.")
    return first, tuple(dict.fromkeys(m.layout.name for m in complete))


def _is_large(found: Match, tensors: Mapping[str, Any]) -> bool:
    """Whether a network is for large images: its stem is 7×7, or its first dense layer reads more than one pixel."""
    weights = {part.role: tensors[key].shape for key, part in found.parts.items() if part.leaf == "weight"}
    if found.layout.form.kind != "vgg":
        return weights.get("stem_conv", ())[-1:] == (7,)
    last = weights[f"conv{sum(found.layout.form.stages)}"]
    first = next((weights[role] for role in ("fc1", "fc2", "linear") if role in weights), ())
    return len(first) == 2 and len(last) == 4 and first[1] > last[0]


def _explain(found: Match, missing: list[Part], headline: str) -> str:
    names = found.layout.names
    lines = [
        headline,
        f"  matched    {len(found.parts)} tensors{listed(tuple(found.parts))}",
        f"  left over  {len(found.left_over)} tensors{listed(found.left_over)}",
        f"  missing    {len(missing)} tensors{listed(missing, names.key)}",
        f"  known layouts: {', '.join(LAYOUTS)}",
    ]
    return "\n".join(lines)
