"""The papers' claims as a table in markdown, from the JSON of runs: one row per claim and run.

    python -m recipes.reproduction results/reproduction_*.json --published results/compare_torch_*.json \
        --output results/REPRODUCTION.md

Writes the table, and beside it one picture per run, accuracy against multiply-accumulates, named after its JSON file.
Reads ``reproduction.json`` of `recipes.reproduce` and ``comparison.json`` of `recipes.compare_torch` (the trace as
EHAP's released code computes it beside the fixed one). Every row says whether it ran, ran shortened (and how), or did
not run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from ehap_jax._whole_files import write_text
from ehap_jax.report import accuracy_curves
from ehap_jax.report.figure_style import save_figure
from ehap_jax.report.tables import markdown_table
from recipes.cells import percent, stages_of

PAPER_EPOCHS, PAPER_INT8_EPOCHS, PAPER_SEEDS, PAPER_PROBES, PAPER_EXAMPLES = 300, 30, 3, 300, 512


@dataclass(frozen=True)
class Arguments:
    """Make the table of claims."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """``reproduction.json`` files."""
    published: tuple[Path, ...] = ()
    """``comparison.json`` files of recipes.compare_torch."""
    output: Path = Path("results/REPRODUCTION.md")
    """Replaced where it exists."""


class Row(NamedTuple):
    """One claim on one network."""

    claim: str
    network: str
    here: str
    state: str


NOT_RUN = "not run"


def rows_of(reproduction: dict[str, Any]) -> list[Row]:
    """All claims on the network of one run."""
    precision, criteria = reproduction.get("precision"), reproduction.get("criteria")
    known = precision or criteria
    network = "-" if known is None else network_of(known)
    return [*precision_rows(precision, network), *criteria_rows(criteria, network), *int8_rows(criteria, network)]


def network_of(part: dict[str, Any]) -> str:
    """Checkpoint, data set and device."""
    config, device = part["config"], part["versions"]["device"]
    return f"{config['dense']}, {part['result']['data']}, {device['kind']}"


def precision_rows(part: dict[str, Any] | None, network: str) -> list[Row]:
    """Speed and memory of the trace, and accuracy after pruning by it."""
    speed = "FP16 traces are 17 % to 44 % faster than FP32 ones (EHAP, on its GPUs)"
    memory = "FP16 traces take about 40 % less GPU memory (EHAP)"
    equal = "Pruning by FP16 traces is as accurate as by FP32 ones (EHAP)"
    entries = {} if part is None else {entry["compute"]: entry for entry in part["result"]["precisions"]}
    if part is None or not {"float32", "float16"} <= entries.keys():
        return [Row(claim, network, "", NOT_RUN) for claim in (speed, memory, equal)]
    result, config = part["result"], part["config"]
    sizes = {"probes": result["probes"], "examples": result["examples"], "seeds": len(result["rows"]) // len(entries)}
    state = shortened(
        epochs=config["finetune"]["epochs"],
        images=result["train_images"] if config["train_images"] else None,
        **sizes,
    )
    full, low, budget = entries["float32"], entries["float16"], config["prune"]
    gap = (
        f"{percent(low['difference'])} points against FP32 at {100 * budget['keep']:g} % of {budget['budget']} "
        f"({percent(full['accuracy'])} % in FP32); rank correlation of the scores "
        f"{low['rank_correlation']['mean']:.4f}, overlap of the kept channels {low['kept_overlap']['mean']:.3f}"
    )
    need, less = (entry["probe_bytes"]["mean"] / 1e6 for entry in (full, low))
    traced = shortened(epochs=PAPER_EPOCHS, images=None, **sizes)
    return [
        speed_row(speed, network, result, full, low, traced),
        Row(
            memory,
            network,
            f"{need:.0f} MB at the peak of a probe in FP32, {less:.0f} MB in FP16, by the compiler: "
            f"{100 * (less / need - 1):+.0f} %",
            traced,
        ),
        Row(equal, network, gap, state),
    ]


def speed_row(
    claim: str, network: str, result: dict[str, Any], full: dict[str, Any], low: dict[str, Any], state: str
) -> Row:
    """Time per probe, unless other work on the machine spoilt it."""
    if result["machine_shared"]:
        return Row(claim, network, "", f"{NOT_RUN}: others used the machine")
    if not (full["seconds_per_probe"] and low["seconds_per_probe"]):
        return Row(claim, network, "", f"{NOT_RUN}: too few probes to time them")
    slow, fast = full["seconds_per_probe"]["mean"], low["seconds_per_probe"]["mean"]
    here = f"{slow:.3f} s per probe in FP32, {fast:.3f} s in FP16: {100 * (slow / fast - 1):+.0f} % speed"
    return Row(claim, network, here, state)


def criteria_rows(part: dict[str, Any] | None, network: str) -> list[Row]:
    """The Hessian against magnitude and chance, one row per fraction."""
    claim = "The Hessian prunes better than magnitude and chance, {keep} of the parameters (HAP, EHAP)"
    if part is None:
        return [Row(claim.format(keep=f"{keep} %"), network, "", NOT_RUN) for keep in (50, 25, 10)]
    rows, config = [], part["config"]
    for keep in config["cells"]["keeps"]:
        entries = [e for e in part["result"]["statistics"] if e["keep"] == keep and e["criterion"] != "dense"]
        gaps = [gap for gap in part["result"]["differences"] if gap["keep"] == keep]
        dense = next((e for e in part["result"]["statistics"] if e["criterion"] == "dense"), None)
        text = "; ".join(
            f"{entry['criterion']} {percent(entry['accuracy'])} % ({entry['macs'] / 1e6:.1f} M MACs)"
            for entry in ([dense, *entries] if dense else entries)
        )
        paired = "; ".join(f"{gap['first']} − {gap['other']} {percent(gap['difference'])}" for gap in gaps)
        seeds = min((len(entry["seeds"]) for entry in entries), default=0)
        state = short_criteria(part, seeds) if entries else NOT_RUN
        here = f"{text}; paired in points: {paired}" if paired else text
        rows.append(Row(claim.format(keep=f"{100 * keep:g} %"), network, here, state))
    return rows


def int8_rows(part: dict[str, Any] | None, network: str) -> list[Row]:
    """Accuracy and size after INT8 training."""
    claim, size = "INT8 training keeps the accuracy of the pruned network (EHAP)", "Size of the final weights"
    if part is None:
        return [Row(claim, network, "", NOT_RUN), Row(size, network, "", NOT_RUN)]
    entries = [entry for entry in part["result"]["statistics"] if entry["accuracy_int8"] is not None]
    dense = next((entry for entry in part["result"]["statistics"] if entry["criterion"] == "dense"), None)
    if not entries or dense is None:
        return [Row(claim, network, "", NOT_RUN), Row(size, network, "", NOT_RUN)]
    state = short_criteria(part, min(len(entry["accuracy_int8"]["values"]) for entry in entries))
    kept = "; ".join(
        f"{100 * entry['keep']:g} %: {percent(entry['accuracy'])} % → {percent(entry['accuracy_int8'])} %"
        for entry in entries
    )
    bytes_ = "; ".join(f"{100 * entry['keep']:g} %: {entry['bytes_int8']['mean'] / 1e3:.0f} kB" for entry in entries)
    return [
        Row(claim, network, kept, state),
        Row(size, network, f"dense {dense['bytes'] / 1e3:.0f} kB; {bytes_}", state),
    ]


def short_criteria(part: dict[str, Any], seeds: int) -> str:
    """The state of a row of the comparison of criteria."""
    cells, result = part["config"]["cells"], part["result"]
    return shortened(
        epochs=cells["finetune"]["epochs"],
        int8_epochs=cells["int8"]["epochs"],
        seeds=seeds,
        images=result["train_images"] if part["config"]["train_images"] else None,
    )


def shortened(
    *,
    epochs: int,
    seeds: int,
    images: int | None,
    int8_epochs: int = PAPER_INT8_EPOCHS,
    probes: int = PAPER_PROBES,
    examples: int = PAPER_EXAMPLES,
) -> str:
    """ "ran", or in what it was less than the paper's."""
    less = []
    if epochs < PAPER_EPOCHS:
        less.append(f"{epochs} of {PAPER_EPOCHS} epochs of fine-tuning")
    if int8_epochs < PAPER_INT8_EPOCHS:
        less.append(f"{int8_epochs} of {PAPER_INT8_EPOCHS} of INT8")
    if images is not None:
        less.append(f"{images:,} training images")
    if seeds < PAPER_SEEDS:
        less.append(f"{seeds} of {PAPER_SEEDS} seeds")
    if probes < PAPER_PROBES or examples < PAPER_EXAMPLES:
        less.append(f"{probes} probes on {examples} images")
    return f"ran shortened: {', '.join(less)}" if less else "ran"


