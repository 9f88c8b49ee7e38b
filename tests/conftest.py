"""Every test has eight CPU devices, no silent promotion, no window, and a compilation cache that outlives the run."""

import os
import pathlib

os.environ.setdefault("MPLBACKEND", "Agg")  # for scripts started by tests as well

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # device tests need no accelerator
jax.config.update("jax_numpy_rank_promotion", "raise")  # [C] + [B, C] has to be written out
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
if not hasattr(jax, "enable_x64"):  # before JAX 0.8
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64
if jax.config.jax_compilation_cache_dir is None:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "perturbjax" / "tests"))

# No deadline: the first call compiles. Derandomized: the same examples on every run and machine.
hypothesis.settings.register_profile("perturbjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("perturbjax")


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """bfloat16 + float32 behind one's back is an error, except where optax itself promotes."""
    promotes = request.node.get_closest_marker("optax_promotes")
    with jax.numpy_dtype_promotion("standard" if promotes else "strict"):
        yield
