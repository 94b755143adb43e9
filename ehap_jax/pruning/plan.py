"""A pruning decision as data: which output channels every kernel keeps. A small JSON file, never code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax._untrusted_files import read_json, shown
from ehap_jax._whole_files import write_json
from ehap_jax.graph.architecture import architecture_fingerprint
from ehap_jax.graph.channels import channel_structure
from ehap_jax.graph.structure import Coupling
from ehap_jax.graph.trace import Graph
from ehap_jax.pruning.implant import Implant, Layout, find_implants

FORMAT = "ehap_jax.pruning_plan"
VERSION = 2
_LONGEST = 2**24
"""Axes of saved plans are no longer: what follows from a shape takes memory, and its number little."""


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What a network keeps.

    keep: kernel path -> kept output indices, sorted; kernels that keep all their outputs are left out.
    slices: variable path -> {axis: kept indices}, for every variable that gets smaller, ``keep`` included.
    shapes: full shape of every variable of the network that the plan is for.
    axes: kernel path -> its output axis. coupling: "group" or "union" (see ``channel_groups``).
    provenance: free text and numbers on how the plan came about (criterion, targets, costs).
    implants: kernel path -> those of its kept channels that keep only a 1×1 kernel (:class:`Implant`).
    fingerprint: of the architecture, "" for none; :meth:`check` compares. versions: of the packages that made the plan.

    Plans are equal that do the same to the same network, however they came about.
    """

    keep: Mapping[str, np.ndarray]
    slices: Mapping[str, Mapping[int, np.ndarray]]
    shapes: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, int]
    coupling: Coupling = "group"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    implants: Mapping[str, Implant] = field(default_factory=dict)
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return self._decision == other._decision if isinstance(other, PruningPlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._decision)

    @cached_property
    def _decision(self) -> tuple[Any, ...]:
        """All but provenance and versions, as values that compare and hash."""
        shapes = tuple(sorted((path, tuple(shape)) for path, shape in self.shapes.items()))
        slices = tuple(
            sorted((path, axis, tuple(kept.tolist())) for path, by in self.slices.items() for axis, kept in by.items())
        )
        keep = tuple(sorted((path, tuple(kept.tolist())) for path, kept in self.keep.items()))
        implants = tuple(
            sorted(
                (path, tuple(implant.channels.tolist()), tuple(sorted(implant.centre.items())))
                for path, implant in self.implants.items()
            )
        )
        axes = tuple(sorted(self.axes.items()))
        return (self.coupling, self.fingerprint, shapes, axes, keep, slices, implants)

    @classmethod
    def from_keep(
        cls,
        graph: Graph,
        keep: Mapping[str, Sequence[int] | np.ndarray],
        *,
        coupling: Coupling = "group",
        implants: Mapping[str, Sequence[int] | np.ndarray] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """The plan that keeps the output channels ``keep`` of the kernels it names and all of the others.

        ``implants`` are those of the kept channels, by kernel, that are reduced to a 1×1 kernel.

        Raises KeyError for a path that is no kernel of ``graph``, ValueError for indices out of range, a kernel left
        with nothing, channels that the network ties together and ``keep`` does not, or implants in a kernel that
        cannot hold them (no centre tap, a grouped convolution, something else that reads it).
        """
        structure = channel_structure(graph, coupling)
        checked: dict[str, np.ndarray] = {}
        for path, indices in keep.items():
            if path not in structure.kernel_axes:
                known = ", ".join(sorted(structure.kernel_axes))
                raise KeyError(f"{path!r} is not a conv or dense kernel of this network; its kernels are: {known}.")
            size = graph.leaves[path].shape[structure.kernel_axes[path]]
            kept = np.unique(_indices(indices, path))
            if not len(kept):
                raise ValueError(f"{path} would keep no channel at all; keep at least one.")
            if kept[0] < 0 or kept[-1] >= size:
                wrong = kept[0] if kept[0] < 0 else kept[-1]
                raise ValueError(f"{path} has output channels 0 to {size - 1}, but the plan keeps {wrong}.")
            if len(kept) < size:
                checked[path] = kept
        alive = structure.alive(checked)

        def kept_channels(path: str) -> np.ndarray:
            return checked.get(path, np.arange(graph.leaves[path].shape[structure.kernel_axes[path]]))

        placed = {path: _indices(channels, path) for path, channels in (implants or {}).items()}
        return cls(
            keep=checked,
            slices=structure.kept_slices(alive),
            shapes={path: tuple(value.shape) for path, value in graph.leaves.items()},
            axes=dict(structure.kernel_axes),
            coupling=coupling,
            provenance=dict(provenance or {}),
            implants=find_implants(graph, placed, kept_channels),
            fingerprint=architecture_fingerprint(graph),
            versions={name: version(name) for name in ("ehap-jax", "jax")},
        )

    def check(self, graph: Graph) -> None:
        """Raise ValueError unless the plan is for the architecture of ``graph``, naming the first difference."""
        shapes = {path: tuple(value.shape) for path, value in graph.leaves.items()}
        for path in sorted({*shapes, *self.shapes}):
            ours, theirs = shapes.get(path, "no such variable"), self.shapes.get(path, "no such variable")
            if ours != theirs:
                raise ValueError(f"the plan is for another network: {path} is {theirs} there and {ours} in this one.")
        if self.fingerprint != architecture_fingerprint(graph):
            raise ValueError(
                f"the plan is for a network of the same variables that ties their channels in another way: its "
                f"fingerprint is {self.fingerprint or 'missing'}, this network's {architecture_fingerprint(graph)}."
            )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the plan as JSON (whole or not at all). Raises FileExistsError rather than overwrite."""
        target = Path(path)
        if target.exists():
            raise FileExistsError(f"{target} exists; remove it or save the plan under another name.")
        write_json(target, self.document())
        return target

    def document(self) -> dict[str, Any]:
        """The plan in JSON's types, as it is saved."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "versions": dict(self.versions),
            "fingerprint": self.fingerprint,
            "coupling": self.coupling,
            "keep": {p: kept.tolist() for p, kept in self.keep.items()},
            "slices": {p: {str(a): kept.tolist() for a, kept in s.items()} for p, s in self.slices.items()},
            "implants": {
                p: {"channels": i.channels.tolist(), "centre": {str(a): n for a, n in i.centre.items()}}
                for p, i in self.implants.items()
            },
            "axes": dict(self.axes),
            "shapes": {p: list(shape) for p, shape in self.shapes.items()},
            "provenance": dict(self.provenance),
        }

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningPlan:
        """Read a plan. Raises ValueError where the file is not a well-formed plan, naming the field."""
        document = read_json(path)
        if document.get("format") != FORMAT:
            raise ValueError(f'{path} is not a pruning plan: "format" is not {FORMAT!r}.')
        if document.get("version") != VERSION:
            raise ValueError(f"{path} has plan version {shown(document.get('version'))}; this library reads {VERSION}.")
        if document.get("coupling") not in ("group", "union"):
            raise ValueError(f'{path}: "coupling" must be "group" or "union".')
        try:
            shapes = {p: tuple(_whole(n, p) for n in shape) for p, shape in document["shapes"].items()}
            plan = cls(
                keep={p: _indices(kept, p) for p, kept in document["keep"].items()},
                slices={p: {int(a): _indices(kept, p) for a, kept in s.items()} for p, s in document["slices"].items()},
                shapes=shapes,
                axes={p: _whole(a, p) for p, a in document["axes"].items()},
                coupling=document["coupling"],
                provenance=dict(document.get("provenance", {}).items()),
                implants={
                    p: Implant(_indices(i["channels"], p), {int(a): _whole(n, p) for a, n in i["centre"].items()})
                    for p, i in document["implants"].items()
                },
                fingerprint=str(document["fingerprint"]),
                versions={str(name): str(number) for name, number in document["versions"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is not a well-formed pruning plan: {type(error).__name__}: {error}.") from error
        plan._check_indices(path)
        return plan

    def _check_indices(self, source) -> None:
        entries = [(p, a, kept) for p, s in self.slices.items() for a, kept in s.items()]
        for path, axis in self.axes.items():
            if not 0 <= axis < len(self.shapes.get(path, ())):
                raise ValueError(f"{source}: the output axis {axis} of {path} does not fit the plan's own shapes.")
            cut = self.slices.get(path, {}).get(axis)
            # What the output axis keeps stands in both, or in neither.
            if not np.array_equal([] if cut is None else cut, self.keep.get(path, [])):
                raise ValueError(f'{source}: "keep" and "slices" disagree on the output channels of {path}.')
        unknown = sorted({*self.keep, *self.implants} - self.axes.keys())
        if unknown:
            raise ValueError(f'{source}: "axes" has no output axis of {unknown[0]}.')
        for path, shape in self.shapes.items():
            if not all(0 <= length <= _LONGEST for length in shape):
                raise ValueError(f"{source}: {path} has the shape {shape}; an axis has {_LONGEST:,} indices at most.")
        for path, axis, kept in entries:
            shape = self.shapes.get(path)
            if shape is None or not 0 <= axis < len(shape):
                raise ValueError(f"{source}: {path} axis {axis} does not fit the plan's own shapes.")
            if not len(kept) or kept[0] < 0 or kept[-1] >= shape[axis] or (np.diff(kept) <= 0).any():
                raise ValueError(f"{source}: {path} axis {axis}: indices must ascend within 0 to {shape[axis] - 1}.")

        for path, implant in self.implants.items():
            shape, axis, found = self.shapes.get(path, ()), self.axes.get(path, -1), implant.channels
            if not 0 <= axis < len(shape) or not len(found) or (np.diff(found) <= 0).any():
                raise ValueError(f"{source}: implants of {path} must be ascending channels of a kernel.")
            absent = np.setdiff1d(found, self.layout(path).kept)
            if len(absent):
                raise ValueError(f"{source}: {path} has an implant at channel {absent[0]}, which it does not keep.")
            fits = all(0 <= a < len(shape) and a != axis and 2 * n + 1 == shape[a] for a, n in implant.centre.items())
            if not fits or not implant.centre:
                raise ValueError(f"{source}: the implants of {path} are not at the centre of a kernel of {shape}.")

    def shrunk_shape(self, path: str) -> tuple[int, ...]:
        """Shape of a variable once its pruned slices are gone (in one piece; see :meth:`shrunk_shapes`)."""
        slices = self.slices.get(path, {})
        return tuple(len(slices[a]) if a in slices else n for a, n in enumerate(self.shapes[path]))

    def shrunk_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every shrunk variable; a kernel with implants is two, ``…/spatial`` and ``…/pointwise``."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.shapes:
            whole = self.shrunk_shape(path)
            parts = self.layout(path).shapes(whole) if path in self.implants else None
            shapes.update({path: whole} if parts is None else {f"{path}/{name}": s for name, s in parts.items()})
        return shapes

    def layout(self, path: str) -> Layout:
        """Where the implants of a kernel lie among the channels it keeps."""
        axis = self.axes[path]
        kept = self.slices.get(path, {}).get(axis)
        return Layout(axis, np.arange(self.shapes[path][axis]) if kept is None else kept, self.implants[path])


def _whole(given, path: str) -> int:
    if type(given) is not int:
        raise ValueError(f"{path}: {shown(given)} is not a whole number")
    return given


def _indices(given, path: str) -> np.ndarray:
    array = np.asarray(given)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{path}: channels to keep must be a list of integers, got {shown(given)}.")
    return array.astype(np.int64)


def check_fits(variables, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise unless ``variables`` has exactly the paths and shapes given (KeyError and ValueError, naming the path)."""
    found = {path_name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or extra:
        raise KeyError(
            f"these variables are not those of the {what}: missing {missing[:5] or 'nothing'}, "
            f"unexpected {extra[:5] or 'nothing'}."
        )
    for path, shape in shapes.items():
        if found[path] != tuple(shape):
            raise ValueError(f"{path} has shape {found[path]}, but the {what} is for shape {tuple(shape)}.")
