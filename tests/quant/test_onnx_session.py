"""Sessions that are right on both kinds of processors, those that saturate and those that do not.

The machine is of one kind; what the other kind computes is a model of its kernel in NumPy (`tests.quant.saturating`).
"""

import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehap_jax.quant import QuantRule, onnx_session, save_onnx, sums_saturate, to_integer, to_onnx
from ehap_jax.quant.onnx_session import LARGEST_SAFE_WEIGHT, PRECISE, largest_weight
from tests.quant.networks import calibrate
from tests.quant.saturating import exact_product, run_dense, saturating_product

onnx = pytest.importorskip("onnx", reason="needs pip install 'ehap-jax[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="needs pip install 'ehap-jax[onnx]'")

WIDTH = 33  # odd: one product has no partner
DRAWN = np.random.default_rng(0)
WEIGHTS = [jnp.asarray(DRAWN.normal(size=(WIDTH, WIDTH)), jnp.float32) for _ in range(3)]
X = jnp.asarray(DRAWN.normal(size=(4, WIDTH)), jnp.float32)


def dense(weights, x):
    for w in weights[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ weights[-1]


@pytest.fixture(scope="module", params=[8, 7])
def exported(request):
    """(bits of the weights, the network in integers, the ONNX model)."""
    quantized, qstate = calibrate(dense, WEIGHTS, X, (QuantRule(weight_bits=request.param),))
    network = to_integer(quantized, WEIGHTS, qstate, example=X)
    return request.param, network, to_onnx(quantized, WEIGHTS, qstate, example=X, expose=True)


def outputs(session):
    names = [out.name.removesuffix("/out") for out in session.runtime.get_outputs()]
    return dict(zip(names, session.runtime.run(None, {"x": np.asarray(X)}), strict=True))


def assert_equal(found, logits, tensors):
    for name, integers in tensors.items():
        np.testing.assert_array_equal(found[name], integers, err_msg=name)
    np.testing.assert_array_equal(found["y"], logits)


@pytest.mark.slow
def test_the_model_with_exact_products_is_the_integer_network(exported):
    _, network, _ = exported
    logits, tensors = run_dense(network, X, exact_product)
    assert_equal({"y": logits, **tensors}, network(X), network.tensors(X))


def test_default_options_compute_what_the_model_of_this_processor_does(exported):
    _, network, model = exported
    plain = onnx_session(model, saturates=False)
    assert not plain.precise
    assert_equal(outputs(plain), *run_dense(network, X, saturating_product if sums_saturate() else exact_product))


def test_weights_of_8_bits_are_wrong_where_sums_saturate_and_those_of_7_are_not(exported):
    bits, network, _ = exported
    logits, tensors = run_dense(network, X, saturating_product)
    wrong = sum(int((tensors[name] != np.asarray(want)).sum()) for name, want in network.tensors(X).items())
    assert (wrong > 0) == (bits == 8)
    assert bool((logits != np.asarray(network(X))).any()) == (bits == 8)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_safe_weights_never_saturate(data):
    k = data.draw(st.integers(1, 9))
    x = data.draw(st.lists(st.integers(0, 255), min_size=k, max_size=k))
    safe = st.integers(-LARGEST_SAFE_WEIGHT, LARGEST_SAFE_WEIGHT)
    w = data.draw(st.lists(safe, min_size=k, max_size=k))
    x, w = np.array(x)[None], np.array(w)[:, None]
    assert (saturating_product(x, w) == exact_product(x, w)).all()


def test_the_next_weight_saturates():
    x, w = np.full((1, 2), 255), np.full((2, 1), LARGEST_SAFE_WEIGHT + 1)
    assert saturating_product(x, w) == 2**15 - 1 < exact_product(x, w)


@pytest.mark.parametrize("saturates", [None, True, False])
def test_the_session_is_right(exported, saturates):
    """Whatever the processor; on one that saturates, unless it is told that it does not."""
    bits, network, model = exported
    session = onnx_session(model, saturates=saturates)
    measured = sums_saturate() if saturates is None else saturates
    assert session.saturates == measured and session.precise == (measured and bits == 8)
    words = "at most 63 saturate on no" if bits == 7 else f"{PRECISE}=1" if measured else "do not saturate on this"
    assert words in session.choice
    assert session.document() == {"int8_saturates": measured, "onnx_session": session.choice}
    if saturates is not False or not sums_saturate() or bits == 7:
        assert_equal(outputs(session), network(X), network.tensors(X))


def test_every_weight_has_tensors_of_its_own(exported):
    """ONNX Runtime replaces integers and zero points when it makes weights unsigned, and each only once."""
    _, _, model = exported
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    weights = [name for name, tensor in stored.items() if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims]
    assert len(weights) == 2 * len(WEIGHTS) and {readers[name] for name in weights} == {1}


@pytest.mark.slow
def test_equal_kernels_are_not_shared_either(tmp_path):
    """Nor with a constant that is no weight; read from a file, too."""
    one = jnp.asarray(DRAWN.normal(size=(4, 4)), jnp.float32)
    weights, x = [one, one], X[:, :4]
    quantized, qstate = calibrate(dense, weights, x)
    path = save_onnx(to_onnx(quantized, weights, qstate, example=x), tmp_path / "model.onnx")
    session = onnx_session(path, saturates=True)
    (got,) = session.runtime.run(None, {"x": np.asarray(x)})
    assert session.precise
    np.testing.assert_array_equal(got, to_integer(quantized, weights, qstate, example=x)(x))


def test_a_file_that_shares_zero_points_is_named(exported):
    bits, _, model = exported
    shared = onnx.ModelProto()
    shared.CopyFrom(model)
    layers = [node for node in shared.graph.node if node.op_type == "DequantizeLinear" and node.attribute]
    for node in layers:
        if "zeros" in node.input[2]:
            node.input[2] = "zeros"
    if bits == 8 and sums_saturate():
        with pytest.raises(ValueError, match=r"share a tensor\. Export it again with to_onnx"):
            onnx_session(shared)
    else:  # nothing is replaced
        np.testing.assert_array_equal(outputs(onnx_session(shared))["y"], outputs(onnx_session(model))["y"])


def test_with_the_option_no_processor_saturates():
    assert sums_saturate(precise=True) is False


def test_a_remedy_that_does_not_help_is_an_error(exported, monkeypatch):
    bits, _, model = exported
    module = sys.modules["ehap_jax.quant.onnx_session"]
    monkeypatch.setattr(module, "sums_saturate", lambda providers, precise=False: True)
    if bits == 7:
        assert not onnx_session(model).precise
    else:
        with pytest.raises(RuntimeError, match=r"QuantRule\(weight_bits=7\)"):
            onnx_session(model)


def test_the_largest_weight_of_a_file(exported):
    bits, _, model = exported
    assert largest_weight(model) == 2 ** (bits - 1) - 1
    assert largest_weight(to_onnx(dense, WEIGHTS, example=X)) == 0
    from onnx import TensorProto, helper, numpy_helper

    inside = helper.make_graph(
        [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.full((2, 2), -100, np.int8)))],
        "inside",
        [],
        [helper.make_tensor_value_info("w", TensorProto.INT8, [2, 2])],
    )
    branch = helper.make_node("If", ["true"], ["y"], then_branch=inside, else_branch=inside)
    graph = helper.make_graph([branch], "outside", [], [helper.make_tensor_value_info("y", TensorProto.INT8, [2, 2])])
    assert largest_weight(helper.make_model(graph)) == 100
    stored = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    rounding = helper.make_node("QuantizeLinear", ["w", "s"], ["q"])
    assert largest_weight(helper.make_model(helper.make_graph([rounding], "g", [], [], [stored]))) == 128


def test_without_the_packages(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"ehap-jax\[onnx\]"):
        onnx_session(exported[2])
