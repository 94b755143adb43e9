"""The recipe on removal costs at a tiny size: stopped, resumed, every criterion with its measurements."""

import json

import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from recipes import compare_removal
from tests.recipes.tiny import phase

pytestmark = pytest.mark.slow


def test_compares_stops_and_resumes(dense, tmp_path):
    run = tmp_path / "run"
    given = ["short", str(dense), "--data", "digits", "--train-images", "300", "--examples", "16", "--seeds", "1"]
    given += ["--statistics-images", "256", "--macs", "0.6", "--params", "--tune", "0.6", "--rounds", "2"]
    given += [*phase("finetune"), "--output", str(run)]
    assert compare_removal.command([*given, "--max-minutes", "0.001"]) == 3
    first = json.loads((run / "removal.json").read_text())
    assert 0 < first["cells_done"] < first["cells"] == 21
    assert "UNFINISHED" in (run / "removal.txt").read_text()
    assert compare_removal.command([*given, "--resume"]) == 0
    result = json.loads((run / "removal.json").read_text())
    assert result["cells_done"] == 21
    found = {(e["criterion"], e["per"]): e for e in result["statistics"]}
    assert {"random", "HAP, exact", "removal, T=4", "removal, T=4, rounds and interactions"} <= {
        name for name, _ in found
    }
    for entry in found.values():
        assert all(0 <= entry[name]["mean"] <= 1 for name in compare_removal.MEASURED)
    assert (run / "removal.png").stat().st_size > 10_000
    text = (run / "removal.txt").read_text()
    assert "60% of the macs" in text and "removal, logits, per unit" in text and "UNFINISHED" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "--seeds and --rounds are at least 1"),
        (["--macs", "1.5"], "--macs and --params are fractions between 0 and 1"),
        (["--probes", "-1"], "--probes is 0 or more"),
    ],
)
def test_settings_that_cannot_work(dense, tmp_path, capsys, options, message):
    given = ["short", str(dense), "--data", "digits", "--output", str(tmp_path / "run"), *options]
    assert compare_removal.command(given) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
