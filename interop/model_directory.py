"""A network as one directory that anyone can read: JSON, safetensors and a model card, and nothing that runs.

    model/
      config.json         what the network is: widths, tensors with shapes, dtypes and checksums, your configuration and
                          metadata
      model.safetensors   the weights under PyTorch's names; config and plan once more in the file's own metadata
      plan.json           what was pruned, where it was
      model.onnx          the INT8 or float network for ONNX Runtime, where one was given
      README.md           the model card, written from the above

`model.safetensors` alone is a checkpoint, too: `from_torch("model/model.safetensors")`, or in PyTorch
`interop.torch_models.load(safetensors.torch.load_file("model/model.safetensors"))`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax.pruning import PruningPlan
from ehap_jax.pruning.plan import check_fits
from ehap_jax.quant import save_onnx
from interop.forms import FORMS, INDEX_BUFFERS, CheckpointError, Form
from interop.from_torch import CheckpointInfo, from_torch
from interop.layouts import written_layout
from interop.read import read_checkpoint
from interop.spec import Spec, read_spec
from interop.to_torch import form_of, named_arrays, residual_indices, to_torch

FORMAT = "ehap_jax.model"
VERSION = 3
CONFIG, WEIGHTS, PLAN, CARD = "config.json", "model.safetensors", "plan.json", "README.md"
ONNX = "model.onnx"


@dataclass(frozen=True)
class SavedModel:
    """What `load_model` found.

    Attributes:
        apply: apply(variables, x) -> logits in eval mode, x (N, H, W, channels) normalised.
        variables: {"params": …, "batch_stats": …}, bit for bit as they were saved.
        plan: the plan that shrunk them, or None.
        config, metadata: as they were given to `save_model`.
        onnx: the path of model.onnx, unchanged since it was saved, or None.
        info: widths, index buffers and normalisation; the last is `config["normalisation"]` where that was given.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    variables: dict[str, Any]
    plan: PruningPlan | None
    config: dict[str, Any]
    metadata: dict[str, Any]
    info: CheckpointInfo
    onnx: Path | None = None


