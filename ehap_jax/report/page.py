"""A run, or several side by side, as one HTML file that needs nothing else."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ehap_jax._whole_files import write_text
from ehap_jax.report import figure_style
from ehap_jax.report.accuracy_plots import accuracy_against_cost, accuracy_curves, accuracy_per_stage
from ehap_jax.report.layer_plots import kept_channels, sensitivity_per_layer
from ehap_jax.report.run_data import RunData, read_run
from ehap_jax.report.tables import HEADER, html_table, stage_caption, stage_html, stage_rows
from ehap_jax.report.trace_plots import cost_bars, score_scatter, trace_convergence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "float32"
THEME = {
    figure_style.INK: "currentColor",
    figure_style.SOFT: "var(--soft)",
    figure_style.LINE: "var(--line)",
    figure_style.BAR: "var(--bar)",
    figure_style.BLUE: "var(--blue)",
}
"""Colours of a figure that follow the page's theme, light or dark."""


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    The page is made from the files of the run alone (see `ehap_jax.report.run_data`), holds its styles and pictures,
    and replaces an earlier one in one step.

    Raises:
        FileNotFoundError, ValueError: the run lacks a file or has an ill-formed one (see `read_run`).
        ImportError: the "report" extra is not installed.
    """
    data = read_run(run)
    html = _render(f"ehap_jax: {_name(data)}", _describe(data), None, [_section(data, "Stages")])
    write_text(data.path / "report.html", html)
    return data.path / "report.html"


def write_comparison(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Write one page that compares several runs and then shows each, and return its path.

    Raises:
        FileNotFoundError, ValueError: a run lacks a file or has an ill-formed one, or no run is named.
        ImportError: the "report" extra is not installed.
    """
    data = [read_run(run) for run in runs]
    if not data:
        raise ValueError("name at least one run directory to compare")
    names = _distinct([_name(run) for run in data])
    rows = [(name, *row) for name, run in zip(names, data, strict=True) for row in stage_rows(run.summary)]
    stages = {name: run.stages for name, run in zip(names, data, strict=True)}
    overview = {
        "table": html_table(("run", *HEADER), rows),
        "caption": "accuracy: mean ± standard deviation; in brackets points and shares against the run's own dense "
        "network, or its first stage",
        "figures": [
            _picture(accuracy_against_cost(stages, cost), "Mean ± standard deviation of every stage.", cost)
            for cost in ("macs", "bytes")
        ],
    }
    sections = [_section(run, name) for name, run in zip(names, data, strict=True)]
    write_text(output, _render("ehap_jax: comparison", f"{len(data)} runs", overview, sections))
    return Path(output)


def _name(data: RunData) -> str:
    return data.path.name or data.path.resolve().name


def _distinct(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _section(data: RunData, title: str) -> dict[str, Any]:
    summary = data.summary
    facts = {name.replace("_", " "): f"{value:.2g}" for name, value in summary.get("checks", {}).items()}
    facts |= {f"{name.replace('_', ' ')} time": f"{value:,.0f} s" for name, value in summary.get("seconds", {}).items()}
    return {
        "title": title,
        "subtitle": _describe(data),
        "table": stage_html(summary),
        "caption": stage_caption(summary),
        "facts": facts,
        "figures": [_picture(figure, text, f"{title} {i}") for i, (figure, text) in enumerate(_figures(data))],
        "files": {
            name: json.dumps(content, indent=1, ensure_ascii=False)
            for name, content in (("config.json", data.config), ("versions.json", data.versions))
        },
    }


def _figures(data: RunData) -> Iterator[tuple[Figure, str]]:
    if any(stage.get("curve") for stage in data.stages):
        for cost in ("macs", "params"):
            yield accuracy_curves(data.stages, cost), "Mean ± standard deviation over the seeds."
    else:
        text = "Blue: every seed. Black: mean ± standard deviation over the seeds."
        yield accuracy_per_stage(data.stages), text
    if data.summary.get("costs"):
        yield (
            cost_bars(data.summary["costs"]),
            "On the device named above; in brackets as multiples of the first.",
        )
    name = REFERENCE if REFERENCE in data.scores else next(iter(data.scores), None)
    if name is not None:
        text = (
            f"Score of every channel in {name}; the bar is the layer's median. A triangle is a negative estimate, "
            "drawn at its absolute value: noise, wherever the true trace cannot be negative. Channels at exactly 0 are "
            "dead."
        )
        yield sensitivity_per_layer(data.scores[name]), text
    if data.plan and (data.plan["keep"] or data.plan.get("axes")):
        yield kept_channels(data.plan), "Output channels that the plan keeps (blue) and prunes (grey)."
    if name is not None:
        for other in sorted(set(data.scores) - {name}, reverse=True):
            figure = score_scatter(data.scores[name], data.scores[other], (name, other))
            yield figure, f"Scores in {other} against {name}, one dot per channel."
    if data.convergence is not None:
        text = "Running mean of the total trace; the band is ± 1.96 standard errors, the dashes the last mean."
        yield trace_convergence(*data.convergence), text


def _describe(data: RunData) -> str:
    device, packages, git = (_dictionary(data.versions.get(name)) for name in ("device", "packages", "git"))
    parts = [
        f"{_network(data.config)} on {data.config.get('data', 'data')}",
        f"JAX {packages['jax']}" if packages.get("jax") else "",
        str(device.get("kind", "")),
        f"commit {str(git['commit'])[:10]}{' (modified)' if git.get('modified') else ''}" if "commit" in git else "",
    ]
    return " · ".join(part for part in parts if part)


def _network(config: dict[str, Any]) -> str:
    """The model, or the name of what the run started from."""
    source = config.get("dense") or config.get("network")
    return str(config.get("model") or (Path(source).name if isinstance(source, str) else "network"))


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _picture(figure: Figure, text: str, name: str) -> dict[str, Any]:
    """The figure as inline SVG in the colours of the page; ``name`` keeps the ids of pictures on one page apart."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ehap_jax"}):
        figure.savefig(buffer, format="svg", dpi=160, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    prefix = re.sub(r"\W", "-", name)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{prefix}-", svg)
    for color, themed in THEME.items():
        svg = svg.replace(f": {color}", f": {themed}")
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    svg = re.sub(r'\b(width|height)="[^"]*pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_title_of(figure)}" width="{width}" height="{height}"', 1)
    return {"svg": svg, "width": width, "text": text}


def _title_of(figure: Figure) -> str:
    from html import escape

    return escape(figure.axes[0].get_title(loc="left"))


def _render(title: str, subtitle: str, overview: dict[str, Any] | None, sections: list[dict[str, Any]]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'ehap-jax[report]'") from error
    source = files("ehap_jax.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(source).render(title=title, subtitle=subtitle, overview=overview, sections=sections)
