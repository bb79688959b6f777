"""One environment for all tests, set before JAX is imported: eight virtual CPU devices, a kept compilation cache."""

import os
import pathlib

import hypothesis

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of a test's time is compilation: leave out what LLVM would optimise. XLA's own passes, and so the programs, stay.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dsv2_jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

hypothesis.settings.register_profile("suite", deadline=None, print_blob=True)
hypothesis.settings.load_profile("suite")
