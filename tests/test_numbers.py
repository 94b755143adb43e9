"""Random networks with weights from 1e-8 to 1e6: a value that float64 confirms, or an error that names what is wrong.

Every function is compiled once per precision and sees many values. "Right" is what float64 finds for numbers that
differ from the given ones by no more than a few roundings of the precision, give or take what roundings of the
largest terms come to: `Reference` computes both.
"""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import Policy, channel_trace, gauss_newton_trace, rademacher, removal_costs
from ehap_jax.pruning import recalibrate
from ehap_jax.quant import check_calibrated, fake_quant, to_integer

INPUTS, HIDDEN, CLASSES, EXAMPLES, PROBES = 5, 6, 3, 6, 4
KERNELS = {"a": (INPUTS, HIDDEN), "c": (HIDDEN, CLASSES)}
NAMES = ("a", "b", "c", "d", "x", "rows", "params", "batch", "loss", "sums")
DRAWS = 16
PRECISIONS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float64": 5e-324, "float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}
PERTURBED = 16


def model(p, x):
    return jax.nn.relu(x.astype(p["a"].dtype) @ p["a"] + p["b"][None]) @ p["c"] + p["d"][None]


def loss(p, batch):
    z = model(p, batch["x"])
    z = jax.nn.log_softmax(z if z.dtype == jnp.float64 else z.astype(jnp.float32))
    return -jnp.take_along_axis(z, batch["label"][:, None], 1).mean()


def draw(rng, count=EXAMPLES, integers=False):
    """(parameters, batch) in float64: every layer at a scale of its own, perhaps dead, perhaps constant inputs."""
    scale = lambda: 10.0 ** rng.uniform(*rng.choice([(-8, 6), (-1, 1)]))  # noqa: E731
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    p = {"a": normal(INPUTS, HIDDEN) * scale(), "c": normal(HIDDEN, CLASSES) * scale()}
    p |= {"b": normal(HIDDEN) * np.abs(p["a"]).max() * rng.integers(2), "d": normal(CLASSES) * rng.integers(2)}
    x = rng.integers(-9, 10, (count, INPUTS)) if integers else normal(count, INPUTS) * 10.0 ** rng.uniform(-1, 1)
    match rng.integers(6):
        case 0:
            p["a"], p["b"] = 0 * p["a"], 0 * p["b"]
        case 1:
            p["c"] = 0 * p["c"]
        case 2:
            p["a"][:, :2], p["b"][:2] = 0, 0
        case 3:
            x = np.broadcast_to(x[:1], x.shape)
        case 4:
            x = 0 * x
    return p, {"x": x.astype(np.int32) if integers else x, "label": rng.integers(0, CLASSES, count).astype(np.int32)}


