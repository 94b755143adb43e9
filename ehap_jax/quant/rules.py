"""Which layers are quantised, and how: frozen rules matched by the path of the kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class QuantRule:
    """How the conv and dense layers whose kernel path matches ``pattern`` (shell wildcards) are quantised.

    weight_bits, activation_bits: 2 to 8. per_channel: one weight scale per output channel, else one per kernel.
    symmetric_activations: signed with zero point 0 instead of unsigned with a true zero point. decay: of the moving
    average of the activation range. skip: leave the layer in floating point.
    """

    pattern: str = "*"
    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    symmetric_activations: bool = False
    decay: float = 0.99
    skip: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise ValueError(f"{name} must be between 2 and 8, got {getattr(self, name)} (rule {self.pattern!r}).")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay} (rule {self.pattern!r}).")


INT8: tuple[QuantRule, ...] = (QuantRule(),)
"""EHAP's scheme: symmetric weights per output channel, asymmetric activations per tensor, 8 bits each."""

INT4_WEIGHTS: tuple[QuantRule, ...] = (QuantRule(weight_bits=4),)
"""4-bit weights, 8-bit activations."""


def match_rules(rules: Sequence[QuantRule], paths: Iterable[str]) -> dict[str, QuantRule]:
    """{kernel path: the first rule that matches it}; paths that no rule matches are not quantised.

    Raises ValueError for a rule whose pattern matches no path at all (the paths are listed).
    """
    paths = list(paths)
    for rule in rules:
        if not any(fnmatchcase(path, rule.pattern) for path in paths):
            raise ValueError(
                f"quantisation rule {rule.pattern!r} matches no kernel; the kernels are: {', '.join(paths)}."
            )
    found = {path: next((r for r in rules if fnmatchcase(path, r.pattern)), None) for path in paths}
    return {path: rule for path, rule in found.items() if rule is not None and not rule.skip}
