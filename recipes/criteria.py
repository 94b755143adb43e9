"""Channel scores by the name of their criterion, as a stage of a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from ehap_jax.curvature import (
    Policy,
    ProductMemory,
    RemovalCosts,
    TraceEstimate,
    channel_trace,
    gauss_newton_trace,
    piecewise_linear_kernels,
    product_memory,
    removal_costs,
    softened_softmax,
)
from ehap_jax.data import Dataset
from ehap_jax.graph import Graph
from ehap_jax.graph.structure import Coupling
from ehap_jax.pruning import (
    Scores,
    fisher_scores,
    hessian_scores,
    magnitude_scores,
    random_scores,
    taylor_scores,
)
from ehap_jax.report import Convergence
from ehap_jax.training import all_devices
from recipes.lab import Lab, evaluation_loss, training_batch

Criterion = Literal["removal", "hessian", "magnitude", "taylor", "fisher", "random"]
Compute = Literal["float32", "bfloat16", "float16"]

TEMPERATURE = 4.0
"""Of the softmax whose curvature prices removals; the best on validation images (docs/removal_costs.md)."""


@dataclass(frozen=True)
class ScoreConfig:
    """On what, and how, scores are computed."""

    examples: int = 512
    """Training images, not augmented, of every score that needs some; which ones is the seed's choice."""
    estimator: Literal["auto", "exact", "probes"] = "auto"
    """Hessian traces: exact, an error where that is not proven to be the Hessian's; by Hutchinson probes; or exact for
    the kernels for which it is proven, and by probes of what is left for the others."""
    probes: int = 300
    compute: Compute = "float32"
    """Precision of Hessian traces and removal costs."""
    microbatch: int | None = 128
    """Images that traces differentiate at a time; all of them where it is None."""


def check_scores(dataset: Dataset, config: ScoreConfig, option: str) -> None:
    """Everything that can be wrong with the settings, before any work starts; `option` begins the names of theirs.

    Raises:
        ValueError: naming the option.
    """
    total = len(dataset.x_train)
    if not 1 <= config.examples <= total:
        raise ValueError(f"{option}.examples: {config.examples} images are not between 1 and the {total} for training")
    if config.probes < 1:
        raise ValueError(f"{option}.probes must be at least 1, got {config.probes}")
    if config.microbatch is not None and config.microbatch < 1:
        raise ValueError(f"{option}.microbatch must be at least 1, or None, got {config.microbatch}")


def channel_scores(
    lab: Lab,
    seed: int,
    criterion: Criterion,
    graph: Graph,
    apply: Callable,
    variables: Any,
    config: ScoreConfig,
    label: str = "trace",
    *,
    coupling: Coupling = "group",
) -> Scores | RemovalCosts:
    """Scores of every channel of ``apply(variables, x)``, or the prices of its channel groups.

    What takes long is kept in the run under `label`, and taken up again. `coupling` says what a group is.
    """
    if criterion == "magnitude":
        return magnitude_scores(graph, variables)
    if criterion == "random":
        return random_scores(graph, key=jax.random.key(3000 + seed))
    if criterion == "hessian":
        return hessian_scores(graph, variables, hessian_trace(lab, seed, graph, apply, variables, config, label))
    batch, loss = training_batch(lab.dataset, config.examples, seed), evaluation_loss(apply)
    if criterion == "removal":
        return prices(lab, seed, apply, variables, batch, config, coupling, label)
    if criterion == "taylor":
        return taylor_scores(graph, variables, loss, batch)
    return fisher_scores(graph, variables, loss, batch, microbatch=config.microbatch)


def prices(
    lab: Lab,
    seed: int,
    apply: Callable,
    variables: Any,
    batch: tuple[jax.Array, jax.Array],
    config: ScoreConfig,
    coupling: Coupling,
    label: str,
) -> RemovalCosts:
    """What removing each channel group costs; kept in the run under `label`, and taken up again."""
    with lab.progress.counted(f"seed {seed}: removal costs", len(batch[1])) as report:
        return removal_costs(
            apply,
            variables,
            batch,
            head=softened_softmax(TEMPERATURE),
            coupling=coupling,
            policy=Policy(config.compute),
            mesh=all_devices("data"),
            save_to=lab.run.file(f"seed{seed}/{label}_removal_{coupling}_{config.compute}.npz"),
            progress=report,
        )


def hessian_trace(
    lab: Lab,
    seed: int,
    graph: Graph,
    apply: Callable,
    variables: Any,
    config: ScoreConfig,
    label: str = "trace",
) -> TraceEstimate:
    """The Hessian trace of every channel, exact or from probes that are the same for every precision."""
    batch = training_batch(lab.dataset, config.examples, seed)
    # Where every kernel is proven there are no probes to show, to save or to stop between.
    if config.estimator == "exact" or (config.estimator == "auto" and is_proven(graph)):
        with lab.progress.stage(f"seed {seed}: exact trace", 1) as advance:
            policy, mesh = Policy(config.compute), all_devices("data")
            trace = gauss_newton_trace(apply, variables, batch, graph=graph, policy=policy, mesh=mesh)
            advance()
        return trace
    method = "auto" if config.estimator == "auto" else "hutchinson"
    return probed_trace(lab, seed, apply, variables, batch, config, label, method=method, graph=graph)