class Reference:
    """What is right in float64, and how far a computation with ``compute``'s roundings may be from it."""

    def __init__(self, params, batch, compute, rng):
        eps, smallest = PRECISIONS[compute], SMALLEST[compute]

        def perturbed(leaf):
            leaf = np.asarray(leaf, np.float64)
            shape = (PERTURBED, *leaf.shape)
            off = 3 * eps * np.abs(leaf) + np.where(leaf == 0, 0, smallest)
            return leaf + np.concatenate([np.zeros((1, *leaf.shape)), off * rng.uniform(-1, 1, shape)])

        many = {name: perturbed(leaf) for name, leaf in params.items()}
        x = perturbed(batch["x"])
        # What underflows on its way out of the hidden layer.
        lost = smallest * rng.uniform(-1, 1, (PERTURBED + 1, len(batch["label"]), HIDDEN))
        lost[0] = 0
        with enable_x64():
            found = jax.device_get(_right(many, x, lost, batch["label"], probes()))
        self.values = {name: value[0] for name, value in found.items()}
        spread = {name: np.abs(value - value[:1]).max(0) for name, value in found.items()}
        largest = _largest_terms(params, np.asarray(batch["x"], np.float64))
        underflow = 8 * 2.0**-126  # of terms of sums in float32
        self.allowed = {name: 3 * spread[name] + 8 * eps * largest[name] + underflow for name in found}

    def confirms(self, name, value):
        value = np.asarray(value, np.float64)
        return bool((np.abs(value - self.values[name]) <= self.allowed[name]).all())


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, 0, None, None))
def _right(params, x, lost, label, probes):
    """Means over probes of ``v_c (H v)_c`` and traces by kernel; costs of the hidden channels."""

    def of(kernels):
        p = params | kernels
        h = jax.nn.relu(x @ p["a"] + p["b"][None]) + lost
        z = jax.nn.log_softmax(h @ p["c"] + p["d"][None])
        return -jnp.take_along_axis(z, label[:, None], 1).mean()

    kernels = {name: params[name] for name in KERNELS}
    H = jax.hessian(of)(kernels)
    found = {}
    for name, (_, channels) in KERNELS.items():
        size = kernels[name].size
        block = H[name][name].reshape(size, size)
        found[f"trace/{name}"] = jnp.diag(block).reshape(-1, channels).sum(0)
        Hv = sum(
            H[name][other].reshape(size, -1) @ probes[other].reshape(len(probes[other]), -1).T for other in KERNELS
        )
        products = (probes[name].reshape(-1, size) * Hv.T).reshape(-1, kernels[name].shape[0], channels).sum(1)
        found[f"probes/{name}"] = products.mean(0)
    h = jax.nn.relu(x @ params["a"] + params["b"][None]) + lost
    p = jax.nn.softmax(h @ params["c"] + params["d"][None])
    J = h[:, :, None] * params["c"][None]
    found["second"] = (J**2 * p[:, None]).sum(2).mean(0) - ((J * p[:, None]).sum(2) ** 2).mean(0)
    found["first"] = (J * (p - jax.nn.one_hot(label, CLASSES))[:, None]).sum(2).mean(0)
    return found


def _largest_terms(params, x):
    """Bounds of what is added up to the values of `_right`, whatever cancels in them."""
    p = {name: np.abs(np.asarray(leaf, np.float64)) for name, leaf in params.items()}
    x = np.abs(x)
    h = x @ p["a"] + p["b"]
    reach = x.sum(1, keepdims=True)  # of a hidden unit by a probe
    moved = reach * p["c"].sum(0) + h.sum(1, keepdims=True)  # (n, classes), of a logit
    J = h[:, :, None] * p["c"]
    return {
        "trace/a": ((x**2).sum(1, keepdims=True) * (p["c"] ** 2).sum(1)).mean(0),
        "trace/c": np.full(CLASSES, (h**2).sum(1).mean()),
        "probes/a": (reach * (moved @ p["c"].T + CLASSES)).mean(0),
        "probes/c": (h.sum(1, keepdims=True) * moved + reach * HIDDEN).mean(0),
        "second": (J**2).sum(2).mean(0),
        "first": J.sum(2).mean(0),
    }


def named(error):
    return any(f"{name!r}" in str(error) or name in str(error).split() for name in NAMES)


def outcome_of(call, *given):
    """What a function returns, or None where it refuses by an error that names what is wrong."""
    try:
        return call(*given)
    except (ValueError, FloatingPointError) as error:
        assert named(error), error
        return None


@cache
def probes():
    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in KERNELS.items()}
    found = [rademacher(jax.random.fold_in(jax.random.key(0), i), leaves) for i in range(PROBES)]
    return {name: np.stack([np.asarray(one[name], np.float64) for one in found]) for name in KERNELS}


def hutchinson(params, batch, policy):
    found = channel_trace(loss, params, batch, key=jax.random.key(0), num_probes=PROBES, policy=policy)
    assert all((np.asarray(sem) >= 0).all() and np.isfinite(sem).all() for sem in jax.tree.leaves(found.sem))
    return {f"probes/{name}": found.mean[name] for name in KERNELS}


def exact(params, batch, policy):
    found = gauss_newton_trace(model, params, batch, policy=policy)
    return {f"trace/{name}": found.mean[name] for name in KERNELS}


