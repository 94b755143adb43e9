"""Neural implants: 1×1 kernels for moderately sensitive channels; masked == shrunk, cost, plans, allocation."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import count_cost, explain, trace_graph
from ehap_jax.models import ResNet, eval_apply, train_apply
from ehap_jax.pruning import (
    PruningPlan,
    Scores,
    allocate,
    expand_variables,
    mask_variables,
    random_scores,
    shrink,
    shrink_variables,
    zero_implants,
)
from ehap_jax.quant import fake_quant, quantize_weights
from ehap_jax.training.variables_file import load_variables, save_variables
from tests.pruning.invariant import assert_invariant, close, jit, normal, probed, randomise
from tests.pruning.networks import apply, conv, images, variables

STREAM = [0, 2, 5]
KEEP = {"stem": STREAM, "a1": [1, 3, 4], "a2": STREAM}
IMPLANTS = {"stem": [2], "a1": [1, 4]}


@pytest.fixture(scope="module")
def graph():
    return trace_graph(apply)(variables(), images())


@pytest.fixture(scope="module")
def plan(graph):
    return PruningPlan.from_keep(graph, KEEP, implants=IMPLANTS)


@pytest.mark.slow
def test_the_mask_keeps_the_centre_tap_and_shrinking_a_1x1_kernel(plan):
    v = variables()
    kernel = mask_variables(v, plan)["a1"]
    wanted = np.zeros((3, 3, 6, 5), np.float32)
    for c in (1, 4):
        wanted[1, 1][STREAM, c] = v["a1"][1, 1][np.array(STREAM), c]
    wanted[:, :, STREAM, 3] = v["a1"][:, :, np.array(STREAM), 3]
    np.testing.assert_array_equal(kernel, wanted)
    small = shrink_variables(v, plan)["a1"]
    np.testing.assert_array_equal(small["spatial"], v["a1"][:, :, np.array(STREAM)][..., [3]])
    np.testing.assert_array_equal(small["pointwise"], v["a1"][1:2, 1:2, np.array(STREAM)][..., np.array([1, 4])])
    assert {p: plan.shrunk_shapes()[f"a1/{p}"] for p in small} == {p: leaf.shape for p, leaf in small.items()}


def test_the_shrunk_function_convolves_the_implants_1x1(plan):
    small = shrink_variables(variables(), plan)
    equations = jax.make_jaxpr(shrink(apply, plan))(small, images()).eqns
    kernels = [e.invars[1].aval.shape for e in equations if e.primitive.name == "conv_general_dilated"]
    assert kernels == [(3, 3, 3, 2), (1, 1, 3, 1), (3, 3, 3, 1), (1, 1, 3, 2), (3, 3, 3, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["group", "union"])
def test_masked_is_shrunk(graph, coupling):
    keep = KEEP if coupling == "group" else {**KEEP, "a2": [1, 2, 3, 4]}
    implants = IMPLANTS if coupling == "group" else {**IMPLANTS, "a2": [1, 2, 3, 4]}
    plan = PruningPlan.from_keep(graph, keep, coupling=coupling, implants=implants)
    if coupling == "union":
        assert plan.shrunk_shapes()["a2/pointwise"] == (1, 1, 3, 4) and "a2/spatial" not in plan.shrunk_shapes()
    assert_invariant(apply, variables(), images(), plan=plan)


# Kernel size, strides, dilation of the kernel, dilation of the input (transposed), padding, feature groups.
GEOMETRIES = {
    "stride 2, SAME": ((3, 3), (2, 2), (1, 1), (1, 1), "SAME"),
    "stride 2, padding of PyTorch": ((3, 3), (2, 2), (1, 1), (1, 1), ((1, 1), (1, 1))),
    "stride 3, unequal": ((5, 3), (3, 2), (1, 1), (1, 1), "SAME"),
    "dilation": ((3, 5), (1, 2), (2, 1), (1, 1), "SAME"),
    "VALID": ((3, 3), (1, 1), (1, 1), (1, 1), "VALID"),
    "VALID, dilation, stride": ((3, 1), (2, 1), (2, 1), (1, 1), "VALID"),
    "transposed": ((3, 3), (1, 1), (1, 1), (2, 2), ((1, 2), (2, 1))),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_geometry(name):
    size, strides, dilation, input_dilation, padding = GEOMETRIES[name]
    v = {"w": normal(*size, 3, 6, seed=1), "head": normal(6, 2, seed=2)}

    def network(v, x):
        h = jax.lax.conv_general_dilated(
            x, v["w"], strides, padding, input_dilation, dilation, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.sigmoid(h).mean((1, 2)) @ v["head"]

    x = normal(2, 8, 7, 3, seed=3)
    keep, implants = {"w": [0, 1, 3, 5]}, {"w": [1, 5]}
    plan = PruningPlan.from_keep(trace_graph(network)(v, x), keep, implants=implants)
    assert plan.implants["w"].centre == {0: size[0] // 2, 1: size[1] // 2}
    assert_invariant(network, v, x, plan=plan)


@pytest.mark.slow
def test_other_layouts_casts_and_rematerialisation():
    """NCHW, a kernel that is cast to half precision first, inside a checkpoint."""
    v = {"w": normal(5, 3, 3, 3, seed=1), "head": normal(5, 2, seed=2)}

    @jax.checkpoint
    def block(w, x):
        return jax.lax.conv(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), (1, 1), "SAME").astype(jnp.float32)

    def network(v, x):
        return jax.nn.relu(block(v["w"], x)).mean((2, 3)) @ v["head"]

    x = normal(2, 3, 5, 5, seed=3)
    plan = PruningPlan.from_keep(trace_graph(network)(v, x), {"w": [0, 2, 3]}, implants={"w": [2]})
    masked, small = mask_variables(v, plan), shrink_variables(v, plan)
    # bfloat16 products of 27 terms are summed in another order: 2**-8 of the largest.
    want, got = jit(network)(masked, x), jit(shrink(network, plan))(small, x)
    np.testing.assert_allclose(got, want, atol=2**-8 * float(jnp.abs(want).max()))
    assert jax.tree.map(jnp.shape, jax.grad(lambda w: shrink(network, plan)(w, x).sum())(small)) == jax.tree.map(
        jnp.shape, small
    )


# ------------------------------------------------------------------------------------------------ whole networks


class Resnet(NamedTuple):
    apply: Callable
    train_apply: Callable
    variables: Any
    x: jax.Array
    plan: PruningPlan
    small: Any
    logits: jax.Array


@pytest.fixture(scope="module", params=[("A", "union")], ids="-".join)
def resnet(request):
    shortcut, coupling = request.param
    model = ResNet(depth=8, num_classes=3, shortcut=shortcut, widths=(4, 6, 8))
    x = normal(4, 8, 8, 2)
    v = randomise(jax.eval_shape(model.init, jax.random.key(1), x))
    graph = trace_graph(eval_apply(model))(v, x)
    plan = allocate(graph, random_scores(graph, key=jax.random.key(2)), params=0.6, implants=0.5, coupling=coupling)
    assert plan.implants
    small = jit(partial(shrink_variables, plan=plan))(v)
    assert count_cost(trace_graph(shrink(eval_apply(model), plan))(small, x)) == count_cost(graph, plan)
    return Resnet(
        eval_apply(model), train_apply(model), v, x, plan, small, jit(shrink(eval_apply(model), plan))(small, x)
    )


@pytest.mark.slow
def test_resnet_in_both_modes(resnet):
    """Logits; and of a training step the new running statistics and the gradient."""
    close(resnet.logits, jit(lambda v, x: resnet.apply(mask_variables(v, resnet.plan), x))(resnet.variables, resnet.x))
    assert_invariant(resnet.train_apply, resnet.variables, resnet.x, plan=resnet.plan)


def test_zero_and_centre_initialisation(graph):
    """HAP's start: the implants' convolution contributes nothing, and training moves it."""
    v, x = variables(), images()
    plan = PruningPlan.from_keep(graph, KEEP, implants={**IMPLANTS, "a2": [0, 5]})
    zero, centre = shrink_variables(zero_implants(v, plan), plan), shrink_variables(v, plan)
    assert not np.any(zero["a1"]["pointwise"]) and np.all(centre["a1"]["pointwise"])
    np.testing.assert_array_equal(zero["a1"]["spatial"], centre["a1"]["spatial"])
    (_, y), gradient = jit(probed(shrink(apply, plan)))(zero, x)
    close(y, jit(apply)(mask_variables(zero_implants(v, plan), plan), x))
    assert np.all(np.any(gradient["a2"]["pointwise"], axis=(0, 1, 2))), "it is read through a bias and a sum"


@pytest.mark.slow
def test_expanded_and_without_implants(resnet):
    """Back at full size a network with implants is the masked one, and shrinks again in one piece."""
    whole = replace(resnet.plan, implants={})

    @jit
    def both_ways(v, small, x):
        full = expand_variables(small, resnet.plan)
        return full, mask_variables(v, resnet.plan), shrink(resnet.apply, whole)(shrink_variables(full, whole), x)

    full, masked, logits = both_ways(resnet.variables, resnet.small, resnet.x)
    jax.tree.map(np.testing.assert_array_equal, full, masked)
    close(logits, resnet.logits)


@pytest.mark.slow
def test_fake_quant_of_a_shrunk_network_with_implants(plan):
    """Both parts of a split kernel are layers of their own; 8 bits are near the float network."""
    small, x = shrink_variables(variables(), plan), images()
    q = fake_quant(shrink(apply, plan))

    @jit
    def observed(v, x):
        y, ranges = q.apply(v, q.init(v, x), x, update=True)
        return y, quantize_weights(shrink(apply, plan), v, ranges, x), shrink(apply, plan)(v, x)

    y, weights, want = observed(small, x)
    assert {"a1/spatial", "a1/pointwise", "stem/spatial", "stem/pointwise", "a2", "head"} == set(weights)
    assert 0 < float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want)) < 0.05


def test_variables_are_saved_by_path(plan, tmp_path):
    small = shrink_variables(variables(), plan)
    again = load_variables(save_variables(tmp_path / "small.npz", small))
    jax.tree.map(np.testing.assert_array_equal, again, small)
    close(shrink(apply, plan)(again, images()), shrink(apply, plan)(small, images()))


def test_dictionaries_of_the_same_names_are_no_implants():
    """A network may call its own kernels "spatial" and "pointwise"."""
    v = {"block": {"spatial": normal(3, 3, 3, 4, seed=0), "pointwise": normal(1, 1, 4, 5, seed=1)}, "out": normal(5, 2)}

    def network(v, x):
        return conv(jax.nn.relu(conv(x, v["block"]["spatial"])), v["block"]["pointwise"]).mean((1, 2)) @ v["out"]

    graph = trace_graph(network)(v, images())
    plan = PruningPlan.from_keep(
        graph, {"block/spatial": [0, 2, 3], "block/pointwise": [1, 2]}, implants={"block/spatial": [2]}
    )
    assert_invariant(network, v, images(), plan=plan)


# ---------------------------------------------------------------------------------------------------------- costs


def test_cost_by_hand(graph, plan):
    """Kernels with implants: 9 weights per channel pair, 1 where the output channel is an implant."""
    stem, a1, a2 = 3 * (9 * 2 + 1), 3 * (9 + 2), 9 * 3 * 3
    cost = count_cost(graph, plan)
    assert cost.params == stem + a1 + a2 + 3 + 3 * 3
    assert cost.macs == images().shape[0] * (16 * (stem + a1 + a2) + 3 * 3)
    assert cost.bytes == 4 * cost.params
    small = shrink_variables(variables(), plan)
    assert cost.params == sum(leaf.size for leaf in jax.tree.leaves(small))
    assert count_cost(trace_graph(shrink(apply, plan))(small, images())) == cost
    table = explain(graph, plan)
    assert "3/5 (2 1x1)" in table
    assert table.splitlines()[-1].split()[1:] == [str(cost.params - 3), str(cost.macs)], "the bias is no kernel's"


# ------------------------------------------------------------------------------------------------------ allocation


def ranked(stem, a1, a2):
    values = {"stem": stem, "a1": a1, "a2": a2, "head": np.ones(3)}
    values = {path: np.asarray(v, float) for path, v in values.items()}
    return Scores(values, {path: np.ones_like(v) for path, v in values.items()}, "test")


def test_channels_are_pruned_implanted_or_kept_as_their_scores_rise(graph):
    scores = ranked(np.full(6, 50.0), [5, 1, 4, 2, 3], np.full(6, 50.0))
    full = count_cost(graph).params
    plan = allocate(graph, scores, params=(full - 2 * 108 - 2 * 48) / full, implants=0.5)
    assert plan.keep["a1"].tolist() == [0, 2, 4] and plan.implants["a1"].channels.tolist() == [2, 4]
    assert plan.provenance["implants"] == 0.5
    assert count_cost(graph, plan).params == plan.provenance["cost"]["params"] <= full - 2 * 108 - 2 * 48


@pytest.mark.parametrize("budget", ["params", "macs", "bytes"])
@pytest.mark.parametrize("coupling", ["group", "union"])
def test_the_budget_counts_implants_and_is_met_within_one_group(graph, budget, coupling):
    scores = random_scores(graph, key=jax.random.key(4))
    kept = lambda plan: getattr(count_cost(graph, plan), budget) / getattr(count_cost(graph), budget)  # noqa: E731
    make = partial(allocate, graph, scores, coupling=coupling, implants=0.4)
    found = kept(make(**{budget: 0.6}))
    assert found <= 0.6
    looser = [kept(make(**{budget: f})) for f in np.linspace(0.6, 1, 25)]
    assert all(k == found or k > 0.6 for k in looser)


@pytest.mark.parametrize("limit, most", [(0.0, 0), (0.2, 1), (0.4, 2), (1.0, 4)])
def test_the_limit_on_implants_is_an_upper_one(graph, limit, most):
    """A higher limit allows more implants, never fewer; the channels beyond it are the least sensitive, and go."""
    scores = ranked(np.full(6, 50.0), [5, 1, 4, 2, 3], np.full(6, 50.0))
    plan = allocate(graph, scores, channels=1 - 4.5 / 17, implants=1.0, max_implant_ratio=limit) if most < 4 else None
    if plan is not None:
        held = plan.implants["a1"].channels.tolist() if most else []
        assert held == sorted([2, 4, 3, 1][:most]) and set(held) <= set(plan.keep["a1"].tolist())
    else:
        held = allocate(graph, scores, params=0.7, implants=1.0, max_implant_ratio=limit).implants["a1"].channels
        assert len(held) == 4, "params=0.7 takes four of five"


def test_rounding_spares_implants_rather_than_whole_channels(graph):
    scores = random_scores(graph, key=jax.random.key(4))
    plan = allocate(graph, scores, params=0.6, implants=0.3, round_to=2)
    assert plan.keep and all(len(kept) % 2 == 0 for kept in plan.keep.values())


def test_rounds_never_grow_an_implant_back(graph):
    before = allocate(graph, random_scores(graph, key=jax.random.key(0)), params=0.8, implants=0.6)
    after = allocate(graph, random_scores(graph, key=jax.random.key(1)), params=0.5, implants=0.6, start=before)
    assert before.implants
    for path, implant in before.implants.items():
        whole = set(after.keep.get(path, range(plan_size(before, path)))) - set(implants_of(after, path))
        assert not whole & set(implant.channels)


def plan_size(plan, path):
    return plan.shapes[path][plan.axes[path]]


def implants_of(plan, path):
    return plan.implants[path].channels if path in plan.implants else []


def test_networks_of_1x1_kernels_cannot_have_implants():
    v = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
    graph = trace_graph(lambda v, x: jax.nn.relu(x @ v["a"]) @ v["b"])(v, jnp.ones((1, 3)))
    scores = random_scores(graph, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"no kernel that may lose channels can hold 1×1 implants.*no convolution"):
        allocate(graph, scores, params=0.5, implants=0.5)
    for name in ("implants", "max_implant_ratio"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got 1.5"):
            allocate(graph, scores, params=0.5, **{name: 1.5})


# ----------------------------------------------------------------------------------------------------- what is refused


def refused(network, v, x=None, **implants):
    graph = trace_graph(network)(v, images() if x is None else x)
    with pytest.raises(ValueError) as error:
        PruningPlan.from_keep(graph, {}, implants=implants)
    return str(error.value)


def test_what_has_no_centre_is_refused():
    head = normal(4, 2)
    square = lambda v, x: conv(x, v["w"]).mean((1, 2)) @ v["head"]  # noqa: E731
    assert "size 4 along axis 0 is even" in refused(square, {"w": normal(4, 3, 3, 4), "head": head}, w=[0])
    assert "1×1 kernel already" in refused(square, {"w": normal(1, 1, 3, 4), "head": head}, w=[0])
    assert "no convolution applies it as it is, dot_general reads it" in refused(
        square, {"w": normal(3, 3, 3, 4), "head": head}, head=[0]
    )
    assert "no variable of this network" in refused(square, {"w": normal(3, 3, 3, 4), "head": head}, other=[0])


def test_kernels_that_something_else_reads_are_refused():
    v = {"w": normal(3, 3, 3, 4), "head": normal(4, 2)}
    standardised = lambda v, x: conv(x, v["w"] - v["w"].mean()).mean((1, 2)) @ v["head"]  # noqa: E731
    assert re.search(r"as it is, \w+ reads it at .*test_implant\.py", refused(standardised, v, w=[0]))
    both = lambda v, x: (conv(x, v["w"]).mean((1, 2)) + v["w"].sum((0, 1, 2))[None]) @ v["head"]  # noqa: E731
    assert re.search(r": reduce_sum reads it at .*test_implant\.py", refused(both, v, w=[0]))
    returned = lambda v, x: (conv(x, v["w"]).mean((1, 2)) @ v["head"], v["w"])  # noqa: E731
    assert "returns it" in refused(returned, v, w=[0])
    grouped = lambda v, x: conv(x, v["d"], groups=3).mean((1, 2)) @ v["head"]  # noqa: E731
    assert "grouped" in refused(grouped, {"d": normal(3, 3, 1, 3), "head": normal(3, 2)}, d=[0])


def test_implants_must_be_kept_channels(graph):
    with pytest.raises(ValueError, match="a1: implants must be among the channels that are kept, but 0 is not"):
        PruningPlan.from_keep(graph, KEEP, implants={"a1": [0, 1]})
    with pytest.raises(ValueError, match="a1: channels to keep must be a list of integers"):
        PruningPlan.from_keep(graph, KEEP, implants={"a1": [0.5]})


def test_variables_without_the_split_are_refused(plan):
    with pytest.raises(KeyError, match=r"shrunk network: missing \['a1/pointwise'.*unexpected \['a1'"):
        shrink(apply, plan)(shrink_variables(variables(), replace(plan, implants={})), images())
