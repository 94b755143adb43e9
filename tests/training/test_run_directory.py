"""Run directories: refusals, atomic files, metrics; and the progress lines where there is no terminal."""

import contextlib
import dataclasses
import errno
import gc
import io
import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from ehap_jax import _whole_files
from ehap_jax._whole_files import written_whole
from ehap_jax.training import Progress, RunDirectory, run_directory, run_lock


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 3
    widths: tuple[int, ...] = (4, 8)
    data: Path = Path("digits")


def test_a_new_run_holds_config_and_versions(tmp_path):
    run = RunDirectory.create(tmp_path / "deep" / "run", Config())
    assert run.read_json("config.json") == {"epochs": 3, "widths": [4, 8], "data": "digits"}
    versions = run.read_json("versions.json")
    assert versions["packages"]["jax"] and versions["python"].startswith("3.")
    assert versions["device"]["backend"] == "cpu" and versions["processor"]["name"]
    names = {path.name for path in run.path.iterdir()}
    assert names - {"seconds.json"} == {".ehap_jax_run", "config.json", "versions.json"}


def test_an_existing_run_is_refused_resumed_or_overwritten(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Config())
    run.write_text("report.html", "kept")
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        RunDirectory.create(run.path, Config())
    RunDirectory.create(run.path, Config(), resume=True)
    assert (run.path / "report.html").read_text() == "kept"
    with pytest.raises(ValueError, match="epochs: 3 there, 4 now"):
        RunDirectory.create(run.path, Config(epochs=4), resume=True)
    with pytest.raises(ValueError, match="contradict"):
        RunDirectory.create(run.path, Config(), resume=True, overwrite=True)
    assert run.read_json("config.json")["epochs"] == 3
    RunDirectory.create(run.path, Config(epochs=4), overwrite=True)
    assert not (run.path / "report.html").exists() and run.read_json("config.json")["epochs"] == 4


