"""Channel traces: exact, from random combinations of classes, and from Hutchinson probes; how good, how soon.

    python -m benchmarks.exact_trace --data DIR --max-minutes 10     # again and again, until it says it is done
    python -m benchmarks.exact_trace --data DIR --only timing --networks resnet32

DIR holds `akamaster/resnet20-12fca82f.th` and `akamaster/resnet32-d509ac18.th` (from github.com/akamaster's
pytorch_resnet_cifar10), and `cifar10_lossless_subset.npz` with `x_train` (uint8, NHWC) and `y_train`. ResNet-56,
WRN-28-8 and a head of 100 classes have no trained weights there: theirs are drawn from a seed (`benchmarks.drawn`).

Everything done is kept, in results/exact_trace.json and, of probes, beside it; a run goes on with what is missing.
Its parts, of which two need a quiet machine:

`timing` (quiet): the exact trace of 512 images in a fresh process per network, first call (with compilation) and
second, one ±1 combination, and the peak resident memory of the process.

`costs` (quiet): wall-clock and CPU seconds, without compilation, of every method on every network: the median of three
calls, and for probes that of what three pairs of calls, for one probe and for four, say a probe takes; a median that is
not positive is refused. What longer estimates take is extrapolated from it, and called so.

`quality` (anywhere): rank correlation of HAP scores with the exact ones, and overlap (intersection over union) of the
lowest 30 % of channels, after every number of random combinations and of probes. "published" is the ranking by EHAP's
released half-precision code, which weighs each probe by 2^-8 of the one before, so that more than 4 change nothing.
"rms" ranks by the root mean square of the probes' products (`TraceEstimate.probe_rms`). Beside a mean of probes stand
the agreement expected from its own standard errors (`expected_agreement`), and `normal_spearman`: the rank correlation
that normal noise of the measured deviation would leave. The latter also says how many probes reach 0.99.

Table, plot and the verdicts on the goals join them: seconds from `costs`, agreement from `quality`. On a CPU seconds
are those of its own clock, which other programs on the machine disturb less. Every row and cost keeps on what, how busy
it was, and with which versions it was measured; where earlier rows do not, the `provenance` of their network does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.drawn import DRAWN, draw
from benchmarks.exact_trace_report import describe, draw_plot, goals, require_layout, table
from benchmarks.measure import fresh_process, peak_memory, provenance, read_results, timed, write_results
from benchmarks.trained import CHUNK, WEIGHTS, flat, hap_scores, load, mean_loss, quality, spearman
from ehap_jax.curvature import (
    Policy,
    TraceEstimate,
    channel_trace,
    expected_agreement,
    fingerprint,
    load_trace,
    save_trace,
)
from ehap_jax.curvature.gauss_newton import gauss_newton_trace
from ehap_jax.training import Deadline, OutOfTime


class Size(NamedTuple):
    """Images of the rankings, and the numbers of Hutchinson's probes on them in float32 and float16."""

    images: int
    probes: int
    half_probes: int


SIZES = {
    "resnet20": Size(128, 300, 100),
    "resnet32": Size(128, 100, 30),
    "resnet20-100": Size(64, 100, 30),
    "resnet56": Size(32, 100, 30),
    "wrn28-8": Size(4, 100, 10),
}
PARTS = ("timing", "costs", "quality")
TIMED_IMAGES = 512
PROBES = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 3000)
PUBLISHED_PROBES = 4
PROBES_TIMED = 3
REPEATS = 3
SEEDS = 5
HALF = Policy("float16")
NO_DEADLINE = Deadline()
SAMPLED: dict[str, dict[str, Any]] = {
    **{f"signs {k}": {"classes": k, "draw": "signs"} for k in (1, 2, 4, 8)},
    **{f"labels {k}": {"classes": k, "draw": "labels"} for k in (1, 4)},
}
EXACT: dict[str, dict[str, Any]] = {"exact": {}, "exact float16": {"policy": HALF}}
HUTCHINSON = {"hutchinson": Policy(), "hutchinson float16": HALF}
RANK_CORRELATION = 0.99


