"""masked == shrunk: values, gradients, a training step, derivative rules, transforms, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.models import ResNet, eval_apply, train_apply
from ehap_jax.pruning import PruningPlan, mask_variables, shrink, shrink_variables
from tests.pruning.invariant import assert_all_plans, assert_invariant, close, jit, normal, random_plan, randomise
from tests.pruning.networks import apply, conv, images, variables

STREAM = [0, 2, 5]
KEEP = {"stem": STREAM, "a1": [1, 4], "a2": STREAM}


@pytest.fixture(scope="module")
def plan():
    return PruningPlan.from_keep(trace_graph(apply)(variables(), images()), KEEP)


@pytest.mark.slow
def test_small_network_over_random_plans():
    assert_all_plans(apply, variables(), images())


# ----------------------------------------------------------------------------------------------- residual networks


@pytest.fixture(scope="module", params=["A", "B"])
def resnet(request):
    model = ResNet(depth=8, num_classes=3, shortcut=request.param, widths=(4, 6, 8))
    x = normal(4, 8, 8, 2)
    v = randomise(jax.eval_shape(model.init, jax.random.key(1), x))
    labels = jnp.arange(4) % 3
    return model, v, x, labels, jit(training_step(train_apply(model)))


def training_step(apply):
    """One step of SGD: (variables, x, labels) -> (next variables, gradient of the parameters, logits)."""

    def step(v, x, labels):
        def loss(params):
            logits, state = apply({**v, "params": params}, x)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), (state, logits)

        grads, (state, logits) = jax.grad(loss, has_aux=True)(v["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, v["params"], grads)
        return {"params": params, **state}, grads, logits

    return step


@pytest.mark.slow
def test_resnet_in_eval_mode(resnet):
    model, v, x, *_ = resnet
    assert_all_plans(eval_apply(model), v, x, seeds=(0,), couplings=("union" if model.shortcut == "A" else "group",))


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["group", "union"])
def test_resnet_through_a_training_step(resnet, coupling):
    """The kept part of a step of the masked network == the same step at the small size, statistics included."""
    model, v, x, labels, full_step = resnet
    graph = trace_graph(eval_apply(model))(v, x)
    plan = random_plan(graph, 7, coupling)
    assert plan.keep
    masked, grads, logits = full_step(mask_variables(v, plan), x, labels)
    small_step = training_step(shrink(train_apply(model), plan))

    @jit
    def step_and_cut(v, x, labels, masked, grads):
        cut = partial(shrink_variables, plan=plan)
        return small_step(cut(v), x, labels), (cut(masked), cut({**v, "params": grads})["params"])

    (small, small_grads, small_logits), (wanted, wanted_grads) = step_and_cut(v, x, labels, masked, grads)
    close(small_logits, logits)
    close(small, wanted)
    close(small_grads, wanted_grads)


def test_plans_of_the_training_graph_are_those_of_the_evaluation_graph(resnet):
    model, v, x, *_ = resnet
    from ehap_jax.graph import channel_groups

    for coupling in ("group", "union"):
        sets = [
            {frozenset(g.slices.items()) for g in channel_groups(trace_graph(f(model))(v, x), coupling=coupling)}
            for f in (eval_apply, train_apply)
        ]
        assert sets[0] == sets[1]


# ------------------------------------------------------------------------------------- the predecessors' permutation


@pytest.mark.slow
def test_union_streams_are_consumed_in_sorted_order():
    """The union of what two writers keep, built from an unsorted set, used to permute channels at some widths.

    Writer a keeps {64, 3, 17, 33, 1}, writer b {2, 40, 8, 65}; a Python set of these iterates in another order than
    sorted. The head has a different weight per channel, so any permutation shows.
    """
    width, a_keep, b_keep = 66, [64, 3, 17, 33, 1], [2, 40, 8, 65]
    assert list(set(a_keep) | set(b_keep)) != sorted({*a_keep, *b_keep}), "this width would not show the error"
    v = {
        "a": normal(3, width, seed=0),
        "b": normal(3, width, seed=1),
        "head": normal(width, 2, seed=2),
    }

    def network(v, x):
        return jax.nn.relu(x @ v["a"] + x @ v["b"]) @ v["head"]

    x = normal(4, 3, seed=3)
    plan = PruningPlan.from_keep(trace_graph(network)(v, x), {"a": a_keep, "b": b_keep}, coupling="union")
    assert plan.slices["head"][0].tolist() == sorted(a_keep + b_keep)
    small = shrink_variables(v, plan)
    stream = np.zeros((4, width), np.float32)
    stream[:, sorted(a_keep)] += np.asarray(x @ small["a"])
    stream[:, sorted(b_keep)] += np.asarray(x @ small["b"])
    np.testing.assert_allclose(
        shrink(network, plan)(small, x), np.maximum(stream, 0) @ np.asarray(v["head"]), rtol=1e-4, atol=1e-5
    )
    assert_invariant(network, v, x, plan=plan)


# ------------------------------------------------------------------------------------------------- derivative rules


def pruned_unit(function):
    """(small network, its shrunk variables, the same network written by hand) around ``function``."""

    def network(w, x):
        return function(x @ w["in"]) @ w["out"]

    w = {"in": jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 1.0]]), "out": jnp.array([[1.0], [2.0], [3.0]])}
    x = jnp.array([[1.0, -2.0], [0.3, 0.7]])  # the first row makes channel 0 exactly 0
    plan = PruningPlan.from_keep(trace_graph(network)(w, x), {"in": [0, 2]})
    return shrink(network, plan), shrink_variables(w, plan), network, x


@jax.custom_jvp
def odd_jvp(x):
    return jnp.tanh(x)


@odd_jvp.defjvp
def _odd_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return odd_jvp(x), jnp.where(x == 0, 7.0, 1.0 + x**2) * t


@jax.custom_vjp
def odd_vjp(x):
    return jnp.tanh(x)


odd_vjp.defvjp(lambda x: (jnp.tanh(x), x), lambda x, ct: (jnp.where(x == 0, 5.0, jnp.sin(x)) * ct,))

RULED = {
    "relu": jax.nn.relu,
    "jit-relu": jax.jit(jax.nn.relu),
    "custom_jvp": odd_jvp,
    "custom_vjp": odd_vjp,
    "checkpoint": jax.checkpoint(lambda h: jax.nn.relu(jnp.sin(h))),
    "checkpoint-policy": jax.checkpoint(odd_jvp, policy=jax.checkpoint_policies.dots_saveable),
    "nested": jax.checkpoint(lambda h: odd_vjp(odd_jvp(h))),
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
}


@pytest.mark.parametrize("name", RULED)
def test_derivative_rules_survive_at_exactly_zero(name):
    """Value, gradient and (where the rule allows forward mode) Hessian-vector product equal the network's own."""
    small, w, network, x = pruned_unit(RULED[name])
    assert (x @ w["in"])[0, 0] == 0, "the test needs a pre-activation of exactly zero"

    def loss(f):
        return lambda w: jnp.sum(jnp.sin(f(w, x)))

    pairs = [jit(lambda w, f=f: (f(w, x), jax.grad(loss(f))(w)))(w) for f in (small, network)]
    close(*pairs, 1e-6)
    if name not in ("custom_vjp", "nested"):
        v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), w)
        hvps = [jit(lambda w, f=f: jax.jvp(jax.grad(loss(f)), (w,), (v,))[1])(w) for f in (small, network)]
        close(*hvps, 1e-5)
    else:
        v = jax.tree.map(jnp.ones_like, w)

        def slope(f):
            return lambda w: sum(jnp.vdot(g, v[path]) for path, g in jax.grad(loss(f))(w).items())

        close(jit(jax.grad(slope(small)))(w), jit(jax.grad(slope(network)))(w), 1e-6)