def costs(params, batch, policy):
    found = removal_costs(model, params, batch, policy=policy)
    assert [group.producers["a"] for group in found.groups] == [(channel,) for channel in range(HIDDEN)]
    errors = (found.second_order_sem, found.first_order_sem)
    assert len(batch["label"]) == 1 or all(np.isfinite(sem).all() and (sem >= 0).all() for sem in errors)
    assert np.isfinite(found.gram()).all() and np.isfinite(found.first_order_squares).all()
    return {"second": found.second_order, "first": found.first_order}


CURVATURE = [hutchinson, exact, costs]


def narrowed(tree, dtype):
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == np.int32 else leaf.astype(dtype), tree)


@pytest.mark.parametrize("function", CURVATURE)
@pytest.mark.parametrize(
    ("compute", "inputs", "examples"),
    [
        ("float64", "float64", EXAMPLES),
        ("float32", "float64", EXAMPLES),
        ("float32", "float32", EXAMPLES),
        ("float32", "int32", 1),
        ("bfloat16", "float32", EXAMPLES),
        ("float16", "int32", EXAMPLES),
        ("float16", "float32", EXAMPLES),
    ],
)
def test_curvature_is_right_or_refused(function, compute, inputs, examples):
    rng = np.random.default_rng([list(PRECISIONS).index(compute), examples])
    right, sharp = 0, 0
    for number in range(DRAWS):
        params, batch = narrowed(
            draw(rng, examples, inputs == "int32"), np.float64 if inputs == "float64" else np.float32
        )
        with enable_x64(inputs == "float64"):
            found = outcome_of(function, params, batch, Policy(compute))
        if found is None:
            continue
        reference = Reference(params, batch, compute, rng)
        for name, value in found.items():
            assert reference.confirms(name, value), (number, name, value, reference.values[name])
        right += 1
        close = 1.0 if compute in ("bfloat16", "float16") else 1e-3
        sharp += all((reference.allowed[name] <= close * np.abs(reference.values[name]).max()).all() for name in found)
    # What 16 bits cannot hold is refused; what is right of a dead layer is 0, give or take nothing.
    assert right >= DRAWS * (0.7 if compute == "float16" else 1)
    assert sharp


@pytest.mark.parametrize(
    ("compute", "factor"), [("float64", 1 + 1e-9), ("float32", 1.001), ("bfloat16", 4), ("float16", 4)]
)
def test_a_wrong_value_would_be_seen(compute, factor):
    rng = np.random.default_rng(7)
    params = {"a": rng.normal(size=KERNELS["a"]), "b": np.ones(HIDDEN), "c": rng.normal(size=KERNELS["c"]) / 4}
    batch = {"x": rng.normal(size=(EXAMPLES, INPUTS)), "label": rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)}
    reference = Reference(params | {"d": np.zeros(CLASSES)}, batch, compute, rng)
    for name in ("trace/a", "trace/c", "second", "first", *["probes/c"] * (factor < 2)):
        value = reference.values[name]
        assert reference.confirms(name, value) and not reference.confirms(name, factor * value), name


@pytest.mark.parametrize("function", CURVATURE)
def test_nan_and_infinity_are_named(function):
    rng = np.random.default_rng(1)
    for _ in range(12):
        params, batch = narrowed(draw(rng), np.float32)
        which = [*params, "x"][rng.integers(5)]
        leaf = batch["x"] if which == "x" else params[which]
        leaf.flat[rng.integers(leaf.size)] = rng.choice([np.nan, np.inf, -np.inf])
        for compute in ("float32", "bfloat16", "float16"):
            with pytest.raises(ValueError, match=f"'{which}' holds NaN or inf"):
                function(params, batch, Policy(compute))


@pytest.mark.parametrize("function", CURVATURE)
@pytest.mark.parametrize("which", ["a", "c", "x"])
def test_what_vanishes_in_float16_is_named(function, which):
    """All of a kernel or of the inputs; single weights may."""
    rng = np.random.default_rng(9)
    leaves = {"a": rng.normal(size=KERNELS["a"]), "c": rng.normal(size=KERNELS["c"])}
    leaves |= {"x": rng.normal(size=(EXAMPLES, INPUTS))}
    leaves[which] *= 1e-9
    leaves = narrowed(leaves, np.float32)
    params = {name: leaves[name] for name in KERNELS} | {"b": np.ones(HIDDEN, np.float32), "d": np.zeros(3, np.float32)}
    batch = {"x": leaves["x"], "label": np.zeros(EXAMPLES, np.int32)}
    with pytest.raises(
        ValueError,
        match=rf"{which if which != 'x' else 'batch'}.* is not zero, but all of it is in float16; use bfloat16 or",
    ):
        function(params, batch, Policy("float16"))


