"""The network a recipe starts from: a PyTorch checkpoint, or the run directory of an earlier recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ehap_jax._nearest import nearest_path
from ehap_jax._paths import path_name
from ehap_jax._untrusted_files import read_json, shown
from ehap_jax.data import Dataset, Normalisation, limit_training, load_dataset
from ehap_jax.graph import Graph, trace_graph
from ehap_jax.models import (
    VGG,
    PreResNet,
    ResNet,
    WideResNet,
    eval_apply,
    init_variables,
    make_model,
    train_apply,
)
from ehap_jax.pruning import PruningPlan, shrink
from ehap_jax.pruning.plan import check_fits
from ehap_jax.training import RunDirectory, check_finite, load_variables, save_variables

DESCRIPTION, VARIABLES, PLAN = "network.json", "network.npz", "plan.json"


@dataclass(frozen=True)
class Architecture:
    """What to build: `make_model(model, num_classes, **options)` for images of one shape, normalised one way."""

    model: str
    num_classes: int
    image_shape: tuple[int, int, int]
    normalisation: Normalisation
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The Linen module.

        Raises:
            ValueError: no such model, or one that lacks an option.
        """
        try:
            return make_model(self.model, self.num_classes, **self.options)
        except TypeError as error:
            given = ", ".join(f"--{name}" for name in self.options)
            raise ValueError(f"{self.model} does not take {given} ({error}); --shortcut None --widths None") from error

    def initialise(self, seed: int) -> dict[str, Any]:
        """Fresh variables."""
        return init_variables(self.build(), jax.random.key(seed), self.image_shape)


class Network(NamedTuple):
    """A network with its weights, whole or shrunk.

    apply: ``apply(variables, x) -> logits`` in eval mode; train_apply: ``-> (logits, updates)``.
    plan: what has been pruned away, or None.
    """

    architecture: Architecture
    apply: Callable
    train_apply: Callable
    variables: dict[str, Any]
    plan: PruningPlan | None = None

    def graph(self) -> Graph:
        """Its structure."""
        return trace_graph(self.apply)(self.variables, jnp.zeros((1, *self.architecture.image_shape)))


def new_network(architecture: Architecture, seed: int) -> Network:
    """A freshly initialised one."""
    model = architecture.build()
    return Network(architecture, eval_apply(model), train_apply(model), architecture.initialise(seed))


def network_for(dataset: Dataset, model: str, seed: int = 0, **options: Any) -> Network:
    """A freshly initialised network for a data set; options that are None are left to the model."""
    given = {name: value for name, value in options.items() if value is not None}
    described = Architecture(model, dataset.num_classes, dataset.image_shape, (dataset.mean, dataset.std), given)
    return new_network(described, seed)


def load_data(network: Network, source: str, train_images: int | None = None) -> Dataset:
    """The data set `source` (see `load_dataset`), normalised as the network expects it.

    Args:
        network: that reads it.
        source: its name.
        train_images: take only so many for training; None takes all.

    Raises:
        ValueError: it has other classes or images of another shape than the network.
    """
    described = network.architecture
    dataset = load_dataset(source, normalisation=described.normalisation)
    if dataset.num_classes != described.num_classes:
        raise ValueError(
            f"the network tells {described.num_classes} classes apart, {dataset.name} has {dataset.num_classes}"
        )
    if dataset.image_shape != described.image_shape:
        theirs, ours = (" × ".join(map(str, shape)) for shape in (dataset.image_shape, described.image_shape))
        raise ValueError(f"the network is for images of {ours}, those of {dataset.name} have {theirs}")
    return limit_training(dataset, train_images)


def load_network(source: str | Path, image_shape: tuple[int, int, int] = (32, 32, 3)) -> Network:
    """The network in a PyTorch or safetensors file, or in the directory of a run or of one of its seeds.

    Args:
        source: a checkpoint that `interop.from_torch` reads, or a directory with `network.json` and `network.npz`.
        image_shape: of the images a checkpoint was trained on; a run knows its own.

    Raises:
        FileNotFoundError: there is no such file or directory, or the run has not finished.
        ValueError: the checkpoint is of a network that was pruned elsewhere, or the files do not fit each other.
    """
    source = Path(source)
    if source.is_dir():
        return _from_run(source)
    if not source.is_file():
        raise FileNotFoundError(f"there is no checkpoint or run directory {source}{nearest_path(source)}")
    return _from_checkpoint(source, image_shape)


def save_network(run: RunDirectory, network: Network, folder: str = "") -> None:
    """Write `network.json`, `network.npz` and, of a shrunk one, `plan.json` into the run or a folder of it."""
    prefix = f"{folder}/" if folder else ""
    if network.plan is not None:
        save_plan(network.plan, run.file(f"{prefix}{PLAN}"))
    save_variables(run.file(f"{prefix}{VARIABLES}"), network.variables)
    run.write_json(f"{prefix}{DESCRIPTION}", network.architecture)


def save_plan(plan: PruningPlan, path: Path) -> None:
    """Write a plan, in place of an earlier one."""
    path.unlink(missing_ok=True)
    plan.save(path)


def _from_run(directory: Path) -> Network:
    described = directory / DESCRIPTION
    if not described.is_file():
        seeds = sorted(path.parent.name for path in directory.glob(f"*/{DESCRIPTION}"))
        hint = f"; choose one of {', '.join(f'{directory}/{seed}' for seed in seeds)}" if seeds else ""
        raise FileNotFoundError(f"{directory} has no {DESCRIPTION}: the run is not finished, or not of a network{hint}")
    variables = load_variables(directory / VARIABLES)
    architecture = read_architecture(described, len(jax.tree.leaves(variables)))
    plan = PruningPlan.load(directory / PLAN) if (directory / PLAN).exists() else None
    check_variables(variables, architecture, plan, directory)
    variables, model = jax.tree.map(jnp.asarray, variables), architecture.build()
    apply, trainable = eval_apply(model), train_apply(model)
    if plan is not None:
        apply, trainable = shrink(apply, plan), shrink(trainable, plan)
    return Network(architecture, apply, trainable, variables, plan)


