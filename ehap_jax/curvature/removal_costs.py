"""What removing a channel group costs, to second order: gates on groups, and the curvature of the loss in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax._random_key import random_key
from ehap_jax.curvature.chunk_memory import DEFAULT_BUDGET, bytes_of_passes
from ehap_jax.curvature.example_columns import (
    Columns,
    add_up,
    columns_of,
    count_draws,
    first_scale,
    head_roots,
    read_examples,
)
from ehap_jax.curvature.heads import (
    Head,
    loss_shares,
    second_derivative,
    softmax_cross_entropy,
    square_shares,
    weighted,
)
from ehap_jax.curvature.partial_sums import PartialSums, SumsFile
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.saved_trace import fingerprint
from ehap_jax.curvature.tapped_model import example_graph
from ehap_jax.graph import ChannelGroup, Graph, channel_groups
from ehap_jax.graph.gates import gated
from ehap_jax.graph.structure import Coupling

__all__ = ["RemovalCosts", "removal_costs"]

PyTree = Any


@dataclass(frozen=True, eq=False)
class RemovalCosts:
    """The second-order price of every channel group, and of several together.

    With gates m (1; 0 removes a group), J = ∂logits/∂m at m = 1 and S S^T the head's Hessian: G = mean over examples of
    (S^T J)^T (S^T J), and a = mean of (∂loss/∂logits) J. Removing the groups R costs about ½ 1ᵀ G_RR 1 − 1ᵀ a_R.

    Attributes:
      groups: those of ``channel_groups``, K of them. coupling: under which.
      second_order: (K,), the diagonal of G. second_order_sem: its standard error over examples.
      first_order: (K,), a; None where the head has no loss or the batch no targets. first_order_sem: likewise.
      first_order_squares: (K,), the mean of squares of one example's a: the empirical Fisher information of a gate.
      rows: F with ``G = F^T diag(signs) F``, where that is smaller than G; or G itself, (K, K).
      signs: of the rows, or None where ``rows`` is G.
      examples: how many. combinations: random ones of the head's columns per example, 0 for every column.
      criterion, provenance: what a plan says of them.
    """

    groups: tuple[ChannelGroup, ...]
    coupling: Coupling
    second_order: np.ndarray
    second_order_sem: np.ndarray
    first_order: np.ndarray | None
    first_order_sem: np.ndarray | None
    first_order_squares: np.ndarray | None
    rows: np.ndarray
    signs: np.ndarray | None
    examples: int
    combinations: int
    criterion: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prices(self) -> np.ndarray:
        """(K,): ½ G_gg, what removing one group costs. Second order alone: the gradient of a trained network is noise
        of the batch, and prices with it rank worse (docs/removal_costs.md)."""
        return 0.5 * self.second_order

    def interactions(self, group: int) -> np.ndarray:
        """(K,): G_g, by how much the price of every other group rises once ``group`` is gone."""
        if self.signs is None:
            return self.rows[group]
        return (self.rows[:, group] * self.signs) @ self.rows

    def gram(self) -> np.ndarray:
        """(K, K): G, in full."""
        if self.signs is None:
            return self.rows
        return (self.rows * self.signs[:, None]).T @ self.rows

    def of(self, removed: Sequence[int], *, first_order: bool = False) -> float:
        """The estimated change of the loss when the groups ``removed``, by position, go together.

        Raises:
          ValueError: ``first_order`` is asked for and unknown; ``removed`` is a mask, or names a group twice.
        """
        chosen = np.asarray(removed)
        if chosen.dtype == bool or len(np.unique(chosen)) < len(chosen):
            raise ValueError("removed takes the positions of groups, each once; of a mask give np.flatnonzero(mask)")
        chosen = chosen.astype(int)
        if self.signs is None:
            second = self.rows[np.ix_(chosen, chosen)].sum()
        else:
            second = float(self.signs @ np.square(self.rows[:, chosen].sum(1)))
        if not first_order:
            return 0.5 * float(second)
        if self.first_order is None:
            raise ValueError(
                "the first order is unknown: it needs a batch (x, labels) and a head that has a loss, such as "
                "softmax_cross_entropy"
            )
        return 0.5 * float(second) - float(self.first_order[chosen].sum())


def removal_costs(
    model: Callable[[PyTree, PyTree], jax.Array],
    variables: PyTree,
    batch: PyTree,
    *,
    head: Head | weighted = softmax_cross_entropy,
    classes: Literal["all"] | int = "all",
    key: jax.Array | None = None,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    coupling: Coupling = "group",
    microbatch: int | None = None,
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
    save_to: str | Path | None = None,
    save_every: float = 30.0,
    on_unknown: Literal["error", "freeze"] = "error",
    progress: Callable[[int, int], None] | None = None,
) -> RemovalCosts:
    """The exact second-order cost of removing every channel group of a network, for one backward pass per class.

    A gate on every group of ``channel_groups`` multiplies the group's activation wherever it is read. The costs are the
    Gauss-Newton matrix of the loss in these gates, and its gradient. No kernel is differentiated, nothing needs to be
    piecewise linear, and any network will do that the structure engine knows. The same family as Group Fisher Pruning
    (arXiv 2108.00708), which takes squares of the gradient with labels in place of the Hessian of the head, and SOSP
    (arXiv 2110.11395), which looks at correlations between structures, too.

    Args:
      model: ``model(variables, x) -> logits`` in eval mode, with the examples on the first axis of both.
      variables: pytree of arrays; may hold running statistics.
      batch: x itself, or ``(x, *targets)``, or a dict with ``"image"`` or ``"x"``, and perhaps ``"label"``. Training
        images, not augmented. Targets are needed for the first order only.
      head: as in `gauss_newton_trace`: `softmax_cross_entropy`, `softened_softmax(T)`, `centred_logits`,
        `squared_error`, ``second_derivative(loss)``, ``weighted(head)``, or your own.
      classes: ``"all"`` for every column of the head's root: exact. K for K random ±1 combinations of them per example:
        unbiased, and as fast as K classes.
      key: with K, the random key.
      policy: the numerical precision of the passes; sums over examples are in float64.
      coupling: of the groups, as in ``allocate``.
      microbatch: examples at a time; by default as many as ``memory_budget`` allows, 16 at most on CPU.
      memory_budget: bytes that intermediate arrays of a chunk may take, by estimate, and the result as well; by
        default 1 GiB each.
      mesh: devices of this process to divide the examples over, along the mesh's axis ``"data"``.
      save_to: a file for the sums so far, written about every ``save_every`` seconds; a run goes on from it.
      save_every: seconds between two writes.
      on_unknown: as in ``trace_graph``.
      progress: called as ``progress(examples done, examples)`` after every chunk.

    Returns:
      `RemovalCosts`, which ``allocate`` takes in place of scores.

    Raises:
      ValueError: no group can be removed; the examples are not independent (a network in training mode); the head does
        not fit the logits or the targets, or is indefinite and ``classes`` is not ``"all"``; labels out of range; NaN
        or infinity, or a kernel or batch that vanishes in 16 bits, named by path; ``memory_budget`` is too small for a
        chunk or the result; ``save_to`` is of something else; options out of range.
      TypeError: the model does not return one floating-point array.
      UnknownPrimitiveError: an operation without a rule.
      FloatingPointError: a cost is not finite, in float16 at the smallest scale.

    >>> model = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
    >>> w = {"in": jnp.eye(2), "out": jnp.array([[1.0], [2.0]])}
    >>> from ehap_jax.curvature import squared_error
    >>> costs = removal_costs(model, w, jnp.array([[3.0, 4.0]]), head=squared_error)
    >>> costs.prices.round(3).tolist(), round(costs.of([0, 1]), 3)
    ([9.0, 64.0], 121.0)
    """
    key = None if key is None else random_key(key)
    draws = count_draws(classes, "signs", key, head)
    examples = read_examples(variables, batch, policy, mesh, head)
    graph = example_graph(model, examples.params, examples.x, on_unknown)
    groups = channel_groups(graph, coupling=coupling)
    if not groups:
        raise ValueError(
            f'no channel group of this network can be removed under coupling="{coupling}"; explain(graph) says why'
        )
    shape = graph.body.outputs[0].shape[1:]
    shares, weights = square_shares(head, batch, math.prod(shape), policy.sums), loss_shares(head, batch, policy.sums)
    if (shares < 0).any():
        raise ValueError(f"the weight of example {int(np.argmin(shares))} is negative: no mean of examples")
    columns = columns_of(examples, shape, policy, draws, "signs", gradient=True)
    size, count = examples.size, len(groups)
    by_rows = size * columns.squared < count
    _require_budget(min(size * columns.squared, count), count, memory_budget)
    key = jax.random.key(0) if key is None else key
    sums = PartialSums(
        {
            "rows": (size * columns.squared, count) if by_rows else (count, count),
            "signs": (size * columns.squared if by_rows else 0,),
            "second": (2, count),
            "first": (3, count),
        },
        first_scale(policy),
    )
    add_up(
        model,
        partial(_chunk, _Plan(graph, coupling, columns, count)),
        _Adder(sums, columns, by_rows, size * np.asarray(shares), size * weights),
        examples,
        columns,
        sums,
        shares=shares,
        what="the removal cost",
        each=_bytes_per_example(graph, columns, count, policy),
        key=key,
        policy=policy,
        microbatch=microbatch,
        memory_budget=memory_budget,
        mesh=mesh,
        file=SumsFile(
            save_to,
            _made_from(model, head, variables, batch, key, policy, draws, coupling) if save_to is not None else None,
            save_every,
        ),
        progress=progress,
    )
    second, second_sem = _mean_and_sem(sums.by_path["second"], size)
    first, first_sem = _mean_and_sem(sums.by_path["first"][:2], size)
    name = _name_of(head)
    return RemovalCosts(
        groups=groups,
        coupling=coupling,
        second_order=second,
        second_order_sem=second_sem,
        first_order=first if columns.gradient else None,
        first_order_sem=first_sem if columns.gradient else None,
        first_order_squares=sums.by_path["first"][2] / size if columns.gradient else None,
        rows=sums.by_path["rows"] / (math.sqrt(size) if by_rows else size),
        signs=sums.by_path["signs"] if by_rows else None,
        examples=size,
        combinations=draws,
        criterion=f"removal cost, {name}",
        provenance={"head": name, "examples": size}
        | ({"combinations": draws} if draws else {})
        | ({"compute": policy.compute} if policy.compute != "float32" else {}),
    )


@dataclass(frozen=True)
class _Plan:
    """Everything that is fixed at compile time; a graph is equal to itself alone, and is kept by `example_graph`."""

    graph: Graph
    coupling: Coupling
    columns: Columns
    groups: int


@lru_cache(maxsize=16)
def _gated(graph: Graph, coupling: Coupling) -> Callable:
    return gated(graph, coupling)


@partial(jax.jit, static_argnums=0)
def _chunk(plan: _Plan, leaves, x, targets, examples, weights, key, start, scale):
    """``{"rows": (n, columns, groups), "signs": (n, columns)}`` of a chunk, and its logits (n, ...)."""
    run = _gated(plan.graph, plan.coupling)
    inputs = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[:, None], x))
    sums = jnp.dtype(plan.columns.sums)

    def one(gates, example):
        (logits,) = run(gates, [*leaves, *example])
        return logits[0]

    gates = jnp.ones((len(weights), plan.groups), sums)
    logits, pull = jax.vjp(lambda gates: jax.vmap(one)(gates, inputs), gates)
    columns, signs, unscale = plan.columns.scaled(logits, targets, examples, key, start, scale)
    (rows,) = jax.vmap(pull)(columns)
    return {"rows": jnp.swapaxes(rows * unscale[..., None], 0, 1), "signs": signs.T}, logits


def _name_of(head: Any) -> str:
    """The same in every process, so that plans are."""
    if isinstance(head, weighted):
        return f"weighted {_name_of(head.head)}"
    if isinstance(head, second_derivative):
        return f"second derivative of {_name_of(head.loss)}"
    return getattr(head, "__name__", None) or (str(head) if " at 0x" not in repr(head) else type(head).__name__)


class _Adder:
    """Adds the columns of a chunk's examples to the sums, part by part, as they come."""

    def __init__(
        self, sums: PartialSums, columns: Columns, by_rows: bool, square_weights: np.ndarray, weights: np.ndarray
    ) -> None:
        """The weights of the examples are 1 in a plain mean: those of the root's squares, and those of gradients."""
        self.sums, self.columns, self.by_rows = sums.by_path, columns, by_rows
        self.square_weights, self.weights = square_weights.astype(np.float64), weights.astype(np.float64)
        self.own = np.zeros(())

    def __call__(self, examples: range, start: int, found: Mapping[str, np.ndarray]) -> None:
        """``found``: "rows" (n, columns, groups) and "signs" (n, columns) of the columns from ``start`` on."""
        rows, signs = found["rows"][: len(examples)], found["signs"][: len(examples)]
        squared, stop = self.columns.squared, start + rows.shape[1]
        if self.columns.gradient and start <= squared < stop:
            self._add_gradient(self.weights[examples.start : examples.stop, None], rows[:, squared - start])
        kept = max(min(squared, stop) - start, 0)
        self._add_squares(examples, start, rows[:, :kept], signs[:, :kept])
        if stop >= self.columns.count:
            self.sums["second"] += np.stack([self.own.sum(0), np.square(self.own).sum(0)])

    def _add_gradient(self, weights: np.ndarray, gradient: np.ndarray) -> None:
        weighted_gradient = weights * gradient
        squares = (weights * np.square(gradient)).sum(0)
        self.sums["first"] += np.stack([weighted_gradient.sum(0), np.square(weighted_gradient).sum(0), squares])

    def _add_squares(self, examples: range, start: int, rows: np.ndarray, signs: np.ndarray) -> None:
        rows = rows * np.sqrt(self.square_weights[examples.start : examples.stop, None, None])
        if self.columns.draws:  # a mean over combinations
            rows = rows / math.sqrt(self.columns.squared)
        own = np.einsum("nrk,nr->nk", np.square(rows), signs)
        self.own = own if start == 0 else self.own + own
        if self.by_rows:
            places = (len(self.weights), self.columns.squared)
            columns = slice(start, start + rows.shape[1])
            self.sums["rows"].reshape(*places, -1)[examples.start : examples.stop, columns] = rows
            self.sums["signs"].reshape(places)[examples.start : examples.stop, columns] = signs
        else:
            flat = rows.reshape(-1, rows.shape[-1])
            self.sums["rows"] += (flat * signs.reshape(-1)[:, None]).T @ flat


