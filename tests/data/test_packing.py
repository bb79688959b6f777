import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_jax.data.packing import POSITIONS, SEGMENTS, TARGETS, TOKENS, pack, to_batch
from oracles import packing as oracle

BOS, EOS, VOCAB = 0, 1, 50
bodies = st.lists(st.lists(st.integers(2, VOCAB - 1), max_size=30), min_size=1, max_size=12)
lengths = st.integers(1, 20)


def documents_of(bodies):
    return [np.array([BOS, *body, EOS], np.uint32) for body in bodies]


@given(bodies, lengths)
def test_pack_equals_oracle(bodies, length):
    documents = documents_of(bodies)
    rows_R4T = np.stack([row_4T for row_4T, _, _ in pack(documents, length)])
    assert rows_R4T.dtype == np.int32
    want = oracle.pack(documents, length)
    for plane, name in ((TOKENS, "tokens"), (TARGETS, "targets"), (SEGMENTS, "segments"), (POSITIONS, "positions")):
        np.testing.assert_array_equal(rows_R4T[:, plane], want[name], err_msg=name)


@given(bodies, lengths)
def test_every_token_but_bos_is_a_target_exactly_once_and_nothing_crosses_documents(bodies, length):
    documents = documents_of(bodies)
    rows = [row_4T for row_4T, _, _ in pack(documents, length)]
    pieces = [row[:, row[SEGMENTS] == segment] for row in rows for segment in range(1, row[SEGMENTS].max() + 1)]
    queue = list(documents)
    rest = queue.pop(0)
    for piece in pieces:  # each piece is a stretch of exactly one document, cut only where a row ends
        count = piece.shape[1]
        np.testing.assert_array_equal(piece[TOKENS], rest[:-1][:count])
        np.testing.assert_array_equal(piece[TARGETS], rest[1:][:count])
        np.testing.assert_array_equal(piece[POSITIONS], np.arange(count))
        rest = rest[count:]
        if len(rest) == 1:
            assert piece[TARGETS, -1] == EOS
            rest = queue.pop(0) if queue else None
    assert rest is None
    assert not queue
    assert all((row[SEGMENTS] > 0).all() for row in rows[:-1]), "only the last row may be padded"
    assert (rows[-1][:, rows[-1][SEGMENTS] == 0] == 0).all()


@given(bodies, lengths)
@settings(max_examples=50)
def test_goes_on_from_any_row(bodies, length):
    documents = documents_of(bodies)
    rows = list(pack(documents, length))
    for r, (_, finished, offset) in enumerate(rows):
        rest = list(pack(documents[finished:], length, offset))
        assert len(rest) == len(rows) - r - 1
        for (row_4T, done, after), (want_4T, want_done, want_after) in zip(rest, rows[r + 1 :], strict=True):
            np.testing.assert_array_equal(row_4T, want_4T)
            assert (done + finished, after) == (want_done, want_after)


def test_a_document_longer_than_rows_is_cut_without_losing_a_target():
    (first, *_), (second, *_), (third, *_) = pack([np.arange(10), np.array([20, 21, 22])], 4)
    np.testing.assert_array_equal(first, [[0, 1, 2, 3], [1, 2, 3, 4], [1] * 4, [0, 1, 2, 3]])
    np.testing.assert_array_equal(second, [[4, 5, 6, 7], [5, 6, 7, 8], [1] * 4, [0, 1, 2, 3]])
    np.testing.assert_array_equal(third, [[8, 20, 21, 0], [9, 21, 22, 0], [1, 2, 2, 0], [0, 0, 1, 0]])


@pytest.mark.parametrize("ids", [[], [BOS]])
def test_a_document_without_a_target_is_an_error(ids):
    with pytest.raises(ValueError, match=f"{len(ids)} tokens has nothing to predict"):
        list(pack([np.array([BOS, EOS]), np.array(ids)], 8))


def test_batch_weights_and_bytes_come_from_segments_not_from_token_ids():
    """PAD may be EOS, or any id: the closing EOS counts, padding does not (even where token 0 has bytes)."""
    token_bytes_V = np.arange(1, VOCAB + 1)
    token_bytes_V[EOS] = 0
    rows = [row_4T for row_4T, _, _ in pack([np.array([BOS, 7, 0, EOS])], 5)]
    batch = to_batch([*rows, np.zeros((4, 5), np.int32)], token_bytes_V)
    np.testing.assert_array_equal(batch.targets_BT, [[7, 0, EOS, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.weights_BT, [[1, 1, 1, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.bytes_BT, [[8, 1, 0, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.segments_BT, [[1, 1, 1, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.positions_BT, [[0, 1, 2, 0, 0], [0] * 5])
    dtypes = {name: array.dtype for name, array in vars(batch).items()}
    assert dtypes.pop("weights_BT") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)}
