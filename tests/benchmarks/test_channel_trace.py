"""The benchmark of a probe: what it counts, what it compares, and that it runs and goes on from where it was."""

import json
import re
from dataclasses import asdict

import jax
import pytest

from benchmarks import channel_trace as bench
from benchmarks.measure import read_results
from ehap_jax.curvature import Policy
from ehap_jax.curvature.probe_loop import Run, add_chunk, add_linear_chunk, begin, blank_state, linearize_chunk
from ehap_jax.curvature.probes import is_kernel
from ehap_jax.curvature.problem import prepare

ROW = bench.Row("ehap", "float32", "tiny", batch=4, side=8)
HERE = {"versions": {"device": {"kind": "cpu", "backend": "cpu"}}, "cpu": "some", "cores": 2}
TIMES = {"ms": 2.0, "cpu_ms": 3.0, "probes": 4, "flop_per_probe": 4e6, "compile_seconds": 1.0, "peak_memory_gb": 0.5}
CONVOLUTIONS_AND_PRODUCTS = 7 + 2 + 1
"""Of ResNet-8: 3x3, shortcuts, and the dense layer."""


def row(variant, precision="float32", **about):
    sizes = asdict(bench.Row(variant, precision, "tiny", 4, 8))
    return {**sizes, **TIMES, "needed_gb": 0.4, **HERE, **about}


def peak(variant, matmul, conv, precision="float32"):
    return {**asdict(bench.Row(variant, precision, side=8)), "matmul_flops": matmul, "conv_flops": conv, **HERE}


@pytest.fixture(scope="module")
def start():
    return bench.loss_and_start(ROW)


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
    whole, less = bench.PASSES[way]
    expected = whole * CONVOLUTIONS_AND_PRODUCTS - less
    assert len(re.findall(r" (?:convolution|dot)\(", text)) - expected in (0, 1)


@pytest.mark.parametrize("variant", ["torch-published", "torch-vectorised", "torch-func"])
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
    assert counter.get_total_flops() == pytest.approx(bench.flop_per_probe(variant, forward, first), rel=0.03)


def test_rows_are_compared_with_their_like():
    rows = [
        row("ehap"),
        row("ehap", "bfloat16", ms=0.5, needed_gb=0.1, peak_memory_gb=0.25),
        row("torch-vectorised", ms=6.0),
        row("torch-func", ms=9.0, cores=64),
        row("torch-func", "bfloat16", ms=1.0),
        {**row("torch-compile"), "failed": "not done in 3 s"},
        peak("peak-jax", 4e9, 2e9),
        peak("peak-torch", 8e9, 1e9),
    ]
    ours, half, *_ = found = bench.compare(rows)
    assert ours["times_as_fast_as"] == {"torch-vectorised": 3.0}
    assert (ours["flops"], ours["of_matmul_peak"], ours["of_conv_peak"]) == (2e9, 0.25, 1.0)
    assert half["times_as_fast_as"] == {"ehap float32": 4.0, "torch-func": 2.0}
    assert (half["needed_gb_of_float32"], half["peak_memory_gb_of_float32"]) == (0.25, 0.5)
    assert "of_conv_peak" not in half
    text = bench.table(found)
    assert "not done in 3 s" in text and "torch-vectorised 3.00" in text and "matmul 8 GFLOP/s" in text


def test_time_per_probe():
    marks = [(2, 0.0, 0.0), (4, 2.0, 3.0), (6, 3.0, 5.0), (8, 9.0, 6.0)]
    assert bench.per_probe(marks) == {"ms": 1000.0, "least_ms": 500.0, "cpu_ms": 1000.0, "probes": 6}


def test_presets_name_rows_once_and_cover_every_variant():
    for preset in ("cpu", "gpu", "quick"):
        rows = bench.planned(preset)
        assert len(set(rows)) == len(rows)
    assert {r.variant for r in bench.planned("cpu")} == {*bench.VARIANTS, *bench.PEAKS}
    sizes = {(r.network, r.batch) for r in bench.planned("gpu") if r.network}
    assert sizes == {(n, b) for n in ("resnet32", "resnet56", "wrn28-8") for b in (128, 512)}
    for variant in bench.VARIANTS:
        rows = [r for r in bench.planned("gpu") if r.variant == variant]
        assert {(r.network, r.batch, r.precision) for r in rows} == {(*s, p) for s in sizes for p in bench.PRECISIONS}


def test_what_is_done_is_not_repeated(tmp_path, monkeypatch, capsys):
    """Rows of another device are kept and measured again; failed ones again only where asked for."""
    asked = []

    def process(module, arguments, environment=None, seconds=None):
        wanted = json.loads(arguments[1])
        if wanted is None:
            return HERE
        asked.append((wanted["variant"], environment))
        if wanted["variant"] == "torch-vectorised":
            raise RuntimeError('python -m benchmarks.channel_trace --one {"a": 1} ended with status 1')
        return {**wanted, **TIMES, "needed_gb": 0.4, **HERE}

    monkeypatch.setattr(bench, "fresh_process", process)
    out = tmp_path / "some" / "trace.json"
    line = ["--quick", "--out", str(out), "--variants", "ehap", "torch-vectorised", "--precisions", "float32"]
    for more in ([], [], ["--again"]):
        bench.main([*line, *more])
    assert asked == [("ehap", None), *2 * [("torch-vectorised", {"JAX_PLATFORMS": "cpu"})]]
    done, failed = read_results(out)["rows"]
    assert done["flops"] == 2e9 and failed["failed"] == "ended with status 1" and failed["cores"] == 2
    monkeypatch.setitem(HERE, "cores", 4)
    bench.main(line)
    assert len(read_results(out)["rows"]) == 4
    assert "ended with status 1" in capsys.readouterr().out


def test_a_row_runs_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "trace.json"
    line = ["--variants", "ehap", "--precisions", "float32", "--probes", "2", "--seconds", "0.5"]
    bench.main(["--quick", "--out", str(out), *line])
    (ours,) = read_results(out)["rows"]
    assert ours["ms"] > 0 and ours["probes"] == 2 and ours["product"] == "linearize" and ours["needed_gb"] > 0
    assert 0 < ours["compile_seconds"] <= ours["first_seconds"]
    assert ours["peak_memory_gb"] > ours["memory_before_gb"] > 0


@pytest.mark.parametrize(
    "made", [bench.Row("torch-published", "float32", "tiny", 4, 8), bench.Row("peak-torch", "float32", side=8)]
)
def test_pytorchs_rows(made):
    pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
    found = bench.measure(made, 0.01, 2)
    assert asdict(made).items() <= found.items() and "torch" in found["versions"]["packages"]
    assert all(
        found[name] > 0 for name in (("ms", "first_seconds") if made.network else ("matmul_flops", "conv_flops"))
    )


def test_bad_options_are_named(tmp_path, capsys):
    for line, message in (
        (["--quick"], "--quick needs an --out of its own"),
        (["--out", str(tmp_path / "a.json"), "--probes", "1"], "--probes at least 2"),
        (["--out", str(tmp_path / "a.json"), "--seconds", "0"], "must be positive"),
    ):
        with pytest.raises(SystemExit):
            bench.main(line)
        assert message in capsys.readouterr().err
