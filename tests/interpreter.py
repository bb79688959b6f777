"""The TPU interpreter with races watched and memory that nobody wrote full of NaN."""

import contextlib

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


def races_found() -> bool:
    """Whether the kernels interpreted last raced: each starts afresh."""
    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


@contextlib.contextmanager
def interpreter(dma="on_wait"):
    """Gives the `interpret` argument of kernels; fails if one of them raced.

    Args:
      dma: when a copy happens: "on_wait", the latest moment, so that who reads before waiting reads NaN; or "eager".
    """
    pltpu.reset_tpu_interpret_mode_state()
    yield pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma)
    assert interpret_pallas_call.races is not None, "nothing was interpreted"
    assert not races_found(), "a kernel raced"
