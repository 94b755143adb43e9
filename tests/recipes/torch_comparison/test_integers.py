"""Networks whose integers cannot be compared; that they are the same is tested in the whole comparison."""

from io import StringIO

import jax
import pytest
from rich.console import Console

from ehap_jax.pruning import random_scores
from ehap_jax.training import Progress
from recipes.torch_comparison.integers import compare_int8
from recipes.torch_comparison.job import Config, prepare

pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")

pytestmark = pytest.mark.slow


def test_what_has_no_integers_in_pytorch_is_told(torch_inputs, monkeypatch):
    from interop import torch_integer

    def refuse(*_):
        raise NotImplementedError("a mean over windows")

    config = Config(torch_inputs[0], f"npz:{torch_inputs[1]}", images=2, test_images=4, int8_images=2, ratios=(0.5,))
    with Progress(Console(file=StringIO())) as progress:
        job = prepare(config, progress)
        monkeypatch.setattr(torch_integer, "IntegerModule", refuse)
        rows = compare_int8(job, random_scores(job.graph, key=jax.random.key(0)))
    assert rows == [{"kept_channels": kept, "not_comparable": "a mean over windows"} for kept in (1.0, 0.5)]
