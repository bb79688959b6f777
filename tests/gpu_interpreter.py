"""The Mosaic GPU interpreter with races watched and memory that nobody wrote full of NaN."""

import contextlib

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from kernels_pallas.mosaic_gpu import InterpretParams


def races_found() -> bool:
    """Whether the kernels interpreted last raced: each starts afresh."""
    return interpret_pallas_call.get_races().races_found


@contextlib.contextmanager
def gpu_interpreter():
    """Gives the `interpret` argument of kernels; fails if one of them raced."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    yield InterpretParams(detect_races=True)
    assert not races_found(), "a kernel raced"
