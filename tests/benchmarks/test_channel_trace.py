"""The benchmark of a probe: what it counts, what it compares, and that it runs and goes on from where it was."""

import json
import os
import re
import signal
from dataclasses import asdict
from types import SimpleNamespace

import jax
import pytest

from benchmarks import channel_trace as bench
from benchmarks.measure import ProcessFailed, read_results
from benchmarks.probe_comparison import beside, comparable, compare, table
from benchmarks.probe_measurement import measure, per_probe
from benchmarks.probe_rows import PASSES, PEAKS, PRECISIONS, VARIANTS, Row, flop_per_probe, loss_and_start, planned
from ehap_jax.curvature import Policy
from ehap_jax.curvature.probe_loop import Run, add_chunk, add_linear_chunk, begin, blank_state, linearize_chunk
from ehap_jax.curvature.probes import is_kernel
from ehap_jax.curvature.problem import prepare

ROW = Row("ehap", "float32", "tiny", batch=4, side=8)
HERE = {
    "versions": {"device": {"kind": "cpu", "backend": "cpu"}, "git": {"commit": "1234567890"}},
    "cpu": "some",
    "cores": 2,
    "load_average": 0.5,
}
TIMES = {"ms": 2.0, "cpu_ms": 3.0, "probes": 4, "flop_per_probe": 4e6, "compile_seconds": 1.0, "peak_memory_gb": 0.5}
CONVOLUTIONS_AND_PRODUCTS = 7 + 2 + 1
"""Of ResNet-8: 3x3, shortcuts, and the dense layer."""


def row(variant, precision="float32", **about):
    sizes = asdict(Row(variant, precision, "tiny", 4, 8))
    return {**sizes, **TIMES, "needed_gb": 0.4, **HERE, **about}


def versions(**packages):
    return {"versions": {**HERE["versions"], "packages": packages}}


def peak(variant, matmul, conv, precision="float32"):
    return {**asdict(Row(variant, precision, side=8)), "matmul_flops": matmul, "conv_flops": conv, **HERE}


@pytest.fixture(scope="module")
def start():
    return loss_and_start(ROW)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["linearize", "jvp"])
def test_our_products_have_as_many_passes_as_are_counted(way, start):
    """What is left after the compiler has dropped what is computed twice; it keeps one product with zeros."""
    loss, variables, batch, _, _ = start
    options = {"policy": Policy(), "select": is_kernel, "channel_axis": -1, "microbatch": None}
    problem = prepare(loss, variables, batch, **options)
    layout, chunk = problem.layout, problem.chunks[0]
    state = blank_state(Run(loss, problem, way), jax.random.key(0), Policy())
    v, found = begin(layout, None, problem.leaves, state)
    last = (v, problem.weights[0], (state.loss_scale, state.probe_scale), found)
    if way == "linearize":
        line = jax.eval_shape(linearize_chunk, loss, layout, None, problem.leaves, chunk, state.loss_scale)
        lowered = add_linear_chunk.lower(layout, None, line, *last)
    else:
        v, *rest = last
        lowered = add_chunk.lower(loss, layout, None, problem.leaves, v, chunk, *rest)
    text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    whole, less = PASSES[way]
    expected = whole * CONVOLUTIONS_AND_PRODUCTS - less
    assert len(re.findall(r" (?:convolution|dot)\(", text)) - expected in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["torch-published", "torch-vectorised", "torch-affine", "torch-func"])
