"""Tokens to rows sorted by expert, and expert outputs back to tokens.

Bytes on TPU at V2's shape, as compiled for v5p, v5e and v6e (tests/tpu counts them in the compiled programs; nothing
was timed). T = 4096 tokens, K = 6, D = 5120 in bfloat16: T x D is 40 MiB, the rows that serve 240, all G = 45056 rows,
padding included, 440.

    dispatch   960 MiB: reads 440 and writes 440, and copies x once to put a row of zeros after it. The least is
               40 + 440: twice that. With a masked gather (`xla`) another 880 go by.
    combine    760: gathers K times T x D and adds, 3 x 240 + 40. The least is 240 + 40: 2.7 times that.
    gradients  dispatch's is combine: 760. Combine's is dispatch of dy, 960, then scaled, 2 x 440, and for the gates
               gathers K times T x D, 2 x 240, that are read with dy, 240 + 40: 2600. The least is 40 + 240 + 440: 3.6
               times that. No [G, D] is in float32, which `xla` writes and reads at 880 each way.

A Pallas kernel would copy single rows by DMA, T K = 24576 copies of 10 KiB (Lite: 4) for each op: it is bound by how
fast a core issues and awaits copies, not by bytes. And a row is not contiguous: bfloat16 lies in tiles of 8 x 128 with
rows in pairs, so that combine would need a pass over [G, D] before, 880 MiB, above the 480 it could save, and dispatch
one after, to save the 400 of reading a token K times. Or columns of x lie in vector memory, and x is read once: then
45056 x 40 pieces of 128 lanes are loaded, merged with the other half of their pair and stored. At one a cycle, on both
cores of v5p at 1.75 GHz, that takes 0.5 ms, where 960 MiB take 0.36 of its 2.77 TB/s. XLA's gathers stay, above the
least as they are.

On Hopper, as compiled for sm_90 (`xla`; tiles of 64 rows, so that all G = 34816 rows are 340 MiB; check_gpu.py counts
the passes in the compiled programs): each op and dispatch's gradient is one kernel over the rows, combine's gradients
are two, with masks, gates, casts and the sum over K fused into the gather.

    dispatch   writes 340 MiB and reads x: 40, if the K - 1 other readings of a token are served by 60 MB of
               second-level cache, which no compiler tells. The least is that.
    combine    reads the 240 MiB of rows that serve a token and writes 40: the least.
    gradients  dispatch's reads 240 and writes 40; combine's reads dy and writes 340, then reads 240 + 40 for the gates.

A kernel that copies rows by TMA would move the same bytes. What it could save is the rows between these ops and the
grouped matmul; wgmma reads whole tiles, which TMA does not gather on this chip.
"""

from kernels_pallas.token_dispatch.api import combine, dispatch

__all__ = ["combine", "dispatch"]
