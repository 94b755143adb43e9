"""A file is written whole or not at all."""

import os

import pytest

from ehap_jax._whole_files import write_text, written_whole


def test_folders_are_made_and_the_file_is_replaced(tmp_path):
    target = tmp_path / "new" / "file.json"
    write_text(target, "old")
    write_text(target, "é")
    assert target.read_text(encoding="utf-8") == "é" and os.listdir(target.parent) == ["file.json"]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", ["the block", "the rename"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    target = tmp_path / "file.json"
    write_text(target, "old")

    def fail(*_):
        raise OSError("disk full")

    if failing == "the rename":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"), written_whole(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".json"
        temporary.write_text("new")
        if failing == "the block":
            fail()
    assert os.listdir(tmp_path) == ["file.json"] and target.read_text() == "old"
