"""The comparison of estimators of traces, on a network small enough to know everything about."""

import json

import jax
import numpy as np
import pytest

from benchmarks import drawn, exact_trace
from benchmarks.exact_trace_report import clock_of_costs, goals, seconds_of, table
from benchmarks.trained import flat, hap_scores, mean_loss
from ehap_jax.curvature import probe_channel_products
from ehap_jax.curvature.probes import rademacher
from ehap_jax.models import ResNet, eval_apply, init_variables, train_apply


@pytest.fixture(scope="module")
def tiny(two_layers):
    apply, params, batch = two_layers
    return exact_trace.Subject(apply, params, batch, mean_loss(apply))


@pytest.mark.slow
def test_runs_stops_and_goes_on(tiny, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="the published weights of probes are in the PyTorch reference")
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
    monkeypatch.setattr(exact_trace, "subject", lambda *_: tiny)
    monkeypatch.setattr(exact_trace, "SIZES", {"resnet20": exact_trace.Size(12, 100, 2)})
    monkeypatch.setattr(exact_trace, "SAMPLED", {name: exact_trace.SAMPLED[name] for name in ("signs 1", "labels 4")})
    monkeypatch.setattr(exact_trace, "SEEDS", 2)
    monkeypatch.setattr(exact_trace, "PROBES_TIMED", 50)  # of so small a network, to take longer than the clock errs
    out = tmp_path / "found.json"
    line = ["--data", "none", "--out", str(out), "--networks", "resnet20", "--only", "costs", "quality"]
    assert exact_trace.main([*line, "--max-minutes", "1e-4"]) == 3
    assert len(json.loads(out.read_text())["networks"]["resnet20"]["costs"]) == 1
    assert exact_trace.main(line) == 0
    found = json.loads(out.read_text())["networks"]["resnet20"]
    methods = {row["method"] for row in found["rows"]}
    assert methods == {"exact float16", "signs", "labels", "published", "rms", "hutchinson", "hutchinson float16"}
    assert all("git" in one["versions"] for one in (*found["rows"], *found["costs"].values()))
    last = [row for row in found["rows"] if row["method"] == "hutchinson"][-1]
    assert last["samples"] == 100
    # Fisher's transform gives the correlation over 11 channels a standard error of 1 / sqrt(8).
    assert abs(np.arctanh(last["spearman"]) - np.arctanh(last["normal_spearman"])) < 3 / 8**0.5
    assert found["z_scores"]["channels"] == 11 and abs(found["z_scores"]["mean"]) < 3
    assert out.with_suffix(".png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "0.99 takes about" in text and text.count("met") == 2
    before = out.read_text()
    assert exact_trace.main(line) == 0  # nothing is left to do
    assert json.loads(out.read_text())["networks"] == json.loads(before)["networks"]


@pytest.mark.slow
def test_every_network_and_precision_keeps_its_own_probes(tiny, monkeypatch, tmp_path):
    files = []
    monkeypatch.setattr(exact_trace, "SAMPLED", {})
    monkeypatch.setattr(exact_trace, "estimates", lambda *given: files.append(given[3]) or iter(()))
    for network in ("resnet20", "resnet32"):
        published = {"method": "published", "samples": exact_trace.PUBLISHED_PROBES}
        done = {"rows": [{"method": "exact float16", "samples": None}, published]}
        size, kept = exact_trace.Size(12, 2, 2), (tmp_path / "found.json").with_suffix(f".{network}")
        assert list(exact_trace.add_quality(tiny, done, size, kept, exact_trace.NO_DEADLINE)) == []
    assert len({file.name for file in files}) == 4


@pytest.mark.slow
def test_published_weights(tiny):
    """Each probe weighs 2^-8 of the one before: the sum over explicit probes."""
    pytest.importorskip("torch", reason="the published weights of probes are in the PyTorch reference")
    expected = 0.0
    for i in range(exact_trace.PUBLISHED_PROBES):
        v = rademacher(jax.random.fold_in(jax.random.key(100), i), dict(tiny.variables))
        products = probe_channel_products(tiny.loss, tiny.variables, v, tiny.batch, policy=exact_trace.HALF)
        expected = expected + hap_scores(flat(products, tiny.variables), tiny.variables) * 2.0 ** (-8 * (i + 1))
    found = exact_trace.published_scores(tiny)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())


def test_probes_to_reach_a_correlation():
    """Noise falls with the root of the number of probes, so the number is proportional to the noise's variance."""
    truth = np.exp(np.random.default_rng(0).normal(size=400))
    one = exact_trace.probes_to_reach(truth, 6 * truth, 0.99)
    assert exact_trace.probes_to_reach(truth, 12 * truth, 0.99) == pytest.approx(4 * one, rel=0.03)
    assert exact_trace.normal_spearman(truth, 6 * truth, one) == pytest.approx(0.99, abs=1e-3)
    other = truth + 6 * truth / one**0.5 * np.random.default_rng(1).normal(size=(50, 400))
    assert np.mean([exact_trace.spearman(z, truth) for z in other]) == pytest.approx(0.99, abs=2e-3)


