"""Heads: what lies between logits and loss, as a square root of the Hessian of one example's loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.curvature.problem import Batches, batch_size

__all__ = [
    "Head",
    "centred_logits",
    "curvature_shares",
    "forms_root",
    "has_gradient",
    "loss_shares",
    "inputs_and_targets",
    "loss_gradient",
    "require_targets",
    "root_of",
    "root_times",
    "second_derivative",
    "shares_of",
    "softened_softmax",
    "softmax_cross_entropy",
    "square_shares",
    "squared_error",
    "weighted",
]

PyTree = Any
Head = Callable[..., Any]


def softmax_cross_entropy(logits: jax.Array, *targets: Any) -> jax.Array:
    """A square root of the Hessian of softmax cross-entropy for one example: (C,) to (C, C - 1).

    ``diag(p) - p p^T = S S^T`` has rank C - 1, and its Cholesky factor is known in closed form (Tanabe and Sagae 1992,
    J. R. Statist. Soc. B 54(1), 211-219): with ``q_j`` the sum of the probabilities after the j-th,
    ``S_jj = sqrt(p_j q_j / q_(j-1))`` and ``S_ij = -p_i sqrt(p_j / (q_j q_(j-1)))`` for i > j. The likeliest class
    is put last, so that no ``q`` is small unless what it divides is, too. The Hessian does not depend on the label.

    Args:
      logits: of one example, (C,).
      targets: none, or the label: an integer, or a probability for each class, (C,), as in label smoothing and mixup.

    Returns:
      S.

    Raises:
      ValueError: the logits are not a vector.

    >>> p = jnp.array([0.2, 0.3, 0.5])
    >>> S = softmax_cross_entropy(jnp.log(p))
    >>> S.shape, bool(jnp.allclose(S @ S.T, jnp.diag(p) - jnp.outer(p, p)))
    ((3, 2), True)
    """
    if logits.ndim != 1:
        raise ValueError(
            f"softmax_cross_entropy takes the logits of one example, of shape (classes,); got {logits.shape}. "
            "For other shapes write a head: logits of one example to (*logits.shape, R) with S S^T the Hessian"
        )
    return _softmax_root_times(logits, jnp.eye(logits.size - 1, dtype=logits.dtype)).T


def _softmax_root_times(logits: jax.Array, v: jax.Array) -> jax.Array:
    """``S v`` of `softmax_cross_entropy` for every row of ``v``, (K, C - 1) to (K, C), without S."""
    order = jnp.argsort(logits)
    p = jax.nn.softmax(logits[order])
    after = jnp.cumsum(p[::-1])[::-1]  # q_(j-1), with p_j in it
    before, q, p_j = after[:-1], after[1:], p[:-1]
    diagonal = v * jnp.sqrt(p_j * q / before)[None]
    below = jnp.cumsum(v * jnp.sqrt(p_j / (q * before))[None], 1)
    none = jnp.zeros((len(v), 1), v.dtype)
    found = jnp.concatenate([diagonal, none], 1) - p[None] * jnp.concatenate([none, below], 1)
    return found[:, jnp.argsort(order)]


def squared_error(logits: jax.Array, *targets: Any) -> jax.Array:
    """A square root of the Hessian of ``sum((logits - target) ** 2)`` of one example, which is 2 I.

    Args:
      logits: of one example, of any shape.
      targets: not used.

    Returns:
      S, ``(*logits.shape, logits.size)``.

    >>> S = squared_error(jnp.zeros(2))
    >>> (S @ S.T).round(3).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    return jnp.moveaxis(_squared_root_times(logits, jnp.eye(logits.size, dtype=logits.dtype)), 0, -1)


def _squared_root_times(logits: jax.Array, v: jax.Array) -> jax.Array:
    return (math.sqrt(2) * v).reshape(-1, *logits.shape)


