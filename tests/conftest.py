"""Eight simulated CPU devices and a persistent compilation cache for the whole suite; the platform that it runs on.

All tests run on the CPU, whose float32 is exact and whose devices are eight, except those marked `gpu`: they run where
JAX finds an accelerator, in a process of their own, which `kernels/test_device.py` starts. `pytest -m gpu` is that
process.
"""

import gc
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR names another
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are most of them
gc.set_threshold(50_000, 20, 20)  # tracing makes many objects that stay


def pytest_configure(config):
    wanted = config.option.markexpr
    if "gpu" not in wanted or "not gpu" in wanted:
        jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items):
    on_devices = [item for item in items if item.get_closest_marker("gpu")]
    if on_devices and jax.default_backend() not in ("gpu", "tpu"):
        for item in on_devices:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU or TPU, this is {jax.default_backend()}"))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Without LLVM's expensive passes: these tests compile thousands of programs that run for milliseconds.

    The harness and modules that say FULL_COMPILATION, whose programs run longer, have the passes.
    """
    full = "harness" in request.path.parts or getattr(request.module, "FULL_COMPILATION", False)
    jax.config.update("jax_disable_most_optimizations", not full and jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)