class Subject(NamedTuple):
    """A network on its images; what is compiled for its functions serves all measurements."""

    apply: Callable
    variables: Any
    batch: Any
    loss: Callable

    def exact(self, **options):
        return gauss_newton_trace(self.apply, self.variables, self.batch, **options)

    def probes(self, key, policy: Policy, count: int, **options):
        return channel_trace(
            self.loss,
            self.variables,
            self.batch,
            key=key,
            num_probes=count,
            policy=policy,
            microbatch=together(),
            **options,
        )

    def scores(self, channels) -> np.ndarray:
        return hap_scores(flat(channels, self.variables), self.variables)


def together() -> int | None:
    """How many images go through the network at a time for a probe: all of them on an accelerator."""
    return CHUNK if jax.default_backend() == "cpu" else None


def subject(data: Path, network: str, images: int) -> Subject:
    apply, variables, batch = (load if network in WEIGHTS else draw)(data, network, images)
    return Subject(apply, variables, batch, mean_loss(apply))


def time_exact(data: Path, network: str) -> dict[str, Any]:
    """Run in a process of its own: the first call compiles, the second does not."""
    found = subject(data, network, TIMED_IMAGES)
    before = peak_memory()
    trace, first = timed(found.exact)
    _, second = timed(found.exact)
    _, one = timed(lambda: found.exact(classes=1, key=jax.random.key(0)))
    _, one = timed(lambda: found.exact(classes=1, key=jax.random.key(0)))
    return {
        "network": network,
        "images": TIMED_IMAGES,
        "first_call": first,
        "second_call": second,
        "one_combination": one,
        "total_trace": trace.total(),
        "peak_memory_gb": peak_memory(),
        "memory_before_gb": before,
        **provenance(),
    }


def add_costs(found: Subject, entry: dict[str, Any]) -> Iterator[str]:
    """Add the costs that are missing to an entry of the results, and say each."""
    costs = entry.setdefault("costs", {})
    signs = {name: {**options, "key": jax.random.key(0)} for name, options in SAMPLED.items() if "signs" in name}
    for name, options in {**EXACT, **signs}.items():
        if name not in costs:
            found.exact(**options)
            times = [timed(partial(found.exact, **options))[1] for _ in range(REPEATS)]
            costs[name] = {"start": medians(times), **provenance()}
            yield f"{name}: {costs[name]['start']['seconds']:.2f} s"
    for name, policy in HUTCHINSON.items():
        if name not in costs:
            costs[name] = {**cost_of_probes(partial(found.probes, jax.random.key(1), policy)), **provenance()}
            probe, start = (costs[name][part]["seconds"] for part in ("probe", "start"))
            yield f"{name}: {probe:.2f} s a probe after {start:.2f} s"


def medians(times: Sequence[dict[str, float]]) -> dict[str, float]:
    """By clock."""
    return {clock: median(one[clock] for one in times) for clock in times[0]}


def cost_of_probes(call: Callable[[int], Any]) -> dict[str, Any]:
    """Seconds of a probe, by clock, and of what ``call`` with a number of probes takes before the first.

    Raises:
        RuntimeError: more probes did not take longer than one; the machine was too busy to tell.
    """
    call(1)
    call(1 + PROBES_TIMED)
    pairs = [[timed(partial(call, n))[1] for n in (1, 1 + PROBES_TIMED)] for _ in range(REPEATS)]
    differences = [{clock: (more[clock] - one[clock]) / PROBES_TIMED for clock in one} for one, more in pairs]
    probe = medians(differences)
    if min(probe.values()) <= 0:
        raise RuntimeError(
            f"a probe took {probe} by the median of {REPEATS} differences between {1 + PROBES_TIMED} probes and one: "
            "the machine is too busy to tell. Run again when it is quiet; what is measured is kept"
        )
    ones = medians([one for one, _ in pairs])
    return {"start": {clock: ones[clock] - probe[clock] for clock in ones}, "probe": probe, "differences": differences}


