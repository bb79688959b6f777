"""Sequential packing, one prediction at a time; nothing imported but NumPy."""

import numpy as np


def pack(documents, length):
    """Rows as dicts of int arrays [rows, length]: tokens, targets, segments (0 is padding), positions."""
    chain = [(d, i) for d, ids in enumerate(documents) for i in range(len(ids) - 1)]
    count = -(-len(chain) // length)
    rows = {name: np.zeros((count, length), np.int64) for name in ("tokens", "targets", "segments", "positions")}
    for k, (d, i) in enumerate(chain):
        r, c = k // length, k % length
        new = c == 0 or chain[k - 1][0] != d
        rows["tokens"][r, c], rows["targets"][r, c] = documents[d][i], documents[d][i + 1]
        rows["segments"][r, c] = (0 if c == 0 else rows["segments"][r, c - 1]) + new
        rows["positions"][r, c] = 0 if new else rows["positions"][r, c - 1] + 1
    return rows