def published_rows(comparison: dict[str, Any]) -> list[Row]:
    """The schedule of EHAP's released code beside equally weighted probes, at the largest number of probes compared."""
    last = comparison["schedule"][-1]
    probes, images = max(comparison["config"]["probes"]), comparison["config"]["images"]
    here = (
        f"rank correlation with the {comparison['reference']} scores after {probes} probes: as published "
        f"{last['published']['spearman']:.3f}, fixed {last['fixed']['spearman']:.3f}; the first probe has "
        f"{100 * comparison['weight_of_the_first_published_probe']:.1f} % of the published weight"
    )
    network = f"{comparison['config']['checkpoint']}, {comparison['config']['data']}"
    state = shortened(epochs=PAPER_EPOCHS, seeds=PAPER_SEEDS, images=None, probes=probes, examples=images)
    return [Row("300 FP16 probes rank the channels (EHAP's released code)", network, here, state)]


def never_run() -> list[Row]:
    """Claims and goals that no recipe of this project has measured."""
    return [
        Row("A larger Hessian batch fits in FP16 (EHAP)", "-", "", NOT_RUN),
        Row(
            "Goal: ResNet-56, 93.46 % at 47 % of the MACs, 93.36 % at 40 %",
            "-",
            "",
            f"{NOT_RUN}: recipes.sweep resnet56",
        ),
    ]


