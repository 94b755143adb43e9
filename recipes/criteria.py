"""Channel scores by the name of their criterion, as a stage of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ehap_jax.curvature import Policy, TraceEstimate, channel_trace, gauss_newton_trace, piecewise_linear_kernels
from ehap_jax.graph import Graph
from ehap_jax.pruning import (
    Scores,
    fisher_scores,
    hessian_scores,
    magnitude_scores,
    random_scores,
    taylor_scores,
)
from ehap_jax.report import Convergence
from recipes.lab import Lab, evaluation_loss, training_batch

Criterion = Literal["hessian", "magnitude", "taylor", "fisher", "random"]


@dataclass(frozen=True)
class ScoreConfig:
    """On what, and how, scores are computed."""

    examples: int = 512
    """Training images, not augmented, for Hessian, Taylor and Fisher; which ones is the seed's choice."""
    estimator: Literal["auto", "exact", "probes"] = "auto"
    """Hessian traces: exact, by Hutchinson probes, or exact where that is proven to be the Hessian's."""
    probes: int = 300
    compute: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the Hessian traces."""
    microbatch: int | None = 128
    """Images that are differentiated at a time; all of them where it is None."""


def channel_scores(
    lab: Lab, seed: int, criterion: Criterion, graph: Graph, apply: Callable, variables: Any, config: ScoreConfig
) -> Scores:
    """Scores of every channel of ``apply(variables, x)``; a Hessian trace is kept in the run and taken up again."""
    if criterion == "magnitude":
        return magnitude_scores(graph, variables)
    if criterion == "random":
        return random_scores(graph, key=jax.random.key(3000 + seed))
    if criterion == "hessian":
        return hessian_scores(graph, variables, hessian_trace(lab, seed, graph, apply, variables, config))
    batch, loss = training_batch(lab.dataset, config.examples, seed), evaluation_loss(apply)
    if criterion == "taylor":
        return taylor_scores(graph, variables, loss, batch)
    return fisher_scores(graph, variables, loss, batch, microbatch=config.microbatch)


def hessian_trace(
    lab: Lab, seed: int, graph: Graph, apply: Callable, variables: Any, config: ScoreConfig
) -> TraceEstimate:
    """The Hessian trace of every channel, exact or from probes that are the same for every precision."""
    batch = training_batch(lab.dataset, config.examples, seed)
    if config.estimator == "exact" or (config.estimator == "auto" and is_proven(graph)):
        with lab.progress.stage(f"seed {seed}: exact trace", 1) as advance:
            trace = gauss_newton_trace(apply, variables, batch, policy=Policy(config.compute))
            advance()
        return trace
    return probed_trace(lab, seed, apply, variables, batch, config)


def is_proven(graph: Graph) -> bool:
    """Whether the exact trace is proven to be the Hessian's for every kernel."""
    return all(verdict is True for verdict in piecewise_linear_kernels(graph).values())


def probed_trace(
    lab: Lab, seed: int, apply: Callable, variables: Any, batch: tuple[jax.Array, jax.Array], config: ScoreConfig
) -> TraceEstimate:
    """Hutchinson's estimate, saved as it goes and resumed from its file; its course is kept beside it.

    Raises:
        OutOfTime: the lab's deadline has passed; the probes so far are saved.
    """
    course = Course.read(lab, seed, config.compute)
    with lab.progress.stage(f"seed {seed}: trace {config.compute}", config.probes) as advance:
        done = 0

        def progress(now: int, total: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        def stop(now: TraceEstimate) -> bool:
            course.add(now)
            return lab.deadline.passed

        trace = channel_trace(
            evaluation_loss(apply),
            variables,
            batch,
            key=jax.random.key(2000 + seed),
            num_probes=config.probes,
            policy=Policy(config.compute),
            probes_per_step=max(config.probes // 20, 1),
            microbatch=config.microbatch,
            save_to=lab.run.file(f"seed{seed}/trace_{config.compute}.npz"),
            progress=progress,
            until=stop,
        )
    course.add(trace)
    if int(trace.count) < config.probes:
        lab.deadline.check(f"{int(trace.count)} of {config.probes} probes in {config.compute}")
    return trace


class Course(NamedTuple):
    """The running estimate of the total trace, in a file of the run that a resumed one goes on with."""

    lab: Lab
    name: str
    points: dict[int, tuple[float, float]]

    @classmethod
    def read(cls, lab: Lab, seed: int, compute: str) -> Course:
        """What the run has so far."""
        name = f"seed{seed}/convergence_{compute}.json"
        rows = lab.run.read_json(name) if lab.run.file(name).exists() else []
        return cls(lab, name, {count: (mean, float(sem)) for count, mean, sem in rows})

    def add(self, now: TraceEstimate) -> None:
        """One more point."""
        self.points[int(now.count)] = (float(now.total()), float(now.total_sem()))
        self.lab.run.write_json(self.name, [(count, *point) for count, point in sorted(self.points.items())])

    def convergence(self) -> Convergence:
        """For the report."""
        probes, points = zip(*sorted(self.points.items()), strict=True)
        mean, sem = zip(*points, strict=True)
        return Convergence(np.array(probes), np.array(mean), np.array(sem))
