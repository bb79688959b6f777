"""Causal attention on Hopper, forward and backward: one warpgroup loads tiles by TMA, two multiply and exponentiate.

Arrays keep the layout of the model, [batch, token, head, width]; the tokens are whole BLOCKs. A program owns a block:
each of its two computing warpgroups keeps the float32 sums of ROWS rows in registers, and meets the tiles of the other
side one after another, from the diagonal on. Softmax is in powers of two: `log_sum` is to base 2.

`segments` is () or (segments_BT, far_BI, near_BI): block I meets those blocks of the other side whose distance from the
diagonal is below `far`; below `near` they hold its one document, so that only the diagonal needs a mask.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu import WARPGROUP
from kernels_pallas.sharded import kernel_output

ROWS = 64  # of a warpgroup, and of a tile in the backward passes, whose sums fill the registers
BLOCK = 2 * ROWS  # of a program, and of a tile in the forward pass
STAGES, BACKWARD_STAGES = 2, 3  # tiles in shared memory at once
LOADER = 2  # the warpgroup that computes nothing
REGISTERS, LOADER_REGISTERS = 240, 24  # of a thread: 128 x (2 x 240 + 24) fill the register file
LOG2_E = math.log2(math.e)
LEAST = -1e30  # a maximum before any score: finite, so that a row that sees nothing of a tile keeps weights of zero


def _add_product(total, a, b_ref, interpret, transposed=False, after=lambda: None):
    """total + a b or, `transposed`, total + a b^T; `a` lies in shared memory or in registers.

    `after` is called between issuing the product and waiting for it.
    """
    if interpret:  # the interpreter of JAX 0.10.2 has neither accumulators with a value nor transposed references
        after()
        a, b = (a if isinstance(a, jax.Array) else a[...]), b_ref[...]
        return total + jnp.dot(a, b.T if transposed else b, preferred_element_type=jnp.float32)

    def compute(sum_ref):
        plgpu.wgmma(sum_ref, a, b_ref.transpose((1, 0)) if transposed else b_ref)
        after()

    return pl.run_state(compute)(plgpu.ACC.init(total))


def _of_rows(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _of_columns(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def _hide(x, hidden, lead, query_axis, segments):
    """`x` of rows and columns, `hidden` where a query must not see the key.

    Args:
      lead: by how much the first query is later than the first key; None: no key is later than a query.
      segments: (of the rows, of the columns), or () where there is but one.
    """
    seen = True
    if lead is not None:
        query = lead + lax.broadcasted_iota(jnp.int32, x.shape, query_axis)
        seen = query >= lax.broadcasted_iota(jnp.int32, x.shape, 1 - query_axis)
    if segments:
        seen &= _of_rows(segments[0], x.shape) == _of_columns(segments[1], x.shape)
    return x if seen is True else jnp.where(seen, x, hidden)


def _stream(steps, stages, *streams):
    """Keeps `stages` tiles of each stream in flight.

    Args:
      streams: (full, free, copies): barriers of each stage, and step -> pairs of a source and the buffer of all stages.
    """

    def refill(s, full, free, copies):
        stage = lax.rem(s, stages)
        pl.when(s >= stages)(lambda: plgpu.barrier_wait(free.at[stage]))

        @pl.when(s < steps)
        def _():
            for source, buffer in copies(s):
                plgpu.copy_gmem_to_smem(source, buffer.at[stage], full.at[stage])

    @pl.loop(0, steps + stages)  # at the end it sees every tile released
    def _(s):
        for stream in streams:
            refill(s, *stream)


def _load_rows(barrier, *copies):
    for source, buffer in copies:
        plgpu.copy_gmem_to_smem(source, buffer, barrier)
    plgpu.barrier_wait(barrier)


def _release(free, fenced):
    """Hands a tile back to the loader.

    Args:
      fenced: plain loads read it, which TMA, unlike the reads of tensor cores, does not see without a fence.
        (Interpreted products read by plain loads.)
    """
    if fenced:
        plgpu.commit_smem()
    plgpu.barrier_arrive(free)


def _over_tiles(step, carry, tiles, far, near, first=0):
    """Runs step(s, carry, diagonal, mixed) from step `first`, on the diagonal, to those before `tiles` * `far`.

    Those before `tiles` * `near` hold one document, the others may be `mixed`. If near is far there are no documents;
    None: it is not known, and of two loops the registers suffice for one.
    """
    packed, start = near is not far, first + 1
    carry = step(first, carry, True, packed)
    if near is not None:
        whole = jnp.maximum(start, tiles * near)
        carry = lax.fori_loop(start, whole, lambda s, carry: step(s, carry, False, False), carry)
        start = whole
    return lax.fori_loop(start, tiles * far, lambda s, carry: step(s, carry, False, True), carry) if packed else carry


def _skip(first, full, free):
    """Lets the tiles before the diagonal go by: half of a block's rows do not meet the other half's."""

    @pl.when(first > 0)
    def _():
        plgpu.barrier_wait(full)
        plgpu.barrier_arrive(free)


def _call(kernel, out_type, scratch, grid, arguments, interpret):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        compiler_params=WARPGROUP.replace(approx_math=True),
        grid=grid,
        grid_names=("batch", "head", "block"),
        num_threads=3,
        thread_name="group",
        interpret=interpret,
    )(*arguments)


def _place():
    return (lax.axis_index(name) for name in ("batch", "head", "block", "group"))


def _forward_scratch(H: int, V: int, dtype, copies: int) -> list:
    """Shared memory and barriers of the forward kernel; `copies` arrive for the rows kept, and for a tile of keys."""
    return [
        plgpu.SMEM((2, ROWS, H), dtype),
        plgpu.SMEM((STAGES, BLOCK, H), dtype),
        plgpu.SMEM((STAGES, BLOCK, V), dtype),
        plgpu.SMEM((2, ROWS), jnp.int32),
        plgpu.SMEM((STAGES, BLOCK), jnp.int32),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=2, num_arrivals=copies),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=copies),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        plgpu.Barrier(num_barriers=STAGES),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
    ]


def forward(q_BTNH, k_BTKH, v_BTKV, segments, scale, interpret=False, marks_BS=None):
    """Returns o_BTNV and log_sum_BNT; exact softmax by a running maximum (FlashAttention-2, arXiv 2307.08691).

    Args:
      marks_BS: segments of the keys, of which there are more than queries, by whole BLOCKs: the last query stands at
        the last key. None: they are the queries' own.
    """
    (B, T, N, H), (K, V), dtype = q_BTNH.shape, v_BTKV.shape[2:], q_BTNH.dtype
    blocks, before = T // BLOCK, k_BTKH.shape[1] - T
    of_keys = () if marks_BS is None else (marks_BS,)

    def attention(q_ref, k_ref, v_ref, *refs):
        segment_refs, mark_refs = refs[: len(segments)], refs[len(segments) :][: len(of_keys)]
        o_ref, log_sum_ref, q_smem, k_smem, v_smem, row_smem, column_smem, log_sum_smem = refs[-14:-6]
        q_full, k_full, k_free, v_full, v_free, turn = refs[-6:]
        b, n, i, group = _place()
        i = blocks - 1 - i  # the longest first
        kv_head = n // (N // K)
        far, near = (ref[b, i] for ref in segment_refs[1:]) if segments else (i + 1,) * 2

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(group == LOADER)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def keys(s):
                place = pl.ds(before + (i - s) * BLOCK, BLOCK)
                marks = [(ref.at[b, place], column_smem) for ref in (mark_refs or segment_refs)[:1]]
                return [(k_ref.at[b, place, kv_head], k_smem), *marks]

            def values(s):
                return [(v_ref.at[b, pl.ds(before + (i - s) * BLOCK, BLOCK), kv_head], v_smem)]

            _stream(far, STAGES, (k_full, k_free, keys), (v_full, v_free, values))

        @pl.when(group != LOADER)
        def _compute():
            plgpu.set_max_registers(REGISTERS, action="increase")
            first_row = i * BLOCK + group * ROWS
            rows = pl.ds(first_row, ROWS)
            marks = [(ref.at[b, rows], row_smem.at[group]) for ref in segment_refs[:1]]
            _load_rows(q_full.at[group], (q_ref.at[b, rows, n], q_smem.at[group]), *marks)
            pl.when(group == 1)(take_turns)

            def step(s, carry, diagonal, mixed):
                """One warpgroup multiplies while the other exponentiates."""
                total, largest, weight = carry
                stage = lax.rem(s, STAGES)
                plgpu.barrier_wait(k_full.at[stage])
                zeros = jnp.zeros((ROWS, BLOCK), jnp.float32)
                scores = _add_product(zeros, q_smem.at[group], k_smem.at[stage], interpret, True, take_turns)
                marks = (row_smem[group], column_smem[stage]) if mixed else ()
                scores = _hide(scores, -jnp.inf, group * ROWS if diagonal else None, 0, marks)
                _release(k_free.at[stage], mixed or interpret)
                new = jnp.maximum(largest, scores.max(axis=1) * (scale * LOG2_E))
                p = jnp.exp2(scores * (scale * LOG2_E) - _of_rows(new, scores.shape))
                shrink = jnp.exp2(largest - new)
                weight = weight * shrink + p.sum(axis=1)
                total *= _of_rows(shrink, total.shape)
                p = p.astype(dtype)
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[stage])
                plgpu.barrier_wait(turn)
                total = _add_product(total, p, v_smem.at[stage], interpret)
                _release(v_free.at[stage], interpret)
                return total, new, weight

            zeros = jnp.zeros((ROWS, V), jnp.float32), jnp.full((ROWS,), LEAST), jnp.zeros((ROWS,), jnp.float32)
            total, largest, weight = _over_tiles(step, zeros, 1, far, near)
            pl.when(group == 0)(take_turns)
            o_ref[b, rows, n] = (total / _of_rows(weight, total.shape)).astype(dtype)
            log_sum_smem[group] = largest + jnp.log(weight) * LOG2_E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(log_sum_smem.at[group], log_sum_ref.at[b, n, rows])
            plgpu.wait_smem_to_gmem(0)

    inputs = q_BTNH, k_BTKH, v_BTKV
    out_type = kernel_output((B, T, N, V), dtype, *inputs), kernel_output((B, N, T), jnp.float32, *inputs)
    scratch = _forward_scratch(H, V, dtype, copies=2 if segments else 1)
    return _call(attention, out_type, scratch, (B, N, blocks), (*inputs, *segments, *of_keys), interpret)


def _backward_scratch(H: int, V: int, dtype, starts: int, copies: tuple[int, int]) -> list:
    """Shared memory and barriers of a backward kernel: rows that each warpgroup keeps, and tiles that stream past.

    Args:
      starts: how many pairs of row statistics are held: they belong to the rows kept, or to the tiles.
      copies: that arrive for the rows kept, and for a tile.
    """
    return [
        plgpu.SMEM((2, ROWS, H), dtype),
        plgpu.SMEM((2, ROWS, V), dtype),
        plgpu.SMEM((BACKWARD_STAGES, ROWS, H), dtype),
        plgpu.SMEM((BACKWARD_STAGES, ROWS, V), dtype),
        plgpu.SMEM((starts, 2, ROWS), jnp.float32),
        plgpu.SMEM((2, ROWS), jnp.int32),
        plgpu.SMEM((BACKWARD_STAGES, ROWS), jnp.int32),
        plgpu.Barrier(num_barriers=2, num_arrivals=copies[0]),
        plgpu.Barrier(num_barriers=BACKWARD_STAGES, num_arrivals=copies[1]),
        plgpu.Barrier(num_barriers=BACKWARD_STAGES, num_arrivals=2),
    ]


def gradient_of_queries(q_BTNH, k_BTKH, v_BTKV, do_BTNV, starts_BN2T, segments, scale, interpret=False):
    """dq = scale ds k, where ds = p (do v^T - delta), p = 2^(scale log2(e) q k^T - log_sum).

    Args:
      starts_BN2T: -log_sum / (scale log2(e)) and -delta, from which the sums of the products q k^T and do v^T start.
    """
    (B, T, N, H), (K, V), dtype = q_BTNH.shape, v_BTKV.shape[2:], q_BTNH.dtype
    blocks, extra = T // BLOCK, 1 if segments else 0

    def attention_dq(q_ref, k_ref, v_ref, do_ref, starts_ref, *refs):
        *segment_refs, dq_ref, q_smem, do_smem, k_smem, v_smem, starts_smem, row_smem, column_smem = refs[:-3]
        rows_full, full, free = refs[-3:]
        b, n, i, group = _place()
        i = blocks - 1 - i  # the longest first
        kv_head = n // (N // K)
        far, near = (ref[b, i] for ref in segment_refs[1:]) if segments else (i + 1,) * 2

        def first_key(s):
            return (i + 1) * BLOCK - (s + 1) * ROWS

        @pl.when(group == LOADER)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def keys(s):
                place = pl.ds(first_key(s), ROWS)
                marks = [(ref.at[b, place], column_smem) for ref in segment_refs[:1]]
                return [(k_ref.at[b, place, kv_head], k_smem), (v_ref.at[b, place, kv_head], v_smem), *marks]

            _stream(2 * far, BACKWARD_STAGES, (full, free, keys))

        @pl.when(group != LOADER)
        def _compute():
            plgpu.set_max_registers(REGISTERS, action="increase")
            first_row = i * BLOCK + group * ROWS
            rows = pl.ds(first_row, ROWS)
            _load_rows(
                rows_full.at[group],
                (q_ref.at[b, rows, n], q_smem.at[group]),
                (do_ref.at[b, rows, n], do_smem.at[group]),
                (starts_ref.at[b, n, :, rows], starts_smem.at[group]),
                *((ref.at[b, rows], row_smem.at[group]) for ref in segment_refs[:1]),
            )
            log_sum, delta = starts_smem[group, 0], starts_smem[group, 1]

            def step(s, dq, diagonal, mixed):
                stage = lax.rem(s, BACKWARD_STAGES)
                plgpu.barrier_wait(full.at[stage])
                scores = _of_rows(log_sum, (ROWS, ROWS))
                scores = _add_product(scores, q_smem.at[group], k_smem.at[stage], interpret, True)
                p = jnp.exp2(scores * (scale * LOG2_E))
                marks = (row_smem[group], column_smem[stage]) if mixed else ()
                p = _hide(p, 0.0, 0 if diagonal else None, 0, marks)
                dp = _of_rows(delta, p.shape)
                dp = _add_product(dp, do_smem.at[group], v_smem.at[stage], interpret, True)
                ds = (p * dp).astype(dtype)
                dq = _add_product(dq, ds, k_smem.at[stage], interpret)
                _release(free.at[stage], mixed or interpret)
                return dq

            _skip(1 - group, full.at[0], free.at[0])
            dq = _over_tiles(step, jnp.zeros((ROWS, H), jnp.float32), 2, far, near, 1 - group)
            q_smem[group] = (dq * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[group], dq_ref.at[b, rows, n])
            plgpu.wait_smem_to_gmem(0)

    inputs = q_BTNH, k_BTKH, v_BTKV, do_BTNV, starts_BN2T
    scratch = _backward_scratch(H, V, dtype, starts=2, copies=(3 + extra, 2 + extra))
    out_type = kernel_output(q_BTNH.shape, dtype, *inputs)
    return _call(attention_dq, out_type, scratch, (B, N, blocks), (*inputs, *segments), interpret)


def gradients_of_keys(q_BTNH, k_BTKH, v_BTKV, do_BTNV, starts_BN2T, segments, scale, interpret=False):
    """dk = scale ds^T q and dv = p^T do, summed over the query heads of a key head; ds and p as above."""
    (B, T, N, H), (K, V), dtype = q_BTNH.shape, v_BTKV.shape[2:], q_BTNH.dtype
    heads, extra = N // K, 1 if segments else 0

    def attention_dk_dv(q_ref, k_ref, v_ref, do_ref, starts_ref, *refs):
        *segment_refs, dk_ref, dv_ref, k_smem, v_smem, q_smem, do_smem = refs[:-6]
        starts_smem, row_smem, column_smem, rows_full, full, free = refs[-6:]
        b, kv_head, j, group = _place()
        far = segment_refs[1][b, j] if segments else T // BLOCK - j
        near = None if segments else far
        tiles = 2 * far  # of a head

        @pl.when(group == LOADER)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def queries(s):
                g = 0 if heads == 1 else lax.div(s, tiles)
                place, n = pl.ds(j * BLOCK + (s - g * tiles) * ROWS, ROWS), kv_head * heads + g
                return [
                    (q_ref.at[b, place, n], q_smem),
                    (do_ref.at[b, place, n], do_smem),
                    (starts_ref.at[b, n, :, place], starts_smem),
                    *((ref.at[b, place], column_smem) for ref in segment_refs[:1]),
                ]

            _stream(heads * tiles, BACKWARD_STAGES, (full, free, queries))

        @pl.when(group != LOADER)
        def _compute():
            plgpu.set_max_registers(REGISTERS, action="increase")
            first_row = j * BLOCK + group * ROWS
            rows = pl.ds(first_row, ROWS)
            _load_rows(
                rows_full.at[group],
                (k_ref.at[b, rows, kv_head], k_smem.at[group]),
                (v_ref.at[b, rows, kv_head], v_smem.at[group]),
                *((ref.at[b, rows], row_smem.at[group]) for ref in segment_refs[:1]),
            )

            def head(g, carry):
                def step(s, carry, diagonal, mixed):
                    dk, dv = carry
                    stage = lax.rem(g * tiles + s, BACKWARD_STAGES)
                    plgpu.barrier_wait(full.at[stage])
                    scores = _of_columns(starts_smem[stage, 0], (ROWS, ROWS))
                    scores = _add_product(scores, k_smem.at[group], q_smem.at[stage], interpret, True)
                    marks = (row_smem[group], column_smem[stage]) if mixed else ()
                    scores = _hide(scores, -jnp.inf, 0 if diagonal else None, 1, marks)
                    p = jnp.exp2(scores * (scale * LOG2_E))
                    dv = _add_product(dv, p.astype(dtype), do_smem.at[stage], interpret)
                    dp = _of_columns(starts_smem[stage, 1], p.shape)
                    dp = _add_product(dp, v_smem.at[group], do_smem.at[stage], interpret, True)
                    ds = (p * dp).astype(dtype)
                    dk = _add_product(dk, ds, q_smem.at[stage], interpret)
                    _release(free.at[stage], True)
                    return dk, dv

                stage = lax.rem(g * tiles, BACKWARD_STAGES)
                _skip(group, full.at[stage], free.at[stage])
                return _over_tiles(step, carry, 2, far, near, group)

            zeros = jnp.zeros((ROWS, H), jnp.float32), jnp.zeros((ROWS, V), jnp.float32)
            dk, dv = head(0, zeros) if heads == 1 else lax.fori_loop(0, heads, head, zeros)
            k_smem[group] = (dk * scale).astype(dtype)
            v_smem[group] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem.at[group], dk_ref.at[b, rows, kv_head])
            plgpu.copy_smem_to_gmem(v_smem.at[group], dv_ref.at[b, rows, kv_head])
            plgpu.wait_smem_to_gmem(0)

    inputs = q_BTNH, k_BTKH, v_BTKV, do_BTNV, starts_BN2T
    scratch = _backward_scratch(H, V, dtype, starts=BACKWARD_STAGES, copies=(2 + extra, 3 + extra))
    out_type = kernel_output(k_BTKH.shape, dtype, *inputs), kernel_output(v_BTKV.shape, dtype, *inputs)
    return _call(attention_dk_dv, out_type, scratch, (B, K, T // BLOCK), (*inputs, *segments), interpret)