def draw(run: dict[str, Any], path: Path) -> bool:
    """The Pareto plot of the criteria of a run, where it has compared any."""
    if not run.get("criteria", {}).get("result", {}).get("statistics"):
        return False
    save_figure(accuracy_curves(stages_of(run["criteria"]["result"]["statistics"]), "macs"), path)
    return True


def document(runs: Sequence[dict[str, Any]], published: Sequence[dict[str, Any]], pictures: Sequence[str] = ()) -> str:
    """The page; `pictures` are files beside it."""
    rows = [row for run in runs for row in rows_of(run)]
    rows += [row for comparison in published for row in published_rows(comparison)]
    rows += never_run()
    table = markdown_table(("claim", "network, data, device", "here", "state"), rows)
    return (
        "# The papers' claims, checked\n\n"
        "Made by `python -m recipes.reproduction` from the JSON files in this folder. Accuracies are in per cent of\n"
        "the test split, after the last epoch, ± standard deviation over seeds where there are several; differences\n"
        "are paired by seed; `dense` is the unpruned network, fine-tuned like the others. A shortened run has not\n"
        "recovered from pruning: it shows what happens, not how good the method is in the end.\n\n"
        + "\n".join([table, *(f"![Accuracy against multiply-accumulates]({name})\n" for name in pictures)])
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and write."""
    given = tyro.cli(Arguments, args=arguments, prog="python -m recipes.reproduction")
    try:
        if not given.runs:
            raise ValueError("name at least one reproduction.json")
        runs, published = ([_read(path) for path in paths] for paths in (given.runs, given.published))
        files = [given.output.with_name(f"{path.stem}.png") for path in given.runs]
        pictures = [file.name for run, file in zip(runs, files, strict=True) if draw(run, file)]
        write_text(given.output, document(runs, published, pictures))
    except (KeyError, ValueError, OSError, ImportError) as error:
        print(f"reproduction: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