@dataclass(frozen=True)
class second_derivative:
    """The head of any loss of one example: ``loss(logits, *targets) -> scalar``, by its second derivative.

    Its eigenvalues may be negative: their columns then count negatively, and only ``classes="all"`` is possible.

    Args:
      loss: of one example; twice differentiable in the logits. An instance is the head: of logits and targets it
        returns S, ``(*logits.shape, logits.size)``, and the sign of every column.

    >>> S, signs = second_derivative(lambda z: z[0] ** 2 - z[1] ** 2)(jnp.zeros(2))
    >>> sorted(signs.tolist())
    [-1.0, 1.0]
    """

    loss: Callable[..., jax.Array]

    def __call__(self, logits: jax.Array, *targets: Any) -> tuple[jax.Array, jax.Array]:
        def of_vector(z):
            return self.loss(z.reshape(logits.shape), *targets)

        values, vectors = jnp.linalg.eigh(jax.hessian(of_vector)(logits.ravel()))
        root = vectors * jnp.sqrt(jnp.abs(values))[None, :]
        return root.reshape(*logits.shape, logits.size), jnp.sign(values)


def centred_logits(logits: jax.Array, *targets: Any) -> jax.Array:
    """A head without labels: half the squared change of the logits, up to a constant added to all of them.

    Its Hessian ``I - 1 1^T / C`` is the same for every example, and its own square root: every example counts, where
    the softmax of a trained network is sure of most of them and leaves the curvature to a few.

    Args:
      logits: of one example, of any shape with at least two of them.
      targets: not used.

    Returns:
      S, ``(*logits.shape, logits.size)``.

    >>> centred_logits(jnp.zeros(2)).tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    return jnp.moveaxis(_centred_root_times(logits, jnp.eye(logits.size, dtype=logits.dtype)), 0, -1)


def _centred_root_times(logits: jax.Array, v: jax.Array) -> jax.Array:
    return (v - v.mean(1, keepdims=True)).reshape(-1, *logits.shape)


@dataclass(frozen=True)
class softened_softmax:
    """Softmax cross-entropy as if at a higher temperature T: the root of ``diag(p) - p p^T`` with p = softmax(z / T).

    A trained network is sure of nearly all training images, so that its softmax leaves the curvature to a few of them.
    A temperature spreads it over all (it is what distillation does, arXiv 1503.02531); `centred_logits` is the limit.

    Args:
      temperature: T, positive; 1 is `softmax_cross_entropy`. An instance is the head.

    Raises:
      ValueError: the temperature is not positive.

    >>> S = softened_softmax(4.0)(jnp.array([0.0, 8.0]))
    >>> p = jax.nn.softmax(jnp.array([0.0, 2.0]))
    >>> bool(jnp.allclose(S @ S.T, jnp.diag(p) - jnp.outer(p, p)))
    True
    """

    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {self.temperature}")

    def __call__(self, logits: jax.Array, *targets: Any) -> jax.Array:
        return softmax_cross_entropy(logits / self.temperature)

    def root_times(self, logits: jax.Array, v: jax.Array) -> jax.Array:
        """``S v`` for every row of ``v``, (K, C - 1) to (K, C)."""
        return _softmax_root_times(logits / self.temperature, v)


def has_gradient(head: Head, targets: tuple) -> bool:
    """Whether `loss_gradient` knows the head's loss, given what the batch holds."""
    return isinstance(head, second_derivative) or (head in (softmax_cross_entropy, squared_error) and len(targets) == 1)


def loss_gradient(head: Head, logits: jax.Array, targets: tuple) -> jax.Array:
    """The gradient of one example's loss with respect to its logits; where `has_gradient`."""
    if isinstance(head, second_derivative):
        return jax.grad(head.loss)(logits, *targets)
    (target,) = targets
    if head is softmax_cross_entropy and jnp.issubdtype(target.dtype, jnp.integer) and target.size == 1:
        target = jax.nn.one_hot(target.reshape(()), logits.size, dtype=logits.dtype)
    target = target.astype(logits.dtype).reshape(logits.shape)
    if head is squared_error:
        return 2 * (logits - target)
    return jax.nn.softmax(logits) * target.sum() - target


def require_targets(head: Head, targets: tuple, shape: tuple[int, ...]) -> None:
    """Raise a ValueError where the targets of `squared_error` do not have the ``shape`` of one example's logits."""
    if head is squared_error and len(targets) == 1 and math.prod(targets[0].shape[1:]) != math.prod(shape):
        raise ValueError(
            f"targets must have the shape of the logits, {shape} for one example; got {targets[0].shape[1:]}"
        )


