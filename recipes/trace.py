"""The Hessian trace of every channel in several precisions, with the same probes, beside the exact one.

EHAP (arXiv 2306.07030) estimates it with 300 probes on 512 images, in float32 and in float16, and reports float16 to
be 17 % to 44 % faster on its GPUs.

    python -m recipes.trace paper runs/pretrain                                  # CIFAR-10 through TFDS, a GPU
    python -m recipes.trace short resnet20.th --data npz:cifar10.npz             # minutes on two CPU cores

Expect float16 to agree with float32 on the same probes (rank correlation above 0.99). The exact trace needs no probes
and is computed where it is proven to be the Hessian's; without it, the standard errors of the probes say what their
ranking is worth. Writes ``trace.json`` (totals, seconds per probe, rank correlations, and from the standard errors the
expected agreement with infinitely many probes: rank correlation, overlap of the half that would be pruned),
``scores.npz``, the traces themselves and ``report.html``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ehap_jax.curvature import TraceEstimate, expected_agreement
from ehap_jax.graph import count_cost
from ehap_jax.pruning import hessian_scores
from ehap_jax.report import write_report
from ehap_jax.training import Deadline, Progress
from recipes.command import RunOptions, run_command
from recipes.criteria import (
    Compute,
    Course,
    ScoreConfig,
    check_scores,
    hessian_trace,
    is_proven,
    probe_bytes,
    probed_trace,
)
from recipes.lab import Lab, accuracy, training_batch
from recipes.network import load_data, load_network
from recipes.ranking import spearman
from recipes.summary import Stage, probe_costs, summarise, write_scores


@dataclass(frozen=True)
class Config:
    """Trace the Hessian of a trained network."""

    dense: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of another recipe."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    computes: tuple[Compute, ...] = ("float32", "float16")
    """Precisions; the first one is what the others are compared with."""
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    """`estimator` and `compute` in it do not matter here."""
    seed: int = 0


VARIANTS = {
    "short": ("64 images and 30 probes, minutes on a CPU", Config(scores=ScoreConfig(examples=64, probes=30))),
    "paper": ("512 images and 300 probes", Config()),
}


def main(config: Config, options: RunOptions) -> None:
    deadline = Deadline(options.max_minutes)
    if not config.computes or len(set(config.computes)) < len(config.computes):
        raise ValueError(f"--computes must be different precisions, at least one; got {config.computes}")
    network = load_network(config.dense)
    dataset = load_data(network, config.data)
    check_scores(dataset, config.scores, "--scores")
    if config.scores.probes < 2:
        raise ValueError(f"--scores.probes must be at least 2 for standard errors, got {config.scores.probes}")
    batch = training_batch(dataset, config.scores.examples, config.seed)
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline)
        graph = network.graph()
        traces: dict[str, TraceEstimate] = {}
        for compute in config.computes:
            settings = replace(config.scores, compute=compute)
            traces[compute] = probed_trace(lab, config.seed, network.apply, network.variables, batch, settings)
        if is_proven(graph):
            settings = replace(config.scores, estimator="exact")
            traces["exact"] = hessian_trace(lab, config.seed, graph, network.apply, network.variables, settings)
        scores = {name: hessian_scores(graph, network.variables, trace) for name, trace in traces.items()}

        first = config.computes[0]
        rows: dict[str, Any] = {}
        for name, trace in traces.items():
            rows[name] = {"total": trace.total(), "probes": int(trace.count), "negative_scores": scores[name].negative}
            rows[name] |= {f"rank_correlation_with_{first}": spearman(scores[name], scores[first])}
            if name != "exact":
                rows[name]["total_sem"] = trace.total_sem()
                rows[name]["expected_agreement"] = expected_agreement(trace, network.variables)
                rows[name]["seconds_per_probe"] = Course(lab, config.seed, f"trace_{name}").seconds_per_probe
                settings = replace(config.scores, compute=name)
                rows[name]["probe_bytes"] = probe_bytes(network.apply, network.variables, batch, settings)
            if "exact" in scores:
                rows[name]["rank_correlation_with_exact"] = spearman(scores[name], scores["exact"])
        run.write_json("trace.json", {"examples": config.scores.examples, "traces": rows})
        course = Course(lab, config.seed, f"trace_{first}").convergence()
        write_scores(run, scores, hessian_scores(graph, network.variables, traces[first].sem), course)
        stages = {"dense": Stage(accuracy(lab, network.apply, network.variables), count_cost(graph))}
        seconds = {"total": run.seconds()}
        run.write_json("summary.json", summarise([stages], seconds=seconds, checks={}, costs=probe_costs(rows)))
        write_report(run.path)
        progress.note((run.path / "trace.json").read_text())


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="trace", options=RunOptions)


if __name__ == "__main__":
    sys.exit(command())
