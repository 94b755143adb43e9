"""The table and its ratios; and, where the compiler for GPUs is installed, a network compiled for an H100."""

import importlib.util
import json

import pytest

from benchmarks import gpu_memory
from benchmarks.measure import fresh_process

HAS_COMPILER = importlib.util.find_spec("jax_plugins.xla_cuda12") if importlib.util.find_spec("jax_plugins") else None

PROGRAM = """
  %conv.1 = (f16[8,32,32,4]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), custom_call_target="__cudnn$convForward"
  %conv.2 = (f16[8,32,32,4]{3,2,1,0}, u8[0]{0}) custom-call(%a, %c), custom_call_target="__cudnn$convBackwardInput"
  %conv.3 = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%a, %c), custom_call_target="__cudnn$convBiasActivationForward"
  %other = (f32[8,4]{1,0}, s8[9]{0}) custom-call(%a, %c), custom_call_target="__cublas$gemm"
"""


def test_convolutions_are_counted_by_type():
    assert gpu_memory.convolutions(PROGRAM) == {"f16": 2, "f32": 1}


def row(precision, size, **changed):
    about = {"network": "resnet32", "batch": 128, "product": "jvp", "precision": precision, "bytes": size * 2**30}
    return {**about, "convolutions": {"f32": 3}, **changed}


def test_the_table_compares_like_with_like():
    rows = [row("float32", 4), row("float16", 1), row("float16", 3, batch=512), row("float32", 5, product="linearize")]
    lines = gpu_memory.table(rows).splitlines()[1:]
    ratios = {tuple(line.split()[:4]): line.split()[5] for line in lines}
    assert ratios["resnet32", "128", "jvp", "float16"] == "0.25"
    assert ratios["resnet32", "512", "jvp", "float16"] == "3"  # no ratio: the convolutions come next
    assert ratios["resnet32", "128", "linearize", "float32"] == "1.00"


def test_programs_that_are_there_are_not_compiled_again(tmp_path, monkeypatch):
    compiled = []

    def process(module, line, environment):
        compiled.append(tuple(line[1:]))
        assert "--xla_gpu_autotune_level=0" in environment["XLA_FLAGS"]
        return row(line[3], 1, network=line[1], batch=int(line[2]), product=line[4])

    monkeypatch.setattr(gpu_memory, "fresh_process", process)
    command = ["--networks", "tiny", "--batches", "8", "--out", str(tmp_path / "rows.json")]
    gpu_memory.main([*command, "--precisions", "float16"])
    gpu_memory.main(command)
    assert sorted(compiled) == sorted(
        ("tiny", "8", precision, product) for precision in ("float16", "float32") for product in ("linearize", "jvp")
    )
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


@pytest.mark.skipif(HAS_COMPILER is not None, reason="the compiler for GPUs is installed")
def test_without_the_compiler_the_error_says_what_to_install():
    with pytest.raises(RuntimeError, match="compiler for GPUs is missing"):
        gpu_memory.described_gpu()


@pytest.mark.skipif(HAS_COMPILER is None, reason="needs jax-cuda12-plugin and jax-cuda12-pjrt")
@pytest.mark.parametrize(("precision", "kind"), [("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16")])
def test_probes_compile_for_a_gpu_with_every_convolution_in_their_precision(precision, kind):
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    found = fresh_process("benchmarks.gpu_memory", ["--one", "tiny", "2", precision, "linearize"], environment)
    assert found["convolutions"].keys() == {kind} and found["bytes"] > 0
