"""The dependency graph of a network as a picture: its kernels, where branches meet, who loses channels together."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from ehap_jax.graph.channels import ChannelStructure, channel_structure
from ehap_jax.graph.cost import Plan, implant_counts, kept_shape
from ehap_jax.graph.explain import coupled_sets, kernel_of
from ehap_jax.graph.interpret import RULES
from ehap_jax.graph.structure import Coupling
from ehap_jax.graph.trace import Body, Graph, Operand, Value

BOX, COLUMN, ROW = (250, 26), 276, 52
JOINS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "concatenate": "concat", "max": "max", "dot_general": "·"}
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#9c755f", "#e15759", "#76b7b2", "#d4a800", "#ff9da7", "#86bc5a")


class _Vertex(NamedTuple):
    """kernel: path, or None where values meet. label: of a meeting. sources: earlier vertices (-1: the input)."""

    kernel: str | None
    label: str
    sources: tuple[int, ...]


def draw_groups(graph: Graph, plan: Plan | None = None, *, coupling: Coupling = "group") -> str:
    """The kernels of a network in the order of the data, from top to bottom, as an SVG document.

    A box is a conv or dense kernel with its kept and total output channels; circles are where branches meet. Kernels of
    one colour and number lose channels together; grey ones with a dashed border are fixed, and say why when pointed at.
    ``coupling`` is the plan's where there is one. Colours of text and lines follow the light or dark theme.

    >>> import jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> w = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> graph = trace_graph(lambda w, x: x @ w["a"] @ w["b"])(w, jnp.ones((1, 3)))
    >>> draw_groups(graph).count("<rect")
    2
    """
    structure = channel_structure(graph, coupling if plan is None else plan.coupling)
    vertices: list[_Vertex] = []
    held: dict[Operand, int] = {value: -1 for value in graph.arguments}
    _collect(structure, graph.body, held, vertices)
    depth, lane = _layout(vertices)
    width = 70 + COLUMN * (1 + max(lane, default=0))
    height = 40 + ROW * (1 + max(depth, default=0))
    places = [(45 + BOX[0] // 2 + COLUMN * x, 30 + ROW * y) for x, y in zip(lane, depth, strict=True)]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        "<style>:root{color:#222}@media(prefers-color-scheme:dark){:root{color:#ddd}}"
        "text{fill:currentColor}path{stroke:currentColor;stroke-opacity:.45;fill:none}</style>",
    ]
    for index, vertex in enumerate(vertices):
        lines += [_edge(places[source], places[index]) for source in vertex.sources if source >= 0]
    lines += _boxes(structure, plan, vertices, places)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _collect(structure: ChannelStructure, body: Body, held: dict[Operand, int], vertices: list[_Vertex]) -> None:
    """Kernels and meetings of ``body``; ``held`` is the vertex that each value comes from."""
    for node in body.nodes:
        sources = tuple(dict.fromkeys(held[v] for v in node.inputs if v in held))
        if not sources:
            continue
        if node.body is not None and len(node.body.inputs) == len(node.inputs):
            held.update({b: held[a] for a, b in zip(node.inputs, node.body.inputs, strict=True) if a in held})
            _collect(structure, node.body, held, vertices)
            ends = [held.get(operand, sources[0]) for operand in node.body.outputs]
            held.update(zip(node.outputs, ends, strict=False))
            continue
        rule = RULES.get(node.name)
        kernel = kernel_of(structure, node) if rule is not None and rule.macs is not None else None
        vertex = sources[0]
        if kernel is not None or len(sources) > 1:
            vertices.append(_Vertex(kernel, JOINS.get(node.name, node.name), sources))
            vertex = len(vertices) - 1
        held.update(dict.fromkeys((v for v in node.outputs if isinstance(v, Value)), vertex))


def _layout(vertices: list[_Vertex]) -> tuple[list[int], list[int]]:
    """Row and column of every vertex: below all it reads, in the first column free there, the first reader straight."""
    depth: list[int] = []
    lane: list[int] = []
    taken: set[tuple[int, int]] = set()
    for vertex in vertices:
        row = 1 + max((depth[s] for s in vertex.sources if s >= 0), default=-1)
        wanted = min((lane[s] for s in vertex.sources if s >= 0), default=0)
        while (row, wanted) in taken:
            wanted += 1
        taken.add((row, wanted))
        depth.append(row)
        lane.append(wanted)
    return depth, lane


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    """Straight down, or around what lies between: a curve that bulges to the side."""
    (x, y), (u, v) = start, end
    y, v = y + BOX[1] // 2, v - BOX[1] // 2
    far = v - y > ROW
    bulge = 190 if far and x == u else 0  # the curve reaches three quarters of it, beside the boxes
    middle = (v - y) / 2
    return f'<path d="M{x} {y}C{x - bulge} {y + middle:.0f} {u - bulge} {v - middle:.0f} {u} {v}"/>'


def _boxes(structure: ChannelStructure, plan: Plan | None, vertices, places) -> list[str]:
    graph, sets = structure.graph, coupled_sets(structure)
    shape = kept_shape(structure, structure.alive({} if plan is None else plan.keep))
    implants = {} if plan is None else implant_counts(plan)
    lines = []
    for vertex, (x, y) in zip(vertices, places, strict=True):
        if vertex.kernel is None:
            lines.append(f'<circle cx="{x}" cy="{y}" r="11" fill="none" stroke="currentColor"/>')
            lines.append(f'<text x="{x}" y="{y + 4}" text-anchor="middle">{escape(vertex.label)}</text>')
            continue
        path, axis = vertex.kernel, structure.kernel_axes[vertex.kernel]
        kept, full = shape(graph.leaves[path])[axis], graph.leaves[path].shape[axis]
        number = sets.get(path)
        colour = "#888" if number is None else COLOURS[(number - 1) % len(COLOURS)]
        fixed = structure.why_fixed(path) if number is None else f"set {number}"
        style = 'stroke-dasharray="4 3"' if number is None else ""
        share = f", {implants[path]} 1×1" if path in implants else ""
        name = path.removeprefix("params/").removesuffix("/kernel")
        text = f"{name}  {kept}/{full}{share}" + (f"  #{number}" if number is not None else "")
        lines.append(
            f'<g><title>{escape(f"{path}: {fixed}")}</title><rect x="{x - BOX[0] // 2}" y="{y - BOX[1] // 2}" '
            f'width="{BOX[0]}" height="{BOX[1]}" rx="5" fill="{colour}" fill-opacity=".22" stroke="{colour}" {style}/>'
            f'<text x="{x}" y="{y + 4}" text-anchor="middle">{escape(text)}</text></g>'
        )
    return lines
