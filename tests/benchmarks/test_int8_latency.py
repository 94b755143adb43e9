"""The benchmark of INT8: every row says on what it was measured, also in a file that is days old."""

from benchmarks import int8_latency
from benchmarks.measure import read_results, write_results


def test_every_row_keeps_where_it_was_measured(tmp_path, monkeypatch):
    times = {name: {"onnxruntime_batch1_threads1": time} for name, time in (("float32", 4.0), ("int8", 2.0))}
    monkeypatch.setattr(int8_latency, "networks", lambda *_: iter([("dense", lambda: (None, None))]))
    monkeypatch.setattr(int8_latency, "measure", lambda *_: times)
    monkeypatch.setattr(int8_latency, "milliseconds", lambda calls, seconds: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(int8_latency, "CHANNELS", (3,))
    output = tmp_path / "found.json"
    earlier = {"width": 16, "network": "dense", **times}
    write_results(output, {"cpu": "another", "versions": {"python": "another"}, "networks": [earlier]})
    assert int8_latency.main(["--widths", "16", "32", "--seconds", "0.5", "--output", str(output)]) == 0
    found = read_results(output)
    assert found["cpu"] == found["versions"]["python"] == "another" and found["networks"][0] == earlier
    for row in (found["networks"][1], *found["convolutions"]):
        assert row["versions"]["packages"]["jax"] and row["load_average"] >= 0 and row["cpu"] != "another"
    assert (found["networks"][1]["seconds"], found["convolutions"][0]["seconds"]) == (0.5, 0.125)
    assert [goal["float32 / INT8"] for goal in found["goals"]] == [2.0, 2.0]
