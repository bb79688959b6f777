"""What the interpreters of TPU and GPU kernels say of races: each kernel keeps its own account, and all are read."""

import contextlib
from unittest import mock

import jax


@contextlib.contextmanager
def watched(module, name: str):
    """Fails at its end if one of the kernels interpreted inside it raced, or none was interpreted.

    Args:
      name: of the class in `module` of which the interpreter makes one object for each kernel it runs.
    """
    states, make = [], getattr(module, name)

    def made(*arguments, **options):
        states.append(make(*arguments, **options))
        return states[-1]

    with mock.patch.object(module, name, made):
        yield
        jax.effects_barrier()
        jax.block_until_ready(jax.live_arrays())  # what kernels still write
    assert states, "nothing was interpreted"
    raced = sum(state.races_found for state in states)
    assert not raced, f"a kernel raced: {raced} of {len(states)}"
