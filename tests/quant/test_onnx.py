"""The ONNX file: ONNX Runtime computes the integers of ``to_integer`` in fused kernels; a float file does floats."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ehap_jax import allocate, random_scores, shrink, shrink_variables, trace_graph
from ehap_jax.models import ResNet, eval_apply
from ehap_jax.quant import HAWQ, INT8, QuantRule, onnx_session, save_onnx, to_integer, to_onnx
from tests.pruning.invariant import jit, randomise
from tests.quant.networks import apply, batch_norm, calibrate, conv, in_16_bits, make_images, make_variables, run

onnx = pytest.importorskip("onnx", reason="needs pip install 'ehap-jax[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="needs pip install 'ehap-jax[onnx]'")


def session(model, optimised=None):
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnx_session(model, options=options).runtime


def outputs(model, x):
    found = session(model)
    names = [out.name for out in found.get_outputs()]
    return dict(zip(names, found.run(None, {"x": np.asarray(x)}), strict=True))


def kernels(model, folder):
    """How many nodes of each kind ONNX Runtime makes of it."""
    path = folder / "optimised.onnx"
    session(model, path)
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def assert_parity(quantized, variables, qstate, x, folder):
    """0 mismatches in every quantised tensor and in the logits; nothing but integer kernels. Returns their counts."""
    network = to_integer(quantized, variables, qstate, example=x)
    logits, tensors = jit(lambda n, x: (n(x), n.tensors(x)))(network, x)
    found = outputs(to_onnx(quantized, variables, qstate, example=x, expose=True), x)
    assert len(tensors) >= len(qstate)
    for name, integers in tensors.items():
        theirs = found[f"{name}/out"]
        assert theirs.dtype == integers.dtype, name
        assert int((theirs != np.asarray(integers)).sum()) == 0, name
    np.testing.assert_array_equal(found["y/out"], logits)
    model = to_onnx(quantized, variables, qstate, example=x)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(outputs(model, x)["y"], logits)
    counts = kernels(model, folder)
    assert not counts.keys() & {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "GlobalAveragePool", "Relu"}
    assert counts["QuantizeLinear"] == 1 and not counts["DequantizeLinear"]  # of the input; QGemm returns floats
    return counts


@pytest.fixture(scope="module")
def small():
    variables, x = make_variables(gamma_sign=True), make_images()
    return *calibrate(apply, variables, x), variables, x


@pytest.mark.slow
def test_the_small_network(small, tmp_path):
    quantized, qstate, variables, x = small
    counts = assert_parity(quantized, variables, qstate, x, tmp_path)
    assert (counts["QLinearConv"], counts["QLinearAdd"], counts["QLinearGlobalAveragePool"], counts["QGemm"]) == (
        3,
        1,
        1,
        1,
    )


@pytest.mark.slow
def test_symmetric_grids_narrower_than_their_type(tmp_path):
    variables, x = make_variables(), jnp.abs(make_images())
    rules = (QuantRule(activations="symmetric", activation_bits=6, weight_bits=4, residual_bits=6),)
    counts = assert_parity(*calibrate_for(variables, x, rules), x, tmp_path)
    assert counts["Clip"] == 6


def calibrate_for(variables, x, rules):
    quantized, qstate = calibrate(apply, variables, x, rules)
    return quantized, variables, qstate


@pytest.mark.slow
def test_a_pruned_resnet_with_union_coupling(tmp_path):
    """Option-A shortcuts and channels added by index: slices, pads and gathers of integers."""
    model = ResNet(8, 10, widths=(4, 6, 8))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    variables = randomise(jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes))
    x = jax.random.normal(jax.random.key(2), (3, 8, 8, 3))
    graph = trace_graph(eval_apply(model))(variables, x)
    plan = allocate(graph, random_scores(graph, key=jax.random.key(1)), channels=0.6, coupling="union")
    function, small = shrink(eval_apply(model), plan), shrink_variables(variables, plan)
    quantized, qstate = calibrate(function, small, x)
    counts = assert_parity(quantized, small, qstate, x, tmp_path)
    assert counts["QLinearConv"] == 7 and counts["QLinearAdd"] == 3 and counts["QGemm"] == 1
    assert counts["Gather"] and counts["Pad"] and counts["Slice"]


def odd(v, x):
    """BatchNorm after a sum, a difference, ReLU6, max and mean windows, a concatenation, a transposed kernel."""
    y = conv(x, v["stem"]["kernel"])
    z = batch_norm(y + conv(jax.nn.relu(y), v["a"]["kernel"]), v["bn1"])
    z = jnp.minimum(jax.nn.relu(z), 6.0)
    z = conv(z, v["b"]["kernel"]) - lax.slice_in_dim(z, 0, 4, axis=3)
    high = lax.reduce_window(z, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    mean = lax.reduce_window(jax.nn.relu(z), 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4.0
    both = jnp.concatenate([high, mean], axis=3)
    both = jax.nn.relu(conv(both, v["c"]["kernel"], 2))
    return (v["out"]["kernel"] @ both.reshape(x.shape[0], -1).T).T


@pytest.mark.slow
def test_everything_that_has_an_integer_form(tmp_path):
    variables = make_variables()
    keys = jax.random.split(jax.random.key(5))
    variables["c"] = {"kernel": 0.2 * jax.random.normal(keys[0], (3, 3, 8, 4))}
    variables["out"] = {"kernel": 0.2 * jax.random.normal(keys[1], (5, 16))}
    x = make_images()
    quantized, qstate = calibrate(odd, variables, x)
    fake = run(quantized, variables, qstate, x)
    np.testing.assert_allclose(fake, jit(odd)(variables, x), atol=0.05 * float(jnp.abs(fake).max()))
    counts = assert_parity(quantized, variables, qstate, x, tmp_path)
    assert counts["QLinearAdd"] >= 2 and counts["QLinearConv"] == 4 + 1 + 1 and counts["QGemm"] == 1


def varied(v, x):
    """Convolutions in groups and depthwise, with strides that differ, dilated, and padded on one side alone."""

    def layer(x, kernel, **options):
        options = {"window_strides": (1, 1), "padding": "SAME", **options}
        return jax.nn.relu(lax.conv_general_dilated(x, kernel, **options, dimension_numbers=("NHWC", "HWIO", "NHWC")))

    y = layer(x, v["grouped"], feature_group_count=2, window_strides=(2, 1))
    y = layer(y, v["depthwise"], feature_group_count=4, padding=((1, 0), (0, 2)))
    y = layer(y, v["dilated"], rhs_dilation=(1, 2))
    return y.mean((1, 2)) @ v["out"]


@pytest.mark.slow
def test_convolutions_of_every_kind(tmp_path):
    shapes = {"grouped": (3, 3, 2, 4), "depthwise": (2, 3, 1, 4), "dilated": (3, 3, 4, 5), "out": (5, 3)}
    drawn = np.random.default_rng(6)
    variables = {name: jnp.asarray(drawn.normal(0, 0.4, shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(drawn.normal(size=(3, 6, 6, 4)), jnp.float32)
    quantized, qstate = calibrate(varied, variables, x)
    counts = assert_parity(quantized, variables, qstate, x, tmp_path)
    assert counts["QLinearConv"] == 3


@pytest.mark.slow
def test_implants_under_union_coupling(tmp_path):
    """A kernel of two parts: two convolutions whose results are joined, with one affine function after them."""
    variables, x = make_variables(gamma_sign=True), make_images()
    graph = trace_graph(apply)(variables, x)
    scores = random_scores(graph, key=jax.random.key(3))
    plan = allocate(graph, scores, macs=0.6, coupling="union", implants=0.6)
    assert sum(len(implant.channels) for implant in plan.implants.values()) > 1
    function, small = shrink(apply, plan), shrink_variables(variables, plan)
    quantized, qstate = calibrate(function, small, x)
    fake, want = run(quantized, small, qstate, x), jit(function)(small, x)
    assert float(jnp.abs(fake - want).max()) < 0.03 * float(jnp.abs(want).max())
    counts = assert_parity(quantized, small, qstate, x, tmp_path)
    assert counts["Concat"] == len(plan.implants) and counts["QLinearAdd"] == 1


RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32)
HEADS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"a": (5, 6), "bias": (6,), "b": (6, 2, 3), "c": (2, 3, 4), "d": (7, 4), "e": (7,)}.items()
}


def tokens(v, x):
    """Dense layers over several axes, on either side of the product, and one without an axis of its own."""
    y = jax.nn.relu(jnp.einsum("btf,fo->bto", x, v["a"]) + v["bias"][None, None])
    y = jax.nn.relu(jnp.einsum("bto,ohd->bthd", y, v["b"]))
    y = jnp.einsum("bthd,hdf->btf", y, v["c"])
    y = jax.nn.relu(jnp.einsum("of,btf->obt", v["d"], y))
    return jnp.einsum("obt,o->bt", y, v["e"])


@pytest.mark.slow
def test_dense_layers_of_any_rank(tmp_path):
    quantized, qstate = calibrate(tokens, HEADS, TOKENS)
    counts = assert_parity(quantized, HEADS, qstate, TOKENS, tmp_path)
    assert counts["QGemm"] == 5
    one = TOKENS[:1]
    model = to_onnx(quantized, HEADS, qstate, example=one, dynamic_batch=True)
    network = to_integer(quantized, HEADS, qstate, example=one)
    np.testing.assert_array_equal(outputs(model, TOKENS)["y"], jit(lambda n, x: n(x))(network, TOKENS))
    model = to_onnx(tokens, HEADS, example=one, dynamic_batch=True)
    np.testing.assert_allclose(outputs(model, TOKENS)["y"], jit(tokens)(HEADS, TOKENS), atol=1e-5)


@pytest.mark.slow
def test_sums_of_sums_and_a_mean_that_is_scaled(tmp_path):
    def function(v, x):
        y = jnp.einsum("btf,fo->bto", x, v["a"])
        y = (y + jax.nn.relu(y)) - (jax.nn.relu6(y) + y[:, ::-1])
        return (3.0 - y.mean(axis=1, keepdims=True)) @ v["b"]

    variables = {"a": HEADS["a"], "b": HEADS["b"][:, 0]}
    quantized, qstate = calibrate(function, variables, TOKENS)
    counts = assert_parity(quantized, variables, qstate, TOKENS, tmp_path)
    # Three sums, and two changes of grid, which are sums with 0.
    assert (counts["QLinearAdd"], counts["QLinearGlobalAveragePool"], counts["QGemm"]) == (5, 1, 2)


@pytest.mark.slow
def test_a_layer_that_a_rule_skips_stays_in_floating_point(tmp_path):
    """Between quantised ones, too: ONNX Runtime would quantise its weights with a rule of its own."""
    variables = {name: jnp.asarray(RNG.normal(size=(5, 5)), jnp.float32) for name in "abcd"}

    def function(v, x):
        y = jnp.tanh(x @ v["a"]) @ v["b"]
        return (y + y @ v["c"]) @ v["d"]

    x, rules = TOKENS[:, 0], (QuantRule("[ac]", skip=True), QuantRule())
    quantized, qstate = calibrate(function, variables, x, rules)
    network = to_integer(quantized, variables, qstate, example=x)
    model = to_onnx(quantized, variables, qstate, example=x)
    fake = run(quantized, variables, qstate, x)
    np.testing.assert_allclose(jit(lambda n, x: n(x))(network, x), fake, atol=1e-5)
    np.testing.assert_allclose(outputs(model, x)["y"], fake, atol=1e-5)
    counts = kernels(model, tmp_path)
    assert (counts["Gemm"] + counts["FusedGemm"], counts["QGemm"]) == (2, 2)


@pytest.mark.slow
def test_what_stays_in_floating_point_keeps_its_16_bits():
    function, variables, x = in_16_bits(jnp.float16)
    for rules in (INT8, (QuantRule("b", skip=True), *INT8)):
        quantized, qstate = calibrate(function, variables, x, rules)
        got = outputs(to_onnx(quantized, variables, qstate, example=x), x)["y"]
        want = np.asarray(jit(lambda n, x: n(x))(to_integer(quantized, variables, qstate, example=x), x))
        assert got.dtype == np.float16
        np.testing.assert_allclose(got, want, atol=2e-3 * float(np.abs(want).max()))
    function, variables, x = in_16_bits(jnp.bfloat16)  # ONNX Runtime has no such kernels, but the file is right
    quantized, qstate = calibrate(function, variables, x)
    assert (
        to_onnx(quantized, variables, qstate, example=x).graph.output[0].type.tensor_type.elem_type
        == onnx.TensorProto.BFLOAT16
    )


def test_float_export(small, tmp_path):
    _, _, variables, x = small
    model = to_onnx(apply, variables, example=x)
    np.testing.assert_allclose(outputs(model, x)["y"], jit(apply)(variables, x), atol=1e-5)
    assert Counter(node.op_type for node in model.graph.node)["Conv"] == 3  # every BatchNorm is folded
    assert not {"Mul", "Sub", "Sqrt"} & {node.op_type for node in model.graph.node}


def smooth(v, x):
    """Rules for what a quantised network has no use for."""
    y = jax.nn.softmax(jax.nn.gelu(x @ v["one"], approximate=False), axis=-1)
    y = jnp.where(y > 0.1, jax.nn.sigmoid(y), jnp.tanh(y)) ** 3 + lax.rsqrt(1.0 + jnp.square(y))
    y = jnp.stack([y, y[:, ::-1]], axis=1) - y.max(axis=1)[:, None, None]
    return jnp.einsum("nij,nkj->nik", y, jnp.clip(y, -0.5, 0.5)), (y.argmax(-1) == 0).astype(jnp.float32)


def test_float_export_of_smooth_functions():
    v, x = {"one": jax.random.normal(jax.random.key(0), (6, 4))}, jax.random.normal(jax.random.key(1), (8, 6))
    found = outputs(to_onnx(smooth, v, example=x), x)
    for got, want in zip(found.values(), jit(smooth)(v, x), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_batch_may_be_free(small):
    quantized, qstate, variables, x = small
    model = to_onnx(quantized, variables, qstate, example=x[:1], dynamic_batch=True)
    network = to_integer(quantized, variables, qstate, example=x)
    np.testing.assert_array_equal(outputs(model, x)["y"], jit(lambda n, x: n(x))(network, x))
    with pytest.raises(ValueError, match="batch is written into"):
        to_onnx(lambda v, x: x @ v + x.shape[0], jnp.ones((3, 2)), example=jnp.ones((2, 3)), dynamic_batch=True)


def test_plan_and_metadata_travel_with_the_file(small, tmp_path):
    import json

    quantized, qstate, variables, x = small
    graph = trace_graph(apply)(variables, x)
    plan = allocate(graph, random_scores(graph, key=jax.random.key(0)), channels=0.6)
    model = to_onnx(quantized, variables, qstate, example=x, plan=plan, metadata={"accuracy": 0.5})
    path = save_onnx(model, tmp_path / "deep" / "model.onnx")
    found = {p.key: json.loads(p.value) for p in onnx.load(str(path)).metadata_props}
    assert found == {"accuracy": 0.5, "plan": plan.document()}
    with pytest.raises(FileExistsError, match=r"model\.onnx exists"):
        save_onnx(model, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_large_weights_go_to_a_second_file(small, tmp_path):
    quantized, qstate, variables, x = small
    model = to_onnx(quantized, variables, qstate, example=x)
    path = save_onnx(model, tmp_path / "model.onnx", external_above=100)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert model.graph.initializer[0].raw_data  # the model in memory stays whole
    onnx.checker.check_model(str(path))
    (got,) = onnx_session(path).runtime.run(None, {"x": np.asarray(x)})
    np.testing.assert_array_equal(got, outputs(model, x)["y"])


@pytest.mark.slow
def test_sixteen_bit_sums_need_a_new_opset(small):
    _, _, variables, x = small
    rules = (QuantRule("stem/*", activations="symmetric", residual_bits=16), *HAWQ)
    quantized, qstate = calibrate(apply, variables, x, rules)
    with pytest.raises(ValueError, match="opset 20 is too old for the 16-bit integers of"):
        to_onnx(quantized, variables, qstate, example=x, opset=20)
    network = to_integer(quantized, variables, qstate, example=x)
    got = outputs(to_onnx(quantized, variables, qstate, example=x), x)["y"]
    np.testing.assert_allclose(got, jit(lambda n, x: n(x))(network, x), atol=2e-3)


@pytest.mark.slow
def test_sixteen_bit_integers_are_padded_and_chosen_from():
    """ONNX Runtime has no such kernels for them."""

    def function(v, x):
        y = jax.nn.relu(x @ v["a"]) @ v["b"]
        return jax.nn.relu(y + jnp.pad(x @ v["c"], ((0, 0), (1, 1)))[:, jnp.array([0, 2, 1, 3])]) @ v["d"]

    shapes = {"a": (5, 6), "b": (6, 4), "c": (5, 2), "d": (4, 2)}
    variables = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.abs(TOKENS[:, 0])
    quantized, qstate = calibrate(function, variables, x, HAWQ)
    network = to_integer(quantized, variables, qstate, example=x)
    want = jit(lambda n, x: n.tensors(x))(network, x)
    found = outputs(to_onnx(quantized, variables, qstate, example=x, expose=True), x)
    for name, integers in want.items():
        apart = np.abs(found[f"{name}/out"].astype(np.int64) - np.asarray(integers, np.int64))
        assert apart.max() <= (2 if integers.dtype == jnp.uint16 else 1), name
    assert any(name.endswith("/gather") or "pad" in name for name in want)


def with_constants(v, x):
    """Option A as a concatenation with zeros, a ReLU after a join, a border that is not zero."""
    y = conv(x, v["stem"]["kernel"])
    wide = jnp.concatenate([y, jnp.zeros((*y.shape[:3], 4))], axis=3)
    total = conv(jax.nn.relu(y), v["c"]["kernel"]) + wide
    joined = jax.nn.relu(jnp.concatenate([jnp.full((*y.shape[:3], 1), 0.7), total], axis=3))
    framed = jnp.pad(joined, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    return conv(framed, v["d"]["kernel"]).mean((1, 2)) @ v["out"]["kernel"]


@pytest.mark.slow
def test_constants_among_integers(tmp_path):
    variables, drawn = make_variables(), np.random.default_rng(3)
    for name, shape in {"c": (3, 3, 4, 8), "d": (3, 3, 9, 4), "out": (4, 5)}.items():
        variables[name] = {"kernel": jnp.asarray(drawn.normal(0, 0.3, shape), jnp.float32)}
    x = make_images()
    quantized, qstate = calibrate(with_constants, variables, x)
    fake, exact = run(quantized, variables, qstate, x), jit(with_constants)(variables, x)
    np.testing.assert_allclose(fake, exact, atol=0.05 * float(jnp.abs(exact).max()))
    counts = assert_parity(quantized, variables, qstate, x, tmp_path)
    assert counts["Concat"] + counts["QLinearConcat"] == 2


def test_what_is_refused(small, monkeypatch):
    quantized, qstate, variables, x = small
    with pytest.raises(ValueError, match="opset 12 is too old; to_onnx needs 18"):
        to_onnx(quantized, variables, qstate, example=x, opset=12)
    with pytest.raises(ValueError, match="opset 999 is not known"):
        to_onnx(quantized, variables, qstate, example=x, opset=999)
    with pytest.raises(ValueError, match="needs its ranges"):
        to_onnx(quantized, variables, example=x)
    with pytest.raises(NotImplementedError, match=r"sort at .*has no ONNX rule"):
        to_onnx(lambda v, x: jnp.sort(x @ v), jnp.ones((3, 2)), example=jnp.ones((1, 3)))
    images = {"a": HEADS["a"], "b": HEADS["b"][:, 0]}
    over_all, ranges = calibrate(lambda v, x: (x @ v["a"]).mean(axis=(0, 1))[None] @ v["b"], images, TOKENS)
    with pytest.raises(NotImplementedError, match=r"a mean of shape .*QuantRule\('b', skip=True\)"):
        to_onnx(over_all, images, ranges, example=TOKENS)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"ehap-jax\[onnx\]"):
        to_onnx(quantized, variables, qstate, example=x)
