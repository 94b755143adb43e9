"""Masks: exactly the pruned slices are zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.pruning import PruningPlan, mask_variables, shrink_variables
from tests.pruning.networks import apply, images, variables


@pytest.fixture(scope="module")
def plan():
    graph = trace_graph(apply)(variables(), images())
    return PruningPlan.from_keep(graph, {"stem": [0, 2, 5], "a1": [1, 4], "a2": [0, 2, 5]})


def test_pruned_slices_are_zero_and_the_others_untouched(plan):
    v = variables()
    masked = mask_variables(v, plan)
    for path, leaf in v.items():
        stays = np.ones(leaf.shape, bool)
        for axis, kept in plan.slices[path].items():
            line = np.isin(np.arange(leaf.shape[axis]), kept)
            stays &= line.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)])
        np.testing.assert_array_equal(masked[path], np.where(stays, leaf, 0))
        assert masked[path].dtype == leaf.dtype


def test_masking_twice_is_masking_once(plan):
    once = mask_variables(variables(), plan)
    jax.tree.map(np.testing.assert_array_equal, mask_variables(once, plan), once)


def test_nan_in_a_pruned_slice_is_gone(plan):
    v = {**variables(), "bias": jnp.full(6, jnp.nan)}
    assert np.isnan(mask_variables(v, plan)["bias"]).tolist() == [True, False, True, False, False, True]


@pytest.mark.slow
def test_jit_vmap_and_other_dtypes(plan):
    v = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables())
    expected = mask_variables(v, plan)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda v: mask_variables(v, plan))(v), expected)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), v)
    both = jax.vmap(lambda v: mask_variables(v, plan))(stacked)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), both, expected)


@pytest.mark.parametrize("transform", [mask_variables, shrink_variables])
def test_a_plan_that_does_not_fit_names_path_and_both_shapes(plan, transform):
    v = variables()
    with pytest.raises(ValueError, match=r"a1 has shape \(3, 3, 6, 4\).*\(3, 3, 6, 5\)"):
        transform({**v, "a1": v["a1"][..., :4]}, plan)
    with pytest.raises(KeyError, match=r"missing \['bias'\].*unexpected \['other'\]"):
        transform({("other" if k == "bias" else k): w for k, w in v.items()}, plan)
