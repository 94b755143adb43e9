"""How alike two rankings of channels are, and what they keep."""

from __future__ import annotations

import numpy as np

from ehap_jax.pruning import PruningPlan, Scores


def spearman(a: Scores, b: Scores) -> float:
    """Rank correlation of the scores of all channels."""
    from scipy.stats import spearmanr

    paths = sorted(a.values)
    x, y = (np.concatenate([scores.values[path] for path in paths]) for scores in (a, b))
    return float(spearmanr(x, y).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def kept_overlap(a: PruningPlan, b: PruningPlan) -> float:
    """Intersection over union of the kept output channels of all kernels."""

    def kept(plan: PruningPlan) -> set[tuple[str, int]]:
        full = {path: range(plan.shapes[path][axis]) for path, axis in plan.axes.items()}
        return {(path, int(c)) for path, every in full.items() for c in plan.keep.get(path, every)}

    ours, theirs = kept(a), kept(b)
    return len(ours & theirs) / len(ours | theirs)
