"""Plans: what is checked, JSON round trips, broken files."""

import json

import numpy as np
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.pruning import PruningPlan
from tests.pruning.networks import SHAPES, apply, images, structs


@pytest.fixture(scope="module")
def graph():
    return trace_graph(apply)(structs(), images())


STREAM = [0, 2, 5]
KEEP = {"stem": STREAM, "a1": [1, 4], "a2": STREAM}


def same(a, b):
    assert a.coupling == b.coupling and a.shapes == b.shapes and a.axes == b.axes
    assert a.provenance == b.provenance
    assert a.keep.keys() == b.keep.keys() and a.slices.keys() == b.slices.keys()
    for path, kept in a.keep.items():
        np.testing.assert_array_equal(kept, b.keep[path])
    for path, axes in a.slices.items():
        assert axes.keys() == b.slices[path].keys()
        for axis, kept in axes.items():
            np.testing.assert_array_equal(kept, b.slices[path][axis])


def test_slices_follow_from_what_the_kernels_keep(graph):
    plan = PruningPlan.from_keep(graph, {**KEEP, "stem": [5, 0, 2, 2]})
    found = {path: {axis: kept.tolist() for axis, kept in s.items()} for path, s in plan.slices.items()}
    assert found == {
        "stem": {3: STREAM},
        "a1": {2: STREAM, 3: [1, 4]},
        "a2": {2: [1, 4], 3: STREAM},
        "bias": {0: STREAM},
        "head": {0: STREAM},
    }
    assert plan.shrunk_shape("a1") == (3, 3, 3, 2)
    assert plan.shapes == SHAPES


def test_kernels_that_keep_everything_are_left_out(graph):
    plan = PruningPlan.from_keep(graph, {"a1": range(5), "stem": range(6)})
    assert plan.keep == {} and plan.slices == {}


@pytest.mark.parametrize("coupling", ["group", "union"])
def test_json_round_trip(graph, tmp_path, coupling):
    plan = PruningPlan.from_keep(graph, KEEP, coupling=coupling, provenance={"criterion": "test", "cost": {"macs": 7}})
    path = plan.save(tmp_path / "made" / "plan.json")
    same(PruningPlan.load(path), plan)
    assert json.loads(path.read_text())["keep"]["a1"] == [1, 4]
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"], "a temporary file was left behind"


def test_an_existing_file_is_not_overwritten(graph, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"plan\.json"):
        PruningPlan.from_keep(graph, KEEP).save(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    "keep, error, message",
    [
        ({"nothing": [0]}, KeyError, r"'nothing' is not a conv or dense kernel.*a1, a2, head, stem"),
        ({"bias": [0]}, KeyError, "'bias' is not"),
        ({"a1": []}, ValueError, "a1 would keep no channel"),
        ({"a1": [0, 5]}, ValueError, r"a1 has output channels 0 to 4, .* keeps 5"),
        ({"a1": [-1, 2]}, ValueError, r"keeps -1"),
        ({"a1": [True, False, True, True, False]}, ValueError, "a1: channels to keep must be a list of integers"),
        ({"a1": [0.5]}, ValueError, "integers"),
        ({"a1": [[0, 1]]}, ValueError, "integers"),
        ({"head": [0]}, ValueError, "head: output channel 1 cannot be pruned"),
        ({"stem": [0, 1]}, ValueError, r"live and die together.*coupling"),
    ],
)
def test_what_a_network_cannot_do_is_refused(graph, keep, error, message):
    with pytest.raises(error, match=message):
        PruningPlan.from_keep(graph, keep)


def test_union_coupling_prunes_writers_apart(graph):
    plan = PruningPlan.from_keep(graph, {"stem": [0, 1]}, coupling="union")
    assert plan.slices["stem"][3].tolist() == [0, 1]
    assert "head" not in plan.slices and "bias" not in plan.slices


def broken(document, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format="other"), "not a pruning plan"),
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(coupling="both"), '"coupling"'),
        (lambda d: d.pop("keep"), "not a well-formed pruning plan.*keep"),
        (lambda d: d.pop("shapes"), "shapes"),
        (lambda d: d["keep"].update(a1=[1, 2]), '"keep" and "slices" disagree.*a1'),
        (lambda d: d["keep"].update(a1="1"), "a1"),
        (lambda d: d["slices"]["bias"].update({"0": [0, 6]}), r"bias axis 0.*0 to 5"),
        (lambda d: d["slices"]["bias"].update({"0": [2, 0]}), "ascend"),
        (lambda d: d["slices"]["bias"].update({"0": [0.5]}), "integers"),
        (lambda d: d["slices"]["bias"].update({"0": []}), "bias"),
        (lambda d: d["slices"]["bias"].update({"1": [0]}), "bias axis 1 does not fit"),
        (lambda d: d["slices"].update(ghost={"0": [0]}), "ghost"),
        (lambda d: d.update(slices=[]), "not a well-formed"),
    ],
)
def test_broken_plans_are_refused(graph, tmp_path, change, message):
    document = json.loads(PruningPlan.from_keep(graph, KEEP).save(tmp_path / "plan.json").read_text())
    change(document)
    with pytest.raises(ValueError, match=message):
        PruningPlan.load(broken(document, tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00"])
def test_files_that_are_no_json_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="is not a JSON file"):
        PruningPlan.load(broken(text, tmp_path))


@pytest.mark.parametrize("text", ["[]", "3", "null", '"plan"'])
def test_json_that_is_no_plan_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="not a pruning plan"):
        PruningPlan.load(broken(text, tmp_path))
