"""docs/promises.md names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_promise_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs" / "promises.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row.strip("| ").rsplit(" | ", 1) for row in rows if not row.startswith("| Promise")]
    assert len(promises) > 20
    for promise, tests in promises:
        files = re.findall(r"`(tests/[\w/]+\.py)`", tests)
        assert files, promise
        assert all((ROOT / file).is_file() for file in files), (promise, files)
