"""The largest eigenvalues and the spectral density of the Hessian and the Gauss-Newton matrix of a trained network.

    python -m recipes.spectrum short resnet20.th --data npz:cifar10.npz     # minutes on two CPU cores
    python -m recipes.spectrum full runs/pretrain                           # CIFAR-10 through TFDS, a GPU
    python -m recipes.spectrum short runs/pretrain --data digits

Lanczos' algorithm by matfree (``pip install 'ehap-jax[spectrum]'``) on our products, which are linearised once; over
all parameters, biases and normalisation included, in eval mode. Each of ``draws`` random starting vectors gives a
quadrature of the spectrum (stochastic Lanczos quadrature; Lin, Saad and Yang 2016; Ghorbani, Krishnan and Xiao 2019,
arXiv 1901.10159); the first also gives the eigenpairs of largest absolute value, with their residuals. Writes
``spectrum.json``, ``spectrum.png``, ``eigenvectors.npz`` and a file per draw, from which a stopped run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree

from ehap_jax import _compat
from ehap_jax._paths import path_name
from ehap_jax._untrusted_files import read_arrays
from ehap_jax._whole_files import write_arrays
from ehap_jax.curvature import gnvp, linearized_hvp
from ehap_jax.report.figure_style import new_figure, save_figure
from ehap_jax.training import Deadline, Progress, RunDirectory
from recipes.command import RunOptions, run_command
from recipes.lab import evaluation_loss, training_batch
from recipes.network import Network, load_data, load_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Matrix = Literal["hessian", "gauss_newton"]
COLOURS = {"hessian": "#0072B2", "gauss_newton": "#D55E00"}


@dataclass(frozen=True)
class Config:
    """Spectra of a trained network's curvature."""

    dense: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of another recipe."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    matrices: tuple[Matrix, ...] = ("hessian", "gauss_newton")
    examples: int = 512
    """Training images, not augmented."""
    microbatch: int = 64
    """Examples that are differentiated together; the residuals of all of them are kept."""
    steps: int = 80
    """Products per starting vector, at most one per parameter."""
    draws: int = 8
    """Starting vectors."""
    pairs: int = 10
    """Eigenpairs of largest absolute value."""
    reorthogonalise: bool = True
    """Keep all Lanczos vectors (steps times the parameters) and so find no eigenvalue twice."""
    seed: int = 0


VARIANTS = {
    "short": (
        "64 images, 2 starting vectors of 40 steps",
        Config(examples=64, microbatch=32, steps=40, draws=2, pairs=5),
    ),
    "full": ("512 images, 8 starting vectors of 80 steps", Config()),
}


class Operator(NamedTuple):
    """A symmetric matrix as a compiled product of flat vectors.

    product: ``(n,) -> (n,)``. like: the pytree the vectors stand for.
    """

    product: Callable[[jax.Array], jax.Array]
    like: Any
    size: int


class Quadrature(NamedTuple):
    """Of one starting vector v: ``v^T f(A) v = sum of weights * f(nodes)``, exact for polynomials up to 2 steps - 1."""

    nodes: np.ndarray
    weights: np.ndarray


def main(config: Config, options: RunOptions) -> None:
    deadline = Deadline(options.max_minutes)
    network, chunks = prepare(config)
    run = options.create_run(config, "spectrum")
    found: dict[str, Any] = {}
    quadratures: dict[str, list[Quadrature]] = {}
    vectors: dict[str, np.ndarray] = {}
    with Progress() as progress, jax.default_matmul_precision("highest"):
        for matrix in config.matrices:
            operator = operator_of(matrix, network, chunks)
            with progress.stage(matrix, config.draws) as advance:
                draws = []
                for draw in range(config.draws):
                    draws.append(lanczos(config, run, operator, matrix, draw))
                    advance()
                    if draw + 1 < config.draws:
                        deadline.check(f"{draw + 1} of {config.draws} starting vectors of the {matrix} done")
            quadratures[matrix] = [Quadrature(d["nodes"], d["weights"]) for d in draws]
            first = draws[0]
            vectors |= named_vectors(matrix, operator, first["vectors"])
            found[matrix] = summary(operator, quadratures[matrix], first["values"], first["residuals"])
            progress.note(
                f"{matrix}: largest {found[matrix]['eigenvalues'][0]:.4g}, trace {found[matrix]['trace']:.4g}"
            )
        write_arrays(run.file("eigenvectors.npz"), vectors)
        run.write_json("spectrum.json", {"examples": config.examples, "spectra": found})
        save_figure(figure_of(quadratures), run.file("spectrum.png"))


