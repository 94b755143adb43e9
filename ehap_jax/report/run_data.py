"""What a run directory holds, read back and checked.

``config.json`` and ``versions.json``: objects. ``summary.json``: ``{"stages": [...], "seeds": [...], "seconds":
{name: seconds}, "checks": {name: value}}``, a stage being ``{"stage": name, "accuracy": mean in [0, 1], "accuracy_std":
number or null, "accuracies": [one per seed], "params", "macs", "bytes": whole numbers}``. A stage may have a
``"curve"``, the name of the curve of a sweep it lies on. ``"costs"``, where there are any: ``{quantity with its unit:
{name: positive number}}``, such as seconds per probe in every precision.

``plan.json``, where there is one: ``{"keep": {kernel path: [kept output indices]}, "shapes": {path: full shape},
"axes": {kernel path: output axis}}``; without "axes" the output axis is the last, as in HWIO kernels.

``scores.npz``, where there is one: arrays of the names ``"<policy>|<kernel path>"``, (channels,) scores such as
``"float16|params/conv1/kernel"``; ``"sem|<kernel path>"``, their standard errors; and ``"convergence|probes"``,
``"convergence|mean"``, ``"convergence|sem"``, the running estimate of the total trace, all (n,). It is read without
pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ehap_jax._untrusted_files import read_arrays, read_json

STAGE_FIELDS = ("stage", "accuracy", "accuracies", "params", "macs", "bytes")
COSTS = ("params", "macs", "bytes")


class Convergence(NamedTuple):
    """The running estimate of the total trace: (n,) probes so far, (n,) mean, (n,) standard error (NaN if unknown)."""

    probes: np.ndarray
    mean: np.ndarray
    sem: np.ndarray


@dataclass(frozen=True, eq=False)
class RunData:
    """The files of one run.

    config, versions, summary: the JSON files. plan: ``plan.json``, or None. scores: {policy: {kernel path: (channels,)
    scores}}, empty where there are none. sem: {kernel path: (channels,) standard errors}, empty where there are none.
    convergence: the running estimate of the trace, or None.
    """

    path: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    summary: dict[str, Any]
    plan: dict[str, Any] | None
    scores: dict[str, dict[str, np.ndarray]]
    sem: dict[str, np.ndarray]
    convergence: Convergence | None

    @property
    def stages(self) -> list[dict[str, Any]]:
        return self.summary["stages"]


def read_run(path: str | Path) -> RunData:
    """Read a run directory and check every file in it.

    Raises:
        FileNotFoundError: the directory, ``config.json``, ``versions.json`` or ``summary.json`` is missing.
        ValueError: a file is not what the head of this module says; the message names the file and the entry.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run directory {path}")
    config, versions, summary = (_read_json(path / f"{name}.json") for name in ("config", "versions", "summary"))
    _check_summary(path / "summary.json", summary)
    plan = None
    if (path / "plan.json").exists():
        plan = _read_json(path / "plan.json")
        _check_plan(path / "plan.json", plan)
    scores, sem, convergence = _read_scores(path / "scores.npz")
    return RunData(path, config, versions, summary, plan, scores, sem, convergence)


