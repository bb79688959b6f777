"""Tokens to rows sorted by expert, and expert outputs back to tokens.

Bytes on TPU at V2's shape, as compiled for v5p (T = 4096 tokens, K = 6, D = 5120 in bfloat16: 40 MiB a T x D, and 240 of
rows that serve, in G = 45056 rows of 440 MiB, padding included):

    dispatch   reads 440 and writes 440 MiB, and copies x once to put a row of zeros after it; with a masked gather
               (`xla`) another 880 go by. The least is 40 + 440.
    combine    gathers K times T x D and adds: 3 x 240 + 40 MiB. The least is 240 + 40.
    gradients  each the other's, but for combine's, which scales the gathered rows: 2 x 440 more, and no float32
               [G, D], which `xla` writes and reads at 880 MiB each way.

A Pallas kernel would have to copy single rows by DMA: 24576 copies of 10 KiB (Lite: 4 KiB). A row is not contiguous in the
tiled layout of bfloat16, so that it needs a pass over [G, D] before combine, 880 MiB, above the 480 it could save there;
for dispatch it could save the 400 of a token read K times, and needs that pass after. XLA's gathers stay.
"""

from kernels_pallas.token_dispatch.api import combine, dispatch

__all__ = ["combine", "dispatch"]
