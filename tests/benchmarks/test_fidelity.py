"""What the fidelity table says of rankings that are known, and what runs are compared."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.fidelity import agreement, compare, main, table, within
from benchmarks.measure import fresh_process, read_results, write_results


def run(name, scores, **about):
    scores = np.asarray(scores, np.float64)
    return {"run": name, "traces": (2 * scores).tolist(), "scores": scores.tolist(), **about}


def test_agreement_of_known_rankings():
    draw = np.random.default_rng(0)
    truth = draw.normal(size=41)
    found = truth + 0.3 * draw.normal(size=41)
    row = agreement(run("float16", found), run("float64", truth))
    np.testing.assert_allclose(row["spearman"], spearmanr(found, truth).statistic, rtol=1e-12)
    kept = [set(np.argsort(x)[20:].tolist()) for x in (found, truth)]
    assert row["kept_half_shared"] == len(kept[0] & kept[1]) / 21
    assert row["kept_half_differs_in"] == len(kept[0] - kept[1])
    np.testing.assert_allclose(row["relative_error"], np.linalg.norm(found - truth) / np.linalg.norm(truth))
    assert row["opposite_sign"] == int((np.sign(found) != np.sign(truth)).sum())
    same = agreement(run("float32", truth), run("float64", truth))
    assert same["spearman"] == pytest.approx(1) and same["kept_half_shared"] == 1 and same["relative_error"] == 0


@pytest.mark.parametrize(
    ("correlation", "shared", "kept"), [(0.9995, 0.99, True), (0.998, 0.99, False), (1, 0.97, False)]
)
def test_bounds(correlation, shared, kept):
    row = {"run": "float16", "spearman": correlation, "kept_half_shared": shared}
    assert within(row) is kept
    assert within({**row, "run": "float32"}) is None


def test_only_runs_with_as_many_probes_are_compared():
    truth = np.arange(10.0)
    runs = {
        "exact": run("exact", truth),
        "float64": run("float64", truth, probes=4),
        "float32": run("float32", truth, probes=4, rejected=0),
        "float16": run("float16", truth, probes=2, rejected=1),
    }
    rows = compare(runs)
    assert [row["run"] for row in rows] == ["exact", "float32"]
    assert "NOT" not in table({"resnet20": {"images": 8, "runs": runs, "rows": rows}})


def test_what_is_done_is_not_repeated(tmp_path, capsys):
    out, truth = tmp_path / "fidelity.json", np.arange(1.0, 11.0)
    runs = {"exact": run("exact", truth), "float64": run("float64", truth, probes=3)}
    write_results(out, {"resnet20": {"images": 8, "probes": 3, "runs": runs, "rows": []}})
    before = read_results(out)
    given = ["--networks", "resnet20", "--runs", "float64", "--images", "8", "--probes", "3"]
    main(["--data", "/nowhere", "--out", str(out), *given])
    assert read_results(out) == before and "resnet20, 8 images, 3 probes" in capsys.readouterr().out


def test_a_fresh_process_gives_the_object_in_its_last_line(tmp_path, monkeypatch):
    (tmp_path / "speaker.py").write_text("import os, json\nprint('hello')\nprint(json.dumps({'x': os.environ['X']}))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert fresh_process("speaker", [], {"X": "3"}) == {"x": "3"}
    with pytest.raises(RuntimeError, match=r"speaker_that_is_not_there ended with status 1: .*No module named"):
        fresh_process("speaker_that_is_not_there", [])
