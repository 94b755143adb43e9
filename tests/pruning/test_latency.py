"""Latency tables: interpolation, sums over a network, budgets, measuring and its cache."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.graph.channels import channel_structure
from ehap_jax.graph.cost import kept_shape
from ehap_jax.pruning import LatencyTable, OutOfReachError, WidthGrid, allocate, measure_latency, random_scores
from ehap_jax.pruning.latency import layers_of
from tests.pruning.networks import apply, images, structs


@pytest.fixture(scope="module")
def graph():
    return trace_graph(apply)(structs(), images(count=1))


def proportional(graph, factor=None):
    """Time = multiply-accumulates (times a factor per layer): bilinear in the widths, so the grid is exact."""
    layers = {}
    for number, layer in enumerate(layers_of(graph)):
        i, o = layer.widths(lambda operand: operand.shape)
        macs = next(m for n, m in _macs(graph) if n is layer.node) * (factor[number] if factor else 1)
        layers[layer.signature] = WidthGrid((0, i), (0, o), ((0.0, 0.0), (0.0, float(macs))))
    return LatencyTable("test", layers)


def _macs(graph):
    from ehap_jax.graph.cost import node_macs

    return list(node_macs(graph.body, lambda operand: operand.shape))


def test_grids_are_linear_between_widths_and_never_fall():
    grid = WidthGrid((8, 16), (4, 12), ((1.0, 3.0), (2.0, 2.5)))
    assert [grid.at(8, 4), grid.at(8, 8), grid.at(16, 4), grid.at(12, 4)] == [1.0, 2.0, 2.0, 1.5]
    assert grid.at(16, 12) == 3.0, "noise below a narrower layer's time is not believed"
    assert grid.at(99, 99) == 3.0 and grid.at(1, 1) == 1.0


@pytest.mark.parametrize("coupling", ["group", "union"])
def test_a_table_of_macs_is_a_budget_in_macs(graph, coupling):
    scores = random_scores(graph, key=jax.random.key(3))
    table = proportional(graph)
    by_time = allocate(graph, scores, latency=0.5, latency_table=table, coupling=coupling)
    by_macs = allocate(graph, scores, macs=0.5, coupling=coupling)
    assert {p: k.tolist() for p, k in by_time.keep.items()} == {p: k.tolist() for p, k in by_macs.keep.items()}
    structure = channel_structure(graph, coupling)
    shape = kept_shape(structure, structure.alive(by_time.keep))
    np.testing.assert_allclose(table.seconds(graph, shape), count_cost(graph, by_time).macs)
    assert by_time.provenance["budget"] == {"latency": 0.5} and by_time.provenance["latency_device"] == "test"


def test_what_costs_time_goes_rather_than_what_costs_macs(graph):
    """Where all the time is in the block's second convolution, the target is met by its input channels alone."""
    names = [node.inputs[1].shape for node, _ in _macs(graph)]
    slow = [1e6 if shape == (3, 3, 5, 6) else 1e-6 for shape in names]
    scores = random_scores(graph, key=jax.random.key(3))
    options = {"exclude": ["stem", "a2"], "max_layer_ratio": 0.8}
    plan = allocate(graph, scores, latency=0.45, latency_table=proportional(graph, slow), **options)
    assert len(plan.keep["a1"]) == 2 and set(plan.keep) == {"a1"}
    with pytest.raises(OutOfReachError, match=r"latency=0.45 is out of reach"):
        allocate(
            graph, scores, latency=0.45, latency_table=proportional(graph, slow), exclude=["a1"], max_layer_ratio=0.5
        )


def test_grouped_products_and_rounds_of_a_scan_count():
    v = {"w": jnp.ones((3, 4, 4)), "d": jnp.ones((3, 1, 4)), "out": jnp.ones((4, 2))}

    def network(v, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, v["w"])
        h = jax.lax.conv_general_dilated(
            h[:, None], v["d"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4
        )
        return h[:, 0] @ v["out"]

    graph = trace_graph(network)(v, jnp.ones((1, 4)))
    assert [layer.rounds for layer in layers_of(graph)] == [3, 1, 1]
    assert [layer.axes is None for layer in layers_of(graph)] == [False, True, False]
    layers = [(layer.signature, WidthGrid((0, 1), (0, 10), ((0.0, 0.0), (0.0, 1.0)))) for layer in layers_of(graph)]
    seconds = LatencyTable("test", dict(layers)).seconds(graph, lambda operand: operand.shape)
    np.testing.assert_allclose(seconds, 3 * 0.4 + 1.0 + 0.2)


@pytest.mark.slow
def test_measured_tables_are_kept_by_device_and_measured_once(graph, tmp_path, monkeypatch):
    path, seen = tmp_path / "new" / "latency.json", []
    options = {"fractions": (0.5, 1.0), "repeats": 1, "cache": path}
    dense = trace_graph(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"] @ w["b"])(
        {"a": jnp.ones((6, 8)), "b": jnp.ones((8, 8))}, jnp.ones((4, 6))
    )
    table = measure_latency(dense, progress=lambda done, every: seen.append((done, every)), **options)
    assert seen == [(0, 2), (1, 2)], "the same product twice is one layer"
    assert {(g.inputs, g.outputs) for g in table.layers.values()} == {((3, 6), (4, 8)), ((4, 8), (4, 8))}
    assert all(0 < s < 1 for g in table.layers.values() for row in g.seconds for s in row)
    again = measure_latency(dense, progress=lambda *_: pytest.fail("measured twice"), **options)
    assert again == table and [p.name for p in path.parent.iterdir()] == ["latency.json"]
    assert list(json.loads(path.read_text())["devices"]) == [table.device] and jax.__version__ in table.device
    monkeypatch.setattr("ehap_jax.pruning.latency_measurement.device_name", lambda: "another")
    other = measure_latency(dense, **options)
    assert other.device == "another" and set(json.loads(path.read_text())["devices"]) == {"another", table.device}
    plan = allocate(dense, random_scores(dense, key=jax.random.key(0)), latency=1.0, latency_table=table)
    assert plan.provenance["latency_device"] == table.device
    with pytest.raises(KeyError, match=r"no entry for the layer at .*networks\.py"):
        allocate(graph, random_scores(graph, key=jax.random.key(0)), latency=0.9, latency_table=table)


def test_bad_options_are_refused(graph, tmp_path):
    scores = random_scores(graph, key=jax.random.key(0))
    with pytest.raises(ValueError, match="latency and latency_table go together"):
        allocate(graph, scores, latency=0.5)
    with pytest.raises(ValueError, match="latency tables have no 1×1 implants"):
        allocate(graph, scores, latency=0.5, latency_table=proportional(graph), implants=0.5)
    with pytest.raises(ValueError, match=r"fractions must be in \(0, 1\]"):
        measure_latency(graph, fractions=(0.0, 1.0))
    with pytest.raises(ValueError, match="repeats"):
        measure_latency(graph, repeats=0)
    (tmp_path / "plan.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not a latency table"):
        measure_latency(graph, cache=tmp_path / "plan.json")
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(ValueError, match="not a JSON file"):
        measure_latency(graph, cache=tmp_path / "text.json")
