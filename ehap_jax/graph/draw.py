"""The dependency graph of a network as a picture: its kernels, where branches meet, who loses channels together."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from ehap_jax.graph.channels import ChannelStructure, channel_structure
from ehap_jax.graph.cost import Plan, implant_counts, kept_shape
from ehap_jax.graph.explain import coupled_sets, kernel_of
from ehap_jax.graph.interpret import RULES
from ehap_jax.graph.structure import Coupling
from ehap_jax.graph.trace import Body, Graph, Operand, Value

HEIGHT, GAP, TRACK, CHARACTER = 26, 26, 7, 7.2  # of boxes, between them, between lines beside them, of text: pixels
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
    routes = _routes(vertices, depth, lane)
    boxes = {index: box for index, box in enumerate(_boxes(structure, plan, vertices)) if box is not None}
    wide = round(24 + CHARACTER * max((len(box.text) for box in boxes.values()), default=0))
    beside = TRACK * (1 + max((track for *_, track in routes), default=0))
    column = wide + beside + GAP
    places = [
        (GAP + beside + wide // 2 + column * x, 30 + (HEIGHT + GAP) * y) for x, y in zip(lane, depth, strict=True)
    ]
    width, height = GAP + column * (1 + max(lane, default=0)), 60 + (HEIGHT + GAP) * max(depth, default=0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        "<style>:root{color:#222}@media(prefers-color-scheme:dark){:root{color:#ddd}}"
        "text{fill:currentColor;text-anchor:middle}path{stroke:currentColor;stroke-opacity:.45;fill:none}</style>",
        *(_edge(places[source], places[target], wide, track) for source, target, track in routes),
    ]
    for index, (x, y) in enumerate(places):
        if index in boxes:
            lines.append(boxes[index].drawn(x, y, wide))
        else:
            label = escape(vertices[index].label)
            lines.append(
                f'<ellipse cx="{x}" cy="{y}" rx="{max(13, 6 + 4 * len(label))}" ry="13" fill="none" '
                f'stroke="currentColor"/><text x="{x}" y="{y + 4}">{label}</text>'
            )
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


def _routes(vertices: list[_Vertex], depth: list[int], lane: list[int]) -> list[tuple[int, int, int]]:
    """(source, reader, track): 0 for a line straight down, else the number of a free line beside its column."""
    taken = set(zip(lane, depth, strict=True))
    busy: dict[tuple[int, int], list[tuple[int, int]]] = {}
    routes = []
    for index, vertex in enumerate(vertices):
        for source in (s for s in vertex.sources if s >= 0):
            column, span = lane[source], (depth[source], depth[index])
            track = 0
            if any((column, row) in taken for row in range(span[0] + 1, span[1])):
                track = 1
                while any(a < span[1] and span[0] < b for a, b in busy.get((column, track), [])):
                    track += 1
                busy.setdefault((column, track), []).append(span)
            routes.append((source, index, track))
    return routes


def _edge(start: tuple[int, int], end: tuple[int, int], wide: int, track: int) -> str:
    """Down its own column, or beside it; to the side only in the gaps between rows."""
    (x, y), (u, v) = start, end
    y, v = y + HEIGHT // 2, v - HEIGHT // 2
    half, path = GAP // 2, f"M{x} {y}"
    if track:
        side = x - wide // 2 - TRACK * track
        path += f"C{x} {y + half} {side} {y + half} {side} {y + GAP}"
        x = side
    return f'<path d="{path}V{v - GAP}C{x} {v - half} {u} {v - half} {u} {v}"/>'


class _Box(NamedTuple):
    """A kernel: its label, what it says when pointed at, its colour, and whether it is fixed."""

    text: str
    title: str
    colour: str
    fixed: bool

    def drawn(self, x: int, y: int, wide: int) -> str:
        style = 'stroke-dasharray="4 3"' if self.fixed else ""
        return (
            f'<g><title>{escape(self.title)}</title><rect x="{x - wide // 2}" y="{y - HEIGHT // 2}" width="{wide}" '
            f'height="{HEIGHT}" rx="5" fill="{self.colour}" fill-opacity=".22" stroke="{self.colour}" {style}/>'
            f'<text x="{x}" y="{y + 4}">{escape(self.text)}</text></g>'
        )


def _boxes(structure: ChannelStructure, plan: Plan | None, vertices: list[_Vertex]) -> Iterator[_Box | None]:
    """A box per vertex that is a kernel, None for the others."""
    graph, sets = structure.graph, coupled_sets(structure)
    shape = kept_shape(structure, structure.alive({} if plan is None else plan.keep))
    implants = {} if plan is None else implant_counts(plan)
    for path in (vertex.kernel for vertex in vertices):
        if path is None:
            yield None
            continue
        axis, number = structure.kernel_axes[path], sets.get(path)
        kept, full = shape(graph.leaves[path])[axis], graph.leaves[path].shape[axis]
        share = f", {implants[path]} 1×1" if path in implants else ""
        name = path.removeprefix("params/").removesuffix("/kernel")
        yield _Box(
            text=f"{name}  {kept}/{full}{share}" + (f"  #{number}" if number is not None else ""),
            title=f"{path}: {structure.why_fixed(path) if number is None else f'set {number}'}",
            colour="#888" if number is None else COLOURS[(number - 1) % len(COLOURS)],
            fixed=number is None,
        )
