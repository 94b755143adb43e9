"""The API reference has every public name, at a place where its definition is."""

import importlib.util
from pathlib import Path

import ehap_jax

SCRIPT = Path(__file__).parents[1] / "docs" / "reference.py"


def load():
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_on_a_page_and_defined_where_it_says(tmp_path):
    load().main(tmp_path)
    lines = [line for page in tmp_path.glob("*.md") for line in page.read_text().splitlines()]
    entries = [line.removeprefix("::: ") for line in lines if line.startswith("::: ")]
    assert len(entries) == len(set(entries)) and set(ehap_jax.__all__) <= {e.rpartition(".")[2] for e in entries}
    for entry in entries:
        module, _, name = entry.rpartition(".")
        assert hasattr(importlib.import_module(module), name), entry


def test_mkdocs_lists_the_pages():
    listed = (SCRIPT.parent / "mkdocs.yml").read_text()
    assert all(f"docs/reference/{room}.md" in listed for room in (*load().ROOMS, "interop"))
