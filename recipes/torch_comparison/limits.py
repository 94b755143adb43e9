"""How far JAX and PyTorch may differ in `recipes.compare_torch`, and which figures of a comparison differ more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from interop.compare import LIMITS

SAME = (
    "logits_max_abs",
    "predictions_that_differ",
    "gradient_relative",
    "hessian_vector_relative",
    "trace_relative",
)
"""The figures of the dense network with a limit, those of `interop.compare`."""


def limits(method: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What each figure may be at most; those of the method only where it was compared (`method` has rows)."""
    found = {name: LIMITS[name] for name in SAME}
    found |= {"pruned_logits_max_abs": LIMITS["logits_max_abs"], "int8_integers_that_differ": 0}
    if method:
        found |= {"method_channels_that_differ": 0, "method_logits_max_abs": LIMITS["logits_max_abs"]}
    return found


def limited_figures(document: Mapping[str, Any]) -> dict[str, float]:
    """The figures that have a limit, the worst of several rows; those of INT8 and of the method where compared."""
    found = {name: document["identity"][name] for name in SAME}
    found["pruned_logits_max_abs"] = _largest(document["pruned"], "logits_max_abs")
    for figure in ("channels_that_differ", "logits_max_abs") if document["method"] else ():
        found[f"method_{figure}"] = _largest(document["method"], figure)
    int8 = [row["integers_that_differ"] for row in document["int8"] if "not_comparable" not in row]
    if int8:
        found["int8_integers_that_differ"] = sum(int8)
    return found


def beyond_limits(document: Mapping[str, Any]) -> list[str]:
    """The names of the figures that are beyond their limits (NaN included)."""
    return [name for name, value in limited_figures(document).items() if not value <= document["limits"][name]]


def _largest(rows: Sequence[Mapping[str, Any]], figure: str) -> float:
    return float(np.max([row[figure] for row in rows]))  # NaN where one is
