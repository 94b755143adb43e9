"""Strict numerics for every test: no implicit dtype or rank promotion, CPU only; programs that compile quickly."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other in a loop
if "EHAP_JAX_OPTIMIZED" not in os.environ:  # set it to compile as users do
    # Tests compile thousands of tiny programs and run each once: no optimisation, and no module split into parts (each
    # has LLVM's fixed costs). The last flag ended with jaxlib 0.10.
    os.environ["XLA_FLAGS"] = " ".join(
        ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
        + ["--xla_cpu_parallel_codegen_split_count=1"]
        + ["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10.")
        + [os.environ.get("XLA_FLAGS", "")]
    )

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what several tests compile is compiled once; workers inherit it
    compiled = tempfile.TemporaryDirectory(prefix="ehap_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

if {"PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"} & os.environ.keys() == {"PYTHONDONTWRITEBYTECODE"}:
    # Every process that a test starts would compile a thousand modules; in a folder of the run's own, one does.
    bytecode = tempfile.TemporaryDirectory(prefix="ehap_jax_tests_")
    os.environ["PYTHONPYCACHEPREFIX"] = bytecode.name
    del os.environ["PYTHONDONTWRITEBYTECODE"]

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """Tracing makes many objects that live: a tenth of the time went into looking for garbage among them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A process may map 65,530 areas of memory; a compiled program takes about eight, and one more is a crash."""
    yield
    if len(_mapped_areas()) > 20_000:
        jax.clear_caches()
        gc.collect()


def _mapped_areas() -> list[bytes]:
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().splitlines()
    except FileNotFoundError:  # only Linux has the limit
        return []
