"""What a group saves, against the cost of the network with and without it."""

import jax
import numpy as np
import pytest

from ehap_jax.graph import channel_structure, trace_graph
from ehap_jax.graph.cost import cost_of_alive, kept_shape
from ehap_jax.pruning import LatencyTable, WidthGrid
from ehap_jax.pruning.latency import grid_widths, layers_of
from ehap_jax.pruning.savings import Savings
from tests.pruning import test_architectures as zoo
from tests.pruning.networks import apply, images, structs

NETWORKS = ["wrn", "preactivation", "mobilenet", "densenet", "vit", "squeeze-excite", "groupnorm", "vgg"]


def keep_without(structure, gone):
    """{kernel: kept channels} once the groups ``gone`` are, or None where a kernel would have none left."""
    lost: dict[str, set[int]] = {}
    groups = structure.groups()
    for number in gone:
        for path, indices in groups[number].producers.items():
            lost.setdefault(path, set()).update(indices)
    sizes = {path: structure.graph.leaves[path].shape[structure.kernel_axes[path]] for path in lost}
    keep = {path: np.setdiff1d(np.arange(sizes[path]), sorted(indices)) for path, indices in lost.items()}
    return None if any(not len(kept) for kept in keep.values()) else keep


def cost_without(structure, gone):
    alive = structure.alive(keep_without(structure, gone))
    return cost_of_alive(structure, alive, {})


@pytest.mark.parametrize("coupling", ["group", "union"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_difference_of_costs(name, coupling):
    """At a few random moments, for a few random groups: in multiply-accumulates, parameters and bytes."""
    with jax.numpy_dtype_promotion("standard"):
        model, variables = zoo.prepare(name)
        graph = trace_graph(model.apply)(variables, zoo.images(1))
    structure = channel_structure(graph, coupling)
    groups = structure.groups()
    rng = np.random.default_rng(sorted(NETWORKS).index(name))
    savings = {unit: Savings(structure, unit) for unit in ("macs", "params", "bytes")}
    gone: set[int] = set()
    for number in rng.permutation(len(groups))[: min(8, len(groups) // 2)]:
        if keep_without(structure, gone | {number}) is None:
            continue
        before, after = (cost_without(structure, g) for g in (gone, gone | {number}))
        for unit, found in savings.items():
            assert found.now[number] == getattr(before, unit) - getattr(after, unit), (unit, groups[number].producers)
            found.remove(int(number))
            assert found.now[number] == 0
        gone.add(int(number))
    assert len(gone) >= 3


def test_latency_is_by_the_table():
    graph = trace_graph(apply)(structs(), images(count=1))
    rng = np.random.default_rng(0)
    grids = {}
    for layer in layers_of(graph):
        inputs, outputs = grid_widths(layer, (0.25, 0.5))
        grids[layer.signature] = WidthGrid(inputs, outputs, tuple(map(tuple, rng.random((len(inputs), len(outputs))))))
    table = LatencyTable("test", grids)
    structure = channel_structure(graph)
    savings = Savings(structure, "latency", table)
    savings.remove(0)

    def seconds(gone):
        return table.seconds(graph, kept_shape(structure, structure.alive(keep_without(structure, gone))))

    np.testing.assert_allclose(savings.now[1], seconds({0}) - seconds({0, 1}), rtol=1e-12, atol=1e-15)
