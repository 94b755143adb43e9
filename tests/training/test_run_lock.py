"""One process at a time in a run directory; the lock of a dead one is nobody's."""

import fcntl
import gc
import os
import signal
import subprocess
import sys

import pytest

from ehap_jax.training import RunDirectory
from ehap_jax.training.run_lock import MARKER, lock_run

HOLD = """
import sys, time
from pathlib import Path
from ehap_jax.training.run_lock import lock_run
lock = lock_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    """A run directory that no process works in."""
    path = RunDirectory.create(tmp_path / "run").path
    gc.collect()
    return path


def is_free(run):
    with open(run / MARKER) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.slow
def test_the_second_process_is_refused_and_the_lock_of_a_dead_one_is_taken_over(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(BlockingIOError, match=f"run is in use by process {holder.pid}; wait for it"):
            RunDirectory.create(run, **options)
        assert (run / "config.json").exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (run / MARKER).read_text()
    taken = RunDirectory.create(run, resume=True)
    assert str(os.getpid()) in (taken.path / MARKER).read_text() and not is_free(run)


@pytest.mark.slow
def test_a_process_may_take_its_own_run_up_again_and_gives_it_free(run):
    assert is_free(run)
    first, second = RunDirectory.create(run, resume=True), RunDirectory.create(run, resume=True)
    assert first.lock is second.lock and not is_free(run)
    del first
    gc.collect()
    assert not is_free(run)
    del second
    gc.collect()
    assert is_free(run)


def test_a_marker_that_leads_elsewhere_is_not_written(tmp_path):
    (tmp_path / "precious").write_text("dear")
    (tmp_path / MARKER).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=MARKER):
        lock_run(tmp_path)
    assert (tmp_path / "precious").read_text() == "dear"
