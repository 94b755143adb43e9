"""Networks read back from a directory: what does not belong to the network described there is refused by name."""

import json

import jax
import numpy as np
import pytest

from ehap_jax import PruningPlan, shrink_variables
from ehap_jax.training import RunDirectory
from recipes.network import Architecture, load_network, new_network, save_network

SMALL = Architecture("resnet8", 3, (8, 8, 2), ((0.5, 0.4), (0.2, 0.3)), {"shortcut": "B", "widths": (2, 2, 4)})


@pytest.fixture(scope="module")
def network():
    return new_network(SMALL, 0)


@pytest.fixture
def saved(network, tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    save_network(run, network)
    return run.path


@pytest.mark.slow
def test_what_is_read_is_what_was_saved(network, saved):
    found = load_network(saved)
    assert found.architecture == network.architecture and found.plan is None
    jax.tree.map(np.testing.assert_array_equal, found.variables, network.variables)


@pytest.mark.slow
def test_a_shrunk_network_and_a_plan_of_another(network, saved):
    plan = PruningPlan.from_keep(network.graph(), {"params/layer1_0/conv1/kernel": [1]})
    small = network._replace(variables=shrink_variables(network.variables, plan), plan=plan)
    run = RunDirectory.create(saved, resume=True)
    save_network(run, small)
    x = np.ones((1, 8, 8, 2), np.float32)
    np.testing.assert_array_equal(load_network(saved).variables["params"]["conv1"]["kernel"].shape, (3, 3, 2, 2))
    assert load_network(saved).apply(small.variables, x).shape == (1, 3)
    other = new_network(
        Architecture("resnet8", 3, (8, 8, 2), SMALL.normalisation, {"shortcut": "B", "widths": (4, 2, 4)}), 0
    )
    strange = PruningPlan.from_keep(other.graph(), {"params/layer1_0/conv1/kernel": [1]})
    (saved / "plan.json").unlink()
    strange.save(saved / "plan.json")
    with pytest.raises(ValueError, match=r"plan\.json is for another network: 'batch_stats/bn1/mean' differs"):
        load_network(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"shortcut": "A", "widths": [2, 2, 4]}}, r"network\.npz: .*unexpected \['batch_stats/layer"),
        ({"options": {"shortcut": "C", "widths": [2, 2, 4]}}, r"network\.json is of no network that can be built"),
        ({"options": {"depth": 8}}, "no network that can be built"),
        ({"options": {"widths": [2, 2, 10**9]}}, "'options' must be texts, truth values and lengths from 1"),
        ({"options": {"shortcut": "B", "widths": [2, 2, 8]}}, "has shape .* but the network"),
        ({"options": {"dtype": {"a": 1}}}, "'options' must be"),
        ({"options": None}, "'options' must be a dict, not None"),
        ({"model": "resnet999998"}, "a model that 47 arrays are enough for"),
        ({"model": "alexnet"}, "unknown model 'alexnet'"),
        ({"model": 8}, "'model' must be a str, not 8"),
        ({"num_classes": 10**12}, "'num_classes' must be a number from 1 to 65,536"),
        ({"num_classes": True}, "'num_classes' must be a int, not True"),
        ({"num_classes": 4}, "has shape"),
        ({"image_shape": [8, 8]}, "'image_shape' must be three lengths"),
        ({"image_shape": [8, 8, 1]}, "'normalisation' must be"),
        ({"normalisation": [[0.5, 0.5], [0.1, float("nan")]]}, "'normalisation' must be"),
        ({"normalisation": [[0.5, 0.5], [0.1, 0]]}, "'normalisation' must be"),
        ({"normalisation": [[0.5, 1e999], [0.1, 0.1]]}, "'normalisation' must be"),
        ({"normalisation": [0.5, 0.5]}, "'normalisation' must be"),
        ({"normalisation": None}, "'normalisation' must be a list, not None"),
    ],
)
def test_descriptions_that_do_not_fit(saved, change, message):
    found = json.loads((saved / "network.json").read_text())
    (saved / "network.json").write_text(json.dumps(found | change))
    with pytest.raises(ValueError, match=message):
        load_network(saved)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("params/conv1/kernel", None, r"missing \['params/conv1/kernel'\]"),
        ("params/extra", np.zeros(1, np.float32), r"unexpected \['params/extra'\]"),
        ("params/conv1/kernel", np.zeros((3, 3, 2, 3), np.float32), "has shape"),
        (
            "params/conv1/kernel",
            np.zeros((3, 3, 2, 2), bool),
            "kernel is bool; this network is of float32",
        ),
        ("params/conv1/kernel", np.zeros((3, 3, 2, 2), complex), "complex128"),
        ("params/conv1/kernel", np.zeros((3, 3, 2, 2)), "float64"),
        ("params/conv1/kernel", np.full((3, 3, 2, 2), np.nan, np.float32), "NaN or infinity in params/conv1/kernel"),
        ("batch_stats/bn1/var", np.array([-1, 1], np.float32), "batch_stats/bn1/var has a variance that is negative"),
        ("batch_stats/bn1/var", np.array([np.nan, 1], np.float32), "negative or not a number"),
        ("params/" + "a/" * 1000 + "b", np.zeros(1, np.float32), "is no name of a variable"),
        ("params/conv1/kernel/more", np.zeros(1, np.float32), "is no name of a variable"),
        ("params", np.zeros(1, np.float32), "is no name of a variable"),
    ],
)
def test_variables_that_are_not_those_of_the_network(saved, name, value, message):
    with np.load(saved / "network.npz") as found:
        arrays = dict(found)
    arrays |= {name: value}
    np.savez(saved / "network.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message):
        load_network(saved)
