"""The channel products ``v_c . (H v)_c`` of one probe on one chunk of a batch, by either of two methods.

``jvp``: the derivative of the gradient, anew for every probe. ``linearize``: the gradient is linearised once, its
residuals are kept, and a probe runs the linear part alone, about a quarter less work for more memory.

Neither computes ``H v`` where a kernel is used by convolutions and matrix products alone. With ``x`` what the kernel
reads there, ``d`` the cotangent of what it writes, and ``x'``, ``d'`` their derivatives along v,

    v_c . (H v)_c = <(x * v)_c, d'_c> + <(x' * v)_c, d_c>,

which is ``Hv = dW(x, d') + dW(x', d)`` with v moved through the transpose dW. One convolution forward, ``x' * v`` (the
derivative contains ``x * v`` anyway), takes the place of two weight gradients, the slowest convolutions there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ehap_jax._traced_once import traced_once
from ehap_jax.curvature.problem import Layout
from ehap_jax.curvature.residuals import Kept, keep_little
from ehap_jax.curvature.taps import Taps, find_taps
from ehap_jax.graph import trace_graph

__all__ = ["Linearization", "Products", "add_linear_products", "add_products", "linearize", "no_products", "taps_of"]

PyTree = Any


class Products(NamedTuple):
    """The channel products of one probe, summed over chunks, and what in them was not finite.

    Attributes:
      channels: ``{path: (channels,)}``, an axis for each axis of channels.
      gradient_bad: the gradient of the scaled loss is not finite; it does not depend on the probe.
      tangent_bad: the slope of the loss along the probe is not finite; it does not depend on the loss scale.
      leaf_bad: ``(leaves,)``: the gradient or the product of this leaf is not finite.
      stale: the linearisation was made at another loss scale than the state's; nothing here may be used.
    """

    channels: dict[str, jax.Array]
    gradient_bad: jax.Array
    tangent_bad: jax.Array
    leaf_bad: jax.Array
    stale: jax.Array

    @property
    def any_bad(self) -> jax.Array:
        return self.gradient_bad | self.tangent_bad | self.leaf_bad.any()

    @property
    def suspects(self) -> jax.Array:
        """``(leaves,)``: those that are not finite; all of them where only something else is not."""
        return self.leaf_bad | ~self.leaf_bad.any()


class _Gradient(NamedTuple):
    """The loss and its gradient: by path; of a tapped kernel, what it reads and the cotangents of what it writes.

    Its derivative along a probe has the same form.
    """

    loss: jax.Array
    read: list[jax.Array]
    cotangents: list[jax.Array]
    by_path: dict[str, jax.Array]

    def not_finite(self, layout: Layout, taps: Taps) -> jax.Array:
        """``(leaves,)``."""
        parts = {path: [self.cotangents[i] for i in taps.sites_of(path)] for path in layout.paths}
        for path, gradient in self.by_path.items():
            parts[path] = [gradient]
        return ~jnp.stack([jnp.array([jnp.isfinite(x).all() for x in parts[path]]).all() for path in layout.paths])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("kept", "gradient_bad", "loss_scale"),
    meta_fields=("taps",),
)
@dataclass(frozen=True)
class Linearization:
    """The gradient linearised at one loss scale; a pytree.

    Attributes:
      kept: what the gradient and its pushforward are made of again.
      gradient_bad: ``(leaves,)``, whether the gradient of a leaf is not finite.
      loss_scale: what the loss was multiplied with.
      taps: the loss with its taps.
    """

    kept: Kept
    gradient_bad: jax.Array
    loss_scale: jax.Array
    taps: Taps

    def parts(self) -> tuple[_Gradient, Callable[[PyTree], _Gradient]]:
        return self.kept.results()


def no_products(layout: Layout, leaves: list[jax.Array]) -> Products:
    """The sum over no chunks."""
    channels = {
        path: jnp.zeros([leaves[place].shape[axis] for axis in axes], layout.policy.sums)
        for path, place, axes in zip(layout.paths, layout.places, layout.axes, strict=True)
    }
    no = jnp.array(False)
    return Products(channels, no, no, jnp.zeros(len(layout.paths), bool), no)


@partial(jax.jit, static_argnames=("loss", "layout"))
def add_products(loss, layout: Layout, leaves, v, examples, weight, scales, found: Products) -> Products:
    """Add ``weight * v_c . (H v)_c`` of one chunk to ``found``, by jvp of grad."""
    taps = taps_of(loss, layout, leaves, examples)
    gradient, probed = _gradient(layout, taps, leaves, examples, scales[0])
    at, along = jax.jvp(gradient, (probed,), (_direction(layout, v, scales[1]),))
    return _collect(layout, taps, v, at, at.not_finite(layout, taps), along, weight, scales, found)


@partial(jax.jit, static_argnames=("loss", "layout"))
def linearize(loss, layout: Layout, leaves, examples, loss_scale) -> Linearization:
    """Linearise the gradient of ``loss_scale * loss`` on one chunk."""
    taps = taps_of(loss, layout, leaves, examples)

    def linearized(leaves, examples, loss_scale):
        gradient, probed = _gradient(layout, taps, leaves, examples, loss_scale)
        return jax.linearize(gradient, probed)

    # What a kernel reads is among the residuals, too. As one array it is stored once, and the compiler sees that the
    # products need no convolution that the pushforward does not have already.
    kept = keep_little(linearized, leaves, examples, loss_scale)
    at, _ = kept.results()
    return Linearization(kept, at.not_finite(layout, taps), loss_scale, taps)


@partial(jax.jit, static_argnames="layout")
def add_linear_products(layout: Layout, linear: Linearization, v, weight, scales, found: Products) -> Products:
    """Add ``weight * v_c . (H v)_c`` of one chunk to ``found``, from its linearisation."""
    at, pushforward = linear.parts()
    along = pushforward(_direction(layout, v, scales[1]))
    found = found._replace(stale=found.stale | (linear.loss_scale != scales[0]))
    return _collect(layout, linear.taps, v, at, linear.gradient_bad, along, weight, scales, found)


def taps_of(loss, layout: Layout, leaves, examples) -> Taps:
    """The taps of the loss on examples of these shapes; the same object for the same function and shapes."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (leaves, examples))
    leaves, structure = jax.tree.flatten(structs)
    described = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return _find_taps(loss, layout, structure, described, jax.sharding.get_abstract_mesh())


