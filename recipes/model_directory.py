"""The network that a recipe ends with as a directory for others to use; see `interop.model_directory`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipes.lab import Lab
from recipes.network import Network
from recipes.summary import Stage

FOLDER = "model"


def write_model_directory(
    lab: Lab, seed: int, network: Network, stages: Mapping[str, Stage], folder: str = "", *, onnx: Any = None
) -> Path | None:
    """Write `model/` into the run or a folder of it, in place of an earlier one.

    Args:
        lab: where; the configuration of its run is written down, too.
        seed: of the network.
        network: dense or shrunk.
        stages: by name; the model card lists their accuracies.
        folder: of the run; "" for the run itself.
        onnx: the same network as an `onnx.ModelProto`.

    Returns:
        The directory; None where PyTorch or safetensors is not installed, or the network has no place in PyTorch, and
        then the progress says so.
    """
    missing = [name for name in ("torch", "safetensors") if find_spec(name) is None]
    if missing:
        lab.progress.note(f"no {FOLDER}/ without {' and '.join(missing)}: pip install 'ehap-jax[torch]'")
        return None
    from interop import CheckpointError
    from interop.model_directory import save_model

    described = network.architecture
    mean, std = described.normalisation
    config = {
        "normalisation": {"mean": list(mean), "std": list(std)},
        "model": described.model,
        "options": dict(described.options),
        "image_shape": described.image_shape,
        "run": lab.run.read_json("config.json"),
    }
    metadata = {"seed": seed, **{f"test accuracy, {name}": stage.accuracy for name, stage in stages.items()}}
    target = lab.run.file(f"{folder}/{FOLDER}" if folder else FOLDER)
    # An earlier one, and what a killed process left of one half written.
    for old in (target, *target.parent.glob(f".{FOLDER}.*")):
        shutil.rmtree(old, ignore_errors=True)
    try:
        return save_model(target, network.variables, network.plan, config=config, metadata=metadata, onnx=onnx)
    except CheckpointError as error:
        lab.progress.note(f"no {FOLDER}/ for this network: {error}")
        return None
