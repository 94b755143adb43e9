"""Removal costs against dense float64 Jacobians through scaled variables, brute force, and their own statistics."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import (
    Batches,
    Policy,
    centred_logits,
    removal_costs,
    second_derivative,
    softened_softmax,
    softmax_cross_entropy,
    squared_error,
    weighted,
)
from ehap_jax.curvature.problem import path_name
from ehap_jax.graph import channel_structure, trace_graph
from ehap_jax.pruning import PruningPlan, mask_variables
from tests.curvature.dense_hessians import DOUBLE, conv, cross_entropy, make, small, smooth

NETWORKS = ["plain", "residual A", "residual B", "pre-activation", "max-pool", "depthwise", "concat", "upsampled"]


def scaled(graph, groups, variables, gates):
    """Every kernel multiplied by the gates of what it reads: what a gate on activations does, by other means."""
    axes = channel_structure(graph).kernel_axes

    def one(path, leaf):
        name = path_name(path)
        for number, group in enumerate(groups):
            for (member, axis), indices in group.slices.items():
                if member == name and name in axes and axis != axes[name]:
                    own = np.isin(np.arange(leaf.shape[axis]), indices)
                    own = own.reshape([-1 if a == axis else 1 for a in range(leaf.ndim)])
                    leaf = jnp.where(own, leaf * gates[number], leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(one, variables)


def dense(model, params, x, labels, head_loss, groups, graph):
    """Per example the logits' Jacobian J in the gates; mean of J^T H J and of J^T times the loss's gradient."""
    one = jnp.ones(len(groups))
    logits = jax.jit(lambda gates: model(scaled(graph, groups, params, gates), x))
    J, z = jax.jit(jax.jacfwd(logits))(one), logits(one)
    H, g = jax.jit(lambda z, t: tuple(jax.vmap(of(head_loss))(z, t) for of in (jax.hessian, jax.grad)))(z, labels)
    return np.einsum("nck,ncd,ndj->kj", J, H, J) / len(x), np.einsum("nck,nc->nk", J, g)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_dense_product(name):
    with enable_x64():
        model, params, x, _ = make(name)
        labels = jnp.arange(5, dtype=jnp.int32) % 3
        costs = removal_costs(model, params, (x, labels), policy=DOUBLE)
        graph = trace_graph(model)(params, x[:1])
        G, a = dense(model, params, x, labels, cross_entropy, costs.groups, graph)
    scale = np.abs(G).max()
    assert scale > 0 and costs.examples == 5 and costs.combinations == 0
    np.testing.assert_allclose(costs.gram(), G, rtol=1e-10, atol=1e-10 * scale)
    np.testing.assert_allclose(costs.second_order, np.diag(G), rtol=1e-10, atol=1e-10 * scale)
    np.testing.assert_allclose(costs.first_order, a.mean(0), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(costs.first_order_sem, a.std(0, ddof=1) / np.sqrt(5), rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(costs.first_order_squares, (a**2).mean(0), rtol=1e-9, atol=1e-12)
    for number in range(len(costs.groups)):
        np.testing.assert_allclose(costs.interactions(number), G[number], rtol=1e-9, atol=1e-10 * scale)
    some = [0, len(costs.groups) - 1]
    expected = 0.5 * G[np.ix_(some, some)].sum()
    np.testing.assert_allclose(costs.of(some), expected, rtol=1e-10)
    np.testing.assert_allclose(costs.of(some, first_order=True), expected - a.mean(0)[some].sum(), rtol=1e-8)


HEADS = {
    "softened": (softened_softmax(3.0), lambda z, t: 9 * cross_entropy(z / 3, t)),
    "centred": (centred_logits, lambda z, t: 0.5 * jnp.sum((z - z.mean()) ** 2)),
    "squared error": (squared_error, lambda z, t: jnp.sum((z - 2.0) ** 2)),
    "second derivative": (second_derivative(cross_entropy), cross_entropy),
    "indefinite": (second_derivative(lambda z, t: jnp.sin(3 * z).sum()), lambda z, t: jnp.sin(3 * z).sum()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_heads(two_layers, name):
    params, x, labels, _ = two_layers
    head, loss = HEADS[name]
    with enable_x64():
        batch = (x, jnp.full((7, 3), 2.0)) if head is squared_error else (x, labels)
        costs = removal_costs(small, params, batch, head=head, policy=DOUBLE)
        graph = trace_graph(small)(params, x[:1])
        G, _ = dense(small, params, x, labels, loss, costs.groups, graph)
    np.testing.assert_allclose(costs.gram(), G, rtol=1e-9, atol=1e-10 * np.abs(G).max())


def test_the_head_without_a_loss_has_no_first_order(two_layers):
    params, x, labels, _ = two_layers
    with enable_x64():
        for head, batch in ((centred_logits, (x, labels)), (softmax_cross_entropy, x)):
            costs = removal_costs(small, params, batch, head=head, policy=DOUBLE)
            assert costs.first_order is None and costs.first_order_squares is None
            with pytest.raises(ValueError, match=r"the first order is unknown: it needs a batch \(x, labels\)"):
                costs.of([0], first_order=True)


@pytest.mark.slow
def test_a_price_is_the_true_change_where_the_network_is_linear_in_a_gate(two_layers):
    """Squared error of a network whose last layer reads the groups: nothing is left out of the expansion."""
    params, x, _, _ = two_layers
    with enable_x64():
        target = small(params, x) + jnp.linspace(-1, 1, x.shape[0] * 3).reshape(-1, 3)
        costs = removal_costs(small, params, (x, target), head=squared_error, policy=DOUBLE)
        graph = trace_graph(small)(params, x[:1])

        def loss(variables):
            return float(jnp.sum((small(variables, x) - target) ** 2, axis=1).mean())

        for gone in ([2], [0, 4], [0, 1, 2, 3]):
            plan = PruningPlan.from_keep(graph, {"w": np.setdiff1d(np.arange(5), gone)})
            change = loss(mask_variables(params, plan)) - loss(params)
            np.testing.assert_allclose(costs.of(gone, first_order=True), change, rtol=1e-10)


@pytest.mark.slow
def test_smooth_networks_have_the_gauss_newton_matrix(two_layers):
    params, x, labels, _ = two_layers
    with enable_x64():
        costs = removal_costs(smooth, params, (x, labels), policy=DOUBLE)
        graph = trace_graph(smooth)(params, x[:1])
        G, _ = dense(smooth, params, x, labels, cross_entropy, costs.groups, graph)
    np.testing.assert_allclose(costs.gram(), G, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_every_chunking_and_both_forms_of_the_result_agree(two_layers):
    params, x, labels, _ = two_layers
    with enable_x64():
        whole = removal_costs(small, params, (x, labels), policy=DOUBLE)
        assert whole.signs is None  # 14 rows for 5 groups
        for microbatch in (1, 3, 7):
            part = removal_costs(small, params, (x, labels), policy=DOUBLE, microbatch=microbatch)
            np.testing.assert_allclose(part.gram(), whole.gram(), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(part.second_order_sem, whole.second_order_sem, rtol=1e-10)
        two = removal_costs(small, params, (x[:2], labels[:2]), policy=DOUBLE)
        assert two.signs is not None and two.rows.shape == (4, 5)
        tripled = jax.tree.map(lambda leaf: jnp.tile(leaf[:2], (3, *[1] * (leaf.ndim - 1))), (x, labels))
        same = removal_costs(small, params, tripled, policy=DOUBLE)
        assert same.signs is None
        np.testing.assert_allclose(two.gram(), same.gram(), rtol=1e-12, atol=1e-14)
        for costs in (two, same):
            np.testing.assert_allclose(costs.of([1, 3]), 0.5 * same.gram()[np.ix_([1, 3], [1, 3])].sum(), rtol=1e-12)
            np.testing.assert_allclose(costs.interactions(2), same.gram()[2], rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_more_columns_than_one_pass_takes():
    rng = np.random.default_rng(5)
    with enable_x64():
        params = {"w": jnp.asarray(rng.normal(size=(3, 4))), "out": jnp.asarray(rng.normal(size=(4, 40)))}
        x, labels = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.integers(0, 40, 6), jnp.int32)
        model = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"]  # noqa: E731
        costs = removal_costs(model, params, (x, labels), policy=DOUBLE, microbatch=4)
        graph = trace_graph(model)(params, x[:1])
        G, a = dense(model, params, x, labels, cross_entropy, costs.groups, graph)
    np.testing.assert_allclose(costs.gram(), G, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(costs.first_order, a.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_random_combinations_are_unbiased(two_layers):
    """The mean over 4,000 combinations of each of 7 examples, against the standard error that the costs report."""
    params, x, labels, _ = two_layers
    draws = 4000
    with enable_x64():
        exact = removal_costs(small, params, (x, labels), policy=DOUBLE)
        one = removal_costs(small, params, (x, labels), classes=draws, key=jax.random.key(3), policy=DOUBLE)
    assert one.combinations == draws
    np.testing.assert_allclose(one.first_order, exact.first_order, rtol=1e-10)
    # One product (e · r)(e' · r) of ±1 combinations has a variance below 2 |e|² |e'|²; means over draws and examples.
    rows = np.stack([exact.second_order[:, None] * exact.second_order[None]])[0]
    bound = 5 * np.sqrt(2 * rows / draws)
    assert (np.abs(one.gram() - exact.gram()) <= bound).all()
    assert (np.abs(one.gram() - exact.gram()) > 0).any()


@pytest.mark.slow
def test_weights_of_examples(two_layers):
    """A weight of 2 is an example twice, a weight of 0 one that is not there."""
    params, x, labels, _ = two_layers
    which = np.array([0, 0, 1, 3])
    weights = jnp.array([2.0, 1.0, 0.0, 1.0])
    with enable_x64():
        batch = (x[:4], labels[:4].at[2].set(-1), weights.astype(x.dtype))
        found = removal_costs(small, params, batch, head=weighted(softmax_cross_entropy), policy=DOUBLE)
        twice = removal_costs(small, params, (x[which], labels[which]), policy=DOUBLE)
    np.testing.assert_allclose(found.gram(), twice.gram(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.first_order, twice.first_order, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.first_order_squares, twice.first_order_squares, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_dead_groups_cost_nothing():
    params = {"w": jnp.array([[1.0, -1.0]]), "out": jnp.ones((2, 2))}
    costs = removal_costs(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"], params, jnp.array([[1.0], [2.0]]),
                          head=squared_error)  # fmt: skip
    assert costs.prices[1] == 0.0 and costs.prices[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_precisions(two_layers, compute):
    """Errors as large as a few roundings of 24, 8 and 11 bits."""
    params, x, labels, _ = two_layers
    with enable_x64():
        exact = removal_costs(small, params, (x, labels), policy=DOUBLE)
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, x))
    found = removal_costs(small, params, (x, labels), policy=Policy(compute))
    error = np.abs(found.gram() - exact.gram()).max() / np.abs(exact.gram()).max()
    assert error < {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.01}[compute]
    assert (compute == "float32") == ("compute" not in found.provenance)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_prices_of_large_images_in_16_bits(compute):
    """A gate's derivative is a sum over all positions: it stays in float32."""
    rng = np.random.default_rng(4)
    params = {
        "w1": jnp.asarray(rng.normal(size=(3, 3, 2, 4)) / 4, jnp.float32),
        "w2": jnp.asarray(rng.normal(size=(3, 3, 4, 4)) / 6, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    }

    def model(p, x):
        return jax.nn.relu(conv(jax.nn.relu(conv(x, p["w1"])), p["w2"])).mean((1, 2)) @ p["out"]

    x = jnp.asarray(rng.normal(size=(2, 32, 32, 2)), jnp.float32)
    exact = removal_costs(model, params, x, head=centred_logits).prices
    found = removal_costs(model, params, x, head=centred_logits, policy=Policy(compute)).prices
    np.testing.assert_allclose(found, exact, rtol=0.1)


@pytest.mark.slow
def test_several_batches_are_weighted_each_by_itself(two_layers):
    params, x, labels, _ = two_layers
    with enable_x64():
        weights = jnp.array([1.0, 1.0, 1.0, 9.0, 9.0, 9.0], x.dtype)
        batch = (x[:6], labels[:6], weights)
        parts = Batches(jax.tree.map(lambda leaf, s=s: leaf[s : s + 3], batch) for s in (0, 3))
        found = removal_costs(small, params, parts, head=weighted(softmax_cross_entropy), policy=DOUBLE)
        plain = removal_costs(small, params, (x[:6], labels[:6]), policy=DOUBLE)
    np.testing.assert_allclose(found.gram(), plain.gram(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.first_order, plain.first_order, rtol=1e-10, atol=1e-14)
    assert found.provenance["head"] == "weighted softmax_cross_entropy"


def test_float16_lowers_its_scale_where_it_overflows(two_layers):
    params, x, *_ = two_layers
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, x))
    large = {**params, "out": params["out"] * 500}
    exact = removal_costs(small, large, x, head=squared_error)
    found = removal_costs(small, large, x, head=squared_error, policy=Policy("float16", loss_scale=2.0**15))
    np.testing.assert_allclose(found.second_order, exact.second_order, rtol=0.02)


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_file(two_layers, tmp_path):
    params, x, labels, _ = two_layers
    path = tmp_path / "costs.npz"
    with enable_x64():
        for count in (7, 2):  # the Gram matrix, and rows
            batch = (x[:count], labels[:count])
            whole = removal_costs(small, params, batch, policy=DOUBLE, microbatch=1)

            def stop(done, _):
                if done == 1:
                    raise KeyboardInterrupt

            arguments = {"policy": DOUBLE, "microbatch": 1, "save_to": path, "save_every": 0.0}
            with pytest.raises(KeyboardInterrupt):
                removal_costs(small, params, batch, **arguments, progress=stop)
            seen = []
            again = removal_costs(
                small, params, batch, **arguments, progress=lambda done, _, seen=seen: seen.append(done)
            )
            assert seen == list(range(2, count + 1))
            np.testing.assert_array_equal(again.gram(), whole.gram())
            np.testing.assert_array_equal(again.second_order_sem, whole.second_order_sem)
            with pytest.raises(ValueError, match=r"probes"):
                removal_costs(small, params, batch, coupling="union", policy=DOUBLE, save_to=path)
            path.unlink()


