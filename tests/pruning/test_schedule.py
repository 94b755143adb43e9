"""Rounds of pruning: the fractions, and the loop."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.pruning import (
    PruningPlan,
    Scores,
    allocate,
    cubic,
    expand_variables,
    kept_fractions,
    linear,
    magnitude_scores,
    mask_variables,
    prune_iteratively,
    random_scores,
    shrink_variables,
)
from tests.pruning.networks import apply, images, variables


@pytest.fixture(scope="module")
def graph():
    return trace_graph(apply)(variables(), images())


@pytest.mark.parametrize("final, rounds", [(0.3, 1), (0.5, 4), (0.05, 10), (1.0, 3)])
def test_fractions_follow_the_schedule(final, rounds):
    for schedule in (linear, cubic, lambda t: t**0.5):
        found = kept_fractions(final, rounds, schedule=schedule)
        np.testing.assert_allclose(found, [1 - (1 - final) * schedule(i / rounds) for i in range(1, rounds + 1)])
        assert found[-1] == final
    assert kept_fractions(0.5, 4, initial=0.9, schedule=linear) == (0.8, 0.7, 0.6, 0.5)


def test_cubic_is_zhu_and_guptas():
    """Sparsity s_f + (s_i - s_f)(1 - t/n)³ with s_i = 0."""
    kept = kept_fractions(0.2, 5)
    np.testing.assert_allclose(1 - np.array(kept), [0.8 - 0.8 * (1 - i / 5) ** 3 for i in range(1, 6)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"final": 0, "rounds": 2}, "0 < final"),
        ({"final": 0.9, "rounds": 2, "initial": 0.8}, "final <= initial"),
        ({"final": 0.5, "rounds": 0}, "at least 1"),
        ({"final": 0.5, "rounds": 3, "schedule": lambda t: 0.5 * t}, "rises from 0 to 1"),
        ({"final": 0.5, "rounds": 3, "schedule": lambda t: 1 - abs(2 * t - 1)}, "rises from 0 to 1"),
        ({"final": 0.5, "rounds": 3, "schedule": lambda t: float("nan")}, "rises from 0 to 1"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kept_fractions(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["group", "union"])
def test_what_has_gone_stays_gone(graph, coupling):
    """Random scores of every round are another order; the kept channels are nested all the same."""
    seen = []

    def score(v):
        return random_scores(graph, key=jax.random.key(len(seen)))

    def train(plan, small, number):
        assert number == len(seen)
        assert {p: leaf.shape for p, leaf in small.items()} == {p: plan.shrunk_shape(p) for p in plan.shapes}
        seen.append(plan)
        return jax.tree.map(lambda leaf: leaf + 1.0, small)

    fractions = kept_fractions(0.3, 2)
    plan, small = prune_iteratively(
        graph, variables(), fractions, score=score, train=train, budget="params", coupling=coupling
    )
    assert seen[-1] is plan and len(seen) == 2
    for before, after in pairwise(seen):
        for path, kept in before.keep.items():
            assert set(after.keep[path]) <= set(kept)
    for fraction, step in zip(fractions, seen, strict=True):
        assert count_cost(graph, step).params <= fraction * count_cost(graph).params
    np.testing.assert_allclose(small["a1"], shrink_variables(variables(), plan)["a1"] + 2.0, rtol=1e-6)


def test_scores_see_what_training_left(graph):
    """Round two prunes by the weights that round one's training made: channels 3 and 4 of a1 shrink below 0 and 1."""
    plan = PruningPlan.from_keep(graph, {"a1": [1, 2, 3, 4]})

    def train(plan, small, number):
        return {**small, "a1": small["a1"].at[..., -1].multiply(1e-3)}

    loud = {**variables(), "a1": variables()["a1"] * jnp.arange(1.0, 6.0)[None, None, None]}
    exclude = ["stem", "a2"]
    found, _ = prune_iteratively(
        graph,
        loud,
        [16.5 / 17, 15.5 / 17],
        score=lambda v: magnitude_scores(graph, v),
        train=train,
        budget="channels",
        exclude=exclude,
    )
    assert found.keep["a1"].tolist() == [1, 2, 3] and plan.keep["a1"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("coupling", ["group", "union"])
def test_expanding_is_the_inverse_of_shrinking(graph, coupling):
    plan = allocate(graph, random_scores(graph, key=jax.random.key(5)), params=0.4, coupling=coupling)
    v = variables()
    jax.tree.map(
        np.testing.assert_array_equal, expand_variables(shrink_variables(v, plan), plan), mask_variables(v, plan)
    )
    with pytest.raises(ValueError, match=r"a1 has shape .*shrunk network"):
        expand_variables(v, plan)


def test_a_start_of_another_network_or_coupling_is_refused(graph):
    scores = random_scores(graph, key=jax.random.key(0))
    plan = PruningPlan.from_keep(graph, {"a1": [0]}, coupling="union")
    with pytest.raises(ValueError, match='coupling "union", not "group"'):
        allocate(graph, scores, params=0.5, start=plan)
    other = trace_graph(lambda w, x: x @ w["a"] @ w["b"])(
        {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3))
    )
    ones = Scores({"a": np.ones(4), "b": np.ones(2)}, {"a": np.ones(4), "b": np.ones(2)}, "test")
    with pytest.raises(ValueError, match="other variables or shapes"):
        allocate(other, ones, params=0.5, start=plan, coupling="union")


def test_rising_fractions_are_refused(graph):
    for fractions in ([], [0.5, 0.6]):
        with pytest.raises(ValueError, match="never rise"):
            prune_iteratively(graph, variables(), fractions, score=lambda v: None, train=lambda p, v, i: v)  # pyright: ignore[reportArgumentType]