@dataclass(frozen=True)
class weighted:
    """The head of a weighted mean: the last target of a batch is the weight of each example, 0 for padding.

    ``sum_i w_i l_i / sum_i w_i``, or ``/ n``. Class weights are weights of examples, ``class_weights[label]``.

    Args:
      head: of the loss l of one example.
      mean: what the sum is divided by: ``"weights"``, their sum over the batch (of several `Batches`, over each); or
        ``"examples"``, their number.

    >>> weighted(softmax_cross_entropy).mean
    'weights'
    """

    head: Head
    mean: Literal["weights", "examples"] = "weights"

    def __post_init__(self) -> None:
        if self.mean not in ("weights", "examples"):
            raise ValueError(f'mean must be "weights" or "examples"; got {self.mean!r}')


def shares_of(head: Head | weighted, targets: tuple, size: int, dtype) -> tuple[Head, tuple, jax.Array]:
    """The head of one example, its targets, and the share of each example's loss in that of the batch, (n,).

    Raises:
      ValueError: no weights for `weighted`, or targets that the head would ignore.
    """
    if isinstance(head, weighted):
        if not targets or jnp.shape(targets[-1]) != (size,) or jnp.issubdtype(targets[-1].dtype, jnp.integer):
            raise ValueError(
                "weighted(head) takes the last target of the batch for weights, one floating-point number per example, "
                '(x, *targets, weights) or "weight" in a dict; '
                f"the targets are {[f'{t.dtype}{list(t.shape)}' for t in targets]}"
            )
        *others, weights = targets
        weights = jnp.asarray(weights).astype(dtype)
        shares = weights / (weights.sum() if head.mean == "weights" else size)
        head, targets = head.head, tuple(others)
    else:
        shares = jnp.full(size, 1 / size, dtype)
    if head in (softmax_cross_entropy, squared_error) and len(targets) > 1:
        raise ValueError(
            f"{getattr(head, '__name__', head)} takes one target, but the batch has {len(targets)} after x. "
            f"If the last are weights of the examples, use head=weighted({getattr(head, '__name__', head)})"
        )
    return head, targets, shares


def curvature_shares(head: Head, targets: tuple, shares: jax.Array) -> jax.Array:
    """``shares`` times what the head's root leaves out: soft labels of sum s have s times the Hessian of a label."""
    if head is softmax_cross_entropy and targets and jnp.ndim(targets[0]) == 2:
        return shares * targets[0].astype(shares.dtype).sum(1)
    return shares


def loss_shares(head: Head | weighted, batch: PyTree, dtype) -> np.ndarray:
    """The share of each example's loss in that of the batch, (n,); of several batches, in each by itself."""
    parts, size = batch if isinstance(batch, Batches) else [batch], batch_size(batch)
    found = []
    for part in parts:
        targets = jax.tree.map(jnp.asarray, inputs_and_targets(part)[1])
        found.append(np.asarray(shares_of(head, targets, batch_size(part), dtype)[2]) * (batch_size(part) / size))
    return np.concatenate(found)


def square_shares(head: Head | weighted, batch: PyTree, classes: int, dtype) -> np.ndarray:
    """With what share the square of each example counts, (n,); of several batches, in each by itself.

    Raises:
      ValueError: targets that do not fit the head and ``classes``, the logits of an example; a share is not finite.
    """
    parts, size = batch if isinstance(batch, Batches) else [batch], batch_size(batch)
    found, start = [], 0
    for part in parts:
        count, targets = batch_size(part), jax.tree.map(jnp.asarray, inputs_and_targets(part)[1])
        inner, targets, shares = shares_of(head, targets, count, dtype)
        _require_labels(inner, targets, shares, classes, start)
        found.append(np.asarray(curvature_shares(inner, targets, shares)) * (count / size))
        start += count
    shares = np.concatenate(found).astype(dtype)
    if not np.isfinite(shares).all():
        raise ValueError("the weights of the examples are not finite, or their sum is 0")
    return shares


