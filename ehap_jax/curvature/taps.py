"""Per-example gradients of kernels from taps: the inputs and the output cotangents where a kernel is used.

A convolution or a matrix product applies its kernel at many positions t of one example. With the inputs X (t, p) it
reads there and the cotangents D (t, c) of its outputs, the example's gradient of the kernel is X^T D. Both come out of
one forward and one backward pass over a whole batch: no kernel is differentiated, so none gets a copy per example.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax import _compat
from ehap_jax.graph import Graph, Node, Value, evaluate
from ehap_jax.graph.layers import Layer, kernel_axes, layers_in
from ehap_jax.graph.trace import REMAT, Body, Constant, Operand

__all__ = ["Site", "Taps", "find_taps"]


class Site(Layer):
    """One use of a kernel whose gradients can be had from what it reads and the cotangents of what it writes."""

    @property
    def operation(self) -> tuple[Hashable, ...]:
        """Equal for two sites exactly where they compute alike: the operation, its parameters, and all shapes."""
        node = self.node
        shapes = tuple(value.shape for value in (*node.inputs, *node.outputs))
        return node.name, self.kernel, shapes, tuple(sorted(node.params.items()))

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """(positions, groups, inputs read at a position per group, channels per group)."""
        node, shape, out = self.node, self.kernel_shape, self.node.outputs[0].shape
        if node.name == "conv_general_dilated":
            dims, groups = node.params["dimension_numbers"], node.params["feature_group_count"]
            channels = shape[dims.rhs_spec[0]]
            read = prod(shape) // max(channels, 1)
            return prod(out) // max(channels, 1), groups, read, channels // groups
        axes = self.axes
        groups, read, channels = (prod(shape[a] for a in part) for part in (axes.batch, axes.inputs, axes.outputs))
        return prod(out) // max(groups * channels, 1), groups, read, channels

    @property
    def uses_gram(self) -> bool:
        """Whether sums of squares are cheaper from the (t, t) products of inputs than from the (p, c) gradients."""
        positions, _, read, _ = self.sizes
        return 2 * positions <= read

    def inputs(self, x: jax.Array) -> jax.Array:
        """What the kernel reads: (n, *input shape) to (n, positions, groups, read)."""
        n = x.shape[0]
        positions, groups, read, _ = self.sizes
        if self.node.name != "conv_general_dilated":
            free, contract, _, batch = kernel_axes(self.node, 1 - self.kernel)
            x = jnp.transpose(x, (0, *(1 + a for a in (*free, *batch, *contract))))
            return x.reshape(n, positions, groups, read)
        return _patches(self.node, x, self.kernel_shape).reshape(n, positions, groups, read)

    def cotangents(self, d: jax.Array) -> jax.Array:
        """(r, n, *output shape) to (r, n, positions, groups, channels)."""
        r, n = d.shape[:2]
        positions, groups, _, channels = self.sizes
        if self.node.name == "conv_general_dilated":
            spec = self.node.params["dimension_numbers"].out_spec
            order: Sequence[int] = (spec[0], *spec[2:], spec[1])
        else:
            free, _, _, batch = kernel_axes(self.node, 0)
            b, f = len(batch), len(free)
            rank = d.ndim - 2
            lhs, rhs = range(b, b + f), range(b + f, rank)
            other, own = (lhs, rhs) if self.kernel == 1 else (rhs, lhs)
            order = (*other, *range(b), *own)
        return jnp.transpose(d, (0, 1, *(2 + a for a in order))).reshape(r, n, positions, groups, channels)

    def gradients(self, x: jax.Array, d: jax.Array, sums) -> jax.Array:
        """The kernel's gradient per example and cotangent: (r, n, *kernel shape), from what the two above return."""
        _, groups, _, channels = self.sizes
        g = _gradients(x, d, sums)
        n, r = g.shape[:2]
        g = jnp.moveaxis(g, 0, 1)
        shape = self.kernel_shape
        if self.node.name == "conv_general_dilated":
            spec = self.node.params["dimension_numbers"].rhs_spec
            window = tuple(shape[a] for a in spec[2:])
            g = g.reshape(r, n, groups, *window, shape[spec[1]], channels)
            g = jnp.moveaxis(g, 2, -2).reshape(r, n, *window, shape[spec[1]], groups * channels)
            have = (*spec[2:], spec[1], spec[0])
        else:
            have = (*self.axes.batch, *self.axes.inputs, *self.axes.outputs)
            g = g.reshape(r, n, *(shape[a] for a in have))
        return jnp.transpose(g, (0, 1, *(2 + int(a) for a in np.argsort(have))))

    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The operation on ``x`` with another kernel of the same shape."""
        inputs = [x, kernel] if self.kernel == 1 else [kernel, x]
        return _compat.bind(self.node.primitive, inputs, self.node.params)[0]

    def sums_to(self, axis: int) -> bool:
        """Whether `squares` can give one number per index of this axis of the kernel."""
        return axis in (*self.axes.outputs, *self.axes.batch)

    def squares(self, x: jax.Array, d: jax.Array, axes: tuple[int, ...], sums) -> jax.Array:
        """The squared gradients summed over all of the kernel but ``axes``, ascending: (r, n, *their sizes)."""
        if self.uses_gram:
            inner = jnp.einsum("ntgp,nsgp->ngts", x, x, preferred_element_type=sums)
            d = d.astype(sums)
            other = jnp.einsum("ngts,rnsgc->nrgtc", inner, d, preferred_element_type=sums)
            found = jnp.einsum("nrgtc,rntgc->rngc", other, d, preferred_element_type=sums)
        else:
            g = _gradients(x, d, sums)
            found = jnp.swapaxes((g * g).sum(3), 0, 1)
        r, n, groups, channels = found.shape
        if self.node.name == "conv_general_dilated":
            return found.reshape(r, n, groups * channels)
        kept = (*self.axes.batch, *self.axes.outputs)
        found = found.reshape(r, n, *(self.kernel_shape[a] for a in kept))
        found = found.sum(tuple(2 + i for i, a in enumerate(kept) if a not in axes))
        left = [a for a in kept if a in axes]
        return jnp.transpose(found, (0, 1, *(2 + left.index(a) for a in axes)))


def _gradients(x, d, sums):
    return jnp.einsum("ntgp,rntgc->nrgpc", x, d, preferred_element_type=sums)


def _patches(node: Node, x: jax.Array, kernel_shape: tuple[int, ...]) -> jax.Array:
    """(n, *input shape) to (n, batch, *positions, groups, *window, channels of a group), by shifted slices."""
    params, dims = node.params, node.params["dimension_numbers"]
    groups = params["feature_group_count"]
    window = [kernel_shape[a] for a in dims.rhs_spec[2:]]
    out = [node.outputs[0].shape[a] for a in dims.out_spec[2:]]
    x = jnp.transpose(x, (0, 1 + dims.lhs_spec[0], *(1 + a for a in dims.lhs_spec[2:]), 1 + dims.lhs_spec[1]))
    n, batch, channels = x.shape[0], x.shape[1], x.shape[-1]
    margins = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *margins, (0, 0, 0)])
    strides = params["window_strides"]
    shifted = []
    for offset in itertools.product(*(range(size) for size in window)):
        start = [o * d for o, d in zip(offset, params["rhs_dilation"], strict=True)]
        stop = [s + (size - 1) * step + 1 for s, size, step in zip(start, out, strides, strict=True)]
        piece = jax.lax.slice(x, (0, 0, *start, 0), (n, batch, *stop, channels), (1, 1, *strides, 1))
        shifted.append(piece.reshape(n, batch, *out, groups, 1, channels // groups))
    return jnp.concatenate(shifted, axis=-2)


@dataclass(frozen=True, eq=False)
class Taps:
    """A network with taps at the uses of its kernels.

    Attributes:
      graph: of one example, its batch axis of size one.
      body: the graph's, with checkpointed parts written out.
      sites: the uses, in order.
      untapped: kernels with a use of another kind; their gradients are taken by a copy of the kernel per example.
      weights: the part of the body that does not depend on the example.
      uses: every operation, in order, in which kernels meet a value that depends on the example, and their paths.
    """

    graph: Graph
    body: Body
    paths: tuple[str, ...]
    sites: tuple[Site, ...]
    untapped: frozenset[str]
    weights: Body
    uses: tuple[tuple[Node, frozenset[str]], ...]

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.body.outputs[0].shape[1:]

    def sites_of(self, path: str) -> tuple[int, ...]:
        return tuple(i for i, site in enumerate(self.sites) if path in site.reads)

    def run(self, inputs: Sequence[jax.Array], added: Sequence[jax.Array]) -> tuple[list, list]:
        """The outputs with ``added[i]`` on the output of site i, and what every site reads beside its kernel."""
        place = {id(site.node): (i, site) for i, site in enumerate(self.sites)}
        read: list = [None] * len(self.sites)

        def handle(node: Node, operands: list):
            if id(node) not in place:
                return None
            i, site = place[id(node)]
            read[i] = operands[1 - site.kernel]
            return [site.apply(read[i], operands[site.kernel]) + added[i]]

        return evaluate(self.body, inputs, handle), read

    def backward(self, leaves: Sequence[jax.Array], x: Sequence[jax.Array]):
        """Run a batch forward.

        Args:
          leaves: of the variables. x: leaves of the input, each (n, 1, ...).

        Returns:
          logits (n, ...); the input at every site, (n, ...); and a function from cotangents (r, n, ...) of the logits
          to those of every site's output and to the gradients of the untapped kernels by path, (r, n, ...).
        """
        n = x[0].shape[0]
        zeros = [jnp.zeros((n, *site.node.outputs[0].shape), site.node.outputs[0].dtype) for site in self.sites]
        places = {path: place for place, path in enumerate(self.graph.leaves)}
        copies = {
            path: jnp.broadcast_to(leaves[places[path]], (n, *leaves[places[path]].shape))
            for path in self.paths
            if path in self.untapped
        }

        def one(taps, own, x):
            variables = list(leaves)
            for path, leaf in own.items():
                variables[places[path]] = leaf
            (logits,), read = self.run([*variables, *x], taps)
            return logits[0], read

        def batched(taps, own):
            return jax.vmap(one)(taps, own, x)

        logits, pull, read = jax.vjp(batched, zeros, copies, has_aux=True)
        return logits, read, jax.vmap(pull)

    def pull_to_leaves(self, site: Site, g: jax.Array, leaves: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """From a site's gradients (r, n, *kernel shape) to those of the leaves that its kernel is made of."""
        if site.direct:
            (path,) = site.reads
            return {path: g}
        places = {path: place for place, path in enumerate(self.graph.leaves)}
        only = replace(self.weights, outputs=(site.node.inputs[site.kernel],))

        def made(kernels):
            variables = list(leaves)
            for path, leaf in kernels.items():
                variables[places[path]] = leaf
            arguments = [None] * (len(only.inputs) - len(variables))
            return evaluate(only, [*variables, *arguments], lambda node, inputs: None)[0]

        value, pull = jax.vjp(made, {path: leaves[places[path]] for path in sorted(site.reads)})
        (found,) = jax.vmap(jax.vmap(pull))(g.astype(value.dtype))
        return {path: leaf.astype(g.dtype) for path, leaf in found.items()}


