"""From a dense network to a pruned and fine-tuned one, as a stage of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax

from ehap_jax.curvature import RemovalCosts
from ehap_jax.data import Dataset
from ehap_jax.graph import Graph
from ehap_jax.graph.structure import Coupling
from ehap_jax.pruning import (
    PruningPlan,
    Scores,
    allocate,
    cubic,
    kept_fractions,
    linear,
    prune_iteratively,
    random_scores,
    recalibrate,
    shrink,
    shrink_variables,
)
from recipes.criteria import Criterion, ScoreConfig, channel_scores, check_scores
from recipes.lab import Lab, Phase, check_phases, compare_masked, train, training_batch
from recipes.network import Network

Budget = Literal["params", "macs", "bytes", "channels"]
Schedule = Literal["linear", "cubic"]


@dataclass(frozen=True)
class TargetConfig:
    """How much is kept, and on what scores are computed."""

    budget: Budget = "params"
    """What the fraction is of."""
    keep: float = 0.5
    """The fraction that is kept."""
    coupling: Coupling = "union"
    max_layer_ratio: float = 0.95
    """No layer loses more than this share of its channels."""
    round_to: int = 1
    """Widths become multiples of it."""
    scores: ScoreConfig = field(default_factory=ScoreConfig)

    def limits(self) -> dict[str, Any]:
        """The options of `allocate` but for the budget."""
        return {"coupling": self.coupling, "max_layer_ratio": self.max_layer_ratio, "round_to": self.round_to}


@dataclass(frozen=True)
class PruneConfig(TargetConfig):
    """What goes, how much, and in how many steps; by default what docs/removal_costs.md found to be best."""

    coupling: Coupling = "group"
    criterion: Criterion = "removal"
    per_unit: bool = True
    """Rank by score per unit of the budget that removal saves; channels have no such unit."""
    recalibrate: int = 1024
    """Training images from which BatchNorm statistics are estimated again after pruning; 0 keeps those there are."""
    steps: int = 1
    """1 prunes at once; more prune step by step."""
    schedule: Schedule = "cubic"
    """How the kept fraction falls over the steps."""
    between: Phase = field(default_factory=lambda: Phase(epochs=1, learning_rate=0.01))
    """Training between two steps."""

    def limits(self) -> dict[str, Any]:
        per = self.budget if self.per_unit and self.budget != "channels" else None
        return {**super().limits(), "per": per}


def paper_pruning(**options: Any) -> PruneConfig:
    """As HAP and EHAP prune (arXiv 2101.08940, 2306.07030): Hessian traces, union coupling, and nothing else."""
    paper = {"criterion": "hessian", "coupling": "union", "per_unit": False, "recalibrate": 0}
    return PruneConfig(**{**paper, **options})


class Pruned(NamedTuple):
    """The shrunk network before any fine-tuning, what decided it, and the largest relative difference between its

    logits and those of the masked dense network."""

    network: Network
    scores: Scores | RemovalCosts
    plan: PruningPlan
    masked_error: float


def plan_of(graph: Graph, scores: Scores | RemovalCosts, config: TargetConfig) -> PruningPlan:
    """The plan the whole budget asks for at once."""
    target: Mapping[str, Any] = {config.budget: config.keep}
    return allocate(graph, scores, **target, **config.limits())


def check_target(dataset: Dataset, graph: Graph, config: TargetConfig, option: str, *criteria: Criterion) -> None:
    """Everything that can be wrong with pruning at once by these criteria, before any work starts.

    Raises:
        ValueError: naming the option, which begins with `option`, or the target that is out of reach.
    """
    if not {*criteria} <= {"magnitude", "random"}:
        check_scores(dataset, config.scores, f"{option}.scores")
    # Any scores allow the same range, so a target that is out of reach shows at once.
    plan_of(graph, random_scores(graph, key=jax.random.key(0)), config)


def check_pruning(
    dataset: Dataset, graph: Graph, config: PruneConfig, *criteria: Criterion, option: str = "--prune"
) -> None:
    """Everything that can be wrong with a pruning, before any work starts; by other criteria where some are given.

    Raises:
        ValueError: naming the option, or the target that is out of reach.
    """
    if config.steps < 1:
        raise ValueError(f"{option}.steps must be at least 1, got {config.steps}")
    if config.recalibrate < 0:
        raise ValueError(f"{option}.recalibrate is a number of images, or 0, got {config.recalibrate}")
    if config.steps > 1:
        check_phases(dataset, {f"{option}.between": config.between})
    fractions_of(config)
    check_target(dataset, graph, config, option, *(criteria or (config.criterion,)))


def fractions_of(config: PruneConfig) -> tuple[float, ...]:
    """What is kept after each step."""
    return kept_fractions(config.keep, config.steps, schedule={"linear": linear, "cubic": cubic}[config.schedule])


def prune_network(lab: Lab, seed: int, network: Network, graph: Graph, config: PruneConfig, prefix: str = "") -> Pruned:
    """Score, allocate and shrink: at once, or step by step with training in between.

    `prefix` begins the names under which the run keeps the steps: a run that prunes several times with one seed
    names each. Probes of the dense network are the same for all of them, and have no prefix.
    """
    fractions = fractions_of(config)
    full, scored = network.variables, []

    def score(variables) -> Scores | RemovalCosts:
        nonlocal full
        label = f"{prefix}step{len(scored) + 1}_trace" if scored else "trace"
        full = variables
        given = (config.criterion, graph, network.apply, variables, config.scores)
        scored.append(channel_scores(lab, seed, *given, label, coupling=config.coupling))
        return scored[-1]

    def recalibrated_again(variables):
        nonlocal full
        full = recalibrated(lab.dataset, network, variables, full, config.recalibrate)
        return full

    def train_between(plan: PruningPlan, variables, number: int):
        if number + 1 == len(fractions):
            return variables
        stage = f"{prefix}step{number + 1}"
        return train(lab, stage, seed, shrink(network.train_apply, plan), variables, config.between)

    plan, _ = prune_iteratively(
        graph,
        network.variables,
        fractions,
        score=score,
        train=train_between,
        recalibrate=recalibrated_again if config.recalibrate and "batch_stats" in network.variables else None,
        budget=config.budget,
        **config.limits(),
    )
    return shrink_network(lab, network._replace(variables=full), scored[-1], plan)


def recalibrated(dataset: Dataset, network: Network, masked: Any, trained: Any, images: int) -> Any:
    """Masked variables with statistics moved as pruning moved those of the first training images.

    `trained` are the variables before the mask.
    """
    batches = _statistics_batches(dataset, images)
    return recalibrate(network.train_apply, masked, batches, relative_to=trained)


@lru_cache(maxsize=1)
def _statistics_batches(dataset: Dataset, images: int) -> tuple[jax.Array, ...]:
    """Training images as in evaluation, in batches of 256; the rest of the division is left out."""
    x, _ = training_batch(dataset, min(images, len(dataset.x_train)))
    return tuple(x[start : start + 256] for start in range(0, len(x) - len(x) % 256 or 1, 256))


def shrink_network(lab: Lab, network: Network, scores: Scores | RemovalCosts, plan: PruningPlan) -> Pruned:
    """The network with a plan applied, proven equal to the masked one."""
    small = Network(
        network.architecture,
        shrink(network.apply, plan),
        shrink(network.train_apply, plan),
        shrink_variables(network.variables, plan),
        plan,
    )
    error = compare_masked(lab, network.apply, network.variables, plan, small.apply, small.variables)
    return Pruned(small, scores, plan, error)


def finetune(
    lab: Lab, seed: int, network: Network, phase: Phase, dense: Network | None = None, stage: str = "finetuned"
) -> Network:
    """Train a network on from its weights, with the dense one as its teacher where the phase distils."""
    teacher = None if dense is None else (dense.apply, dense.variables)
    trained = train(lab, stage, seed, network.train_apply, network.variables, phase, dense=teacher)
    return network._replace(variables=trained)
