"""The kernel of latent attention on Hopper: a warpgroup that copies and two that compute (gpu.py says how)."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu import read

ROWS = KEYS = ROPE = 64  # rows of a block; keys of a tile; lanes of the rotary part, zeros beyond its width
CHUNK = 128  # lanes that are de-quantised at once
_HIDDEN, _LEAST = -1e30, -1e20  # of a score, and of a maximum, so that a row that sees nothing yet has weights of 0
_REGISTERS = (40, 232), (80, 216)  # of a thread that copies, and that computes; the second where it de-quantises
_ROPE, _HALF = 0, 1  # barriers of a tile: of the rotary part, then of each half of the latents


def _visible(key, place):
    return key <= place


def _wait_for_weights(barrier):
    plgpu.barrier_wait(barrier)


class _Block(NamedTuple):
    """A block of the grid: its place, its memory and its barriers."""

    part: jax.Array  # of the keys
    unit: jax.Array  # rows, of one sequence
    sequence: jax.Array
    first: jax.Array  # pair of tiles of the part, and how many there are
    pairs: jax.Array
    heads: int
    blocks: int  # of a sequence
    scale: float
    is_packed: bool  # two integers in a byte
    interpret: bool
    offset_ref: Any
    block_ref: Any
    q_ref: Any
    pages_ref: Any
    scales_ref: list
    o_ref: Any
    lse_ref: Any
    q_smem: Any
    weight_smem: Any
    latent_smem: Any
    rope_smem: Any
    max_smem: Any
    sum_smem: Any
    q_loaded: Any
    loaded: Any
    consumed: Any
    published: Any
    finished: Any

    @property
    def R(self) -> int:
        return self.q_smem.shape[2]

    @property
    def halves(self) -> list:
        return [pl.ds(w * (self.R // 2), self.R // 2) for w in range(2)]

    @property
    def parts(self) -> list:
        """Lanes of the rotary part and of the halves."""
        return [pl.ds(self.R, ROPE), *self.halves]

    @property
    def registers(self) -> tuple[int, int]:
        return _REGISTERS[bool(self.scales_ref)]

    def cast(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)  # the interpreter of JAX 0.10 has no layouts

    def read(self, ref, layout):
        return read(ref, self.interpret, layout=layout)

    def of_rows(self, x_M):
        return self.cast(x_M, plgpu.Layout.WGMMA.reduce(1))


def latent_attention_kernel(
    first_ref, pairs_ref, offset_ref, block_ref, q_ref, pages_ref, *refs, heads, blocks, scale, is_packed, interpret
):
    *scales_ref, o_ref, lse_ref = refs[:-11]
    part, unit, group = (jax.lax.axis_index(name) for name in ("part", "unit", "group"))
    sequence = jax.lax.div(unit, jnp.int32(blocks))
    place = part, unit, sequence, first_ref[part, unit], pairs_ref[part, unit]
    memory = offset_ref, block_ref, q_ref, pages_ref, scales_ref, o_ref, lse_ref
    block = _Block(*place, heads, blocks, scale, is_packed, interpret, *memory, *refs[-11:])
    pl.when(group == 2)(functools.partial(_copy, block))
    for w in range(2):
        pl.when(group == w)(functools.partial(_compute, block, w))


# --- values and layouts ----------------------------------------------------------------------------------------------


def _hidden(index):
    """An index the compiler cannot see through: it would keep a tile's 36 matrix descriptors in registers."""
    return jax.lax.optimization_barrier(jnp.int32(index))


def _across(x_M, like):
    return jax.lax.broadcast_in_dim(x_M, like.shape, [0])


def _copied(columns):
    return plgpu.Layout.SMEM_GMEM_COPY((KEYS, columns.size), jnp.bfloat16, 128)


