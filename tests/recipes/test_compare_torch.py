"""The comparison with PyTorch at a tiny size: what it writes, what it finds, and the errors a user can run into."""

import json
import re
from io import StringIO

import pytest
from rich.console import Console

from recipes import compare_torch
from recipes.torch_comparison import cost as torch_cost
from recipes.torch_comparison.limits import SAME, beyond_limits
from recipes.torch_comparison.report import tables
from tests.recipes.torch_comparison import dying

pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")

TINY = [
    "--images", "8", "--test-images", "16", "--same-probes", "2", "--probes", "1", "2",
    "--ratios", "0.8", "0.5", "--int8-images", "4", "--coupling", "union",
]  # fmt: skip


def line(inputs, output, *more):
    """The command line at a tiny size."""
    return [str(inputs[0]), "--data", f"npz:{inputs[1]}", *TINY, *more, "--output", str(output)]


@pytest.fixture(scope="module")
def finished(torch_inputs, tmp_path_factory):
    """A run whose processes for time and memory die, and what it had written before it started them."""
    output, real = tmp_path_factory.mktemp("compare") / "run", compare_torch.compare_cost

    def cost(job):
        (output / "comparison.json").rename(output / "before.json")
        return real(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        patch.setattr(compare_torch, "compare_cost", cost)
        patch.setattr(torch_cost, "measure", dying.measure)
        assert compare_torch.command(line(torch_inputs, output)) == 0
    return output


def test_both_frameworks_agree(finished):
    found = json.loads((finished / "comparison.json").read_text())
    assert all(found["identity"][name] <= found["limits"][name] for name in SAME)
    assert found["identity"]["accuracy_jax"] == found["identity"]["accuracy_torch"]
    assert found["scores"]["spearman"] > 0.999
    assert found["scores"]["kept_overlap"] == {"0.8": 1.0, "0.5": 1.0}
    assert found["reference"] == "exact"
    rows = found["pruned"]
    assert len(rows) == 2 * 3 and all(row["accuracy_jax"] == row["accuracy_torch"] for row in rows)
    assert beyond_limits(found) == []


def test_int8_integers_are_the_same(finished):
    dense, pruned = json.loads((finished / "comparison.json").read_text())["int8"]
    assert (dense["kept_channels"], pruned["kept_channels"]) == (1.0, 0.5)
    assert dense["integers"] > pruned["integers"] > 1000
    assert dense["integers_that_differ"] == pruned["logits_that_differ"] == pruned["integers_that_differ"] == 0
    assert dense["accuracy_jax"] == dense["accuracy_torch"]


def test_each_framework_prunes_the_same_by_itself(finished):
    found = json.loads((finished / "comparison.json").read_text())
    assert [row["kept_channels"] for row in found["method"]] == [0.8, 0.5]
    for row in found["method"]:
        assert row["channels_that_differ"] == 0 and row["logits_max_abs"] <= found["limits"]["method_logits_max_abs"]
        assert row["accuracy_jax"] == row["accuracy_torch"]
    assert "Ranked and pruned by each" in (finished / "comparison.txt").read_text()


def test_nothing_is_claimed_of_what_was_not_compared(finished):
    found = json.loads((finished / "comparison.json").read_text())
    found["int8"] = [{"kept_channels": 1.0, "not_comparable": "a mean over windows"}]
    assert beyond_limits(found) == []
    console = Console(record=True, width=110, file=StringIO())
    for table in tables(found):
        console.print(table)
    text = console.export_text()
    assert re.search(r"int8 integers that differ *│ *not comparable", text) and "a mean over windows" in text


def test_processes_that_die_leave_the_rest(finished):
    before, after = (json.loads((finished / name).read_text()) for name in ("before.json", "comparison.json"))
    assert before.pop("cost") == {} and before.pop("seconds") <= after.pop("seconds")
    cost = after.pop("cost")
    assert before == after
    assert all(re.match("BrokenProcessPool: ", cost[name]["not_measured"]) for name in ("JAX", "PyTorch"))
    assert "not measured: BrokenProcessPool" in " ".join((finished / "comparison.txt").read_text().split())


def test_published_schedule_is_its_first_probe(finished):
    """One probe ranks the same however it is scaled; with two the published schedule still stands at the first."""
    one, two = json.loads((finished / "comparison.json").read_text())["schedule"]
    assert one["published"]["spearman"] == pytest.approx(one["fixed"]["spearman"], abs=1e-3)
    assert set(one["same_kept_as_fixed"].values()) == {1.0}
    assert abs(two["published"]["spearman"] - one["published"]["spearman"]) < 0.02
    assert two["fixed"]["spearman"] != pytest.approx(one["fixed"]["spearman"], abs=1e-6)


def test_run_directory_explains_itself(finished):
    assert {path.name for path in finished.iterdir()} - {".ehap_jax_run", "seconds.json"} == {
        "config.json", "versions.json", "before.json", "comparison.json", "comparison.txt", "schedule.png",
        "scores.png",
    }  # fmt: skip
    found = json.loads((finished / "comparison.json").read_text())
    assert found.keys() >= found["meaning"].keys() and found["config"]["images"] == 8
    assert found["config"]["data"] == "npz:tiny.npz" and found["config"]["checkpoint"] == "tiny.pt"
    assert 0.99 < found["weight_of_the_first_published_probe"] < 1
    text = (finished / "comparison.txt").read_text()
    assert "as published" in text and "tiny.pt" in text


@pytest.mark.slow
def test_time_and_memory_in_processes_of_their_own(torch_inputs, tmp_path):
    assert compare_torch.command(line(torch_inputs, tmp_path / "run")) == 0
    assert "CPU seconds per probe" in (tmp_path / "run" / "comparison.txt").read_text()
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert list(found["cost"]) == ["JAX", "PyTorch"]
    for cost in found["cost"].values():
        assert 0 < cost["memory_before"] <= cost["peak_memory"]
        assert cost["cpu_seconds_per_probe"] > 0 and cost["seconds_per_probe"] < cost["first_call_seconds"]


def test_figures_beyond_their_limits_are_named(finished):
    found = json.loads((finished / "comparison.json").read_text())
    found["identity"]["gradient_relative"] = float("nan")
    found["pruned"][0]["logits_max_abs"] = 1.0
    found["int8"][1]["integers_that_differ"] = 1
    beyond = ["gradient_relative", "pruned_logits_max_abs", "int8_integers_that_differ"]
    assert beyond_limits(found) == beyond


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "31"], "--images 31 is not between 1 and the 2\\d there are"),
        (["--test-images", "0"], "--test-images 0"),
        (["--int8-images", "17"], "--int8-images 17 is not between 1 and the 16"),
        (["--probes", "0", "10"], "--probes"),
        (["--ratios", "1.5"], "--ratios"),
        (["--data", "npz:nowhere.npz"], "nowhere.npz"),
        (["--layout", "keras"], "unknown layout 'keras'"),
    ],
)
def test_bad_settings_fail_before_anything_is_written(torch_inputs, tmp_path, capsys, arguments, message):
    output = tmp_path / "run"
    assert compare_torch.command(line(torch_inputs, output, "--no-cost", *arguments)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()
