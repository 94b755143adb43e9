"""The widths of a network, read from the shapes of its tensors and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import isqrt

from interop.forms import (
    FORMS,
    INDEX_BUFFERS,
    INVERTED_BLOCKS,
    INVERTED_STAGES,
    LEAVES,
    CheckpointError,
    Form,
    Part,
    kind_of,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BlockSpec:
    """The widths of one residual block.

    inputs: channels that enter. widths: channels out of each convolution; the last is the branch's.
    outputs: channels of the residual sum.
    shortcut: channels of the 1×1 convolution on the shortcut, or None where the shortcut has no parameters.
    groups: of the form's grouped convolution.
    indexed: whether the sum is by index.
    """

    inputs: int
    widths: tuple[int, ...]
    outputs: int
    stride: int
    shortcut: int | None = None
    indexed: bool = False
    groups: int = 1

    @property
    def branch(self) -> int:
        """Channels of the branch."""
        return self.widths[-1]

    @property
    def residual(self) -> int:
        """Channels that the shortcut adds."""
        return self.inputs if self.shortcut is None else self.shortcut


@dataclass(frozen=True)
class ResidualSpec:
    """The widths of a residual network; `blocks[i]` are the blocks of stage i + 1. conv_bias: on every convolution.

    stem_size: of the first kernel; 7 stands for stride 2 and a 3×3 maximum of stride 2 after it.
    """

    form: str
    stem: int
    blocks: tuple[tuple[BlockSpec, ...], ...]
    num_classes: int
    image_channels: int = 3
    conv_bias: bool = False
    stem_size: int = 3

    @property
    def depth(self) -> int:
        """The number in the network's name: 6n + 2 for three stages of n basic blocks, 6n + 4 for wide ResNets.

        Wide ResNets count a shortcut's convolution in every stage. Those in the form of thin ones (EHAP's) are known
        by the one in their first stage, which thin ResNets do not have.
        """
        form = FORMS[self.form]
        widened = form.name == "resnet" and self.stem_size == 3 and self.blocks[0][0].shortcut is not None
        return self.layers + (2 if widened else 0)

    @property
    def layers(self) -> int:
        """Convolutions in the blocks and what the form adds: 6n + 2 for ResNets of three stages of n basic blocks."""
        form = FORMS[self.form]
        return form.extra_depth + len(form.kernels) * sum(len(stage) for stage in self.blocks)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels out of each stage."""
        return tuple(stage[-1].outputs for stage in self.blocks)


@dataclass(frozen=True)
class VGGSpec:
    """The widths of a VGG: of its convolutions, and of the hidden dense layers, which read grid × grid means."""

    form: str
    widths: tuple[int, ...]
    hidden: tuple[int, ...]
    num_classes: int
    image_channels: int = 3
    conv_bias: bool = False
    grid: int = 1

    @property
    def depth(self) -> int:
        """The number in the network's name: convolutions and three, however many dense layers there are."""
        return FORMS[self.form].extra_depth + len(self.widths)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels out of each stage."""
        found, position = [], 0
        for count in FORMS[self.form].stages:
            position += count
            found.append(self.widths[position - 1])
        return tuple(found)


@dataclass(frozen=True)
class InvertedBlock:
    """The widths of one block of MobileNetV2: what enters, the wide middle, what its last convolution leaves.

    outputs: channels that leave the block. residual: whether the input is added; indexed: by index.
    """

    inputs: int
    hidden: int
    branch: int
    outputs: int
    stride: int
    residual: bool
    indexed: bool = False


@dataclass(frozen=True)
class InvertedSpec:
    """The widths of a MobileNetV2: its stem, what its first block leaves, its other blocks, its last convolution."""

    form: str
    stem: int
    first: int
    blocks: tuple[InvertedBlock, ...]
    last: int
    num_classes: int
    image_channels: int = 3
    conv_bias: bool = False

    @property
    def depth(self) -> int:
        """Layers with weights: three in each block but the first, which has two, and three more."""
        return FORMS[self.form].extra_depth + 3 * len(self.blocks)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels out of each stage."""
        ends = accumulate(count for count, _ in INVERTED_STAGES)
        return (self.first, *(self.blocks[end - 1].outputs for end in ends))


HEAD_WIDTH = 64
"""Channels of each attention head of the transformers that are read; it is in no shape of a state dict."""

WIDEST = 1024
"""The width of ViT-L. Published ones up to it (Ti, S, B, L) have heads of 64 channels, larger ones wider heads."""


