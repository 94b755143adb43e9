"""Speed of shrunk networks: targets that the layers' latencies do not allow."""

import jax
import pytest

from benchmarks.shrink_speed import budget_plans, table
from ehap_jax.graph import trace_graph
from ehap_jax.pruning import LatencyTable, WidthGrid, random_scores
from ehap_jax.pruning.latency import layers_of
from tests.pruning.networks import apply, images, structs


def test_a_latency_out_of_reach_is_said_and_other_errors_are_errors():
    graph = trace_graph(apply)(structs(), images(count=1))
    scores = random_scores(graph, key=jax.random.key(0))
    constant = LatencyTable("test", {layer.signature: WidthGrid((1,), (1,), ((1.0,),)) for layer in layers_of(graph)})
    plans, unreachable = budget_plans(graph, scores, constant, (0.7,))
    assert set(plans) == {"macs=0.7"} and "out of reach" in unreachable["latency=0.7"]
    with pytest.raises(KeyError, match="no entry for the layer"):
        budget_plans(graph, scores, LatencyTable("test", {}), (0.7,))
    with pytest.raises(ValueError, match="go together"):
        budget_plans(graph, scores, None, (0.7,))  # pyright: ignore[reportArgumentType]
    row = {"median": 0.01, "over_dense": 1.0}
    lines = table({"latency": {"seconds": {"dense": row}, "unreachable": unreachable}}).splitlines()
    assert len(lines) == 2 and lines[1].endswith("latency=0.7: out of reach")
