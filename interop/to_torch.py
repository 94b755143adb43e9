"""JAX variables into a PyTorch state dict that `interop.torch_models` loads strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ehap_jax._paths import path_name
from interop.forms import (
    FORMS,
    INDEX_BUFFERS,
    INVERTED_BLOCKS,
    CheckpointError,
    Form,
    Part,
    kind_of,
    recognise_variables,
    to_torch_axes,
)
from interop.layouts import layout_for, written_layout
from interop.spec import HEAD_WIDTH, ResidualSpec, Spec, read_spec


def to_torch(
    variables: Any,
    plan: Any = None,
    *,
    indices: Mapping[str, np.ndarray] | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """Write the variables of a residual network or a VGG as a PyTorch state dict.

    Args:
        variables: {"params": …, "batch_stats": …} with the paths of `ehap_jax.models`: dense, masked, or already
            shrunk (`shrink_variables`).
        plan: the `PruningPlan` that shrunk the variables; None for dense and masked ones. With it, residual sums
            whose operands keep different channels get the buffers `branch_index` and `residual_index`.
        indices: index buffers of a network that was pruned elsewhere (`info.indices` of `from_torch`); not with a plan.
            Given, if only as {}, they say that shortcuts without them are padded by half of the zeros on each side.
        layout: the names to write, one of `interop.layouts.LAYOUTS`; None for those `interop.torch_models` loads
            (akamaster's for CIFAR ResNets), which have a place for index buffers. Under "ehap" and "hap", pruned
            networks get `in_indices` and `out_indices` of every layer: buffers for EHAP's loader, attributes of HAP's
            modules. They number the channels of each sum and not of the dense network, so that the `list(set(...))` of
            that code yields them in the order of the weights.

    Returns:
        key -> CPU torch tensor, in module order, bit for bit the values of `variables`. `num_batches_tracked` is not
        written; strict loading fills it in.

    Shrunk variables without their plan are another network: where the channels of a sum lie is not in the shapes. Such
    are refused where the shapes show it, that is, where a shortcut is padded and the widths are no dense network's
    (one width per stage, each a whole multiple of the one before). What cannot be detected: option A shrunk to just
    such widths, and sums whose operands kept as many channels as each other, but not the same ones (union coupling).

    Raises:
        KeyError: an unknown layout.
        CheckpointError: variables that are not such a network (lists the paths), a layout without names for it, a plan
            that does not fit their shapes (path, expected, found) or has implants, shrunk variables without their
            plan, or a network that the layout's code has not: sums by index, or shortcuts that are padded.
        ImportError: PyTorch is not installed.

    Example:
        >>> from interop.from_torch import from_torch
        >>> from interop.torch_models import cifar_resnet
        >>> weights = cifar_resnet(8, widths=(4, 8, 16)).state_dict()
        >>> again = to_torch(from_torch(weights)[1])
        >>> all(bool((again[key] == weights[key]).all()) for key in again)
        True
    """
    form = form_of(variables)
    table = layout_for(written_layout(form) if layout is None else layout, form)
    arrays = named_arrays(variables, form)
    if plan is not None and indices:
        raise CheckpointError("pass a plan or indices, not both: each says where the channels of a sum lie")
    buffers = dict(indices or {}) if plan is None else residual_indices(form, arrays, plan)
    spec = read_spec(form, {key: value.shape for key, value in (arrays | buffers).items()})
    pruned = plan is not None or indices is not None
    if not pruned:
        _check_unpruned(spec)
    if not table.padded:
        _check_unpadded(spec, table.name)
    try:
        import torch
    except ImportError as error:
        raise ImportError("to_torch needs PyTorch: pip install 'ehap-jax[torch]'") from error
    state_dict = {}
    parts, sums = (
        {part: value for key, value in named.items() if (part := form.names.part(key))} for named in (arrays, buffers)
    )
    parts |= kept_indices(spec, parts, sums) if table.index_leaves and pruned else sums
    for part in sorted(parts, key=form.order):
        value = np.array(parts[part], order="C")
        if value.dtype.name == "bfloat16":
            tensor = torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(value)
        if part.role not in table.names.modules:
            raise CheckpointError(
                f"the layout {layout!r} has no place for {form.names.key(part)}; leave layout out to write it"
            )
        state_dict[table.names.key(part)] = tensor
    return state_dict


def _check_unpruned(spec: Spec) -> None:
    """Refuse a padded shortcut between widths that no dense network has: half on each side would be a guess."""
    if not isinstance(spec, ResidualSpec):
        return
    padded = [b for stage in spec.blocks for b in stage if b.shortcut is None and b.inputs != b.outputs]
    for stage in spec.blocks:
        bottleneck = len(stage[0].widths) > 2
        inner = stage[0].widths[0] if bottleneck else stage[0].outputs
        dense = all({*b.widths[:-1]} == {inner} and b.outputs == stage[0].outputs for b in stage)
        if padded and not (dense and all(b.outputs % b.inputs == 0 for b in padded)):
            raise CheckpointError(
                f"zeros are added to a shortcut of {padded[0].inputs} channels to make {padded[0].outputs}, and "
                "widths such as these come of pruning, so that only the plan knows where: pass the plan that shrunk "
                "them, to_torch(shrunk, plan), or indices={} where half of the zeros go on each side"
            )


def _check_unpadded(spec: Spec, layout: str) -> None:
    for number, stage in enumerate(spec.blocks if isinstance(spec, ResidualSpec) else (), start=1):
        for position, block in enumerate(stage):
            if block.shortcut is None and (block.stride > 1 or (block.inputs != block.outputs and not block.indexed)):
                raise CheckpointError(
                    f"the code of the layout {layout!r} has a 1×1 convolution on every shortcut that changes shape; "
                    f"block {position} of stage {number} pads its shortcut with zeros (shortcut A)"
                )


def kept_indices(
    spec: Spec, arrays: Mapping[Part, np.ndarray], sums: Mapping[Part, np.ndarray]
) -> dict[Part, np.ndarray]:
    """`in_indices` and `out_indices` of every layer, such that EHAP's and HAP's code adds the channels meant by `sums`.

    That code joins the out_indices of a block's last convolution with those of its shortcut's (or with the in_indices
    of its first one), and takes their union, in the order of a Python set, for the channels of the sum. Positions in
    the sum are such numbers; as they are 0, 1, …, the set is in order.

    Raises:
        CheckpointError: a sum with a channel that neither operand has, which that code cannot express.
    """
    form, kept = FORMS[spec.form], {}
    for part, value in arrays.items():
        if part.leaf == "weight" and kind_of(part.role) in ("conv", "dense"):
            for axis, leaf in ((0, "out_indices"), (1, "in_indices")):
                kept[part._replace(leaf=leaf)] = np.arange(value.shape[axis], dtype=np.int32)
    for part, branch in sums.items():
        if part.leaf != INDEX_BUFFERS[0] or not isinstance(spec, ResidualSpec):
            continue
        residual = sums[part._replace(leaf=INDEX_BUFFERS[1])]
        if np.union1d(branch, residual).size != spec.blocks[part.stage - 1][part.block].outputs:
            raise CheckpointError(f"{form.names.module(*part[:3])}: its sum has channels that neither operand has")
        shortcut = part._replace(role=form.shortcut, leaf="out_indices")
        receiver = shortcut if shortcut in kept else part._replace(role="conv1", leaf="in_indices")
        kept[part._replace(role=f"conv{len(form.kernels)}", leaf="out_indices")] = branch.astype(np.int32)
        kept[receiver] = residual.astype(np.int32)
    return kept


def form_of(variables: Any) -> Form:
    """The kind of network these variables are.

    Raises:
        CheckpointError: they are none that interop knows, or have implants.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    split = sorted(path for path in paths if path.endswith(("/kernel/spatial", "/kernel/pointwise")))
    if split:
        raise CheckpointError(
            f"{split[0].rpartition('/')[0]} has implants (a 1×1 part beside its kernel), which no PyTorch layout has a "
            "place for; export the masked network instead: to_torch(mask_variables(variables, plan))"
        )
    return recognise_variables(paths)


def named_arrays(variables: Any, form: Form) -> dict[str, np.ndarray]:
    """Variables, or a part of them, as NumPy arrays with PyTorch's axes under the form's own names.

    Raises:
        KeyError: a path that is no part of such a network.
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {form.key_at(path_name(path)): to_torch_axes(np.asarray(leaf)) for path, leaf in leaves}


def residual_indices(form: Form, arrays: Mapping[str, np.ndarray], plan: Any) -> dict[str, np.ndarray]:
    """Index buffers of a shrunk network: where each operand's kept channels lie in each residual sum.

    What a kernel keeps of its outputs, and what the consumer of a sum keeps of its inputs, is read from the plan. A
    sum whose operands both hold exactly what its consumer reads needs no buffers. Option A's zero padding shifts the
    channels of the shortcut by half the widening.

    Raises:
        CheckpointError: variables whose shapes are not those the plan leaves, or a plan that keeps a channel of an
            operand which the consumer of the sum does not read.
    """
    parts = [part for key in arrays if (part := form.names.part(key)) is not None]
    for part in parts:
        if part.leaf == "weight" and kind_of(part.role) in ("conv", "dense"):
            for axis in (0, 1):
                _kept(form, arrays, plan, part, axis)
    if form.kind == "vit":
        _check_transformer(form, arrays, plan, parts)
    if form.kind in ("vgg", "vit"):
        return {}
    inverted = form.kind == "inverted"
    first, final_role = ("expand_conv", "project_conv") if inverted else ("conv1", f"conv{len(form.kernels)}")
    places = sorted((part.stage, part.block) for part in parts if part.role == first and part.leaf == "weight")
    last = Part("last_conv" if inverted else "linear", 0, 0, "weight")
    entry = Part("first_project_conv" if inverted else "stem_conv", 0, 0, "weight")
    stream, dense = _kept(form, arrays, plan, entry, 0), _full_width(form, arrays, plan, entry)
    buffers: dict[str, np.ndarray] = {}
    for here, after in zip(places, [*places[1:], None], strict=True):
        final = Part(final_role, *here, "weight")
        consumer = last if after is None else Part(first, *after, "weight")
        branch, widened = _kept(form, arrays, plan, final, 0), _full_width(form, arrays, plan, final)
        operands = [(final, branch)]
        if not inverted:
            shortcut = Part(form.shortcut, *here, "weight")
            projected = form.names.key(shortcut) in arrays
            shifted = _kept(form, arrays, plan, shortcut, 0) if projected else stream + (widened - dense) // 2
            operands.append((shortcut, shifted))
        elif INVERTED_BLOCKS[here[1]][1]:
            operands.append((entry, stream))
        stream, dense = _kept(form, arrays, plan, consumer, 1), widened
        for part, operand in operands:
            lost = np.setdiff1d(operand, stream)
            if lost.size:
                raise CheckpointError(
                    f"the plan keeps channel {lost[0]} of {form.names.module(*part[:3])}, which "
                    f"{form.path(consumer)} does not read"
                )
        if len(operands) == 2 and any(operand.size != stream.size for _, operand in operands):
            for buffer, (_, operand) in zip(INDEX_BUFFERS, operands, strict=True):
                buffers[form.names.key(Part("add", *here, buffer))] = np.searchsorted(stream, operand)
    return buffers


def _check_transformer(form: Form, arrays: Mapping[str, np.ndarray], plan: Any, parts: list[Part]) -> None:
    """Refuse what the tensors of a transformer cannot say: parts of heads, and sums whose operands differ."""
    for part in parts:
        if part.leaf == "weight" and part.role in ("qkv", "attention_out", "fc2"):
            kept, full = _kept(form, arrays, plan, part, 0), _full_width(form, arrays, plan, part)
            each = np.bincount(kept // HEAD_WIDTH, minlength=full // HEAD_WIDTH)
            if not np.isin(each, (0, HEAD_WIDTH)).all() or (part.role != "qkv" and kept.size < full):
                raise CheckpointError(
                    f"the plan keeps {kept.size} of {full} outputs of {form.path(part)}; a transformer's names have a "
                    "place for whole heads, and for sums of equal operands (coupling group). Export the masked network "
                    "instead: to_torch(mask_variables(variables, plan))"
                )


def _kept(form: Form, arrays: Mapping[str, np.ndarray], plan: Any, part: Part, torch_axis: int) -> np.ndarray:
    """Kept indices along axis 0 (outputs) or 1 (inputs) of a kernel with PyTorch's axes."""
    path, array = form.path(part), arrays[form.names.key(part)]
    flax_axis = array.ndim - 1 - torch_axis
    found = array.shape[torch_axis]
    kept = plan.slices.get(path, {}).get(flax_axis)
    full = plan.shapes[path][flax_axis] if path in plan.shapes else found
    kept = np.arange(full) if kept is None else np.asarray(kept)
    if kept.size != found:
        raise CheckpointError(
            f"{path}, axis {flax_axis}: the plan leaves {kept.size} channels, found {found}; pass "
            "shrink_variables(variables, plan) with the plan that shrunk them"
        )
    return kept


def _full_width(form: Form, arrays: Mapping[str, np.ndarray], plan: Any, part: Part) -> int:
    path = form.path(part)
    return int(plan.shapes[path][-1]) if path in plan.shapes else arrays[form.names.key(part)].shape[0]