def add_quality(found: Subject, entry: dict[str, Any], size: Size, kept: Path, deadline: Deadline) -> Iterator[str]:
    """Add the rows that are missing to an entry of the results, and say each.

    Raises:
        OutOfTime: the deadline has passed among probes; those that are done are in files named after ``kept``.
    """
    rows = entry.setdefault("rows", [])
    done = {(row["method"], row["samples"], row.get("seed")) for row in rows}
    sampled = [(name, seed) for name in SAMPLED for seed in range(SEEDS)]
    calls = [("exact float16", None), *sampled]
    calls = [(name, seed) for name, seed in calls if (*samples_of(name), seed) not in done]
    most = {"hutchinson": size.probes, "hutchinson float16": size.half_probes}
    counts = {name: [n for n in PROBES if n <= m and (name, n, None) not in done] for name, m in most.items()}
    publish = ("published", PUBLISHED_PROBES, None) not in done
    if not (calls or publish or any(counts.values())):
        return
    exact = found.exact()
    truth = found.scores(exact.mean)
    for name, seed in calls:
        options = {**EXACT, **SAMPLED}[name] | ({} if seed is None else {"key": jax.random.key(seed)})
        method, samples = samples_of(name)
        agreement = quality(found.scores(found.exact(**options).mean), truth)
        rows.append({"method": method, "samples": samples, "seed": seed, **agreement, **provenance()})
        yield describe(rows[-1])
    if publish:
        agreement = quality(published_scores(found), truth)
        rows.append({"method": "published", "samples": PUBLISHED_PROBES, **agreement, **provenance()})
        yield describe(rows[-1])
    for name in HUTCHINSON:
        file = kept.with_name(f"{kept.name}.{name.replace(' ', '-')}.npz")
        for estimate in estimates(found, HUTCHINSON[name], counts[name], file, deadline):
            agreement = quality(found.scores(estimate.mean), truth)
            row = {"method": name, "samples": estimate.count, **agreement, **provenance()}
            if name == "hutchinson":
                spread = quality(found.scores(estimate.probe_rms()), truth)
                rows.append({"method": "rms", "samples": estimate.count, **spread, **provenance()})
                if estimate.count > 1:
                    row |= expectations(found, estimate, truth)
                    entry["z_scores"] = z_scores(found, estimate, exact)
            rows.append(row)
            yield describe(row)


def samples_of(name: str) -> tuple[str, int | None]:
    """ "signs 4" is 4 samples of "signs"; what is exact has none."""
    return (name.split()[0], SAMPLED[name]["classes"]) if name in SAMPLED else (name, None)


def published_scores(found: Subject) -> np.ndarray:
    """HAP scores of EHAP's released code but for its choice of images: float16, and the scale never divided out."""
    from interop.reference.trace import DECAY

    total, before = np.zeros(()), np.zeros(())
    for estimate in estimates(found, HALF, range(1, PUBLISHED_PROBES + 1)):
        so_far = estimate.count * found.scores(estimate.mean)
        total, before = total + (so_far - before) * DECAY**-estimate.count, so_far
    return total


def estimates(
    found: Subject, policy: Policy, counts: Sequence[int], kept: Path | None = None, deadline: Deadline = NO_DEADLINE
) -> Iterator[TraceEstimate]:
    """Hutchinson's estimate after each of so many probes, going on from those in the file ``kept``.

    Raises:
        OutOfTime: the deadline has passed; the probes that are done are in the file.
    """
    key = jax.random.key(100)
    made_from = fingerprint(found.loss, found.variables, found.batch, key=key, policy=policy, microbatch=together())
    state = None
    if counts and kept is not None and kept.exists():
        state = load_trace(kept, found.variables, made_from).state
        if int(state.count) > counts[0]:  # what was measured on the way there is lost, and is measured again
            state = None
    for count in counts:
        options = {"probes_per_step": 5, "state": state, "until": lambda _: deadline.passed}
        estimate = found.probes(key, policy, count, **options)
        state = estimate.state
        if kept is not None:
            save_trace(kept, estimate, made_from)
        if estimate.count < count:
            deadline.check(f"{estimate.count} probes")
        yield estimate


