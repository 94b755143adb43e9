"""From a dense network to a pruned and fine-tuned one, as a stage of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax

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
    shrink,
    shrink_variables,
)
from recipes.criteria import Criterion, ScoreConfig, channel_scores, check_scores
from recipes.lab import Lab, Phase, check_phases, compare_masked, train
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


@dataclass(frozen=True)
class PruneConfig(TargetConfig):
    """What goes, how much, and in how many steps."""

    criterion: Criterion = "hessian"
    steps: int = 1
    """1 prunes at once; more prune step by step."""
    schedule: Schedule = "cubic"
    """How the kept fraction falls over the steps."""
    between: Phase = field(default_factory=lambda: Phase(epochs=1, learning_rate=0.01))
    """Training between two steps."""


class Pruned(NamedTuple):
    """The shrunk network before any fine-tuning, what decided it, and the largest relative difference between its

    logits and those of the masked dense network."""

    network: Network
    scores: Scores
    plan: PruningPlan
    masked_error: float


def plan_of(graph: Graph, scores: Scores, config: TargetConfig) -> PruningPlan:
    """The plan the whole budget asks for at once."""
    target: Mapping[str, Any] = {config.budget: config.keep}
    return allocate(graph, scores, **target, **_limits(config))


def _limits(config: TargetConfig) -> dict[str, Any]:
    return {"coupling": config.coupling, "max_layer_ratio": config.max_layer_ratio, "round_to": config.round_to}


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
    scored: list[tuple[Any, Scores]] = []

    def score(variables) -> Scores:
        label = f"{prefix}step{len(scored) + 1}_trace" if scored else "trace"
        found = channel_scores(lab, seed, config.criterion, graph, network.apply, variables, config.scores, label)
        scored.append((variables, found))
        return found

    def train_between(plan: PruningPlan, variables, number: int):
        if number + 1 == len(fractions):
            return variables
        stage = f"{prefix}step{number + 1}"
        return train(lab, stage, seed, shrink(network.train_apply, plan), variables, config.between)

    plan, _ = prune_iteratively(
        graph, network.variables, fractions, score=score, train=train_between, budget=config.budget, **_limits(config)
    )
    variables, scores = scored[-1]
    return shrink_network(lab, network._replace(variables=variables), scores, plan)


def shrink_network(lab: Lab, network: Network, scores: Scores, plan: PruningPlan) -> Pruned:
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
