"""The widths of a residual network, read from the shapes of its tensors and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from interop.layouts import AKAMASTER, INDEX_BUFFERS, LEAVES, CheckpointError, Part


@dataclass(frozen=True)
class BlockSpec:
    """The widths of one block.

    inputs, inner, branch: channels into conv1, between the convolutions, and out of conv2.
    outputs: channels of the residual sum.
    shortcut: channels of the projection, or None where the shortcut has no parameters.
    indexed: whether the sum is by index.
    """

    inputs: int
    inner: int
    branch: int
    outputs: int
    stride: int
    shortcut: int | None = None
    indexed: bool = False


@dataclass(frozen=True)
class ResNetSpec:
    """The widths of a whole network; `blocks[i]` are the blocks of stage i + 1."""

    stem: int
    blocks: tuple[tuple[BlockSpec, ...], ...]
    num_classes: int
    image_channels: int = 3

    @property
    def depth(self) -> int:
        """Convolutions on the longest path plus the classifier: 6n + 2 for three stages of n blocks."""
        return 2 + 2 * sum(len(stage) for stage in self.blocks)


def read_spec(shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str] | None = None) -> ResNetSpec:
    """The widths of the network whose state dict has these shapes, after checking that they fit each other.

    Args:
        shapes: state-dict key (akamaster's names) -> shape.
        names: what messages call a key, where the file they came from used another name.

    Raises:
        CheckpointError: a tensor that is absent, or one whose shape contradicts the tensors before it (the message
            gives key, expected and found shape).
    """

    def name(key: str) -> str:
        return (names or {}).get(key, key)

    def shape(part: Part) -> tuple[int, ...]:
        key = AKAMASTER.key(part)
        if key not in shapes:
            raise CheckpointError(f"missing tensor {name(key)!r}")
        return tuple(shapes[key])

    def check(part: Part, expected: tuple[int | None, ...]) -> tuple[int, ...]:
        found = shape(part)
        fits = len(found) == len(expected) and all(e in (None, f) for e, f in zip(expected, found, strict=True))
        if not fits or 0 in found:
            wanted = "(" + ", ".join("any" if e is None else str(e) for e in expected) + ")"
            raise CheckpointError(f"{name(AKAMASTER.key(part))}: expected shape {wanted}, found {found}")
        return found

    def norm(role: str, stage: int, block: int, width: int) -> None:
        for leaf in LEAVES[role]:
            check(Part(role, stage, block, leaf), (width,))

    stem, image_channels, *_ = check(Part("stem_conv", 0, 0, "weight"), (None, None, 3, 3))
    norm("stem_bn", 0, 0, stem)
    places = []
    while AKAMASTER.key(Part("conv1", len(places) + 1, 0, "weight")) in shapes:
        stage = len(places) + 1
        count = 0
        while AKAMASTER.key(Part("conv1", stage, count, "weight")) in shapes:
            count += 1
        places.append([(stage, block) for block in range(count)])
    flat = [place for stage in places for place in stage]
    if not flat:
        raise CheckpointError("the state dict has no residual blocks ('layer1.0.conv1.weight' is missing)")

    specs: dict[tuple[int, int], BlockSpec] = {}
    width = stem
    for position, (stage, block) in enumerate(flat):
        inner, *_ = check(Part("conv1", stage, block, "weight"), (None, width, 3, 3))
        norm("bn1", stage, block, inner)
        branch, *_ = check(Part("conv2", stage, block, "weight"), (None, inner, 3, 3))
        norm("bn2", stage, block, branch)
        shortcut = None
        if AKAMASTER.key(Part("shortcut_conv", stage, block, "weight")) in shapes:
            shortcut, *_ = check(Part("shortcut_conv", stage, block, "weight"), (None, width, 1, 1))
            norm("shortcut_bn", stage, block, shortcut)
        indexed = f"layer{stage}.{block}.branch_index" in shapes
        outputs = branch
        if indexed:
            last = position + 1 == len(flat)
            after = Part("linear", 0, 0, "weight")
            if not last:
                next_stage, next_block = flat[position + 1]
                after = Part("conv1", next_stage, next_block, "weight")
            outputs = shape(after)[1]
            residual = width if shortcut is None else shortcut
            for buffer, expected in zip(INDEX_BUFFERS, (branch, residual), strict=True):
                key = f"layer{stage}.{block}.{buffer}"
                if tuple(shapes.get(key, ())) != (expected,):
                    raise CheckpointError(f"{name(key)}: expected shape ({expected},), found {shapes.get(key)}")
        elif shortcut is not None and shortcut != branch:
            key = AKAMASTER.key(Part("shortcut_conv", stage, block, "weight"))
            raise CheckpointError(
                f"{name(key)}: expected {branch} output channels, found {shortcut} (and no index buffers)"
            )
        elif shortcut is None and (branch < width or (branch - width) % 2):
            key = AKAMASTER.key(Part("conv2", stage, block, "weight"))
            raise CheckpointError(
                f"{name(key)}: expected {width} output channels, or more by an even number, to be added to a residual "
                f"of {width} channels; found {branch} (and no index buffers)"
            )
        stride = 2 if block == 0 and stage > 1 else 1
        specs[stage, block] = BlockSpec(width, inner, branch, outputs, stride, shortcut, indexed)
        width = outputs
    classes, _ = check(Part("linear", 0, 0, "weight"), (None, width))
    check(Part("linear", 0, 0, "bias"), (classes,))
    blocks = tuple(tuple(specs[place] for place in stage) for stage in places)
    return ResNetSpec(stem, blocks, classes, image_channels)
