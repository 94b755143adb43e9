"""PyTorch checkpoints into JAX variables, with every tensor used exactly once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.models import VGG, PreResNet, ResNet, WideResNet, eval_apply
from interop.forms import (
    FORMS,
    INDEX_BUFFERS,
    PRERESNET,
    RESNET,
    UNREAD,
    VGGS,
    WIDE,
    CheckpointError,
    Form,
    Part,
    to_flax_axes,
)
from interop.layouts import Layout, recognise
from interop.network import network_function
from interop.read import read_checkpoint
from interop.spec import InvertedSpec, ResidualSpec, Spec, VGGSpec, ViTSpec, read_spec, sums


@dataclass(frozen=True)
class CheckpointInfo:
    """What was found in a checkpoint.

    Attributes:
        layout: the layout that was used; also_fits are other names of the same one.
        spec: the widths of the network.
        shortcut: "A" (parameter-free), "B" (1×1 convolution), "indexed" (sums by index, a pruned network) or "none".
        model: the `ehap_jax.models` module that `apply` runs, or None where the network is not one of them.
        normalisation: (mean, std) per RGB channel that this family of checkpoints expects, for images in [0, 1].
        metadata: numbers and strings saved beside the weights (accuracy, epoch, …).
        indices: positions of the operands of sums by index ("layer1.0.branch_index" -> positions).
        unread: tensors that no forward pass reads (`num_batches_tracked`, HAP's `select.indexes`, EHAP's indices
            that no residual sum depends on).
        dtypes: the dtypes in the file, before conversion.
    """

    layout: str
    also_fits: tuple[str, ...]
    spec: Spec
    shortcut: str
    model: Any
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]]
    metadata: Mapping[str, Any]
    indices: Mapping[str, np.ndarray] = field(repr=False)
    unread: Mapping[str, np.ndarray] = field(repr=False)
    dtypes: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        """The kind of network; its `key_at` and `path_of` translate between PyTorch's names and variable paths."""
        return FORMS[self.spec.form]

    @property
    def num_classes(self) -> int:
        """The number of logits."""
        return self.spec.num_classes

    @property
    def depth(self) -> int:
        """The number in the network's name."""
        return self.spec.depth


def from_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    layout: str = "auto",
    *,
    entry: str | None = None,
    indices: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    dtype: Any = None,
) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, Any], CheckpointInfo]:
    """Read a PyTorch checkpoint of a residual network or a VGG, dense or pruned.

    Args:
        source: a PyTorch file, a `.safetensors` file, or a state dict (of torch tensors or arrays).
        layout: the naming of the file, one of `interop.layouts.LAYOUTS`, or "auto" to find it by the names.
        entry: which entry of the file is the state dict, where it is not one of `interop.read.CONTAINERS`, or where
            several are ("model_ema", "state_dict_ema").
        indices: what a pruned network keeps beside its state dict: `info.indices` of another checkpoint, or the
            attributes of HAP's modules, `{f"{name}.{leaf}": getattr(module, leaf) for name, module in
            net.named_modules() for leaf in ("in_indices", "out_indices") if hasattr(module, leaf)}`.
        num_classes: where given, the number of classes the checkpoint must have.
        dtype: the floating dtype of the variables; None keeps float32 and float64 (float64 only where JAX's x64 mode
            is on) and widens 16-bit formats to float32, which loses nothing.

    Returns:
        (apply, variables, info). apply(variables, x) maps images (N, H, W, channels), normalised as
        `info.normalisation` says, to logits (N, classes), in eval mode. variables is
        {"params": …, "batch_stats": …} with the paths of `ehap_jax.models`. info is a `CheckpointInfo`.

    Raises:
        FileNotFoundError, TypeError, KeyError (unknown layout).
        CheckpointError: names that fit no layout or several, tensors left over or missing, shapes that contradict
            each other, the wrong number of classes, non-finite weights, damaged files, or files that would have to
            run code to be read.

    Example:
        >>> import numpy as np
        >>> from interop.torch_models import cifar_resnet
        >>> net = cifar_resnet(8, widths=(4, 8, 16)).eval()
        >>> apply, variables, info = from_torch(net.state_dict())
        >>> apply(variables, np.zeros((2, 8, 8, 3), np.float32)).shape, info.layout, info.depth
        ((2, 10), 'akamaster', 8)
    """
    try:
        return _network(*read_checkpoint(source, entry, indices or {}), layout, num_classes, dtype)
    except CheckpointError as error:
        if isinstance(source, Mapping) or os.fspath(source) in str(error):
            raise
        raise CheckpointError(f"{os.fspath(source)}: {error}") from error