@pytest.mark.parametrize("function", CURVATURE)
@pytest.mark.parametrize(
    ("scales", "refused"),
    [
        ((1e18, 1e-18), {hutchinson}),  # a trace of 1e36, whose square is beyond float32
        ((1e-18, 1e18), {hutchinson}),
        ((1e22, 1e-22), set(CURVATURE) - {costs}),
        ((1e30, 1e30), set(CURVATURE)),
        ((1e300, 1.0), set(CURVATURE)),  # a number in float64 alone
    ],
)
def test_what_overflows_is_refused(function, scales, refused):
    """Neither infinity nor a standard error of infinity is returned."""
    rng = np.random.default_rng(2)
    params = {"a": rng.normal(size=KERNELS["a"]), "b": np.zeros(HIDDEN), "c": rng.normal(size=KERNELS["c"])}
    params = {**params, "a": scales[0] * params["a"], "c": scales[1] * params["c"], "d": np.zeros(CLASSES)}
    batch = {"x": rng.normal(size=(EXAMPLES, INPUTS)), "label": rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)}
    if max(scales) < 1e300:
        params = narrowed(params, np.float32)
    batch = narrowed(batch, np.float32)
    found = outcome_of(function, params, batch, Policy())
    assert (found is None) == (function in refused)
    if found is not None:
        reference = Reference(params, batch, "float32", rng)
        assert all(reference.confirms(name, value) for name, value in found.items())


QUANTIZED = fake_quant(model)
plainly = jax.jit(model)
observing = jax.jit(partial(QUANTIZED.apply, update=True))
rounding = jax.jit(partial(QUANTIZED.apply, update=False))


def quantisation_error(params, x, ranges, eps):
    """(N, classes): by how much 8 bits may move the logits, from half a step of every grid that a value is rounded to.

    A grid's step follows from its range; weights have one per channel, which the bias at a step of both may enlarge.
    """
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}

    def layer(x, dx, kernel, bias, seen):
        low, high = min(float(seen.low), 0.0), max(float(seen.high), 0.0)
        step = (high - low) / 255
        step = step if step >= 2.0**-120 else 1.0
        dx = dx + min(step / 2 * 1.01 + eps * max(-low, high) * 256, max(-low, high))
        weight = np.maximum(np.abs(kernel).max(0) / 127, np.abs(bias) / (step * 2**30))
        weight = np.where(weight < 2.0**-120, 2.0**-120, weight)
        dw = weight / 2 * 1.01 + 4 * eps * np.abs(kernel)
        exact = np.abs(x) @ np.abs(kernel) + np.abs(bias)
        return (np.abs(x) + dx) @ dw + dx @ np.abs(kernel) + weight * step + 64 * eps * exact

    h = np.maximum(x @ p["a"] + p["b"], 0)
    dh = layer(x, np.zeros_like(x), p["a"], p["b"], ranges["a"])
    return layer(h, dh, p["c"], p["d"], ranges["c"]), h @ p["c"] + p["d"]


