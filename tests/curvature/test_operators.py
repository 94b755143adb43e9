"""Every curvature product against its dense float64 matrix, under every transform, and in the libraries it is for."""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import cg, eigsh

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import (
    as_linear_operator,
    fisher_vp,
    gnvp,
    hvp,
    linearized_hvp,
    second_derivative,
    squared_error,
)
from tests.curvature import operators
from tests.curvature.test_devices import command, finished

NAMES = sorted(operators.PRODUCTS)


def matrix_of(product, params):
    flat, unravel = ravel_pytree(params)
    apply = jax.jit(lambda v: ravel_pytree(product(unravel(v)))[0])
    return np.stack([np.asarray(apply(row)) for row in np.eye(flat.size, dtype=flat.dtype)], axis=1)


def jacobian(params, x):
    """(examples, outputs, parameters)."""
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacobian(lambda w: operators.model(unravel(w), x)))(flat))


@cache
def dense(name):
    """By definition: second derivatives, Jacobians and gradients per example of the flat parameters, in float64."""
    params, batch = operators.problem(jnp.float64)
    flat, unravel = ravel_pytree(params)
    x, y = batch
    if name in ("hvp", "linearized_hvp"):
        return jax.jit(jax.hessian(lambda w: operators.loss(unravel(w), batch)))(flat)
    if name == "fisher_vp":
        slope = jax.jit(jax.grad(lambda w, one: operators.loss(unravel(w), one)))
        g = [slope(flat, (x[i : i + 1], y[i : i + 1])) for i in range(len(x))]
        return sum(np.outer(a, a) for a in g) / len(x)
    J = jacobian(params, x)
    p = np.asarray(jax.nn.softmax(jax.jit(operators.model)(params, x)))
    return sum(J[i].T @ (np.diag(p[i]) - np.outer(p[i], p[i])) @ J[i] for i in range(len(x))) / len(x)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_matrix_in_float64(name):
    with enable_x64():
        params, batch = operators.problem(jnp.float64)
        expected = np.asarray(dense(name))
        found = matrix_of(lambda v: operators.PRODUCTS[name](params, v, batch), params)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found, found.T, rtol=1e-9, atol=1e-12)
        assert np.abs(expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("head", ["squared_error", "second_derivative"])
def test_gauss_newton_products_of_other_heads(head):
    """The head by its second derivative has eigenvalues of both signs."""

    def saddle(z):
        return (z[0] ** 2 - 2 * z[1] ** 2 + z[0] * z[2]) / 2

    with enable_x64():
        params, (x, _) = operators.problem(jnp.float64)
        J = jacobian(params, x)
        outer = 2 * np.eye(3) if head == "squared_error" else jax.hessian(saddle)(jnp.zeros(3))
        expected = sum(j.T @ outer @ j for j in J) / len(x)
        product = gnvp(operators.model, head=squared_error if head == "squared_error" else second_derivative(saddle))
        found = matrix_of(lambda v: product(params, v, x), params)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_composes_with_jit_vmap_and_grad(name):
    params, batch = operators.problem()
    product = partial(operators.PRODUCTS[name], batch=batch)
    v = operators.direction(params)
    once = product(params, v)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.jit(product)(params, v), once)
    several = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), v)
    found = jax.jit(jax.vmap(product, (None, 0)))(params, several)
    jax.tree.map(lambda a, b: close(a, np.stack([b, -2 * b])), found, once)

    def quadratic(params, v):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(product(params, v)), strict=True))

    of_params, of_v = jax.jit(jax.grad(quadratic, (0, 1)))(params, v)
    jax.tree.map(lambda a, b: close(a, 2 * b), of_v, once)  # symmetric
    step = 1e-2
    moved = [jax.tree.map(lambda p, d, s=s: p + s * step * d, params, v) for s in (1, -1)]
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(of_params), jax.tree.leaves(v), strict=True))
    value = jax.jit(quadratic)
    difference = (value(moved[0], v) - value(moved[1], v)) / (2 * step)
    assert float(slope) == pytest.approx(float(difference), rel=2e-2)