def is_proven(graph: Graph) -> bool:
    """Whether the exact trace is proven to be the Hessian's for every kernel."""
    return all(verdict is True for verdict in piecewise_linear_kernels(graph).values())


def probed_trace(
    lab: Lab,
    seed: int,
    apply: Callable,
    variables: Any,
    batch: tuple[jax.Array, jax.Array],
    config: ScoreConfig,
    label: str = "trace",
    *,
    method: str = "hutchinson",
    graph: Graph | None = None,
) -> TraceEstimate:
    """The estimate of `channel_trace`, saved as it goes and resumed from its file; its course is kept beside it.

    Raises:
        OutOfTime: the lab's deadline has passed; the probes so far are saved.
    """
    course = Course(lab, seed, f"{label}_{config.compute}")
    with lab.progress.counted(f"seed {seed}: trace {config.compute}", config.probes) as report:

        def stop(now: TraceEstimate) -> bool:
            course.add(now)
            return lab.deadline.passed

        trace = channel_trace(
            evaluation_loss(apply),
            variables,
            batch,
            key=jax.random.key(2000 + seed),
            num_probes=config.probes,
            method=method,
            model=apply,
            graph=graph,
            policy=Policy(config.compute),
            probes_per_step=max(config.probes // 20, 1),
            microbatch=config.microbatch,
            mesh=all_devices("probe"),
            save_to=lab.run.file(f"seed{seed}/{label}_{config.compute}.npz"),
            progress=report,
            until=stop,
        )
    course.add(trace)
    if int(trace.count) < config.probes:
        lab.deadline.check(f"{int(trace.count)} of {config.probes} probes in {config.compute}")
    return trace


def probe_bytes(apply: Callable, variables: Any, batch: tuple[jax.Array, jax.Array], config: ScoreConfig) -> int:
    """Bytes on the device at the peak of a probe of `probed_trace`, by the compiler (see `product_memory`)."""
    found = probe_memory(apply, variables, batch, config)
    return found.needs[found.product]


def probe_memory(
    apply: Callable, variables: Any, batch: tuple[jax.Array, jax.Array], config: ScoreConfig
) -> ProductMemory:
    """How a probe of `probed_trace` computes its product, and what that needs."""
    policy = Policy(config.compute)
    mesh = all_devices("probe")
    return product_memory(
        evaluation_loss(apply), variables, batch, policy=policy, microbatch=config.microbatch, mesh=mesh
    )


class Course:
    """The running estimate of the total trace, in a file of the run that a resumed one goes on with.

    Attributes:
      seconds_per_probe: None before two points of one process.
      load_average: of the machine over the minute before that was taken; None without it.
    """

    def __init__(self, lab: Lab, seed: int, trace: str) -> None:
        self._run, self._name = lab.run, f"seed{seed}/{trace}_convergence.json"
        found: dict[str, Any] = {"points": []}
        if lab.run.file(self._name).exists():
            found = lab.run.read_json(self._name)
        self._points = {count: (mean, float(sem)) for count, mean, sem in found["points"]}
        self._clock: list[tuple[int, float]] = []
        self.seconds_per_probe: float | None = found.get("seconds_per_probe")
        self.load_average: float | None = found.get("load_average")

    @property
    def machine_shared(self) -> bool | None:
        """Whether other programs used the machine when probes were timed; None where that is not known."""
        return None if self.load_average is None else self.load_average > 1.5 * (os.cpu_count() or 1)

    def add(self, now: TraceEstimate) -> None:
        """One more point. Time is counted from the first one of this process, when everything has been compiled."""
        count = int(now.count)
        self._points[count] = (now.total(), now.total_sem())
        self._clock.append((count, time.perf_counter()))
        (first, started), (last, ended) = self._clock[0], self._clock[-1]
        if last > first:
            self.seconds_per_probe = (ended - started) / (last - first)
            self.load_average = os.getloadavg()[0]
        points = [(number, *point) for number, point in sorted(self._points.items())]
        timed = {"seconds_per_probe": self.seconds_per_probe, "load_average": self.load_average}
        self._run.write_json(self._name, {"points": points, **timed})

    def convergence(self) -> Convergence:
        """For the report."""
        probes, points = zip(*sorted(self._points.items()), strict=True)
        mean, sem = zip(*points, strict=True)
        return Convergence(np.array(probes), np.array(mean), np.array(sem))
