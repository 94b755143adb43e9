"""The papers' claims as a table in markdown, from the JSON of runs: one row per claim and run.

    python -m recipes.reproduction results/reproduction_*.json --published results/compare_torch_*.json \
        --sweeps runs/sweep/sweep.json --quantized runs/quantize/summary.json --compiled results/gpu_memory.json \
        --output results/REPRODUCTION.md

Writes the table, and beside it one picture per run, accuracy against multiply-accumulates, named after its JSON file.
Reads ``reproduction.json`` of `recipes.reproduce`, ``comparison.json`` of `recipes.compare_torch` (the trace as
EHAP's released code computes it beside the fixed one), ``sweep.json`` of `recipes.sweep` and ``summary.json`` of
`recipes.quantize`; of these two, configuration and versions beside them, or all three in one file: ``{"config": …,
"versions": …, "sweep": …}``, or ``"summary"``; and what `benchmarks.gpu_memory` writes. Every row says whether it ran,
ran shortened (and how), or did not run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from ehap_jax._untrusted_files import read_json
from ehap_jax._whole_files import write_text
from ehap_jax.report import accuracy_curves
from ehap_jax.report.figure_style import save_figure
from ehap_jax.report.tables import markdown_table
from recipes.cells import percent, stages_of
from recipes.quantize import POINTS

PAPER_EPOCHS, PAPER_INT8_EPOCHS, PAPER_SEEDS, PAPER_PROBES, PAPER_EXAMPLES = 300, 30, 3, 300, 512


@dataclass(frozen=True)
class Arguments:
    """Make the table of claims."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """``reproduction.json`` files."""
    published: tuple[Path, ...] = ()
    """``comparison.json`` files of recipes.compare_torch."""
    sweeps: tuple[Path, ...] = ()
    """``sweep.json`` files of recipes.sweep."""
    quantized: tuple[Path, ...] = ()
    """``summary.json`` files of recipes.quantize."""
    compiled: tuple[Path, ...] = ()
    """Files of benchmarks.gpu_memory."""
    output: Path = Path("results/REPRODUCTION.md")
    """Replaced where it exists."""


class Row(NamedTuple):
    """One claim on one network."""

    claim: str
    network: str
    here: str
    state: str


NOT_RUN = "not run"

COMPARED = ("hessian", "magnitude", "random")
"""The criteria of the papers' claim."""

MEMORY = "FP16 traces take about 40 % less GPU memory (EHAP)"
RESNET56 = "Goal: ResNet-56, 93.46 % at 47 % of the MACs, 93.36 % at 40 %"
INT8 = f"Goal: INT8 integers within {POINTS} points of float training"


def rows_of(reproduction: dict[str, Any]) -> list[Row]:
    """All claims on the network of one run."""
    precision, criteria = reproduction.get("precision"), reproduction.get("criteria")
    known = precision or criteria
    network = "-" if known is None else network_of(known)
    return [*precision_rows(precision, network), *criteria_rows(criteria, network), *int8_rows(criteria, network)]


def network_of(part: dict[str, Any]) -> str:
    """Checkpoint, data set and device."""
    config, device = part["config"], part["versions"]["device"]
    return f"{_short(config['dense'])}, {part['result']['data']}, {device['kind']}"


def precision_rows(part: dict[str, Any] | None, network: str) -> list[Row]:
    """Speed and memory of the trace, and accuracy after pruning by it."""
    speed = "FP16 traces are 17 % to 44 % faster than FP32 ones (EHAP, on its GPUs)"
    batch = "A larger Hessian batch fits in FP16 (EHAP)"
    equal = "Pruning by FP16 traces is as accurate as by FP32 ones (EHAP)"
    entries = {} if part is None else {entry["compute"]: entry for entry in part["result"]["precisions"]}
    if part is None or not {"float32", "float16"} <= entries.keys():
        return [Row(claim, network, "", NOT_RUN) for claim in (speed, MEMORY, batch, equal)]
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
            MEMORY,
            network,
            f"{need:.0f} MB at the peak of a probe in FP32, {less:.0f} MB in FP16, by the compiler: "
            f"{100 * (less / need - 1):+.0f} %",
            traced,
        ),
        batch_row(batch, network, result, need, low, traced),
        Row(equal, network, gap, state),
    ]


