"""The examples of docs/interop.md and of the docstrings in interop run and print what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import jax
import pytest

import interop

pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
pytest.importorskip("safetensors", reason="safetensors is an optional extra: pip install 'ehap-jax[torch]'")

MODULES = sorted(m.name for m in pkgutil.walk_packages(interop.__path__, "interop."))
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PAGE = Path(__file__).resolve().parents[2] / "docs" / "interop.md"


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert not result.failed, f"{result.failed} of {result.attempted} examples of {name} failed"


@pytest.mark.slow
def test_page():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testfile(str(PAGE), module_relative=False, optionflags=FLAGS, encoding="utf-8")
    assert result.attempted > 15 and not result.failed
