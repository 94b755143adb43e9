"""From a dense network to a pruned and fine-tuned one, as a stage of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from ehap_jax.graph import Graph
from ehap_jax.graph.structure import Coupling
from ehap_jax.pruning import PruningPlan, Scores, allocate, mask_variables, shrink, shrink_variables
from recipes.criteria import Criterion, ScoreConfig, channel_scores
from recipes.lab import Lab, Phase, compare_masked, train
from recipes.network import Network

Budget = Literal["params", "macs", "bytes", "channels"]
Schedule = Literal["linear", "cubic"]


@dataclass(frozen=True)
class PruneConfig:
    """What goes and how much."""

    criterion: Criterion = "hessian"
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


def plan_of(graph: Graph, scores: Scores, config: PruneConfig) -> PruningPlan:
    """The plan a budget asks for."""
    target: Mapping[str, Any] = {config.budget: config.keep}
    return allocate(
        graph,
        scores,
        **target,
        coupling=config.coupling,
        max_layer_ratio=config.max_layer_ratio,
        round_to=config.round_to,
    )


def kept_fractions(final: float, steps: int, schedule: Schedule) -> list[float]:
    """What is kept after each of `steps` prunings: ``final + (1 - final) (1 - t)^p``, t = 1/steps … 1.

    p is 1 for "linear" and 3 for "cubic" (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1).
    """
    if steps < 1:
        raise ValueError(f"--prune.steps must be at least 1, got {steps}")
    power = {"linear": 1, "cubic": 3}[schedule]
    return [final + (1 - final) * (1 - (step + 1) / steps) ** power for step in range(steps)]


def prune_network(lab: Lab, seed: int, network: Network, graph: Graph, config: PruneConfig) -> Pruned:
    """Score, allocate and shrink: at once, or in steps of masking and training with the masks held.

    Every step scores the network as the one before left it. Channels that are masked have score zero (random scores
    stay the same), so they are the first to go again: plans are nested, and all are for the dense network.
    """
    fractions = kept_fractions(config.keep, config.steps, config.schedule)
    for step, keep in enumerate(fractions):
        label = f"step{step + 1}_trace" if step else "trace"
        scores = channel_scores(
            lab, seed, config.criterion, graph, network.apply, network.variables, config.scores, label
        )
        plan = plan_of(graph, scores, replace(config, keep=keep))
        if step < len(fractions) - 1:
            hold = partial(mask_variables, plan=plan)
            masked = train(
                lab,
                f"step{step + 1}",
                seed,
                network.train_apply,
                hold(network.variables),
                config.between,
                project=hold,
            )
            network = network._replace(variables=masked)
    return shrink_network(lab, network, scores, plan)


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


def finetune(lab: Lab, seed: int, network: Network, phase: Phase, stage: str = "finetuned") -> Network:
    """Train a network on from its weights."""
    trained = train(lab, stage, seed, network.train_apply, network.variables, phase)
    return network._replace(variables=trained)
