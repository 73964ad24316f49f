"""Copies between tensors and scratch, and where things lie in both.

Scratch rows are padded with zeros to whole vectors, so the kernels have no remainders to handle and
see neither strides nor logs.

Notation
    K, V     key and value width, in scratch padded to Kp and Vp
"""

from __future__ import annotations

from numba import float32
from numba.extending import register_jitable

from . import checkpoints
from .vectors import (
    LANES,
    exp,
    fill,
    inner,
    integer_at,
    load,
    load_first,
    prefetch,
    shift,
    store,
    store_first,
)

first_checkpoint = register_jitable(checkpoints.first_checkpoint)

LINE = 16
"""Numbers in a line of the processor's cache."""
COLUMNS = 2 * LANES
"""Value columns of a register tile; Vp is a multiple of it."""


@register_jitable
def round_up(width, multiple):
    """The next multiple."""
    return (width + multiple - 1) // multiple * multiple


@register_jitable
def part_width(V, parts):
    """Value columns of each part but the last; rounding up may leave fewer parts than asked for."""
    return round_up((V + parts - 1) // parts, COLUMNS)


@inner
def offset(strides, batch, token, head):
    """Where a row starts in its tensor."""
    return batch * strides[0] + token * strides[1] + head * strides[2]


@inner
def sequence(p, n):
    """(batch row, first token, end, index of the first checkpoint) of sequence n."""
    packed = p.cu_seqlens != 0
    batch, start, end = n, 0, p.T
    if packed:
        batch, start, end = 0, integer_at(p.cu_seqlens, n), integer_at(p.cu_seqlens, n + 1)
    return batch, start, end, first_checkpoint(n, start, p.T, packed)


@inner
def _fetch(row, width):
    """Have a row, which the next block of as many rows will want, on its way from memory."""
    for i in range(0, width, LINE):
        prefetch(row, i)


@inner
def stage(out, out_stride, padded, x, stride, width, rows, scale):
    """Copy rows of a tensor to scratch, scaled; zeros from `width` to `padded`."""
    s = fill(scale)
    zero = fill(float32(0.0))
    whole = width // LANES * LANES
    for t in range(rows):
        to, source = shift(out, t * out_stride), shift(x, t * stride)
        _fetch(shift(source, rows * stride), width)
        for i in range(0, whole, LANES):
            store(to, i, load(source, i) * s)
        for i in range(whole, padded, LANES):
            store(to, i, zero)
        if whole < width:
            store(to, whole, load_first(source, whole, width - whole) * s)


@inner
def unstage(x, stride, width, rows, out, out_stride):
    """Copy scratch rows back to a tensor."""
    whole = width // LANES * LANES
    for t in range(rows):
        to, source = shift(x, t * stride), shift(out, t * out_stride)
        _fetch(shift(to, rows * stride), width)
        for i in range(0, whole, LANES):
            store(to, i, load(source, i))
        if whole < width:
            store_first(to, whole, load(source, whole), width - whole)


@inner
def stage_gate(out, padded, x, stride, width, rows):
    """Like `stage`, but the exponential; 1 in the padding."""
    stage(out, padded, padded, x, stride, width, rows, float32(1.0))
    for i in range(0, rows * padded, LANES):
        store(out, i, exp(load(out, i)))