def test_pytorchs_products_have_as_many_operations_as_are_counted(variant, start):
    """To 3 %: PyTorch computes weight gradients of strided convolutions on a larger window, and cuts it."""
    torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
    from torch.utils.flop_counter import FlopCounterMode

    from interop import to_torch
    from interop.reference import products
    from interop.reference.trace import rademacher_probes
    from interop.torch_models import load

    _, variables, (x, _), forward, first = start
    model, images = load(to_torch(variables)), torch.tensor(x.tolist()).permute(0, 3, 1, 2)
    name = {"torch-func": "functional"}.get(variant, variant.removeprefix("torch-"))
    step = getattr(products, f"{name}_products")(model, images, torch.arange(4))
    (probe,) = rademacher_probes(model, 1, seed=0)
    with FlopCounterMode(display=False) as counter:
        step(probe)
    assert counter.get_total_flops() == pytest.approx(flop_per_probe(variant, forward, first), rel=0.03)


def test_rows_are_compared_with_their_like():
    rows = [
        row("ehap", product="linearize"),
        row("ehap", "bfloat16", ms=0.5, cpu_ms=1.0, needed_gb=0.1, peak_memory_gb=0.25, product="jvp"),
        row("torch-vectorised", ms=6.0, cpu_ms=4.5, load_average=2.0),
        row("torch-affine", ms=1.0, cpu_ms=6.0, versions={**HERE["versions"], "git": None}),
        row("torch-func", ms=9.0, cores=64),
        row("torch-func", "bfloat16", ms=1.0),
        {**row("torch-compile"), "failed": "not done in 3 s"},
        peak("peak-jax", 4e9, 2e9),
        peak("peak-torch", 8e9, 1e9),
    ]
    ours, half, *_ = found = compare(rows)
    both = {"cpu_ms": 1.5, "ms": 3.0, "commits": ["1234567890"] * 2, "load_averages": [0.5, 2.0]}
    assert ours["times_as_fast_as"].keys() == {"torch-vectorised", "torch-affine"}
    assert ours["times_as_fast_as"]["torch-vectorised"] == both
    assert ours["times_as_fast_as"]["torch-affine"]["commits"] == ["1234567890", None]
    assert ours["fastest_pytorch"] == {"variant": "torch-vectorised", "by": "cpu_ms", **both}
    assert (ours["flops"], ours["of_matmul_peak"], ours["of_conv_peak"]) == (2e9, 0.25, 1.0)
    assert half["times_as_fast_as"].keys() == {"ehap float32", "torch-func"}
    base = half["times_as_fast_as"]["ehap float32"]
    assert (base["cpu_ms"], base["ms"]) == (3.0, 4.0) and half["times_as_fast_as"]["torch-func"]["ms"] == 2.0
    assert (base["of_needed_gb"], base["of_peak_memory_gb"]) == (0.25, 0.5) and base["products"] == ["jvp", "linearize"]
    assert "of_conv_peak" not in half
    text = table(found)
    assert "not done in 3 s" in text and "matmul 8 GFLOP/s" in text and "jvp against linearize" in text
    assert "PyTorch's fastest is torch-vectorised: 1.50 by CPU, 3.00 by wall clock (commits 1234567, 1234567; " in text
    assert compare(found) == found
    assert "of_needed_gb" not in beside(row("ehap", "bfloat16"), rows)["times_as_fast_as"]["ehap float32"]


def test_on_a_gpu_the_wall_clock_compares():
    """And 16 bits with both single precisions."""
    device = {"versions": {"device": {"kind": "some", "backend": "gpu"}}}
    rows = [row("ehap", precision, **device) for precision in ("float32", "tf32", "float16")]
    rows += [row("torch-affine", "float16", ms=3.0, **device), row("torch-vectorised", "float16", ms=1.0, **device)]
    single, tf32, half, *_ = compare(rows)
    assert single["times_as_fast_as"] == {} and tf32["times_as_fast_as"].keys() == {"ehap float32"}
    assert half["times_as_fast_as"].keys() == {"ehap float32", "ehap tf32", "torch-affine", "torch-vectorised"}
    assert (half["fastest_pytorch"]["variant"], half["fastest_pytorch"]["by"]) == ("torch-vectorised", "ms")
    assert "cpu_ms" not in half["fastest_pytorch"]


