"""Documents packed into rows of fixed length, one after another, nothing dropped and nothing mixed.

A document of n tokens (BOS first, EOS last) holds n - 1 predictions: input `ids[:-1]`, target `ids[1:]`. Rows are cut
from the chain of all predictions, so every token but a document's BOS is a target exactly once, its closing EOS too.
Where a row ends inside a document, the rest opens the next row as a segment of its own: the token at the cut is the
last target of one row and the first input of the next.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dsv2_jax.types import Batch

# The planes of a packed row, int32 [4, T]: it travels between processes as one array. Weights and bytes follow from it.
TOKENS, TARGETS, SEGMENTS, POSITIONS = range(4)


def pack(
    documents: Iterable[np.ndarray], sequence_length: int, offset: int = 0
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Packs token ids, document by document, into rows of T = `sequence_length`; the last one may end in padding.

    Yields (row_4T, finished, offset): the packed row; how many documents it and the rows before it have used up; and
    how many predictions of the next document they have used. `pack(documents[finished:], T, offset)` goes on from
    there. Segments count from 1 in each row and positions from 0 in each segment; padding is 0 in all planes.
    Raises ValueError for a document without anything to predict at `offset`.
    """
    documents = iter(documents)
    ids, finished = next(documents, None), 0
    while ids is not None:
        row_4T = np.zeros((4, sequence_length), np.int32)
        start = segment = 0
        while start < sequence_length and ids is not None:
            length = min(len(ids) - 1 - offset, sequence_length - start)
            if length < 1:
                raise ValueError(f"a document of {len(ids)} tokens has nothing to predict after token {offset}")
            stop, segment = start + length, segment + 1
            row_4T[TOKENS, start:stop] = ids[offset : offset + length]
            row_4T[TARGETS, start:stop] = ids[offset + 1 : offset + 1 + length]
            row_4T[SEGMENTS, start:stop] = segment
            row_4T[POSITIONS, start:stop] = np.arange(length)
            start, offset = stop, offset + length
            if offset == len(ids) - 1:
                ids, offset, finished = next(documents, None), 0, finished + 1
        yield row_4T, finished, offset


def to_batch(rows: Sequence[np.ndarray], token_bytes_V: np.ndarray) -> Batch:
    """Packed rows [4, T] as one `Batch` of NumPy arrays; `token_bytes_V`: UTF-8 bytes of each token's text."""
    planes_4BT = np.empty((4, len(rows), rows[0].shape[1]), np.int32)
    for i, row_4T in enumerate(rows):
        planes_4BT[:, i] = row_4T  # one copy a row, into contiguous planes
    tokens_BT, targets_BT, segments_BT, positions_BT = planes_4BT
    weights_BT = (segments_BT > 0).astype(np.float32)
    bytes_BT = np.take(token_bytes_V, targets_BT).astype(np.int32, copy=False)
    bytes_BT[segments_BT == 0] = 0
    return Batch(tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT, bytes_BT)
