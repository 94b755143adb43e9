"""The commands that are timed are ones the recipes accept, and every recipe with a command line of its own is timed."""

import importlib
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import recipe_times
from benchmarks.measure import read_results, write_results
from recipes.command import parse

REPOSITORY = Path(__file__).parents[2]
NOT_TIMED = {"reproduction", "compare_torch"}
"""The one reads files, the other times itself."""


@pytest.mark.parametrize("recipe", recipe_times.COMMANDS)
def test_the_recipe_accepts_its_arguments(recipe):
    module = importlib.import_module(f"recipes.{recipe}")
    variants = getattr(module, "VARIANTS", None) or {"default": ("", module.Config())}
    config, options = parse(variants, [*shlex.split(recipe_times.COMMANDS[recipe]), "--output", "there"], name=recipe)
    assert str(options.output) == "there" and isinstance(config, module.Config)


def test_every_recipe_is_timed():
    files = (REPOSITORY / "recipes").glob("*.py")
    recipes = {file.stem for file in files if '__name__ == "__main__"' in file.read_text(encoding="utf-8")}
    assert recipes == recipe_times.COMMANDS.keys() | NOT_TIMED


@pytest.mark.slow
def test_a_recipe_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe_times.COMMANDS, "prune", "short nowhere --data digits")
    with pytest.raises(RuntimeError, match=r"recipes\.prune ended with status 2: .*no checkpoint or run directory"):
        recipe_times.measure("prune", tmp_path)


def test_every_time_says_on_what_it_was_taken(tmp_path, monkeypatch):
    """What the file has already stays as it is."""
    output = tmp_path / "times.json"
    write_results(output, {"recipes": {"pretrain": {"minutes": 3.0}}})
    monkeypatch.setattr(recipe_times.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(recipe_times, "fresh_process", lambda *_: {"cores": 2, "load_average": 9.0, "versions": {}})
    monkeypatch.setattr(recipe_times.os, "getloadavg", lambda: (0.5, 0.4, 0.3))
    line = ["--only", "trace", "--output", str(output), "--runs", str(tmp_path / "runs")]
    assert recipe_times.main(line) == 0
    found = read_results(output)["recipes"]
    assert found["pretrain"] == {"minutes": 3.0}
    assert found["trace"].keys() == {"arguments", "minutes", "cores", "load_average", "versions"}
    assert found["trace"]["load_average"] == 0.5  # before it began


def test_a_recipe_that_misses_its_bounds_is_timed_and_one_that_crashed_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_times.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="why"))
    monkeypatch.setattr(recipe_times, "fresh_process", lambda *_: {})
    with pytest.raises(RuntimeError, match="ended with status 1: why"):
        recipe_times.measure("quantize", tmp_path)
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "summary.json").write_text("{}")
    assert recipe_times.measure("quantize", tmp_path)["minutes"] >= 0
