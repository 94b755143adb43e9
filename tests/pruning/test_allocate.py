"""Budgets: reached to within one group, with the right groups gone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.pruning import PruningPlan, Scores, allocate, random_scores
from tests.pruning.networks import apply, images, structs

FULL = {"stem": 6, "a1": 5, "a2": 6, "head": 3}


@pytest.fixture(scope="module")
def graph():
    return trace_graph(apply)(structs(), images(count=1))


@pytest.fixture(scope="module")
def chain():
    """Two dense layers of 20 and 16 channels: no coupling at all."""
    variables = {
        k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in {"a": (5, 20), "b": (20, 16), "c": (16, 2)}.items()
    }
    network = lambda v, x: jax.nn.relu(jax.nn.relu(x @ v["a"]) @ v["b"]) @ v["c"]  # noqa: E731
    return trace_graph(network)(variables, jax.ShapeDtypeStruct((1, 5), jnp.float32))


def scores_of(norms=None, **values):
    values = {path: np.asarray(v, float) for path, v in values.items()}
    default = {path: np.ones_like(v) for path, v in values.items()}
    return Scores(values, {**default, **{p: np.asarray(n, float) for p, n in (norms or {}).items()}}, "test")


@pytest.mark.parametrize("budget", ["params", "macs", "bytes", "channels"])
@pytest.mark.parametrize("coupling", ["group", "union"])
@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.35])
def test_target_is_met_within_one_group(graph, budget, coupling, fraction):
    scores = random_scores(graph, key=jax.random.key(3))
    plan = allocate(graph, scores, coupling=coupling, **{budget: fraction})

    def kept(plan):
        if budget != "channels":
            return getattr(count_cost(graph, plan), budget) / getattr(count_cost(graph), budget)
        sizes = {p: FULL[p] for p in ("stem", "a1", "a2")}
        return sum(len(plan.keep.get(p, range(n))) for p, n in sizes.items()) / sum(sizes.values())

    assert kept(plan) <= fraction
    # One step back along the same ranking misses the target: every looser plan does.
    looser = [kept(allocate(graph, scores, coupling=coupling, **{budget: f})) for f in np.linspace(fraction, 1, 40)]
    assert all(k == kept(plan) or k > fraction for k in looser)


def test_lowest_scores_go_first(chain):
    values = {"a": np.arange(20) + 0.5, "b": np.arange(16) + 0.6, "c": np.ones(2)}
    plan = allocate(chain, scores_of(**values), channels=26 / 36)
    assert plan.keep["a"].tolist() == list(range(5, 20)) and plan.keep["b"].tolist() == list(range(5, 16))


def test_dead_channels_go_first_by_norm_then_position(chain):
    """Exact zeros precede negative estimates; among them the smaller norm, then the lower index."""
    a = np.full(20, 1.0)
    a[[3, 7, 8, 11]], a[15] = 0.0, -2.0
    norms = np.ones(20)
    norms[[3, 7, 8, 11]] = [0.4, 0.2, 0.2, 0.1]
    scores = scores_of({"a": norms}, a=a, b=np.full(16, 1.0), c=np.ones(2))
    gone = []
    for removed in range(1, 6):
        plan = allocate(chain, scores, channels=(36 - removed) / 36)
        gone += sorted(set(range(20)) - set(plan.keep["a"].tolist()) - set(gone))
    assert gone == [11, 7, 8, 3, 15]
    assert plan.provenance["negative_scores"] == 1


def test_layer_limit_keeps_the_best_channels(chain):
    a = np.linspace(0.01, 0.02, 20)[::-1]
    plan = allocate(chain, scores_of(a=a, b=np.full(16, 9.0), c=np.ones(2)), channels=0.5, max_layer_ratio=0.8)
    assert plan.keep["a"].tolist() == [0, 1, 2, 3], "the four best are the first four here"
    plan = allocate(chain, scores_of(a=a[::-1], b=np.full(16, 9.0), c=np.ones(2)), channels=0.5, max_layer_ratio=0.8)
    assert plan.keep["a"].tolist() == [16, 17, 18, 19]


def test_layer_limit_is_exact_for_decimal_ratios():
    """0.29 · 100 is 28.999… in floating point."""
    shapes = {"a": jax.ShapeDtypeStruct((5, 100), jnp.float32), "b": jax.ShapeDtypeStruct((100, 2), jnp.float32)}
    graph = trace_graph(lambda v, x: x @ v["a"] @ v["b"])(shapes, jax.ShapeDtypeStruct((1, 5), jnp.float32))
    scores = scores_of(a=np.ones(100), b=np.ones(2))
    assert len(allocate(graph, scores, channels=0.71, max_layer_ratio=0.29).keep["a"]) == 71


def test_a_layer_never_empties(chain):
    scores = scores_of(a=np.full(20, 0.1), b=np.full(16, 9.0), c=np.ones(2))
    plan = allocate(chain, scores, channels=17 / 36, max_layer_ratio=0.99)
    assert len(plan.keep["a"]) == 1


@pytest.mark.parametrize("round_to", [4, 8])
@pytest.mark.parametrize("fraction", [0.85, 0.7, 0.6])
def test_round_to(chain, round_to, fraction):
    plan = allocate(chain, random_scores(chain, key=jax.random.key(0)), channels=fraction, round_to=round_to)
    assert plan.keep
    assert all(len(kept) % round_to == 0 for kept in plan.keep.values())
    assert sum(len(plan.keep.get(p, range(n))) for p, n in {"a": 20, "b": 16}.items()) <= fraction * 36


def test_round_to_restores_the_best(chain):
    a = np.arange(20) + 1.0
    plan = allocate(chain, scores_of(a=a, b=np.full(16, 99.0), c=np.ones(2)), channels=32 / 36, round_to=8)
    assert plan.keep["a"].tolist() == list(range(4, 20))


def test_min_channels(chain):
    scores = scores_of(a=np.full(20, 0.1), b=np.full(16, 9.0), c=np.ones(2))
    plan = allocate(chain, scores, channels=0.6, min_channels=8)
    assert len(plan.keep["a"]) == 8


def test_excluded_kernels_stay_whole_with_all_that_is_tied_to_them(graph):
    scores = random_scores(graph, key=jax.random.key(0))
    assert set(allocate(graph, scores, channels=0.85, exclude=["s*m"]).keep) == {"a1"}, "a2 writes the stem's stream"
    union = allocate(graph, scores, channels=0.6, exclude=["s*m"], coupling="union")
    assert set(union.keep) == {"a1", "a2"}
    only = Scores({"a1": scores.values["a1"]}, {"a1": scores.norms["a1"]}, "partial")
    assert set(allocate(graph, only, channels=0.85, exclude=["stem", "a2"]).keep) == {"a1"}
    with pytest.raises(TypeError, match="sequence of patterns"):
        allocate(graph, scores, channels=0.85, exclude="stem")


def test_ranking_per_layer_takes_the_same_fraction_of_each(chain):
    """Layer b is worth 100 times as much as layer a, and still loses half; within a layer the best stay."""
    scores = scores_of(a=np.arange(20) + 1.0, b=100.0 * np.arange(16)[::-1] + 100, c=np.ones(2))
    plan = allocate(chain, scores, channels=0.5, ranking="layer")
    assert plan.keep["a"].tolist() == list(range(10, 20)) and plan.keep["b"].tolist() == list(range(8))
    assert len(allocate(chain, scores, channels=0.5, ranking="global").keep["a"]) == 2


def test_isomorphic_ranking_compares_like_with_like(chain, graph):
    """Two dense layers are alike and compete; the stream and the inner width of a block are not alike."""
    scores = scores_of(a=np.arange(20) + 1.0, b=np.arange(16) + 101.0, c=np.ones(2))
    assert "b" not in allocate(chain, scores, channels=0.6, ranking="isomorphic").keep
    block = scores_of(stem=np.ones(6), a2=np.ones(6), a1=np.full(5, 99.0), head=np.ones(3))
    plan = allocate(graph, block, channels=0.5, ranking="isomorphic")
    assert len(plan.keep["stem"]) == 3 and len(plan.keep["a1"]) in (2, 3)


@pytest.mark.parametrize("aggregate, first", [("sum", 0), ("mean", 0), ("max", 1)])
def test_groups_are_scored_as_a_whole(graph, aggregate, first):
    """Stream channel 0 has scores 1 and 4, channel 1 has 3 and 3: less in sum, more at most."""
    stem, a2 = np.full(6, 50.0), np.full(6, 50.0)
    stem[:2], a2[:2] = (1, 3), (4, 3)
    scores = scores_of(stem=stem, a2=a2, a1=np.full(5, 99.0), head=np.ones(3))
    plan = allocate(graph, scores, channels=15.5 / 17, aggregate=aggregate)
    assert plan.keep["stem"].tolist() == plan.keep["a2"].tolist() == [i for i in range(6) if i != first]


def test_provenance_says_how(graph):
    plan = allocate(graph, random_scores(graph, key=jax.random.key(0)), macs=0.7)
    assert plan.provenance["criterion"] == "random" and plan.provenance["budget"] == {"macs": 0.7}
    assert plan.provenance["cost"] == count_cost(graph, plan)._asdict()
    assert plan.provenance["full_cost"] == count_cost(graph)._asdict()


def test_everything_kept_is_an_empty_plan(graph):
    assert allocate(graph, random_scores(graph, key=jax.random.key(0)), params=1.0).keep == {}


def test_a_budget_out_of_reach_names_the_range(graph):
    scores = random_scores(graph, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"macs=0.01 is out of reach.*max_layer_ratio=0.5.*between 0\.\d+ and 1"
    ) as error:
        allocate(graph, scores, macs=0.01, max_layer_ratio=0.5)
    lowest = float(str(error.value).split("between ")[1].split(" ")[0])
    reached = allocate(graph, scores, macs=lowest + 1e-4, max_layer_ratio=0.5)
    assert count_cost(graph, reached).macs / count_cost(graph).macs == pytest.approx(lowest, abs=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "exactly one of params, macs, channels, bytes, latency; got none"),
        ({"params": 0.5, "macs": 0.5}, "got params, macs"),
        ({"params": 0}, r"in \(0, 1\]; got 0"),
        ({"params": 50}, r"in \(0, 1\]; got 50"),
        ({"params": float("nan")}, "got nan"),
        ({"params": 0.5, "max_layer_ratio": 1.0}, "max_layer_ratio"),
        ({"params": 0.5, "round_to": 0}, "round_to"),
        ({"params": 0.5, "min_channels": 0}, "min_channels"),
        ({"params": 0.5, "ranking": "local"}, "ranking"),
        ({"params": 0.5, "exclude": ["nothing*"]}, r"'nothing\*' matches no kernel; there are a1, a2, head, stem"),
        ({"params": 0.5, "aggregate": "median"}, "aggregate must be one of"),
        ({"params": 0.5, "coupling": "both"}, "coupling"),
    ],
)
def test_bad_options_are_refused(graph, options, message):
    with pytest.raises(ValueError, match=message):
        allocate(graph, random_scores(graph, key=jax.random.key(0)), **options)


def test_scores_of_another_network_are_refused(graph):
    with pytest.raises(KeyError, match="no entry for kernel"):
        allocate(graph, scores_of(a1=np.ones(5)), macs=0.5)
    with pytest.raises(ValueError, match="a1 has 5 output channels, but 4 scores"):
        allocate(graph, scores_of(a1=np.ones(4), a2=np.ones(6), stem=np.ones(6), head=np.ones(3)), macs=0.5)


def test_plans_are_ordinary_plans(graph):
    plan = allocate(graph, random_scores(graph, key=jax.random.key(1)), macs=0.5, coupling="union")
    again = PruningPlan.from_keep(graph, plan.keep, coupling="union")
    for path, axes in plan.slices.items():
        for axis, kept in axes.items():
            np.testing.assert_array_equal(kept, again.slices[path][axis])
