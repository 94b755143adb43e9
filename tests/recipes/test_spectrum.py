"""The spectra of a tiny network against its dense matrices, what is written, resuming, and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

pytest.importorskip("matfree", reason="spectra need matfree: pip install 'ehap-jax[spectrum]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
from ehap_jax.curvature import gnvp, hvp
from ehap_jax.data import load_dataset
from ehap_jax.training import RunDirectory
from recipes import spectrum
from recipes.lab import evaluation_loss, training_batch
from recipes.network import Architecture, load_network, new_network, save_network

TINY = ["--data", "digits", "--examples", "7", "--microbatch", "4", "--steps", "24", "--draws", "2", "--pairs", "3"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A run directory with an untrained network: its curvature is as good as any."""
    data = load_dataset("digits")
    shape = data.image_shape
    normalisation = (tuple(map(float, np.ravel(data.mean))), tuple(map(float, np.ravel(data.std))))
    architecture = Architecture("resnet8", data.num_classes, shape, normalisation, {"widths": (2, 2, 2)})
    run = RunDirectory.create(tmp_path_factory.mktemp("dense") / "run")
    save_network(run, new_network(architecture, 0))
    return run.path


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("spectrum") / "run"
    stopped = ["short", str(dense), *TINY, "--output", str(output), "--max-minutes", "0.0001"]
    assert spectrum.command(stopped) == 3
    assert (output / "hessian-0.npz").exists() and not (output / "spectrum.json").exists()
    before = (output / "hessian-0.npz").stat().st_mtime_ns
    assert spectrum.command(["short", str(dense), *TINY, "--output", str(output), "--resume"]) == 0
    assert (output / "hessian-0.npz").stat().st_mtime_ns == before
    return output


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_eigenpairs_and_quadrature_are_those_of_the_dense_matrix(dense, finished, matrix):
    network = load_network(dense)
    data = load_dataset("digits", normalisation=network.architecture.normalisation)
    batch = training_batch(data, 7, 0)
    params, rest = network.variables["params"], {"batch_stats": network.variables["batch_stats"]}
    loss = evaluation_loss(network.apply)
    flat, unravel = ravel_pytree(params)
    if matrix == "hessian":
        product = hvp(lambda p: loss({"params": p, **rest}, batch))
    else:
        product = lambda p, v: gnvp(lambda p, x: network.apply({"params": p, **rest}, x))(p, v, batch)  # noqa: E731
    apply = jax.jit(lambda v: ravel_pytree(product(params, unravel(v)))[0])
    A = np.stack([np.asarray(apply(row), float) for row in jnp.eye(flat.size)])
    values = np.linalg.eigvalsh((A + A.T) / 2)
    found = json.loads((finished / "spectrum.json").read_text())["spectra"][matrix]
    largest = values[np.argsort(-np.abs(values))[:3]]
    np.testing.assert_allclose(found["eigenvalues"], largest, rtol=2e-3)
    assert max(found["residuals"]) < 2e-2 * np.abs(largest[0])
    with np.load(finished / "eigenvectors.npz") as file:
        named = {path.split("/", 1)[1]: x for path, x in file.items() if path.startswith(matrix)}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    stacked = [named[jax.tree_util.keystr(p, simple=True, separator="/")].reshape(3, -1) for p, _ in leaves]
    v = np.concatenate(stacked, axis=1)
    np.testing.assert_allclose(np.einsum("ki,ij,kj->k", v, A, v), found["eigenvalues"], rtol=5e-3)
    for draw in range(2):
        key = jax.random.fold_in(jax.random.key(0), draw)
        v = np.asarray(jax.random.rademacher(key, (flat.size,), jnp.float32), float) / np.sqrt(flat.size)
        with np.load(finished / f"{matrix}-{draw}.npz") as file:
            nodes, weights = file["nodes"], file["weights"]
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        for power in (1, 2, 3):
            expected = v @ np.linalg.matrix_power(A, power) @ v
            assert (weights * nodes**power).sum() == pytest.approx(expected, rel=2e-3)
    assert found["parameters"] == flat.size and found["trace_sem"] > 0


def test_a_run_directory_has_everything(finished):
    names = {path.name for path in finished.iterdir()}
    draws = {f"{matrix}-{draw}.npz" for matrix in ("hessian", "gauss_newton") for draw in range(2)}
    assert names >= {"config.json", "versions.json", "spectrum.json", "spectrum.png", "eigenvectors.npz"} | draws


def test_the_density_integrates_to_one():
    draws = [spectrum.Quadrature(np.array([-1.0, 2.0]), np.array([0.25, 0.75]))] * 2
    at = np.linspace(-4, 5, 2001)
    values = spectrum.density(draws, at, np.full(4, 0.3))
    assert values.sum() * (at[1] - at[0]) == pytest.approx(1, abs=1e-6)
    assert values[np.abs(at + 1).argmin()] == pytest.approx(0.25 / (0.3 * np.sqrt(2 * np.pi)), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "50"], "24 steps give at most"),
        (["--steps", "100000"], "more than the network's"),
        (["--draws", "0"], "--draws must be at least 1"),
        (["--matrices", "hessian", "hessian"], "--matrices"),
    ],
)
def test_bad_settings_fail_before_anything_is_written(dense, tmp_path, capsys, arguments, message):
    output = tmp_path / "run"
    assert spectrum.command(["short", str(dense), *TINY, *arguments, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