def batch_row(claim: str, network: str, result: dict[str, Any], need: float, low: dict[str, Any], state: str) -> Row:
    """How many images fit in half precision where the batch fits in single precision."""
    if low.get("largest_batch") is None:
        return Row(claim, network, "", NOT_RUN)
    here = (
        f"in the {need:.0f} MB that FP32 needs for {result['examples']} images, by the compiler, "
        f"FP16 takes about {low['largest_batch']}"
    )
    return Row(claim, network, here, state)


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
        missing = [name for name in COMPARED if name not in {entry["criterion"] for entry in entries}]
        state = short_criteria(part, seeds, missing) if entries else NOT_RUN
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


def short_criteria(part: dict[str, Any], seeds: int, missing: Sequence[str] = ()) -> str:
    """The state of a row of the comparison of criteria, of which some may be missing."""
    cells, result = part["config"]["cells"], part["result"]
    scores = cells["prune"]["scores"]
    # Only the Hessian's scores depend on how traces are taken.
    probed = "hessian" in cells["criteria"] and scores["estimator"] == "probes"
    exact = "hessian" in cells["criteria"] and not probed
    state = shortened(
        epochs=cells["finetune"]["epochs"],
        int8_epochs=cells["int8"]["epochs"],
        seeds=seeds,
        images=result["train_images"] if part["config"]["train_images"] else None,
        probes=scores["probes"] if probed else PAPER_PROBES,
        examples=scores["examples"] if probed or exact else PAPER_EXAMPLES,
    )
    notes = [
        f"exact traces{' where proven' if scores['estimator'] == 'auto' else ''}, not {PAPER_PROBES} probes"
    ] * exact
    return "; ".join([state, *notes, *(f"without {name}" for name in missing)])


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
    if probes < PAPER_PROBES:
        less.append(f"{probes} of {PAPER_PROBES} probes")
    if examples < PAPER_EXAMPLES:
        less.append(f"{examples} of {PAPER_EXAMPLES} images in the Hessian batch")
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


def sweep_row(run: dict[str, Any]) -> Row:
    """Accuracy over kept fractions, by the first criterion; the goal where it is a ResNet-56."""
    config, result = run["config"], run["sweep"]
    cells, model = config["cells"], result["model"]
    criterion = cells["criteria"][0]
    entries = [e for e in result["statistics"] if e["criterion"] in ("dense", criterion)]
    kept = ["dense" if e["criterion"] == "dense" else f"{100 * e['keep']:g} %" for e in entries]
    here = "; ".join(f"{k}: {percent(e['accuracy'])} %" for k, e in zip(kept, entries, strict=True))
    claim = RESNET56 if model == "resnet56" else f"Accuracy of {model} at fractions of the {cells['prune']['budget']}"
    how = [f"{cells['finetune']['epochs']} epochs of fine-tuning", f"{cells['seeds']} seeds"]
    if config["train_images"]:
        how.append(f"{result['train_images']:,} training images")
    if result["cells_done"] < result["cells"]:
        how.append(f"{result['cells_done']} of {result['cells']} cells")
    return Row(claim, network_of({**run, "result": result}), f"{criterion}: {here}", f"ran: {', '.join(how)}")


def int8_goal_row(run: dict[str, Any]) -> Row:
    """Integers beside the float network trained for as long, and what rounding costs without training."""
    config, summary = run["config"], run["summary"]
    accuracies = {s["stage"]: percent({"mean": s["accuracy"], "std": s["accuracy_std"]}) for s in summary["stages"]}
    points = summary["checks"]["points_from_float_trained_qat_integer"]
    here = (
        f"{points:.2f} points in the mean over seeds, {'reached' if points <= POINTS else 'missed'}: "
        f"float {accuracies['float']} %, trained on {accuracies['float_trained']} %; integers without training "
        f"{accuracies['ptq_integer']} %, trained {accuracies['qat_integer']} %"
    )
    how = [f"{config['qat']['epochs']} epochs", f"{len(summary['seeds'])} of {PAPER_SEEDS} seeds"]
    if config["train_images"]:
        how.append(f"{config['train_images']:,} training images")
    network = f"{_short(config['network'])}, {_short(config['data'])}, {run['versions']['device']['kind']}"
    return Row(INT8, network, here, f"ran: {', '.join(how)}")