def _pieces(block: _Block) -> list:
    """What is de-quantised at once: (parts it belongs to, columns of the pages, first column of the parts)."""
    width = math.gcd(block.R // 2, CHUNK)
    return [
        ((k,), [pl.ds(lanes.start + at, min(width, lanes.size))], at)
        for k, lanes in enumerate(block.parts)
        for at in range(0, lanes.size, width)
    ]


def _packed_pieces(block: _Block) -> list:
    """The same of two integers a byte: the halves of the latents are its low and its high ones (gpu.py).

    So are the halves of the rotary part, which is read twice: as high ones so that they stand behind the low ones.
    """
    first, width = block.R // 2, math.gcd(block.R // 2, CHUNK // 2)
    rope = (_ROPE,), [pl.ds(first, ROPE), pl.ds(first - ROPE // 2, ROPE)], 0
    return [rope, *(((_HALF, _HALF + 1), [pl.ds(at, width)], at) for at in range(0, first, width))]


def _values(block: _Block, parts, codes) -> list:
    """float32 of each part's columns, not yet multiplied."""

    if not block.is_packed:
        return [codes[0].astype(jnp.bfloat16 if codes[0].dtype == jnp.int8 else jnp.float16).astype(jnp.float32)]
    low, high = codes[0].astype(jnp.int32), codes[-1].astype(jnp.int32)  # bytes have no arithmetic here
    low = jax.lax.shift_right_arithmetic(jax.lax.shift_left(low, jnp.full_like(low, 28)), jnp.full_like(low, 28))
    high = jax.lax.shift_right_arithmetic(high, jnp.full_like(high, 4))
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    if parts != (_ROPE,):
        return [low, high]
    column = block.cast(jax.lax.broadcasted_iota(jnp.int32, low.shape, 1), _copied(pl.ds(0, ROPE)))
    return [jnp.where(column < ROPE // 2, low, high)]


# --- the warpgroup that copies ---------------------------------------------------------------------------------------


def _copy(block: _Block) -> None:
    R, copies = block.R, KEYS // block.pages_ref.shape[1]
    plgpu.set_max_registers(block.registers[0], action="decrease")
    plgpu.copy_gmem_to_smem(block.q_ref.at[block.unit, :, pl.ds(0, R)], block.q_smem.at[0], block.q_loaded)
    # The rotary query stands in the second tile of weights until both warpgroups hold it in registers.
    rotary = block.q_ref.at[block.unit, :, pl.ds(R, ROPE)]
    plgpu.copy_gmem_to_smem(rotary, block.weight_smem.at[1], block.q_loaded)

    def released(j, slot, k):
        pl.when(j > 0)(functools.partial(plgpu.barrier_wait, block.consumed.at[3 * slot + k]))

    def copied(j, slot, k):
        """Part k of the pair's tile `slot` from its blocks."""
        released(j, slot, k)
        for i in range(copies):
            source = block.block_ref[block.sequence, (2 * (block.first + j) + slot) * copies + i]
            rows = pl.ds(i * (KEYS // copies), KEYS // copies)
            target = block.rope_smem.at[slot, rows] if k == _ROPE else block.latent_smem.at[slot, k - _HALF, rows]
            page = block.pages_ref.at[source, :, block.parts[k]]
            plgpu.copy_gmem_to_smem(page, target, block.loaded.at[3 * slot + k])

    def fetched(j, slot, parts, columns, at):
        """Columns of the pages as they are stored, and the scales of their part."""
        source = block.block_ref[block.sequence, 2 * (block.first + j) + slot]
        inside = jnp.int32(block.scales_ref[0].shape[2])
        place = jax.lax.div(source, inside), int(parts[0] == _ROPE), jax.lax.rem(source, inside)
        scale_K = block.read(block.scales_ref[0].at[place], _copied(columns[0]).reduce(1))
        return [block.read(block.pages_ref.at[source, :, c], _copied(c)) for c in columns], scale_K

    def dequantised(j, slot, parts, columns, at, codes, scale_K):
        """Writes columns from `at` on of each of `parts`, whose first wait for the memory, and last hand it over."""
        size = columns[0].size
        scale_KL = block.cast(jax.lax.broadcast_in_dim(scale_K, (KEYS, size), [0]), _copied(columns[0]))
        # Rounded before the wait, which would hold twice the registers otherwise.
        rounded = [(values * scale_KL).astype(jnp.bfloat16) for values in _values(block, parts, codes)]
        for k, values in zip(parts, rounded, strict=True):
            if at == 0:
                released(j, slot, k)
            target = block.rope_smem.at[slot] if k == _ROPE else block.latent_smem.at[slot, k - _HALF]
            target[:, pl.ds(at, size)] = values
            if at + size == block.parts[k].size:
                plgpu.commit_smem()
                plgpu.barrier_arrive(block.loaded.at[3 * slot + k])

    def copy_pair(j, _):
        for slot in range(2):
            for k in range(3):
                copied(j, slot, k)
        return 0

    def dequantise_pair(j, ahead):
        following = jnp.minimum(j + 1, block.pairs - 1)
        for i, piece in enumerate(pieces):
            last = i + 1 == len(pieces)
            here, ahead = ahead, fetched(following if last else j, *pieces[0 if last else i + 1])
            dequantised(j, *piece, *here)
        return ahead

    pieces = [(slot, *piece) for slot in range(2) for piece in (_packed_pieces if block.is_packed else _pieces)(block)]
    if block.scales_ref:
        jax.lax.fori_loop(0, block.pairs, dequantise_pair, fetched(0, *pieces[0]))
    else:
        jax.lax.fori_loop(0, block.pairs, copy_pair, 0)

    @pl.when(block.pairs > 0)
    def _():
        for k in range(6):
            plgpu.barrier_wait(block.consumed.at[k])


# --- the warpgroups that compute -------------------------------------------------------------------------------------


def _loaded_operand(a):
    """For the interpreter only; its loads count as the tensor cores' where `commit_smem` follows them."""
    value = a if isinstance(a, jax.Array) else a[...]
    plgpu.commit_smem()
    return value


def _times_transposed(interpret, accumulator, a, b_ref):
    if interpret:  # which has neither transposed references nor operands in registers
        a, b = _loaded_operand(a), _loaded_operand(b_ref)
        return accumulator + jnp.dot(a, b.T, preferred_element_type=jnp.float32)
    plgpu.wgmma(accumulator, a, b_ref.transpose((1, 0)))
    return accumulator


def _add_values(block: _Block, sum_MR, a, slot, half):
    values = block.latent_smem.at[_hidden(slot), half]
    if block.interpret:  # which has no run_state
        a, values = _loaded_operand(a), _loaded_operand(values)
        return sum_MR + jnp.dot(a, values, preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, values))(plgpu.ACC.init(sum_MR))


def _compute(block: _Block, w: int) -> None:
    """Warpgroup w: scores of tiles w, w + 2, ...; half w of the output."""
    plgpu.set_max_registers(block.registers[1], action="increase")
    plgpu.barrier_wait(block.q_loaded)
    rope_q = block.weight_smem[1]
    row = block.of_rows(jax.lax.broadcasted_iota(jnp.int32, (ROWS,), 0))
    row += jax.lax.rem(block.unit, jnp.int32(block.blocks)) * ROWS
    place_M = block.offset_ref[block.sequence] + jax.lax.div(row, jnp.full_like(row, block.heads))

    def scores():
        zero, own = _hidden(0), _hidden(w)

        def products(accumulator):
            for k, a, b in (
                (_ROPE, rope_q, block.rope_smem.at[own]),
                (_HALF, block.q_smem.at[zero, :, block.halves[0]], block.latent_smem.at[own, 0]),
                (_HALF + 1, block.q_smem.at[zero, :, block.halves[1]], block.latent_smem.at[own, 1]),
            ):
                plgpu.barrier_wait(block.loaded.at[3 * w + k])
                accumulator = _times_transposed(block.interpret, accumulator, a, b)
            return accumulator if block.interpret else accumulator[...]

        zeros = jnp.zeros((ROWS, KEYS), jnp.float32)
        s_MK = products(zeros) if block.interpret else pl.run_scoped(products, plgpu.ACC((ROWS, KEYS), jnp.float32))
        plgpu.barrier_arrive(block.consumed.at[3 * w + _ROPE])
        return s_MK

    def publish(s_MK, tile, before_M):
        """Weights of the tile, for the other warpgroup too, with the rows' maxima so far and their sums."""
        key = block.cast(jax.lax.broadcasted_iota(jnp.int32, s_MK.shape, 1), plgpu.Layout.WGMMA)
        key += tile * KEYS
        s_MK = jnp.where(_visible(key, _across(place_M, s_MK)), s_MK * (block.scale * math.log2(math.e)), _HIDDEN)
        largest_M = jnp.maximum(before_M, jnp.max(s_MK, axis=1))
        weight_MK = jnp.exp2(s_MK - _across(largest_M, s_MK))
        rounded_MK = weight_MK.astype(jnp.bfloat16)
        block.weight_smem[w] = rounded_MK
        block.max_smem[w] = largest_M
        plgpu.commit_smem()
        plgpu.barrier_arrive(block.published.at[w])
        return rounded_MK, largest_M, jnp.sum(weight_MK, axis=1)

    def meet(weights, slot, kept_M, sum_MR):
        if slot != w:
            plgpu.barrier_wait(block.loaded.at[3 * slot + _HALF + w])
        sum_MR = _add_values(block, sum_MR * _across(kept_M, sum_MR), weights, slot, w)
        plgpu.barrier_arrive(block.consumed.at[3 * slot + _HALF + w])
        return sum_MR

    def pair(j, carry):
        sum_MR, before_M, total_M = carry
        tile = 2 * (block.first + j) + w
        s_MK = scores()
        if w == 0:
            weights, first_M, here_M = publish(s_MK, tile, before_M)
            kept_M = jnp.exp2(before_M - first_M)
            sum_MR = meet(weights, 0, kept_M, sum_MR)
            total_M = total_M * kept_M + here_M
            _wait_for_weights(block.published.at[1])
            second_M = block.of_rows(block.max_smem[1])
            kept_M = jnp.exp2(first_M - second_M)
            sum_MR = meet(block.weight_smem.at[1], 1, kept_M, sum_MR)
            return sum_MR, second_M, total_M * kept_M
        _wait_for_weights(block.published.at[0])
        first_M = block.of_rows(block.max_smem[0])
        weights, second_M, here_M = publish(s_MK, tile, first_M)
        sum_MR = meet(block.weight_smem.at[0], 0, jnp.exp2(before_M - first_M), sum_MR)
        sum_MR = meet(weights, 1, jnp.exp2(first_M - second_M), sum_MR)
        return sum_MR, second_M, total_M * jnp.exp2(before_M - second_M) + here_M

    least_M, zero_M = (block.of_rows(jnp.full((ROWS,), value, jnp.float32)) for value in (_LEAST, 0.0))
    start = block.cast(jnp.zeros((ROWS, block.R // 2), jnp.float32), plgpu.Layout.WGMMA), least_M, zero_M
    sum_MR, largest_M, total_M = jax.lax.fori_loop(0, block.pairs, pair, start)
    block.sum_smem[w] = total_M
    plgpu.barrier_arrive(block.finished)
    plgpu.barrier_wait(block.finished)
    total_M = jnp.maximum(total_M + block.of_rows(block.sum_smem[1 - w]), 1e-30)
    o_MR = (sum_MR / _across(total_M, sum_MR)).astype(block.o_ref.dtype)
    block.o_ref[block.part, block.unit, :, block.halves[w]] = o_MR
    if w == 0:
        block.lse_ref[block.part, block.unit] = largest_M * math.log(2) + jnp.log(total_M)