@pytest.mark.slow
def test_relu_has_derivative_zero_at_zero():
    """The plain maximum has derivative 1/2 there: a rule that was lost would show."""
    small, w, *_ = pruned_unit(jax.nn.relu)
    x = jnp.zeros((1, 2))
    assert not np.any(jax.grad(lambda x: small(w, x).sum())(x))
    assert np.any(jax.grad(lambda x: pruned_unit(lambda h: jnp.maximum(h, 0))[0](w, x).sum())(x))


@pytest.mark.slow
def test_derivative_rule_with_integer_and_several_arguments():
    @jax.custom_jvp
    def scaled(h, steps, bias):
        return h * steps + bias

    scaled.defjvp(lambda primals, tangents: (scaled(*primals), 3.0 * tangents[0] * primals[1] + 2.0 * tangents[2]))

    @jax.custom_vjp
    def chosen(h, index):
        return h * index

    chosen.defvjp(lambda h, i: (h * i, (h, i)), lambda saved, ct: (ct * 4.0 * saved[1], None))

    def network(w, x):
        h = scaled(x @ w["in"], jnp.asarray(2), jnp.broadcast_to(w["b"], (2, 3)))
        return chosen(jax.nn.relu(h), jnp.asarray(3, jnp.int32)) @ w["out"]

    with jax.numpy_dtype_promotion("standard"):
        w = {"in": jnp.ones((2, 3)), "b": jnp.arange(3.0), "out": jnp.ones((3, 1))}
        x = jnp.array([[1.0, -2.0], [0.3, 0.7]])
        plan = PruningPlan.from_keep(trace_graph(network)(w, x), {"in": [0, 2]})
        assert plan.slices["b"][0].tolist() == [0, 2]
        assert_invariant(network, w, x, plan=plan)