def compiled_rows(found: dict[str, Any]) -> list[Row]:
    """What probes on a linearised gradient need on a GPU that they were compiled for."""
    needs = {
        (r["network"], r["batch"], r["precision"]): r["bytes"] for r in found["rows"] if r["product"] == "linearize"
    }
    rows = []
    for network, batch, precision in needs:
        if precision != "float16" or (network, batch, "float32") not in needs:
            continue
        full, low = needs[network, batch, "float32"], needs[network, batch, "float16"]
        sizes = f"{full / 2**30:.2f} GB in FP32, {low / 2**30:.2f} GB in FP16"
        here = f"{sizes}, by the compiler: {100 * (low / full - 1):+.0f} %"
        state = f"compiled for the device, not run: {batch} of {PAPER_EXAMPLES} images in the Hessian batch"
        rows.append(Row(MEMORY, f"{network}, {found['device']}", here, state))
    return rows


def goal_rows(sweeps: Sequence[dict[str, Any]], quantized: Sequence[dict[str, Any]]) -> list[Row]:
    """The project's own goals, those without a run included."""
    rows = [*(sweep_row(run) for run in sweeps), *(int8_goal_row(run) for run in quantized)]
    recipes = {RESNET56: "recipes.sweep resnet56", INT8: "recipes.quantize cifar"}
    missing = recipes.keys() - {row.claim for row in rows}
    return rows + [Row(goal, "-", "", f"{NOT_RUN}: {recipes[goal]}") for goal in recipes if goal in missing]


def draw(run: dict[str, Any], path: Path) -> bool:
    """The Pareto plot of the criteria of a run, where it has compared any."""
    if not run.get("criteria", {}).get("result", {}).get("statistics"):
        return False
    save_figure(accuracy_curves(stages_of(run["criteria"]["result"]["statistics"]), "macs"), path)
    return True


def document(
    runs: Sequence[dict[str, Any]],
    published: Sequence[dict[str, Any]],
    sweeps: Sequence[dict[str, Any]] = (),
    quantized: Sequence[dict[str, Any]] = (),
    compiled: Sequence[dict[str, Any]] = (),
    pictures: Sequence[str] = (),
) -> str:
    """The page; `pictures` are files beside it."""
    rows = [row for run in runs for row in rows_of(run)]
    rows += [row for comparison in published for row in published_rows(comparison)]
    rows += [row for found in compiled for row in compiled_rows(found)]
    rows += goal_rows(sweeps, quantized)
    table = markdown_table(("claim", "network, data, device", "here", "state"), rows)
    return (
        "# The papers' claims, checked\n\n"
        "Made by `python -m recipes.reproduction` from the JSON files in this folder. Accuracies are in per cent of\n"
        "the test split, after the last epoch, ± standard deviation over seeds where there are several; differences\n"
        "are paired by seed; `dense` is the unpruned network, fine-tuned like the others. A shortened run has not\n"
        "recovered from pruning: it shows what happens, not how good the method is in the end.\n\n"
        + "\n".join([table, *(f"![Accuracy against multiply-accumulates]({name})\n" for name in pictures)])
    )


def read_run(path: Path, name: str) -> dict[str, Any]:
    """A run's result under its name, with its configuration and versions: from one file, or from those beside it."""
    found = read_json(path)
    if name in found:
        return found
    return {name: found, **{other: read_json(path.with_name(f"{other}.json")) for other in ("config", "versions")}}


def _short(name: str) -> str:
    """A file or data set without the folders of the machine."""
    return name.rsplit("/", 1)[-1]


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and write."""
    given = tyro.cli(Arguments, args=arguments, prog="python -m recipes.reproduction")
    try:
        if not (given.runs or given.published or given.sweeps or given.quantized or given.compiled):
            raise ValueError("name at least one file")
        runs, published = ([read_json(path) for path in paths] for paths in (given.runs, given.published))
        files = [given.output.with_name(f"{path.stem}.png") for path in given.runs]
        pictures = [file.name for run, file in zip(runs, files, strict=True) if draw(run, file)]
        sweeps = [read_run(path, "sweep") for path in given.sweeps]
        quantized = [read_run(path, "summary") for path in given.quantized]
        compiled = [read_json(path) for path in given.compiled]
        write_text(given.output, document(runs, published, sweeps, quantized, compiled, pictures))
    except (KeyError, ValueError, OSError, ImportError) as error:
        print(f"reproduction: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
