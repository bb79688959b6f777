"""The Mosaic GPU interpreter with races watched and memory that nobody wrote full of NaN."""

import contextlib

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from watched_races import watched

from kernels_pallas.mosaic_gpu import InterpretParams

# The class has a name of its own from JAX 0.11 on.
STATE = next(name for name in ("GPURaceDetectionState", "RaceDetectionState") if hasattr(gpu_callbacks, name))


@contextlib.contextmanager
def gpu_interpreter():
    """Gives the `interpret` argument of kernels; fails if one of them raced, or none was interpreted."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    with watched(gpu_callbacks, STATE):
        yield InterpretParams(detect_races=True)
