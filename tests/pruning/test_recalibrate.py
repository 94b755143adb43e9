"""Statistics estimated again: plain averages over batches, moved ones, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ehap_jax.graph import trace_graph
from ehap_jax.models import ResNet, eval_apply, train_apply
from ehap_jax.pruning import (
    allocate,
    kept_fractions,
    magnitude_scores,
    mask_variables,
    prune_iteratively,
    random_scores,
    recalibrate,
    shrink,
    shrink_variables,
)
from tests.pruning.invariant import close, normal, randomise

MODEL = ResNet(8, 3, widths=(3, 4, 5), shortcut="B")
train = train_apply(MODEL)
evaluate = jax.jit(eval_apply(MODEL))


@pytest.fixture(scope="module")
def variables():
    return randomise(MODEL.init(jax.random.key(0), normal(1, 6, 6, 3)))


BATCHES = [normal(8, 6, 6, 3, seed=seed) for seed in range(3)]


def own_statistics(variables, batch, momentum=0.9):
    """Of one batch, from the moving average that Flax returns."""
    _, updates = jax.jit(train)(variables, batch)
    return jax.tree.map(
        lambda new, old: (new - momentum * old) / (1 - momentum), updates["batch_stats"], variables["batch_stats"]
    )


@pytest.mark.slow
def test_the_plain_average_over_batches(variables):
    found = recalibrate(train, variables, BATCHES)
    expected = jax.tree.map(lambda *s: sum(s) / 3, *(own_statistics(variables, batch) for batch in BATCHES))
    close(found["batch_stats"], expected, 1e-4)
    close(found["params"], variables["params"], 0)


@pytest.mark.slow
def test_one_batch_makes_evaluation_and_training_agree(variables):
    logits, _ = jax.jit(train)(variables, BATCHES[0])
    close(evaluate(recalibrate(train, variables, BATCHES[:1]), BATCHES[0]), logits, 1e-4)


def test_an_unchanged_network_keeps_what_it_has(variables):
    close(recalibrate(train, variables, BATCHES, relative_to=variables), variables, 1e-5)


@pytest.mark.slow
def test_statistics_move_as_those_of_the_batches_do(variables):
    graph = trace_graph(eval_apply(MODEL))(variables, BATCHES[0])
    masked = mask_variables(variables, allocate(graph, random_scores(graph, key=jax.random.key(1)), channels=0.6))
    moved = recalibrate(train, masked, BATCHES, relative_to=variables)["batch_stats"]
    after, before = (recalibrate(train, v, BATCHES)["batch_stats"] for v in (masked, variables))

    def expected(old, new, base):
        proportional = (old >= 0) & (new >= 0) & (base > new)
        return np.where(proportional, old * new / np.where(proportional, base, 1), old + new - base)

    close(moved, jax.tree.map(expected, variables["batch_stats"], after, before), 1e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        assert "var" not in str(path[-1]) or (np.asarray(leaf) >= 0).all()


@pytest.mark.slow
def test_shrunk_and_masked_networks_agree(variables):
    graph = trace_graph(eval_apply(MODEL))(variables, BATCHES[0])
    plan = allocate(graph, random_scores(graph, key=jax.random.key(1)), channels=0.6)
    masked = recalibrate(train, mask_variables(variables, plan), BATCHES)
    small = recalibrate(shrink(train, plan), shrink_variables(variables, plan), BATCHES)
    close(shrink_variables(masked, plan), small, 1e-4)


@pytest.mark.slow
def test_nnx_and_a_momentum_per_layer():
    class Network(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a, self.b = nnx.BatchNorm(3, momentum=0.5, rngs=rngs), nnx.BatchNorm(3, momentum=0.99, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    graphdef, state = nnx.split(Network())

    def apply(variables, x):
        pure = nnx.split(nnx.merge(graphdef, state))[1]
        nnx.replace_by_pure_dict(pure, variables)
        model = nnx.merge(graphdef, pure)
        model.train()
        y = model(x)
        return y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    x = normal(16, 3) * 2 + 1
    found = recalibrate(apply, nnx.to_pure_dict(state), [x])
    np.testing.assert_allclose(found["a"]["mean"], x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["a"]["var"], x.var(0), rtol=1e-4)
    inner = jax.nn.relu((x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5))
    np.testing.assert_allclose(found["b"]["mean"], inner.mean(0), rtol=1e-3)


@pytest.mark.slow
def test_rounds_of_pruning_recalibrate_before_they_train(variables):
    graph = trace_graph(eval_apply(MODEL))(variables, BATCHES[0])
    seen = []

    def score(v):
        seen.append(v)
        return magnitude_scores(graph, v)

    again = partial(recalibrate, train, batches=BATCHES, relative_to=variables)
    plan, small = prune_iteratively(
        graph, variables, kept_fractions(0.6, 2), score=score, recalibrate=lambda v: again(v), budget="channels"
    )
    close(shrink_variables(again(mask_variables(seen[1], plan)), plan), small, 1e-5)
    first = jax.tree.leaves(seen[1]["batch_stats"])
    assert any(not np.allclose(a, b) for a, b in zip(first, jax.tree.leaves(variables["batch_stats"]), strict=True))


def averaged(momentum, dtype=None):
    """A training function with statistics kept, and averaged, in ``dtype``."""

    def apply(v, x):
        new = {"mean": x.mean(0), "var": x.var(0)}
        return x, {name: (momentum * v[name] + (1 - momentum) * new[name].astype(dtype)).astype(dtype) for name in new}

    return apply


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_statistics_in_16_bits(dtype, momentum):
    """A rounding of (1 - momentum) or of the slope is that much more of what the old value does not explain."""
    batches = [3 * normal(32, 8, seed=seed) + 5 for seed in range(3)]
    start = {"mean": jnp.zeros(8, dtype), "var": jnp.ones(8, dtype)}
    found = recalibrate(averaged(momentum, dtype), start, batches)
    for name, expected in (("mean", np.mean), ("var", np.var)):
        assert found[name].dtype == dtype
        right = np.mean([expected(np.asarray(batch, np.float64), 0) for batch in batches], 0)
        allowed = float(jnp.finfo(dtype).eps) * (1 + 1 / (1 - momentum)) * right
        assert (np.abs(np.asarray(found[name], np.float64) - right) <= allowed).all()


def test_what_16_bits_cannot_hold_is_named():
    start = {"mean": jnp.zeros(8, jnp.float16), "var": jnp.ones(8, jnp.float16)}
    with pytest.raises(ValueError, match=r"momentum 0\.9.* has no digits left in bfloat16; keep .* in float32"):
        recalibrate(averaged(0.99, jnp.bfloat16), jax.tree.map(lambda s: s.astype(jnp.bfloat16), start), [normal(8, 8)])

    def in_float32(v, x):
        return x, {name: 0.9 * v[name].astype(jnp.float32) + 0.1 * x.var(0) for name in v}

    with pytest.raises(ValueError, match=r"statistics (mean|var) reach .*e\+05, beyond float16; keep them in float32"):
        recalibrate(in_float32, start, [400 * normal(8, 8)])


def test_a_function_without_a_hash():
    class Apply:
        __hash__ = None

        def __call__(self, v, x):
            return x, {"mean": 0.5 * v["mean"] + 0.5 * x.mean(0)}

    assert recalibrate(Apply(), {"mean": jnp.zeros(1)}, [jnp.array([[1.0], [3.0]])])["mean"].tolist() == [2.0]


def test_bad_input_is_named(variables):
    with pytest.raises(ValueError, match="there are no batches"):
        recalibrate(train, variables, [])
    with pytest.raises(ValueError, match="returns no new value of any variable"):
        recalibrate(lambda v, x: (x, {}), variables, BATCHES)
    with pytest.raises(ValueError, match="is not a moving average of mean"):
        recalibrate(lambda v, x: (x, {"mean": v["mean"] + x.mean(0)}), {"mean": jnp.zeros(3)}, [normal(4, 3)])
    with pytest.raises(ValueError, match="the statistics mean of these batches are not finite"):
        recalibrate(
            lambda v, x: (x, {"mean": 0.9 * v["mean"] + 0.1 * x.mean(0)}), {"mean": jnp.zeros(3)}, [normal(4, 3) / 0]
        )
    with pytest.raises(ValueError, match="mask the network with mask_variables"):
        recalibrate(train, variables, BATCHES, relative_to={"params": variables["params"]})
