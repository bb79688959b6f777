"""The TPU interpreter with races watched and memory that nobody wrote full of NaN."""

import contextlib

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from watched_races import watched


@contextlib.contextmanager
def interpreter(dma="on_wait"):
    """Gives the `interpret` argument of kernels; fails if one of them raced, or none was interpreted.

    Args:
      dma: when a copy happens: "on_wait", the latest moment, so that who reads before waiting reads NaN; or "eager".
    """
    pltpu.reset_tpu_interpret_mode_state()
    with watched(interpret_pallas_call, "RaceDetectionState"):
        yield pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma)