def prepare(config: Config) -> tuple[Network, list[tuple[jax.Array, jax.Array]]]:
    """The network and the chunks of its batch; every setting is checked before any work starts.

    Raises:
        ValueError: a setting out of range.
    """
    for name in ("examples", "microbatch", "steps", "draws", "pairs"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(config, name)}")
    if not config.matrices or len(set(config.matrices)) < len(config.matrices):
        raise ValueError(f"--matrices must be different ones, at least one; got {config.matrices}")
    if config.pairs > config.steps:
        raise ValueError(f"{config.steps} steps give at most as many eigenpairs, not --pairs {config.pairs}")
    network = load_network(config.dense)
    size = sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"]))
    if config.steps > size:
        raise ValueError(f"--steps {config.steps} is more than the network's {size} parameters")
    dataset = load_data(network, config.data)
    images, labels = training_batch(dataset, config.examples, config.seed)
    starts = range(0, config.examples, config.microbatch)
    return network, [(images[i : i + config.microbatch], labels[i : i + config.microbatch]) for i in starts]


def operator_of(matrix: Matrix, network: Network, chunks: list[tuple[jax.Array, jax.Array]]) -> Operator:
    """The matrix over the network's trained parameters, of the mean loss over all chunks."""
    params = network.variables["params"]
    rest = {name: tree for name, tree in network.variables.items() if name != "params"}
    loss = evaluation_loss(network.apply)
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def linearise(params, chunk):
        if matrix == "hessian":
            return linearized_hvp(lambda p, b: loss({"params": p, **rest}, b), params, chunk)
        product = gnvp(lambda p, x: network.apply({"params": p, **rest}, x))
        return jax.linearize(lambda v: product(params, v, chunk), jax.tree.map(jnp.zeros_like, params))[1]

    @jax.jit
    def add(total, linear, weight, v):
        return total + weight * ravel_pytree(linear(unravel(v)))[0]

    examples = sum(len(labels) for _, labels in chunks)
    linear = [linearise(params, chunk) for chunk in chunks]
    weights = [jnp.asarray(len(labels) / examples, flat.dtype) for _, labels in chunks]

    def product(v: jax.Array) -> jax.Array:
        total = jnp.zeros_like(v)
        for part, weight in zip(linear, weights, strict=True):
            total = add(total, part, weight, v)
        return total

    return Operator(product, params, flat.size)


def tridiagonal(config: Config, steps: int) -> Callable:
    """matfree's Lanczos algorithm."""
    from matfree import decomp

    reortho = "full" if config.reorthogonalise else "none"
    return decomp.tridiag_sym(steps, reortho=reortho, custom_vjp=False)


