"""Compiled programs are read right: bytes of collectives and FLOPs through loops, on CPU devices and TPU topologies."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv2_jax.planning import hlo, program

OUTER, INNER, ROWS, D, F = 3, 5, 64, 128, 256
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
NO_LIBTPU = 'needs libtpu: pip install -e ".[tpu]"'
pytestmark = pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache")


def devices(where: str):
    if where == "cpu":
        return jax.devices()[:8]
    if not HAS_LIBTPU:
        pytest.skip(NO_LIBTPU)
    from jax.experimental import topologies

    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    return topologies.get_topology_desc(platform="tpu", topology_name=where).devices


def read(where, function, specs, *arguments) -> program.Program:
    """What is read of `function`, run under shard_map on a (2, 4) mesh of axes a and b."""
    mesh = Mesh(np.array(devices(where)).reshape(2, 4), ("a", "b"))
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)) for x, s in zip(arguments, specs)]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=P(("a", "b")), check_vma=False)
    return program.read(jax.jit(mapped).lower(*placed).compile().as_text())


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def of_kind(read_program, kind):
    return [one for one in read_program.collectives if one.kind == kind]


PLACES = ["cpu", "v5p:2x2x2"]


@pytest.mark.parametrize("where", PLACES)
def test_collectives_and_products_in_nested_loops_count_as_often_as_they_run(where):
    def function(w_LODF, x_RD):
        def inner(x_RD, w_DF):
            w_DF = jax.lax.all_gather(w_DF, ("a", "b"), axis=1, tiled=True)
            return jnp.tanh(x_RD @ w_DF) @ w_DF.T, None

        def outer(x_RD, w_ODF):
            x_RD = jax.lax.scan(inner, x_RD, w_ODF)[0]
            return jax.lax.ppermute(x_RD, "b", [(0, 1), (1, 2), (2, 3), (3, 0)]), None

        return jax.lax.scan(outer, x_RD, w_LODF)[0]

    specs = P(None, None, None, ("a", "b")), P(("a", "b"))
    found = read(where, function, specs, shape(OUTER, INNER, D, F), shape(8 * ROWS, D))
    (gather,), (permute,) = of_kind(found, "all-gather"), of_kind(found, "collective-permute")
    assert (gather.times, gather.operand_bytes, gather.group) == (OUTER * INNER, D * F // 8 * 4, 8)
    assert gather.wire_bytes == 7 * D * F // 8 * 4
    assert (permute.times, permute.operand_bytes) == (OUTER, ROWS * D * 4)
    assert found.by_kind()["all-gather"]["wire_bytes"] == OUTER * INNER * 7 * D * F // 8 * 4
    assert found.flops == OUTER * INNER * 2 * (2 * ROWS * D * F)
    assert found.unknown_loops == []


@pytest.mark.parametrize("where", PLACES)
def test_groups_of_one_axis(where):
    def function(x_RD):
        y = jax.lax.all_to_all(x_RD, "b", split_axis=1, concat_axis=0, tiled=True)
        return jnp.sin(y) + jax.lax.psum(jnp.cos(y), "a")

    found = read(where, function, [P(("a", "b"))], shape(8 * ROWS, D))
    (exchange,), (sum_,), size = of_kind(found, "all-to-all"), of_kind(found, "all-reduce"), ROWS * D * 4
    assert (exchange.group, exchange.operand_bytes, exchange.wire_bytes) == (4, size, size * 3 / 4)
    assert (sum_.group, sum_.operand_bytes, sum_.wire_bytes) == (2, size, size)


def test_reduce_scatter():  # on CPUs alone: for TPUs small ones, and those over all devices, become all-reduces
    def function(x_RD):
        return jax.lax.psum_scatter(x_RD, "b", scatter_dimension=0, tiled=True)

    (scatter,) = read("cpu", function, [P(("a", "b"))], shape(8 * ROWS, D)).collectives
    size = ROWS * D * 4
    assert (scatter.kind, scatter.group, scatter.operand_bytes) == ("reduce-scatter", 4, size)
    assert scatter.wire_bytes == size * 3 / 4


@pytest.mark.parametrize("where", PLACES)
def test_a_loop_whose_length_is_data_counts_once_and_is_named(where):
    def function(x_RD, n):
        def body(state):
            i, x = state
            return i + 1, jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])

        return jax.lax.while_loop(lambda state: state[0] < n[0], body, (jnp.int32(0), x_RD))[1]

    found = read(where, function, [P(("a", "b")), P()], shape(8 * ROWS, D), shape(1, dtype=jnp.int32))
    assert [(one.times, one.certain) for one in of_kind(found, "collective-permute")] == [(1, False)]
    assert len(found.unknown_loops) == 1
    assert (found.wire_bytes, found.further_wire_bytes) == (0, ROWS * D * 4)


@pytest.mark.parametrize("where", PLACES)
def test_of_a_conditional_the_branch_that_sends_most_counts(where):
    def function(x_RD, n):
        def swap(x):
            return jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])

        return jax.lax.cond(n[0] > 0, lambda x: swap(jnp.sin(swap(x))), swap, x_RD)

    found = read(where, function, [P(("a", "b")), P()], shape(8 * ROWS, D), shape(1, dtype=jnp.int32))
    assert sum(one.times for one in found.collectives) == 2


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    ("equation", "left", "right", "flops"),
    [
        ("td,df->tf", (64, 128), (128, 256), 2 * 64 * 128 * 256),
        ("td,tf->df", (64, 128), (64, 256), 2 * 64 * 128 * 256),
        ("btd,bsd->bts", (16, 128, 256), (16, 128, 256), 2 * 16 * 128 * 128 * 256),
        ("btnh,bsnh->bnts", (2, 128, 4, 64), (2, 128, 4, 64), 2 * 2 * 4 * 128 * 128 * 64),
        ("btnv,nvd->btd", (2, 128, 4, 64), (4, 64, 256), 2 * 2 * 128 * 4 * 64 * 256),
    ],
)
def test_flops_of_products(where, equation, left, right, flops):
    def function(x, y):
        return jnp.einsum(equation, x, y)[None]

    found = read(where, function, [P(), P()], shape(*left, dtype=jnp.bfloat16), shape(*right, dtype=jnp.bfloat16))
    assert found.flops == flops


@pytest.mark.skipif(not HAS_LIBTPU, reason=NO_LIBTPU)
def test_ragged_rows_and_kernels_with_a_stated_cost():
    def function(x_RD, sizes_P, w_EDF, sizes_E):
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes_P)[:-1].astype(jnp.int32)])
        out_RD = jnp.zeros((2 * ROWS, 2 * D), x_RD.dtype)
        out_RD = jax.lax.ragged_all_to_all(x_RD, out_RD, starts, sizes_P, starts, sizes_P, axis_name="b")
        return jax.lax.ragged_dot(out_RD, w_EDF, sizes_E)

    arguments = shape(8 * ROWS, 2 * D, dtype=jnp.bfloat16), shape(4, dtype=jnp.int32)
    arguments += shape(8, 2 * D, F, dtype=jnp.bfloat16), shape(8, dtype=jnp.int32)
    found = read("v5p:2x2x2", function, [P(("a", "b")), P(), P(), P()], *arguments)
    (ragged,) = of_kind(found, "ragged-all-to-all")
    assert (ragged.operand_bytes, ragged.group) == (ROWS * 2 * D * 2, 4)  # not the receive buffer, nor the offsets
    assert found.flops == 2 * (2 * ROWS) * (2 * D) * F  # of the rows there are, not of rows times experts


# --- text written by hand: what our own programs do not show -------------------------------------------------------

MODULE = """HloModule m, num_partitions=8