@dataclass(frozen=True)
class ViTSpec:
    """The widths of a vision transformer.

    width: of the tokens. tokens: patches and the class token. heads: of 64 channels, in each block. hidden: channels
    between the two dense layers of each block.
    """

    form: str
    width: int
    patch: int
    tokens: int
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    num_classes: int
    image_channels: int = 3

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.hidden)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """The width of the tokens."""
        return (self.width,)


Spec = ResidualSpec | VGGSpec | InvertedSpec | ViTSpec


def sums(spec: Spec) -> list[tuple[tuple[int, int], BlockSpec | InvertedBlock]]:
    """((stage, block), widths) of every block."""
    if isinstance(spec, VGGSpec | ViTSpec):
        return []
    if isinstance(spec, InvertedSpec):
        return [((0, number), block) for number, block in enumerate(spec.blocks)]
    return [((s, b), block) for s, stage in enumerate(spec.blocks, start=1) for b, block in enumerate(stage)]


def read_spec(form: Form, shapes: Mapping[str, Shape], names: Mapping[str, str] | None = None) -> Spec:
    """The widths of the network whose state dict has these shapes, after checking that they fit each other.

    Args:
        form: the kind of network.
        shapes: state-dict key (the form's own names) -> shape.
        names: what messages call a key, where the file they came from used another name.

    Raises:
        CheckpointError: a tensor that is absent, or one whose shape contradicts the tensors before it (the message
            gives key, expected and found shape).
    """
    reader = _Reader(form, shapes, names or {})
    readers = {"vgg": _read_vgg, "residual": _read_residual, "inverted": _read_inverted, "vit": _read_vit}
    return readers[form.kind](reader)


