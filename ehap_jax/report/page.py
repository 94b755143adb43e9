"""A run, or several side by side, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ehap_jax.report.plots import accuracy_per_stage, kept_channels, score_scatter, sensitivity_per_layer
from ehap_jax.report.run_data import RunData, read_run
from ehap_jax.report.tables import HEADER, stage_rows

RESOLUTION = 160  # dots per inch; pictures are shown at 96


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Raises FileNotFoundError or ValueError where the run lacks a file or has an ill-formed one (see ``read_run``),
    ImportError where the "report" extra is not installed.
    """
    data = read_run(run)
    html = _render(f"ehap_jax: {data.path.name}", _describe(data), [_section(data, "Stages")])
    return _write(data.path / "report.html", html)


def write_comparison(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Write one page with the tables and pictures of several runs and return its path. Errors as `write_report`."""
    data = [read_run(run) for run in runs]
    html = _render("ehap_jax: comparison", f"{len(data)} runs", [_section(d, str(d.path)) for d in data])
    return _write(Path(output), html)


def _section(data: RunData, title: str) -> dict[str, Any]:
    return {
        "title": title,
        "rows": stage_rows(data.summary),
        "checks": "  ".join(f"{k.replace('_', ' ')}: {v:.2g}" for k, v in data.summary.get("checks", {}).items()),
        "figures": list(_figures(data)),
        "files": {
            name: json.dumps(content, indent=1)
            for name, content in (("config.json", data.config), ("versions.json", data.versions))
        },
    }


def _figures(data: RunData):
    yield _picture(accuracy_per_stage(data.stages), "Test accuracy: seeds in blue, mean ± standard deviation in black.")
    if data.plan:
        yield _picture(kept_channels(data.plan), "Output channels that the plan keeps in every conv and dense layer.")
    reference = data.scores.get("float32")
    if not reference:
        return
    caption = (
        "Score of every channel, float32; the bar is the layer's median. Triangles count the channels below the axis: "
        "grey those at exactly 0 (dead), red negative estimates, which are noise of the estimator."
    )
    yield _picture(sensitivity_per_layer(reference), caption)
    for policy in ("float16", "bfloat16"):
        if policy in data.scores:
            figure = score_scatter(reference, data.scores[policy], ("float32", policy))
            yield _picture(figure, f"Scores in {policy} against float32, from the same probes.")


def _describe(data: RunData) -> str:
    device = data.versions.get("device", {})
    packages = data.versions.get("packages", {})
    git = data.versions.get("git") or {}
    parts = [
        f"{data.config.get('model', 'model')} on {data.config.get('data', 'data')}",
        f"JAX {packages.get('jax', '?')} on {device.get('kind', '?')}",
        f"commit {git['commit'][:10]}{' (modified)' if git.get('modified') else ''}" if git else "",
        f"{data.summary['seconds']['total']:.0f} s" if "total" in data.summary.get("seconds", {}) else "",
    ]
    return " · ".join(part for part in parts if part)


def _picture(figure, text: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION)
    width = int(figure.get_size_inches()[0] * 96)
    return {"data": base64.b64encode(buffer.getvalue()).decode(), "width": width, "text": text}


def _render(title: str, subtitle: str, sections: list[dict[str, Any]]) -> str:
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'ehap-jax[report]'") from error
    source = files("ehap_jax.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(title=title, subtitle=subtitle, sections=sections, header=HEADER)


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