@traced_once
def _find_taps(loss, layout: Layout, structure, described, mesh) -> Taps:
    """The loss with a tap wherever a channel's products are a sum over axes of what is tapped.

    What is traced under a mesh (inside `jax.shard_map`) is of use under that mesh alone, hence ``mesh``.
    """
    leaves, examples = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*found) for found in described])
    graph = trace_graph(loss, on_unknown="freeze")(jax.tree.unflatten(layout.structure, leaves), examples)
    layout.policy.require_full_loss(graph.body.outputs[0].dtype)
    taps = find_taps(graph, layout.paths)
    axes = dict(layout.named_axes)
    indirect = {
        path
        for site in taps.sites
        for path in site.reads
        if not (site.direct and all(map(site.sums_to, axes[path]))) or path in taps.untapped
    }
    sites = tuple(site for site in taps.sites if not site.reads & indirect)
    return replace(taps, sites=sites, untapped=taps.untapped | indirect)


def _gradient(layout: Layout, taps: Taps, leaves, examples, loss_scale):
    """The gradient of the scaled loss as a function of the probed leaves, and these."""
    probed, rest = layout.split(leaves)
    tapped = {path for site in taps.sites for path in site.reads}

    def gradient(p) -> _Gradient:
        def scaled_loss(added, own):
            whole = jax.tree.leaves(layout.join({**p, **own}, rest))
            (loss,), read = taps.run([*whole, *jax.tree.leaves(examples)], added)
            return jnp.asarray(loss).astype(layout.policy.sums) * loss_scale, read

        outputs = [site.node.outputs[0] for site in taps.sites]
        zeros = [jnp.zeros(out.shape, out.dtype) for out in outputs]
        own = {path: p[path] for path in layout.paths if path not in tapped}
        (loss, read), (cotangents, by_path) = jax.value_and_grad(scaled_loss, (0, 1), has_aux=True)(zeros, own)
        return _Gradient(loss, read, cotangents, by_path)

    return gradient, probed


def _direction(layout: Layout, v, probe_scale):
    return {path: v[path] * probe_scale.astype(v[path].dtype) for path in layout.paths}


def _collect(
    layout: Layout, taps: Taps, v, at: _Gradient, gradient_bad, along: _Gradient, weight, scales, found: Products
) -> Products:
    """``at``: the gradient; ``along``: its derivative along the scaled probe."""
    sums = layout.policy.sums
    direction = _direction(layout, v, scales[1])
    products = layout.channel_sums({path: v[path].astype(sums) * Hv.astype(sums) for path, Hv in along.by_path.items()})
    axes = dict(layout.named_axes)
    for i, site in enumerate(taps.sites):
        (path,) = site.reads
        dtype = site.node.inputs[site.kernel].dtype
        # x * v carries the probe scale because the derivative holds it in this form already.
        first = site.apply(at.read[i], direction[path].astype(dtype)).astype(sums) / scales[1]
        second = site.apply(along.read[i], v[path].astype(dtype)).astype(sums)
        inner = first * along.cotangents[i].astype(sums) + second * at.cotangents[i].astype(sums)
        kept = [site.output_axis(axis) for axis in axes[path]]
        product = inner.sum(tuple(a for a in range(inner.ndim) if a not in kept))
        product = jnp.transpose(product, [sorted(kept).index(axis) for axis in kept])
        products[path] = products[path] + product if path in products else product
    # Each scale is divided out on its own: their product could leave the range of float32.
    products = {path: product / scales[0] / scales[1] for path, product in products.items()}
    bad = ~jnp.stack([jnp.isfinite(products[path]).all() for path in layout.paths])
    return Products(
        {path: found.channels[path] + weight * products[path] for path in layout.paths},
        found.gradient_bad | gradient_bad.any(),
        found.tangent_bad | ~jnp.isfinite(along.loss),
        found.leaf_bad | gradient_bad | bad,
        found.stale,
    )
