"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import ehap_jax

MODULES = sorted(m.name for m in pkgutil.walk_packages(ehap_jax.__path__, "ehap_jax."))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not result.failed, f"{result.failed} of {result.attempted} examples of {name} failed"