def read_architecture(path: Path, arrays: int) -> Architecture:
    """The architecture in a `network.json`, every field checked.

    Args:
        path: the file.
        arrays: how many the network has beside it: its depth is no larger, whatever the file says.

    Raises:
        ValueError: naming the field, what it is and what it should be.
    """
    found = read_json(path)
    kinds = {"model": str, "num_classes": int, "image_shape": list, "normalisation": list, "options": dict}
    for name, kind in kinds.items():
        if type(found.get(name)) is not kind:
            raise ValueError(f"{path}: {name!r} must be a {kind.__name__}, not {shown(found.get(name))}")

    def require(name: str, right: bool, wanted: str) -> None:
        if not right:
            raise ValueError(f"{path}: {name!r} must be {wanted}, not {shown(found[name])}")

    shape, normalisation = found["image_shape"], found["normalisation"]
    require("image_shape", len(shape) == 3 and all(_is_length(n) for n in shape), "three lengths from 1 to 65,536")
    require("num_classes", _is_length(found["num_classes"]), "a number from 1 to 65,536")
    sides = [side if isinstance(side, list) else [] for side in normalisation]
    numbers = all(type(value) in (int, float) and abs(value) < 1e30 for side in sides for value in side)
    right = [len(side) for side in sides] == 2 * [shape[-1]] and numbers and all(value > 0 for value in sides[1])
    require("normalisation", right, "[mean, std], a finite number and a positive one per channel")
    depth = max(map(int, re.findall(r"[0-9]{1,9}", found["model"])), default=0)
    require("model", len(found["model"]) <= 100 and depth <= arrays, f"a model that {arrays} arrays are enough for")
    options = {name: _tuple(value) for name, value in found["options"].items()}
    lengths = [n for value in options.values() for n in (value if isinstance(value, tuple) else (value,))]
    plain = all(isinstance(n, str | bool) or n is None or _is_length(n) for n in lengths)
    require("options", plain and len(lengths) <= arrays, "texts, truth values and lengths from 1 to 65,536")
    normalised = (tuple(map(float, sides[0])), tuple(map(float, sides[1])))
    return Architecture(found["model"], found["num_classes"], _tuple(shape), normalised, options)


def check_variables(variables: Any, architecture: Architecture, plan: PruningPlan | None, directory: Path) -> None:
    """Raise unless these are variables of the architecture, or of what the plan leaves of it: no others fit.

    Raises:
        ValueError: naming the variable: it is missing, unknown, of another shape or dtype, or has values that no
            network has.
    """
    file = directory / VARIABLES
    try:
        whole = jax.eval_shape(lambda: architecture.initialise(0))
    except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        raise ValueError(f"{directory / DESCRIPTION} is of no network that can be built: {error}") from error
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(whole)}
    what = f"network that {directory / DESCRIPTION} describes"
    try:
        if plan is not None:
            if plan.shapes != shapes:
                other = min(path for path in {*shapes, *plan.shapes} if shapes.get(path) != plan.shapes.get(path))
                raise ValueError(f"{directory / PLAN} is for another network: {shown(other)} differs")
            shapes, what = plan.shrunk_shapes(), f"network that {directory / PLAN} leaves"
        check_fits(variables, shapes, what)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error.args[0]}") from error
    (dtype,) = {leaf.dtype for leaf in jax.tree.leaves(whole)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = path_name(path)
        if leaf.dtype != dtype:
            raise ValueError(f"{file}: {name} is {leaf.dtype}; this network is of {dtype}")
    check_values(variables, str(file))


def check_values(variables: Any, where: str) -> None:
    """Raise unless weights are finite and variances not negative; the message begins with `where`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = path_name(path)
        if name.startswith("batch_stats/") and name.endswith("/var") and not (np.asarray(leaf) >= 0).all():
            raise ValueError(f"{where}: {name} has a variance that is negative or not a number: {np.min(leaf):g}")
    check_finite(variables, f"cannot use {where}")


def _is_length(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 65_536


def _from_checkpoint(path: Path, image_shape: tuple[int, int, int]) -> Network:
    from interop import from_torch

    try:
        _, variables, info = from_torch(path)
        check_values(variables, str(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    if info.model is None:
        raise ValueError(f"{path} is of a network with widths of its own (pruned elsewhere); start from a dense one")
    if image_shape[-1] != info.spec.image_channels:
        raise ValueError(f"{path} reads {info.spec.image_channels} channels, the images have {image_shape[-1]}")
    name, options = described_model(info.model)
    architecture = Architecture(name, info.num_classes, image_shape, info.normalisation, options)
    module = architecture.build()
    return Network(architecture, eval_apply(module), train_apply(module), variables)


def described_model(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The name and the options with which `make_model` builds this network again."""
    names = {
        ResNet: "resnet{depth}",
        PreResNet: "preresnet{depth}",
        VGG: "vgg{depth}",
        WideResNet: "wrn{depth}-{widen}",
    }
    known = {field.name: getattr(model, field.name) for field in fields(model)}  # pyright: ignore[reportArgumentType]
    name = names[type(model)].format(**known)
    given = ("depth", "widen", "num_classes", "dtype", "parent", "name")
    return name, {key: value for key, value in known.items() if key not in given}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value