def test_a_derivative_rule_that_mixes_channels_is_refused_when_it_is_asked_for():
    @jax.custom_vjp
    def mixed(h):
        return h

    mixed.defvjp(lambda h: (h, None), lambda _, ct: (jnp.cumsum(ct, axis=-1),))
    small, w, network, x = pruned_unit(mixed)
    close(small(w, x), network(w, x))
    with pytest.raises(ValueError, match=r"derivative rule of .*custom_vjp_call at .*test_shrink\.py"):
        jax.grad(lambda w: small(w, x).sum())(w)


# ------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.slow
def test_transforms_compose(plan):
    v, x = shrink_variables(variables(), plan), images(count=4)
    small = shrink(apply, plan)

    @jit
    def everything(v, x):
        double = jax.tree.map(lambda leaf: 2 * leaf, v)
        stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), v, double)
        per_example = jax.vmap(jax.grad(lambda v, x: small(v, x[None]).sum()), (None, 0))(v, x)
        return {
            "plain": (jnp.stack([small(v, x), small(double, x)]), jax.grad(lambda v: small(v, x).sum())(v)),
            "vmap": (
                jax.vmap(jax.jit(small), (0, None))(stacked, x),
                jax.tree.map(lambda g: g.sum(0), per_example),
            ),
            "vmap over images": jax.vmap(lambda x: small(v, x[None])[0])(x),
        }

    found = everything(v, x)
    close(found["vmap"], found["plain"])
    close(found["vmap over images"], found["plain"][0][0])
    close(small(v, x), found["plain"][0][0])


def test_functions_that_close_over_tracers(plan):
    """Inside jit and vmap a network may close over traced values: a scale, a channel vector."""

    def scaled(scale, channel):
        return lambda v, x: apply({**v, "bias": v["bias"] * channel}, x * scale)

    v, x, channel = variables(), images(), jnp.arange(6.0)

    def run(scale, channel):
        return shrink(scaled(scale, channel), plan)(shrink_variables(v, plan), x)

    masked = mask_variables(v, plan)
    expected = [jit(scaled(s, channel))(masked, x) for s in (1.0, 3.0)]
    close(jit(run)(jnp.float32(3.0), channel), expected[1])
    close(jit(jax.vmap(run, (0, None)))(jnp.array([1.0, 3.0]), channel), jnp.stack(expected))