def _require_labels(head: Head, targets: tuple, shares: jax.Array, classes: int, start: int) -> None:
    """Raise a ValueError unless the targets of softmax cross-entropy are labels or probabilities of the classes."""
    if head is not softmax_cross_entropy or not targets:
        return
    (labels,) = (np.asarray(target) for target in targets)
    if labels.shape[1:] == (classes,):
        return
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            "labels of softmax_cross_entropy are integers, one per example, or probabilities of the "
            f"{classes} classes; got shape {labels.shape}, dtype {labels.dtype}"
        )
    outside = np.flatnonzero(((labels < 0) | (labels >= classes)) & (np.asarray(shares) != 0))
    if outside.size:
        first = outside[0]
        raise ValueError(
            f"the label of example {start + first} is {labels[first]}, but there are {classes} classes. If it marks an "
            "example that does not count, give it the weight 0 with head=weighted(softmax_cross_entropy)"
        )


def inputs_and_targets(batch: PyTree) -> tuple[PyTree, tuple]:
    """What the model reads of a batch, and what is handed to the head."""
    if isinstance(batch, Batches):
        batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batch)
    if isinstance(batch, tuple | list):
        return batch[0], tuple(batch[1:])
    if isinstance(batch, Mapping):
        names = [name for name in ("image", "x") if name in batch]
        if len(names) != 1:
            raise ValueError(f'a batch that is a dict needs "image" or "x"; it has {sorted(batch)}')
        return batch[names[0]], tuple(batch[name] for name in ("label", "weight") if name in batch)
    return batch, ()


def root_of(head: Head, logits: jax.Array, targets: tuple, random: bool = False) -> tuple[jax.Array, jax.Array]:
    """The head's columns first: (R, *logits.shape), and their signs (R,).

    Raises:
      ValueError: the head cannot be called with these targets, or returns another shape; it returns signs, and random
        combinations of its columns are wanted.
    """
    _require_arguments(head, targets)
    found = head(logits, *targets)
    root, signs = found if isinstance(found, tuple) else (found, None)
    if random and signs is not None:
        raise ValueError(
            'the head returns signs, so its Hessian may be indefinite and has no random combinations: use classes="all"'
        )
    if root.shape[:-1] != logits.shape:
        raise ValueError(
            "the head must return (*logits.shape, R) for one example; "
            f"for logits {logits.shape} it returned {root.shape}"
        )
    root = jnp.moveaxis(root, -1, 0).astype(logits.dtype)
    return root, jnp.ones(root.shape[0], root.dtype) if signs is None else signs.astype(root.dtype)


def root_times(head: Head, logits: jax.Array, targets: tuple, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``S v`` for every row of ``v``, (K, R) to (K, *logits.shape), and the signs of the columns of S, (R,).

    For the heads of this module but `second_derivative` S, of C^2 numbers per example, is not formed.
    """
    if not forms_root(head):
        times = head.root_times if isinstance(head, softened_softmax) else _ROOT_TIMES[head]
        return times(logits, v), jnp.ones(v.shape[1:], v.dtype)
    root, signs = root_of(head, logits, targets)
    return jnp.tensordot(v, root, 1, precision="highest"), signs


_ROOT_TIMES: dict[Head, Callable[[jax.Array, jax.Array], jax.Array]] = {
    softmax_cross_entropy: _softmax_root_times,
    squared_error: _squared_root_times,
    centred_logits: _centred_root_times,
}


def forms_root(head: Head) -> bool:
    """Whether `root_times` has to form S."""
    return head not in _ROOT_TIMES and not isinstance(head, softened_softmax)


def _require_arguments(head: Head, targets: tuple) -> None:
    """Raise a ValueError unless the head can be called with logits and these targets."""
    function = head.loss if isinstance(head, second_derivative) else head
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not every callable tells
        return
    try:
        signature.bind(None, *targets)
    except TypeError as error:
        raise ValueError(
            f"the head is called with the logits and the {len(targets)} targets of the batch, but takes {signature}: "
            f'{error}. Targets are what follows x in a batch (x, *targets), or "label" in a dict'
        ) from None
