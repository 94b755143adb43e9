"""Plans: what is checked, JSON round trips, broken files."""

import json
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import architecture_fingerprint, trace_graph
from ehap_jax.models import ResNet, eval_apply, train_apply
from ehap_jax.pruning import PruningPlan
from tests.pruning.networks import SHAPES, apply, conv, images, structs


@pytest.fixture(scope="module")
def graph():
    return trace_graph(apply)(structs(), images())


STREAM = [0, 2, 5]
KEEP = {"stem": STREAM, "a1": [1, 4], "a2": STREAM}


def same(a, b):
    assert a.coupling == b.coupling and a.shapes == b.shapes and a.axes == b.axes
    assert a.provenance == b.provenance and a.fingerprint == b.fingerprint and a.versions == b.versions
    assert {p: (i.channels.tolist(), i.centre) for p, i in a.implants.items()} == {
        p: (i.channels.tolist(), i.centre) for p, i in b.implants.items()
    }
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
    provenance = {"criterion": "test", "cost": {"macs": 7}}
    plan = PruningPlan.from_keep(
        graph, KEEP, coupling=coupling, implants={"a1": [4], "stem": STREAM}, provenance=provenance
    )
    path = plan.save(tmp_path / "made" / "plan.json")
    same(PruningPlan.load(path), plan)
    assert PruningPlan.load(path) == plan
    document = json.loads(path.read_text())
    assert document["keep"]["a1"] == [1, 4]
    assert document["implants"]["a1"] == {"channels": [4], "centre": {"0": 1, "1": 1}}
    assert document["versions"] == {"ehap-jax": version("ehap-jax"), "jax": jax.__version__}
    assert document["fingerprint"] == architecture_fingerprint(graph)
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


def test_plans_are_equal_that_do_the_same(graph):
    """However they came about; and different where anything that is kept differs."""
    plan = PruningPlan.from_keep(graph, KEEP, provenance={"criterion": "one"})
    same_kept = PruningPlan.from_keep(graph, {**KEEP, "stem": [5, 2, 0]}, provenance={"criterion": "two"})
    others = [
        PruningPlan.from_keep(graph, {**KEEP, "a1": [1, 3]}),
        PruningPlan.from_keep(graph, KEEP, coupling="union"),
        PruningPlan.from_keep(graph, KEEP, implants={"a1": [4]}),
        PruningPlan.from_keep(graph, {}),
    ]
    assert plan == same_kept and hash(plan) == hash(same_kept)
    assert plan not in others and plan != "a plan" and len({plan, same_kept, *others}) == 5


def test_union_coupling_prunes_writers_apart(graph):
    plan = PruningPlan.from_keep(graph, {"stem": [0, 1]}, coupling="union")
    assert plan.slices["stem"][3].tolist() == [0, 1]
    assert "head" not in plan.slices and "bias" not in plan.slices


def test_a_plan_applies_to_any_checkpoint_of_its_architecture_and_no_other(graph):
    """Batch size, dtype and weights do not matter; another wiring of the same variables does."""
    plan = PruningPlan.from_keep(graph, KEEP)
    half = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
    plan.check(trace_graph(apply)(half, jax.ShapeDtypeStruct((7, 8, 8, 3), jnp.bfloat16)))

    def rewired(v, x):
        h = jax.nn.relu(conv(x, v["stem"]))
        h = jax.nn.relu(conv(jax.nn.relu(conv(h, v["a1"])), v["a2"]) + v["bias"][None, None, None])
        return h.mean((1, 2)) @ v["head"]

    with pytest.raises(ValueError, match=f"ties their channels in another way.*{plan.fingerprint}"):
        plan.check(trace_graph(rewired)(structs(), images()))
    wider = {**structs(), "a1": jax.ShapeDtypeStruct((3, 3, 6, 7), jnp.float32)}
    wider["a2"] = jax.ShapeDtypeStruct((3, 3, 7, 6), jnp.float32)
    with pytest.raises(ValueError, match=r"another network: a1 is \(3, 3, 6, 5\) there and \(3, 3, 6, 7\) in this"):
        plan.check(trace_graph(apply)(wider, images()))
    with pytest.raises(ValueError, match=r"a2 is \(3, 3, 5, 6\) there and no such variable"):
        plan.check(trace_graph(lambda w, x: x @ w["a1"][0, 0])({"a1": structs()["a1"]}, jnp.ones((1, 6))))


def test_fingerprints_of_evaluation_and_training_mode_agree():
    model = ResNet(depth=8, num_classes=3, shortcut="A", widths=(4, 6, 8))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    found = {architecture_fingerprint(trace_graph(mode(model))(shapes, x)) for mode in (eval_apply, train_apply)}
    other = model.clone(shortcut="B")
    shapes = jax.eval_shape(other.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert len(found) == 1 and architecture_fingerprint(trace_graph(eval_apply(other))(shapes, x)) not in found


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
        (lambda d: d.pop("implants"), "implants"),
        (lambda d: d.pop("fingerprint"), "fingerprint"),
        (lambda d: d["implants"].update(a1=[4]), "not a well-formed"),
        (lambda d: d["implants"]["a1"].update(channels=[0]), "a1 has an implant at channel 0, which it does not keep"),
        (lambda d: d["implants"]["a1"].update(channels=[4, 1]), "ascending"),
        (lambda d: d["implants"]["a1"].update(centre={"0": 0, "1": 1}), "not at the centre of a kernel"),
        (lambda d: d["implants"]["a1"].update(centre={"3": 2}), "not at the centre"),
        (lambda d: d["implants"]["a1"].update(centre={}), "not at the centre"),
        (lambda d: d["implants"].update(bias={"channels": [0], "centre": {"0": 1}}), "no output axis of bias"),
        (lambda d: d.update(slices=[]), "not a well-formed"),
        (lambda d: d["keep"].pop("a1"), '"keep" and "slices" disagree.*a1'),
        (lambda d: d["slices"].pop("a1"), '"keep" and "slices" disagree.*a1'),
        (lambda d: d["axes"].pop("a1"), "no output axis of a1"),
        (lambda d: d["axes"].update(a1=-1), "output axis -1 of a1"),
        (lambda d: d["axes"].update(a1=3.0), "3.0 is not a whole number"),
        (lambda d: d["axes"].update(ghost=0), "output axis 0 of ghost"),
        (lambda d: d["shapes"].update(bias=[10**12]), r"bias has the shape \(1000000000000,\)"),
        (lambda d: d["shapes"].update(bias=["6"]), "'6' is not a whole number"),
        (lambda d: d["slices"]["bias"].update({"0": [10**30]}), "integers"),
        (lambda d: d.update(provenance=[1]), "not a well-formed"),
    ],
)
def test_broken_plans_are_refused(graph, tmp_path, change, message):
    plan = PruningPlan.from_keep(graph, KEEP, implants={"a1": [4]})
    document = json.loads(plan.save(tmp_path / "plan.json").read_text())
    change(document)
    with pytest.raises(ValueError, match=message):
        PruningPlan.load(broken(document, tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00"])
def test_files_that_are_no_json_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="is not a JSON file"):
        PruningPlan.load(broken(text, tmp_path))


@pytest.mark.parametrize("text", ["[]", "3", "null", '"plan"'])
def test_json_that_is_no_plan_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="must hold an object"):
        PruningPlan.load(broken(text, tmp_path))