def test_the_cost_of_a_probe_is_the_median_of_differences(monkeypatch):
    """One pair that other programs delayed, or hurried, changes nothing; what cannot be is refused."""
    seconds = iter([1.0, 4.0, 9.0, 3.0, 1.5, 6.0])  # for one probe, for four, and again

    def timed(call):
        return call(), dict.fromkeys(("seconds", "cpu_seconds"), next(seconds))

    monkeypatch.setattr(exact_trace, "timed", timed)
    asked = []
    found = exact_trace.cost_of_probes(asked.append)
    assert asked == [1, 4] * 4  # the first two compile
    assert found["probe"] == {"seconds": 1.0, "cpu_seconds": 1.0} and found["start"]["seconds"] == 0.5
    assert [one["seconds"] for one in found["differences"]] == [1.0, -2.0, 1.5]
    seconds = iter([1.0, 4.0, 1.0, 1.0, 1.0, 0.9])
    with pytest.raises(RuntimeError, match=r"(?s)took .* by the median of 3 differences .*too busy"):
        exact_trace.cost_of_probes(asked.append)


@pytest.mark.parametrize(
    "document",
    [
        {"timing": [{"network": "resnet20", "device": "cpu"}]},
        {"networks": {"resnet20": {"rows": [{"method": "signs"}]}}},
        {"networks": {"resnet20": {"costs": {"exact": {}}, "provenance": {"quality": {}}}}},
    ],
)
def test_a_file_of_an_earlier_layout_is_refused(document, tmp_path, capsys):
    out = tmp_path / "found.json"
    out.write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        exact_trace.main(["--data", "none", "--out", str(out)])
    assert "found.json: " in (said := capsys.readouterr().err) and "rows without `versions`" in said
    assert json.loads(out.read_text()) == document


def test_goals_and_seconds():
    cpu = {"versions": {"device": {"backend": "cpu"}}}
    clocks = {"seconds": 4.0, "cpu_seconds": 2.0}
    costs = {"exact": {"start": clocks, **cpu}, "signs 1": {"start": {"seconds": 9.0, "cpu_seconds": 0.5}}}
    start = dict.fromkeys(clocks, 10.0)
    costs["hutchinson"] = {"start": start, "probe": {"seconds": 0.0, "cpu_seconds": 0.5}}
    assert seconds_of(costs, "exact", None, "seconds") == 4
    assert seconds_of(costs, "rms", 20, "cpu_seconds") == 20 and seconds_of(costs, "labels", 1, "cpu_seconds") == 0.5
    assert seconds_of(costs, "rms", 20, "seconds") is None  # a probe took no time
    assert seconds_of(costs, "exact float16", None, "seconds") is None
    rows = [{"method": "signs", "samples": 1, "spearman": s, "overlap_30": 0.5} for s in (0.97, 0.95)]
    probe = {"method": "hutchinson", "samples": 300, "spearman": 0.96, "overlap_30": 0.5}
    rows.append({**probe, "probes_to_goal": 1000.0, "expected_spearman": 0.9, "normal_spearman": 0.9})
    entry = {"images": 4, "weights": "trained", "costs": costs, "rows": rows, "z_scores": {}}
    entry["provenance"] = {"costs": cpu}  # of those that have none of their own
    assert clock_of_costs(entry) == "cpu_seconds"
    assert clock_of_costs({"costs": {"exact": {"versions": {"device": {"backend": "gpu"}}}}}) == "seconds"
    timing = {
        "network": "resnet32",
        "images": 512,
        "first_call": clocks,
        "second_call": clocks,
        "one_combination": clocks,
        "peak_memory_gb": 2.5,
        **cpu,
    }
    results = {"networks": {"resnet20": entry}, "timing": [timing]}
    judged = goals(results)
    assert [(row["measured"], row["met"]) for row in judged] == [
        (255, False),  # 10 + 0.5 * 1000 seconds against 2
        (320, True),  # 10 + 0.5 * 300 against 0.5
        (0.95, False),
        (4.0, True),  # as long as one waits, not the CPU's 2
        (2.5, False),
    ]
    assert all((row["images"], row["weights"]) == (4, "trained") for row in judged[:3])
    assert [row["goal"].startswith("extrapolated") for row in judged[:3]] == [True, True, False]
    text = table({**results, "goals": judged})
    assert text.count("NOT met") == 3 and "160.00 CPU s extrapolated" in text
    timing["versions"] = {"device": {"backend": "gpu"}}
    assert (goals(results)[3]["measured"], goals(results)[3]["met"]) == (4, False)


@pytest.mark.slow
def test_statistics_are_those_of_the_batch():
    module = ResNet(8, 3, widths=(2, 2, 4))
    variables = init_variables(module, jax.random.key(0), (8, 8, 3))
    x = jax.random.normal(jax.random.key(1), (6, 8, 8, 3)) + 1
    found = drawn.with_statistics_of(module, variables, x)
    np.testing.assert_allclose(eval_apply(module)(found, x), train_apply(module)(variables, x)[0], rtol=1e-3, atol=1e-4)
    head = drawn.with_new_head(variables, 50)["params"]["linear"]
    assert head["kernel"].shape == (4, 50) and head["bias"].shape == (50,)
