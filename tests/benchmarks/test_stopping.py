"""The stopping rules, on a network small enough to repeat every probe."""

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import stopping
from benchmarks.trained import flat, hap_scores, mean_loss
from ehap_jax.curvature import channel_trace, stable_decision
from ehap_jax.curvature.channel_trace import MIN_PROBES_TO_STOP

PROBES = MIN_PROBES_TO_STOP + 4


@pytest.fixture(scope="module")
def tiny(two_layers):
    apply, params, batch = two_layers
    return mean_loss(apply), params, batch


@pytest.mark.slow
def test_a_course_is_what_channel_trace_gives_at_every_number_of_probes(tiny):
    loss, params, batch = tiny
    course = stopping.course_of(loss, params, batch, 3, PROBES, None)
    assert course.totals.shape == (PROBES,) and course.scores.shape == (PROBES, 11)
    for count in (1, MIN_PROBES_TO_STOP, PROBES):
        found = channel_trace(loss, params, batch, key=jax.random.key(3), num_probes=count, probes_per_step=1)
        assert course.totals[count - 1] == pytest.approx(found.total(), rel=1e-5)
        np.testing.assert_allclose(course.scores[count - 1], hap_scores(flat(found.mean, params), params), rtol=1e-4)
        for tolerance in stopping.DECISIONS:
            rule = stable_decision(params, prune=0.5, tolerance=tolerance)
            expected = count >= MIN_PROBES_TO_STOP and rule(found)
            assert course.settled[tolerance][count - 1] == expected
    # A rule that stops leaves channel_trace where the course says.
    rtol = float(course.sems[-3] / abs(course.totals[-3])) * 1.0001
    stop = stopping.first_true(stopping.rtol_rule(course, rtol))
    found = channel_trace(loss, params, batch, key=jax.random.key(3), num_probes=PROBES, probes_per_step=1, rtol=rtol)
    assert stop == found.count


def test_rows():
    """Two seeds, one of which never stops: it counts with its last probe."""
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    right, wrong = truth, truth[::-1]
    courses = [
        stopping.Course(np.array([9.0, 11.0]), np.ones(2), np.array([wrong, right]), {}),
        stopping.Course(np.array([5.0, 12.0]), np.ones(2), np.array([right, wrong]), {}),
    ]
    row = stopping.summarise([1, None], courses, 10.0, truth)
    assert row["probes"] == {"median": 1.5, "min": 1, "max": 2} and row["never_stopped"] == 1
    assert row["relative_error"]["max"] == pytest.approx(0.2)
    assert row["relative_error"]["rms"] == pytest.approx(((0.1**2 + 0.2**2) / 2) ** 0.5)
    assert row["misplaced_share"] == 1.0  # both are wrong where they are looked at
    assert stopping.first_true(np.array([False, False])) is None
    moves = stopping.running_mean_rule(np.array([1.0, 2.0, 2.001]), 1e-2)
    assert moves.tolist() == [False, False, True]


def test_networks_lie_side_by_side_in_one_file(monkeypatch, tmp_path, capsys):
    out = tmp_path / "stopping.json"
    out.write_text(json.dumps({"another": {"rows": []}}))
    found = {"network": "one", "images": 1, "seeds": 2, "channels": 3, "rows": []}
    monkeypatch.setattr(stopping, "measure", lambda *_: found)
    monkeypatch.setattr(sys, "argv", ["stopping", "checkpoint", "--out", str(out)])
    stopping.main()
    assert json.loads(out.read_text()) == {"another": {"rows": []}, "one": found}
    assert "one, 1 images, 2 seeds" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["stopping", "checkpoint", "--probes", str(MIN_PROBES_TO_STOP)])
    with pytest.raises(SystemExit):
        stopping.main()
    assert "--probes must be more than" in capsys.readouterr().err
