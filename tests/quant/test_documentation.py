"""The examples of docs/quantisation.md run."""

import doctest
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.slow


def test_examples():
    pytest.importorskip("onnxruntime", reason="needs pip install 'ehap-jax[onnx]'")
    page = Path(__file__).parents[2] / "docs" / "quantisation.md"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 20 and not found.failed