@pytest.mark.slow
def test_composes_with_shard_map(tmp_path):
    """On four devices, a quarter of the examples on each: the mean of the products is that of all examples."""
    finished(command(tmp_path / "found.json", devices=4, module="operators"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found) == NAMES
    for together, divided in found.values():
        np.testing.assert_allclose(divided, together, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_linearised_operator_goes_through_jit_as_an_argument():
    params, batch = operators.problem()
    product = linearized_hvp(operators.loss, params, batch)
    v = operators.direction(params)

    @jax.jit
    def twice(product, v):
        return product(product(v))

    expected = hvp(operators.loss)(params, hvp(operators.loss)(params, v, batch), batch)
    for a, b in zip(jax.tree.leaves(twice(product, v)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    made = jax.jit(lambda params: linearized_hvp(operators.loss, params, batch))(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), made(v), product(v))


@pytest.mark.parametrize("name", NAMES)
def test_a_direction_that_does_not_fit_is_an_error(name):
    params, batch = operators.problem()
    with pytest.raises(ValueError, match="'second' is"):
        operators.PRODUCTS[name](params, params | {"second": jnp.zeros((2, 2))}, batch)


def test_batches_that_do_not_fit_are_errors():
    params, (x, y) = operators.problem()
    with pytest.raises(ValueError, match="differ in their number of examples"):
        fisher_vp(operators.loss)(params, params, (x, y[:-1]))
    with pytest.raises(ValueError, match=r"the head must return \(\*logits.shape, R\)"):
        gnvp(operators.model, head=lambda z, *_: jnp.ones(2))(params, params, (x, y))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_scipy(dtype):
    with enable_x64():
        params, batch = operators.problem(dtype)
        expected = np.asarray(dense("hvp"))
        operator = as_linear_operator(linearized_hvp(operators.loss, params, batch), params)
        assert operator.dtype == dtype and operator.shape == expected.shape
        found = eigsh(operator, k=3, return_eigenvectors=False)
        values = np.linalg.eigvalsh(expected)
        largest = np.sort(values[np.argsort(-np.abs(values))[:3]])
        np.testing.assert_allclose(np.sort(found), largest, rtol=1e-3 if dtype == jnp.float32 else 1e-8)
        np.testing.assert_allclose(operator.T @ np.ones(len(values)), expected.sum(0), rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="int32"):
        as_linear_operator(lambda v: v, {"w": jnp.zeros(2), "n": jnp.zeros(1, jnp.int32)})


def test_scipy_solves_with_damped_gauss_newton():
    with enable_x64():
        params, batch = operators.problem(jnp.float64)
        product = gnvp(operators.model)

        def damped(v):
            return jax.tree.map(lambda a, b: a + 0.1 * b, product(params, v, batch), v)

        b = np.linspace(-1, 1, ravel_pytree(params)[0].size)
        x, failed = cg(as_linear_operator(damped, params), b, rtol=1e-12)
        assert not failed
        np.testing.assert_allclose(dense("gnvp") @ x + 0.1 * x, b, atol=1e-9)


@pytest.mark.slow
def test_matfree():
    decomp = pytest.importorskip("matfree.decomp", reason="pip install 'ehap-jax[spectrum]'")
    eig = pytest.importorskip("matfree.eig", reason="pip install 'ehap-jax[spectrum]'")
    with enable_x64():
        params, batch = operators.problem(jnp.float64)
        expected = np.linalg.eigvalsh(np.asarray(dense("hvp")))
        eigh = eig.eigh_partial(decomp.tridiag_sym(expected.size, reortho="full"))
        values, vectors = eigh(linearized_hvp(operators.loss, params, batch), operators.direction(params))
        np.testing.assert_allclose(np.sort(values), expected, atol=1e-8)
        assert jax.tree.structure(vectors) == jax.tree.structure(params)


@pytest.mark.slow
def test_lineax():
    lineax = pytest.importorskip("lineax", reason="lineax is not installed: pip install lineax")
    with enable_x64(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, batch = operators.problem(jnp.float64)
        product = gnvp(operators.model)

        def damped(v):
            return jax.tree.map(lambda a, b: a + 0.1 * b, product(params, v, batch), v)

        structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        operator = lineax.FunctionLinearOperator(damped, structure, lineax.positive_semidefinite_tag)
        b = operators.direction(params)
        x = lineax.linear_solve(operator, b, lineax.CG(rtol=1e-11, atol=1e-11)).value
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-8), damped(x), b)
