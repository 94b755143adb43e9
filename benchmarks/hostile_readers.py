"""Every reader of files from others, with an honest file for it: what `benchmarks.hostile_files` breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._whole_files import write_arrays
from ehap_jax.curvature import Policy, fingerprint, is_kernel, load_trace, save_trace
from ehap_jax.curvature.estimate import Moments, estimate_of, exact_state
from ehap_jax.curvature.problem import layout_of
from ehap_jax.data import load_dataset
from ehap_jax.graph import trace_graph
from ehap_jax.pruning import PruningPlan
from ehap_jax.report.run_data import read_run, score_arrays
from ehap_jax.training import RunDirectory, load_variables, save_variables
from recipes.network import Architecture, load_network, new_network, save_network


class Reader(NamedTuple):
    """A reader and what it is tried on.

    write: makes the honest files in an empty folder. read: reads them from there. files: those that are mutated, by
    the pattern of their names. check: raises AssertionError for what must not be believed, whatever the file says.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    check: Callable[[Any], None] = lambda _: None


def check_network(found: Any) -> None:
    """Finite weights, and no negative variance."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name, values = jax.tree_util.keystr(path), np.asarray(leaf, np.float64)
        assert np.isfinite(values).all(), f"{name} is not finite"
        assert "var" not in name or (values >= 0).all(), f"{name} is negative"


def _model(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["in"]) @ p["out"]


PARAMS = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
X = jnp.ones((2, 3))


@cache
def _trace_fingerprint() -> Any:
    return fingerprint(lambda p, x: (_model(p, x) ** 2).mean(), PARAMS, X, key=jax.random.key(0), num_probes=3)


def write_plan(folder: Path) -> None:
    PruningPlan.from_keep(trace_graph(_model)(PARAMS, X), {"in": [0, 2]}).save(folder / "plan.json")


def write_trace(folder: Path) -> None:
    channels = {path: np.ones(leaf.shape[-1], np.float32) for path, leaf in PARAMS.items()}
    level = {"channel": channels, "layer": dict.fromkeys(channels, np.float32(1)), "total": np.float32(2)}
    state = exact_state(
        "hutchinson", layout_of(PARAMS, Policy(), is_kernel, -1), jax.random.key(0), Moments(level, level), count=3
    )
    save_trace(folder / "trace.npz", estimate_of(lambda probed: probed, state), _trace_fingerprint())


def check_trace(found: Any) -> None:
    means = [*jax.tree.leaves(found.mean), *jax.tree.leaves(found.sem)]
    assert all(np.isfinite(x).all() for x in means), "a trace is not finite"
    assert found.count >= 0, f"{found.count} probes"


@cache
def _network() -> Any:
    options = {"shortcut": "B", "widths": (2, 2, 4)}
    return new_network(Architecture("resnet8", 3, (8, 8, 3), ((0.5,) * 3, (0.2,) * 3), options), 0)


def write_network(folder: Path) -> None:
    save_network(RunDirectory(folder), _network())


def write_variables(folder: Path) -> None:
    save_variables(folder / "variables.npz", _network().variables)


def write_run(folder: Path) -> None:
    run = RunDirectory(folder)
    costs = {"params": 9, "macs": 99, "bytes": 36}
    stage = {"stage": "dense", "accuracy": 0.5, "accuracies": [0.5], "accuracy_std": None, **costs}
    run.write_json("config.json", {"data": "digits"})
    run.write_json("versions.json", {"python": "3.11"})
    run.write_json("summary.json", {"stages": [stage], "seeds": [0], "seconds": {"total": 1.0}, "checks": {}})
    write_plan(folder)
    write_arrays(folder / "scores.npz", score_arrays({"float32": {"in": np.ones(4)}}))


def write_started(folder: Path) -> None:
    """A run that was stopped; its lock is given free at once."""
    run = RunDirectory.create(folder / "run", {"epochs": 3})
    run.append_metrics({"epoch": 1, "loss": 0.5})
    run.seconds()


def read_started(folder: Path) -> Any:
    return RunDirectory.create(folder / "run", {"epochs": 3}, resume=True).read_metrics()


def _images() -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"train": 24, "test": 6}
    images = {f"x_{split}": rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8) for split, n in shapes.items()}
    return images | {f"y_{split}": np.arange(n) % 3 for split, n in shapes.items()}


def write_npz(folder: Path) -> None:
    write_arrays(folder / "data.npz", _images())


def write_folder(folder: Path) -> None:
    from PIL import Image

    arrays = _images()
    for split in ("train", "test"):
        for number, (pixels, label) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)):
            file = folder / "data" / split / f"class{label}" / f"{number}.{'jpg' if number % 2 else 'png'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def check_dataset(found: Any) -> None:
    assert found.num_classes <= 24, f"{found.num_classes} classes of 24 images"
    assert np.isfinite([*found.mean, *found.std]).all(), "the normalisation is not finite"


@cache
def _state_dict() -> Mapping[str, Any]:
    import torch

    from interop.torch_models import cifar_resnet

    torch.manual_seed(0)
    return cifar_resnet(8, widths=(2, 2, 4), shortcut="B", num_classes=3).state_dict()


def write_torch(folder: Path, zipped: bool = True) -> None:
    import torch

    torch.save(_state_dict(), folder / "model.pth", _use_new_zipfile_serialization=zipped)


def write_safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(_state_dict()), folder / "model.safetensors")


def read_checkpoint(name: str, folder: Path) -> Any:
    from interop import from_torch

    return from_torch(folder / name)[1]


def write_model(folder: Path) -> None:
    from interop.model_directory import save_model

    normalisation = {"mean": [0.5] * 3, "std": [0.2] * 3}
    save_model(folder / "model", _network().variables, config={"normalisation": normalisation}, metadata={"seed": 0})


def read_model(folder: Path) -> Any:
    from interop.model_directory import load_model

    return load_model(folder / "model").variables


OWN: dict[str, Reader] = {
    "PruningPlan.load": Reader(write_plan, lambda f: PruningPlan.load(f / "plan.json"), ("plan.json",)),
    "load_trace": Reader(
        write_trace, lambda f: load_trace(f / "trace.npz", PARAMS, _trace_fingerprint()), ("trace.npz",), check_trace
    ),
    "load_network": Reader(
        write_network,
        lambda f: load_network(f).variables,
        ("network.json", "network.npz"),
        check_network,
    ),
    "load_variables": Reader(write_variables, lambda f: load_variables(f / "variables.npz"), ("variables.npz",)),
    "read_run": Reader(
        write_run, read_run, ("config.json", "versions.json", "summary.json", "plan.json", "scores.npz")
    ),
    "RunDirectory.create": Reader(
        write_started,
        read_started,
        tuple(f"run/{name}" for name in ("config.json", "versions.json", "seconds.json", "metrics.jsonl")),
    ),
    "load_dataset npz": Reader(
        write_npz, lambda f: load_dataset(f"npz:{f / 'data.npz'}"), ("data.npz",), check_dataset
    ),
    "load_dataset folder": Reader(
        write_folder,
        lambda f: load_dataset(f"folder:{f / 'data'}", cache=f / "cache"),
        ("data/*/*/*.png", "data/*/*/*.jpg"),
        check_dataset,
    ),
}
"""Readers of this package."""

INTEROP: dict[str, Reader] = {
    "from_torch .pth": Reader(write_torch, partial(read_checkpoint, "model.pth"), ("model.pth",), check_network),
    "from_torch .pth of old": Reader(
        partial(write_torch, zipped=False), partial(read_checkpoint, "model.pth"), ("model.pth",), check_network
    ),
    "from_torch .safetensors": Reader(
        write_safetensors, partial(read_checkpoint, "model.safetensors"), ("model.safetensors",), check_network
    ),
    "load_model": Reader(write_model, read_model, ("model/config.json", "model/model.safetensors"), check_network),
}
"""Readers of PyTorch's files."""


def readers() -> dict[str, Reader]:
    """Those whose packages are installed."""
    found = dict(OWN)
    if not find_spec("PIL"):
        del found["load_dataset folder"]
    return found | (INTEROP if find_spec("torch") and find_spec("safetensors") else {})
