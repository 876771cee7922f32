"""Padding by hand, and what must hold of any sequences."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sea_jax.data import batching


def test_the_padding_stands_behind_or_before():
    tokens, valid = batching.pad([[7], [8, 9]], (3, 3), pad_id=0)
    np.testing.assert_array_equal(tokens, [[7, 0, 0], [8, 9, 0], [0, 0, 0]])
    np.testing.assert_array_equal(valid, [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    tokens, valid = batching.pad([[7], [8, 9], []], (3, 3), pad_id=0, left=True)
    np.testing.assert_array_equal(tokens, [[0, 0, 7], [0, 8, 9], [0, 0, 0]])
    np.testing.assert_array_equal(valid, [[0, 0, 1], [0, 1, 1], [0, 0, 0]])


def test_short_sequences_share_short_batches():
    found = list(batching.by_length([[1] * 5, [2], [3] * 3], batch_size=2, bucket=4, pad_id=0))
    assert [batch.rows.tolist() for batch in found] == [[1, 2], [0]]
    assert [batch.tokens.tolist() for batch in found] == [
        [[2, 0, 0, 0], [3, 3, 3, 0]],
        [[1, 1, 1, 1, 1, 0, 0, 0], [0] * 8],
    ]


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=10), max_size=12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_sequence_comes_once_and_whole(sequences, batch_size, bucket, left):
    longest = max(map(len, sequences), default=0)
    found: dict[int, list[int]] = {}
    for rows, tokens, valid in batching.by_length(
        sequences, batch_size=batch_size, bucket=bucket, pad_id=0, longest=longest, left=left
    ):
        assert tokens.shape == valid.shape
        assert len(tokens) == batch_size
        assert tokens.shape[1] == longest or tokens.shape[1] % bucket == 0
        assert not valid[len(rows) :].any()
        assert not tokens[~valid].any()
        found |= {int(row): tokens[i][valid[i]].tolist() for i, row in enumerate(rows)}
    assert found == dict(enumerate(sequences))