def test_only_runs_are_overwritten(tmp_path):
    """A `config.json` makes no run: model directories have one, and so may anybody's."""
    (tmp_path / "thesis.tex").write_text("dear")
    for name in ("config.json", "versions.json"):
        (tmp_path / name).write_text('{"packages": {"ehap-jax": "0.1"}}')
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="not a run directory"):
            RunDirectory.create(tmp_path, Config(), **options)
    with pytest.raises(NotADirectoryError):
        RunDirectory.create(tmp_path / "thesis.tex", Config(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "dear"
    (tmp_path / ".ehap_jax_run").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(FileExistsError, match="not a run directory"):
        RunDirectory.create(tmp_path, Config(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    assert RunDirectory.create(tmp_path / "empty").read_json("config.json") == {}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch, code):
    """Before anything is deleted. Root may write anywhere here, so the making of a file fails by hand."""
    run = RunDirectory.create(tmp_path / "run", Config())
    before = sorted(run.path.iterdir())

    def refused(**_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_whole_files.tempfile, "mkstemp", refused)
    kind = OSError if code == errno.ENOSPC else PermissionError  # recipes say "no space left" themselves
    for path, options in (
        (run.path, {"resume": True}),
        (run.path, {"overwrite": True}),
        (tmp_path / "new" / "run", {}),
    ):
        with pytest.raises(kind, match=os.strerror(code)):
            RunDirectory.create(path, Config(), **options)
    assert sorted(run.path.iterdir()) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", ["[1]", "{", "[" * 10**5])
def test_a_config_that_is_none_is_named(tmp_path, there):
    run = RunDirectory.create(tmp_path / "run", Config())
    (run.path / "config.json").write_text(there)
    with pytest.raises(ValueError, match=r"run/config\.json (must hold an object|is not a JSON file|is nested)"):
        RunDirectory.create(run.path, Config(), resume=True)


def test_a_kill_before_the_config_was_written_is_resumed(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Config())
    (run.path / "config.json").unlink()
    assert RunDirectory.create(run.path, Config(), resume=True).read_json("config.json")["epochs"] == 3


def test_a_resume_clears_what_a_kill_left_and_nothing_else(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Config())
    kept = [run.file("seed0/.notes"), run.file("seed0/.trace.npz"), run.file("unfinished-thesis.tex")]
    for file in kept:
        file.write_text("kept")
    with contextlib.ExitStack() as killed:
        left = [killed.enter_context(written_whole(run.file(name))) for name in ("a.json", "seed0/trace.npz")]
        assert all(file.exists() for file in left)
        RunDirectory.create(run.path, Config(), resume=True)
        assert not any(file.exists() for file in left) and all(file.read_text() == "kept" for file in kept)
        killed.pop_all()


@pytest.mark.slow
def test_seconds_count_the_processes_before_this_one(tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 1e6, 100.0))
    monkeypatch.setattr(run_lock.time, "monotonic", lambda: next(clock))
    run = RunDirectory.create(tmp_path / "run")
    first = run.seconds()
    assert first >= 100
    del run
    gc.collect()
    run = RunDirectory.create(tmp_path / "run", resume=True)
    assert run.read_json("seconds.json")["processes"][0] >= 100
    assert run.seconds() >= run.read_json("seconds.json")["processes"][0] + 100
    (run.path / "seconds.json").write_text('{"processes": ["a"]}')
    del run
    gc.collect()
    with pytest.raises(ValueError, match="no list of seconds"):
        RunDirectory.create(tmp_path / "run", resume=True)


def test_resuming_under_other_versions_records_both(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Config())
    run.write_json("versions.json", {**run.read_json("versions.json"), "python": "3.0"})
    RunDirectory.create(run.path, Config(), resume=True)
    versions = run.read_json("versions.json")
    assert versions["python"] != "3.0" and versions["resumed_from"]["python"] == "3.0"


def test_what_cannot_be_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="cannot write a object as JSON"):
        RunDirectory.create(tmp_path / "run", {"model": object()})
    assert not (tmp_path / "run").exists()


def test_metrics_are_lines_and_a_repeated_epoch_replaces_its_record(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    assert run.read_metrics() == []
    run.append_metrics({"epoch": 1, "loss": jnp.float32(0.5)}, identity=("epoch",))
    run.append_metrics({"epoch": 2, "loss": np.float32(np.nan)}, identity=("epoch",))
    run.append_metrics({"epoch": 1, "loss": 0.25}, identity=("epoch",))
    run.append_metrics({"epoch": 1, "loss": 0.25})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"epoch": 2, "loss": "nan"},
        {"epoch": 1, "loss": 0.25},
        {"epoch": 1, "loss": 0.25},
    ]


def stages(console):
    with Progress(console) as progress:
        with progress.stage("dense", total=2) as advance:
            advance(accuracy=0.5)
            advance(accuracy=0.98765)
        with progress.stage("trace", total=1) as advance:
            advance()


def test_without_a_terminal_a_stage_is_one_line():
    stream = io.StringIO()
    stages(Console(file=stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("dense: ") and lines[0].endswith("s, accuracy 0.9877")
    assert lines[1].startswith("trace: ")


def test_on_a_terminal_there_is_a_bar_with_the_counts():
    stream = io.StringIO()
    stages(Console(file=stream, force_terminal=True, width=120))
    assert "dense" in stream.getvalue() and "2/2" in stream.getvalue() and "accuracy 0.9877" in stream.getvalue()


def test_rewritten_results_are_no_change_of_the_code(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    package, measured = tmp_path / "package", tmp_path / "results"
    git("init")
    for folder in (package, measured):
        folder.mkdir()
        (folder / "file").write_text("old")
    git("add", ".")
    git("commit", "-m", "first")
    (measured / "file").write_text("new")
    found = run_directory._git_commit(package)
    assert found is not None and len(found["commit"]) == 40 and not found["modified"]
    (package / "file").write_text("new")
    assert run_directory._git_commit(package) == {**found, "modified": True}