@pytest.mark.slow
def test_one_compilation_per_shape(two_layers):
    params, x, labels, _ = two_layers
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, x))
    removal_costs(small, params, (x, labels), microbatch=2)
    compiled = sys.modules[removal_costs.__module__]._chunk._cache_size()
    removal_costs(small, params, (x + 1, labels), microbatch=2)
    assert sys.modules[removal_costs.__module__]._chunk._cache_size() == compiled


@pytest.mark.slow
def test_bad_input_is_named_before_any_work():
    params = {"w": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
    x, labels = jnp.arange(6.0)[::-1].reshape(2, 3), jnp.array([0, 1], jnp.int32)
    model = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"]  # noqa: E731

    def refused(match, error=ValueError, model=model, params=params, batch=(x, labels), **options):
        with pytest.raises(error, match=match):
            removal_costs(model, params, batch, **options)

    refused("the label of example 1 is -1, but there are 2 classes", batch=(x, jnp.array([0, -1], jnp.int32)))
    refused("the label of example 1 is 2, but there are 2 classes", batch=(x, jnp.array([0, 2], jnp.int32)))
    refused("targets must have the shape of the logits", head=squared_error, batch=(x, jnp.ones((2, 5))))
    refused("no channel group of this network can be removed", model=lambda p, x: x @ p["w"])
    refused("the examples are not independent", model=lambda p, x: model(p, x - x.mean(0, keepdims=True)))
    refused("memory_budget=100: 1 example needs about", memory_budget=100)
    refused("the costs of 4 groups and their interactions take", memory_budget=1)
    refused("random combinations need a key", classes=2)
    refused('coupling must be "group" or "union"', coupling="both")
    refused("params leaf 'w'", params={**params, "w": params["w"].at[0, 0].set(jnp.nan)})
    refused("must return one floating-point array", error=TypeError, model=lambda p, x: {"y": model(p, x)})
    negative = (x, labels, jnp.array([1.0, -0.5]))
    refused("the weight of example 1 is negative", head=weighted(softmax_cross_entropy), batch=negative)
    refused("the softmax of one logit has no curvature", model=lambda p, x: model(p, x)[:, :1], batch=x)
    with pytest.raises(ValueError, match="removed takes the positions of groups"):
        removal_costs(model, params, x).of([True, False, False, False])
    with pytest.raises(ValueError, match="temperature must be positive"):
        softened_softmax(0.0)
