"""Pages, plots and tables are checked for what they say, on a synthetic run directory."""

import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from rich.console import Console

from ehap_jax.report import (
    Convergence,
    accuracy_against_cost,
    accuracy_curves,
    accuracy_per_stage,
    cost_bars,
    kept_channels,
    read_run,
    score_arrays,
    score_scatter,
    sensitivity_per_layer,
    stage_html,
    stage_markdown,
    stage_rows,
    stage_table,
    trace_convergence,
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
SCORES = np.array([1e-3, 0.0, -1e-5, 2e-2])
CONVERGENCE = Convergence(np.array([1, 2, 4]), np.array([3.0, 5.0, 4.0]), np.array([np.nan, 1.0, 0.5]))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my <run>"
    folder.mkdir()
    files = {
        "config.json": {"model": "resnet8", "data": "<script>alert(1)</script>"},
        "versions.json": {"packages": {"jax": "0.10.2"}, "device": {"kind": "cpu"}},
        "summary.json": {"stages": STAGES, "checks": {"masked_minus_shrunk": 2e-7}, "seconds": {"total": 12.0}},
        "plan.json": PLAN,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    a = "params/a/kernel"
    arrays = score_arrays(
        {"float32": {a: SCORES}, "float16": {a: SCORES * 1.01}}, sem={a: SCORES**2}, convergence=CONVERGENCE
    )
    np.savez(folder / "scores.npz", **arrays)
    return folder


def texts(figure):
    """Every visible text of a figure."""
    found = []
    for axes in figure.axes:
        found += [t.get_text() for t in axes.texts] + [axes.get_title(loc="left")]
        found += [t.get_text() for t in [*axes.get_xticklabels(), *axes.get_yticklabels()]]
    return found


def dots(axes):
    return np.concatenate([c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)])


class Page(HTMLParser):
    """Tags that are open, ids, addresses that would be fetched and text outside styles."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.addresses, self.shown, self.pictures = [], [], [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag != "script" and not any(name.startswith("on") for name in attrs)
        self.pictures += tag == "svg"
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.addresses += [attrs[k] for k in ("src", "href", "xlink:href") if k in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.shown.append(data)


@pytest.mark.slow
def test_page_is_self_contained_and_escaped(run):
    before = {p.name for p in run.iterdir()}
    html = write_report(run).read_text()
    page = Page(html)
    shown = " ".join(page.shown)
    assert page.open == [] and page.pictures == 5
    assert "my <run>" in shown and "<script>alert(1)" in shown  # as text: Page refuses the tag
    assert "98.50 % ± 0.50" in shown and "250 (25%)" in shown and "masked minus shrunk 2e-07" in shown
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    assert "http:" not in html and "https:" not in html and "url(http" not in html
    assert {p.name for p in run.iterdir()} == before | {"report.html"}


@pytest.mark.slow
def test_pictures_follow_the_theme_and_keep_their_ids_apart(run):
    html = write_report(run).read_text()
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in pictures]
    assert sum(map(len, ids)) == len(set().union(*ids)) > 100
    for svg, own in zip(pictures, ids, strict=True):
        assert set(re.findall(r'(?:xlink:href="|url\()#([^")]*)', svg)) <= own
        assert "currentColor" in svg and "#1b1b1b" not in svg


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.slow
def test_a_page_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    page = write_report(run)
    before, names = page.read_bytes(), sorted(p.name for p in run.iterdir())

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert page.read_bytes() == before and sorted(p.name for p in run.iterdir()) == names


@pytest.mark.slow
def test_comparison_of_two_runs(run, tmp_path, capsys):
    page = write_comparison([run, run], tmp_path / "both.html")
    shown = Page(page.read_text()).shown
    assert "my <run> (1)" in shown and "my <run> (2)" in shown
    assert shown.count("50.00 % ± 10.00 (−48.50)") == 4  # both in the overview and in each run's own table
    assert command([str(run), str(run), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page.read_text()
    assert command([str(tmp_path / "nowhere")]) == 2
    assert "no run directory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one"):
        write_comparison([], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_a_run_without_scores_or_plan_still_has_its_table(run):
    (run / "scores.npz").unlink()
    (run / "plan.json").unlink()
    assert Page(write_report(run).read_text()).pictures == 1


def test_rows_measure_against_the_dense_stage():
    row = ("pruned", "50.00 % ± 10.00 (−48.50)", "250 (25%)", "1,000 (25%)", "1,000 (25%)")
    assert stage_rows({"stages": STAGES})[1] == row
    assert stage_rows({"stages": STAGES[::-1]})[0] == row
    single = [{**STAGES[0], "accuracy_std": None}]
    assert stage_rows({"stages": single})[0][1] == "98.50 %"


def test_tables_in_three_forms():
    summary = {"stages": [STAGES[0], {**STAGES[1], "stage": "a|b [red]<i>"}]}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(stage_table(summary))
    assert "a|b [red]<i>" in console.export_text()
    lines = stage_markdown(summary).splitlines()
    assert lines[0] == "| stage | test accuracy | parameters | MACs | bytes |"
    assert lines[1] == "|---|---:|---:|---:|---:|" and r"a\|b" in lines[3] and len(lines) == 4
    assert "<td>a|b [red]&lt;i&gt;</td>" in stage_html(summary) and stage_html(summary).count("<tr>") == 3


def test_sensitivity_shows_every_channel_that_is_not_zero_and_counts_the_rest():
    values = np.array([4.0, 2.0, 3.0, 1.0, 0.0, -0.5, -0.25])
    figure = sensitivity_per_layer({"params/a/kernel": values, "params/b/kernel": np.ones(2)})
    main, below = figure.axes
    assert sorted(dots(main)[:, 1]) == sorted([*np.abs(values[values != 0]), 1.0, 1.0])
    assert [t.get_text() for t in below.texts] == ["1", "2"]  # dead, negative; none in layer b
    assert "9 channels, 1 exactly 0 (dead), 2 negative" in texts(figure)
    medians = [c.get_segments()[0][0][1] for c in main.collections if hasattr(c, "get_segments")]
    assert medians == [1.0, 1.0]


def test_sensitivity_of_odd_scores():
    assert "3 channels, 3 exactly 0 (dead), 0 negative" in texts(sensitivity_per_layer({"k": np.zeros(3)}))
    assert len(sensitivity_per_layer({"k": np.ones(3)}).axes) == 1  # nothing to count, no line for it
    sensitivity_per_layer({r"$\nonsense{$--> <b>": np.ones(2)}).savefig(
        "/dev/null", format="svg"
    )  # a name is no formula
    with pytest.raises(ValueError, match="empty"):
        sensitivity_per_layer({})


@pytest.mark.slow
@pytest.mark.parametrize("layers", [8, 110])
def test_every_layer_keeps_its_name(layers):
    paths = [f"params/layer{i}/conv/kernel" for i in range(layers)]
    plan = {"keep": {p: [0] for p in paths}, "shapes": {p: [3, 3, 2, 2] for p in paths}}
    for figure in (kept_channels(plan), sensitivity_per_layer({p: np.array([1.0, 2.0]) for p in paths})):
        names = [t.get_text() for axes in figure.axes for t in axes.get_xticklabels()]
        assert names == [f"layer{i}/conv" for i in range(layers)]
        assert max(len(axes.get_xticks()) for axes in figure.axes) <= 40
        assert len({axes.get_ylim() for axes in figure.axes}) == 1  # rows have one scale
        figure.canvas.draw()
        width = figure.bbox.width
        assert all(0 <= t.get_window_extent().x0 <= t.get_window_extent().x1 <= width
                   for axes in figure.axes for t in axes.texts)  # fmt: skip


def test_kept_channels_follow_the_plan():
    found = texts(kept_channels(PLAN))
    assert "2/4" in found and "2/2" in found and "4 of 6 (67%)" in found
    torch = {"keep": {"w": [0]}, "shapes": {"w": [8, 3, 3, 3]}, "axes": {"w": 0}}
    assert "1/8" in texts(kept_channels(torch))
    with pytest.raises(ValueError, match="plan is empty"):
        kept_channels({"keep": {}, "shapes": {}})


def test_scatter_states_rank_correlation_and_difference():
    a = {"k": np.array([1.0, 2.0, 3.0, -4.0])}
    figure = score_scatter(a, {"k": -a["k"]}, ("x", "y"))
    assert "Spearman -1.00000, median relative difference 2\n0 of 4 channels shown: positive in both" in texts(figure)
    figure = score_scatter(a, {"k": 1.5 * a["k"]}, ("x", "y"))
    assert "Spearman 1.00000, median relative difference 0.5\n3 of 4 channels shown: positive in both" in texts(figure)
    assert dots(figure.axes[0]).tolist() == [[1, 1.5], [2, 3], [3, 4.5]]
    long = np.arange(1.0, 2001)
    swapped = np.concatenate([long[[1, 0]], long[2:]])
    assert "above 0.99999" in "".join(texts(score_scatter({"k": long}, {"k": swapped}, ("x", "y"))))
    assert "undefined" in "".join(texts(score_scatter({"k": np.zeros(3)}, {"k": np.zeros(3)}, ("x", "y"))))
    with pytest.raises(ValueError, match=r"scores of k: x has shape \(4,\), y has none"):
        score_scatter(a, {}, ("x", "y"))


def test_accuracy_shows_every_seed_and_the_others_close_up():
    stages = [*STAGES, {**STAGES[0], "stage": "finetuned", "accuracy": 0.975, "accuracies": [0.97, 0.98]}]
    full, close = accuracy_per_stage(stages).axes
    assert sorted(dots(full)[:, 1].round(6)) == [40.0, 60.0, 97.0, 98.0, 98.0, 99.0]
    assert sorted(dots(close)[:, 1].round(6)) == [97.0, 98.0, 98.0, 99.0]
    assert close.get_ylim()[0] > 94 and "↓ 50.0" in [t.get_text() for t in close.texts]
    assert len(accuracy_per_stage(stages[::2]).axes) == 1  # nothing collapsed


def test_convergence_draws_the_interval():
    figure = trace_convergence(*CONVERGENCE)
    (axes,) = figure.axes
    (band,) = (c.get_paths()[0].vertices for c in axes.collections)
    np.testing.assert_allclose(sorted(band[band[:, 0] == 4][:, 1])[0], 4 - 1.96 * 0.5)
    np.testing.assert_allclose(sorted(band[band[:, 0] == 2][:, 1])[-1], 5 + 1.96)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), CONVERGENCE.mean)
    assert "4 ± 0.98 after 4 probes" in texts(figure)
    with pytest.raises(ValueError, match="alike"):
        trace_convergence(np.arange(3), np.arange(3), np.arange(2))


def test_comparison_plot_is_relative_to_each_runs_dense():
    small = [STAGES[0], {**STAGES[0], "stage": "int8", "accuracy": 0.98, "bytes": 1000}]
    (axes,) = accuracy_against_cost({"a": STAGES, "b": small}).axes
    lines = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
    np.testing.assert_allclose(lines["a"], [[100, 0]])
    np.testing.assert_allclose(lines["b"], [[25, -0.5], [100, 0]], atol=1e-9)
    assert "1 stage more than 10 points below not shown" in [t.get_text() for t in axes.texts]
    swept = [stage | {"accuracy": 0.4} if stage["curve"] == "random" else stage for stage in sweep_stages()]
    (axes,) = accuracy_against_cost({"sweep": swept}, "macs").axes
    drawn = {c.get_label(): len(c.lines[0].get_xydata()) for c in axes.containers}
    assert drawn == {
        f"sweep: {curve}": sum(s["curve"] == curve for s in swept) for s in swept for curve in [s["curve"]]
    }
    assert "sweep: random" in drawn and not any("not shown" in t.get_text() for t in axes.texts)
    (axes,) = accuracy_against_cost({str(i): small for i in range(8)}).axes
    looks = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers}
    assert len(looks) == 8
    (axes,) = accuracy_against_cost({"b": small}, "macs").axes
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata()[:, 0], [100, 100])
    with pytest.raises(ValueError, match="not 'watts'"):
        accuracy_against_cost({"b": small}, "watts")


def sweep_stages():
    dense = {**STAGES[0], "curve": "dense"}
    small = [
        {**STAGES[1], "stage": f"hessian {macs}", "curve": "hessian", "macs": macs, "accuracy": accuracy}
        | {"accuracies": [accuracy - 0.1, accuracy + 0.1]}
        for macs, accuracy in ((2000, 0.8), (1000, 0.5))
    ]
    return [dense, *small, {**small[0], "stage": "random 2000", "curve": "random"}]


def test_curves_of_a_sweep_go_up_in_cost_beside_the_dense_line():
    (axes,) = accuracy_curves(sweep_stages()).axes
    lines = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
    np.testing.assert_allclose(lines["hessian"], [[25, 50], [50, 80]])
    np.testing.assert_allclose(lines["random"], [[50, 80]])
    (bars,) = axes.containers[0].lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [40, 60])
    dashed = next(line for line in axes.lines if line.get_label() == "dense, 98.50 %")
    np.testing.assert_allclose(dashed.get_ydata(), [98.5, 98.5])
    assert "2 seeds, mean ± standard deviation" in texts(axes.figure)
    with pytest.raises(ValueError, match="stages on a curve"):
        accuracy_curves(STAGES)


def test_bars_carry_their_numbers():
    figure = cost_bars({"seconds per probe": {"float32": 0.5, "float16": 0.4}, "megabytes": {"float32": 20.0}})
    time, memory = figure.axes
    assert [bar.get_width() for bar in time.patches] == [0.5, 0.4] and len(memory.patches) == 1
    assert {"0.5", "0.4  (0.80 ×)", "20", "Seconds per probe"} <= set(texts(figure))


@pytest.mark.slow
def test_a_sweep_shows_its_curves_and_costs_instead_of_stages(run):
    summary = {"stages": sweep_stages(), "costs": {"seconds per probe": {"float32": 1.0}}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.json").write_text(json.dumps({"dense": "somewhere/resnet20.th", "data": "npz:cifar10.npz"}))
    html = write_report(run).read_text()
    assert "resnet20.th on npz:cifar10.npz" in html
    assert re.findall(r'aria-label="([^"]*)"', html)[:3] == [
        "Accuracy against MACs", "Accuracy against parameters", "Seconds per probe",
    ]  # fmt: skip
    assert "Accuracy per stage" not in html and Page(html).open == []


def test_scores_come_back_as_they_were_written(run):
    data = read_run(run)
    assert list(data.scores) == ["float32", "float16"] and list(data.sem) == ["params/a/kernel"]
    np.testing.assert_array_equal(data.scores["float16"]["params/a/kernel"], SCORES * 1.01)
    np.testing.assert_array_equal(data.sem["params/a/kernel"], SCORES**2)
    for found, written in zip(data.convergence, CONVERGENCE, strict=True):
        np.testing.assert_array_equal(found, written)
    with pytest.raises(ValueError, match="cannot be called 'sem'"):
        score_arrays({"sem": {}})


def stage_with(**changes):
    return json.dumps({"stages": [{**STAGES[0], **changes}]})


def plan_with(**changes):
    return json.dumps({**PLAN, **changes})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "not a JSON file"),
        ("config.json", "[]", "must hold an object"),
        ("summary.json", "{}", 'no list of "stages"'),
        ("summary.json", '{"stages": [{"stage": "dense"}]}', "'dense' lacks accuracy"),
        ("summary.json", '{"stages": [3]}', "stage 0 must be an object"),
        ("summary.json", stage_with(accuracy=98.5), "between 0 and 1, not 98.5"),
        ("summary.json", stage_with(accuracy=float("nan")), "between 0 and 1"),
        ("summary.json", stage_with(accuracies=[]), "one number per seed"),
        ("summary.json", stage_with(accuracies=[0.9]), "is not the mean"),
        ("summary.json", stage_with(accuracy_std=-1), "at least 0, or null"),
        ("summary.json", stage_with(macs=1.5), '"macs" must be a positive whole number, not 1.5'),
        ("summary.json", json.dumps({"stages": STAGES, "checks": {"a": "b"}}), '"checks" must be an object of numbers'),
        ("summary.json", json.dumps({"stages": STAGES, "costs": {"s": {"a": -1}}}), '"costs" must be positive numbers'),
        ("summary.json", json.dumps({"stages": STAGES, "costs": {"s": 3}}), '"costs" must be an object of objects'),
        ("summary.json", stage_with(curve=3), '"curve" must be the name of a curve'),
        ("plan.json", "{}", 'no object "keep"'),
        ("plan.json", plan_with(keep={"params/a/kernel": [4]}), "params/a/kernel must keep indices from 0 to 3"),
        ("plan.json", plan_with(keep={"params/a/kernel": [1, 1]}), "an index twice"),
        ("plan.json", plan_with(keep={"params/c/kernel": [0]}), '"shapes" must give the full shape of params/c/kernel'),
        ("plan.json", plan_with(axes={"params/b/kernel": 2}), "has no axis 2"),
        ("scores.npz", "no archive", "not a readable .npz archive of plain arrays"),
    ],
)
def test_ill_formed_files_are_named(run, name, content, message):
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_run(run)
    assert str(run / name) in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"float32": np.ones(2)}, "must be called"),
        ({"float32|k": np.ones((2, 2))}, "must be real numbers (n,)"),
        ({"float32|k": np.array(["a"])}, "must be real numbers (n,)"),
        ({"float32|k": np.array([None])}, "not a readable .npz archive of plain arrays"),
        ({"float32|k": np.array([1.0, np.inf])}, "not finite"),
        ({"convergence|mean": np.ones(2)}, "must have all of"),
        ({f"convergence|{n}": np.ones(2) for n in ("probes", "mean", "sem")}, "must ascend"),
    ],
)
def test_ill_formed_scores_are_named(run, arrays, message):
    np.savez(run / "scores.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_run(run)


def test_missing_files_are_named(run):
    (run / "versions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"versions\.json"):
        read_run(run)


@pytest.mark.parametrize("module", ["matplotlib.figure", "jinja2"])
def test_a_missing_package_names_the_extra(run, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'ehap-jax[report]'")):
        write_report(run)
    assert not (run / "report.html").exists()


MARKUP = "<img src=x onerror=alert(1)>'\"&amp;]]>{{7*7}}$\\frac{$"
"""A name that would be a tag, an attribute, an entity, a template's expression or a formula."""


def hostile(value):
    """A document with the markup in every name and text, its numbers as they are."""
    if isinstance(value, dict):
        return {key if key in KNOWN else f"{key}{MARKUP}": hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value}{MARKUP}" if isinstance(value, str) else value


KNOWN = {
    "stages", "stage", "accuracy", "accuracy_std", "accuracies", "params", "macs", "bytes", "curve", "checks", "costs",
    "seconds", "seeds", "keep", "shapes", "axes", "model", "data", "dense", "packages", "jax", "device", "kind", "git",
    "commit",
}  # fmt: skip
"""Names that the format of a run gives; all others are a stranger's."""


@pytest.mark.slow
@pytest.mark.parametrize("curve", [False, True])
def test_names_of_strangers_are_text_wherever_they_stand(tmp_path, curve):
    folder = tmp_path / f"run{MARKUP.replace('/', '')}"
    folder.mkdir()
    files = {
        "config.json": {"model": "resnet8", "data": "digits", "dense": "runs/a", "setting": {"name": "value"}},
        "versions.json": {"packages": {"jax": "0.10.2"}, "device": {"kind": "cpu"}, "git": {"commit": "abc"}},
        "summary.json": {
            "stages": [stage | ({"curve": "hessian"} if curve else {}) for stage in STAGES],
            "checks": {"masked": 2e-7},
            "seconds": {"total": 12.0},
            "costs": {"seconds per probe": {"float32": 1.0, "float16": 0.5}},
        },
        "plan.json": PLAN,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(hostile(content)))
    kernel = f"params/a/kernel{MARKUP}"
    arrays = score_arrays(
        {f"float32{MARKUP}": {kernel: SCORES}, f"float16{MARKUP}": {kernel: SCORES * 1.01}}, convergence=CONVERGENCE
    )
    np.savez(folder / "scores.npz", **arrays)
    page_file = write_comparison([folder, folder], tmp_path / "both.html") if curve else write_report(folder)
    html = page_file.read_text()
    page = Page(html)  # refuses scripts, handlers and tags that are not closed
    assert page.open == [] and "<img" not in html and page.pictures >= 4
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    shown = " ".join(page.shown)
    as_text = MARKUP.partition('"')[0]  # what follows is escaped once more in JSON
    for name in ("dense", "digits", "masked", "total", "setting", "cpu"):
        assert f"{name}{as_text}" in shown, name
