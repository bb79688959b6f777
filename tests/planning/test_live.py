"""What is alive where a program holds most, from schedules written by hand and from the compiler's own."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import sharding
from dsv2_jax.planning import live

PLAIN = jax.lax.convert_element_type
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


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason='needs libtpu: pip install -e ".[tpu]"')
@pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache")
@pytest.mark.parametrize("cast", [sharding.cast, PLAIN], ids=["ours", "plain"])
def test_masters_are_cast_layer_by_layer(cast, monkeypatch):
    """The reason of `sharding.cast`: with a plain cast the compiler holds the weights of all layers a second time."""
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setattr(sharding, "cast", cast)
    layers, D, F = 6, 1024, 2048
    mesh = sharding.make_mesh("fsdp=4", topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices)

    def loss(w_LDF, x_BTD):
        def layer(x_BTD, w_DF):
            w_DF = sharding.gathered(w_DF, ("embed", "mlp"), jnp.bfloat16)
            return jnp.tanh(x_BTD @ w_DF) @ w_DF.T, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x_BTD, w_LDF)[0].astype(jnp.float32))

    w = sharding.parameter_sharding(("embed", "mlp"), (layers, D, F), mesh)
    x = jax.sharding.NamedSharding(mesh, sharding.activation_spec("batch", "sequence", "embed"))
    arguments = (
        jax.ShapeDtypeStruct((layers, D, F), jnp.float32, sharding=w),
        jax.ShapeDtypeStruct((4, 1024, D), jnp.bfloat16, sharding=x),
    )
    with sharding.use(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
    stacked = [one for one in live.at_peak(compiled.as_text()) if str(one.shape) == f"bf16[{layers},{D // 4},{F}]"]
    assert len(stacked) == (1 if cast is PLAIN else 0)


def test_rounding_first_changes_nothing():
    values = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values = np.where(np.abs(values) < 1e-37, 0, values)  # subnormal numbers apart
    ours, plain = (
        np.asarray(x, np.float32) for x in (sharding.cast(jnp.asarray(values), jnp.bfloat16), jnp.bfloat16(values))
    )
    np.testing.assert_array_equal(ours, plain)