def _network(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], layout: str, num_classes: int | None, dtype: Any
) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, Any], CheckpointInfo]:
    """What `from_torch` returns of the tensors of a file."""
    found, names = recognise(tensors, layout)
    form = found.layout.form
    own, unread, original = _rename(found.layout, found.parts, tensors)
    _check_values(own, original)
    published, idle = _published_indices(found.layout, found.parts, tensors)
    own, unread = own | published, unread | idle
    spec = read_spec(form, {key: value.shape for key, value in own.items()}, original)
    if num_classes is not None and num_classes != spec.num_classes:
        head = next(role for role in form.names.modules if role.endswith("linear"))
        key = original[form.names.key(Part(head, 0, 0, "weight"))]
        raise CheckpointError(
            f"{key}: expected {num_classes} classes, found {spec.num_classes}; the checkpoint was trained on other data"
        )
    indices = {key: value for key, value in own.items() if key.endswith(INDEX_BUFFERS)}
    _check_indices(spec, indices)
    variables: dict[str, Any] = {}
    for key, value in own.items():
        if key not in indices:
            _put(variables, form.path_of(key), _convert(original[key], value, dtype))
    model = linen_model(spec)
    info = CheckpointInfo(
        layout=found.layout.name,
        also_fits=tuple(name for name in names if name != found.layout.name),
        spec=spec,
        shortcut=_shortcut(spec),
        model=model,
        normalisation=(found.layout.mean, found.layout.std),
        metadata=metadata,
        indices=indices,
        unread=unread,
        dtypes=tuple(sorted({str(value.dtype) for value in own.values()})),
    )
    return network_function(spec, indices) if model is None else eval_apply(model), variables, info


