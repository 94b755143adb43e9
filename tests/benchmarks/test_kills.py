"""Runs that are killed and resumed end in the bits of one that was left alone; and the harness would see others."""

import sys

import pytest

from benchmarks.kills import MINIATURE, Job, contents, left_alone, leftovers, try_kills, with_part

FORGETFUL = """
import json, os, sys, time
from pathlib import Path
run = Path(sys.argv[1])
killed = run.exists()
run.mkdir(exist_ok=True)
(run / ".summary.unfinished-x.json").touch()
for line in range(5):
    print(line, file=sys.stderr, flush=True)
    time.sleep(0.1)
(run / "summary.json").write_text(json.dumps({"accuracy": 0.5 if killed else 0.6, "seconds": time.time()}))
if not killed:
    (run / ".summary.unfinished-x.json").unlink()
"""


@pytest.fixture
def compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path, compiled_once):
    """`python -m benchmarks.kills` does the same to a recipe, and more often."""
    found = try_kills(MINIATURE, 2, 0, tmp_path)
    assert found["compared"] == ["metrics.jsonl", "network.npz", "plan.json", "summary.json"]
    assert len(found["kills"]) == 2 and not found["different"] and not found["left_over"]
    assert any(kill["status"] != 0 for kill in found["kills"])


@pytest.mark.slow
def test_a_run_that_forgets_is_seen(tmp_path):
    job = Job((sys.executable, "-c", FORGETFUL), ("summary.json",))
    found = try_kills(job, 2, 1, tmp_path)
    assert "killed0/summary.json" in found["different"]
    assert found["left_over"][0] == "killed0/.summary.unfinished-x.json"
    assert {kill["status"] for kill in found["kills"]} <= {-2, -9, -15, 0, 1}


def test_a_job_that_fails_is_no_reference(tmp_path):
    with pytest.raises(RuntimeError, match="status 3: no luck"):
        left_alone(Job((sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)")), tmp_path)


def test_seconds_are_no_difference(tmp_path):
    job = Job((), ("*.json",))
    for number, text in enumerate(('{"a": 1, "seconds": 1}', '{"a": 1, "seconds": 2}', '{"a": 2, "seconds": 1}')):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(text)
    first, second, third = (contents(job, tmp_path / str(number)) for number in range(3))
    assert first == second != third and not leftovers(tmp_path)


def test_the_order_of_names_in_a_header_is_no_difference(tmp_path):
    def safetensors(header, content):
        return len(header).to_bytes(8, "little") + header + content

    headers = (b'{"a": 1, "b": 2}', b'{"b": 2, "a": 1}', b'{"a": 1, "b": 3}')
    for number, (header, content) in enumerate(zip((*headers, headers[0]), (b"x", b"x", b"x", b"y"), strict=True)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.safetensors").write_bytes(safetensors(header, content))
    first, *others = (contents(Job((), ("*.safetensors",)), tmp_path / str(number)) for number in range(4))
    assert [first == other for other in others] == [True, False, False]


def test_parts_are_kept_and_added_up():
    part = {"kills": [1, 2], "different": ["a"], "left_over": [], "runs": 1, "signals": {"SIGINT": 2}, "statuses": {}}
    results = with_part(with_part({}, "seed 0", part), "seed 1", part | {"kills": [1], "signals": {"SIGKILL": 1}})
    assert results["totals"]["kills"] == 3 and results["totals"]["different"] == 2 and results["totals"]["runs"] == 2
    assert results["totals"]["signals"] == {"SIGINT": 2, "SIGKILL": 1}
    again = with_part(results, "seed 0", part | {"different": []})
    assert list(again["parts"]) == ["seed 0", "seed 1"] and again["totals"]["different"] == 1
