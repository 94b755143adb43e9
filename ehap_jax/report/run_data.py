"""What a run directory holds, read back and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STAGE_FIELDS = ("stage", "accuracy", "accuracies", "params", "macs", "bytes")


@dataclass(frozen=True, eq=False)
class RunData:
    """The files of one run.

    config, versions, summary: the JSON files. plan: ``plan.json``, or None. scores: {policy: {kernel path: (channels,)
    scores}} from ``scores.npz``, empty where there is none.
    """

    path: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    summary: dict[str, Any]
    plan: dict[str, Any] | None
    scores: dict[str, dict[str, np.ndarray]]

    @property
    def stages(self) -> list[dict[str, Any]]:
        return self.summary["stages"]


def read_run(path: str | Path) -> RunData:
    """Read a run directory.

    Raises FileNotFoundError for a missing directory or file, ValueError for a file that is not what it should be; both
    name it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run directory {path}")
    summary = _read_json(path / "summary.json")
    stages = summary.get("stages") if isinstance(summary, dict) else None
    if not isinstance(stages, list) or not stages:
        raise ValueError(f'{path / "summary.json"} has no list of "stages"')
    for stage in stages:
        missing = [name for name in STAGE_FIELDS if name not in stage]
        if missing:
            raise ValueError(f"{path / 'summary.json'}: a stage lacks {', '.join(missing)}")
    plan = _read_json(path / "plan.json") if (path / "plan.json").exists() else None
    return RunData(
        path=path,
        config=_read_json(path / "config.json"),
        versions=_read_json(path / "versions.json"),
        summary=summary,
        plan=plan,
        scores=_read_scores(path / "scores.npz"),
    )


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; is {path.parent} a finished run?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def _read_scores(path: Path) -> dict[str, dict[str, np.ndarray]]:
    scores: dict[str, dict[str, np.ndarray]] = {}
    if not path.exists():
        return scores
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            policy, _, kernel = name.partition("|")
            scores.setdefault(policy, {})[kernel] = file[name]
    return scores
