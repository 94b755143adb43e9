"""Models by name, for recipes and command lines."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn

from ehap_jax._nearest import nearest
from ehap_jax.models.preresnet import PreResNet
from ehap_jax.models.resnet import ResNet
from ehap_jax.models.vgg import VGG
from ehap_jax.models.wideresnet import WideResNet


class _Family(NamedTuple):
    pattern: str
    description: str
    build: Callable[..., nn.Module]


def _hap_resnet(depth: int, **options: Any) -> ResNet:
    return ResNet(depth, **{"shortcut": "B", "widths": (64, 128, 256), **options})


def _hap_preresnet(depth: int, **options: Any) -> PreResNet:
    return PreResNet(depth, **{"stem": 64, "widths": (64, 128, 256), "expansion": 1, **options})


def _ehap_wrn(depth: int, widen: int, **options: Any) -> ResNet:
    """EHAP counts the depth of its post-activation network as WRN does, two more than 6n + 2."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"a wide ResNet has depth 6n + 4 (10, 16, 22, 28, 40, ...), not {depth}")
    if widen < 1:
        raise ValueError(f"widen must be at least 1, not {widen}")
    widths = (16 * widen, 32 * widen, 64 * widen)
    return ResNet(depth - 2, **{"shortcut": "B", "stem": 16, "widths": widths, **options})


_FAMILIES = (
    _Family(r"resnet(?P<depth>\d+)", "resnet<6n+2> (resnet8, resnet20, resnet32, resnet56, resnet110, ...)", ResNet),
    _Family(r"hap-resnet(?P<depth>\d+)", "hap-resnet<6n+2> (hap-resnet32: widths 64, 128, 256)", _hap_resnet),
    _Family(r"preresnet(?P<depth>\d+)", "preresnet<9n+2> (preresnet29, preresnet164)", PreResNet),
    _Family(r"hap-preresnet(?P<depth>\d+)", "hap-preresnet<9n+2> (hap-preresnet29, hap-preresnet164)", _hap_preresnet),
    _Family(r"wrn(?P<depth>\d+)-(?P<widen>\d+)", "wrn<6n+4>-<k> (wrn28-8: pre-activation)", WideResNet),
    _Family(r"ehap-wrn(?P<depth>\d+)-(?P<widen>\d+)", "ehap-wrn<6n+4>-<k> (ehap-wrn28-8: post-activation)", _ehap_wrn),
    _Family(r"vgg(?P<depth>\d+)", "vgg<11|13|16|19> (with BatchNorm)", VGG),
)


def known_models() -> tuple[str, ...]:
    """The names `make_model` knows, as patterns for people."""
    return tuple(family.description for family in _FAMILIES)


def make_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """The Linen model called `name`.

    Args:
        name: such as "resnet20", "wrn28-8" or "vgg16"; see `known_models()`. Names beginning with "hap-" and
            "ehap-" are the networks of those papers' released code where it differs from the original papers.
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
    for family in _FAMILIES:
        match = re.fullmatch(family.pattern, name)
        if match:
            sizes = {key: int(value) for key, value in match.groupdict().items()}
            return family.build(**sizes, num_classes=num_classes, **options)
    raise ValueError(f"unknown model {name!r}{_nearest_model(name)}; known models: " + "; ".join(known_models()))


def _nearest_model(name: str) -> str:
    """A misspelt name with the same numbers and the nearest family's letters."""
    sizes = "".join(re.findall(r"[0-9]+(?:-[0-9]+)?$", name))
    stems = (re.match(r"[a-z-]*", family.pattern)[0] for family in _FAMILIES)  # pyright: ignore[reportOptionalSubscript]
    spelt = [stem + sizes for stem in stems]
    return nearest(name, [right for right in spelt if any(re.fullmatch(f.pattern, right) for f in _FAMILIES)])