@pytest.mark.parametrize("kind", ["group", "union", "implants"])
def test_shrunk_networks_shrink_again(plan, kind):
    """shrink returns a pure function, so it can be traced, grouped and shrunk like any other, its gathers included."""
    full, x, again = trace_graph(apply)(variables(), images()), images(), {"stem": [0, 2], "a2": [0, 2], "a1": [1]}
    if kind == "union":  # stem and a2 keep channels 0 and 5 both, so their stream keeps [0, 1, 2, 5]
        plan = PruningPlan.from_keep(full, {**KEEP, "a2": [0, 1, 5]}, coupling="union")
    elif kind == "implants":
        plan = PruningPlan.from_keep(full, {**KEEP, "a1": [1, 3, 4]}, implants={"a1": [3]})
        again = {"stem": [0, 2], "a2": [0, 2], "a1/spatial": [1]}
    small, v = shrink(apply, plan), shrink_variables(variables(), plan)
    assert_invariant(small, v, x, plan=PruningPlan.from_keep(trace_graph(small)(v, x), again))


def test_nothing_pruned_is_the_same_function():
    empty = PruningPlan.from_keep(trace_graph(apply)(variables(), images()), {})
    np.testing.assert_array_equal(shrink(apply, empty)(variables(), images()), apply(variables(), images()))


@pytest.mark.slow
def test_other_dtypes_and_batch_sizes_than_the_plan_was_made_with(plan):
    v = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), shrink_variables(variables(), plan))
    y = shrink(apply, plan)(v, images(count=5).astype(jnp.float16))
    assert y.shape == (5, 3) and y.dtype == jnp.float16


# ----------------------------------------------------------------------------------------------------------- errors


def test_full_size_variables_are_refused(plan):
    with pytest.raises(ValueError, match=r"a1 has shape \(3, 3, 6, 5\).*shrunk network.*\(3, 3, 3, 2\)"):
        shrink(apply, plan)(variables(), images())


def test_a_plan_of_another_coupling_is_refused():
    graph = trace_graph(apply)(variables(), images())
    union = PruningPlan.from_keep(graph, {"stem": [0, 1]}, coupling="union")
    forged = PruningPlan(union.keep, union.slices, union.shapes, union.axes, "group")
    with pytest.raises(ValueError, match="live and die together"):
        shrink(apply, forged)(shrink_variables(variables(), union), images())


def test_a_plan_that_cuts_what_this_function_does_not_tie_is_refused(plan):
    """Without the residual sum the head is not tied to the stem, so the plan's slices are another network's."""

    def other(v, x):
        h = jax.nn.relu(conv(jax.nn.relu(conv(jax.nn.relu(conv(x, v["stem"])), v["a1"])), v["a2"]))
        return h.mean((1, 2)) @ v["head"] + v["bias"].sum()

    with pytest.raises(ValueError, match=r"plan.*bias.*this function"):
        shrink(other, plan)(shrink_variables(variables(), plan), images())


def test_a_plan_of_another_function_over_the_same_variables_is_refused(plan):
    """Same shapes, other wiring: the stream is read whole here."""

    def other(v, x):
        return jax.nn.softmax(apply(v, x)) + jax.nn.softmax(v["bias"]).sum()

    with pytest.raises(ValueError, match=r"cannot be pruned|live and die together|does not fit"):
        shrink(other, plan)(shrink_variables(variables(), plan), images())


def test_operations_keep_the_users_source_line(plan):
    """After shrinking twice too: errors about a shrunk function name the line of the network."""
    v, x = variables(), images()
    lines = {node.source for node in trace_graph(apply)(v, x).body.walk()}
    small, small_v = shrink(apply, plan), shrink_variables(v, plan)
    graph = trace_graph(small)(small_v, x)
    assert {node.source for node in graph.body.walk()} <= lines
    fewer = PruningPlan.from_keep(graph, {"a1": [0]})
    again = trace_graph(shrink(small, fewer))(shrink_variables(small_v, fewer), x)
    assert {node.source for node in again.body.walk()} <= lines