def test_rows_of_other_versions_are_not_compared():
    """What one of the two does not record does not separate them."""
    ours = row("ehap", **versions(jax="0.10"))
    others = [
        row("torch-func", **versions(jax="0.10", torch="2.13")),
        row("torch-affine", **versions(jax="0.11", torch="2.13")),
        row("torch-published", **versions(jax="0.10", torch="2.13"), xla_flags="--some"),
    ]
    found, *_ = compare([ours, *others])
    assert found["times_as_fast_as"].keys() == {"torch-func", "torch-published"}
    found, *_ = compare([{**ours, "xla_flags": ""}, *others])
    assert found["times_as_fast_as"].keys() == {"torch-func"}
    assert not comparable(others[0], row("torch-func", **versions(jax="0.10", torch="2.14")))


def test_time_per_probe():
    marks = [(2, 0.0, 0.0), (4, 2.0, 3.0), (6, 3.0, 5.0), (8, 9.0, 6.0)]
    assert per_probe(marks) == {"ms": 1000.0, "least_ms": 500.0, "cpu_ms": 1000.0, "probes": 6}


def test_presets_name_rows_once_and_cover_every_variant():
    for preset in ("cpu", "gpu", "quick"):
        rows = planned(preset)
        assert len(set(rows)) == len(rows)
    assert {r.variant for r in planned("cpu")} == {*VARIANTS, *PEAKS}
    sizes = {(r.network, r.batch) for r in planned("gpu") if r.network}
    assert sizes == {(n, b) for n in ("resnet32", "resnet56", "wrn28-8") for b in (128, 512)}
    assert {r.network for r in planned("cpu") if r.network} == {n for n, _ in sizes}
    for variant in [v for v in VARIANTS if v != "ehap-devices"]:
        rows = [r for r in planned("gpu") if r.variant == variant]
        assert {(r.network, r.batch, r.precision) for r in rows} == {(*s, p) for s in sizes for p in PRECISIONS}


def test_what_is_done_is_not_repeated(tmp_path, monkeypatch, capsys):
    """Rows of another device are kept and measured again; failed ones again only where asked for."""
    asked = []

    def process(module, arguments, environment=None, seconds=None):
        wanted = json.loads(arguments[1])
        if wanted is None:
            return HERE
        asked.append((wanted["variant"], environment))
        if wanted["variant"] == "torch-vectorised":
            raise ProcessFailed(["python"], 1, "some\nRuntimeError: no memory\n")
        return {**wanted, **TIMES, "needed_gb": 0.4, **HERE}

    monkeypatch.setattr(bench, "fresh_process", process)
    out = tmp_path / "some" / "trace.json"
    line = ["--quick", "--out", str(out), "--variants", "ehap", "torch-vectorised", "--precisions", "float32"]
    for more in ([], [], ["--again"]):
        bench.main([*line, *more])
    theirs = bench.UNCACHED | {"JAX_PLATFORMS": "cpu"}
    assert asked == [("ehap", bench.UNCACHED), *2 * [("torch-vectorised", theirs)]]
    done, failed = read_results(out)["rows"]
    assert done["flops"] == 2e9 and failed["cores"] == 2
    assert failed["failed"] == "ended with status 1: RuntimeError: no memory"
    monkeypatch.setitem(HERE, "cores", 4)
    bench.main(line)
    assert len(read_results(out)["rows"]) == 4
    assert "ended with status 1" in capsys.readouterr().out