def score_arrays(
    scores: Mapping[str, Mapping[str, Any]],
    *,
    sem: Mapping[str, Any] | None = None,
    convergence: Convergence | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of ``scores.npz`` by name: what `read_run` takes apart, put together.

    Args:
        scores: {policy: {kernel path: (channels,) scores}}.
        sem: {kernel path: (channels,) standard errors}.
        convergence: the running estimate of the trace.

    Raises:
        ValueError: a policy has a name that would be read as something else.

    Example:
        >>> sorted(score_arrays({"float32": {"params/a/kernel": [1.0, 2.0]}}))
        ['float32|params/a/kernel']
    """
    arrays = {}
    for policy, found in scores.items():
        if policy in ("", "sem", "convergence") or "|" in policy:
            raise ValueError(f'a policy cannot be called {policy!r}: "sem", "convergence" and "|" have a meaning')
        arrays |= {f"{policy}|{path}": np.asarray(values) for path, values in found.items()}
    arrays |= {f"sem|{path}": np.asarray(values) for path, values in (sem or {}).items()}
    if convergence is not None:
        arrays |= {f"convergence|{name}": np.asarray(values) for name, values in convergence._asdict().items()}
    return arrays


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; is {path.parent} a finished run?")
    return read_json(path)


def _check_summary(path: Path, summary: dict[str, Any]) -> None:
    stages = summary.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError(f'{path} has no list of "stages"')
    for number, stage in enumerate(stages):
        if not isinstance(stage, dict):
            raise ValueError(f"{path}: stage {number} must be an object, not {stage!r}")
        missing = [name for name in STAGE_FIELDS if name not in stage]
        if missing:
            raise ValueError(f"{path}: stage {stage.get('stage', number)!r} lacks {', '.join(missing)}")
        _check_stage(f"{path}: stage {stage['stage']!r}", stage)
    costs = summary.get("costs", {})
    if not isinstance(costs, dict) or not all(isinstance(bars, dict) and bars for bars in costs.values()):
        raise ValueError(f'{path}: "costs" must be an object of objects, not {costs!r}')
    if not all(_is_number(value) and value > 0 for bars in costs.values() for value in bars.values()):
        raise ValueError(f'{path}: "costs" must be positive numbers, not {costs!r}')
    for name in ("seconds", "checks"):
        found = summary.get(name, {})
        if not isinstance(found, dict) or not all(_is_number(value) for value in found.values()):
            raise ValueError(f'{path}: "{name}" must be an object of numbers, not {found!r}')


def _check_stage(where: str, stage: dict[str, Any]) -> None:
    accuracies = stage["accuracies"]
    if not isinstance(accuracies, list) or not accuracies:
        raise ValueError(f'{where}: "accuracies" must be a list with one number per seed, not {accuracies!r}')
    for value in (stage["accuracy"], *accuracies):
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{where}: an accuracy must be between 0 and 1, not {value!r}")
    if abs(stage["accuracy"] - sum(accuracies) / len(accuracies)) > 1e-3:
        raise ValueError(f'{where}: "accuracy" {stage["accuracy"]} is not the mean of "accuracies" {accuracies}')
    deviation = stage.get("accuracy_std")
    if deviation is not None and not (_is_number(deviation) and deviation >= 0):
        raise ValueError(f'{where}: "accuracy_std" must be a number of at least 0, or null, not {deviation!r}')
    curve = stage.get("curve", "-")
    if not isinstance(curve, str) or not curve:
        raise ValueError(f'{where}: "curve" must be the name of a curve, not {curve!r}')
    for name in COSTS:
        if type(stage[name]) is not int or stage[name] <= 0:
            raise ValueError(f'{where}: "{name}" must be a positive whole number, not {stage[name]!r}')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    for name in ("keep", "shapes"):
        if not isinstance(plan.get(name), dict):
            raise ValueError(f'{path} has no object "{name}"')
    axes = plan.get("axes", {})
    if not isinstance(axes, dict):
        raise ValueError(f'{path}: "axes" must be an object of kernel paths and axes, not {axes!r}')
    for kernel in {**axes, **plan["keep"]}:
        shape, axis = plan["shapes"].get(kernel), axes.get(kernel, -1)
        if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f'{path}: "shapes" must give the full shape of {kernel}, not {shape!r}')
        if type(axis) is not int or not -len(shape) <= axis < len(shape):
            raise ValueError(f"{path}: {kernel} of shape {shape} has no axis {axis!r}")
        kept = plan["keep"].get(kernel, [])
        if not isinstance(kept, list) or not all(type(i) is int and 0 <= i < shape[axis] for i in kept):
            raise ValueError(f"{path}: {kernel} must keep indices from 0 to {shape[axis] - 1}, not {kept!r}")
        if len(set(kept)) < len(kept):
            raise ValueError(f"{path}: {kernel} keeps an index twice: {kept!r}")


def _read_scores(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], Convergence | None]:
    if not path.exists():
        return {}, {}, None
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name, values in read_arrays(path).items():
        kind, bar, kernel = name.partition("|")
        if not (kind and bar and kernel):
            raise ValueError(f'{path}: array {name!r} must be called "<policy>|<kernel path>"')
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
            raise ValueError(f"{path}: {name} must be real numbers (n,), not {values.dtype}{list(values.shape)}")
        if kind not in ("sem", "convergence") and not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} has a score that is not finite")
        scores.setdefault(kind, {})[kernel] = values
    sem, running = scores.pop("sem", {}), scores.pop("convergence", {})
    return scores, sem, _convergence(path, running) if running else None


def _convergence(path: Path, running: dict[str, np.ndarray]) -> Convergence:
    if set(running) != set(Convergence._fields):
        wanted = ", ".join(f"convergence|{name}" for name in Convergence._fields)
        raise ValueError(f"{path} must have all of {wanted} or none; it has {', '.join(sorted(running))}")
    found = Convergence(**running)
    if not found.probes.shape == found.mean.shape == found.sem.shape or not len(found.probes):
        raise ValueError(f"{path}: the arrays convergence|… must have one length, not {[len(a) for a in found]}")
    if (np.diff(found.probes) <= 0).any() or not np.isfinite(found.mean).all():
        raise ValueError(f"{path}: convergence|probes must ascend and convergence|mean be finite")
    return found
