"""What is alive where a program holds most, from schedules written by hand and from the compiler's own."""

import jax
import jax.numpy as jnp
import pytest

from dsv2_jax.planning import live

# Three arrays of 4096, 2048 and 1024 bytes; the peak is inside the loop, beside what is used after it.
MODULE = """HloModule m, is_scheduled=true

%write (p: f32[4,256], q: f32[1,256]) -> f32[4,256] {
  %p = f32[4,256]{1,0} parameter(0)
  %q = f32[1,256]{1,0} parameter(1)
  %at = s32[] constant(0)
  ROOT %put = f32[4,256]{1,0} dynamic-update-slice(%p, %q, %at, %at)
}

%less (s: (s32[], f32[4,256])) -> pred[] {
  %s = (s32[], f32[4,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], f32[4,256])) -> (s32[], f32[4,256]) {
  %t = (s32[], f32[4,256]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %x = f32[4,256]{1,0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %k = s32[] add(%j, %one)
  %onchip = f32[512,256]{1,0:T(8,128)S(1)} exponential(%x)
  %row = f32[1,256]{1,0} reduce(%onchip)
  %big = f32[2,256]{1,0} negate(%row), metadata={op_name="in/the/loop"}
  %low = f32[1,256]{1,0} slice(%big)
  %new = f32[4,256]{1,0} fusion(%x, %low), kind=kLoop, calls=%write
  ROOT %r = (s32[], f32[4,256]{1,0}) tuple(%k, %new)
}

ENTRY %main (a: f32[4,256]) -> f32[1,256] {
  %a = f32[4,256]{1,0} parameter(0)
  %gone = f32[4,256]{1,0} negate(%a)
  %stay = f32[1,256]{1,0} reduce(%gone)
  %zero = s32[] constant(0)
  %room = f32[4,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %begin = (s32[], f32[4,256]{1,0}) tuple(%zero, %room)
  %loop = (s32[], f32[4,256]{1,0}) while(%begin), condition=%less, body=%body
  %end = f32[4,256]{1,0} get-tuple-element(%loop), index=1
  %last = f32[1,256]{1,0} reduce(%end)
  ROOT %sum = f32[1,256]{1,0} add(%last, %stay)
}
"""


def test_a_peak_inside_a_loop_counts_what_waits_outside():
    held = live.at_peak(MODULE)
    assert [(one.name, one.nbytes) for one in held] == [("room", 4096), ("big", 2048), ("stay", 1024), ("row", 1024)]
    assert held[1].source == "in/the/loop"
    assert [len(one.loops) for one in held] == [0, 1, 0, 1]


def test_what_the_loop_writes_in_place_takes_no_room():
    assert "new" not in {one.name for one in live.at_peak(MODULE)}


@pytest.mark.parametrize("layers", [4, 16])
def test_near_the_compilers_own_figure(layers):
    """Scanned layers of tanh(x w): the inputs of all layers are kept for the backward pass."""

    def loss(w_LDD, x_BD):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0])

    w, x = jax.ShapeDtypeStruct((layers, 256, 256), jnp.float32), jax.ShapeDtypeStruct((512, 256), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
    held = live.at_peak(compiled.as_text())
    kept = [one for one in held if one.shape.dims == (layers, 512, 256)]
    assert len(kept) >= 1
    reported = compiled.memory_analysis().temp_size_in_bytes
    assert sum(one.nbytes for one in held) == pytest.approx(reported, rel=0.35)
