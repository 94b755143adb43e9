"""Pages and plots are checked for what they say, on a synthetic run directory."""

import json

import numpy as np
import pytest

from ehap_jax.report import (
    accuracy_per_stage,
    kept_channels,
    read_run,
    score_scatter,
    sensitivity_per_layer,
    stage_rows,
    write_comparison,
    write_report,
)
from ehap_jax.report.__main__ import command

STAGES = [
    {"stage": "dense", "accuracy": 0.985, "accuracy_std": 0.005, "accuracies": [0.98, 0.99]}
    | {"params": 1000, "macs": 4000, "bytes": 4000},
    {"stage": "pruned", "accuracy": 0.5, "accuracy_std": 0.1, "accuracies": [0.4, 0.6]}
    | {"params": 250, "macs": 1000, "bytes": 1000},
]
PLAN = {"keep": {"params/a/kernel": [0, 2]}, "shapes": {"params/a/kernel": [3, 3, 1, 4], "params/b/kernel": [4, 2]},
        "axes": {"params/a/kernel": 3, "params/b/kernel": 1}}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my <run>"
    folder.mkdir()
    files = {
        "config.json": {"model": "resnet8", "data": "digits"},
        "versions.json": {"packages": {"jax": "0.10.2"}, "device": {"kind": "cpu"}},
        "summary.json": {"stages": STAGES, "checks": {"masked_minus_shrunk": 2e-7}, "seconds": {"total": 12.0}},
        "plan.json": PLAN,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    scores = np.array([1e-3, 0.0, -1e-5, 2e-2])
    np.savez(folder / "scores.npz", **{"float32|params/a/kernel": scores, "float16|params/a/kernel": scores * 1.01})
    return folder


def texts(figure):
    axes = figure.axes[0]
    found = [t.get_text() for t in axes.texts] + [axes.get_title(loc="left")]
    return found + [t.get_text() for t in axes.get_xticklabels()]


def test_page_is_self_contained_and_escaped(run):
    page = write_report(run)
    html = page.read_text()
    assert "my &lt;run&gt;" in html and "<run>" not in html
    assert "98.50 % ± 0.50" in html and "250 (25%)" in html and "masked minus shrunk: 2e-07" in html
    assert html.count("data:image/png;base64,") == 4
    assert "http://" not in html and "https://" not in html and 'src="/' not in html
    assert sorted(p.name for p in run.iterdir()) == sorted(
        ["config.json", "versions.json", "summary.json", "plan.json", "scores.npz", "report.html"]
    )


def test_comparison_of_two_runs(run, tmp_path, capsys):
    page = write_comparison([run, run], tmp_path / "both.html")
    assert page.read_text().count("<h2>") == 2
    assert command([str(run), str(run), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page.read_text()
    assert command([str(tmp_path / "nowhere")]) == 2
    assert "no run directory" in capsys.readouterr().err


def test_a_run_without_scores_or_plan_still_has_its_table(run):
    (run / "scores.npz").unlink()
    (run / "plan.json").unlink()
    assert write_report(run).read_text().count("data:image/png;base64,") == 1


def test_rows_give_shares_of_the_first_stage():
    assert stage_rows({"stages": STAGES})[1] == ("pruned", "50.00 % ± 10.00", "250 (25%)", "1,000 (25%)", "1,000 (25%)")
    single = [{**STAGES[0], "accuracy_std": None}]
    assert stage_rows({"stages": single})[0][1] == "98.50 %"


def test_sensitivity_counts_dead_and_negative_channels():
    figure = sensitivity_per_layer({"params/a/kernel": np.array([1.0, 0.0, 0.0, -1.0, -2.0, -3.0])})
    found = texts(figure)
    assert "2" in found and "3" in found and "a" in found
    assert len(sensitivity_per_layer({"k": np.zeros(3)}).axes) == 1  # nothing positive to draw


def test_kept_channels_follow_the_plan():
    found = texts(kept_channels(PLAN))
    assert "2/4" in found and "2/2" in found


def test_scatter_states_the_rank_correlation():
    a = {"k": np.array([1.0, 2.0, 3.0, 4.0])}
    found = texts(score_scatter(a, {"k": a["k"][::-1]}, ("x", "y")))
    assert any("Spearman -1.00000 (4 of 4" in text for text in found)


def test_accuracy_shows_every_seed():
    figure = accuracy_per_stage(STAGES)
    assert sum(len(c.get_offsets()) for c in figure.axes[0].collections if hasattr(c, "get_offsets")) >= 4
    assert "98.5" in texts(figure)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "not a JSON file"),
        ("summary.json", "{}", 'no list of "stages"'),
        ("summary.json", '{"stages": [{"stage": "dense"}]}', "lacks accuracy"),
    ],
)
def test_ill_formed_files_are_named(run, name, content, message):
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(run)


def test_missing_files_are_named(run):
    (run / "versions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"versions\.json"):
        read_run(run)
