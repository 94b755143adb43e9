"""Models by name, for recipes and command lines."""

import re
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from ehap_jax.models.resnet import ResNet


def _resnet(match: re.Match[str], num_classes: int, options: dict[str, Any]) -> nn.Module:
    return ResNet(depth=int(match["depth"]), num_classes=num_classes, **options)


_FAMILIES: tuple[tuple[str, str, Callable[[re.Match[str], int, dict[str, Any]], nn.Module]], ...] = (
    (r"resnet(?P<depth>\d+)", "resnet<6n+2> (resnet8, resnet20, resnet32, resnet56, resnet110, ...)", _resnet),
)


def known_models() -> tuple[str, ...]:
    """The names `make_model` knows, as patterns for people."""
    return tuple(description for _, description, _ in _FAMILIES)


def make_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """The Linen model called `name`.

    Args:
        name: such as "resnet20"; see `known_models()`.
        num_classes: number of logits.
        **options: fields of the model class, such as `shortcut="B"`, `widths=(8, 16, 32)` or `dtype=jnp.bfloat16`.

    Raises:
        ValueError: no model has that name (the message lists those known), the depth does not exist, or
            `num_classes` is not positive.
        TypeError: an option the model does not have.

    Example:
        >>> make_model("resnet20", 10).depth
        20
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    for pattern, _, build in _FAMILIES:
        match = re.fullmatch(pattern, name)
        if match:
            return build(match, num_classes, options)
    raise ValueError(f"unknown model {name!r}; known models: " + "; ".join(known_models()))
