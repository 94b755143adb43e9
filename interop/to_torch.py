"""JAX variables into a PyTorch state dict that `interop.torch_models` loads strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from interop.layouts import (
    AKAMASTER,
    INDEX_BUFFERS,
    LAYOUTS,
    CheckpointError,
    Layout,
    Part,
    flax_part,
    flax_path,
    to_torch_axes,
)
from interop.spec import read_spec


def to_torch(
    variables: Any,
    plan: Any = None,
    *,
    indices: Mapping[str, np.ndarray] | None = None,
    layout: str = "akamaster",
) -> dict[str, Any]:
    """Write a residual network's variables as a PyTorch state dict.

    Args:
        variables: {"params": …, "batch_stats": …} with the paths of `ehap_jax.models`: dense, masked, or already
            shrunk (`shrink_variables`).
        plan: the `PruningPlan` that shrunk the variables; None for dense and masked ones. With it, residual sums
            whose operands keep different channels get the buffers `branch_index` and `residual_index`.
        indices: index buffers of a network that was pruned elsewhere (`info.indices` of `from_torch`); not with a plan.
        layout: the names to write, one of `interop.layouts.LAYOUTS`; index buffers exist only in "akamaster".

    Returns:
        key -> CPU torch tensor, in module order, bit for bit the values of `variables`. `num_batches_tracked` is not
        written; strict loading fills it in.

    Raises:
        KeyError: an unknown layout.
        CheckpointError: variables that are not such a network (lists the paths), a plan that does not fit their
            shapes (path, expected, found), or sums by index in a layout that has no place for them.
        ImportError: PyTorch is not installed.

    Example:
        >>> from interop.from_torch import from_torch
        >>> from interop.torch_models import cifar_resnet
        >>> weights = cifar_resnet(8, widths=(4, 8, 16)).state_dict()
        >>> again = to_torch(from_torch(weights)[1])
        >>> all(bool((again[key] == weights[key]).all()) for key in again)
        True
    """
    if layout not in LAYOUTS:
        raise KeyError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    target = LAYOUTS[layout]
    arrays = canonical_arrays(variables)
    if plan is not None and indices:
        raise CheckpointError("pass a plan or indices, not both: each says where the channels of a sum lie")
    arrays |= dict(indices or {}) if plan is None else residual_indices(arrays, plan)
    read_spec({key: value.shape for key, value in arrays.items()})
    try:
        import torch
    except ImportError as error:
        raise ImportError("to_torch needs PyTorch: pip install 'ehap-jax[torch]'") from error
    state_dict = {}
    for key in sorted(arrays, key=_module_order):
        value = np.array(arrays[key], order="C")
        if value.dtype.name == "bfloat16":
            tensor = torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(value)
        state_dict[_rename(key, target)] = tensor
    return state_dict


def canonical_arrays(variables: Any) -> dict[str, np.ndarray]:
    """Variables as NumPy arrays with PyTorch's axes under akamaster's names.

    Raises:
        CheckpointError: paths that name no part of a residual network.
    """
    arrays: dict[str, np.ndarray] = {}
    strange = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        part = flax_part(name)
        if part is None:
            strange.append(name)
        else:
            arrays[AKAMASTER.key(part)] = to_torch_axes(np.asarray(leaf))
    if strange or not arrays:
        listed = ", ".join(strange[:8]) or "no variables at all"
        raise CheckpointError(
            f"these variables are not a residual network of ehap_jax.models: {len(arrays)} paths matched, "
            f"{len(strange)} did not ({listed})"
        )
    return arrays


def residual_indices(arrays: Mapping[str, np.ndarray], plan: Any) -> dict[str, np.ndarray]:
    """Index buffers of a shrunk network: where each operand's kept channels lie in each residual sum.

    What a kernel keeps of its outputs, and what the consumer of a sum keeps of its inputs, is read from the plan. A
    sum whose operands both hold exactly what its consumer reads needs no buffers. Option A's zero padding shifts the
    channels of the shortcut by half the widening.

    Raises:
        CheckpointError: variables whose shapes are not those the plan leaves, or a plan that keeps a channel of an
            operand which the consumer of the sum does not read.
    """
    parts = [AKAMASTER.part(key) for key in arrays]
    places = sorted((part.stage, part.block) for part in parts if part is not None and part.role == "conv1")
    stem = Part("stem_conv", 0, 0, "weight")
    stream, dense = _kept(arrays, plan, stem, 0), _full_width(arrays, plan, stem)
    buffers: dict[str, np.ndarray] = {}
    for here, after in zip(places, [*places[1:], None], strict=True):
        conv2 = Part("conv2", *here, "weight")
        projection = Part("shortcut_conv", *here, "weight")
        consumer = Part("linear", 0, 0, "weight") if after is None else Part("conv1", *after, "weight")
        branch, widened = _kept(arrays, plan, conv2, 0), _full_width(arrays, plan, conv2)
        if AKAMASTER.key(projection) in arrays:
            residual = _kept(arrays, plan, projection, 0)
        else:
            residual = stream + (widened - dense) // 2
        stream, dense = _kept(arrays, plan, consumer, 1), widened
        for part, operand in ((conv2, branch), (projection, residual)):
            lost = np.setdiff1d(operand, stream)
            if lost.size:
                raise CheckpointError(
                    f"the plan keeps channel {lost[0]} of {AKAMASTER.module(*part[:3])}, which "
                    f"{flax_path(consumer)} does not read"
                )
        if branch.size != stream.size or residual.size != stream.size:
            for buffer, operand in zip(INDEX_BUFFERS, (branch, residual), strict=True):
                buffers[AKAMASTER.key(Part("add", *here, buffer))] = np.searchsorted(stream, operand)
    return buffers


def _kept(arrays: Mapping[str, np.ndarray], plan: Any, part: Part, torch_axis: int) -> np.ndarray:
    """Kept indices along axis 0 (outputs) or 1 (inputs) of a kernel with PyTorch's axes."""
    path, array = flax_path(part), arrays[AKAMASTER.key(part)]
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


def _full_width(arrays: Mapping[str, np.ndarray], plan: Any, part: Part) -> int:
    path = flax_path(part)
    return int(plan.shapes[path][-1]) if path in plan.shapes else arrays[AKAMASTER.key(part)].shape[0]


def _rename(key: str, target: Layout) -> str:
    part = AKAMASTER.part(key)
    assert part is not None
    if part.role not in target.modules:
        raise CheckpointError(f"the layout {target.name!r} has no place for {key}; write 'akamaster' names instead")
    return target.key(part)


_ORDER = ("conv1", "bn1", "conv2", "bn2", "shortcut_conv", "shortcut_bn", "add")
_LEAF_ORDER = ("weight", "bias", "running_mean", "running_var", *INDEX_BUFFERS)


def _module_order(key: str) -> tuple[int, ...]:
    part = AKAMASTER.part(key)
    assert part is not None
    outside = {"stem_conv": (0, 0), "stem_bn": (0, 1), "linear": (1_000_000, 0)}
    stage, role = outside.get(part.role, (part.stage, _ORDER.index(part.role) if part.role in _ORDER else 0))
    return (stage, part.block, role, _LEAF_ORDER.index(part.leaf))
