"""The commands that are timed are ones the recipes accept, and every recipe with a command line of its own is timed."""

import importlib
import shlex
from pathlib import Path

import pytest

from benchmarks import recipe_times
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


def test_a_recipe_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe_times.COMMANDS, "prune", "short nowhere --data digits")
    with pytest.raises(RuntimeError, match=r"recipes\.prune ended with status 2: .*no checkpoint or run directory"):
        recipe_times.measure("prune", tmp_path)
