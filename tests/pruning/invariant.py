"""The invariant of pruning: a masked network and its shrunk counterpart are the same function."""

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.graph import trace_graph
from ehap_jax.pruning import allocate, mask_variables, random_scores, shrink, shrink_variables

# Unoptimised code compiles several times faster, and these networks are tiny.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def jit(function):
    return jax.jit(function, compiler_options=FAST)


def randomise(variables, seed=0):
    """Variables in which no channel is special: normal numbers, positive variances."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "var" in name.split("/"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        scale = 1.0 / np.sqrt(fan_in) if leaf.ndim > 1 else 0.5
        return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def random_plan(graph, seed, coupling, keep=0.6):
    """A plan that keeps a random choice of about ``keep`` of the prunable channels."""
    scores = random_scores(graph, key=jax.random.key(seed))
    return allocate(graph, scores, channels=keep, coupling=coupling)


def close(actual, expected, tolerance=1e-5):
    """Equal to ``tolerance`` of each array's own largest number (or of 1)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        assert a.shape == e.shape, (path, a.shape, e.shape)
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = max(1.0, np.abs(e).max(initial=0.0))
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale, err_msg=str(path))


def probed(apply, seed=0):
    """A random projection of the first output, all outputs, and its gradient: a function of (variables, *args)."""

    def loss(variables, *args):
        out = apply(variables, *args)
        first = jax.tree.leaves(out)[0]
        return jnp.sum(normal(*first.shape, seed=seed) * first), out

    return jax.value_and_grad(loss, has_aux=True, allow_int=True)


def kept_state(outputs, plan):
    """The outputs of a masked network with updated variables among them cut to what the plan keeps."""

    def cut(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for variable, axes in plan.slices.items():
            if name.endswith("/" + variable):
                for axis, kept in axes.items():
                    leaf = np.take(np.asarray(leaf), kept, axis)
        return leaf

    return jax.tree_util.tree_map_with_path(cut, outputs)


def normal(*shape, seed=0):
    """Standard normal float32 numbers, without compiling anything."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_invariant(apply, variables, *args, plan, full=None):
    """masked == shrunk, value and gradient. ``full``: ``probed(apply)``, jitted, to share."""
    assert plan.keep, "the plan prunes nothing"
    (_, expected), full_gradient = (full or jit(probed(apply)))(mask_variables(variables, plan), *args)
    expected = kept_state(expected, plan)
    (_, actual), gradient, wanted = jit(
        lambda v, g, *args: (
            *probed(shrink(apply, plan))(shrink_variables(v, plan), *args),
            shrink_variables(g, plan),
        )
    )(variables, full_gradient, *args)
    close(actual, expected)
    close(gradient, wanted)


def assert_all_plans(apply, variables, *args, seeds=(0, 1), couplings=("group", "union"), keep=0.6):
    """The invariant for a few random plans under both couplings; returns the graph."""
    graph = trace_graph(apply)(variables, *args)
    full = jit(probed(apply))
    for coupling in couplings:
        for seed in seeds:
            plan = random_plan(graph, seed, coupling, keep)
            assert_invariant(apply, variables, *args, plan=plan, full=full)
    return graph
