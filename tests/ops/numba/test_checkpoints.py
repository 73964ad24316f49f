"""Checkpoints of one sequence never reach into those of the next, nor beyond the last."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastweights.ops.numba.checkpoints import SEGMENT, checkpoint_count, first_checkpoint


def _segments(length: int) -> int:
    return -(-length // SEGMENT)


@given(st.lists(st.integers(0, 3 * SEGMENT), min_size=1, max_size=5))
def test_of_packed_sequences(lengths):
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    firsts = [first_checkpoint(n, start, sum(lengths), True) for n, start in enumerate(starts)]
    firsts.append(checkpoint_count(len(lengths), sum(lengths), packed=True))
    for length, (first, following) in zip(lengths, pairwise(firsts), strict=True):
        assert first + _segments(length) <= following


@given(st.integers(1, 4), st.integers(0, 3 * SEGMENT))
def test_of_rows(N, T):
    firsts = [first_checkpoint(n, 0, T, False) for n in range(N)]
    assert firsts == [n * _segments(T) for n in range(N)]
    assert checkpoint_count(N, T, packed=False) == N * _segments(T)