def _rename(
    layout: Layout, parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
    """Tensors under the form's own names, those that nothing reads, and own name -> name in the file."""
    own: dict[str, np.ndarray] = {}
    unread: dict[str, np.ndarray] = {}
    original: dict[str, str] = {}
    for key, part in parts.items():
        if part.leaf in UNREAD:
            unread[key] = tensors[key]
        elif part.leaf not in layout.index_leaves:
            name = layout.form.names.key(part)
            own[name] = tensors[key]
            original[name] = key
    return own, unread, original


def _published_indices(
    layout: Layout, parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The positions in each residual sum that EHAP's released code gives its pruned channels, and the unread indices.

    That code enumerates `list(set(branch + residual))`, whose order is the hash table's and not the sorted one, so at
    some widths it adds other channels than were meant; weights fine-tuned that way only work that way. Unread are
    the indices that no sum depends on.
    """
    indices: dict[str, np.ndarray] = {}
    kept = {part: tensors[key] for key, part in parts.items() if part.leaf in layout.index_leaves}
    for part, index in kept.items():
        axis = 0 if part.leaf == "out_indices" else 1
        expected = tensors[layout.names.key(part._replace(leaf="weight"))].shape[axis : axis + 1]
        key = layout.names.key(part)
        if index.shape != expected:
            raise CheckpointError(
                f"{key}: expected an index per channel of the weight, {expected}, found {index.shape}"
            )
        with np.errstate(invalid="ignore"):
            whole = index.dtype.kind in "iuf" and np.array_equal(index, index.astype(np.int32))
        if not whole or (index < 0).any():
            raise CheckpointError(f"{key}: kept indices are whole numbers, none of them negative")
        if np.unique(index).size != index.size:
            raise CheckpointError(f"{key}: kept indices repeat")
    unread = dict(kept)
    last = f"conv{len(layout.form.kernels)}"
    for part, out in kept.items():
        if layout.form.kind != "residual" or part.role != last or part.leaf != "out_indices":
            continue
        projected = Part(layout.form.shortcut, part.stage, part.block, "out_indices")
        plain = Part("conv1", part.stage, part.block, "in_indices")
        residual_part = projected if projected in kept else plain
        if residual_part not in kept:
            raise CheckpointError(f"missing tensor {layout.names.key(plain)!r}, which says what the residual holds")
        del unread[part], unread[residual_part]
        branch, residual = ([int(i) for i in index] for index in (out, kept[residual_part]))
        order = list(set(branch + residual))
        for buffer, members in zip(INDEX_BUFFERS, (set(branch), set(residual)), strict=True):
            positions = [position for position, index in enumerate(order) if index in members]
            key = layout.form.names.key(Part("add", part.stage, part.block, buffer))
            indices[key] = np.asarray(positions, dtype=np.int64)
    return indices, {layout.names.key(part): index for part, index in unread.items()}


def _check_values(tensors: Mapping[str, np.ndarray], original: Mapping[str, str]) -> None:
    """Refuse weights that are not finite and variances that are negative."""
    bad = {key: int(np.sum(~np.isfinite(v))) for key, v in tensors.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    bad = {key: count for key, count in bad.items() if count}
    if bad:
        raise CheckpointError(
            f"{sum(bad.values())} weights in {len(bad)} tensors are not finite; the first is in "
            f"{original[next(iter(bad))]!r}"
        )
    for key, value in tensors.items():
        if key.endswith(".running_var") and jnp.issubdtype(value.dtype, jnp.floating) and (value < 0).any():
            raise CheckpointError(f"{original[key]}: {int((value < 0).sum())} of its variances are negative")


def _check_indices(spec: Spec, indices: Mapping[str, np.ndarray]) -> None:
    for place, block in sums(spec):
        for buffer in INDEX_BUFFERS:
            key = FORMS[spec.form].names.key(Part("add", *place, buffer))
            index = indices.get(key, np.arange(0))
            if np.unique(index).size != index.size or np.any((index < 0) | (index >= block.outputs)):
                raise CheckpointError(f"{key}: expected distinct positions below {block.outputs}")


def _convert(key: str, value: np.ndarray, dtype: Any) -> jax.Array:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise CheckpointError(f"{key}: expected floating-point weights, found {value.dtype}")
    if dtype is None:
        keep_double = value.dtype == np.float64 and jax.config.read("jax_enable_x64")
        dtype = jnp.float64 if keep_double else jnp.float32
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(to_flax_axes(value)).astype(dtype)
    beyond = int(np.sum(~np.isfinite(converted)))
    if beyond:
        raise CheckpointError(f"{key}: {beyond} of its {value.dtype} weights are beyond the range of {converted.dtype}")
    return jnp.asarray(converted)


def _put(tree: dict[str, Any], path: str, value: jax.Array) -> None:
    *parents, leaf = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def _shortcut(spec: Spec) -> str:
    blocks = [block for _, block in sums(spec)]
    if any(block.indexed for block in blocks):
        return "indexed"
    if not isinstance(spec, ResidualSpec):
        return "none"
    blocks = [block for stage in spec.blocks for block in stage]
    return "B" if any(block.shortcut is not None for block in blocks) else "A"


def linen_model(spec: Spec) -> Any:
    """The `ehap_jax.models` network with these widths, or None where it has a form of its own."""
    if isinstance(spec, InvertedSpec | ViTSpec):
        return None
    return _vgg_model(spec) if isinstance(spec, VGGSpec) else _residual_model(spec)


def _vgg_model(spec: VGGSpec) -> VGG | None:
    form = FORMS[spec.form]
    uniform = [width for width, count in zip(spec.stage_widths, form.stages, strict=True) for _ in range(count)]
    if form not in VGGS.values() or uniform != list(spec.widths) or spec.grid != 1:
        return None
    return VGG(spec.depth, spec.num_classes, spec.stage_widths, spec.hidden, spec.conv_bias)


def _residual_model(spec: ResidualSpec) -> Any:
    widths, form = spec.stage_widths, FORMS[spec.form]
    inner = [stage[0].widths[0] for stage in spec.blocks]
    shapes_change = [block.stride != 1 or block.inputs != block.outputs for stage in spec.blocks for block in stage]
    projected = [block.shortcut is not None for stage in spec.blocks for block in stage]
    for width, middle, stage in zip(widths, inner, spec.blocks, strict=True):
        for block in stage:
            if (
                block.indexed
                or block.outputs != width
                or block.widths != (middle,) * (len(block.widths) - 1) + (width,)
            ):
                return None
    if len(widths) != 3 or len({len(stage) for stage in spec.blocks}) != 1 or spec.conv_bias or spec.stem_size != 3:
        return None
    if form is RESNET and inner == list(widths) and (projected == shapes_change or not any(projected)):
        shortcut = "B" if any(projected) else "A"
        stem = None if spec.stem == widths[0] else spec.stem
        return ResNet(spec.layers, spec.num_classes, shortcut=shortcut, widths=widths, stem=stem)
    if projected != shapes_change:
        return None
    if form is WIDE and inner == list(widths) and spec.stem == 16:
        widen = widths[0] // 16
        if widths == (16 * widen, 32 * widen, 64 * widen):
            return WideResNet(spec.depth, widen, spec.num_classes)
    if form is PRERESNET:
        expansion = widths[0] // inner[0]
        if widths == tuple(expansion * width for width in inner):
            return PreResNet(spec.depth, spec.num_classes, spec.stem, tuple(inner), expansion)
    return None
