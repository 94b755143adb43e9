"""Every reader against seeded hostile files; and that the judge of outcomes sees what is wrong."""

import gc
import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import hostile_files, mutations
from benchmarks.hostile_files import GOOD, attempt, attempts
from benchmarks.hostile_readers import INTEROP, OWN, Reader, readers
from benchmarks.mutations import ANY, SPECIAL, payload

INPUTS = 17
"""Of each of twelve readers: 204 in all."""


@pytest.mark.parametrize("name", OWN | INTEROP)
def test_no_hostile_file_does_harm(name):
    if name not in readers():
        pytest.skip("a package is missing: pip install 'ehap-jax[images,torch]'")
    outcomes = list(attempts(name, range(INPUTS)))
    wrong = [outcome for outcome in outcomes if outcome.kind not in GOOD]
    assert not wrong, "\n".join(map(str, wrong))
    assert any(outcome.kind == "refused" for outcome in outcomes)


def test_a_payload_in_a_pickle_would_be_seen(tmp_path, monkeypatch):
    """A reader that unpickles is caught, so the tests above can fail."""
    import pickle

    def read(folder: Path):
        return pickle.loads((folder / "model.pth").read_bytes())

    assert judged(tmp_path, monkeypatch, read, "a pickle with a payload", content=b"cos") == "executed"


def fails(error):
    def read(_):
        raise error

    return read


def believes(_):
    raise AssertionError("3 classes of 2 images")


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda folder: None, "accepted"),
        (fails(KeyError("a")), "traceback"),
        (fails(ValueError("nothing here")), "unnamed"),
        (fails(ValueError("model.pth " + "x" * 9999)), "long"),
        (fails(OSError("model.pth is damaged")), "refused"),
        (fails(MemoryError()), "memory"),
        (lambda folder: np.ones(200 * 2**20, np.uint8).sum(), "memory"),
        (lambda folder: time.sleep(60), "hung"),
        (lambda folder: None, "slow"),
    ],
)
def test_what_is_wrong_is_seen(tmp_path, monkeypatch, read, kind):
    monkeypatch.setattr(hostile_files, "HANGS", 0.5 if kind == "hung" else 60.0)
    if kind == "slow":
        monkeypatch.setattr(hostile_files.time, "process_time", itertools.count(0, 100).__next__)
    assert judged(tmp_path, monkeypatch, read, "text") == kind


def test_what_must_not_be_believed_is_seen(tmp_path, monkeypatch):
    assert judged(tmp_path, monkeypatch, lambda _: 1, "text", check=believes) == "believed"


def judged(tmp_path, monkeypatch, read, mutation, content=b"honest", check=lambda _: None):
    honest = tmp_path / "honest"
    honest.mkdir()
    (honest / "model.pth").write_bytes(content)
    monkeypatch.setattr(mutations, "ANY", {mutation: ANY[mutation]})
    monkeypatch.setitem(SPECIAL, ".pth", {mutation: ANY[mutation]})
    gc.collect()
    reader = Reader(lambda folder: None, read, ("model.pth",), check)
    return attempt(reader, honest, tmp_path / "mutated", 0).kind


def test_the_same_seed_makes_the_same_file(tmp_path):
    first, second = (list(attempts("PruningPlan.load", range(5))) for _ in range(2))
    assert [(o.file, o.mutation, o.kind) for o in first] == [(o.file, o.mutation, o.kind) for o in second]
    assert payload(tmp_path / "x").startswith(b"\x80")