%gather (p: f32[8,4]) -> f32[64,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %g = f32[64,4]{1,0:T(8,128)} all-gather(%p), replica_groups=GROUPS, dimensions={0}
}, execution_thread="sparsecore"

%done (s: (s32[], f32[8,4], s32[])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=2
  ROOT %more = pred[] compare(%i, %n), direction=COMPARED
}

%once (t: (s32[], f32[8,4], s32[])) -> (s32[], f32[8,4], s32[]) {
  %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %m = s32[] get-tuple-element(%t), index=2
  %two = s32[] constant(2)
  %k = s32[] add(%j, %two)
  %start = ((f32[8,4]{1,0}), f32[64,4]{1,0}, u32[]) async-start(%x), calls=%gather, frontend_attributes={note={
"in \\"three\\" (lines":"of text"
}}, metadata={op_name="a(b"}
  %stop = f32[64,4]{1,0} async-done(%start)
  %y = f32[8,4]{1,0} slice(%stop), slice={[0:8], [0:4]}
  ROOT %r = (s32[], f32[8,4]{1,0}, /*index=2*/s32[]) tuple(%j, %y, %m), control-predecessors={%k}
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(1)
  %limit = s32[] constant(8)
  %begin = (s32[], f32[8,4]{1,0}, s32[]) tuple(%zero, %a, %limit)
  %loop = (s32[], f32[8,4]{1,0}, s32[]) while(%begin), condition=%done, body=%once
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
""".replace("tuple(%j, %y", "tuple(%k, %y")


def written(groups="{{0,1,2,3},{4,5,6,7}}", compared="LT") -> program.Program:
    return program.read(MODULE.replace("GROUPS", groups).replace("COMPARED", compared))


def test_an_asynchronous_pair_counts_once_a_run():
    (gather,) = written().collectives
    assert (gather.operand_bytes, gather.group, gather.times) == (8 * 4 * 4, 4, 4)  # i = 1, 3, 5, 7


def test_a_long_chain_of_sums_is_not_followed():
    """Of x + x + x ..., each sum made of the one before twice, all ways through would take for ever."""
    sums = "".join(f"  %a{i + 1} = f32[8,4]{{1,0}} add(%a{i}, %a{i})\n" for i in range(64))
    text = MODULE.replace("  %zero", sums.replace("%a0,", "%a,").replace("%a0)", "%a)") + "  %zero")
    text = text.replace("tuple(%zero, %a,", "tuple(%zero, %a64,").replace("GROUPS", "{}").replace("COMPARED", "LT")
    assert "tuple(%zero, %a64" in text
    assert [one.times for one in program.read(text).collectives] == [4]


@pytest.mark.parametrize(("compared", "times"), [("LT", 4), ("LE", 4), ("NE", 4)])
def test_loops_end_as_their_condition_says(compared, times):
    assert written(compared=compared).collectives[0].times == times


def test_a_loop_that_counts_down_the_other_way_never_runs():
    assert written(compared="GT").collectives[0].times == 0


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['x'=2,'y'=4] {'y'}", 4),
        ("mesh['x'=2,'y'=4] {'x','y'}", 8),
        ("mesh['x'=2,'y'=4, device_ids=([8]T(0))] {'y':(2)2}", 2),
    ],
)
def test_every_notation_of_groups(groups, size):
    assert written(groups).collectives[0].group == size


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        program.read("hello")


def test_padding_of_tiles():
    odd, whole = hlo.shapes_of("(bf16[26,576,100]{1,2,0:T(8,128)(2,1)}, f32[8,128]{1,0:T(8,128)S(1)})")
    assert (odd.padded_bytes, odd.in_hbm) == (26 * 640 * 104 * 2, True)
    assert (whole.padded_bytes, whole.in_hbm) == (8 * 128 * 4, False)


def test_shapes_and_bytes_of_odd_types():
    found = hlo.shapes_of("(bf16[3,5]{1,0:T(8,128)(2,1)}, pred[7], s4[3], f8e4m3fn[2,2], u32[], c64[2])")
    assert [one.nbytes for one in found] == [30, 7, 2, 4, 4, 16]
