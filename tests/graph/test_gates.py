"""Gates at 0 remove what masks remove, in every network of the zoo of test_architectures and in random programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import channel_groups, channel_structure, trace_graph
from ehap_jax.graph.gates import gated
from ehap_jax.models import ResNet, eval_apply
from ehap_jax.pruning import PruningPlan, mask_variables
from tests.pruning import test_architectures as zoo
from tests.pruning.invariant import close, jit, normal, random_plan, randomise


def removed(graph, plan, coupling):
    """1 for every group that a plan keeps, 0 for those it removes."""
    kept = []
    for group in channel_groups(graph, coupling=coupling):
        path, indices = next(iter(group.producers.items()))
        kept.append(float(path not in plan.keep or indices[0] in plan.keep[path]))
    assert 0 < sum(kept) < len(kept)
    return jnp.asarray(kept, jnp.float32)


def assert_gates_are_masks(apply, variables, x, coupling, seed=0):
    graph = trace_graph(apply)(variables, x)
    plan = random_plan(graph, seed, coupling)
    gates = removed(graph, plan, coupling)
    run = jit(gated(graph, coupling))
    masked, whole = jit(apply)(mask_variables(variables, plan), x), jit(apply)(variables, x)
    close(run(gates, jax.tree.leaves((variables, x)))[0], masked)
    close(run(jnp.ones_like(gates), jax.tree.leaves((variables, x)))[0], whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_networks(name):
    """With the coupling that test_architectures leaves out."""
    (coupling,) = {"group", "union"} - {zoo.COUPLINGS[name]}
    with jax.numpy_dtype_promotion("standard"):  # some Flax layers mix integers and floats
        model, variables = zoo.prepare(name)
        assert_gates_are_masks(model.apply, variables, zoo.images(), coupling)


@pytest.mark.parametrize("coupling", ["group", "union"])
def test_a_stream_with_one_layer_per_block(coupling):
    """The layer reads and writes the same groups."""

    def apply(w, x):
        for i in range(2):
            x = x + jax.nn.gelu(x @ w[f"block{i}"])
        return x @ w["head"]

    w = {"block0": normal(5, 5), "block1": normal(5, 5, seed=1), "head": normal(5, 2, seed=2), "stem": normal(3, 5)}
    assert_gates_are_masks(lambda w, x: apply(w, x @ w["stem"]), w, normal(4, 3, seed=3), coupling)


def test_layers_in_a_scan():
    def apply(w, x):
        def block(x, kernels):
            return x + jnp.tanh(x @ kernels["a"]) @ kernels["b"], None

        return jax.lax.scan(block, x @ w["stem"], {"a": w["a"], "b": w["b"]})[0] @ w["head"]

    w = {"a": normal(3, 4, 6), "b": normal(3, 6, 4, seed=1), "stem": normal(3, 4, seed=2), "head": normal(4, 2, seed=3)}
    assert_gates_are_masks(apply, w, normal(5, 3, seed=4), "group")


@pytest.mark.slow
def test_gates_on_what_is_read_and_on_what_is_written_have_the_same_derivatives():
    """In a positively homogeneous network: factors on the affine parameters of BatchNorm, which write the channel."""
    model = ResNet(8, 3, widths=(3, 4, 5), shortcut="B")
    x = normal(2, 6, 6, 3)
    variables = randomise(model.init(jax.random.key(0), x))
    apply = eval_apply(model)
    graph = trace_graph(apply)(variables, x)
    groups = channel_groups(graph)

    def written(gates):
        def scaled(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            for number, group in enumerate(groups):
                if (name, 0) in group.slices and name.endswith(("scale", "bias")):
                    own = np.isin(np.arange(len(leaf)), group.slices[name, 0])
                    leaf = jnp.where(own, leaf * gates[number], leaf)
            return leaf

        return apply(jax.tree_util.tree_map_with_path(scaled, variables), x)

    run, leaves, one = gated(graph), jax.tree.leaves((variables, x)), jnp.ones(len(groups))
    read = jit(jax.jacrev(lambda gates: run(gates, leaves)[0]))(one)
    close(read, jit(jax.jacrev(written))(one))


@pytest.mark.slow
def test_one_gate_is_linear_where_nothing_nonlinear_follows():
    """Also where both sides of a product carry the group: the scores of attention."""

    def apply(w, x):
        return jnp.einsum("nd,md->nm", x @ w["q"], x @ w["k"])

    w, x = {"q": normal(3, 4), "k": normal(3, 4, seed=1)}, normal(2, 3, seed=2)
    graph = trace_graph(apply)(w, x)
    run = gated(graph)

    def output(gate):
        return run(jnp.ones(4).at[2].set(gate), jax.tree.leaves((w, x)))[0]

    slope = jax.jacfwd(output)(1.0)
    close(output(0.0), output(1.0) - slope)
    plan = PruningPlan.from_keep(graph, {"q": [0, 1, 3], "k": [0, 1, 3]})
    close(output(0.0), apply(mask_variables(w, plan), x))


def test_a_read_inside_a_derivative_rule_is_refused():
    @jax.custom_jvp
    def layer(x, w):
        return x @ w

    layer.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))
    w = {"in": normal(3, 4), "out": normal(4, 2)}
    graph = trace_graph(lambda w, x: layer(jax.nn.relu(x @ w["in"]), w["out"]))(w, normal(1, 3))
    with pytest.raises(ValueError, match=r"with its own derivative rule \(custom_jvp_call at .*test_gates"):
        gated(graph)


@pytest.mark.slow
def test_group_numbers_are_those_of_channel_groups():
    variables = zoo.MODELS["preactivation"].init(jax.random.key(0), zoo.images())
    graph = trace_graph(zoo.MODELS["preactivation"].apply)(variables, zoo.images())
    for coupling in ("group", "union"):
        structure = channel_structure(graph, coupling)
        groups, numbers = structure.groups(), structure.group_numbers()
        assert numbers.max() == len(groups) - 1
        for leaf in structure.solution.structure.leaves:
            of_leaf = numbers[structure.solution.classes[leaf.start : leaf.start + leaf.size]]
            for number in np.unique(of_leaf[of_leaf >= 0]):
                expected = groups[number].slices[leaf.path, leaf.axis]
                assert np.flatnonzero(of_leaf == number).tolist() == list(expected)
