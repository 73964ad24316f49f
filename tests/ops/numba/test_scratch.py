"""Guards around buffers, and who is blamed for overwriting them."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest

from fastweights.ops.numba import scratch


class Sizes(NamedTuple):
    a: int
    b: int


SIZES, GUARD = Sizes(32, 16), scratch._GUARD
A, B = GUARD, 2 * GUARD + SIZES.a


def _after_writing(first: int, numbers: int) -> scratch.Scratch:
    with scratch.guarded():
        block = scratch.Scratch(SIZES, scratch.guard_size())
    ctypes.memset(block.address + 4 * first, 0, 4 * numbers)
    return block


def test_writing_inside_the_buffers_is_fine():
    _after_writing(A, SIZES.a).check()
    _after_writing(B, SIZES.b).check()


@pytest.mark.parametrize(
    ("first", "where"),
    [
        (A - 1, "before its buffer 'a', which has 32 numbers"),
        (A + SIZES.a, "past the end of its buffer 'a', which has 32 numbers"),
        (A + SIZES.a + 8, "past the end of its buffer 'a', which has 32 numbers"),
        (B - 1, "before its buffer 'b', which has 16 numbers"),
        (B + SIZES.b, "past the end of its buffer 'b', which has 16 numbers"),
        (B + SIZES.b + GUARD - 1, "past the end of its buffer 'b', which has 16 numbers"),
    ],
)
def test_an_overrun_names_its_buffer(first, where):
    with pytest.raises(RuntimeError, match=f"a kernel wrote {where}"):
        _after_writing(first, 1).check()


def test_there_are_no_guards_outside_of_tests():
    assert scratch.guard_size() == 0
    block = scratch.Scratch(SIZES, scratch.guard_size())
    assert block._block.numel() == SIZES.a + SIZES.b
    block.check()