class _Reader:
    """Shapes by part, checked as they are read."""

    def __init__(self, form: Form, shapes: Mapping[str, Shape], names: Mapping[str, str]) -> None:
        self.form, self.shapes, self.names = form, shapes, names
        convs = [part for key in shapes if (part := form.names.part(key)) and kind_of(part.role) == "conv"]
        self.conv_bias = any(part.leaf == "bias" for part in convs)

    def has(self, role: str, stage: int = 0, block: int = 0) -> bool:
        return self.form.has(role) and any(
            self.form.names.key(Part(role, stage, block, leaf)) in self.shapes for leaf in LEAVES[kind_of(role)]
        )

    def name(self, part: Part) -> str:
        key = self.form.names.key(part)
        return self.names.get(key, key)

    def check(self, part: Part, expected: tuple[int | None, ...]) -> Shape:
        key = self.form.names.key(part)
        if key not in self.shapes:
            raise CheckpointError(f"missing tensor {self.name(part)!r}")
        found = tuple(self.shapes[key])
        fits = len(found) == len(expected) and all(e in (None, f) for e, f in zip(expected, found, strict=True))
        if not fits or 0 in found:
            wanted = "(" + ", ".join("any" if e is None else str(e) for e in expected) + ")"
            raise CheckpointError(f"{self.name(part)}: expected shape {wanted}, found {found}")
        return found

    def conv(self, role: str, stage: int, block: int, inputs: int | None, size: int) -> Shape:
        """Shape of a convolution's kernel, (out, in, size, size)."""
        shape = self.check(Part(role, stage, block, "weight"), (None, inputs, size, size))
        if self.conv_bias:
            self.check(Part(role, stage, block, "bias"), (shape[0],))
        return shape

    def groups(self, role: str, stage: int, block: int, inputs: int) -> int:
        """Groups of a convolution that reads so many channels."""
        part = Part(role, stage, block, "weight")
        outputs, per_group, *_ = self.check(part, (None, None, None, None))
        if inputs % per_group or outputs % (inputs // per_group):
            raise CheckpointError(
                f"{self.name(part)}: no number of groups of {per_group} channels makes {outputs} of {inputs}"
            )
        return inputs // per_group

    def norm(self, role: str, stage: int, block: int, width: int) -> None:
        for leaf in LEAVES["norm"]:
            self.check(Part(role, stage, block, leaf), (width,))

    def dense(self, role: str, inputs: int, outputs: int | None = None, block: int = 0) -> int:
        """Outputs of a dense layer."""
        found, _ = self.check(Part(role, 0, block, "weight"), (outputs, inputs))
        self.check(Part(role, 0, block, "bias"), (found,))
        return found

    def layer_norm(self, role: str, width: int, block: int = 0) -> None:
        for leaf in LEAVES["layer_norm"]:
            self.check(Part(role, 0, block, leaf), (width,))


def _read_vgg(reader: _Reader) -> VGGSpec:
    form = reader.form
    width: int | None = None
    image_channels, widths = 0, []
    for number in range(1, sum(form.stages) + 1):
        width, inputs, *_ = reader.conv(f"conv{number}", 0, 0, width, 3)
        image_channels = image_channels or inputs
        if form.has(f"bn{number}"):
            reader.norm(f"bn{number}", 0, 0, width)
        widths.append(width)
    assert width is not None
    dense = [role for role in ("fc1", "fc2", "linear", "mean_linear") if reader.has(role)]
    grid = 1
    if "linear" in dense:
        read = reader.check(Part(dense[0], 0, 0, "weight"), (None, None))[1]
        grid = max(isqrt(read // width), 1)
    width *= grid * grid
    hidden = []
    for role in dense:
        width = reader.dense(role, width)
        hidden.append(width)
    *hidden, classes = hidden
    return VGGSpec(form.name, tuple(widths), tuple(hidden), classes, image_channels, reader.conv_bias, grid)


def _read_residual(reader: _Reader) -> ResidualSpec:
    form = reader.form
    found = reader.shapes.get(form.names.key(Part("stem_conv", 0, 0, "weight")), ())
    size = next((size for size in form.stems if found[-1:] == (size,)), form.stems[0])
    stem, image_channels, *_ = reader.conv("stem_conv", 0, 0, None, size)
    if form.has("stem_bn"):
        reader.norm("stem_bn", 0, 0, stem)
    counts: list[int] = []
    while reader.has("conv1", len(counts) + 1, 0):
        counts.append(0)
        while reader.has("conv1", len(counts), counts[-1]):
            counts[-1] += 1
    places = [(stage, block) for stage, count in enumerate(counts, start=1) for block in range(count)]
    if not places:
        first = reader.name(Part("conv1", 1, 0, "weight"))
        raise CheckpointError(f"the state dict has no residual blocks ({first!r} is missing)")
    specs: dict[tuple[int, int], BlockSpec] = {}
    width = stem
    for here, after in zip(places, [*places[1:], None], strict=True):
        specs[here] = _read_block(reader, here, after, width)
        width = specs[here].outputs
    for role in ("final_bn", "final_affine"):
        if form.has(role):
            reader.norm(role, 0, 0, width)
    classes = reader.dense("linear", width)
    blocks = tuple(tuple(specs[s, b] for b in range(count)) for s, count in enumerate(counts, start=1))
    return ResidualSpec(form.name, stem, blocks, classes, image_channels, reader.conv_bias, size)


def _read_inverted(reader: _Reader) -> InvertedSpec:
    def layer(role: str, inputs: int | None, block: int = 0) -> Shape:
        shape = reader.conv(f"{role}_conv", 0, block, inputs, 3 if role == "stem" else 1)
        reader.norm(f"{role}_bn", 0, block, shape[0])
        return shape

    def depthwise(role: str, width: int, block: int = 0) -> None:
        reader.check(Part(f"{role}_conv", 0, block, "weight"), (width, 1, 3, 3))
        reader.norm(f"{role}_bn", 0, block, width)

    stem, image_channels, *_ = layer("stem", None)
    depthwise("first_depthwise", stem)
    first = width = layer("first_project", stem)[0]
    beyond = Part("expand_conv", 0, len(INVERTED_BLOCKS), "weight")
    if reader.has(*beyond[:3]):
        raise CheckpointError(f"{reader.name(beyond)}: MobileNetV2 has {len(INVERTED_BLOCKS) + 1} blocks")
    blocks = []
    for number, (stride, residual) in enumerate(INVERTED_BLOCKS):
        hidden = layer("expand", width, number)[0]
        depthwise("depthwise", hidden, number)
        branch = layer("project", hidden, number)[0]
        indexed = residual and reader.has("add", 0, number)
        block = InvertedBlock(width, hidden, branch, branch, stride, residual, indexed)
        if indexed:
            after = Part("expand_conv", 0, number + 1, "weight")
            after = after if number + 1 < len(INVERTED_BLOCKS) else Part("last_conv", 0, 0, "weight")
            for buffer, expected in zip(INDEX_BUFFERS, (branch, width), strict=True):
                reader.check(Part("add", 0, number, buffer), (expected,))
            block = replace(block, outputs=reader.check(after, (None, None, 1, 1))[1])
        elif residual and branch != width:
            name = reader.name(Part("project_conv", 0, number, "weight"))
            raise CheckpointError(f"{name}: expected {width} output channels, found {branch} (and no index buffers)")
        blocks.append(block)
        width = block.outputs
    last = layer("last", width)[0]
    classes = reader.dense("linear", last)
    return InvertedSpec(reader.form.name, stem, first, tuple(blocks), last, classes, image_channels, reader.conv_bias)


def _read_vit(reader: _Reader) -> ViTSpec:
    kernel, positions = Part("patch_conv", 0, 0, "weight"), Part("tokens", 0, 0, "pos_embed")
    width, image_channels, patch, _ = reader.check(kernel, (None, None, None, None))
    reader.check(kernel, (width, image_channels, patch, patch))
    reader.check(kernel._replace(leaf="bias"), (width,))
    reader.check(positions._replace(leaf="cls_token"), (1, 1, width))
    tokens = reader.check(positions, (1, None, width))[1]
    if width % HEAD_WIDTH or width > WIDEST or isqrt(tokens - 1) ** 2 != tokens - 1:
        raise CheckpointError(
            f"{reader.name(positions)}: transformers are read of square images, and of a width that is a multiple of "
            f"{HEAD_WIDTH} up to {WIDEST}, with heads of {HEAD_WIDTH} channels; found {tokens} tokens of width {width}"
        )
    heads, hidden = [], []
    while reader.has("qkv", 0, len(hidden)):
        block = len(hidden)
        reader.layer_norm("attention_ln", width, block)
        count, rest = divmod(reader.dense("qkv", width, None, block), 3 * HEAD_WIDTH)
        if rest:
            name = reader.name(Part("qkv", 0, block, "weight"))
            raise CheckpointError(f"{name}: expected heads of {HEAD_WIDTH} queries, keys and values each")
        reader.dense("attention_out", count * HEAD_WIDTH, width, block)
        reader.layer_norm("mlp_ln", width, block)
        hidden.append(reader.dense("fc1", width, None, block))
        reader.dense("fc2", hidden[-1], width, block)
        heads.append(count)
    reader.layer_norm("final_ln", width)
    classes = reader.dense("linear", width)
    return ViTSpec(reader.form.name, width, patch, tokens, tuple(heads), tuple(hidden), classes, image_channels)


def _read_block(reader: _Reader, here: tuple[int, int], after: tuple[int, int] | None, inputs: int) -> BlockSpec:
    form = reader.form
    widths: list[int] = []
    width, groups = inputs, 1
    for number, size in enumerate(form.kernels, start=1):
        if form.preactivation:
            reader.norm(f"bn{number}", *here, width)
        if number - 1 == form.grouped:
            groups = reader.groups(f"conv{number}", *here, width)
        width, *_ = reader.conv(f"conv{number}", *here, width // (groups if number - 1 == form.grouped else 1), size)
        if not form.preactivation:
            reader.norm(f"bn{number}", *here, width)
        widths.append(width)
    last = reader.name(Part(f"conv{len(widths)}", *here, "weight"))
    shortcut = None
    if reader.has(form.shortcut, *here):
        shortcut, *_ = reader.conv(form.shortcut, *here, inputs, 1)
        if form.has("shortcut_bn"):
            reader.norm("shortcut_bn", *here, shortcut)
    stride = 2 if here[1] == 0 and here[0] > 1 else 1
    indexed, outputs = reader.has("add", *here), width
    block = BlockSpec(inputs, tuple(widths), outputs, stride, shortcut, indexed, groups)
    if indexed:
        consumer = Part("linear", 0, 0, "weight") if after is None else Part("conv1", *after, "weight")
        kernel = reader.check(consumer, (None, None) if after is None else (None, None, *(form.kernels[0],) * 2))
        for buffer, expected in zip(INDEX_BUFFERS, (block.branch, block.residual), strict=True):
            reader.check(Part("add", *here, buffer), (expected,))
        return replace(block, outputs=kernel[1])
    if shortcut is not None and shortcut != width:
        name = reader.name(Part(form.shortcut, *here, "weight"))
        raise CheckpointError(f"{name}: expected {width} output channels, found {shortcut} (and no index buffers)")
    if shortcut is None and (width < inputs or (width - inputs) % 2):
        raise CheckpointError(
            f"{last}: expected {inputs} output channels, or more by an even number, to be added to a residual "
            f"of {inputs} channels; found {width} (and no index buffers)"
        )
    return block
