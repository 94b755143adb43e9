"""The table of a network, line by line."""

from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest

from ehap_jax.graph import count_cost, draw_groups, explain, trace_graph
from ehap_jax.pruning import PruningPlan


@pytest.fixture(scope="module")
def graph():
    shapes = {"a": (3, 4), "b": (4, 4), "c": (4, 6), "out": (6, 2)}
    variables = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def apply(v, x):
        h = x @ v["a"]
        h = jax.nn.relu(h + h @ v["b"])
        return jax.nn.softmax(h @ v["c"]) @ v["out"]

    return trace_graph(apply)(variables, jax.ShapeDtypeStruct((5, 3), jnp.float32))


def cells(table):
    return {row.split()[0]: row.split() for row in table.splitlines()[1:]}


def test_every_kernel_has_a_line(graph):
    rows = cells(explain(graph))
    assert rows["a"][:6] == ["a", "3x4", "1", "4/4", "12", "60"]
    assert rows["b"][:6] == ["b", "4x4", "1", "4/4", "16", "80"], "a and b write one stream"
    assert rows["c"][:6] == ["c", "4x6", "-", "6/6", "24", "120"]
    assert "reduce_max" in " ".join(rows["c"][6:]) and "test_explain.py" in " ".join(rows["c"][6:])
    assert " ".join(rows["out"][6:]) == "network output y axis 1"
    assert rows["total"][1:3] == [str(count_cost(graph).params), str(count_cost(graph).macs)]


def test_under_a_plan(graph):
    plan = PruningPlan.from_keep(graph, {"a": [0, 2], "b": [1, 2]}, coupling="union")
    rows = cells(explain(graph, plan))
    assert rows["a"][2:6] == ["1", "2/4", "6", "30"]
    assert rows["b"][2:6] == ["2", "2/4", "4", "20"], "apart under union coupling"
    assert rows["c"][3:6] == ["6/6", "18", "90"], "the stream keeps 0, 1 and 2"
    assert rows["total"][1:3] == [str(count_cost(graph, plan).params), str(count_cost(graph, plan).macs)]


def test_products_without_a_kernel_are_counted_apart():
    graph = trace_graph(lambda w, x: (x @ w) @ (x @ w).T)(
        jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((5, 3), jnp.float32)
    )
    table = explain(graph)
    assert table.splitlines()[-2].split() == ["(no", "kernel)", "100"]
    assert int(cells(table)["total"][2]) == count_cost(graph).macs == 100 + 2 * 60


def test_the_drawing_has_every_kernel_in_its_set_and_every_meeting(graph):
    """Parsed as XML: one box per kernel, one circle for the sum, an edge for every value that a vertex reads."""
    plan = PruningPlan.from_keep(graph, {"a": [0, 2], "b": [0, 2]})
    root = ElementTree.fromstring(draw_groups(graph, plan))
    tag = "{http://www.w3.org/2000/svg}"
    boxes = {g.find(f"{tag}title").text: g.find(f"{tag}text").text for g in root.iter(f"{tag}g")}  # pyright: ignore[reportOptionalMemberAccess]
    assert boxes["a: set 1"] == "a  2/4  #1" and boxes["b: set 1"] == "b  2/4  #1"
    assert any(title.startswith("c: reduce_max over the axis") for title in boxes) and len(boxes) == 4
    fixed = [r for r in root.iter(f"{tag}rect") if r.get("stroke-dasharray")]
    assert len(fixed) == 2 and {r.get("fill") for r in fixed} == {"#888"}
    places = [(float(r.get("x")), float(r.get("y"))) for r in root.iter(f"{tag}rect")]  # pyright: ignore[reportArgumentType]
    assert len(set(places)) == 4
    signs = [text.text for text in root.findall(f"{tag}text")]
    assert signs[0] == "+" and len(list(root.iter(f"{tag}path"))) >= 5
