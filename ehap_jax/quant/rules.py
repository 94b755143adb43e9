"""Which layers are quantised, and how: frozen rules matched by the path of the kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from ehap_jax.quant.numerics import GridKind

ObserverKind = Literal["ema", "percentile", "mse", "learned"]


@dataclass(frozen=True)
class QuantRule:
    """How the conv and dense layers whose kernel path matches ``pattern`` (shell wildcards) are quantised.

    weight_bits, activation_bits: 2 to 8. per_channel: one weight scale per output channel, else one per kernel.
    activations: "asymmetric" (unsigned with a true zero point), "symmetric" (signed, zero point 0) or "unsigned" (zero
    point 0, negative values clipped). observer: how a batch becomes a range, see :func:`ehap_jax.quant.observe`.
    decay: of the moving average over batches. percentile: in percent, for that observer. residual_bits: 2 to 16, the
    operands of residual sums, each branch with its own scale; None leaves them in floating point. skip: leave the layer
    in floating point.
    """

    pattern: str = "*"
    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    activations: GridKind = "asymmetric"
    observer: ObserverKind = "ema"
    decay: float = 0.99
    percentile: float = 99.9
    residual_bits: int | None = 8
    skip: bool = False

    def __post_init__(self) -> None:
        rule = f"(rule {self.pattern!r})"
        for name, largest in (("weight_bits", 8), ("activation_bits", 8), ("residual_bits", 16)):
            bits: int | None = getattr(self, name)
            if bits is None and name == "residual_bits":
                continue
            if bits is None or not 2 <= bits <= largest:
                raise ValueError(f"{name} must be between 2 and {largest}, got {bits} {rule}.")
        for name, kinds in (("activations", get_args(GridKind)), ("observer", get_args(ObserverKind))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, got {getattr(self, name)!r} {rule}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay} {rule}.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {self.percentile} {rule}.")


INT8: tuple[QuantRule, ...] = (QuantRule(),)
"""EHAP's scheme in 8 bits: symmetric weights per output channel, asymmetric activations and branches per tensor."""

INT4_WEIGHTS: tuple[QuantRule, ...] = (QuantRule(weight_bits=4),)
"""4-bit weights, 8-bit activations and residual branches."""

HAWQ: tuple[QuantRule, ...] = (QuantRule(activations="unsigned", residual_bits=16),)
"""HAWQ-V3 (arXiv 2011.10680): unsigned activations with zero point 0, residual sums in 16 bits.

Negative inputs of a layer are clipped: normalised images need a rule of their own before this one, such as
``QuantRule("params/conv1/kernel", activations="symmetric", residual_bits=16)`` for the first layer of this package's
ResNets (``"*/conv1/kernel"`` would match that of every block, too).
"""


def match_rules(rules: Sequence[QuantRule], paths: Iterable[str]) -> dict[str, QuantRule]:
    """{kernel path: the first rule that matches it}; paths that no rule matches, or a skipping one, are left out.

    Raises ValueError for a rule that decides about no path: its pattern matches none (the paths are listed), or those
    before it match all that it does (one is named).
    """
    paths = list(paths)
    found = {path: next((r for r in rules if fnmatchcase(path, r.pattern)), None) for path in paths}
    for rule in rules:
        matched = [path for path in paths if fnmatchcase(path, rule.pattern)]
        if not matched:
            raise ValueError(
                f"quantisation rule {rule.pattern!r} matches no kernel; the kernels are: {', '.join(paths) or 'none'}."
            )
        if all(found[path] is not rule for path in matched):
            first = found[matched[0]]
            assert first is not None
            raise ValueError(
                f"quantisation rule {rule.pattern!r} never holds: rules before it match all its kernels, as "
                f"{first.pattern!r} does {matched[0]}. Put it before them, or leave it out."
            )
    return {path: rule for path, rule in found.items() if rule is not None and not rule.skip}


def skipping(path: str) -> str:
    """How to write the rule that leaves a layer in floating point, for messages."""
    return f"QuantRule({path!r}, skip=True)"