def save_model(
    directory: str | os.PathLike[str],
    variables: Any,
    plan: PruningPlan | None = None,
    *,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    indices: Mapping[str, np.ndarray] | None = None,
    onnx: Any = None,
) -> Path:
    """Write a network as one directory, whole or not at all.

    Args:
        directory: must not exist yet, or be empty; its parents are made.
        variables: {"params": …, "batch_stats": …} with the paths of `ehap_jax.models`: dense, masked, or
            already shrunk.
        plan: the plan that shrunk the variables; None for dense and masked ones.
        config: what made the network, in JSON's types. `config["normalisation"] = {"mean": […], "std": […]}`, for
            images in [0, 1], is what a reader needs most.
        metadata: numbers and strings worth telling (accuracies, data set, seed), in JSON's types; the model card
            lists them.
        indices: `info.indices` of a network that was pruned elsewhere; not with a plan.
        onnx: the same network as an `onnx.ModelProto` (`ehap_jax.to_onnx`), float or INT8; written to model.onnx.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory has files in it; nothing is ever overwritten.
        CheckpointError: weights that are not finite, or anything `to_torch` refuses.
        TypeError, ValueError: config or metadata that JSON cannot hold, a normalisation of another form.
        ImportError: PyTorch or safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from ehap_jax.models import ResNet, init_variables
        >>> variables = init_variables(ResNet(8, 10, widths=(4, 4, 8)), jax.random.key(0), (8, 8, 3))
        >>> there = save_model(tempfile.mkdtemp() + "/model", variables, config={"seed": 0}, metadata={"accuracy": 0.1})
        >>> sorted(path.name for path in there.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
        >>> load_model(there).metadata
        {'accuracy': 0.1}
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; remove it or save the model under another name")
    try:
        import torch
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("save_model needs safetensors and PyTorch: pip install 'ehap-jax[torch]'") from error
    _normalisation(config)
    tensors = to_torch(variables, plan, indices=indices)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} has {int((~tensor.isfinite()).sum())} weights that are not finite")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "network": _network(
            read_spec(form_of(variables), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        ),
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sha256": hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest(),
            }
            for name, tensor in tensors.items()
        },
        "pruned": plan is not None,
        "onnx": {},
        "config": dict(config),
        "metadata": dict(metadata),
    }
    _json(document, "config and metadata")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        if onnx is not None:
            save_onnx(onnx, temporary / ONNX)
            document["onnx"] = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / CONFIG).write_text(_json(document, "config and metadata"), encoding="utf-8")
        inside = {"format": "pt", CONFIG: json.dumps(document)}
        if plan is not None:
            inside[PLAN] = json.dumps(json.loads(plan.save(temporary / PLAN).read_text()))
        (temporary / WEIGHTS).write_bytes(save(tensors, metadata=inside))
        (temporary / CARD).write_text(model_card(target.name, document, plan), encoding="utf-8")
        for file in temporary.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        temporary.chmod(0o755)
        try:
            temporary.rename(target)  # fails where something has appeared there since
        except OSError as error:
            raise FileExistsError(f"{target} appeared meanwhile; nothing was written there") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def load_model(directory: str | os.PathLike[str]) -> SavedModel:
    """Read what `save_model` wrote. Nothing in the directory is ever executed, and PyTorch is not needed.

    Every tensor is checked against config.json (names, shapes, dtypes, checksums) and against the plan (the shapes it
    leaves and the positions in residual sums that follow from it), and the two JSON files against their copies inside
    model.safetensors. Other files in the directory are left alone, and links that lead out of it are refused.

    Raises:
        FileNotFoundError: no such directory, or a file is missing from it.
        CheckpointError: a damaged file, or two that contradict each other (tensor, expected, found).
        ValueError: plan.json is not a well-formed plan; float64 weights while JAX's x64 mode is off.
    """
    source = Path(directory)
    if not source.is_dir():
        raise FileNotFoundError(f"no model directory at {source}")
    for name in (CONFIG, WEIGHTS):
        if not _has(source, name):
            raise FileNotFoundError(f"{source} is not a saved model: it has no {name}")
    document = _read_config(source / CONFIG)
    tensors, inside = read_checkpoint(source / WEIGHTS)
    _check_copy(inside, CONFIG, document, source)
    _check_tensors(tensors, document)
    plan = _read_plan(source, inside, document["pruned"])
    double = any(entry["dtype"] == "float64" for entry in document["tensors"].values())
    if double and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"{source} has float64 weights; load it under jax_enable_x64, or it would lose bits")
    found = document["network"].get("form")
    form = FORMS.get(found) if isinstance(found, str) else None
    if form is None:
        raise CheckpointError(f"{source / CONFIG}: network.form is {found!r}; known: {', '.join(FORMS)}")
    apply, variables, info = from_torch(tensors, written_layout(form))
    variables = _as_saved(form, variables, document["tensors"])
    if _network(info.spec) != document["network"]:
        raise CheckpointError(f"{source / CONFIG}: network is {document['network']}, the tensors are {info.spec}")
    if plan is not None:
        _check_plan(variables, info, plan, source)
    _check_onnx(source, document["onnx"])
    normalisation = _normalisation(document["config"])
    info = replace(info, metadata=document["metadata"], normalisation=normalisation or info.normalisation)
    onnx = source / ONNX if document["onnx"] else None
    return SavedModel(apply, variables, plan, document["config"], document["metadata"], info, onnx)


def model_card(name: str, document: Mapping[str, Any], plan: PruningPlan | None = None) -> str:
    """The README.md of a model directory, from the contents of its config.json and its plan."""
    network = document["network"]
    weights = [t["shape"] for key, t in document["tensors"].items() if not key.endswith(("_var", "_mean", "_index"))]
    facts = [
        ("network", f"{network['form']}, depth {network['depth']}, {network['num_classes']} classes"),
        ("parameters", f"{sum(int(np.prod(shape)) for shape in weights):,}"),
        ("output channels of each stage", ", ".join(map(str, network["stage_widths"]))),
    ]
    if plan is None:
        facts.append(("pruned", "no channel was removed"))
    else:
        kept = sum(plan.shrunk_shape(path)[axis] for path, axis in plan.axes.items())
        full = sum(plan.shapes[path][axis] for path, axis in plan.axes.items())
        facts.append(("pruned", f"{kept} of {full} output channels kept, {plan.coupling} coupling"))
        if "criterion" in plan.provenance:
            facts.append(("criterion", plan.provenance["criterion"]))
        cost, before = (plan.provenance.get(key, {}) for key in ("cost", "full_cost"))
        facts += [(key, f"{cost[key]:,} of {before[key]:,}") for key in cost if key in before]
    normalisation = _normalisation(document["config"])
    expects = "not recorded; ask whoever trained it"
    if normalisation is not None:
        expects = f"images in [0, 1], minus {list(normalisation[0])}, divided by {list(normalisation[1])} (RGB)"
    facts.append(("input", expects))
    plan_file = [f"`{PLAN}` (which channels were kept)"] if plan is not None else []
    onnx_file = [f"`{ONNX}` (for ONNX Runtime)"] if document["onnx"] else []
    files = ", ".join([f"`{CONFIG}`", f"`{WEIGHTS}` (PyTorch's names)", *plan_file, *onnx_file])
    parts = [
        f"---\nlibrary_name: ehap-jax\ntags: [image-classification{', pruned' if plan is not None else ''}]\n---",
        f"# {name}",
        _markdown_table(("", ""), facts),
        "## Results\n\n" + _markdown_table(("measure", "value"), document["metadata"].items()),
        "## Configuration\n\n" + _markdown_table(("setting", "value"), document["config"].items()),
        f"## Use\n\nFiles: {files}. None of them holds code.\n\n"
        "```python\n# JAX\nfrom interop.model_directory import load_model\n\n"
        f'model = load_model("{name}")\nlogits = model.apply(model.variables, images)  # (N, H, W, channels)\n```\n\n'
        "```python\n# PyTorch\nfrom safetensors.torch import load_file\nfrom interop.torch_models import load\n\n"
        f'module = load(load_file("{name}/{WEIGHTS}"))\nlogits = module(images)  # (N, channels, H, W)\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: tuple[str, str], rows: Any) -> str:
    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return " ".join(text.replace("|", "\\|").split())

    lines = [f"| {cell(key)} | {cell(value)} |" for key, value in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines]) if lines else "None recorded."


def _network(spec: Spec) -> dict[str, Any]:
    return json.loads(json.dumps({"depth": spec.depth, "stage_widths": spec.stage_widths, **asdict(spec)}))


def _json(document: Any, what: str) -> str:
    try:
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    except TypeError as error:
        raise TypeError(f"{what} must hold JSON's types only: {error}") from error
    except ValueError as error:
        raise ValueError(f"{what} must hold finite numbers only: {error}") from error


def _normalisation(config: Mapping[str, Any]) -> Any:
    """((mean per channel), (std per channel)), or None where the config says nothing."""
    given = config.get("normalisation")
    if given is None:
        return None
    try:
        mean, std = tuple(map(float, given["mean"])), tuple(map(float, given["std"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f'config["normalisation"] must be {{"mean": […], "std": […]}}, got {given!r}') from error
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ValueError(f'config["normalisation"]: as many means as positive deviations, got {given!r}')
    return mean, std


def _read_config(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not of a saved model: "format" is not {FORMAT!r}')
    if document.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {document.get('version')!r}; this library reads {VERSION}")
    fields = {"network": dict, "tensors": dict, "pruned": bool, "onnx": dict, "config": dict, "metadata": dict}
    for name, kind in fields.items():
        if not isinstance(document.get(name), kind):
            raise CheckpointError(f"{path}: {name!r} must be a {kind.__name__}, found {document.get(name)!r}")
    for name, entry in document["tensors"].items():
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("shape"), list)
            or not {"dtype", "sha256"} <= set(entry)
        ):
            raise CheckpointError(f"{path}: tensors[{name!r}] must have shape, dtype and sha256, found {entry!r}")
    return document


def _has(source: Path, name: str) -> bool:
    """Whether the directory has such a file; a link that leads out of it is an error."""
    path = source / name
    end = Path(os.path.realpath(path))  # resolve() raises a RuntimeError for a link to itself
    if path.is_symlink() and end.parent != Path(os.path.realpath(source)):
        raise CheckpointError(f"{path} is a link to {end}, outside of the directory; copy the file there")
    return path.is_file()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_onnx(source: Path, recorded: Mapping[str, Any]) -> None:
    for name, digest in recorded.items():
        if Path(name).name != name or not name.startswith(ONNX):
            raise CheckpointError(f"{source / CONFIG}: {name!r} is no name of an ONNX file in this directory")
        if not _has(source, name):
            raise FileNotFoundError(f"{source} is recorded to have {name} and has none")
        if _sha256(source / name) != digest:
            raise CheckpointError(f"{source / name} is not the file that was saved: its sha256 is another")
    if ONNX not in recorded and (source / ONNX).exists():
        raise CheckpointError(f"{source} has a {ONNX} that {CONFIG} knows nothing of")
    if recorded and ONNX not in recorded:
        raise CheckpointError(f"{source / CONFIG} records {sorted(recorded)} without the {ONNX} they belong to")


def _check_copy(inside: Mapping[str, str], name: str, document: Any, source: Path) -> None:
    try:
        copy = json.loads(inside[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source / WEIGHTS} has no readable {name} in its metadata") from error
    if copy != document:
        raise CheckpointError(
            f"{source / name} is not the one inside {WEIGHTS}: one of the two was changed, or is of another model"
        )


def _check_tensors(tensors: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> None:
    expected = document["tensors"]
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{WEIGHTS} and {CONFIG} disagree: missing {missing[:5] or 'nothing'}, unexpected {extra[:5] or 'nothing'}"
        )
    for name, entry in expected.items():
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if tensors[name].shape != shape or tensors[name].dtype.name != dtype:
            raise CheckpointError(
                f"{name}: expected {dtype} of shape {shape}, found {tensors[name].dtype} of {tensors[name].shape}"
            )
        if hashlib.sha256(np.ascontiguousarray(tensors[name]).view(np.uint8).data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{name} is not the tensor that was saved: its sha256 is another")


def _read_plan(source: Path, inside: Mapping[str, str], pruned: bool) -> PruningPlan | None:
    path = source / PLAN
    if _has(source, PLAN) != pruned:
        if pruned:
            raise FileNotFoundError(f"{source} holds a pruned network and has no {PLAN}")
        raise CheckpointError(f"{source} has a {PLAN}, but {CONFIG} says that nothing was pruned")
    if not pruned:
        return None
    plan = PruningPlan.load(path)
    _check_copy(inside, PLAN, json.loads(path.read_text()), source)
    return plan


def _as_saved(form: Form, variables: Any, entries: Mapping[str, Any]) -> Any:
    """`from_torch` widens 16-bit weights to float32; back to what they were, which loses nothing."""
    names = [name for name in entries if not name.endswith(INDEX_BUFFERS)]
    dtypes = {form.path_of(name): entries[name]["dtype"] for name in names}

    def cast(path, leaf):
        return leaf.astype(dtypes[path_name(path)])

    return jax.tree_util.tree_map_with_path(cast, variables)


def _check_plan(variables: Any, info: CheckpointInfo, plan: PruningPlan, source: Path) -> None:
    try:
        check_fits(variables, plan.shrunk_shapes(), "plan's shrunk network")
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source / PLAN} does not fit {WEIGHTS}: {error.args[0]}") from error
    expected = residual_indices(info.form, named_arrays(variables, info.form), plan)
    for name in sorted(expected.keys() | info.indices.keys()):
        if not np.array_equal(expected.get(name, []), info.indices.get(name, [])):
            raise CheckpointError(f"{name}: the plan puts the channels at other positions than {WEIGHTS} has")