def _opaque(product: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """``product`` as a primitive: matfree traces what it is given, and would run its operations one by one."""
    primitive = _compat.Primitive("matrix_vector_product")
    primitive.def_abstract_eval(lambda v: v)

    @primitive.def_impl
    def run(v):
        with jax.disable_jit(False):
            return product(v)

    return primitive.bind


def lanczos(config: Config, run: RunDirectory, operator: Operator, matrix: str, draw: int) -> dict[str, np.ndarray]:
    """The quadrature of one starting vector and, of the first, the eigenpairs; from its file where it has been done.

    The loop runs step by step (`jax.disable_jit`) over the compiled product: inside a compiled loop XLA:CPU runs the
    weight gradients of convolutions many times slower (jax#12868).
    """
    file = run.file(f"{matrix}-{draw}.npz")
    if file.exists():
        return read_arrays(file)
    key = jax.random.fold_in(jax.random.key(config.seed), draw)
    v = jax.random.rademacher(key, (operator.size,), jnp.float32) / jnp.sqrt(operator.size).astype(jnp.float32)
    product = _opaque(operator.product)
    with jax.disable_jit():
        basis, small, *_ = tridiagonal(config, config.steps)(product, v)
    nodes, small_vectors = np.linalg.eigh(np.asarray(small, np.float64))
    found = {"nodes": nodes, "weights": small_vectors[0] ** 2}
    if draw == 0:
        largest = np.argsort(-np.abs(nodes))[: config.pairs]
        vectors = small_vectors[:, largest].T @ np.asarray(basis, np.float64).reshape(config.steps, -1)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        products = np.stack([np.asarray(operator.product(jnp.asarray(x, jnp.float32)), np.float64) for x in vectors])
        residuals = np.linalg.norm(products - nodes[largest, None] * vectors, axis=1)
        found |= {"values": nodes[largest], "residuals": residuals, "vectors": vectors.astype(np.float32)}
    write_arrays(file, found)
    return found


def summary(operator: Operator, draws: list[Quadrature], values: np.ndarray, residuals: np.ndarray) -> dict[str, Any]:
    """Numbers of one spectrum: eigenvalues, the smallest node, Hutchinson's estimate of the trace."""
    traces = np.array([operator.size * (d.nodes * d.weights).sum() for d in draws])
    negative = np.array([d.weights[d.nodes < 0].sum() for d in draws])
    sem = float(traces.std(ddof=1) / np.sqrt(len(traces))) if len(traces) > 1 else None
    return {
        "parameters": operator.size,
        "eigenvalues": values.tolist(),
        "residuals": residuals.tolist(),
        "smallest": float(min(d.nodes.min() for d in draws)),
        "trace": float(traces.mean()),
        "trace_sem": sem,
        "share_of_negative_eigenvalues": float(negative.mean()),
    }


def named_vectors(matrix: str, operator: Operator, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """``{matrix/path: (pairs, *shape of the parameter)}``."""
    _, unravel = ravel_pytree(operator.like)
    stacked = jax.vmap(unravel)(jnp.asarray(vectors))
    named = jax.tree_util.tree_leaves_with_path(stacked)
    return {f"{matrix}/{path_name(p)}": np.asarray(x) for p, x in named}


def density(draws: list[Quadrature], at: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The mean over draws of the nodes as Gaussians of their weights; ``width`` is their standard deviation at a node.

    Args:
        draws: from random starting vectors.
        at: ``(points,)``.
        width: a function's values at the nodes of all draws, one after another.
    """
    nodes, weights = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    z = (at[:, None] - nodes[None, :]) / width[None, :]
    return (np.exp(-(z**2) / 2) / width[None, :] * weights[None, :]).sum(1) / np.sqrt(2 * np.pi) / len(draws)


def figure_of(quadratures: dict[str, list[Quadrature]]) -> Figure:
    """The spectral densities, eigenvalues on a scale that is linear around zero and logarithmic outside."""
    largest = max(np.abs(d.nodes).max() for draws in quadratures.values() for d in draws)
    linear = 1e-3 * largest

    def scale(x):
        return np.arcsinh(x / linear)

    figure = new_figure(7.2, 3.8)
    axes = figure.subplots()
    width = 0.1
    for matrix, draws in quadratures.items():
        moved = [Quadrature(scale(d.nodes), d.weights) for d in draws]
        at = np.linspace(scale(-largest) - 4 * width, scale(largest) + 4 * width, 1000)
        values = density(moved, at, np.full(sum(len(d.nodes) for d in draws), width))
        label = f"{matrix.replace('_', '-')} ({len(draws)} starting vectors, {len(draws[0].nodes)} steps)"
        axes.plot(at, np.maximum(values, 1e-8), color=COLOURS[matrix], label=label)
    powers = np.arange(np.floor(np.log10(linear)), np.ceil(np.log10(largest)) + 1)
    shown = [s * 10.0**p for s in (-1, 1) for p in powers if 10.0**p <= 2 * largest]
    axes.set_xticks(scale(np.array([*shown, 0.0])), [f"{x:g}" for x in (*shown, 0.0)], rotation=60, fontsize=8)
    axes.set(yscale="log", ylim=(1e-7, None), xlabel="eigenvalue (arcsinh scale)", ylabel="density on this scale")
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="spectrum", options=RunOptions)


if __name__ == "__main__":
    sys.exit(command())