@pytest.mark.slow
def test_the_limit_of_a_row_counts_from_its_first_probe(tmp_path, monkeypatch):
    """Its process sets a timer then, whose signal ends it."""
    pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
    timers = []
    monkeypatch.setattr(signal, "setitimer", lambda *given: timers.append(given))
    made = json.dumps(asdict(Row("torch-published", "float32", "tiny", 4, 8)))
    bench.main(["--one", made, "--seconds", "0.01", "--probes", "2", "--row-seconds", "7"])
    assert timers == [(signal.ITIMER_REAL, 7.0)]

    def ended(module, arguments, environment=None, seconds=None):
        if arguments[1] == "null":
            return HERE
        assert arguments[arguments.index("--row-seconds") + 1] == "7.0" and seconds == 10.0
        raise ProcessFailed(["python"], -signal.SIGALRM, "")

    monkeypatch.setattr(bench, "fresh_process", ended)
    line = ["--quick", "--variants", "ehap", "--precisions", "float32", "--row-seconds", "7", "--first-seconds", "3"]
    bench.main([*line, "--out", str(tmp_path / "a.json")])
    (row,) = read_results(tmp_path / "a.json")["rows"]
    assert row["failed"] == "not done in 7 s after the first probe"


def test_a_gpu_that_is_asked_for_must_be_there(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for variant in ("torch-func", "peak-torch", "ehap", "peak-jax"):
        who = "PyTorch" if "torch" in variant else "JAX"
        with pytest.raises(RuntimeError, match=f"{who} sees no GPU"):
            measure(Row(variant, "float32", "tiny", 4, 8), 0.01, 2, gpu=True)


@pytest.mark.parametrize("over", [[True], [False, True]])
def test_a_first_row_that_takes_all_the_time_is_written_as_that(tmp_path, monkeypatch, over):
    """Or the same command would try it for ever; a later one is left for the next time."""
    clock, left = SimpleNamespace(passed=False, minutes_left=lambda: None), list(over)

    def too_long(row, given, here, *_):
        clock.passed = left.pop(0)
        return {**asdict(row), "failed": "not done", **here}

    monkeypatch.setattr(bench, "fresh_process", lambda *_: HERE)
    monkeypatch.setattr(bench, "run_row", too_long)
    monkeypatch.setattr(bench, "Deadline", lambda _: clock)
    bench.main(["--quick", "--out", str(tmp_path / "a.json")])
    assert len(read_results(tmp_path / "a.json")["rows"]) == 1 and not left


@pytest.mark.slow
def test_a_row_runs_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "trace.json"
    line = ["--variants", "ehap-devices", "--precisions", "float32", "--probes", "2", "--seconds", "0.5"]
    bench.main(["--quick", "--out", str(out), *line])
    (ours,) = read_results(out)["rows"]
    assert ours["ms"] > 0 and ours["probes"] == 2 and ours["product"] == "linearize" and ours["needed_gb"] > 0
    assert ours["versions"]["device"]["count"] == len(os.sched_getaffinity(0))
    assert 0 < ours["compile_seconds"] <= ours["first_seconds"]
    assert ours["peak_memory_gb"] > ours["memory_before_gb"] > 0


@pytest.mark.parametrize(
    "made", [Row("torch-published", "float32", "tiny", 4, 8), Row("peak-torch", "float32", side=8)]
)
@pytest.mark.slow
def test_pytorchs_rows(made):
    pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
    found = measure(made, 0.01, 2)
    assert asdict(made).items() <= found.items() and "torch" in found["versions"]["packages"]
    assert found["torch_threads"] >= 1
    assert all(
        found[name] > 0 for name in (("ms", "first_seconds") if made.network else ("matmul_flops", "conv_flops"))
    )


def test_bad_options_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "fresh_process", lambda *_: HERE)
    for line, message in (
        (["--preset", "gpu"], "--preset gpu needs a GPU"),
        (["--preset", "cpu", "--networks", "wrn28-8", "--variants", "torch-func"], "no row of the preset has these"),
        (["--quick"], "--quick needs an --out of its own"),
        (["--out", str(tmp_path / "a.json"), "--probes", "1"], "--probes at least 2"),
        (["--out", str(tmp_path / "a.json"), "--seconds", "0"], "must be positive"),
    ):
        with pytest.raises(SystemExit):
            bench.main(line)
        assert message in capsys.readouterr().err
