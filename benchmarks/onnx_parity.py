"""Does ONNX Runtime compute the integers of `to_integer`? Every quantised tensor of whole pruned networks.

    python -m benchmarks.onnx_parity                          # ResNet-32, ResNet-56, WRN-28-8; results/onnx_parity.json
    python -m benchmarks.onnx_parity --networks resnet32 --images 2      # one alone; the file keeps the others
    python -m benchmarks.onnx_parity --fast --output smoke.json           # compiled without optimisation: a smoke test

The networks are EHAP's (post-activation, 1x1-convolution shortcuts) with weights and normalisation drawn from a
seed, pruned to half of their multiply-accumulates with random scores and union coupling, so that the file has slices
and gathers of channels. Mismatches are counted in every tensor of integers, in the session of `onnx_session`, which
every row names, and in the logits bit for bit. Exits with status 1 where there is one, or where a convolution, sum,
mean or dense layer was not fused into an integer kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import provenance, read_results, write_results
from ehap_jax import (
    allocate,
    fake_quant,
    onnx_session,
    random_scores,
    shrink,
    shrink_variables,
    to_integer,
    to_onnx,
    trace_graph,
)
from ehap_jax.models import eval_apply, make_model
from ehap_jax.quant import OnnxSession
from ehap_jax.training.run_directory import versions

NETWORKS = {
    "resnet32": ("resnet32", {"shortcut": "B"}),
    "resnet56": ("resnet56", {"shortcut": "B"}),
    "wrn28-8": ("ehap-wrn28-8", {}),
}
NOT_FUSED = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "GlobalAveragePool", "DequantizeLinear"}
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def drawn_variables(model, seed: int):
    """Weights as He et al. draw them and normalisation in which no channel is special, without compiling anything."""
    drawn = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))

    def draw(path, leaf):
        last = jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/")[-1]
        if last in ("scale", "var"):
            return jnp.asarray(drawn.uniform(0.5, 1.0, leaf.shape), leaf.dtype)
        spread = 0.1 if len(leaf.shape) == 1 else (2 / np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(drawn.normal(0, spread, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def pruned(name: str, macs: float, seed: int):
    """(apply, variables, plan) of a pruned network with drawn weights."""
    model_name, options = NETWORKS[name]
    model = make_model(model_name, 10, **options)
    variables, apply = drawn_variables(model, seed), eval_apply(model)
    graph = trace_graph(apply)(variables, jnp.zeros((1, 32, 32, 3)))
    plan = allocate(graph, random_scores(graph, key=jax.random.key(seed)), macs=macs, coupling="union")
    return shrink(apply, plan), shrink_variables(variables, plan), plan


def session(model, optimised: Path | None = None) -> OnnxSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnx_session(model, options=options)


def kernels(model) -> dict[str, int]:
    """The nodes that ONNX Runtime makes of a model, counted."""
    import onnx

    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session(model, path)
        return dict(Counter(node.op_type for node in onnx.load(str(path)).graph.node))


def compare(
    name: str, macs: float, images: int, seed: int, compiler_options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Mismatch counts of one network; compiler_options: XLA's, None for what everything is compiled with."""
    started, cpu = time.perf_counter(), time.process_time()
    apply, variables, plan = pruned(name, macs, seed)
    x = jax.random.normal(jax.random.key(seed), (images, 32, 32, 3))
    quantized = fake_quant(apply)
    observe = jax.jit(partial(quantized.apply, update=True), compiler_options=compiler_options)
    _, qstate = observe(variables, quantized.init(variables, x), x)
    network = to_integer(quantized, variables, qstate, example=x)
    logits, tensors = jax.jit(lambda n, x: (n(x), n.tensors(x)), compiler_options=compiler_options)(network, x)
    exposed = session(to_onnx(quantized, variables, qstate, example=x, expose=True))
    names = [out.name for out in exposed.runtime.get_outputs()]
    theirs = dict(zip(names, exposed.runtime.run(None, {"x": np.asarray(x)}), strict=True))
    wrong = {key: int(np.sum(theirs[f"{key}/out"] != np.asarray(ours))) for key, ours in tensors.items()}
    plain = to_onnx(quantized, variables, qstate, example=x, plan=plan)
    (alone,) = session(plain).runtime.run(None, {"x": np.asarray(x)})
    counts = kernels(plain)
    return {
        "network": name,
        "images": images,
        "kept_macs": macs,
        "compiler_options": compiler_options or "default",
        **exposed.document(),
        "tensors": len(tensors),
        "integers": int(sum(np.size(v) for v in tensors.values())),
        "mismatches": sum(wrong.values()),
        "mismatches_by_tensor": {key: count for key, count in wrong.items() if count},
        "logits_that_differ": int(np.sum(theirs["y/out"] != np.asarray(logits)) + np.sum(alone != np.asarray(logits))),
        "kernels": counts,
        "not_fused": sorted(NOT_FUSED & counts.keys()),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "git": versions()["git"],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the multiply-accumulates that is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="let XLA optimise nothing, which compiles in less time")
    parser.add_argument("--output", type=Path, default=Path("results/onnx_parity.json"))
    options = parser.parse_args(arguments)
    import onnxruntime

    compiled = FAST if options.fast else None
    known = {found["network"]: found for found in read_results(options.output).get("networks", [])}
    for name in options.networks:
        known[name] = compare(name, options.macs, options.images, options.seed, compiled)
        print(json.dumps(known[name], indent=1), flush=True)
        networks = [known[one] for one in NETWORKS if one in known]
        write_results(options.output, {"networks": networks, "onnxruntime": onnxruntime.__version__} | provenance())
    found = [known[name] for name in options.networks]
    return int(any(f["mismatches"] or f["logits_that_differ"] or f["not_fused"] for f in found))


if __name__ == "__main__":
    sys.exit(main())
