"""What PyTorch keeps of a network that it prunes by itself."""

import pytest

from recipes.torch_comparison.pruning import torch_kept

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")


def test_layers_at_their_limit_keep_what_others_give_up():
    kept = torch_kept({"a": torch.arange(20.0) / 100, "b": torch.arange(20.0) + 1}, 0.5)
    assert kept["a"].tolist() == [19] and kept["b"].tolist() == list(range(1, 20))
    with pytest.raises(ValueError, match="every layer keeps some"):
        torch_kept({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 0.3)


def test_dead_channels_go_before_negative_scores():
    assert torch_kept({"a": torch.tensor([0.0, -1.0, 2.0, 3.0])}, 0.75)["a"].tolist() == [1, 2, 3]