def expectations(found: Subject, estimate: TraceEstimate, truth: np.ndarray) -> dict[str, float]:
    """What the standard errors of an estimate of two probes or more let expect, without and with the truth."""
    expected = expected_agreement(estimate, found.variables, prune=0.3)
    deviation = found.scores(estimate.sem) * estimate.count**0.5
    return {
        "expected_spearman": expected.rank_correlation,
        "expected_overlap_30": expected.overlap,
        "normal_spearman": normal_spearman(truth, deviation, estimate.count),
        "probes_to_goal": probes_to_reach(truth, deviation, RANK_CORRELATION),
    }


def normal_spearman(truth: np.ndarray, deviation: np.ndarray, probes: float, draws: int = 20) -> float:
    """The mean rank correlation of ``truth`` with itself plus normal noise of ``deviation / sqrt(probes)``."""
    noise = np.random.default_rng(0).normal(size=(draws, truth.size))
    return float(np.mean([spearman(truth + deviation / probes**0.5 * z, truth) for z in noise]))


def probes_to_reach(truth: np.ndarray, deviation: np.ndarray, correlation: float) -> float:
    """How many probes `normal_spearman` needs to reach ``correlation``, to 1 %."""
    low, high = 1.0, 1e9
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if normal_spearman(truth, deviation, middle) >= correlation else (middle, high)
    return high


def z_scores(found: Subject, estimate: TraceEstimate, exact: TraceEstimate) -> dict[str, Any]:
    """Of (Hutchinson - exact) / standard error, over all channels whose standard error is not zero."""
    mean, sem, true = (flat(tree, found.variables) for tree in (estimate.mean, estimate.sem, exact.mean))
    alive = sem > 0
    z = (mean - true)[alive] / sem[alive]
    return {
        "probes": estimate.count,
        "channels": int(alive.sum()),
        "mean": float(z.mean()),
        "std": float(z.std(ddof=1)),
        "dead_channels": int((~alive).sum()),
        "largest_exact_trace_of_a_dead_channel": float(np.max(true[~alive], initial=0.0)),
        "total": {"exact": float(true.sum()), "hutchinson": estimate.total(), "sem": estimate.total_sem()},
    }


def run(given: argparse.Namespace, results: dict[str, Any], deadline: Deadline) -> None:
    """Everything asked for that is missing, kept step by step.

    Raises:
        OutOfTime: the deadline has passed.
    """

    def keep(what: str) -> None:
        write_results(given.out, results)
        print(what, flush=True)

    networks = results.setdefault("networks", {})
    timing = results.setdefault("timing", [])
    for network in [n for n in given.networks if n in WEIGHTS and "timing" in given.only]:
        if network not in [row["network"] for row in timing]:
            line = ["--data", str(given.data), "--one", network]
            # A first call that finds its compiled program in a cache would not be one.
            timing.append(fresh_process("benchmarks.exact_trace", line, {"JAX_ENABLE_COMPILATION_CACHE": "false"}))
            keep(f"{network}: timed")
            deadline.check("some timings")
    for network in [n for n in given.networks if {"costs", "quality"} & set(given.only)]:
        size = SIZES[network]
        about = {"images": size.images, "weights": DRAWN.get(network, "trained, by akamaster")}
        entry = networks.setdefault(network, about)
        found = subject(given.data, network, size.images)
        steps = {
            "costs": add_costs(found, entry),
            "quality": add_quality(found, entry, size, given.out.with_suffix(f".{network}"), deadline),
        }
        for part, step in steps.items():
            for what in step if part in given.only else ():
                keep(f"{network}: {what}")
                deadline.check(f"{network}: {what}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/exact_trace.json"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--max-minutes", type=float, help="stop cleanly after about so many, with exit status 3")
    parser.add_argument("--one", choices=SIZES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(time_exact(given.data, given.one)))
        return 0
    results, stopped = read_results(given.out), None
    try:
        require_layout(results)
    except ValueError as error:
        parser.error(f"{given.out}: {error}")
    try:
        run(given, results, Deadline(given.max_minutes))
    except OutOfTime as reason:
        stopped = reason
    results["goals"] = goals(results)
    write_results(given.out, results)
    draw_plot(results, given.out.with_suffix(".png"))
    print(table(results))
    if stopped:
        print(f"{stopped}; run again to go on", file=sys.stderr)
    return 3 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