@pytest.mark.parametrize("compute", PRECISIONS)
def test_fake_and_real_integers_are_right_or_refused(compute):
    """What ranges cannot hold is refused before there are integers; a dead layer is one of these."""
    rng = np.random.default_rng(3)
    eps = max(PRECISIONS[compute], PRECISIONS["float32"])  # real integers are scaled in float32
    right = 0
    with enable_x64(compute == "float64"):
        for number in range(10):
            params, batch = draw(rng, integers=number % 2 == 0)
            with np.errstate(over="ignore"):
                params, x = narrowed(params, jnp.dtype(compute)), narrowed(batch, np.float32)["x"]
            y, ranges = observing(params, QUANTIZED.init(params, x), x)
            network = integers(params, ranges, x)
            plain = np.asarray(plainly(params, x), np.float64)
            if network is None or not np.isfinite(plain).all():  # the function itself overflows in its last layer
                continue
            ranges = jax.device_get(ranges)
            allowed, expected = quantisation_error(params, np.asarray(x, np.float64), ranges, eps)
            for found in (y, rounding(params, ranges, x)[0], network(x)):
                assert (np.abs(np.asarray(found, np.float64) - expected) <= allowed).all(), number
            right += 1
    assert right >= 4


def integers(params, ranges, x):
    """The integer network, or None where it is refused by an error that names the range or the layer."""
    try:
        check_calibrated(ranges)
        return to_integer(QUANTIZED, params, ranges, example=x)
    except ValueError as error:
        assert re.match(r"[ac](:\w+)?: its (values are always|range|folded kernel|input range)", str(error)), error
        return None


def test_nan_and_infinity_become_no_integers():
    rng = np.random.default_rng(4)
    for _ in range(10):
        params, batch = narrowed(draw(rng), np.float32)
        which = [*params, "x"][rng.integers(5)]
        leaf = batch["x"] if which == "x" else params[which]
        leaf.flat[rng.integers(leaf.size)] = rng.choice([np.nan, np.inf, -np.inf])
        _, ranges = observing(params, QUANTIZED.init(params, batch["x"]), batch["x"])
        assert integers(params, ranges, batch["x"]) is None
    params, batch = narrowed(draw(np.random.default_rng(6)), np.float32)
    network = integers(params, observing(params, QUANTIZED.init(params, batch["x"]), batch["x"])[1], batch["x"])
    batch["x"][0, 0] = np.nan
    assert network is not None
    for call in (network, network.tensors):
        with pytest.raises(ValueError, match="the input holds NaN or infinity, which no integer can stand for"):
            call(batch["x"])


def averaging(variables, x):
    """A normalisation's statistics of ``x @ a``, in the dtype they are kept in."""
    z = x.astype(variables["a"].dtype) @ variables["a"]
    new = {"mean": z.mean(0), "var": z.var(0)}
    return z, {name: (0.9 * variables[name] + 0.1 * new[name]).astype(z.dtype) for name in new}


@pytest.mark.parametrize("compute", PRECISIONS)
def test_statistics_are_right_or_refused(compute):
    rng = np.random.default_rng(5)
    eps, smallest = PRECISIONS[compute], SMALLEST[compute]
    right = 0
    with enable_x64(compute == "float64"):
        for number in range(DRAWS):
            params, batch = draw(rng, integers=number % 2 == 0)
            with np.errstate(over="ignore"):
                kernel, x = narrowed((params["a"], batch["x"]), jnp.dtype(compute))
            broken = rng.random() < 0.2
            if broken:
                kernel = kernel.copy()
                kernel.flat[rng.integers(kernel.size)] = np.nan
            start = {"a": kernel, "mean": jnp.zeros(HIDDEN, compute), "var": jnp.ones(HIDDEN, compute)}
            try:
                found = recalibrate(averaging, start, [jnp.asarray(x)])
            except ValueError as error:
                assert re.search(r"statistics (mean|var) .*(are not finite|beyond)", str(error)), error
                continue
            assert not broken
            z = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
            rounded = 8 * (
                eps * (np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(kernel, np.float64))) + smallest
            ).max(0)
            for name, expected, moved in (
                ("mean", z.mean(0), rounded),
                ("var", z.var(0), 4 * rounded * (np.abs(z - z.mean(0)).max(0) + rounded)),
            ):
                # A rounding of the momentum is ten times as much of what the old value does not explain.
                allowed = moved + 40 * eps * np.abs(expected) + 40 * smallest
                assert (np.abs(np.asarray(found[name], np.float64) - expected) <= allowed).all(), (
                    number,
                    name,
                    found[name],
                    expected,
                    allowed,
                )
            right += 1
    assert right >= DRAWS // 4
