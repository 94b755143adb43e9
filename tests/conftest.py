"""Strict numerics for every test: no implicit dtype or rank promotion, CPU only; programs that compile quickly."""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "EHAP_JAX_OPTIMIZED" not in os.environ:  # set it to compile as users do
    # Tests compile thousands of tiny programs and run each once. The last flag ended with jaxlib 0.10.
    os.environ["XLA_FLAGS"] = " ".join(
        ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
        + ["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10.")
        + [os.environ.get("XLA_FLAGS", "")]
    )

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