def _mean_and_sem(sums: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of ``size`` numbers whose sum and sum of squares are given; the error of a single one is unknown, NaN."""
    mean = sums[0] / size
    if size == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, np.sqrt(np.maximum(sums[1] / size - np.square(mean), 0) / (size - 1))


def _require_budget(rows: int, groups: int, memory_budget: int | None) -> None:
    needed, budget = rows * groups * 8, DEFAULT_BUDGET if memory_budget is None else memory_budget
    if needed > budget:
        raise ValueError(
            f"the costs of {groups} groups and their interactions take {needed} bytes, more than memory_budget="
            f"{budget}. Raise it, give fewer examples, or combine the classes: classes=1, key=jax.random.key(0)"
        )


def _bytes_per_example(graph: Graph, columns: Columns, groups: int, policy: Policy) -> int:
    """Passes, the gates' own products at the widest read, and the rows."""
    rows = groups * columns.together * jnp.dtype(policy.sums).itemsize
    return bytes_of_passes(graph.body, columns.together, columns.formed, policy) + 2 * rows


def _made_from(model, head: Head | weighted, variables, batch, key, policy: Policy, draws: int, coupling: Coupling):
    roots = fingerprint(partial(head_roots, model, head, policy), variables, batch, key=key, policy=policy)
    return replace(roots, probes=f"removal costs {draws or 'all'} {coupling}")