def find_taps(graph: Graph, paths: Sequence[str]) -> Taps:
    """Where the kernels ``paths`` are used in ``graph``, which is of one example."""
    body = _written_out(graph.body)
    kernels = {path: graph.leaves[path] for path in paths}
    layers = layers_in(body, kernels, tuple(value for path, value in graph.leaves.items() if path not in kernels))
    sites, uses, untapped, fixed = [], [], set(), []
    for node in body.nodes:
        if layers.is_fixed(node):
            fixed.append(node)
            continue
        reads = frozenset().union(*(layers.made_of(operand) or () for operand in node.inputs))
        if not reads:
            continue
        uses.append((node, reads))
        layer = layers.by_node.get(node)
        if layer is not None and _is_tappable(node):
            sites.append(Site(node, layer.kernel, layer.reads, layer.path, layer.direct, layer.calls))
        else:
            untapped.update(reads)
    for operand in body.outputs:
        untapped.update(layers.made_of(operand) or ())
    kept = tuple(site for site in sites if not site.reads <= untapped)
    return Taps(graph, body, tuple(paths), kept, frozenset(untapped), replace(body, nodes=tuple(fixed)), tuple(uses))


def _is_tappable(node: Node) -> bool:
    if node.name == "conv_general_dilated":
        return node.params["batch_group_count"] == 1
    return node.name == "dot_general"


def _written_out(body: Body) -> Body:
    """``body`` with the insides of checkpointed calls in place of the calls."""
    renamed: dict[Value, Operand] = {}
    constants = dict(body.constants)
    nodes: list[Node] = []

    def now(operand: Operand) -> Operand:
        return operand if isinstance(operand, Constant) else renamed.get(operand, operand)

    def write(inner: Body) -> None:
        for node in inner.nodes:
            node = replace(node, inputs=tuple(now(operand) for operand in node.inputs))
            if node.name in REMAT:
                assert node.body is not None
                constants.update(node.body.constants)
                renamed.update(zip(node.body.inputs, node.inputs, strict=True))
                write(node.body)
                renamed.update(zip(node.outputs, (now(v) for v in node.body.outputs), strict=True))
            else:
                nodes.append(node)

    write(body)
    return replace(body, constants=constants, nodes=tuple(nodes), outputs=tuple(now(v) for v in body.outputs))
