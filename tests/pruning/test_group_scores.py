"""Criteria of groups, and allocation by price per unit, with interactions, and in the old way."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.curvature import centred_logits, removal_costs
from ehap_jax.graph import channel_groups, count_cost, trace_graph
from ehap_jax.pruning import (
    GroupScores,
    OutOfReachError,
    PruningPlan,
    allocate,
    group_fisher_scores,
    group_magnitude_scores,
    group_taylor_scores,
    magnitude_scores,
    random_scores,
)
from ehap_jax.pruning.savings import Savings
from tests.pruning.invariant import normal
from tests.pruning.networks import apply, images, structs, variables


@pytest.fixture(scope="module")
def graph():
    return trace_graph(apply)(structs(), images(count=1))


@pytest.fixture(scope="module")
def costs():
    labels = jnp.array([0, 1, 2, 0], jnp.int32)
    return removal_costs(apply, variables(), (images(count=4), labels), microbatch=4)


def removed(graph, plan):
    """Positions of the groups that a plan removes."""
    gone = []
    for number, group in enumerate(channel_groups(graph, coupling=plan.coupling)):
        path, indices = next(iter(group.producers.items()))
        if path in plan.keep and indices[0] not in plan.keep[path]:
            gone.append(number)
    return gone


def group_scores(graph, prices, interactions=None):
    return GroupScores(channel_groups(graph), "group", np.asarray(prices, float), "test", interactions=interactions)


def test_costs_are_ranked_by_price(graph, costs):
    plan = allocate(graph, costs, channels=0.6)
    gone = removed(graph, plan)
    assert sorted(gone) == sorted(np.argsort(costs.prices, kind="stable")[: len(gone)].tolist())
    assert plan.provenance["criterion"] == "removal cost, softmax_cross_entropy"
    assert plan.provenance["scores"]["examples"] == 4 and plan.provenance["per"] is None


def test_taylor_and_fisher_are_moments_of_one_examples_gradients(costs):
    labels = jnp.array([0, 1, 2, 0], jnp.int32)
    one = [removal_costs(apply, variables(), (images(count=4)[i : i + 1], labels[i : i + 1])) for i in range(4)]
    gradients = np.stack([c.first_order for c in one])
    np.testing.assert_allclose(group_taylor_scores(costs).prices, gradients.mean(0) ** 2, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(group_fisher_scores(costs).prices, (gradients**2).mean(0) / 2, rtol=1e-4, atol=1e-9)
    without = removal_costs(apply, variables(), images(), head=centred_logits)
    with pytest.raises(ValueError, match="group fisher needs the gradient of the loss"):
        group_fisher_scores(without)


def test_group_magnitude_by_hand(graph):
    """Stem and second kernel of the branch write the stream, the first of the branch and the head read it."""
    v = {name: np.asarray(leaf, np.float64) for name, leaf in variables().items()}
    scores = group_magnitude_scores(graph, variables())
    raw = {}
    for number, group in enumerate(scores.groups):
        if "stem" in group.producers:
            (c,) = group.producers["stem"]
            members = [(v[k][..., c] ** 2).sum() for k in ("stem", "a2")]
            members += [(v["a1"][:, :, c] ** 2).sum(), (v["head"][c] ** 2).sum()]
        else:
            (c,) = group.producers["a1"]
            members = [(v["a1"][..., c] ** 2).sum(), (v["a2"][:, :, c] ** 2).sum()]
        raw.setdefault("stem" in group.producers, []).append((number, np.mean(members)))
    for found in raw.values():
        numbers, values = zip(*found, strict=True)
        np.testing.assert_allclose(scores.prices[list(numbers)], values / np.mean(values), rtol=1e-10)


@pytest.mark.parametrize("per", ["macs", "params", "bytes"])
def test_price_per_unit_saved_now(graph, per):
    """Against a search that counts the cost of every next step."""
    prices = np.random.default_rng(1).random(len(channel_groups(graph))) + 0.1
    scores = group_scores(graph, prices)

    def cost(gone):
        full = {"stem": 6, "a1": 5, "a2": 6}
        keep = {p: set(range(n)) for p, n in full.items()}
        for number in gone:
            for path, indices in scores.groups[number].producers.items():
                keep[path] -= set(indices)
        return getattr(count_cost(graph, PruningPlan.from_keep(graph, {p: sorted(k) for p, k in keep.items()})), per)

    order: list[int] = []
    for _ in range(6):
        left = [k for k in range(len(prices)) if k not in order]
        now = cost(order)
        order.append(min(left, key=lambda k: prices[k] / (now - cost([*order, k]))))
    for count in range(1, 7):
        plan = allocate(graph, scores, per=per, **{per: cost(order[:count]) / cost([])})
        assert sorted(removed(graph, plan)) == sorted(order[:count])
    assert plan.provenance["per"] == per


def test_interactions_price_what_is_left_again(graph, costs):
    """Each step takes the group that raises the estimate of ``costs.of`` least."""
    gone: list[int] = []
    for count in range(1, 6):
        left = [k for k in range(len(costs.groups)) if k not in gone]
        gone.append(min(left, key=lambda k: costs.of([*gone, k])))
        kept = 1 - sum(len(costs.groups[k].producers) for k in gone) / 17
        plan = allocate(graph, costs, channels=kept + 1e-9, interactions=True, max_layer_ratio=0.99)
        assert sorted(removed(graph, plan)) == sorted(gone), count
    assert plan.provenance["interactions"] is True


def test_two_groups_that_do_the_same_do_not_both_go():
    """Two equal channels with opposite readers cost as much alone as others, and nothing together."""
    w = {"in": normal(3, 4), "out": normal(4, 2, seed=1)}
    w["in"] = w["in"].at[:, 1].set(w["in"][:, 0])
    w["out"] = w["out"].at[1].set(-w["out"][0])
    model = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]  # noqa: E731
    x = normal(6, 3, seed=2)
    costs = removal_costs(model, w, x)
    assert costs.of([0]) > 0 and abs(costs.of([0, 1])) < 1e-6 * costs.of([0])
    graph = trace_graph(model)(w, x[:1])
    rest = [costs.of([0, k]) for k in (2, 3)]
    cheap = GroupScores(costs.groups, "group", costs.prices * [1e-6, 1, 1, 1], "t", interactions=costs.interactions)
    plan = allocate(graph, cheap, channels=0.5, interactions=True)
    assert removed(graph, plan) == [0, 1] and min(rest) > 0


def test_what_an_earlier_plan_removed_stays_gone(graph, costs):
    for options in ({"per": "macs"}, {"interactions": True}, {"per": "params", "interactions": True}):
        first = allocate(graph, costs, channels=0.8, **options)
        reverse = group_scores(graph, -costs.prices + costs.prices.max() + 1, costs.interactions)
        second = allocate(graph, reverse, channels=0.5, start=first, **options)
        assert set(removed(graph, first)) < set(removed(graph, second))


def test_limits_hold_for_every_way_of_ranking(graph, costs):
    for per, interactions in itertools.product((None, "macs"), (False, True)):
        plan = allocate(graph, costs, channels=0.55, max_layer_ratio=0.5, per=per, interactions=interactions)
        sizes = {"stem": 6, "a1": 5, "a2": 6}
        assert all(len(kept) >= sizes[path] - sizes[path] // 2 for path, kept in plan.keep.items())


def test_dead_groups_go_first_whatever_the_unit(graph):
    prices = np.linspace(-1.0, 1.0, 11) + 0.05
    prices[[2, 7]] = 0.0
    for per in (None, "macs"):
        plan = allocate(graph, group_scores(graph, prices), channels=0.75, per=per)
        assert {2, 7} <= set(removed(graph, plan))


def test_bad_input_is_named(graph, costs):
    def refused(match, scores=costs, graph=graph, error=ValueError, **options):
        with pytest.raises(error, match=match):
            allocate(graph, scores, **{"channels": 0.5, **options})

    refused('per must be "macs", "params"', per="flops")
    refused('they need ranking="global"', per="macs", ranking="layer")
    magnitudes = group_magnitude_scores(graph, variables())
    refused("interactions=True needs scores that know them", scores=magnitudes, interactions=True)
    refused("interactions=True needs", scores=magnitude_scores(graph, variables()), interactions=True)
    refused('prices of 11 groups under coupling "group"', coupling="union")
    refused("latency and latency_table go together", per="latency")
    with pytest.raises(ValueError, match="there are 11 groups, but prices of shape"):
        group_scores(graph, np.ones(3))
    with pytest.raises(ValueError, match="1 of 11 prices are not finite, the first that of"):
        group_scores(graph, [np.nan, *np.ones(10)])


@pytest.mark.parametrize("budget", ["macs", "params", "bytes", "channels"])
def test_where_nothing_can_go_every_budget_says_so(budget):
    graph = trace_graph(lambda w, x: x @ w["k"])({"k": jnp.ones((3, 2))}, jnp.ones((1, 3)))
    scores = random_scores(graph, key=jax.random.key(0))
    with pytest.raises(OutOfReachError, match="nothing can be removed from this network"):
        allocate(graph, scores, **{budget: 0.5})
    assert not allocate(graph, scores, **{budget: 1.0}).keep


def test_groups_that_save_nothing_are_named(graph, monkeypatch):
    scores = group_scores(graph, np.ones(11))
    monkeypatch.setattr(Savings, "now", np.array([*np.ones(10), 0.0]))
    with pytest.raises(ValueError, match="saves no macs, so it has no score per unit of it"):
        allocate(graph, scores, per="macs", channels=0.5)
