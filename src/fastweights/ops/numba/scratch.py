"""Scratch memory of the CPU kernels: one block, cut into the buffers that a kernel names.

A kernel describes its buffers once, by a function that returns their sizes as a named tuple. The size of the block
and, in the kernel, the start of each buffer (`vectors.place`) come from that tuple alone.

A block is laid out as

    guard, first buffer, guard, second buffer, ..., last buffer, guard

where a guard is empty but under `guarded()`, with which tests find out whether kernels stay inside their buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_GUARD = 64  # numbers; whole cache lines leave the alignment of buffers as it is
_UNTOUCHED = 0x7FC0BEEF  # as a float32 it is NaN, which spoils the results of a kernel that reads it

_guard = 0


@contextmanager
def guarded() -> Iterator[None]:
    """For tests: scratch starts as NaN, with guards around buffers; a kernel that overwrites one raises an error."""
    global _guard
    before, _guard = _guard, _GUARD
    try:
        yield
    finally:
        _guard = before


def guard_size() -> int:
    """Numbers in each guard of the blocks that are taken now."""
    return _guard


class Scratch:
    """A block for one run of a kernel; `sizes` is a named tuple of how many float32 numbers each buffer has."""

    def __init__(self, sizes: Any, guard: int) -> None:
        self._sizes, self._guard = sizes, guard
        self._block = torch.empty(sum(sizes) + guard * (len(sizes) + 1), dtype=torch.int32)
        if guard:
            self._block.fill_(_UNTOUCHED)
        self.address = self._block.data_ptr()

    def check(self) -> None:
        """Raise a RuntimeError that names the buffer beyond which the kernel has written."""
        if not self._guard:
            return
        at, names = 0, self._sizes._fields
        for i, size in enumerate((*self._sizes, 0)):
            touched = (self._block[at : at + self._guard] != _UNTOUCHED).nonzero().flatten().tolist()
            if touched:
                # What was written lies nearer to the buffer that it belongs to.
                after = i > 0 and (i == len(names) or touched[0] < self._guard - 1 - touched[-1])
                where, culprit = ("past the end of", i - 1) if after else ("before", i)
                raise RuntimeError(
                    f"a kernel wrote {where} its buffer {names[culprit]!r}, which has {self._sizes[culprit]} numbers"
                )
            at += self._guard + size
